"""Recurrent layers: W_hh and b_hh, used at every step of every sample.

The op takes b_hh spread over samples and steps. The gradient of that is the gradient of what each step adds to its
gates, h[t-1] W_hh^T + b_hh, so that W_hh has Outer(that, h[t-1]) and b_hh its sum over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dpcompile.forms import Explicit, Form, Outer
from dpcompile.ir import Axis
from dpcompile.recurrent import OPS, previous
from dpcompile.rules.sites.base import Call, Tap, Work, call_bound, per_sample_size
from dpcompile.rules.sites.reduce import reduce_to
from dpcompile.shapes import batch_first


class Recurrence:
    name = "recurrence"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        return call.node.target in OPS and set(call.slots) <= {"weight", "bias"}

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        gates, bias = arguments["gates"], arguments["bias"]
        bias = gates.new_zeros(gates.shape[-1:]) if bias is None else bias.detach()
        leaf = bias.expand(gates.shape).requires_grad_()
        result = call_bound(call.node.target, {**arguments, "bias": leaf})
        h = result if isinstance(result, torch.Tensor) else result[0]
        taps = {"weight": Tap(leaf, (arguments["h0"], h)), "bias": Tap(leaf)}
        return result, {slot: taps[slot] for slot in call.slots}

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape = call.out_axis, call.shape(slot)
        if slot == "bias":
            return lambda grad: Explicit(reduce_to(grad, axis, shape))
        return lambda h0, h, grad: Outer(
            _positions(grad, axis), _positions(previous(h0, h), axis), shape, row_dims=(0,), col_dims=(1,)
        )

    def work(self, call: Call, slot: str) -> Work:
        p, d = call.sizes("weight")
        positions = per_sample_size(call.out, call.out_axis) // d
        return Work("outer", positions, d, p) if slot == "weight" else Work("explicit", positions, 1, p)


def _positions(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """As [B, 1, T, features]; folded batch factors count as positions."""
    moved = batch_first(tensor, axis)
    return moved.reshape([moved.shape[0], 1, math.prod(moved.shape[1:-1]), moved.shape[-1]])
