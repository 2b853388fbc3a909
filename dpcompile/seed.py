"""Where the backward of the fused form begins: an op that a compiler cannot look into.

Without it a compiler writes forward and backward of the loss as one loop over the logits, which can then not write the
gradient into their place: of a language model these are two of the largest tensors of the step.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("dpcompile::seed", mutates_args=())
def seed(loss: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss in itself: ones."""
    return torch.ones_like(loss)


@seed.register_fake
def _(loss: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(loss)


OP = torch.ops.dpcompile.seed.default
