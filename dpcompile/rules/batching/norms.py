"""Normalisation: statistics must be taken within each sample."""

from __future__ import annotations

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, Result, batched, move

INTO_DIM_0 = "Bring the batch to dimension 0."
REPLACE_BATCH_NORM = "Replace BatchNorm by nn.GroupNorm, or put it in eval mode before compiling."


def layer_norm(call: Call) -> Result:
    """The batch is not among the normalised dimensions; weight and bias are the same for all samples."""
    call.require_unbatched("weight", "bias")
    value = call.value("input")
    if call.batch_of("input").dim >= len(call.shape("input")) - len(call.args["normalized_shape"]):
        raise Mixes("normalises over the samples of the batch")
    return call.everywhere(value)


def group_norm(call: Call) -> Result:
    """The batch in dimension 0; weight and bias are the same for all samples."""
    call.require_unbatched("weight", "bias")
    value = call.value("input")
    if call.batch_of("input").dim != 0 or call.number("N") not in (None, call.shape("input")[0]):
        raise Mixes("normalises over the samples of the batch", INTO_DIM_0)
    return call.everywhere(value)


def instance_norm(call: Call) -> Value:
    """The batch in dimension 0 (or 1), and no running statistics: those are a mean over the batch."""
    call.require_unbatched("weight", "bias")
    value = call.value("input")
    if call.batch_of("input").dim > 1:
        raise Mixes("normalises over the samples of the batch", INTO_DIM_0)
    if call.args["use_input_stats"] and (call.args.get("running_mean") or call.args.get("running_var")):
        raise Mixes(
            "averages statistics over the batch into a buffer: running statistics leak un-noised data",
            "Set track_running_stats=False.",
        )
    return value


def batch_norm(call: Call) -> Result:
    """Statistics that do not come from the batch (eval mode), or a batch folded into the channels.

    A batch folded into dimension 1 (how instance norm is written) has statistics of its own for every sample.
    """
    value = call.value("input")
    axis = call.batch_of("input")
    training = call.args.get("training", call.args.get("train", "_with_update" in str(call.op)))
    per_channel = [call.axis(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if axis.dim == 1:
        if any(found is not None and found != Axis(0, axis.outer, axis.inner) for found in per_channel):
            raise Mixes("uses weights or statistics of other samples")
    elif training:
        raise Mixes("in training mode takes its statistics over the samples of the batch", REPLACE_BATCH_NORM)
    elif any(found is not None for found in per_channel):
        raise Mixes("uses weights or statistics of other samples")
    several = call.node.meta["val"]
    if not isinstance(several, (list, tuple)):
        return value
    statistics = move(value, 0) if axis.dim == 1 else CONSTANT
    return (batched(axis), *(statistics for _ in several[1:]))
