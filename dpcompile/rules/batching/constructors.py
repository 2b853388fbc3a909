"""Tensors made from sizes alone: sized by the batch, each sample has its own slice of them."""

from __future__ import annotations

from torch import fx

from dpcompile.ir import Axis, Kind, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, batched

POSITION = "depends on the position of a sample in the batch"
NO_POSITION = "Use no running number of the samples."


def sized(call: Call) -> Value:
    """zeros, full, rand, empty and their new_ and _like forms: the same, or independent, for every element."""
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
    """arange(B) numbers the samples. Numbers that do not reach B are constant."""
    if not call.batch.dims(call.out_shape):
        call.require_no_batch_size()
        return CONSTANT
    start, step = call.args.get("start", 0), call.args.get("step", 1)
    if start == 0 and step == 1 and call.batch.multiple(call.out_shape[0]) == 1:
        return Value(Kind.ROWS, Axis(0))
    raise Mixes(POSITION, NO_POSITION)


def permutation(call: Call) -> Value:
    """randperm, eye, linspace and others whose elements differ by position."""
    if not call.batch.dims(call.out_shape):
        call.require_no_batch_size()
        return CONSTANT
    raise Mixes(POSITION, NO_POSITION)


def filled(call: Call) -> Value:
    """fill(x, value): the shape of x, and one value for all."""
    if call.value("value").kind not in (Kind.CONSTANT, Kind.PARAMETER):
        raise Mixes("writes one sample's value into all samples")
    return sized(call)
