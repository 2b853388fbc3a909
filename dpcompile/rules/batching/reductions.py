"""Ops along some dimensions: fine where the batch is not one of them. A sum or mean over all samples is a loss."""

from __future__ import annotations

from dpcompile.ir import Kind, Value
from dpcompile.rules.batching.base import CONSTANT, PER_SAMPLE, Call, Mixes, Result, batched, move
from dpcompile.rules.batching.pointwise import align

OVER_BATCH = "goes over the samples of the batch"
SORT_WITHIN = (
    "Sort within each sample. Experts that sort the tokens of all samples have a form that does not: in transformers "
    "model.set_experts_implementation('batched_mm')."
)


def reduce(call: Call) -> Result:
    """Over dimensions other than the batch."""
    return _reduce(call, None)


def reduce_sum(call: Call) -> Result:
    """Over dimensions other than the batch, or over the batch as a loss: a sum over samples."""
    return _reduce(call, Value(Kind.REDUCED))


def reduce_mean(call: Call) -> Result:
    """Over dimensions other than the batch, or over the batch as a loss: a mean over samples."""
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
    """Along dimensions other than the batch, which all stay."""
    value = call.value("self")
    if value.axis is not None:
        dims = call.dims("dim", len(call.shape("self")))
        if dims is None or value.axis.dim in dims:
            sorts = call.op.overloadpacket.__name__ in ("sort", "argsort")
            raise Mixes(OVER_BATCH, SORT_WITHIN if sorts else PER_SAMPLE)
        for name in ("prepend", "append"):  # of diff
            axis = call.axis(name)
            if axis is not None and axis != value.axis:
                raise Mixes("joins tensors whose batch lies in different places")
    return call.everywhere(value)


def aligned_along(call: Call) -> Value:
    """Tensors aligned by broadcasting, worked on along a dimension other than the batch."""
    ndim = len(call.out_shape)
    axis = align(call, tuple(call.tensors()), ndim)
    if axis is None:
        return CONSTANT
    if call.args.get("dim") is None or call.dim("dim", ndim) == axis.dim:
        raise Mixes(OVER_BATCH)
    return batched(axis)


def flip(call: Call) -> Value:
    """Turns dimensions other than the batch."""
    value = call.value("self")
    if value.axis is not None and value.axis.dim in (call.dims("dims", len(call.shape("self"))) or ()):
        raise Mixes("turns the order of the samples around")
    return value


def roll(call: Call) -> Value:
    """Along dimensions other than the batch, which must be named."""
    value = call.value("self")
    if value.axis is not None:
        dims = call.dims("dims", len(call.shape("self")))
        if dims is None or value.axis.dim in dims:
            raise Mixes("moves every sample to the place of another")
    return value


def last_two(call: Call) -> Result:
    """Matrices in the last two dimensions: the batch lies before them."""
    name = next(iter(call.args))
    value = call.value(name)
    if call.batch_of(name).dim >= len(call.shape(name)) - 2:
        raise Mixes("treats the batch as a dimension of a matrix")
    return call.everywhere(value)
