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

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dpcompile import kernels
from dpcompile.forms import (
    Explicit,
    Form,
    OneHot,
    Outer,
    Patched,
    added,
    bands,
    doubled,
    dtype_of,
    explicit,
    flat,
    in_float64,
    length_of,
    merge,
    spans,
    swapped,
    written_out,
)
from dpcompile.joined import joined
from dpcompile.patches import kernel_squares, overlapped, padded
from dpcompile.rounding import gamma, row_norms, storage_unit, tiny, unit
from dpcompile.shapes import hint, is_one

BLOCK = 1024
"""Products that one matrix product adds up at most; longer ones are cut, and their parts added."""
SHORT, LONG = 64, 2048
"""Terms of a float32 sum before float64 takes over, in sums of more than LONG terms."""
BESIDE = 512
"""The same of gradients that are put side by side, where one sum serves them all and may well be a close one."""
SECOND_ORDER = 1.001
"""Covers products of bounds, each below 1e-4, and the rounding of the bounds themselves."""
FEW = 3
"""Small gradients that are not worth a copy that puts them side by side."""
WELL_BELOW = 2e-4
"""Relative over-estimate of a norm under which the simplest bound will do."""


def accurate(tensor: torch.Tensor) -> torch.Tensor:
    """float32 at least."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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
    """[2, B] from the explicit gradient, which the clipped sum forms once more in another order.

    `tiled`: by a kernel that writes nothing, for a single use or several that are one (kernels.py).
    """
    if tiled and (use := _single(forms)) is not None:
        return _tiled(use)
    grads: list[torch.Tensor] = []
    error = 0.0
    for form in map(written_out, merge(forms)):
        made = form
        if not isinstance(form, Explicit):
            made = in_float64(form) if doubled(form) else form
            error = error + (_explicit_gamma(made) + _sum_gamma(form)) * _length(form)
        grads.append(explicit(made))
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
    if not others and isinstance(first, Patched) and kernels.reads_patches(first.rows.device):
        return first
    merged = merge(list(map(written_out, forms)))
    return merged[0] if len(merged) == 1 and isinstance(merged[0], Outer) else None


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


def _tiled(form: Outer | Patched) -> torch.Tensor:
    """The same by tiles of the gradient, which is rounded as its products are added up and not written down."""
    use, wide = _factors(form), doubled(form)
    device = use.given[0].device
    dtype = kernels.sum_type(dtype_of(form), wide=wide)
    made = SECOND_ORDER * gamma(kernels.terms(use.length, dtype if wide else dtype_of(form), device), dtype)
    adding = gamma(kernels.block_terms(use.p, use.d, dtype, device) + 4, dtype)
    op: Any = kernels.SQUARED_PATCHES if use.window else kernels.SQUARED
    squares, lengths = op(*use.given, *use.window, wide).unbind()
    square = squares * (1 + 2 * adding) + use.p * use.d * tiny(dtype)
    error = (made + _sum_gamma(form)) * _over_groups(lengths.square(), use.shape).sqrt()
    return torch.stack([_over_groups(square, use.shape), error.square()])


def ghost_norm(forms: Sequence[Outer | OneHot | Patched], *, flash: bool = False) -> torch.Tensor:
    """[2, B] of the sum of all forms, none of them made explicit: sum_kl <G_k, G_l>.

    `flash`: by a kernel that writes no Gram matrix, for a single use or several that are one (kernels.py).
    """
    merged = cast("list[Outer | OneHot | Patched]", merge(forms))
    if len(merged) == 1 and isinstance(merged[0], Outer) and is_one(merged[0].rows_BGTp.shape[2]):
        return _single_position(merged[0])
    if flash and (use := _single(merged)) is not None:
        return _flashed(use)
    wide = any(map(doubled, merged))
    uses = [_measured(in_float64(form) if wide else form) for form in merged]
    square = uses[0].square
    error = _sum_gamma(merged[0]) * uses[0].length
    for k, left in enumerate(uses):
        if k:
            square = square + left.square
            error = error + _sum_gamma(merged[k]) * left.length
        for right in uses[k + 1 :]:
            square = square + 2 * _cross(left, right)
    return torch.stack([_never_negative(square), error.square()])


def _never_negative(square: torch.Tensor) -> torch.Tensor:
    """The bound on a square, which is negative by a rounding at most; or by -inf, where a product of two positions has
    overflowed and that of each with itself just not. That is no norm of zero: it becomes an infinite one.
    """
    return square.abs()


def _single_position(form: Outer) -> torch.Tensor:
    """|r (x) c|^2 = |r|^2 |c|^2; nothing is added up, so nothing cancels."""
    shape = form.rows_BGTp.shape[:2]
    squares = sq_norm(form.rows_BGTp.flatten(0, 1)) * sq_norm(form.cols_BGTd.flatten(0, 1))
    square = _over_groups(squares, shape)
    return torch.stack([square, torch.zeros_like(square)])


def _over_groups(values_N: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """[B] sums of what is given for every sample and group, [B * G]."""
    return values_N if is_one(shape[1]) else values_N.unflatten(0, tuple(shape)).sum(1)


@dataclass(frozen=True)
class _Use:
    """One form with what its own Gram matrices tell."""

    form: Outer | OneHot | Patched
    square: torch.Tensor  # [B] float64, |G|^2 and what may be missing from it
    rows: torch.Tensor  # [B, G, T] at least the norms of the rows; ones for a look-up
    cols: torch.Tensor  # [B, G, T]
    length: torch.Tensor  # [B] float64, at least sum_t |rows_t| |cols_t|, rows of one place added up


def _measured(form: Outer | OneHot | Patched) -> _Use:
    if isinstance(form, OneHot):
        same = form.index_BT.unsqueeze(2) == form.index_BT.unsqueeze(1)
        gram, cols = _gram(form.cols_BTd, form.cols_BTd)
        pairs = cols.unsqueeze(2) * cols.unsqueeze(1) * same
        count, dtype = form.cols_BTd.shape[2], gram.dtype
        most = _sum2(pairs)
        square = _sum2(gram * same) + SECOND_ORDER * (gamma(_terms(count), dtype) + _gamma2(pairs)) * most
        return _Use(form, square, torch.ones_like(cols)[:, None], cols[:, None], most.sqrt())
    if isinstance(form, Patched):
        factor = form.rows.flatten(2).unflatten(1, (form.window.groups, -1)).transpose(2, 3)
        cols_gram, cols, terms = _patched_gram(form)
        rows_gram, rows = _gram(factor.flatten(0, 1), factor.flatten(0, 1))
        square = _pairing(rows_gram, rows, rows, _terms(factor.shape[3]), cols_gram, cols, cols, terms)
    else:
        factor = form.rows_BGTp
        square, rows, cols = _paired(factor.flatten(0, 1), form.cols_BGTd.flatten(0, 1))
    shape = factor.shape[:2]
    length = (rows * cols).sum(1, dtype=torch.float64).unflatten(0, shape)
    return _Use(
        form,
        _over_groups(square, shape),
        rows.unflatten(0, shape),
        cols.unflatten(0, shape),
        length.square().sum(1).sqrt() if shape[1] != 1 else length.squeeze(1),
    )


def _paired(rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N] at least |sum_t rows_t cols_t^T|^2 from factors [N, T, p] and [N, T, d], and norms [N, T] of theirs.

    Band by band of positions: blocks on the diagonal of the Gram matrices, then those above it, which count twice.
    """
    rows, cols = accurate(rows), accurate(cols)
    terms = _terms(rows.shape[2]), _terms(cols.shape[2])
    cuts = bands(rows.shape[1], rows.device)
    if len(cuts) == 1:
        (rows_gram, r), (cols_gram, c) = _gram(rows, rows), _gram(cols, cols)
        return _pairing(rows_gram, r, r, terms[0], cols_gram, c, c, terms[1]), r, c
    squares, norms = [], []
    for start, stop in cuts:
        (rows_gram, r), (cols_gram, c) = (_gram(x, x) for x in (rows[:, start:stop], cols[:, start:stop]))
        squares.append(_pairing(rows_gram, r, r, terms[0], cols_gram, c, c, terms[1]))
        norms.append((r, c))
    r, c = (torch.cat(parts, 1) for parts in zip(*norms, strict=True))
    for start, stop in cuts[:-1]:
        own, later = slice(start, stop), slice(stop, None)
        rows_gram, cols_gram = (_product(x[:, own], x[:, later]) for x in (rows, cols))
        above = _pairing(
            rows_gram, r[:, own], r[:, later], terms[0], cols_gram, c[:, own], c[:, later], terms[1]
        )  # fmt: skip
        squares.append(2 * above)
    return functools.reduce(operator.add, squares), r, c


