"""Ops that rearrange dimensions: the batch moves with its own."""

from __future__ import annotations

import torch

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, batched, move, shape_of
from dpcompile.rules.batching.pointwise import align

PICK = "Keep all samples, or pick along another dimension."


def permute(call: Call) -> Value:
    value = call.value("self")
    dims = call.dims("dims", len(call.out_shape))
    if value.axis is None or dims is None:
        return value
    return move(value, dims.index(value.axis.dim))


def transpose(call: Call) -> Value:
    value = call.value("self")
    ndim = len(call.out_shape)
    if value.axis is None:
        return value
    names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
    first, second = (call.dim(name, ndim) for name in names)
    return move(value, {first: second, second: first}.get(value.axis.dim, value.axis.dim))


def transpose_last(call: Call) -> Value:
    """t, mT, mH, adjoint: the last two dimensions change places."""
    value = call.value("self")
    ndim = len(call.out_shape)
    if value.axis is None or ndim < 2:
        return value
    return move(value, {ndim - 1: ndim - 2, ndim - 2: ndim - 1}.get(value.axis.dim, value.axis.dim))


def movedim(call: Call) -> Value:
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
    value = call.value("self")
    if value.axis is None:
        return value
    return move(value, value.axis.dim + (call.dim("dim", len(call.out_shape)) <= value.axis.dim))


def squeeze(call: Call) -> Value:
    value = call.value("self")
    if value.axis is None:
        return value
    shape = call.shape("self")
    chosen = call.dims("dim", len(shape)) if call.args.get("dim") is not None else tuple(range(len(shape)))
    gone = [d for d in chosen or () if shape[d] == 1]
    return move(value, value.axis.dim - sum(d < value.axis.dim for d in gone))


def stack(call: Call) -> Value:
    tensors = call.args["tensors"]
    axis = align(call, tensors, len(call.out_shape) - 1)
    if axis is None:
        return CONSTANT
    return batched(Axis(axis.dim + (call.dim("dim", len(call.out_shape)) <= axis.dim), axis.outer, axis.inner))


def select(call: Call) -> Value:
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
    value, pieces = call.value("self"), call.node.meta["val"]
    axis, dim = value.axis, call.dim("dim", len(call.shape("self")))
    if axis is None:
        return (value,) * len(pieces)
    if dim == axis.dim:
        raise Mixes("takes the batch apart into single samples", PICK)
    return (move(value, axis.dim - (dim < axis.dim)),) * len(pieces)


def unfold(call: Call) -> Value:
    """Tensor.unfold: windows along one dimension, their elements in a new last one."""
    value = call.value("self")
    if value.axis is not None and call.dim("dimension", len(call.shape("self"))) == value.axis.dim:
        raise Mixes("takes windows along the batch")
    return value


def diagonal(call: Call) -> Value:
    value = call.value("self")
    if value.axis is None:
        return value
    ndim = len(call.shape("self"))
    dims = (call.dim("dim1", ndim), call.dim("dim2", ndim))
    if value.axis.dim in dims:
        raise Mixes("takes a diagonal across the batch")
    return move(value, value.axis.dim - sum(d < value.axis.dim for d in dims))


def as_strided(call: Call) -> Value:
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
    """view_as_real, view_as_complex: only a last dimension of 2 comes or goes."""
    return call.value("self")
