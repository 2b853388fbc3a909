"""Tensors made from sizes alone: sized by the batch, each sample has its own slice of them."""

from __future__ import annotations

from torch import fx

from dpcompile.ir import Axis, Kind, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, batched

POSITION = "depends on the position of a sample in the batch"
NO_POSITION = "Use no running number of the samples."


def sized(call: Call) -> Value:
    """Sizes may hold B, in one dimension; no other number may. Every element is the same, or drawn by itself."""
    call.require_no_batch_size("fill_value", "value", "mean", "std", "low", "high", "s")
    shape = call.out_shape
    dims = call.batch.dims(shape)
    if not dims:
        return CONSTANT
    template = call.args.get("self")
    if isinstance(template, fx.Node) and call.shape("self") == shape:
        axis = call.axis("self")
        if axis is not None:
            return batched(axis)
    multiple = call.batch.multiple(shape[dims[0]])
    if len(dims) != 1 or multiple is None:
        raise Mixes("makes a value that pairs samples with each other", "Give it the batch in one dimension only.")
    return batched(Axis(dims[0], 1, multiple))


def arange(call: Call) -> Value:
    """Numbers that do not reach B, or arange(B), which numbers the samples."""
    if not call.batch.dims(call.out_shape):
        call.require_no_batch_size()
        return CONSTANT
    start, step = call.args.get("start", 0), call.args.get("step", 1)
    if start == 0 and step == 1 and call.batch.multiple(call.out_shape[0]) == 1:
        return Value(Kind.ROWS, Axis(0))
    raise Mixes(POSITION, NO_POSITION)


def permutation(call: Call) -> Value:
    """A size without B: elements differ by position."""
    if not call.batch.dims(call.out_shape):
        call.require_no_batch_size()
        return CONSTANT
    raise Mixes(POSITION, NO_POSITION)


def filled(call: Call) -> Value:
    """One value, the same for all samples."""
    if call.value("value").kind not in (Kind.CONSTANT, Kind.PARAMETER):
        raise Mixes("writes one sample's value into all samples")
    return sized(call)
