"""What may be done with a sum (or mean) over samples before it is returned as the loss of the fused form."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from dpcompile.ir import Kind, Value
from dpcompile.origin import origin
from dpcompile.rules.batching.base import LOSS_PER_SAMPLE, Call, Mixes

KEEPS = frozenset(
    {"neg", "clone", "detach", "_to_copy", "to", "alias", "view", "reshape", "_unsafe_view"}
    | {"squeeze", "unsqueeze", "permute", "transpose"}
)
SUMS = frozenset({"sum", "mean"})
PER_SAMPLE_MEAN = "Normalise per sample: divide each sample's sum by its own count (or by a constant), then average."
OWN_TOKENS = "Take both means within each sample (over its own tokens, say), multiply, and then average over samples."
PENALTY_LAST = "Divide first and add the penalty afterwards: its gradient must not depend on the number of samples."


def of_reduced(call: Call) -> Value:
    """Anything linear with constant coefficients keeps a sum or mean over samples of per-sample values.

    c * mean_i(f_i) = mean_i(c * f_i), so no coefficient needs to be remembered; an added constant has no gradient.
    A sum divided by B, or by a multiple of it, becomes a mean; every other use of B is refused. A term of the
    parameters alone may be added: passes/penalty.py takes it apart again.
    """
    name = call.op.overloadpacket.__name__
    first, second = call.value("self"), call.value("other")
    if name in KEEPS or name in SUMS:
        call.require_no_batch_size()
        return first
    if name == "div" and first.kind is Kind.REDUCED and second.kind is Kind.CONSTANT:
        return _divided(call, first)
    if name == "mul" and {first.kind, second.kind} == {Kind.REDUCED, Kind.CONSTANT}:
        call.require_no_batch_size()
        return first if first.kind is Kind.REDUCED else second
    if name in ("add", "sub"):
        call.require_no_batch_size()
        kinds = {first.kind, second.kind}
        if kinds == {Kind.REDUCED} and first.mean == second.mean:
            return replace(first, penalised=first.penalised or second.penalised)
        if kinds == {Kind.REDUCED, Kind.CONSTANT}:
            return first if first.kind is Kind.REDUCED else second
        if kinds == {Kind.REDUCED, Kind.PARAMETER}:
            return replace(first if first.kind is Kind.REDUCED else second, penalised=True)
    raise Mixes(f"is not linear in a sum over the samples of the batch{_made_at(call)}", _cure(call))


def _divided(call: Call, value: Value) -> Value:
    if call.args.get("rounding_mode") is not None:
        raise Mixes("rounds a sum over the samples of the batch", LOSS_PER_SAMPLE)
    number = call.number("other")
    if not value.mean and isinstance(call.args["other"], fx.Node) and call.batch.is_multiple(number):
        if value.penalised:
            raise Mixes("divides a penalty on the parameters by the number of samples", PENALTY_LAST)
        return Value(Kind.REDUCED, mean=True)
    call.require_no_batch_size()
    return value


def _cure(call: Call) -> str:
    first, second = call.value("self").kind, call.value("other").kind
    if call.op.overloadpacket.__name__ == "div" and second is Kind.REDUCED:
        return PER_SAMPLE_MEAN
    if first is second is Kind.REDUCED:
        return OWN_TOKENS
    per_sample = any(call.known(tensor).kind is Kind.BATCHED for tensor in call.tensors())
    return "Take it over dimensions other than the batch." if per_sample else LOSS_PER_SAMPLE


def _made_at(call: Call) -> str:
    """Where the sum was taken, in the user's own words, if that is another line."""
    node = next(tensor for tensor in call.tensors() if call.known(tensor).kind is Kind.REDUCED)
    while True:
        before = next((arg for arg in node.all_input_nodes if call.known(arg).kind is Kind.REDUCED), None)
        if before is None:
            break
        node = before
    line = origin(node).line
    return f" (taken at {line})" if line and line != origin(call.node).line else ""
