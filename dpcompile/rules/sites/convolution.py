"""Convolutions and transposed convolutions of 1 to 3 dimensions: a linear map of unfolded patches.

conv            G_i = sum_t g[i,t] (x) patch(x)[i,t]          arXiv:2205.10683, section 3
conv_transpose  G_i = sum_t x[i,t] (x) patch(g)[i,t]          roles swapped
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from dpcompile.forms import Explicit, Form, Outer
from dpcompile.ir import Axis
from dpcompile.rules.batching.base import size_of
from dpcompile.rules.sites.base import Call, Tap, Work, call_bound, per_sample_size, tapped
from dpcompile.rules.sites.reduce import reduce_to
from dpcompile.shapes import hint, unfolded

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


@dataclass(frozen=True)
class Window:
    """How patches are taken: one entry per spatial dimension; padding as (before, after)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def trivial(self) -> bool:
        ones = (1,) * len(self.kernel)
        return self.kernel == ones and self.stride == ones and all(pad == (0, 0) for pad in self.padding)


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


def patches(image: torch.Tensor, window: Window, positions: tuple[int, ...]) -> torch.Tensor:
    """[N, G, d, T]: for each output position the input values under the kernel, d = C / groups * prod(kernel)."""
    n, channels = len(window.kernel), image.shape[1]
    if not window.trivial:
        if any(pad != (0, 0) for pad in window.padding):
            image = F.pad(image, [size for pad in reversed(window.padding) for size in pad])
        for i, (kernel, stride, dilation) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True)):
            image = image.unfold(2 + i, dilation * (kernel - 1) + 1, stride)
            image = image[..., ::dilation] if dilation != 1 else image
            image = image.narrow(2 + i, 0, positions[i])
        image = image.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    elif [size_of(size) for size in image.shape[2:]] != [size_of(size) for size in positions]:
        for i, count in enumerate(positions):  # without the places that output_padding adds at the end
            image = image.narrow(2 + i, 0, count)
    groups = window.groups
    depth = channels // groups * math.prod(window.kernel)
    return image.reshape(image.shape[0], groups, depth, math.prod(positions))


def _samples(blocks: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[N, G, size, T] with N = outer * B * inner as [B, G, T', size], folded factors counted as positions."""
    if not axis.folded:
        return blocks.transpose(2, 3)
    return blocks.unflatten(0, unfolded(axis, blocks)).permute(1, 3, 0, 2, 5, 4).flatten(2, 4)


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

        def form(image: torch.Tensor, grad: torch.Tensor) -> Form:
            image, grad = (grad, image) if swapped else (image, grad)
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
        return Work("outer", positions, math.prod(shape[1:]), shape[0] // groups, groups)
