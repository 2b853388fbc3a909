"""Steps of a real model that are run to be counted and timed: forward, and backward from a loss that stands for any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree


def sized(sample: Any, sample_size: int, size: int) -> Any:
    """The sample with its rows repeated up to a batch of `size`."""

    def grown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != sample_size:
            return value
        return value.repeat(-(-size // sample_size), *(1 for _ in value.shape[1:]))[:size]

    return pytree.tree_map(grown, sample)


def step_of(model: nn.Module, batch: Any) -> Callable[[], None]:
    """One step of a model: what its outputs are used for is not known, so that each of them goes into cross-entropy."""

    def step() -> None:
        if isinstance(batch, Mapping):
            result = model(**batch)
        else:
            result = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        losses = [_loss(v) for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor) and v.requires_grad]
        del result
        torch.autograd.backward(losses)
        del losses
        model.zero_grad(set_to_none=True)

    return step


def _loss(output: torch.Tensor) -> torch.Tensor:
    """As large as what a plan counts for a loss that it does not see (passes/follow_memory.py)."""
    real = torch.view_as_real(output) if output.is_complex() else output
    logits = real.reshape(-1, real.shape[-1] if real.dim() else 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def median_seconds(step: Callable[[], None], rounds: int = 5) -> float:
    step()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
