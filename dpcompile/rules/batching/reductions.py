"""Ops along some dimensions: fine where the batch is not one of them. A sum or mean over all samples is a loss."""

from __future__ import annotations

from dpcompile.ir import Kind, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, Result, batched, move
from dpcompile.rules.batching.pointwise import align

OVER_BATCH = "goes over the samples of the batch"


def reduce(call: Call) -> Result:
    """amax, argmax, var, norm, logsumexp, any, max.dim and so on: dimensions go away (or stay with size 1)."""
    return _reduce(call, None)


def reduce_sum(call: Call) -> Result:
    return _reduce(call, Value(Kind.REDUCED))


def reduce_mean(call: Call) -> Result:
    return _reduce(call, Value(Kind.REDUCED, mean=True))


def _reduce(call: Call, over_batch: Value | None) -> Result:
    value = call.value("self")
    found = value
    if value.axis is not None:
        ndim = len(call.shape("self"))
        dims = call.dims("dim", ndim)
        if dims is None or value.axis.dim in dims:
            if over_batch is None:
                raise Mixes(OVER_BATCH)
            found = over_batch
        elif not call.args.get("keepdim"):
            found = move(value, value.axis.dim - sum(d < value.axis.dim for d in dims))
    return call.everywhere(found)


def along(call: Call) -> Result:
    """softmax, cumsum, sort, topk, diff: one dimension is worked on, all of them stay."""
    value = call.value("self")
    if value.axis is not None:
        dims = call.dims("dim", len(call.shape("self")))
        if dims is None or value.axis.dim in dims:
            raise Mixes(OVER_BATCH)
        for name in ("prepend", "append"):  # of diff
            axis = call.axis(name)
            if axis is not None and axis != value.axis:
                raise Mixes("joins tensors whose batch lies in different places")
    return call.everywhere(value)


def aligned_along(call: Call) -> Value:
    """take_along_dim, cross: tensors aligned by broadcasting, worked on along one dimension."""
    ndim = len(call.out_shape)
    axis = align(call, tuple(call.tensors()), ndim)
    if axis is None:
        return CONSTANT
    if call.args.get("dim") is None or call.dim("dim", ndim) == axis.dim:
        raise Mixes(OVER_BATCH)
    return batched(axis)


def flip(call: Call) -> Value:
    """flip, rot90: some dimensions are turned around."""
    value = call.value("self")
    if value.axis is not None and value.axis.dim in (call.dims("dims", len(call.shape("self"))) or ()):
        raise Mixes("turns the order of the samples around")
    return value


def roll(call: Call) -> Value:
    value = call.value("self")
    if value.axis is not None:
        dims = call.dims("dims", len(call.shape("self")))
        if dims is None or value.axis.dim in dims:
            raise Mixes("moves every sample to the place of another")
    return value


def last_two(call: Call) -> Result:
    """tril, triu and linear algebra on matrices: the batch must lie before the last two dimensions."""
    name = next(iter(call.args))
    value = call.value(name)
    if call.batch_of(name).dim >= len(call.shape(name)) - 2:
        raise Mixes("treats the batch as a dimension of a matrix")
    return call.everywhere(value)
