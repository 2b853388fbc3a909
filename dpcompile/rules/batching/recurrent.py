"""Recurrent layers, an op for each layer and direction."""

from __future__ import annotations

from dpcompile.rules.batching.base import Call, Mixes, Result, batched

SEQUENCES = (
    "Bring the batch to where the layer has it: dimension 0 with batch_first=True, else dimension 1, of the input and "
    "of every state."
)


def recurrence(call: Call) -> Result:
    """The batch in dimension 0 of gates and states alike, never among the steps; weight and bias the same for all."""
    call.require_unbatched("weight", "bias")
    axis = call.batch_of("gates")
    if axis.dim != 0:
        raise Mixes("goes from sample to sample as if they were the steps of one sequence", SEQUENCES)
    if any(call.axis(name) != axis for name in ("h0", "c0") if name in call.args):
        raise Mixes("begins the sequences of samples with states of others", SEQUENCES)
    return call.everywhere(batched(axis))
