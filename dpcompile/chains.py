"""Chains of ops on a few numbers of each sample, as one call: squares of norms, what rounding may hide, clip factors.

Each such op takes longer to call than to compute. On a CPU, where there is g++, chains.cpp goes through all of them
for some samples at a time. Results are those of the ops, bit by bit, but that square roots are rounded as they should
be, where torch is off by a unit in the last place. dpcompile/chaining.py finds chains in a graph.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from dpcompile import native

TYPES = {torch.float32: 0, torch.float64: 1, torch.bool: 2}
OPS = ("add", "sub", "mul", "div", "min", "max", "eq", "ne", "lt", "le", "where", "sqrt", "abs", "neg", "round")
"""As chains.cpp numbers them. `round`: to float32."""

Shape = tuple[int | None, ...]
"""None stands for the batch."""


@dataclass(frozen=True)
class Numbers:
    """A value with a few numbers for each sample, or for all; of no type where it is a number of Python's."""

    shape: Shape
    dtype: torch.dtype | None

    @property
    def lines(self) -> int:
        """How many there are for each."""
        return math.prod(size for size in self.shape if size is not None)

    @property
    def kind(self) -> tuple[int, int, int]:
        """As native.Steps has it."""
        return TYPES[self.dtype or torch.float64], self.lines, int(None in self.shape)


class Chain(nn.Module):
    """Its results from its inputs; by the ops themselves where an input is not a plain tensor of a CPU."""

    def __init__(
        self, steps: native.Steps, inputs: Sequence[Numbers], outputs: Sequence[Numbers], ops: fx.GraphModule
    ) -> None:
        super().__init__()
        self._steps, self._ops = steps, ops
        self._inputs = [(numbers.dtype, numbers.lines, None in numbers.shape) for numbers in inputs]
        self._outputs = [(numbers.dtype, numbers.shape) for numbers in outputs]
        self._first = next((i, numbers.shape.index(None)) for i, numbers in enumerate(inputs) if None in numbers.shape)

    def forward(self, *given: torch.Tensor | float) -> Sequence[torch.Tensor]:
        """Raises RuntimeError: an input has not as many numbers as it should."""
        at, dim = self._first
        samples = given[at].shape[dim]  # type: ignore[union-attr]
        held, addresses = [], []
        for x, (dtype, lines, batched) in zip(given, self._inputs, strict=True):
            if dtype is None:
                number = ctypes.c_double(x)  # type: ignore[arg-type]
                held.append(number)
                addresses.append(ctypes.addressof(number))
                continue
            if type(x) not in native.PLAIN or x.dtype is not dtype or not x.is_cpu:  # type: ignore[union-attr]
                return self._ops(*given)
            x = x.contiguous()  # type: ignore[union-attr]
            if x.numel() != (lines * samples if batched else lines):
                raise RuntimeError(f"chain: {list(x.shape)} has not {lines} numbers of {samples} samples")
            held.append(x)
            addresses.append(x.data_ptr())
        results = [
            torch.empty([samples if size is None else size for size in shape], dtype=dtype)
            for dtype, shape in self._outputs
        ]
        native.chain(self._steps, samples, addresses, [x.data_ptr() for x in results])
        return results
