"""Summing a gradient down to a broadcast parameter, sample by sample."""

from __future__ import annotations

import torch

from dpcompile.ir import Axis
from dpcompile.shapes import batch_first, is_one


def reduce_to(grad: torch.Tensor, axis: Axis, shape: tuple[int, ...]) -> torch.Tensor:
    """[B, *shape]: `grad` summed over every dimension along which a value of `shape` was broadcast.

    `shape` is aligned with the last dimensions of `grad`, as torch broadcasts; the batch is never summed.
    """
    rank = grad.dim()
    aligned = (1,) * (rank - len(shape)) + tuple(shape)
    moved = batch_first(grad, axis)
    kept = [i for i in range(rank) if i != axis.dim and not is_one(aligned[i])]
    # dimensions of `moved`, in order: B, then those of grad without the batch; a folded one leaves (outer, inner)
    names: list[int | None] = []
    for i in range(rank):
        names += [None, None] if i == axis.dim and axis.folded else [] if i == axis.dim else [i]
    summed = [1 + at for at, name in enumerate(names) if name not in kept]
    total = moved.sum(summed) if summed else moved
    return total.reshape([total.shape[0], *shape])


def broadcasts(rank: int, axis: Axis, shape: tuple[int, ...]) -> bool:
    """Whether a value of `shape`, broadcast against a result of this rank, leaves the batch dimension alone."""
    at = axis.dim - (rank - len(shape))
    return len(shape) <= rank and (at < 0 or is_one(shape[at]))
