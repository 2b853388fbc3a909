"""Sizes beside the batch size that a call may choose: `dynamic=` of dpcompile, and calls checked against it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from dpcompile.errors import CaptureError
from dpcompile.torch_internals import bounds_of, decisions_on

FREE = torch.export.Dim.DYNAMIC
FIXED = (None, torch.export.Dim.STATIC)
CURE = "Take it out of dynamic=: its size is then that of the sample, and calls have to be padded to it."


@dataclass(frozen=True)
class Length:
    """One size that is free, by torch.export's name for it, and the values that were proven."""

    name: str
    low: int
    high: int | None  # None: any
    step: int = 1  # between the values, from `low` on

    def has(self, size: int) -> bool:
        return size >= self.low and (self.high is None or size <= self.high) and (size - self.low) % self.step == 0


def asked_for(dynamic: Any, names: Sequence[str]) -> dict[str, dict[int, Any]]:
    """What `dynamic=` says of every argument: dimension to what torch.export calls it.

    `dynamic` is a dict of argument name to dimensions, or a sequence in the order of the arguments. Dimensions are a
    collection of numbers, or a dict of number to torch.export.Dim, None for a size that is fixed. False: none, and
    the batch size is fixed too (passes/fix_batch.py).

    Raises:
        CaptureError: it names no argument, or is of another form.
    """
    if dynamic is None or dynamic is False:
        return {}
    if isinstance(dynamic, Mapping):
        unknown = [name for name in dynamic if name not in names]
        if unknown:
            raise CaptureError(f"sample: dynamic= names {unknown}, but the arguments are {list(names)}.")
        given = dict(dynamic)
    elif isinstance(dynamic, Sequence) and not isinstance(dynamic, str) and len(dynamic) <= len(names):
        given = dict(zip(names, dynamic, strict=False))
    else:
        raise CaptureError(
            "sample: dynamic= must be a dict of argument name to dimensions, {'input_ids': [0, 1]}, or one entry for "
            f"each of the arguments {list(names)}; got {dynamic!r}."
        )
    return {name: _dims(name, dims) for name, dims in given.items()}


def _dims(name: str, dims: Any) -> dict[int, Any]:
    if dims is None:
        return {}
    if isinstance(dims, Mapping):
        found = {dim: _dim(what) for dim, what in dims.items()}
    elif isinstance(dims, (Sequence, set, frozenset)) and not isinstance(dims, str):
        found = dict.fromkeys(dims, FREE)
    else:
        found = {dims: FREE}
    if not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in found):
        raise CaptureError(f"sample: dynamic= of `{name}` must give dimensions as whole numbers, got {dims!r}.")
    return {int(dim): what for dim, what in found.items() if what is not None}


def _dim(what: Any) -> Any:
    """A Dim as it is; torch.export's own words for "free", "free unless the model fixes it" and "fixed"."""
    if isinstance(what, str):
        return FREE  # a name, as torch.onnx takes it
    return None if what in FIXED else what


def asked_range(what: Any, default: str) -> Length:
    """What a Dim of the caller says of a length: its name, and its range where it has one."""
    low, high = getattr(what, "min", None), getattr(what, "max", None)
    name = getattr(what, "__name__", None) or default
    return Length(name, max(low or 1, 1), high if isinstance(high, int) else None)


def of_leaf(name: str, shape: Sequence[int], batch_dim: int | None, dims: Mapping[int, Any]) -> dict[int, Any]:
    """The free dimensions of one sample tensor, counted from the left, the batch not among them.

    Raises:
        CaptureError: the tensor has no such dimension, or a size from which nothing can be concluded.
    """
    found = {}
    for dim, what in dims.items():
        if not -len(shape) <= dim < len(shape):
            raise CaptureError(f"sample: dynamic= names dimension {dim} of `{name}`, whose shape is {list(shape)}.")
        at = dim % len(shape)
        if at == batch_dim:
            continue  # free in any case
        if shape[at] < 2:
            raise CaptureError(
                f"sample: dimension {dim} of `{name}` is dynamic, but has size {shape[at]} in the sample. Give a "
                "sample of size 2 or more there: sizes of 0 and 1 are special in many ops."
            )
        found[at] = what
    return found


LARGEST = 2**18
"""How far a length is tried where the trace has decided anything by it, beyond which no greater one is accepted."""
STEPS = range(1, 65)
"""Distances of lengths that are tried: a model that halves a signal six times takes multiples of 64."""


