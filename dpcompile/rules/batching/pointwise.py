"""Ops that work element by element: operands are aligned by broadcasting, and the batch must lie in the same place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, Result, batched, shape_of

ALIGN = "Bring the batch of both operands to the same dimension."


def align(call: Call, operands: Sequence[fx.Node], out_ndim: int) -> Axis | None:
    """The axis of the broadcast of several tensors; None where none of them is batched.

    An operand that is not batched has size 1 in the batch dimension, or lacks it: its sizes hold no B.
    """
    found: Axis | None = None
    for operand in operands:
        axis = call.known(operand).axis
        if axis is None:
            continue
        dim = axis.dim + out_ndim - len(shape_of(operand))
        aligned = axis if dim == axis.dim else Axis(dim, axis.outer, axis.inner)
        if found is None:
            found = aligned
        elif found.dim != dim:
            raise Mixes("combines every sample with every other sample (the batch lies in different dimensions)", ALIGN)
        elif found != aligned:
            raise Mixes("combines samples in different orders (the batch is folded differently)", ALIGN)
    return found


def pointwise(call: Call) -> Value:
    """Each element by itself: the batch of all operands lies in the same dimension of the result, folded alike."""
    axis = align(call, tuple(call.tensors()), len(call.out_shape))
    return CONSTANT if axis is None else batched(axis)


def among(call: Call) -> Value:
    """Each element is compared with all of a list, which must be the same for every sample."""
    call.require_unbatched("test_elements", "test_element", "boundaries")
    return pointwise(call)


def unary(call: Call) -> Value:
    """Nothing: each element is copied by itself, so whatever is known of the input holds for the result."""
    return call.value("self" if "self" in call.args else "input")


def several(call: Call) -> Result:
    """Nothing: each element gives several results by itself."""
    return call.everywhere(call.value("self" if "self" in call.args else "input"))


def copy(call: Call) -> Value:
    """Nothing: only the values of the source count, broadcast to the shape of the target."""
    source = call.args["src"]
    value = call.known(source)
    if value.axis is None:
        dims = call.batch.dims(call.out_shape)
        return batched(Axis(dims[0], 1, call.batch.multiple(call.out_shape[dims[0]]) or 1)) if dims else value
    axis = align(call, (source,), len(call.out_shape))
    assert axis is not None
    return Value(value.kind, axis)
