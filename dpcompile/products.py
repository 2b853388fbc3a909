"""Sums of products over positions, which norm layers and other scales need for every sample of a batch.

torch writes down each of the products before it adds them up. On a CPU, where there is g++, an eager call goes through
the factors once (sums.cpp); a compiler sees the ops, which it fuses itself. passes/fuse_products.py puts `summed` in
the place of such ops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from dpcompile import native

FEW = 4096
"""Products below which torch's own ops are done before a call of ours has begun."""


def summed(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    grad: torch.Tensor,
    dims: Sequence[int],
    keepdim: bool,
) -> torch.Tensor:
    """((x - shift) * scale * grad).sum(dims, keepdim), of x and grad of one shape.

    Shift and scale, where there are any, have one number for each place of the first `lead(x.dim(), dims)` dimensions.
    """
    if is_native([t for t in (x, shift, scale, grad) if t is not None]) and x.numel() >= FEW:
        sizes = [1 if dim in dims else size for dim, size in enumerate(x.shape) if keepdim or dim not in dims]
        return native.products(x, shift, scale, grad, _parts(x.shape, dims)).reshape(sizes)
    product = x if shift is None else x - shift
    product = product if scale is None else product * scale
    return (product * grad).sum(list(dims), keepdim)


def is_native(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether sums.cpp may go through them. Asked first: a compiler that looks at sizes would guard the batch."""
    if torch.compiler.is_compiling() or native.library() is None:
        return False
    return all(type(x) in native.PLAIN and x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def _cuts(rank: int, dims: Sequence[int]) -> tuple[int, int, int] | None:
    """Where dimensions to be summed begin, end, and begin again; None if they lie in more than two places.

    Those that lie in one place, at the end, are the latter: what is next to one another in memory is added up.
    """
    kept = [dim not in dims for dim in range(rank)]
    first = kept.index(False)
    if not any(kept[first:]):
        return first, first, first
    end = kept.index(True, first)
    last = kept.index(False, end) if False in kept[end:] else rank
    return None if any(kept[last:]) else (first, end, last)


def lead(rank: int, dims: Sequence[int]) -> int | None:
    """How many dimensions of x a shift and a scale may have; None where `summed` does not add up these dimensions."""
    cuts = _cuts(rank, dims)
    return None if cuts is None else cuts[1]


def _parts(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """Numbers kept in front, summed, kept, and summed at the end."""
    cuts = _cuts(len(shape), dims)
    assert cuts is not None
    edges = (0, *cuts, len(shape))
    return tuple(math.prod(shape[start:stop]) for start, stop in itertools.pairwise(edges))
