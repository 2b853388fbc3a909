"""Max pooling of images in eager calls on a CPU.

torch goes through contiguous images number by number, ten times slower than through those in channels-last layout. The
kernel (pools.cpp) goes along their rows and finds the same numbers in the same places. A compiler sees torch's op, for
which it has better code. passes/pool_by_rows.py puts `max_pool` in the place of that op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpcompile import native

OP = torch.ops.aten.max_pool2d_with_indices.default


def max_pool(
    image: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`aten.max_pool2d_with_indices`."""
    pairs = kernel, stride, padding, dilation = [
        _pair(given) for given in (kernel, stride or kernel, padding, dilation)
    ]
    if not _native(image) or any(d > size for d, size in zip(dilation, image.shape[2:], strict=True)):
        return OP(image, kernel, stride, padding, dilation, ceil_mode)  # of a wider dilation, windows may be empty
    sizes = zip(image.shape[2:], kernel, stride, padding, dilation, strict=True)
    windows = [_windows(*size, ceil_mode=ceil_mode) for size in sizes]
    return native.max_pool(image, windows, [number for pair in pairs for number in pair])


def _pair(given: Sequence[int]) -> tuple[int, int]:
    return given[0], given[-1]


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, *, ceil_mode: bool) -> int:
    """How many there are; with `ceil_mode` also one that reaches over the padded end, if it begins before that."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - ((count - 1) * stride >= size + padding)


def _native(image: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or type(image) is not torch.Tensor or image.device.type != "cpu":
        return False
    fits = image.dim() == 4 and image.is_contiguous() and image.dtype in (torch.float32, torch.float64)
    return fits and image.shape[2] * image.shape[3] < 2**31 and native.library() is not None
