"""Ops on the last dimensions of each sample: convolution, pooling, resizing, padding, windows."""

from __future__ import annotations

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import Call, Mixes, Result, batched

INTO_DIM_0 = "Bring the batch to dimension 0."


def conv(call: Call) -> Value:
    """The batch in dimension 0, folded or not; weight and bias are the same for all samples."""
    call.require_unbatched("weight", "bias")
    axis = call.batch_of("input")
    if len(call.shape("input")) < len(call.shape("weight")) or axis.dim != 0:
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return batched(axis)


def leading(call: Call, worked_on: int) -> Result:
    """Not among the last {worked_on} dimensions, which are worked on; each slice before them is by itself."""
    name = next(iter(call.args))
    value = call.value(name)
    if call.batch_of(name).dim >= len(call.shape(name)) - worked_on:
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return call.everywhere(value)


def unpool(call: Call) -> Value:
    """The batch before the dimensions that are filled, of values and their places alike."""
    axis = call.batch_of("self")
    if call.axis("indices") != axis:
        raise Mixes("puts samples to the places of other samples")
    if axis.dim >= len(call.shape("self")) - len(call.args["output_size"]):
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return batched(axis)


def first(call: Call) -> Result:
    """The batch in dimension 0 of every operand that has it."""
    found: Axis | None = None
    for tensor in call.tensors():
        axis = call.known(tensor).axis
        if axis is None:
            continue
        if axis.dim != 0 or (found is not None and axis != found):
            raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
        found = axis
    assert found is not None
    return call.everywhere(batched(found))


def windows(call: Call) -> Result:
    """The batch in dimension 0 of an input with channels behind it."""
    full = 4 if call.op.overloadpacket.__name__ == "im2col" else 3
    if len(call.shape("self")) < full:
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return first(call)


def searchsorted(call: Call) -> Value:
    """Boundaries for all, or one row of boundaries for each row of values, with the batch before the last dimension."""
    if len(call.shape("sorted_sequence")) == 1:
        call.require_unbatched("sorted_sequence", "sorter")
        return batched(call.batch_of("self"))
    if call.axis("sorted_sequence") != call.batch_of("self") or call.batch_of("self").dim == len(call.out_shape) - 1:
        raise Mixes("searches among the values of other samples")
    return call.value("self")


def pad(call: Call) -> Value:
    """No padding along the batch."""
    value = call.value("self")
    widths = call.args["pad"] if "pad" in call.args else call.args["padding"]
    from_right = len(call.shape("self")) - 1 - call.batch_of("self").dim
    if any(width != 0 for width in widths[2 * from_right : 2 * from_right + 2]):
        raise Mixes("adds rows to the batch", "Pad along other dimensions.")
    call.require_no_batch_size("pad", "padding", "value")
    return value


def channels(call: Call) -> Value:
    """The batch is not dimension 1; a weight is the same for all samples."""
    call.require_unbatched("weight")
    value = call.value("self")
    if call.batch_of("self").dim == 1 and len(call.shape("self")) > 1:
        raise Mixes("takes the batch for channels", INTO_DIM_0)
    return value


def embedding(call: Call) -> Value:
    """The batch in the indices, a table for all samples; scale_grad_by_freq counts over the batch and is refused."""
    call.require_unbatched("weight")
    if call.args.get("scale_grad_by_freq"):
        raise Mixes("scales gradients by how often an index occurs in the batch", "Set scale_grad_by_freq=False.")
    return batched(call.batch_of("indices"))
