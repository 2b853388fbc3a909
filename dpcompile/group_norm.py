"""Backward of group norm together with the sums that its parameters need of every channel of a sample.

torch's own op adds them up too, and keeps them to itself. On a CPU, where there is g++, an eager call does all in one
pass (sums.cpp); a compiler sees the ops. passes/fuse_group_norms.py puts `backward` in the place of these ops.
"""

from __future__ import annotations

import torch

from dpcompile import native
from dpcompile.products import FEW, is_native

OP = torch.ops.aten.native_group_norm_backward.default


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    samples: int,
    channels: int,
    size: int,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The input's gradient, as `aten.native_group_norm_backward`; [N, C] sums of x grad and of grad."""
    tensors = [grad, x, mean, rstd] if weight is None else [grad, x, mean, rstd, weight]
    if is_native(tensors) and x.numel() >= FEW:
        return native.group_norm_backward(grad, x, mean, rstd, weight, (samples, channels, size, groups))
    of_input, _, _ = OP(grad, x, mean, rstd, weight, samples, channels, size, groups, [True, False, False])
    places = list(range(2, x.dim()))
    return of_input, (x * grad).sum(places), grad.sum(places)
