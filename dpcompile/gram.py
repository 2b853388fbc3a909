"""Gram matrices of factors, and sums over pairs of positions that rounding cannot make too small (certified.py)."""

from __future__ import annotations

import functools
import operator

import torch

from dpcompile.bounds import SECOND_ORDER
from dpcompile.forms import Patched, bands
from dpcompile.patches import overlapped, padded
from dpcompile.rounding import accurate, gamma, tiny, unit
from dpcompile.shapes import hint

BLOCK = 1024
"""Products that one matrix product adds up at most; longer ones are cut, and their parts added."""
WELL_BELOW = 2e-4
"""Relative over-estimate of a norm under which the simplest bound will do."""


def pairing(
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
    adding = gamma2(pairs)
    left, right = ((r * c).sum(1, dtype=torch.float64) for r, c in ((left_rows, left_cols), (right_rows, right_cols)))
    everything = left * right
    total = sum2(pairs) + pairs.shape[1] * pairs.shape[2] * tiny(dtype)
    positions = max(pairs.shape[1:], key=hint)
    if hint((by_rows + by_cols + adding) * positions) / 2 < WELL_BELOW:
        return total + SECOND_ORDER * (by_rows + by_cols + adding) * everything
    by_data = (by_cols + adding) * _weighed(rows_gram, left_cols, right_cols)
    by_data = by_data + by_rows * _weighed(cols_gram, left_rows, right_rows)
    return total + SECOND_ORDER * (by_data + (by_rows + adding) * by_cols * everything)


def paired(rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N] at least |sum_t rows_t cols_t^T|^2 from factors [N, T, p] and [N, T, d], and norms [N, T] of theirs.

    Band by band of positions: blocks on the diagonal of the Gram matrices, then those above it, which count twice.
    """
    rows, cols = accurate(rows), accurate(cols)
    terms = terms_of(rows.shape[2]), terms_of(cols.shape[2])
    cuts = bands(rows.shape[1], rows.device)
    if len(cuts) == 1:
        (rows_gram, r), (cols_gram, c) = gram_of(rows, rows), gram_of(cols, cols)
        return pairing(rows_gram, r, r, terms[0], cols_gram, c, c, terms[1]), r, c
    squares, norms = [], []
    for start, stop in cuts:
        (rows_gram, r), (cols_gram, c) = (gram_of(x, x) for x in (rows[:, start:stop], cols[:, start:stop]))
        squares.append(pairing(rows_gram, r, r, terms[0], cols_gram, c, c, terms[1]))
        norms.append((r, c))
    r, c = (torch.cat(parts, 1) for parts in zip(*norms, strict=True))
    for start, stop in cuts[:-1]:
        own, later = slice(start, stop), slice(stop, None)
        rows_gram, cols_gram = (inner(x[:, own], x[:, later]) for x in (rows, cols))
        above = pairing(
            rows_gram, r[:, own], r[:, later], terms[0], cols_gram, c[:, own], c[:, later], terms[1]
        )  # fmt: skip
        squares.append(2 * above)
    return functools.reduce(operator.add, squares), r, c


def terms_of(count: int) -> int:
    """Terms that follow one another in a matrix product cut into blocks."""
    blocks = _blocks(count)
    return -(-count // blocks) + blocks


def _blocks(count: int) -> int:
    """How many matrix products the sum is cut into; one where the length is free."""
    return max(-(-count // BLOCK), 1) if isinstance(count, int) else 1


def inner(left_NTk: torch.Tensor, right_NSk: torch.Tensor) -> torch.Tensor:
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


def gram_of(left_NTk: torch.Tensor, right_NTk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T, T] inner products of all positions, and [N, T] norms that are not too small, from its diagonal.

    The least norm is such that what underflow takes from a product is covered by the relative bound.
    """
    gram = inner(left_NTk, right_NTk)
    return gram, _norms(gram, terms_of(left_NTk.shape[2]), left_NTk.shape[2])


def _norms(gram: torch.Tensor, terms: int, count: int) -> torch.Tensor:
    """[N, T] norms off the diagonal of a Gram of vectors of `count` numbers, made of sums of so many terms."""
    least = count * 4 * tiny(gram.dtype) / unit(gram.dtype)
    slack = 1 + 2 * gamma(terms, gram.dtype) + 8 * unit(gram.dtype)
    return (gram.diagonal(dim1=1, dim2=2) * slack + least).sqrt()


def patched_gram(form: Patched) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same of patches, which are not written out; and the terms of an element.

    What an element is off by is weighed by the norms of patches: sum_delta |x_(t+delta)| |x_(s+delta)| is at most their
    product (Cauchy and Schwarz).
    """
    positions = tuple(form.rows.shape[2:])
    image = padded(form.image, form.window, positions)
    pixels = image.flatten(2).unflatten(1, (form.window.groups, -1)).flatten(0, 1).transpose(1, 2)
    gram = overlapped(inner(pixels, pixels), form.window, positions)
    terms = terms_of(pixels.shape[2]) + sum(form.window.kernel)
    return gram, _norms(gram, terms, pixels.shape[2] * form.window.places), terms


def sum2(values_NTS: torch.Tensor) -> torch.Tensor:
    """[N] float64 sums over both positions."""
    return values_NTS.sum(2).sum(1, dtype=torch.float64)


def _weighed(values_NTS: torch.Tensor, left_NT: torch.Tensor, right_NS: torch.Tensor) -> torch.Tensor:
    """[N] float64 sums of |values_ts| left_t right_s."""
    rows_NT = (values_NTS.abs() * right_NS.unsqueeze(1)).sum(2)
    return (rows_NT * left_NT).sum(1, dtype=torch.float64)


def gamma2(values_NTS: torch.Tensor) -> float:
    """Relative error of `sum2` of products, against the sum of their absolute values."""
    return gamma(values_NTS.shape[2] + 4, values_NTS.dtype)
