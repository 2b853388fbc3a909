"""Any op that broadcasts its arguments: the parameter is spread over the batch, and autograd reduces the rest.

A value of shape [d] that meets x[B,T,d] enters the op as a leaf of shape [B,1,d]. The op computes the same; the
gradient of the leaf is each sample's own gradient, summed by autograd over everything but the batch. No formula is
needed, so the rule covers every pointwise op, `where`, `expand`, attention masks and whatever broadcasts next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dpcompile.forms import Explicit, Form
from dpcompile.ir import Axis
from dpcompile.rules.sites.base import Call, Tap, Work, call_bound, per_sample_size, pick, put, slots_of
from dpcompile.rules.sites.reduce import broadcasts
from dpcompile.shapes import unfolded, unfolded_size

aten = torch.ops.aten

# Ops that broadcast from the right like pointwise ones, without the tag.
ALSO = {
    aten.expand.default,
    aten.copy.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.rsub.Tensor,
    aten.lerp.Tensor,
    aten.native_dropout.default,
}


def _broadcasting(call: Call) -> bool:
    op = call.node.target
    if op is aten.scaled_dot_product_attention.default:
        return call.slots == ("attn_mask",) and call.out_axis.dim < call.out.dim() - 2
    return op in ALSO or torch.Tag.pointwise in op.tags  # type: ignore[union-attr]


class Broadcast:
    name = "broadcast"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        return _broadcasting(call) and all(
            broadcasts(call.out.dim(), call.out_axis, call.shape(slot)) for slot in call.slots
        )

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        axis, rank = call.out_axis, call.out.dim()
        batch = self._batch(call, arguments, axis)
        taps: dict[str, Tap] = {}
        for slot in slots_of(call.arguments):
            value = pick(arguments, slot)
            if slot in call.slots:
                leaf = _leaf(value, axis, rank, batch)
                taps[slot] = Tap(leaf)
                arguments = put(arguments, slot, leaf.to(_dtype_beside(value, call)) if value.dim() == 0 else leaf)
            elif axis.folded:
                arguments = put(arguments, slot, _unfolded(value, axis, rank, call.axis(slot) is not None))
        if call.node.target is aten.expand.default and axis.folded:
            sizes = list(arguments["size"])
            sizes[axis.dim : axis.dim + 1] = unfolded_size(axis, sizes[axis.dim])
            arguments = {**arguments, "size": sizes}
        result = call_bound(call.node.target, arguments)
        if axis.folded:
            result = result.flatten(axis.dim, axis.dim + 2)
        return result, taps

    def _batch(self, call: Call, arguments: dict[str, Any], axis: Axis) -> Any:
        if call.node.target is aten.expand.default:
            return unfolded_size(axis, arguments["size"][axis.dim])[1]
        for slot in slots_of(call.arguments):
            own = call.axis(slot)
            if own is not None:
                return unfolded(own, pick(arguments, slot))[1]
        raise AssertionError("a batched result has a batched argument")

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape = call.out_axis, call.shape(slot)
        at = axis.dim + 1 if axis.folded else axis.dim
        return lambda grad: Explicit(_first(grad.movedim(at, 0), shape))

    def work(self, call: Call, slot: str) -> Work:
        size = max(math.prod(call.sizes(slot)), 1)
        return Work("explicit", max(per_sample_size(call.out, call.out_axis) // size, 1), 1, size)


def _dtype_beside(value: torch.Tensor, call: Call) -> torch.dtype:
    """What a value without dimensions counts as in an op with tensors that have some: torch promotes it otherwise."""
    metas = [call.meta(slot) for slot in slots_of(call.arguments)]
    others = [meta for meta in metas if meta.dim() and meta.dtype is not torch.bool]
    return call.out.dtype if call.out.is_floating_point() or not others else torch.result_type(others[0], value)


def _first(grad: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return grad.reshape([grad.shape[0], *shape])


def _leaf(value: torch.Tensor, axis: Axis, rank: int, batch: Any) -> torch.Tensor:
    """The value with the batch spread over it, aligned with the (unfolded) result; a leaf of autograd."""
    sizes: list[Any] = [1] * (rank - value.dim()) + list(value.shape)
    at = axis.dim
    if axis.folded:
        sizes[at : at + 1] = [1, 1, 1]
        at += 1
    spread = value.detach().reshape(sizes)
    sizes[at] = batch
    return spread.expand(sizes).requires_grad_()


def _unfolded(value: torch.Tensor, axis: Axis, rank: int, batched: bool) -> torch.Tensor:
    at = axis.dim - (rank - value.dim())
    if at < 0:
        return value
    return value.unflatten(at, unfolded(replace(axis, dim=at), value) if batched else (1, 1, 1))
