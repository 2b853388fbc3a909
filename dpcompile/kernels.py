"""Norms by kernels that write nothing of the size of what they go through.

    paired    flash ghost norm: two T x T Gram matrices in tiles, on and above the diagonal, summed against each other
    squared   explicit norm: the p x d gradient of a sample in tiles, squared and summed

and, on a CPU, the same of convolutions, `paired_patches` and `squared_patches`, whose columns are found in the image.
No compiler looks into these ops. On CUDA they are Triton kernels (tiles.py), on a CPU those of tiles.cpp, where there
is g++ (native.py). Triton's interpreter runs its own on a CPU where TRITON_INTERPRET=1 is set before triton is
imported: slow, for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dpcompile import native
from dpcompile.errors import DPCompileError
from dpcompile.opaque import opaque
from dpcompile.patches import Window, tables
from dpcompile.rounding import row_norms

SIDE, DEPTH = 64, 32
"""Numbers along a side of Triton's tile, and terms that one step adds to it; half as many in float64."""
SPAN = 1024
"""Terms that Triton's are added up one after the other, in whole steps; the sums of longer ones are added in turn."""
NARROW = (torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Whether the kernels run there: a CPU with g++, or a CUDA device with tensor cores for bfloat16."""
    if device.type == "cpu":
        return importlib.util.find_spec("triton") is not None if _interpreted() else native.library() is not None
    if importlib.util.find_spec("triton") is None:
        return False
    ours = device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available()
    return ours and torch.cuda.get_device_capability(device) >= (8, 0)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _native(device: torch.device) -> bool:
    return device.type == "cpu" and not _interpreted()


# Sizes may be symbols of a graph.


def terms(count: int, dtype: torch.dtype, device: torch.device) -> int:
    """Roundings in a sum of so many products of factors of a type, in units of that type; of narrow ones in float32's.

    float32 and float64: one for each product, a span of them at a time, and one for each span. Products of bfloat16 and
    float16 are exact. A CPU adds them up as others, or in steps of 32, even and odd ones apart (amx.h). Tensor cores do
    so in float32, but cut off where float32 would round, twice the unit roundoff, and once more for each step of at
    least four products (Fasi, Higham, Mikaitis and Pranesh 2021, Numerical behavior of NVIDIA tensor cores, PeerJ
    Computer Science 7:e330, doi 10.7717/peerj-cs.330).
    """
    span = native.SPAN if _native(device) else SPAN
    spans = -(-count // span)
    longest = min(count, span) if isinstance(count, int) else count
    if dtype not in NARROW:
        return longest + spans
    if not _native(device):
        return 2 * (longest + longest // 4 + 1) + spans
    return max(longest + spans, min(count, 16 + -(-count // 32))) if isinstance(count, int) else count + spans


def pair_terms(length: int, dtype: torch.dtype, device: torch.device) -> int:
    """Roundings in a sum over pairs of positions: a few in their type, the rest in float64."""
    if _native(device):
        return _sum_terms(length * length, dtype)
    sides = -(-length // _side(dtype))
    return _tile_terms(sides * (sides + 1) // 2, dtype)


def block_terms(p: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """The same over the elements of a gradient."""
    if _native(device):
        return _sum_terms(p * d, dtype)
    return _tile_terms(-(-p // _side(dtype)) * -(-d // _side(dtype)), dtype)


def _sum_terms(count: int, dtype: torch.dtype) -> int:
    return count + native.LANES if dtype is torch.float64 else native.PANELS * native.LINES + 2


def _tile_terms(tiles: int, dtype: torch.dtype) -> int:
    """Along a line of a tile in their type, of lines and tiles in float64."""
    return 2 * _side(dtype) + tiles if dtype is torch.float64 else _side(dtype)


def sum_type(dtype: torch.dtype, *, wide: bool) -> torch.dtype:
    """In which products of factors of a type are added up."""
    return torch.float64 if wide or dtype is torch.float64 else torch.float32


def _side(total: torch.dtype) -> int:
    return SIDE // 2 if total is torch.float64 else SIDE


def _paired(rows_NTp: torch.Tensor, cols_NTd: torch.Tensor, wide: bool) -> torch.Tensor:
    """[4, N] float64: sums over t and s of K_ts A_ts, |K_ts| c_t c_s and |A_ts| r_t r_s, and over t of r_t c_t.

    K = rows rows^T and A = cols cols^T, r and c are at least the norms of rows and cols. Sums are in float32, of
    float64 factors and where `wide` says so in float64. An element of K is a sum of p products, in terms(p) roundings;
    one of A a sum of d. What is summed over t and s is rounded once or twice, and summed in pair_terms(T) roundings.
    """
    return _shared([rows_NTp, cols_NTd], [0, 1], wide)[0]


def _shared(factors_NTk: list[torch.Tensor], pairs: list[int], wide: bool) -> torch.Tensor:
    """[pairs, 4, N] as `paired`, of factors by their numbers, two for each pair: of each one Gram matrix is formed."""
    _check(*factors_NTk)
    if len({tuple(factor.shape[:2]) for factor in factors_NTk}) > 1:
        raise RuntimeError(f"shared: {[tuple(factor.shape) for factor in factors_NTk]} are not factors of one norm")
    total = sum_type(factors_NTk[0].dtype, wide=wide)
    if _native(factors_NTk[0].device):
        return native.paired([(factor, None) for factor in factors_NTk], pairs, total)
    each = [(factors_NTk[row], factors_NTk[col]) for row, col in zip(pairs[::2], pairs[1::2], strict=True)]
    return torch.stack([_in_tiles(rows, cols, total) for rows, cols in each])


def _in_tiles(rows_NTp: torch.Tensor, cols_NTd: torch.Tensor, total: torch.dtype) -> torch.Tensor:
    samples, length, p = rows_NTp.shape
    d = cols_NTd.shape[2]
    row_norms_NT, col_norms_NT = row_norms(rows_NTp), row_norms(cols_NTd)
    sides = -(-length // _side(total))
    tiles = sides * (sides + 1) // 2
    partial = rows_NTp.new_empty((samples, tiles, 3), dtype=torch.float64)
    if partial.numel():
        given = (rows_NTp, cols_NTd, row_norms_NT, col_norms_NT)
        strides = [stride for tensor in given for stride in tensor.stride()]
        wide = total is torch.float64
        _launch("paired", *given, partial, length, p, d, *strides, tiles, grid=samples * tiles, wide=wide)
    lengths_N = (row_norms_NT * col_norms_NT).sum(1, dtype=torch.float64)
    return torch.cat([partial.sum(1).T, lengths_N.unsqueeze(0)])


def _squared(rows_NTp: torch.Tensor, cols_NTd: torch.Tensor, wide: bool) -> torch.Tensor:
    """[2, N] float64: sum_pd (sum_t rows_tp cols_td)^2, and the sum over t of r_t c_t, in the terms of `paired`.

    An element of rows^T cols is a sum of T products, in terms(T) roundings; its square is rounded once, and squares are
    summed in block_terms(p, d) roundings.
    """
    _check(rows_NTp, cols_NTd)
    samples, length, p = rows_NTp.shape
    d, total = cols_NTd.shape[2], sum_type(rows_NTp.dtype, wide=wide)
    if _native(rows_NTp.device):
        return native.squared(rows_NTp, cols_NTd, None, total)
    across = -(-d // _side(total))
    tiles = -(-p // _side(total)) * across
    partial = rows_NTp.new_empty((samples, tiles), dtype=torch.float64)
    if partial.numel():
        strides = (*rows_NTp.stride(), *cols_NTd.stride())
        sizes = (length, p, d, *strides, tiles, across)
        _launch("squared", rows_NTp, cols_NTd, partial, *sizes, grid=samples * tiles, wide=wide)
    lengths_N = (row_norms(rows_NTp) * row_norms(cols_NTd)).sum(1, dtype=torch.float64)
    return torch.stack([partial.sum(1), lengths_N])


def _paired_patches(
    rows: torch.Tensor, image: torch.Tensor, kernel: list[int], stride: list[int], dilation: list[int], wide: bool
) -> torch.Tensor:
    """[4, N] as `paired`, from [N, p, *positions] and padded images [N, C, *sizes]: T positions, d = C prod(kernel)."""
    found = _places("paired", rows, image, kernel, stride, dilation)
    rows_NTp = rows.flatten(2).transpose(1, 2)
    return native.paired([(rows_NTp, None), (image, found)], [0, 1], sum_type(rows.dtype, wide=wide))[0]


def _squared_patches(
    rows: torch.Tensor, image: torch.Tensor, kernel: list[int], stride: list[int], dilation: list[int], wide: bool
) -> torch.Tensor:
    """[2, N] as `squared`."""
    found = _places("squared", rows, image, kernel, stride, dilation)
    return native.squared(rows.flatten(2).transpose(1, 2), image, found, sum_type(rows.dtype, wide=wide))


def _places(
    name: str, rows: torch.Tensor, image: torch.Tensor, kernel: list[int], stride: list[int], dilation: list[int]
) -> native.Tables:
    """Where the patches of images are."""
    _check(rows, image)
    positions, sizes = tuple(rows.shape[2:]), tuple(image.shape[2:])
    window = Window(tuple(kernel), tuple(stride), ((0, 0),) * len(kernel), tuple(dilation), 1)
    if window.extent(positions) != sizes or rows.shape[0] != image.shape[0]:
        raise RuntimeError(f"{name}_patches: {tuple(rows.shape)} are not the positions of {tuple(image.shape)}")
    return tables(image.shape[1], sizes, window.kernel, window.stride, window.dilation, positions)


def native_there(device: torch.device) -> bool:
    """Whether norms are by tiles.cpp there: it finds patches of an image, and forms once what several norms share."""
    return _native(device) and available(device)


def _check(*factors: torch.Tensor) -> None:
    device = factors[0].device
    assert len({factor.dtype for factor in factors}) == 1
    if not available(device):
        needed = "g++" if device.type == "cpu" else "triton and a CUDA device of compute capability 8.0"
        raise DPCompileError(
            f"kernels: the plan takes norms from kernels that need {needed} on {device}. "
            "Install it, or compile the model again on this machine."
        )


def _launch(name: str, rows: torch.Tensor, cols: torch.Tensor, *arguments: Any, grid: int, wide: bool) -> None:
    """So many programs of a kernel, one for each tile of each sample."""
    depth = DEPTH // 2 if wide or rows.dtype is torch.float64 else DEPTH
    assert SPAN % depth == 0  # else a step would reach into the next span
    from dpcompile import tiles  # imports triton

    total, factor = sum_type(rows.dtype, wide=wide), rows.dtype
    if factor is torch.bfloat16 and rows.device.type == "cpu":
        factor = torch.float32  # the interpreter would multiply bit patterns; products are exact in float32 as well
    types = (tiles.TYPES[total if wide else factor], tiles.TYPES[total])
    with torch.cuda.device_of(rows):
        kernel = getattr(tiles, name)[(grid,)]
        kernel(rows, cols, *arguments, *types, _side(total), depth, SPAN, enable_fp_fusion=True)


def _four(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.new_empty((4, rows.shape[0]), dtype=torch.float64)


def _two(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.new_empty((2, rows.shape[0]), dtype=torch.float64)


def _four_each(factors: Sequence[torch.Tensor], pairs: Sequence[int], _: bool) -> torch.Tensor:
    return factors[0].new_empty((len(pairs) // 2, 4, factors[0].shape[0]), dtype=torch.float64)


_PATCHES = "(Tensor rows, Tensor image, SymInt[] kernel, SymInt[] stride, SymInt[] dilation, bool wide) -> Tensor"

PAIRED = opaque("paired(Tensor rows_NTp, Tensor cols_NTd, bool wide) -> Tensor", _paired, _four)
SHARED = opaque("shared(Tensor[] factors_NTk, int[] pairs, bool wide) -> Tensor", _shared, _four_each)
SQUARED = opaque("squared(Tensor rows_NTp, Tensor cols_NTd, bool wide) -> Tensor", _squared, _two)
PAIRED_PATCHES = opaque("paired_patches" + _PATCHES, _paired_patches, _four)
SQUARED_PATCHES = opaque("squared_patches" + _PATCHES, _squared_patches, _two)
OPS = (PAIRED, SHARED, SQUARED, PAIRED_PATCHES, SQUARED_PATCHES)


@register_flop_formula(torch.ops.dpcompile.paired)
def _(rows_shape: Sequence[int], cols_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Of pairs t <= s alone, although tiles on the diagonal are formed whole."""
    return _gram(rows_shape) + _gram(cols_shape)


@register_flop_formula(torch.ops.dpcompile.shared)
def _(shapes: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return sum(map(_gram, shapes))


def _gram(shape: Sequence[int]) -> int:
    samples, length, width = shape
    return samples * length * (length + 1) * width


@register_flop_formula(torch.ops.dpcompile.squared)
def _(rows_shape: Sequence[int], cols_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows_shape) * cols_shape[2]


@register_flop_formula(torch.ops.dpcompile.paired_patches)
def _(rows_shape: Sequence[int], image_shape: Sequence[int], kernel: Sequence[int], *_: Any, **__: Any) -> int:
    samples, p, *positions = rows_shape
    length = math.prod(positions)
    return _gram((samples, length, p + image_shape[1] * math.prod(kernel)))


@register_flop_formula(torch.ops.dpcompile.squared_patches)
def _(rows_shape: Sequence[int], image_shape: Sequence[int], kernel: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows_shape) * image_shape[1] * math.prod(kernel)
