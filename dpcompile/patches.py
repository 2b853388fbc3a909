"""Patches of images, which convolutions are linear maps of: written out, or read off the image where they overlap.

A patch holds k = prod(kernel) values of each channel, so that writing patches out costs k times the image. Two things
that norms and clipped sums need can do without:

    Gram of patches     S[t,s] = sum_delta K[t + delta, s + delta], K the Gram of the image's own positions
    gradients of kernels, summed or per sample: what convolution's own backward computes

Per-sample gradients that are too large to be kept come a few at a time: once to be squared, once to be summed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from dpcompile import native
from dpcompile.opaque import opaque
from dpcompile.shapes import size_of

aten = torch.ops.aten


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

    @property
    def places(self) -> int:
        return math.prod(self.kernel)

    def extent(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the padded image that so many patches reach over."""
        steps = zip(positions, self.stride, self.dilation, self.kernel, strict=True)
        return tuple((count - 1) * stride + dilation * (k - 1) + 1 for count, stride, dilation, k in steps)


def padded(image: torch.Tensor, window: Window, positions: tuple[int, ...]) -> torch.Tensor:
    """The image as far as its patches reach: with zeros around it, without what no patch reads."""
    if any(pad != (0, 0) for pad in window.padding):
        image = F.pad(image, [size for pad in reversed(window.padding) for size in pad])
    for i, extent in enumerate(window.extent(positions)):
        if size_of(image.shape[2 + i]) != size_of(extent):
            image = image.narrow(2 + i, 0, extent)
    return image