def proven(asked: Length, size: torch.SymInt, batch: torch.SymInt) -> Length:
    """The values of a length around the sample's for which all decisions are those of the trace.

    Raises:
        CaptureError: a decision compares it with another length, or fails within the range that a Dim asked for.
    """
    symbol, sample = size.node.expr, size.node.hint
    low, high = bounds_of(size)
    decisions = [expr.subs(batch.node.expr, batch.node.hint) for expr in decisions_on(size)]
    for expr in decisions:
        if expr.free_symbols - {symbol}:
            raise CaptureError(f"capture: the model compares the length {asked.name} with another ({expr}). {CURE}")
    found = Length(asked.name, max(low, 1), high)
    holds = [_function(symbol, expr) for expr in decisions if not _is_bound(expr, symbol, found)]
    if holds:
        ranges = [_range(asked.name, sample, step, found, holds) for step in STEPS]
        found = max(ranges, key=_count)
    misses_low = asked.low > 1 and not found.has(asked.low)
    misses_high = asked.high is not None and not found.has(asked.high)
    if misses_low or misses_high or (found.step > 1 and (asked.low > 1 or asked.high is not None)):
        raise CaptureError(
            f"capture: {asked.name} was asked for {range_text(asked)}, but the graph of this sample is right for "
            f"{range_text(found)}: the model decides by it. Narrow its Dim, or give a sample from another part of the "
            "range."
        )
    high = found.high if asked.high is None else asked.high
    return Length(asked.name, max(found.low, asked.low), high, found.step)


def _is_bound(expr: sympy.Basic, symbol: sympy.Symbol, within: Length) -> bool:
    """Whether it is true of all values, or compares the length with a number and is true of all within its bounds."""
    if not isinstance(expr, (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)):
        return expr == sympy.true
    ends = (within.low, sympy.oo if within.high is None else within.high)
    compared = expr.args[0] == symbol and expr.args[1].is_Integer
    return compared and all(expr.subs(symbol, end) == sympy.true for end in ends)


def _function(symbol: sympy.Symbol, expr: sympy.Basic) -> Callable[[int], bool]:
    """A decision as a function of the length: sympy takes 100 times as long to put a number in."""
    return sympy.lambdify(symbol, expr, [_WHOLE_NUMBERS, "math"])


_WHOLE_NUMBERS = {  # torch's functions on sizes
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "ModularIndexing": lambda a, by, modulus: a // by % modulus,
    "Min": min,
    "Max": max,
}


def _range(name: str, sample: int, step: int, within: Length, holds: Sequence[Callable[[int], bool]]) -> Length:
    """The lengths from the sample's on, up and down by `step`, for which all decisions are those of the trace."""
    high = LARGEST if within.high is None else min(within.high, LARGEST)
    low, high = _last(sample, within.low, -step, holds), _last(sample, high, step, holds)
    return Length(name, low, high, step)


def _count(length: Length) -> int:
    assert length.high is not None
    return (length.high - length.low) // length.step


def _last(start: int, end: int, step: int, holds: Sequence[Callable[[int], bool]]) -> int:
    """How far one can go from the sample's length without a decision that changes."""
    last = start
    for value in range(start, end + (1 if step > 0 else -1), step):
        if not all(hold(value) for hold in holds):
            break
        last = value
    return last


def check_lengths(lengths: Sequence[Length], leaves: Sequence[Any], values: Sequence[Any]) -> None:
    """A call's sizes against what was proven of them.

    Raises:
        CaptureError: tensors disagree on a length, or it is out of its range.
    """
    for length in lengths:
        found = [
            (spec.name, value.shape[dim])
            for spec, value in zip(leaves, values, strict=True)
            for dim, name in spec.free.items()
            if name == length.name
        ]
        first, size = found[0]
        for other, own in found[1:]:
            if own != size:
                raise CaptureError(
                    f"call: the lengths of `{first}` ({size}) and `{other}` ({own}) differ; they were compiled as one."
                )
        if not length.has(size):
            raise CaptureError(
                f"call: `{first}` has length {size}; compiled for {range_text(length)}. Compile again for this one."
            )


def range_text(length: Length) -> str:
    text = f"{length.low} or more" if length.high is None else f"{length.low} to {length.high}"
    return text if length.step == 1 else f"{text} in steps of {length.step}"
