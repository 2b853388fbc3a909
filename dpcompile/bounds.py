"""What rounding adds to the gradient of one use where it enters the clipped sum; docs/certified_clip.md derives it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpcompile.forms import Explicit, OneHot, Outer, Patched, added_onto, doubled, dtype_of, in_float64, length_of
from dpcompile.rounding import gamma, row_norms, storage_unit
from dpcompile.shapes import is_one

SECOND_ORDER = 1.001
"""Covers products of bounds, each below 1e-4, and the rounding of the bounds themselves."""


def sum_gamma(form: Outer | OneHot | Patched, later: int | torch.SymInt = 0) -> float:
    """Error of the clipped sum of one sample against sum_t |rows_t| |cols_t|: scaling, products, T terms, storage.

    `later`: terms that are added to what these have given.
    """
    return explicit_gamma(in_float64(form) if doubled(form) else form, later)


def sum_gammas(forms: Sequence[Outer | OneHot | Patched | Explicit]) -> list[float]:
    """The same for each of several uses, to which look-ups are added (forms.weighted_sums); of `Explicit`, 0."""
    terms = [length_of(form) if isinstance(form, OneHot) and added_onto(form, forms) else 0 for form in forms]
    return [
        0.0 if isinstance(form, Explicit) else sum_gamma(form, sum(terms) - own)
        for form, own in zip(forms, terms, strict=True)
    ]


def explicit_gamma(form: Outer | OneHot | Patched, later: int | torch.SymInt = 0) -> float:
    """The same for products that are added up in the type of the factors, and so many terms behind them."""
    dtype = dtype_of(form)
    wide = torch.float32 if storage_unit(dtype) else dtype
    return SECOND_ORDER * (gamma(length_of(form) + later + 4, wide) + storage_unit(dtype))


def sum_of_lengths(form: Outer | OneHot) -> torch.Tensor:
    """[B] float64, at least sum_t |rows_t| |cols_t|, by reading both factors once."""
    if isinstance(form, OneHot):
        return row_norms(form.cols_BTd).sum(1, dtype=torch.float64)
    lengths = (row_norms(form.rows_BGTp) * row_norms(form.cols_BGTd)).sum(2, dtype=torch.float64)
    return lengths.square().sum(1).sqrt() if lengths.shape[1] != 1 else lengths.squeeze(1)


def over_groups(values_N: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """[B] sums of what is given for every sample and group, [B * G]."""
    return values_N if is_one(shape[1]) else values_N.unflatten(0, tuple(shape)).sum(1)


def never_negative(square: torch.Tensor) -> torch.Tensor:
    """The bound on a square, which is negative by a rounding at most; or by -inf, where a product of two positions has
    overflowed and that of each with itself just not. That is no norm of zero: it becomes an infinite one.
    """
    return square.abs()