def patches(image: torch.Tensor, window: Window, positions: tuple[int, ...]) -> torch.Tensor:
    """[N, G, d, T]: for each output position the input values under the kernel, d = C / groups * prod(kernel)."""
    n, channels, groups = len(window.kernel), image.shape[1], window.groups
    image = padded(image, window, positions)
    if window.kernel != (1,) * n or window.stride != (1,) * n:
        for i, (kernel, stride, dilation) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True)):
            image = image.unfold(2 + i, dilation * (kernel - 1) + 1, stride)
            image = image[..., ::dilation] if dilation != 1 else image
        image = image.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    return image.reshape(image.shape[0], groups, channels // groups * window.places, math.prod(positions))


@functools.lru_cache(maxsize=1024)
def tables(
    channels: int,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    positions: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] and [d] int64: what output position t reads of a padded image [C, *sizes] is at first[t] + second[k]."""
    steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    starts, places = torch.zeros(1, dtype=torch.int64), torch.arange(channels) * math.prod(sizes)
    for step, count, k, jump, dilated in zip(steps, positions, kernel, stride, dilation, strict=True):
        starts = (starts.unsqueeze(1) + torch.arange(count) * jump * step).flatten()
        places = (places.unsqueeze(1) + torch.arange(k) * dilated * step).flatten()
    return starts, places


def overlapped(gram: torch.Tensor, window: Window, positions: tuple[int, ...]) -> torch.Tensor:
    """[N, T, T] Gram of patches from that of the padded image's own positions, [N, U, U].

    Offsets of one dimension are added up after the other: sum(kernel) terms for an element, and not prod(kernel).
    """
    total = gram.unflatten(2, window.extent(positions)).unflatten(1, window.extent(positions))
    n = len(positions)
    for i, (kernel, stride, dilation) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True)):
        places = [slice(k * dilation, k * dilation + (positions[i] - 1) * stride + 1, stride) for k in range(kernel)]
        everything: list[slice] = [slice(None)] * (1 + 2 * n)
        parts = []
        for place in places:
            at = list(everything)
            at[1 + i] = at[1 + n + i] = place
            parts.append(total[tuple(at)])
        total = functools.reduce(operator.add, parts)
    return total.flatten(1 + n).flatten(1, n)


def kernel_gradient(rows: torch.Tensor, image: torch.Tensor, window: Window, shape: tuple[int, ...]) -> torch.Tensor:
    """The gradient of a kernel, summed over the batch, as plain training computes it."""
    image, padding = _evenly_padded(image, window, tuple(rows.shape[2:]))
    return _backward(rows, image, shape, window, padding)


def kernel_gradients(rows: torch.Tensor, image: torch.Tensor, window: Window, shape: tuple[int, ...]) -> torch.Tensor:
    """[B, *shape] the same for each sample: by a kernel, as groups of one convolution, or one after the other."""
    return OP(*_arguments(rows, image, window, shape))


def kernel_squares(rows: torch.Tensor, image: torch.Tensor, window: Window, shape: tuple[int, ...]) -> torch.Tensor:
    """[B] float64: the sum of squares of each of `kernel_gradients`, of which a few are there at a time."""
    return SQUARES(*_arguments(rows, image, window, shape))


def kernel_sum(
    rows: torch.Tensor, image: torch.Tensor, weight_B: torch.Tensor, window: Window, shape: tuple[int, ...]
) -> torch.Tensor:
    """The weighted sum of just those gradients that `kernel_squares` squares: they are formed by the same calls."""
    return SUM(*_arguments(rows, image, window, shape), weight_B)


def _arguments(rows: torch.Tensor, image: torch.Tensor, window: Window, shape: tuple[int, ...]) -> tuple[Any, ...]:
    image, padding = _evenly_padded(image, window, tuple(rows.shape[2:]))
    return rows, image, list(shape), list(window.stride), padding, list(window.dilation), window.groups


def _evenly_padded(image: torch.Tensor, window: Window, positions: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """An image and the padding, the same on both sides, with which a convolution has just these positions."""
    before = [pad for pad, _ in window.padding]
    spans = zip(image.shape[2:], before, window.dilation, window.kernel, window.stride, strict=True)
    found = [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, pad, dilation, k, stride in spans]
    if [size_of(count) for count in found] == [size_of(count) for count in positions]:
        return image, before
    return padded(image, window, positions), [0] * len(positions)


def _backward(rows: torch.Tensor, image: torch.Tensor, shape: Sequence[int], window: Any, padding: list[int]) -> Any:
    weight = torch.empty(shape, dtype=image.dtype, device=image.device)  # its values are not read
    sizes = (list(window.stride), padding, list(window.dilation), False, [0] * len(padding), window.groups)
    return aten.convolution_backward(rows, image, weight, None, *sizes, [False, True, False])[1]


LANES, FEW = 8, 64
"""Input channels of a group from which, and channels up to which, a CPU's kernels for grouped convolutions are fast."""


def together(shape: Sequence[int], groups: int) -> bool:
    """Whether samples are taken as groups of one convolution, where there is no kernel of ours."""
    return LANES <= shape[1] <= FEW and shape[0] // groups <= FEW


def by_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel of ours forms the gradients of all samples (tiles.cpp): most often in two thirds of the time."""
    return device.type == "cpu" and dtype in (torch.float32, torch.float64) and native.library() is not None


def _gradients(
    rows: torch.Tensor,
    image: torch.Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    window = Window(tuple(shape[2:]), tuple(stride), tuple((pad, pad) for pad in padding), tuple(dilation), groups)
    batch, positions, sizes = rows.shape[0], rows.shape[2:], image.shape[2:]
    if by_kernel(rows.device, rows.dtype):
        image = padded(image, window, tuple(positions))
        found = tables(
            image.shape[1] // groups,
            tuple(image.shape[2:]),
            window.kernel,
            window.stride,
            window.dilation,
            tuple(positions),
        )
        rows, image = (x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (rows, image))
        return native.gradients(rows.flatten(2).transpose(1, 2), image, found).reshape(batch, *shape)
    if batch and rows.device.type == "cpu" and rows.dtype is torch.float32 and together(shape, groups):
        window = replace(window, groups=batch * groups)
        wide, deep = rows.reshape(1, -1, *positions), image.reshape(1, -1, *sizes)
        return _backward(wide, deep, [batch * shape[0], *shape[1:]], window, padding).reshape(batch, *shape)
    found = rows.new_empty([batch, *shape])
    for i in range(rows.shape[0]):
        found[i] = _backward(rows[i : i + 1], image[i : i + 1], shape, window, padding)
    return found


_WINDOW = (
    "Tensor rows, Tensor image, SymInt[] shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
)

OP = opaque(
    f"kernel_gradients({_WINDOW}) -> Tensor",
    _gradients,
    lambda rows, image, shape, *_: rows.new_empty([rows.shape[0], *shape]),
)


@register_flop_formula(torch.ops.dpcompile.kernel_gradients)
def _flops(rows_shape: Sequence[int], image_shape: Sequence[int], shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows_shape) * math.prod(shape[1:])


CHUNK = 2**20
"""Numbers of per-sample gradients that are there at a time, where those of one sample are not more."""


def _chunks(rows: torch.Tensor, image: torch.Tensor, shape: list[int], *window: Any) -> Iterator[tuple[slice, Any]]:
    size = max(CHUNK // math.prod(shape), 1)
    for start in range(0, rows.shape[0], size):
        part = slice(start, start + size)
        yield part, _gradients(rows[part], image[part], shape, *window).flatten(1)


def _squares(
    rows: torch.Tensor,
    image: torch.Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    found = rows.new_empty(rows.shape[0], dtype=torch.float64)
    for part, each in _chunks(rows, image, shape, stride, padding, dilation, groups):
        found[part] = torch.linalg.vector_norm(each, dim=1, dtype=torch.float64).square()
    return found


def _sum(
    rows: torch.Tensor,
    image: torch.Tensor,
    shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    weight_B: torch.Tensor,
) -> torch.Tensor:
    total = weight_B.new_zeros(math.prod(shape))
    for part, each in _chunks(rows, image, shape, stride, padding, dilation, groups):
        total += weight_B[part] @ each.to(weight_B.dtype)
    return total.reshape(shape)


SQUARES = opaque(
    f"kernel_squares({_WINDOW}) -> Tensor",
    _squares,
    lambda rows, *_: rows.new_empty(rows.shape[0], dtype=torch.float64),
)
SUM = opaque(
    f"kernel_sum({_WINDOW}, Tensor weight_B) -> Tensor",
    _sum,
    lambda rows, image, shape, *rest: rest[-1].new_empty(shape),
)


@register_flop_formula([torch.ops.dpcompile.kernel_squares, torch.ops.dpcompile.kernel_sum])
def _flops_in_chunks(
    rows_shape: Sequence[int], image_shape: Sequence[int], shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(rows_shape) * math.prod(shape[1:])
