"""Where the marked places of each sample are: an op of our own, opaque to compilers, that refuses ragged masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

UNEVEN = (
    "x[mask] was reshaped to one row of marked places for each sample, but samples differ in how many they have: give "
    "every sample of the batch the same number."
)


@torch.library.custom_op("dpcompile::marked_places", mutates_args=())
def marked_places(mask: torch.Tensor, order: Sequence[int], count: int) -> torch.Tensor:
    """[B, len(order)]: the place of the n-th True in each row of mask[B, T], for every n of `order`.

    A negative n counts from the last one. All rows must have `count` of them, or, with a count of -1, as many as each
    other and enough for `order`. A single row of another number gives -1: it may be the stand-in for an empty batch.
    """
    counts_B = mask.sum(1)
    needed = max(n + 1 if n >= 0 else -n for n in order)
    fits_B = counts_B >= needed if count < 0 else counts_B == count
    if mask.shape[0] > 1:
        torch.ops.aten._assert_async.msg((fits_B & (counts_B == counts_B[0])).all(), UNEVEN)
    found = [_nth(mask, counts_B + n if n < 0 else torch.full_like(counts_B, n)) for n in order]
    return torch.where(fits_B.unsqueeze(1), torch.stack(found, 1), -1)


def _nth(mask: torch.Tensor, n_B: torch.Tensor) -> torch.Tensor:
    hit_BT = mask & (mask.cumsum(1) == n_B.unsqueeze(1) + 1)
    return hit_BT.int().argmax(1)


@marked_places.register_fake
def _(mask: torch.Tensor, order: Sequence[int], count: int) -> torch.Tensor:
    return mask.new_empty((mask.shape[0], len(order)), dtype=torch.int64)


OP = torch.ops.dpcompile.marked_places.default
