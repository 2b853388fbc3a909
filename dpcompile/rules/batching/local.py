"""Ops on the last dimensions of each sample: convolution, pooling, resizing, padding, windows."""

from __future__ import annotations

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import Call, Mixes, Result, batched

INTO_DIM_0 = "Bring the batch to dimension 0."


def conv(call: Call) -> Value:
    """conv1d/2d/3d, conv_transpose and the general convolution: the batch, folded or not, in dimension 0."""
    call.require_unbatched("weight", "bias")
    axis = call.batch_of("input")
    if len(call.shape("input")) < len(call.shape("weight")) or axis.dim != 0:
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return batched(axis)


def leading(call: Call, worked_on: int) -> Result:
    """Pooling, upsampling, pixel shuffles: the last `worked_on` dimensions; each slice before them is by itself."""
    name = next(iter(call.args))
    value = call.value(name)
    if call.batch_of(name).dim >= len(call.shape(name)) - worked_on:
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return call.everywhere(value)


def first(call: Call) -> Result:
    """grid_sample, im2col, col2im, affine_grid: dimension 0 of a full-rank input."""
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
    """im2col, col2im: without a batch dimension of their own, dimension 0 is the channels."""
    full = 4 if call.op.overloadpacket.__name__ == "im2col" else 3
    if len(call.shape("self")) < full:
        raise Mixes("takes the batch for a channel or a position", INTO_DIM_0)
    return first(call)


def searchsorted(call: Call) -> Value:
    """Boundaries for all, or one row of boundaries for each row of values."""
    if call.axis("sorted_sequence") is None and len(call.shape("sorted_sequence")) == 1:
        return batched(call.batch_of("self"))
    if call.axis("sorted_sequence") != call.batch_of("self") or call.batch_of("self").dim == len(call.out_shape) - 1:
        raise Mixes("searches among the values of other samples")
    return call.value("self")


def pad(call: Call) -> Value:
    """pad, constant_pad_nd, reflection_pad and so on: pairs of widths from the last dimension backwards."""
    value = call.value("self")
    widths = call.args["pad"] if "pad" in call.args else call.args["padding"]
    from_right = len(call.shape("self")) - 1 - call.batch_of("self").dim
    if any(width != 0 for width in widths[2 * from_right : 2 * from_right + 2]):
        raise Mixes("adds rows to the batch", "Pad along other dimensions.")
    call.require_no_batch_size("pad", "padding", "value")
    return value


def channels(call: Call) -> Value:
    """channel_shuffle, prelu: dimension 1 is worked on or has its own weight."""
    call.require_unbatched("weight")
    value = call.value("self")
    if call.batch_of("self").dim == 1 and len(call.shape("self")) > 1:
        raise Mixes("takes the batch for channels", INTO_DIM_0)
    return value


def embedding(call: Call) -> Value:
    """Each index reads a row of the table; the batch stays where it is in the indices."""
    call.require_unbatched("weight")
    if call.args.get("scale_grad_by_freq"):
        raise Mixes("scales gradients by how often an index occurs in the batch", "Set scale_grad_by_freq=False.")
    return batched(call.batch_of("indices"))
