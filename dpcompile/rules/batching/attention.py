"""Scaled dot product attention, whole and in the forms of single devices."""

from __future__ import annotations

from torch import fx

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import Call, Mixes
from dpcompile.rules.batching.contractions import contract, leads, ndim_of


def attention(call: Call) -> Value:
    """The batch in leading dimensions of queries, keys, values and mask alike; not among heads that share keys."""
    query, key, value, mask = (call.args[name] for name in ("query", "key", "value", "attn_mask"))
    n = max(ndim_of(t) for t in (query, key, value))

    def letters(tensor: fx.Node, last: str) -> str:
        return leads(ndim_of(tensor) - 2) + last

    terms = [(query, letters(query, "le")), (key, letters(key, "se")), (value, letters(value, "sv"))]
    if isinstance(mask, fx.Node):
        full = leads(max(n, ndim_of(mask)) - 2) + "ls"
        terms.append((mask, full[len(full) - ndim_of(mask) :]))
    found = contract(call, terms, leads(n - 2) + "lv")
    axis = found.axis
    if axis is not None and axis.dim == n - 2 and call.args.get("is_causal"):
        raise Mixes("masks samples by their position in the batch")
    if axis is not None and axis.dim == n - 3 and n > 3 and call.args.get("enable_gqa"):
        raise Mixes("shares keys between samples (the batch lies in the heads' dimension)")
    return found


def fused(call: Call) -> tuple[Value, ...]:
    """Four dimensions, the batch in the first one of every operand that has it."""
    found: Axis | None = None
    for tensor in call.tensors():
        axis = call.known(tensor).axis
        if axis is None:
            continue
        if axis.dim != 0 or found not in (None, axis):
            raise Mixes("takes the batch for heads or positions", "Bring the batch to dimension 0.")
        found = axis
    assert found is not None
    return call.where_batched(found)