def _cross(left: _Use, right: _Use) -> torch.Tensor:
    """[B] at least <G, G'>."""
    a, b = left.form, right.form
    assert not isinstance(a, Patched)  # patches of several uses are written out
    assert not isinstance(b, Patched)
    if spans(a) != spans(b):  # one weight read in two ways that share no factor
        dtype = accurate(a.cols_BTd if isinstance(a, OneHot) else a.cols_BGTd).dtype
        product = (accurate(explicit(a)) * accurate(explicit(b))).flatten(1)
        off = _explicit_gamma(a) + _explicit_gamma(b) + gamma(_sum_terms(product.shape[1], dtype) + 4, dtype)
        return _sum(product) + SECOND_ORDER * off * left.length * right.length
    if isinstance(a, Outer) and isinstance(b, Outer):
        if a.row_dims != b.row_dims:
            b, right = swapped(b), _Use(b, right.square, right.cols, right.rows, right.length)
        rows = _product(a.rows_BGTp.flatten(0, 1), b.rows_BGTp.flatten(0, 1))
        cols = _product(a.cols_BGTd.flatten(0, 1), b.cols_BGTd.flatten(0, 1))
        square = _pairing(
            rows,
            left.rows.flatten(0, 1),
            right.rows.flatten(0, 1),
            _terms(a.rows_BGTp.shape[3]),
            cols,
            left.cols.flatten(0, 1),
            right.cols.flatten(0, 1),
            _terms(a.cols_BGTd.shape[3]),
        )
        return _over_groups(square, a.rows_BGTp.shape[:2])
    if isinstance(a, Outer):
        return _cross(right, left)
    assert isinstance(b, Outer)
    dense, norms = (b, right.cols) if b.row_dims == a.row_dims else (swapped(b), right.rows)
    rows_BSV, cols_BSd = dense.rows_BGTp.squeeze(1), dense.cols_BGTd.squeeze(1)
    picked_BST = accurate(rows_BSV.gather(2, a.index_BT.unsqueeze(1).expand(-1, rows_BSV.shape[1], -1)))
    gram_BST = _product(cols_BSd, a.cols_BTd)
    most = picked_BST.abs() * norms.squeeze(1).unsqueeze(2) * left.cols.squeeze(1).unsqueeze(1)
    off = gamma(_terms(cols_BSd.shape[2]), gram_BST.dtype) + _gamma2(most)
    underflow = picked_BST.shape[1] * picked_BST.shape[2] * tiny(gram_BST.dtype)
    return _sum2(picked_BST * gram_BST) + SECOND_ORDER * off * _sum2(most) + underflow


