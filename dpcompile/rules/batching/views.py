"""Ops that rearrange dimensions: the batch moves with its own."""

from __future__ import annotations

import torch

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, batched, move, shape_of
from dpcompile.rules.batching.pointwise import align

PICK = "Keep all samples, or pick along another dimension."


def permute(call: Call) -> Value:
    """Nothing: the batch moves with its dimension."""
    value = call.value("self")
    dims = call.dims("dims", len(call.out_shape))
    if value.axis is None or dims is None:
        return value
    return move(value, dims.index(value.axis.dim))


def transpose(call: Call) -> Value:
    """Nothing: the batch moves with its dimension."""
    value = call.value("self")
    ndim = len(call.out_shape)
    if value.axis is None:
        return value
    names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
    first, second = (call.dim(name, ndim) for name in names)
    return move(value, {first: second, second: first}.get(value.axis.dim, value.axis.dim))


def transpose_last(call: Call) -> Value:
    """Nothing: the last two dimensions change places, and the batch with its own."""
    value = call.value("self")
    ndim = len(call.out_shape)
    if value.axis is None or ndim < 2:
        return value
    return move(value, {ndim - 1: ndim - 2, ndim - 2: ndim - 1}.get(value.axis.dim, value.axis.dim))


def movedim(call: Call) -> Value:
    """Nothing: the batch moves with its dimension."""
    value = call.value("self")
    ndim = len(call.out_shape)
    source, target = call.dims("source", ndim), call.dims("destination", ndim)
    if value.axis is None or source is None or target is None:
        return value
    order = [-1] * ndim
    for s, t in zip(source, target, strict=True):
        order[t] = s
    rest = iter(d for d in range(ndim) if d not in source)
    order = [next(rest) if d < 0 else d for d in order]
    return move(value, order.index(value.axis.dim))


def unsqueeze(call: Call) -> Value:
    """Nothing: a new dimension of one moves the batch along."""
    value = call.value("self")
    if value.axis is None:
        return value
    return move(value, value.axis.dim + (call.dim("dim", len(call.out_shape)) <= value.axis.dim))


def squeeze(call: Call) -> Value:
    """Nothing: dimensions of one go."""
    value = call.value("self")
    if value.axis is None:
        return value
    shape = call.shape("self")
    chosen = call.dims("dim", len(shape)) if call.args.get("dim") is not None else tuple(range(len(shape)))
    gone = [d for d in chosen or () if shape[d] == 1]
    return move(value, value.axis.dim - sum(d < value.axis.dim for d in gone))


def stack(call: Call) -> Value:
    """The batch of all tensors that have one lies in the same dimension, folded alike."""
    tensors = call.args["tensors"]
    axis = align(call, tensors, len(call.out_shape) - 1)
    if axis is None:
        return CONSTANT
    return batched(Axis(axis.dim + (call.dim("dim", len(call.out_shape)) <= axis.dim), axis.outer, axis.inner))


def select(call: Call) -> Value:
    """Not along the batch: that picks one sample."""
    value = call.value("self")
    axis = value.axis
    if axis is None:
        return value
    dim = call.dim("dim", len(call.shape("self")))
    if dim == axis.dim:
        raise Mixes("picks one sample of the batch", PICK)
    call.require_no_batch_size("index")
    return move(value, axis.dim - (dim < axis.dim))


def unbind(call: Call) -> tuple[Value, ...]:
    """Not along the batch: that takes it apart into single samples."""
    value, pieces = call.value("self"), call.node.meta["val"]
    axis, dim = value.axis, call.dim("dim", len(call.shape("self")))
    if axis is None:
        return (value,) * len(pieces)
    if dim == axis.dim:
        raise Mixes("takes the batch apart into single samples", PICK)
    return (move(value, axis.dim - (dim < axis.dim)),) * len(pieces)


def unfold(call: Call) -> Value:
    """Windows along a dimension other than the batch; their elements come as a new last one."""
    value = call.value("self")
    if value.axis is not None and call.dim("dimension", len(call.shape("self"))) == value.axis.dim:
        raise Mixes("takes windows along the batch")
    return value


def diagonal(call: Call) -> Value:
    """The diagonal of two dimensions of which none is the batch."""
    value = call.value("self")
    if value.axis is None:
        return value
    ndim = len(call.shape("self"))
    dims = (call.dim("dim1", ndim), call.dim("dim2", ndim))
    if value.axis.dim in dims:
        raise Mixes("takes a diagonal across the batch")
    return move(value, value.axis.dim - sum(d < value.axis.dim for d in dims))


def diag_embed(call: Call) -> Value:
    """A last dimension other than the batch becomes the diagonal of a matrix in two new ones."""
    value, before, ndim = call.value("self"), call.shape("self"), len(call.out_shape)
    if value.axis is None:
        return value
    if value.axis.dim == len(before) - 1:
        raise Mixes("lays the samples on a diagonal")
    new = (call.dim("dim1", ndim), call.dim("dim2", ndim))
    return move(value, [dim for dim in range(ndim) if dim not in new][value.axis.dim])


def as_strided(call: Call) -> Value:
    """Shape and strides as they are: other strides could read any element."""
    value, source = call.value("self"), call.args["self"]
    if value.axis is None:
        return value
    before, after = source.meta["val"], call.node.meta["val"]
    same = shape_of(before) == shape_of(after) and _strides(before) == _strides(after)
    if same and call.args.get("storage_offset") in (None, 0):
        return value
    raise Mixes("reads memory by strides, which no rule can follow", "Use view, unfold or indexing.", never=False)


def _strides(tensor: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(stride) for stride in tensor.stride())


def as_real(call: Call) -> Value:
    """Nothing: only a last dimension of 2 comes or goes."""
    return call.value("self")
