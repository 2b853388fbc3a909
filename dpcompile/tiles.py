"""Triton kernels that form a product tile by tile and leave one partial sum for each tile. kernels.py launches them.

A tile lives in registers: neither a Gram matrix nor a per-sample gradient is written to memory. This file imports
triton, which decides then whether to compile or to interpret; kernels.py imports it when a kernel is first needed.

Offsets are counted in 64 bits: a factor may have more than 2^31 elements. Strides are those of the tensors as they are.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def paired(
    rows,  # [N, T, p]
    cols,  # [N, T, d]
    row_norms,  # [N, T]
    col_norms,  # [N, T]
    partial,  # [N, tiles, 3] float64
    length,
    row_count,
    col_count,
    row_stride_N,
    row_stride_T,
    row_stride_k,
    col_stride_N,
    col_stride_T,
    col_stride_k,
    row_norm_stride_N,
    row_norm_stride_T,
    col_norm_stride_N,
    col_norm_stride_T,
    tiles,
    FACTOR: tl.constexpr,
    TOTAL: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One tile of both Gram matrices, on or above the diagonal: sums of K A, |K| c_t c_s and |A| r_t r_s."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    # Tiles are numbered column by column, j (j + 1) / 2 of them before column j. A square root in float64 is exact.
    column = ((tl.sqrt(8.0 * tile.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tile - column * (column + 1) // 2
    t = row.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    s = column.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    rows += sample * row_stride_N
    cols += sample * col_stride_N
    gram_rows = _gram(rows, t, s, length, row_count, row_stride_T, row_stride_k, FACTOR, TOTAL, SIDE, DEPTH, SPAN)
    gram_cols = _gram(cols, t, s, length, col_count, col_stride_T, col_stride_k, FACTOR, TOTAL, SIDE, DEPTH, SPAN)
    row_norms += sample * row_norm_stride_N
    col_norms += sample * col_norm_stride_N
    r_t = tl.load(row_norms + t * row_norm_stride_T, mask=t < length, other=0.0)
    r_s = tl.load(row_norms + s * row_norm_stride_T, mask=s < length, other=0.0)
    c_t = tl.load(col_norms + t * col_norm_stride_T, mask=t < length, other=0.0)
    c_s = tl.load(col_norms + s * col_norm_stride_T, mask=s < length, other=0.0)
    together = tl.sum(gram_rows * gram_cols, 1).to(tl.float64)
    # Weights are not too small: a little is added for products that underflow, more than those of a line could lose.
    by_cols = (tl.sum(tl.abs(gram_rows) * c_s[None, :], 1).to(tl.float64) + 1e-35) * c_t.to(tl.float64)
    by_rows = (tl.sum(tl.abs(gram_cols) * r_s[None, :], 1).to(tl.float64) + 1e-35) * r_t.to(tl.float64)
    twice = tl.where(row == column, 1.0, 2.0).to(tl.float64)  # an off-diagonal tile stands for its mirror image too
    partial += tl.program_id(0).to(tl.int64) * 3
    tl.store(partial, tl.sum(together, 0) * twice)
    tl.store(partial + 1, tl.sum(by_cols, 0) * twice)
    tl.store(partial + 2, tl.sum(by_rows, 0) * twice)


@triton.jit
def _gram(
    factor,  # [T, k] of one sample
    t,
    s,
    length,
    count,
    stride_T,
    stride_k,
    FACTOR: tl.constexpr,
    TOTAL: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """[t, s] inner products of positions: SPAN terms one after the other, then the sums of the spans."""
    total = tl.zeros([SIDE, SIDE], TOTAL)
    for start in range(0, count, SPAN):
        part = tl.zeros([SIDE, SIDE], TOTAL)
        for first in range(start, tl.minimum(start + SPAN, count), DEPTH):
            k = first + tl.arange(0, DEPTH).to(tl.int64)
            left_at = factor + t[:, None] * stride_T + k[None, :] * stride_k
            right_at = factor + s[None, :] * stride_T + k[:, None] * stride_k
            left = tl.load(left_at, mask=(t < length)[:, None] & (k < count)[None, :], other=0.0).to(FACTOR)
            right = tl.load(right_at, mask=(s < length)[None, :] & (k < count)[:, None], other=0.0).to(FACTOR)
            part = tl.dot(left, right, part, input_precision="ieee", out_dtype=TOTAL)
        total += part
    return total


@triton.jit
def squared(
    rows,  # [N, T, p]
    cols,  # [N, T, d]
    partial,  # [N, tiles] float64
    length,
    row_count,
    col_count,
    row_stride_N,
    row_stride_T,
    row_stride_k,
    col_stride_N,
    col_stride_T,
    col_stride_k,
    tiles,
    across,  # tiles beside one another: those of d
    FACTOR: tl.constexpr,
    TOTAL: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The sum of squares of one tile of rows^T cols: SPAN positions one after the other, then the sums of the spans."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = (tile // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    d = (tile % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    rows += sample * row_stride_N
    cols += sample * col_stride_N
    total = tl.zeros([SIDE, SIDE], TOTAL)
    for start in range(0, length, SPAN):
        part = tl.zeros([SIDE, SIDE], TOTAL)
        for first in range(start, tl.minimum(start + SPAN, length), DEPTH):
            t = first + tl.arange(0, DEPTH).to(tl.int64)
            rows_at = rows + p[:, None] * row_stride_k + t[None, :] * row_stride_T
            cols_at = cols + d[None, :] * col_stride_k + t[:, None] * col_stride_T
            left = tl.load(rows_at, mask=(p < row_count)[:, None] & (t < length)[None, :], other=0.0).to(FACTOR)
            right = tl.load(cols_at, mask=(d < col_count)[None, :] & (t < length)[:, None], other=0.0).to(FACTOR)
            part = tl.dot(left, right, part, input_precision="ieee", out_dtype=TOTAL)
        total += part
    squares = tl.sum(total * total, 1).to(tl.float64)
    tl.store(partial + tl.program_id(0).to(tl.int64), tl.sum(squares, 0))