def _pairing(
    rows_gram: torch.Tensor,
    left_rows: torch.Tensor,
    right_rows: torch.Tensor,
    rows_terms: int,
    cols_gram: torch.Tensor,
    left_cols: torch.Tensor,
    right_cols: torch.Tensor,
    cols_terms: int,
) -> torch.Tensor:
    """[N] at least sum_ts <rows_t, rows'_s> <cols_t, cols'_s>, from Gram matrices [N, T, S] and norms [N, T], [N, S].

    With K = rows_gram and A = cols_gram as computed, off by gamma_p |r_t| |r_s| and gamma_d |c_t| |c_s|, p and d the
    terms that were added up for an element:
    sum K A + gamma_d sum |K| |c_t| |c_s| + gamma_p sum |A| |r_t| |r_s| + gamma_d gamma_p (sum_t |r_t| |c_t|) (...).
    Where the sizes alone make the bound small, (gamma_d + gamma_p) times the last product is taken for all of it.
    """
    dtype = rows_gram.dtype
    by_rows, by_cols = gamma(rows_terms, dtype), gamma(cols_terms, dtype)
    pairs = rows_gram * cols_gram
    adding = _gamma2(pairs)
    left, right = ((r * c).sum(1, dtype=torch.float64) for r, c in ((left_rows, left_cols), (right_rows, right_cols)))
    everything = left * right
    total = _sum2(pairs) + pairs.shape[1] * pairs.shape[2] * tiny(dtype)
    positions = max(pairs.shape[1:], key=hint)
    if hint((by_rows + by_cols + adding) * positions) / 2 < WELL_BELOW:
        return total + SECOND_ORDER * (by_rows + by_cols + adding) * everything
    by_data = (by_cols + adding) * _weighed(rows_gram, left_cols, right_cols)
    by_data = by_data + by_rows * _weighed(cols_gram, left_rows, right_rows)
    return total + SECOND_ORDER * (by_data + (by_rows + adding) * by_cols * everything)


def _flashed(form: Outer | Patched) -> torch.Tensor:
    """[2, B]: as `_pairing` of Gram matrices that are formed and summed in tiles."""
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
    length = _over_groups(lengths.square(), use.shape).sqrt()
    return torch.stack([_never_negative(_over_groups(square, use.shape)), (_sum_gamma(form) * length).square()])


