"""What a second run of an op reads: the same tensor, in an op that no compiler merges with its first run."""

from __future__ import annotations

import torch


@torch.library.custom_op("dpcompile::twice", mutates_args=())
def _twice(tensor: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


@_twice.register_fake
def _(tensor: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def twice(tensor: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """The tensor itself, not before `behind` is there; under torch.compile a copy of it."""
    return _twice(tensor, behind) if torch.compiler.is_compiling() else tensor
