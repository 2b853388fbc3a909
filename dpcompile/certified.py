"""Norms of per-sample gradients that rounding cannot make too small. docs/certified_clip.md has the derivation.

A norm is computed as two numbers for each sample, which later add up over the uses of all parameters:

    square   at least the squared norm of the exact gradient
    error    at least the square of what rounding adds where the gradient enters the clipped sum

so that sqrt(square) + sqrt(error) bounds the norm of what the emitted graph adds for one sample with factor 1. All
bounds are worst-case ones: a sum of n products, in any order, is off by at most gamma_n = n u / (1 - n u) times the sum
of the absolute products (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). They follow the
data, not only the sizes: what a Gram matrix may be off by is weighed by the other one as it was computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from dpcompile import kernels
from dpcompile.bounds import SECOND_ORDER, explicit_gamma, never_negative, over_groups, sum_gammas, sum_of_lengths
from dpcompile.forms import (
    Explicit,
    Form,
    OneHot,
    Outer,
    Patched,
    added,
    doubled,
    explicit,
    flat,
    in_float64,
    merge,
    segment_sums,
    spans,
    swapped,
    written_out,
)
from dpcompile.gram import gamma2, gram_of, inner, paired, pairing, patched_gram, sum2, terms_of
from dpcompile.joined import joined
from dpcompile.kernel_norms import flash_norm, flash_square, tiled_norm
from dpcompile.patches import kernel_squares
from dpcompile.rounding import accurate, gamma, row_norms, storage_unit, tiny
from dpcompile.shapes import hint, is_one

SHORT, LONG = 64, 2048
"""Terms of a float32 sum before float64 takes over, in sums of more than LONG terms."""
BESIDE = 512
"""The same of gradients that are put side by side, where one sum serves them all and may well be a close one."""
FEW = 3
"""Small gradients that are not worth a copy that puts them side by side."""


def sq_norm(grad: torch.Tensor, *, long: int | None = None) -> torch.Tensor:
    """[B] float64, at least the squared norms of gradients [B, ...] that enter the clipped sum as they are.

    `long`: in the place of LONG.
    """
    values = flat(grad)
    count = values.shape[1]
    dtype = torch.float32 if storage_unit(grad.dtype) else grad.dtype
    many = _in_parts(count, dtype, long)
    terms = SHORT if many else count
    return _squares(values, dtype, many=many) * (1 + 2 * gamma(terms + 4, dtype)) + count * tiny(dtype)


def _squares(values_Bn: torch.Tensor, dtype: torch.dtype, *, many: bool) -> torch.Tensor:
    """[B] float64 sums of squares: SHORT terms in that type, the rest in float64, where there are many."""
    count = values_Bn.shape[1]
    if not many:
        return torch.linalg.vector_norm(values_Bn, dim=1, dtype=dtype).double().square()
    parts = count // SHORT
    blocks = values_Bn[:, : parts * SHORT].unflatten(1, (parts, SHORT))
    total = torch.linalg.vector_norm(blocks, dim=2, dtype=dtype).double().square().sum(1)
    whole = isinstance(count, int) and count % SHORT == 0
    return total if whole else total + values_Bn[:, parts * SHORT :].double().square().sum(1)


def _sum(values_Bn: torch.Tensor) -> torch.Tensor:
    """[B] float64 sums: SHORT terms in the type of the values, the rest in float64, where there are many."""
    count = values_Bn.shape[1]
    if not _in_parts(count, values_Bn.dtype):
        return values_Bn.sum(1).double()
    parts = count // SHORT
    total = values_Bn[:, : parts * SHORT].unflatten(1, (SHORT, parts)).sum(1).sum(1, dtype=torch.float64)
    return total + values_Bn[:, parts * SHORT :].sum(1, dtype=torch.float64)


def _sum_terms(count: int, dtype: torch.dtype) -> int:
    """Terms that `_sum` adds in the type of the values."""
    return SHORT if _in_parts(count, dtype) else count


def _in_parts(count: int, dtype: torch.dtype, long: int | None = None) -> bool:
    return hint(count) > (long or LONG) and dtype is not torch.float64


# ------------------------------------------------------------------ norms of one group of uses


def kept_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """[2, B]: square and error of gradients that are kept for the clipped sum, where only their product is rounded.

    Small ones, of which a model has many, are put side by side first: fewer and longer sums.
    """
    small = [flat(grad) for grad in grads if hint(flat(grad).shape[1]) <= LONG]
    squares = [sq_norm(grad) for grad in grads if hint(flat(grad).shape[1]) > LONG]
    together = [sq_norm(joined(small, 1), long=BESIDE)] if len(small) > FEW else map(sq_norm, small)
    square = added([*together, *squares])
    return torch.stack([square, torch.zeros_like(square)])


def dropped_norm(forms: Sequence[Form], *, tiled: bool = False) -> torch.Tensor:
    """[2, B] from the explicit gradient, which the clipped sum forms once more in another order; of look-ups alone from
    the rows of it that are not zero.

    `tiled`: by a kernel that writes nothing, for a single use or several that are one (kernels.py).
    """
    if tiled and (use := _single(forms)) is not None:
        return tiled_norm(use)
    grads: list[torch.Tensor] = []
    error = 0.0
    merged = list(map(written_out, merge(forms)))
    for form, in_sum in zip(merged, sum_gammas(merged), strict=True):
        made = form
        if not isinstance(form, Explicit):
            made = in_float64(form) if doubled(form) else form
            error = error + (explicit_gamma(made) + in_sum) * sum_of_lengths(form)
        grads.append(segment_sums(made) if isinstance(made, OneHot) and len(merged) == 1 else explicit(made))
    grad = added(grads)
    square = sq_norm(grad) * (1 + 4 * storage_unit(grad.dtype))  # what was written down is not what the sum adds
    return torch.stack([square, torch.zeros_like(square) + error**2])


def streamed_norm(form: Patched) -> torch.Tensor:
    """[2, B] from per-sample gradients that the clipped sum forms once more by the same calls: nothing is added."""
    count = math.prod(form.shape)
    squares = kernel_squares(form.rows, form.image, form.window, form.shape)
    square = squares * (1 + 2 * gamma(count + 4, torch.float64))
    return torch.stack([square, torch.zeros_like(square)])


def _single(forms: Sequence[Form]) -> Outer | Patched | None:
    """The one dense use that all forms are; None where uses share no factor, which sizes alone do not tell."""
    (first, *others) = forms
    if not others and isinstance(first, Patched) and kernels.native_there(first.rows.device):
        return first
    merged = merge(list(map(written_out, forms)))
    return merged[0] if len(merged) == 1 and isinstance(merged[0], Outer) else None


def ghost_norm(forms: Sequence[Outer | OneHot | Patched], *, flash: bool = False) -> torch.Tensor:
    """[2, B] of the sum of all forms, none of them made explicit: sum_kl <G_k, G_l>.

    `flash`: that of products by a kernel that writes no Gram matrix (kernels.py).
    """
    merged = cast("list[Outer | OneHot | Patched]", merge(forms))
    if len(merged) == 1 and isinstance(merged[0], Outer) and is_one(merged[0].rows_BGTp.shape[2]):
        return _single_position(merged[0])
    if flash and (use := _single(merged)) is not None:
        return flash_norm(use)
    wide = any(map(doubled, merged))
    uses = [_measured(in_float64(form) if wide else form, flash=flash) for form in merged]
    in_sum = sum_gammas(merged)
    square = uses[0].square
    error = in_sum[0] * uses[0].length
    for k, left in enumerate(uses):
        if k:
            square = square + left.square
            error = error + in_sum[k] * left.length
        for right in uses[k + 1 :]:
            square = square + 2 * _cross(left, right)
    return torch.stack([never_negative(square), error.square()])


def _single_position(form: Outer) -> torch.Tensor:
    """|r (x) c|^2 = |r|^2 |c|^2; nothing is added up, so nothing cancels."""
    shape = form.rows_BGTp.shape[:2]
    squares = sq_norm(form.rows_BGTp.flatten(0, 1)) * sq_norm(form.cols_BGTd.flatten(0, 1))
    square = over_groups(squares, shape)
    return torch.stack([square, torch.zeros_like(square)])


@dataclass(frozen=True)
class _Use:
    """One form with what its own Gram matrices tell."""

    form: Outer | OneHot | Patched
    square: torch.Tensor  # [B] float64, |G|^2 and what may be missing from it
    rows: torch.Tensor  # [B, G, T] at least the norms of the rows; ones for a look-up
    cols: torch.Tensor  # [B, G, T]
    length: torch.Tensor  # [B] float64, at least sum_t |rows_t| |cols_t|, rows of one place added up


def _measured(form: Outer | OneHot | Patched, *, flash: bool = False) -> _Use:
    if flash and isinstance(form, Outer):
        square, length = flash_square(form)
        return _Use(form, square, row_norms(form.rows_BGTp), row_norms(form.cols_BGTd), length)
    if isinstance(form, OneHot):
        same = form.index_BT.unsqueeze(2) == form.index_BT.unsqueeze(1)
        gram, cols = gram_of(form.cols_BTd, form.cols_BTd)
        pairs = cols.unsqueeze(2) * cols.unsqueeze(1) * same
        count, dtype = form.cols_BTd.shape[2], gram.dtype
        most = sum2(pairs)
        square = sum2(gram * same) + SECOND_ORDER * (gamma(terms_of(count), dtype) + gamma2(pairs)) * most
        return _Use(form, square, torch.ones_like(cols)[:, None], cols[:, None], most.sqrt())
    if isinstance(form, Patched):
        factor = form.rows.flatten(2).unflatten(1, (form.window.groups, -1)).transpose(2, 3)
        cols_gram, cols, terms = patched_gram(form)
        rows_gram, rows = gram_of(factor.flatten(0, 1), factor.flatten(0, 1))
        square = pairing(rows_gram, rows, rows, terms_of(factor.shape[3]), cols_gram, cols, cols, terms)
    else:
        factor = form.rows_BGTp
        square, rows, cols = paired(factor.flatten(0, 1), form.cols_BGTd.flatten(0, 1))
    shape = factor.shape[:2]
    length = (rows * cols).sum(1, dtype=torch.float64).unflatten(0, shape)
    return _Use(
        form,
        over_groups(square, shape),
        rows.unflatten(0, shape),
        cols.unflatten(0, shape),
        length.square().sum(1).sqrt() if shape[1] != 1 else length.squeeze(1),
    )


def _cross(left: _Use, right: _Use) -> torch.Tensor:
    """[B] at least <G, G'>."""
    a, b = left.form, right.form
    assert not isinstance(a, Patched)  # patches of several uses are written out
    assert not isinstance(b, Patched)
    if spans(a) != spans(b):  # one weight read in two ways that share no factor
        dtype = accurate(a.cols_BTd if isinstance(a, OneHot) else a.cols_BGTd).dtype
        product = (accurate(explicit(a)) * accurate(explicit(b))).flatten(1)
        off = explicit_gamma(a) + explicit_gamma(b) + gamma(_sum_terms(product.shape[1], dtype) + 4, dtype)
        return _sum(product) + SECOND_ORDER * off * left.length * right.length
    if isinstance(a, Outer) and isinstance(b, Outer):
        if a.row_dims != b.row_dims:
            b, right = swapped(b), _Use(b, right.square, right.cols, right.rows, right.length)
        rows = inner(a.rows_BGTp.flatten(0, 1), b.rows_BGTp.flatten(0, 1))
        cols = inner(a.cols_BGTd.flatten(0, 1), b.cols_BGTd.flatten(0, 1))
        square = pairing(
            rows,
            left.rows.flatten(0, 1),
            right.rows.flatten(0, 1),
            terms_of(a.rows_BGTp.shape[3]),
            cols,
            left.cols.flatten(0, 1),
            right.cols.flatten(0, 1),
            terms_of(a.cols_BGTd.shape[3]),
        )
        return over_groups(square, a.rows_BGTp.shape[:2])
    if isinstance(a, Outer):
        return _cross(right, left)
    assert isinstance(b, Outer)
    dense, norms = (b, right.cols) if b.row_dims == a.row_dims else (swapped(b), right.rows)
    rows_BSV, cols_BSd = dense.rows_BGTp.squeeze(1), dense.cols_BGTd.squeeze(1)
    picked_BST = accurate(rows_BSV.gather(2, a.index_BT.unsqueeze(1).expand(-1, rows_BSV.shape[1], -1)))
    gram_BST = inner(cols_BSd, a.cols_BTd)
    most = picked_BST.abs() * norms.squeeze(1).unsqueeze(2) * left.cols.squeeze(1).unsqueeze(1)
    off = gamma(terms_of(cols_BSd.shape[2]), gram_BST.dtype) + gamma2(most)
    underflow = picked_BST.shape[1] * picked_BST.shape[2] * tiny(gram_BST.dtype)
    return sum2(picked_BST * gram_BST) + SECOND_ORDER * off * sum2(most) + underflow