# ------------------------------------------------------------------ Gram matrices and sums


def _terms(count: int) -> int:
    """Terms that follow one another in a matrix product cut into blocks."""
    blocks = _blocks(count)
    return -(-count // blocks) + blocks


def _blocks(count: int) -> int:
    """How many matrix products the sum is cut into; one where the length is free."""
    return max(-(-count // BLOCK), 1) if isinstance(count, int) else 1


def _product(left_NTk: torch.Tensor, right_NSk: torch.Tensor) -> torch.Tensor:
    """[N, T, S] inner products, at most BLOCK terms at a time."""
    left, right = accurate(left_NTk), accurate(right_NSk).transpose(1, 2)
    count = left.shape[2]
    blocks = _blocks(count)
    if blocks == 1:
        return left @ right
    size = -(-count // blocks)
    total = left[:, :, :size] @ right[:, :size]
    for start in range(size, count, size):
        total = total + left[:, :, start : start + size] @ right[:, start : start + size]
    return total


def _gram(left_NTk: torch.Tensor, right_NTk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T, T] inner products of all positions, and [N, T] norms that are not too small, from its diagonal.

    The least norm is such that what underflow takes from a product is covered by the relative bound.
    """
    gram = _product(left_NTk, right_NTk)
    return gram, _norms(gram, _terms(left_NTk.shape[2]), left_NTk.shape[2])


def _norms(gram: torch.Tensor, terms: int, count: int) -> torch.Tensor:
    """[N, T] norms off the diagonal of a Gram of vectors of `count` numbers, made of sums of so many terms."""
    least = count * 4 * tiny(gram.dtype) / unit(gram.dtype)
    slack = 1 + 2 * gamma(terms, gram.dtype) + 8 * unit(gram.dtype)
    return (gram.diagonal(dim1=1, dim2=2) * slack + least).sqrt()


def _patched_gram(form: Patched) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same of patches, which are not written out; and the terms of an element.

    What an element is off by is weighed by the norms of patches: sum_delta |x_(t+delta)| |x_(s+delta)| is at most their
    product (Cauchy and Schwarz).
    """
    positions = tuple(form.rows.shape[2:])
    image = padded(form.image, form.window, positions)
    pixels = image.flatten(2).unflatten(1, (form.window.groups, -1)).flatten(0, 1).transpose(1, 2)
    gram = overlapped(_product(pixels, pixels), form.window, positions)
    terms = _terms(pixels.shape[2]) + sum(form.window.kernel)
    return gram, _norms(gram, terms, pixels.shape[2] * form.window.places), terms


def _sum2(values_NTS: torch.Tensor) -> torch.Tensor:
    """[N] float64 sums over both positions."""
    return values_NTS.sum(2).sum(1, dtype=torch.float64)


def _weighed(values_NTS: torch.Tensor, left_NT: torch.Tensor, right_NS: torch.Tensor) -> torch.Tensor:
    """[N] float64 sums of |values_ts| left_t right_s."""
    rows_NT = (values_NTS.abs() * right_NS.unsqueeze(1)).sum(2)
    return (rows_NT * left_NT).sum(1, dtype=torch.float64)


def _gamma2(values_NTS: torch.Tensor) -> float:
    """Relative error of `_sum2` of products, against the sum of their absolute values."""
    return gamma(values_NTS.shape[2] + 4, values_NTS.dtype)


def _sum_gamma(form: Outer | OneHot | Patched) -> float:
    """Error of the clipped sum of one sample against sum_t |rows_t| |cols_t|: scaling, products, T terms, storage."""
    return _explicit_gamma(in_float64(form) if doubled(form) else form)


def _explicit_gamma(form: Outer | OneHot | Patched) -> float:
    """The same for products that are added up in the type of the factors."""
    dtype = dtype_of(form)
    wide = torch.float32 if storage_unit(dtype) else dtype
    return SECOND_ORDER * (gamma(length_of(form) + 4, wide) + storage_unit(dtype))


def _length(form: Outer | OneHot) -> torch.Tensor:
    """[B] float64, at least sum_t |rows_t| |cols_t|, by reading both factors once."""
    if isinstance(form, OneHot):
        return row_norms(form.cols_BTd).sum(1, dtype=torch.float64)
    lengths = (row_norms(form.rows_BGTp) * row_norms(form.cols_BGTd)).sum(2, dtype=torch.float64)
    return lengths.square().sum(1).sqrt() if lengths.shape[1] != 1 else lengths.squeeze(1)
