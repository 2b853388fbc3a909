"""Tensors joined into one, in an op that no compiler looks into.

Inductor lets the inputs of `aten.cat` live in the memory of its result. It may then give the place of such an input to
another tensor, and the memory of the result to a third, which overwrites it (torch 2.13): a gradient that went into a
norm together with others, and is read once more for the clipped sum, came out wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.library.custom_op("dpcompile::joined", mutates_args=())
def _joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat(list(tensors), dim)


@_joined.register_fake
def _(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat(list(tensors), dim)


OP = torch.ops.dpcompile.joined.default


def joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """As torch.cat, of tensors that are read elsewhere too."""
    return OP(list(tensors), dim)
