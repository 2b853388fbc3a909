"""SPEC: a sample tensor in words, `float32[32,3,224,224]` or `input_ids=int64[8,1024]<50257`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_SPEC = re.compile(
    r"^(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>[A-Za-z]\w*)\[(?P<shape>[\d,\s]*)\](?:<(?P<below>\d+))?$", re.ASCII
)
FORM = "float32[32,3,224,224] or input_ids=int64[8,1024]<50257"


class TargetError(Exception):
    """What the command line asks for does not exist or does not fit. One line, for the user."""


@dataclass(frozen=True)
class Spec:
    """One sample tensor. Values do not matter for a report; whole numbers are drawn from [0, below)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str | None = None  # None: passed by position
    below: int | None = None

    def tensor(self) -> torch.Tensor:
        if self.below is not None:
            return torch.randint(self.below, self.shape, dtype=self.dtype)
        return torch.zeros(self.shape, dtype=self.dtype)

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        below = f"<{self.below}" if self.below is not None else ""
        sizes = ",".join(map(str, self.shape))
        return f"{name}{str(self.dtype).removeprefix('torch.')}[{sizes}]{below}"


def parse_spec(text: str) -> Spec:
    """The sample tensor that `text` describes.

    Raises:
        TargetError: the text is not of that form, or torch has no such dtype.
    """
    found = _SPEC.match(text.strip())
    if found is None:
        raise TargetError(f"--input {text!r} is not of the form {FORM}")
    dtype = getattr(torch, found["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise TargetError(f"--input {text!r}: torch has no dtype {found['dtype']!r}")
    try:
        shape = tuple(int(size) for size in found["shape"].split(",") if found["shape"].strip())
    except ValueError:
        raise TargetError(f"--input {text!r} is not of the form {FORM}") from None
    below = int(found["below"]) if found["below"] else None
    if below is not None and (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
        raise TargetError(f"--input {text!r}: an upper bound is for whole numbers, not for {found['dtype']}")
    if below == 0:
        raise TargetError(f"--input {text!r}: no whole number lies in [0, 0)")
    return Spec(dtype, shape, found["name"], below)


def sample_of(specs: Sequence[Spec]) -> Any:
    """The sample input: a tensor, a tuple (all by position) or a dict (all by name).

    Raises:
        TargetError: some are named and others are not, or a name comes twice.
    """
    names = [spec.name for spec in specs if spec.name is not None]
    if names and len(names) != len(specs):
        raise TargetError("--input: name all sample tensors or none of them")
    if len(set(names)) != len(names):
        raise TargetError("--input: a sample tensor is named twice")
    if names:
        return {spec.name: spec.tensor() for spec in specs}
    tensors = tuple(spec.tensor() for spec in specs)
    return tensors[0] if len(tensors) == 1 else tensors
