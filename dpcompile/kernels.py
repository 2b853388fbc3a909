"""Norms by Triton kernels (tiles.py) that write nothing of the size of what they go through.

    paired    flash ghost norm: two T x T Gram matrices in tiles, on and above the diagonal, summed against each other
    squared   explicit norm: the p x d gradient of a sample in tiles, squared and summed

Two ops that no compiler looks into, for CUDA. Triton's interpreter runs them on a CPU where TRITON_INTERPRET=1 is set
before triton is imported: slow, for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dpcompile.errors import DPCompileError

SIDE, DEPTH = 64, 32
"""Numbers along a side of a tile, and terms that one step adds to it; half as many in float64."""
SPAN = 1024
"""Terms that are added up one after the other, in whole steps; the sums of longer ones are added in turn."""
NARROW = (torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Whether the kernels run there: a CUDA device with tensor cores for bfloat16, or the interpreter on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    ours = device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available()
    return ours and torch.cuda.get_device_capability(device) >= (8, 0)


# Sizes may be symbols of a graph.


def terms(count: int, dtype: torch.dtype) -> int:
    """Roundings in a sum of so many products of factors of a type, in units of that type; of narrow ones in float32's.

    float32 and float64: one for each product, SPAN at a time, and one for each span. bfloat16 and float16: products
    are exact; tensor cores add them up in float32, but cut off where float32 would round, twice the unit roundoff, and
    once more for each step of at least four products (Fasi, Higham, Mikaitis and Pranesh 2021, Numerical behavior of
    NVIDIA tensor cores, PeerJ Computer Science 7:e330, doi 10.7717/peerj-cs.330).
    """
    spans = -(-count // SPAN)
    longest = min(count, SPAN) if isinstance(count, int) else count
    return (2 * (longest + longest // 4 + 1) if dtype in NARROW else longest) + spans


def sum_terms(tiles: int, dtype: torch.dtype) -> int:
    """Roundings in a sum over so many tiles: along a line of a tile in their type, of lines and tiles in float64."""
    return 2 * _side(dtype) + tiles if dtype is torch.float64 else _side(dtype)


def pairs_tiles(length: int, dtype: torch.dtype) -> int:
    """Tiles of a Gram matrix that are formed: those on and above its diagonal."""
    sides = -(-length // _side(dtype))
    return sides * (sides + 1) // 2


def block_tiles(p: int, d: int, dtype: torch.dtype) -> int:
    """Tiles of a gradient."""
    return -(-p // _side(dtype)) * -(-d // _side(dtype))


def sum_type(dtype: torch.dtype, *, wide: bool) -> torch.dtype:
    """In which products of factors of a type are added up."""
    return torch.float64 if wide or dtype is torch.float64 else torch.float32


def _side(total: torch.dtype) -> int:
    return SIDE // 2 if total is torch.float64 else SIDE


@torch.library.custom_op("dpcompile::paired", mutates_args=())
def paired(
    rows_NTp: torch.Tensor, cols_NTd: torch.Tensor, row_norms_NT: torch.Tensor, col_norms_NT: torch.Tensor, wide: bool
) -> torch.Tensor:
    """[3, N] float64: sums over t and s of K_ts A_ts, |K_ts| c_t c_s and |A_ts| r_t r_s.

    K = rows rows^T and A = cols cols^T, r and c are the given norms. Sums are in float32, of float64 factors and where
    `wide` says so in float64. An element of K is a sum of p products, in terms(p) roundings; one of A a sum of d.
    What is summed over t and s is rounded once or twice, and summed in sum_terms(pairs_tiles(T)) roundings.
    """
    samples, length, p = rows_NTp.shape
    d, total = cols_NTd.shape[2], sum_type(rows_NTp.dtype, wide=wide)
    tiles = pairs_tiles(length, total)
    partial = rows_NTp.new_empty((samples, tiles, 3), dtype=torch.float64)
    if partial.numel():
        given = (rows_NTp, cols_NTd, row_norms_NT, col_norms_NT)
        strides = [stride for tensor in given for stride in tensor.stride()]
        _launch("paired", *given, partial, length, p, d, *strides, tiles, grid=samples * tiles, wide=wide)
    return partial.sum(1).T.contiguous()


@torch.library.custom_op("dpcompile::squared", mutates_args=())
def squared(rows_NTp: torch.Tensor, cols_NTd: torch.Tensor, wide: bool) -> torch.Tensor:
    """[N] float64: sum_pd (sum_t rows_tp cols_td)^2.

    Sums are in the types of `paired`. An element of rows^T cols is a sum of T products, in terms(T) roundings; its
    square is rounded once, and squares are summed in sum_terms(block_tiles(p, d)) roundings.
    """
    samples, length, p = rows_NTp.shape
    d, total = cols_NTd.shape[2], sum_type(rows_NTp.dtype, wide=wide)
    tiles, across = block_tiles(p, d, total), block_tiles(1, d, total)
    partial = rows_NTp.new_empty((samples, tiles), dtype=torch.float64)
    if partial.numel():
        strides = (*rows_NTp.stride(), *cols_NTd.stride())
        sizes = (length, p, d, *strides, tiles, across)
        _launch("squared", rows_NTp, cols_NTd, partial, *sizes, grid=samples * tiles, wide=wide)
    return partial.sum(1)


def _launch(name: str, rows: torch.Tensor, cols: torch.Tensor, *arguments: Any, grid: int, wide: bool) -> None:
    """So many programs of a kernel, one for each tile of each sample."""
    if not available(rows.device):
        raise DPCompileError(
            f"kernels: the plan takes norms from Triton kernels, and these do not run on {rows.device} here. Install "
            "triton where there is a CUDA device, or compile the model again on this machine."
        )
    depth = DEPTH // 2 if wide or rows.dtype is torch.float64 else DEPTH
    assert rows.dtype is cols.dtype
    assert SPAN % depth == 0  # else a step would reach into the next span
    from dpcompile import tiles  # imports triton

    total, factor = sum_type(rows.dtype, wide=wide), rows.dtype
    if factor is torch.bfloat16 and rows.device.type == "cpu":
        factor = torch.float32  # the interpreter would multiply bit patterns; products are exact in float32 as well
    types = (tiles.TYPES[total if wide else factor], tiles.TYPES[total])
    with torch.cuda.device_of(rows):
        kernel = getattr(tiles, name)[(grid,)]
        kernel(rows, cols, *arguments, *types, _side(total), depth, SPAN, enable_fp_fusion=True)


PAIRED = torch.ops.dpcompile.paired.default
SQUARED = torch.ops.dpcompile.squared.default


@paired.register_fake
def _(rows_NTp: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows_NTp.new_empty((3, rows_NTp.shape[0]), dtype=torch.float64)


@squared.register_fake
def _(rows_NTp: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows_NTp.new_empty(rows_NTp.shape[0], dtype=torch.float64)


@register_flop_formula(torch.ops.dpcompile.paired)
def _(rows_shape: Sequence[int], cols_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Of pairs t <= s alone, although tiles on the diagonal are formed whole."""
    samples, length, p = rows_shape
    return samples * length * (length + 1) * (p + cols_shape[2])


@register_flop_formula(torch.ops.dpcompile.squared)
def _(rows_shape: Sequence[int], cols_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows_shape) * cols_shape[2]
