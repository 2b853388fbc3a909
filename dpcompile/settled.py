"""Numbers of a few samples that many ops read: worked out once.

A compiler writes out what small values are computed from wherever they are read, for every element that is scaled by
them. The op below is one that it does not look into; in an eager call it is nothing.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("dpcompile::settled", mutates_args=())
def settled(values: torch.Tensor) -> torch.Tensor:
    """A copy."""
    return values.clone()


@settled.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)


OP = torch.ops.dpcompile.settled.default


def itself(values: torch.Tensor) -> torch.Tensor:
    """In the place of the op in eager calls."""
    return values
