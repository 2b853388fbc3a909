"""Norms by kernels that write nothing (kernels.py), with the bounds that go with their sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from dpcompile import kernels
from dpcompile.bounds import SECOND_ORDER, never_negative, over_groups, sum_gamma
from dpcompile.forms import Outer, Patched, doubled, dtype_of
from dpcompile.patches import padded
from dpcompile.rounding import gamma, tiny


@dataclass(frozen=True)
class _Factors:
    """What kernels read of a use: for every sample and group, and how many there are of each."""

    shape: tuple[int, ...]  # of samples and groups
    length: int
    p: int
    d: int
    given: tuple[torch.Tensor, torch.Tensor]
    window: tuple[list[int], ...] = ()


def _factors(form: Outer | Patched) -> _Factors:
    if isinstance(form, Outer):
        rows, cols = form.rows_BGTp.flatten(0, 1), form.cols_BGTd.flatten(0, 1)
        _, length, p = rows.shape
        return _Factors(tuple(form.rows_BGTp.shape[:2]), length, p, cols.shape[2], (rows, cols))
    window, positions = form.window, tuple(form.rows.shape[2:])
    image = padded(form.image, window, positions)
    rows, image = (x.unflatten(1, (window.groups, -1)).flatten(0, 1) for x in (form.rows, image))
    shape, d = (form.rows.shape[0], window.groups), image.shape[1] * window.places
    strides = (list(window.kernel), list(window.stride), list(window.dilation))
    return _Factors(shape, math.prod(positions), rows.shape[1], d, (rows, image), strides)


def tiled_norm(form: Outer | Patched) -> torch.Tensor:
    """The same by tiles of the gradient, which is rounded as its products are added up and not written down."""
    use, wide = _factors(form), doubled(form)
    device = use.given[0].device
    dtype = kernels.sum_type(dtype_of(form), wide=wide)
    made = SECOND_ORDER * gamma(kernels.terms(use.length, dtype if wide else dtype_of(form), device), dtype)
    adding = gamma(kernels.block_terms(use.p, use.d, dtype, device) + 4, dtype)
    op: Any = kernels.SQUARED_PATCHES if use.window else kernels.SQUARED
    squares, lengths = op(*use.given, *use.window, wide).unbind()
    square = squares * (1 + 2 * adding) + use.p * use.d * tiny(dtype)
    error = (made + sum_gamma(form)) * over_groups(lengths.square(), use.shape).sqrt()
    return torch.stack([over_groups(square, use.shape), error.square()])


def flash_norm(form: Outer | Patched) -> torch.Tensor:
    """[2, B]: as `pairing` of Gram matrices that are formed and summed in tiles."""
    square, length = flash_square(form)
    return torch.stack([never_negative(square), (sum_gamma(form) * length).square()])


def flash_square(form: Outer | Patched) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] at least |G|^2, and at least sum_t |rows_t| |cols_t|."""
    use, wide = _factors(form), doubled(form)
    device = use.given[0].device
    dtype = kernels.sum_type(dtype_of(form), wide=wide)
    narrow = dtype if wide else dtype_of(form)
    by_rows, by_cols = (gamma(kernels.terms(count, narrow, device), dtype) for count in (use.p, use.d))
    adding = gamma(kernels.pair_terms(use.length, dtype, device) + 4, dtype)
    op: Any = kernels.PAIRED_PATCHES if use.window else kernels.PAIRED
    together, weighed_rows, weighed_cols, lengths = op(*use.given, *use.window, wide).unbind()
    by_data = (by_cols + adding) * weighed_rows + by_rows * weighed_cols
    off = by_data + (by_rows + adding) * by_cols * lengths.square()
    square = together + use.length**2 * tiny(dtype) + SECOND_ORDER * off
    length = over_groups(lengths.square(), use.shape).sqrt()
    return over_groups(square, use.shape), length
