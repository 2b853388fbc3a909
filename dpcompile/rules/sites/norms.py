"""Affine values of layer and group norm: sum over positions of x_hat * g, from the statistics that the forward kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dpcompile.forms import Explicit, Form
from dpcompile.rounding import accurate
from dpcompile.rules.sites.base import Call, Tap, Work, per_sample_size, tapped
from dpcompile.rules.sites.reduce import broadcasts, reduce_to

aten = torch.ops.aten


class LayerNorm:
    name = "layer-norm"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        return (
            call.node.target is aten.layer_norm.default
            and call.axis("input") is not None
            and all(slot in ("weight", "bias") for slot in call.slots)
            and all(broadcasts(call.out.dim(), call.out_axis, call.shape(slot)) for slot in call.slots)
        )

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        x = arguments["input"]
        result, mean, rstd = torch.native_layer_norm(
            x, arguments["normalized_shape"], arguments["weight"], arguments["bias"], arguments["eps"]
        )
        result = tapped(result)
        return result, {slot: Tap(result, (x, mean, rstd) if slot == "weight" else ()) for slot in call.slots}

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape = call.out_axis, call.shape(slot)
        if slot == "bias":
            return lambda grad: Explicit(reduce_to(grad, axis, shape))
        return lambda x, mean, rstd, grad: Explicit(reduce_to((x - mean) * rstd * grad, axis, shape))

    def work(self, call: Call, slot: str) -> Work:
        size = math.prod(call.sizes(slot))
        return Work("explicit", per_sample_size(call.out, call.out_axis) // max(size, 1), 1, size)


class GroupNorm:
    name = "group-norm"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        axis = call.axis("input")
        return (
            call.node.target is aten.group_norm.default
            and axis is not None
            and axis.dim == 0
            and all(slot in ("weight", "bias") for slot in call.slots)
        )

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        x, groups = arguments["input"].contiguous(), arguments["num_groups"]
        size = math.prod(x.shape[2:])
        result, mean, rstd = torch.native_group_norm(
            x, arguments["weight"], arguments["bias"], x.shape[0], x.shape[1], size, groups, arguments["eps"]
        )
        result = tapped(result)
        return result, {slot: Tap(result, (x, mean, rstd) if slot == "weight" else ()) for slot in call.slots}

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape, groups = call.out_axis, call.shape(slot), call.arguments["num_groups"]
        aligned = (*shape, *(1 for _ in call.out.shape[2:]))
        if slot == "bias":
            return lambda grad: Explicit(reduce_to(grad, axis, aligned).flatten(1))

        def form(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, grad: torch.Tensor) -> Form:
            """As torch's own backward has it: sum_t (x_t - mean) rstd g_t = (sum x g - mean sum g) rstd."""
            places = list(range(2, x.dim()))
            products, sums = accurate(x) * grad, grad
            if places:
                products, sums = products.sum(places), accurate(grad).sum(places)
            each = shape[0] // groups
            mean, rstd = (value.repeat_interleave(each, 1) for value in (mean, rstd))
            return Explicit(reduce_to((products - mean * sums) * rstd, axis, shape))

        return form

    def work(self, call: Call, slot: str) -> Work:
        size = call.sizes(slot)[0]
        return Work("explicit", per_sample_size(call.out, call.out_axis) // size, 1, size)
