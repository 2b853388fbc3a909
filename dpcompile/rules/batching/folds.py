"""Ops that change what one dimension holds: the batch is folded into it with others, unfolded, repeated or cut."""

from __future__ import annotations

import sympy

from dpcompile.ir import Axis, Size, Value
from dpcompile.rules.batching.base import (
    CONSTANT,
    Call,
    Mixes,
    batched,
    move,
    product,
    quotient,
    shape_of,
    total,
)
from dpcompile.rules.batching.views import PICK


def reshape(call: Call) -> Value:
    """The batch stays in one dimension, folded with others or not; its stride among the elements tells where."""
    value = call.value("self")
    if value.axis is None:
        return value
    return Value(value.kind, refold(call, value.axis, call.shape("self"), call.out_shape))


def refold(call: Call, axis: Axis, before: tuple[Size, ...], after: tuple[Size, ...]) -> Axis:
    """Where the batch lies after a reshape.

    In row-major order neighbouring samples are `stride` elements apart. The dimension of the result that contains B
    has `suffix` elements behind it, so its inner fold is stride / suffix.
    """
    dims = call.batch.dims(after)
    if len(dims) != 1:
        raise Mixes("reshapes the batch into several dimensions" if dims else "reshapes the batch away")
    dim = dims[0]
    multiple = call.batch.multiple(after[dim])
    suffix, stride = product(after[dim + 1 :]), product(before[axis.dim + 1 :])
    if multiple is None or call.batch.has(suffix) or call.batch.has(stride):
        raise Mixes("splits the batch by a fixed number")
    if suffix == 0:
        return Axis(dim, 1, multiple)  # no elements at all
    inner = quotient(product((axis.inner, stride)), suffix)
    outer = None if inner is None else quotient(multiple, inner)
    if inner is None or outer is None:
        raise Mixes("puts elements of different samples into one row")
    return Axis(dim, outer, inner)


def expand(call: Call) -> Value:
    """The batch in one dimension; what is the same for every sample and is expanded to B becomes a copy for each."""
    value = call.value("self")
    shape = call.out_shape
    dims = call.batch.dims(shape)
    if value.axis is not None:
        return move(value, value.axis.dim + len(shape) - len(call.shape("self")))
    return copies(call, dims, shape) if dims else value


def copies(call: Call, dims: list[int], shape: tuple[Size, ...]) -> Value:
    multiple = call.batch.multiple(shape[dims[0]])
    if len(dims) != 1 or multiple is None:
        raise Mixes("makes a value that pairs samples with each other", "Give it the batch in one dimension only.")
    return batched(Axis(dims[0], 1, multiple))


def broadcast_tensors(call: Call) -> tuple[Value, ...]:
    """As expand, for each of the tensors."""
    found = []
    for arg, val in zip(call.args["tensors"], call.node.meta["val"], strict=True):
        value, shape = call.known(arg), shape_of(val)
        dims = call.batch.dims(shape)
        if value.axis is not None:
            found.append(move(value, value.axis.dim + len(shape) - len(shape_of(arg))))
        else:
            found.append(copies(call, dims, shape) if dims else value)
    return tuple(found)


def cat(call: Call) -> Value:
    """Along another dimension: the batch of all in one place. Along the batch: all have it, folded alike inside."""
    tensors = call.args["tensors"]
    shape = call.out_shape
    dim = call.dim("dim", len(shape))
    items = [(call.known(t), shape_of(t)) for t in tensors]
    items = [(value, size) for value, size in items if size != (0,)]  # cat skips empty vectors
    axes = [value.axis for value, _ in items if value.axis is not None]
    if not axes:
        return CONSTANT
    if axes[0].dim != dim:
        if any(axis != axes[0] for axis in axes):
            raise Mixes("joins tensors whose batch lies in different places")
        return batched(axes[0])
    if len(axes) != len(items) or any((a.dim, a.inner) != (dim, axes[0].inner) for a in axes):
        raise Mixes("appends rows to the batch", "Append along another dimension.")
    return batched(Axis(dim, total(a.outer for a in axes), axes[0].inner))


def repeat(call: Call) -> Value:
    """A constant number of times; what is the same for every sample may be repeated B times."""
    value, before, shape = call.value("self"), call.shape("self"), call.out_shape
    dims = call.batch.dims(shape)
    if value.axis is None:
        return copies(call, dims, shape) if dims else value
    dim = value.axis.dim + len(shape) - len(before)
    multiple = call.batch.multiple(shape[dim])
    outer = None if multiple is None else quotient(multiple, value.axis.inner)
    if outer is None or len(dims) != 1:
        raise Mixes("repeats the batch once for each sample")
    return Value(value.kind, Axis(dim, outer, value.axis.inner))


def repeat_interleave(call: Call) -> Value:
    """A constant number of times along one dimension; what is the same for every sample may be repeated B times."""
    if "self" not in call.args:  # the form that only makes an index
        raise Mixes("makes a number of elements that depends on the data of all samples")
    value, before = call.value("self"), call.shape("self")
    dim, axis, repeats = call.args.get("dim"), value.axis, call.number("repeats")
    if dim is None and len(before) > 1:
        raise Mixes("flattens the samples into one row", "Give repeat_interleave a dimension.")
    dim = (dim or 0) % max(len(before), 1)
    if axis is None and call.batch.is_multiple(repeats):  # index = old index * repeats + repetition
        size = before[dim] if before else 1
        if isinstance(size, int) and size > 0:
            return batched(Axis(dim, size, call.batch.multiple(repeats) or 1))
    if axis is None or not isinstance(repeats, (int, sympy.Expr)) or call.batch.has(repeats):
        raise Mixes("repeats samples a varying number of times", "Repeat each the same number of times.", never=False)
    if dim != axis.dim:
        return value
    return Value(value.kind, Axis(axis.dim, axis.outer, product((axis.inner, repeats))))


def slice_(call: Call) -> Value:
    """Along the batch only whole blocks of all samples (of a fold), at places that do not depend on B elsewhere."""
    value = call.value("self")
    axis, before = value.axis, call.shape("self")
    dim = call.dim("dim", len(before)) if before else 0
    if axis is None:
        return value
    if dim != axis.dim:
        call.require_no_batch_size("start", "end", "length")
        return value
    step = call.args.get("step", 1)
    if call.out_shape[dim] == before[dim] and step == 1:
        return value
    return Value(value.kind, block(call, axis, call.number("start") or 0, call.out_shape[dim], step))


def block(call: Call, axis: Axis, start: Size, length: Size, step: int = 1) -> Axis:
    """The axis of a slice of the batch dimension that takes whole outer blocks of B * inner."""
    row = product((axis.inner, call.batch.expr))
    outer, skipped = quotient(length, row), 0 if start == 0 else quotient(start, row)
    if step != 1 or outer is None or skipped is None or call.batch.has(outer) or call.batch.has(skipped):
        raise Mixes("picks some samples of the batch by their position", PICK)
    return Axis(axis.dim, outer, axis.inner)


def split(call: Call) -> tuple[Value, ...]:
    """Along the batch only into whole blocks of all samples (of a fold)."""
    value = call.value("self")
    axis, pieces = value.axis, call.node.meta["val"]
    dim = call.dim("dim", len(call.shape("self")))
    if axis is None or dim != axis.dim or len(pieces) == 1:
        return (value,) * len(pieces)
    found, start = [], 0
    for piece in pieces:
        length = shape_of(piece)[dim]
        found.append(Value(value.kind, block(call, axis, start, length)))
        start = total((start, length))
    return tuple(found)
