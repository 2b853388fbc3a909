"""Losses with their own reduction: none keeps the batch, sum and mean over it are a loss of the fused form."""

from __future__ import annotations

from dpcompile.ir import Axis, Kind, Value
from dpcompile.rules.batching.base import LOSS_PER_SAMPLE, Call, Mixes, batched
from dpcompile.rules.batching.pointwise import align

NONE, MEAN, SUM = 0, 1, 2  # torch's numbers for reduction
SUMMED, MEANED = Value(Kind.REDUCED), Value(Kind.REDUCED, mean=True)


def _reduction(call: Call) -> int:
    number = call.args.get("reduction", MEAN)
    return number if number is not None else MEAN


def elementwise(call: Call) -> Value:
    """The batch of all operands in the same place; a sum or mean is over all elements, so of samples alike."""
    tensors = tuple(call.tensors())
    axis = align(call, tensors, max(len(t.meta["val"].shape) for t in tensors))
    assert axis is not None
    return {NONE: batched(axis), MEAN: MEANED, SUM: SUMMED}[_reduction(call)]


def cross_entropy(call: Call) -> Value:
    """Scores and targets of the same sample; a mean only where its divisor is the number of samples."""
    call.require_unbatched("weight")
    scores, targets = call.axis("self"), call.value("target")
    shape = call.shape("self")
    assert scores is not None or targets.axis is not None
    class_dim = 1 if len(shape) > 1 else 0
    as_probabilities = len(call.shape("target")) == len(shape)
    if scores is not None and scores.dim == class_dim:
        raise Mixes("takes the batch for the classes")
    axis = scores
    if targets.axis is not None:
        shift = 0 if as_probabilities or targets.axis.dim < class_dim else 1
        moved = Axis(targets.axis.dim + shift, targets.axis.outer, targets.axis.inner)
        if axis not in (None, moved) or targets.kind is Kind.ROWS:
            raise Mixes("compares scores with the targets of other samples")
        axis = moved
    assert axis is not None
    reduction = _reduction(call)
    if reduction == SUM:
        return SUMMED
    if reduction == MEAN:
        return _mean(call, axis, as_probabilities, single=len(shape) <= 2 and not axis.folded)
    after = axis.dim - (axis.dim > class_dim)
    return batched(Axis(after, axis.outer, axis.inner))


def _mean(call: Call, axis: Axis, as_probabilities: bool, single: bool) -> Value:
    """A mean over targets divides by how many there are in the whole batch, ignored ones and class weights apart."""
    if as_probabilities:  # divided by the number of samples and positions, a constant per sample
        return MEANED
    if call.args.get("weight") is not None:
        raise Mixes("divides by the class weights of all samples' targets", LOSS_PER_SAMPLE)
    if not single:
        raise Mixes(
            "divides by the number of valid targets in the whole batch",
            'Normalise per sample: return per-sample losses (reduction="none", then a mean over each sample\'s own).',
        )
    ignored = call.args.get("ignore_index")
    if ignored is not None and not (isinstance(ignored, int) and ignored < 0):
        raise Mixes("divides by the number of targets in the batch that are not ignore_index", LOSS_PER_SAMPLE)
    return MEANED


def margin(call: Call) -> Value:
    """Rows with the batch in dimension 0 of every operand that has it."""
    axis: Axis | None = None
    if any(len(call.shape(name)) < 2 for name in ("anchor", "positive", "input1", "input2") if name in call.args):
        raise Mixes("takes the batch for one row")
    for tensor in call.tensors():
        found = call.known(tensor).axis
        if found is not None and (found.dim != 0 or axis not in (None, found)):
            raise Mixes("compares samples with other samples")
        axis = axis or found
    assert axis is not None
    return {NONE: batched(axis), MEAN: MEANED, SUM: SUMMED}[_reduction(call)]


def nll_forward(call: Call) -> tuple[Value, Value]:
    """As cross_entropy, with the total weight of the targets beside it."""
    return cross_entropy(call), Value(Kind.REDUCED)
