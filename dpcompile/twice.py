"""What a second run of an op reads: the same tensor, in an op that no compiler merges with its first run."""

from __future__ import annotations

import torch

from dpcompile.opaque import opaque


@torch.library.custom_op("dpcompile::twice", mutates_args=())
def _twice(tensor: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


@_twice.register_fake
def _(tensor: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def twice(tensor: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """The tensor itself, not before `behind` is there; under torch.compile a copy of it."""
    return _twice(tensor, behind) if torch.compiler.is_compiling() else tensor


ZERO_BEHIND = opaque(
    "zero_behind(Tensor before) -> Tensor",
    lambda before: before.new_zeros((), dtype=torch.float32),
    lambda before: before.new_empty((), dtype=torch.float32),
)
"""0, which is there when a tensor is: what it is added to is not made earlier."""
