"""Any other op: the per-sample gradient by vmap of the op's own vjp. Slow, but right; the report says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dpcompile.errors import Finding, refusal
from dpcompile.forms import Explicit, Form
from dpcompile.ir import Axis
from dpcompile.origin import origin
from dpcompile.rules.sites.base import (
    Call,
    Tap,
    Work,
    call_bound,
    is_tensor,
    per_sample_size,
    pick,
    put,
    slots_of,
    tapped,
)
from dpcompile.shapes import batch_first


class Fallback:
    name = "fallback"
    vmapped = True

    def accepts(self, call: Call) -> bool:
        axes = [call.axis(slot) for slot in slots_of(call.arguments)]
        return (
            isinstance(call.node.meta["val"], torch.Tensor)
            and any(axis is not None for axis in axes)
            and not any(not is_tensor(node) for node in call.node.all_input_nodes)
            and torch.Tag.nondeterministic_seeded not in call.node.target.tags  # type: ignore[union-attr]
        )

    def _batched(self, call: Call) -> dict[str, Axis]:
        axes = {slot: call.axis(slot) for slot in slots_of(call.arguments)}
        return {slot: axis for slot, axis in axes.items() if axis is not None}

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        result = tapped(call_bound(call.node.target, arguments))
        saved = tuple(pick(arguments, slot) for slot in slots_of(call.arguments))
        return result, {slot: Tap(result, saved) for slot in call.slots}

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        batched, slots = self._batched(call), tuple(slots_of(call.arguments))
        out_axis, shape = call.out_axis, call.shape(slot)

        def form(*tensors: torch.Tensor) -> Form:
            *saved, grad = tensors
            given = dict(zip(slots, saved, strict=True))

            def one(grad_i: torch.Tensor, *slices: torch.Tensor) -> torch.Tensor:
                arguments = dict(call.arguments)
                for name, tensor in given.items():
                    arguments = put(arguments, name, tensor)
                for (name, axis), piece in zip(batched.items(), slices, strict=True):
                    arguments = put(arguments, name, _as_batch(piece, axis))

                def op(value: torch.Tensor) -> torch.Tensor:
                    return call_bound(call.node.target, put(arguments, slot, value))

                vjp = torch.func.vjp(op, given[slot])[1]
                return vjp(_as_batch(grad_i, out_axis))[0]

            samples = (batch_first(given[name], axis) for name, axis in batched.items())
            try:
                grads = torch.func.vmap(one)(batch_first(grad, out_axis), *samples)
            except RuntimeError as error:
                if "vmap fallback" in str(error):
                    raise refusal([_not_vmapped(call, slot, str(error))], "find-sites") from error
                raise
            return Explicit(grads.reshape([grads.shape[0], *shape]))

        return form

    def plain(self, call: Call, slot: str) -> Callable[..., torch.Tensor]:
        """The gradient of the whole batch, as plain training computes it."""
        slots = tuple(slots_of(call.arguments))

        def gradient(*tensors: torch.Tensor) -> torch.Tensor:
            *saved, grad = tensors
            arguments = dict(call.arguments)
            for name, tensor in zip(slots, saved, strict=True):
                arguments = put(arguments, name, tensor)
            with torch.enable_grad():
                leaf = pick(arguments, slot).detach().requires_grad_()
                result = call_bound(call.node.target, put(arguments, slot, leaf))
            if not result.requires_grad:
                return torch.zeros_like(leaf)
            return torch.autograd.grad(result, leaf, grad)[0]

        return gradient

    def work(self, call: Call, slot: str) -> Work:
        size = max(math.prod(call.sizes(slot)), 1)
        return Work("explicit", max(per_sample_size(call.out, call.out_axis) // size, 1), 1, size)


def _as_batch(piece: torch.Tensor, axis: Axis) -> torch.Tensor:
    """One sample's slice as a batch of one, its rows folded as the batch folds them."""
    return piece.flatten(axis.dim, axis.dim + 1) if axis.folded else piece.unsqueeze(axis.dim)


def _not_vmapped(call: Call, slot: str, reason: str) -> Finding:
    where = origin(call.node)
    missing = reason.partition(" ")[0].removeprefix("aten::")
    return Finding(
        where.module,
        where.module_type,
        str(call.node.target).removeprefix("aten."),
        where.line,
        f"uses a parameter (argument {slot}) and has no per-sample gradient: torch.func.vmap has no rule for {missing}",
        "write a rule in dpcompile/rules/sites/ (see CONTRIBUTING.md), or write the op with linear, conv, embedding "
        "or pointwise ops",
        mixes=False,
    )
