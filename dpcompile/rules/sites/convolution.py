"""Convolutions and transposed convolutions of 1 to 3 dimensions: a linear map of unfolded patches.

conv            G_i = sum_t g[i,t] (x) patch(x)[i,t]          arXiv:2205.10683, section 3
conv_transpose  G_i = sum_t x[i,t] (x) patch(g)[i,t]          roles swapped
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dpcompile.forms import Explicit, Form, Outer, Patched
from dpcompile.ir import Axis
from dpcompile.patches import Window, patches
from dpcompile.rules.sites.base import Call, Overlap, Tap, Work, call_bound, per_sample_size, tapped
from dpcompile.rules.sites.reduce import reduce_to
from dpcompile.shapes import hint, is_one, unfolded

aten = torch.ops.aten

FORWARD = {
    op: n
    for n, ops in {
        1: (aten.conv1d.default, aten.conv1d.padding),
        2: (aten.conv2d.default, aten.conv2d.padding),
        3: (aten.conv3d.default, aten.conv3d.padding),
    }.items()
    for op in ops
}
TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}
EITHER = aten.convolution.default


def transposed(call: Call) -> bool:
    return call.node.target in TRANSPOSED or (call.node.target is EITHER and call.arguments["transposed"])


def window_of(call: Call) -> Window:
    kernel = call.shape("weight")[2:]
    n = len(kernel)

    def each(value: Any) -> tuple[int, ...]:
        values = [value] if isinstance(value, int) else list(value)
        return tuple(values * n if len(values) == 1 else values)

    stride, dilation = each(call.arguments["stride"]), each(call.arguments["dilation"])
    padding = call.arguments["padding"]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        pads = ((0, 0),) * n
    else:
        pads = tuple((pad, pad) for pad in each(padding))
    return Window(kernel, stride, pads, dilation, call.arguments["groups"])


def _samples(blocks: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[N, G, size, T] with N = outer * B * inner as [B, G, T', size], folded factors counted as positions."""
    if not axis.folded:
        return blocks.transpose(2, 3)
    return blocks.unflatten(0, unfolded(axis, blocks)).permute(1, 3, 0, 2, 5, 4).flatten(2, 4)


def _direct(window: Window, axis: Axis, positions: tuple[int, ...]) -> bool:
    """Whether the form leaves the patches to the image: there are several, and each sample has an image of its own."""
    return window.places > 1 and not axis.folded and not is_one(math.prod(positions))


def _overlap(call: Call) -> Overlap | None:
    window, swapped = window_of(call), transposed(call)
    small, image = (call.meta("input"), call.out) if swapped else (call.out, call.meta("input"))
    if not _direct(window, call.out_axis, tuple(small.shape[2:])):
        return None
    extent = tuple(map(hint, window.extent(tuple(small.shape[2:]))))
    channels = hint(image.shape[1])
    numbers = channels * math.prod(map(hint, image.shape[2:]))
    view = f"{extent} {[before for before, _ in window.padding]} {window.groups}"
    return Overlap(channels // window.groups, math.prod(extent), numbers, window.kernel, view)


class Convolution:
    name = "convolution"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        if call.node.target not in FORWARD and call.node.target not in TRANSPOSED and call.node.target is not EITHER:
            return False
        axis = call.axis("input")
        batched = axis is not None and axis.dim == 0 and call.meta("input").dim() == call.meta("weight").dim()
        return batched and all(slot in ("weight", "bias") for slot in call.slots)

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        result = tapped(call_bound(call.node.target, arguments))
        taps = {slot: Tap(result, (arguments["input"],) if slot == "weight" else ()) for slot in call.slots}
        return result, taps

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape = call.out_axis, call.shape(slot)
        if slot == "bias":
            aligned = (*shape, *(1 for _ in call.shape("weight")[2:]))
            return lambda grad: Explicit(reduce_to(grad, axis, aligned).flatten(1))
        window, swapped = window_of(call), transposed(call)
        small = call.meta("input") if swapped else call.out
        positions = tuple(small.shape[2:])
        columns = tuple(range(1, len(shape)))
        direct = _direct(window, axis, positions)

        def form(image: torch.Tensor, grad: torch.Tensor) -> Form:
            image, grad = (grad, image) if swapped else (image, grad)
            if direct:
                return Patched(grad, image, window, shape)
            rows = grad.reshape(grad.shape[0], window.groups, -1, math.prod(positions))
            cols = patches(image, window, positions)
            return Outer(_samples(rows, axis), _samples(cols, axis), shape, (0,), columns)

        return form

    def work(self, call: Call, slot: str) -> Work:
        shape = call.sizes(slot)
        small = call.meta("input") if slot == "weight" and transposed(call) else call.out
        positions = per_sample_size(small, replace(call.out_axis, dim=0)) // hint(small.shape[1])
        if slot == "bias":
            return Work("explicit", positions, 1, shape[0])
        groups = call.arguments["groups"]
        return Work("outer", positions, math.prod(shape[1:]), shape[0] // groups, groups, overlap=_overlap(call))
