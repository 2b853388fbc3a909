"""Steps of a real model that are run to be counted and timed: forward, and backward from ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
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
    """One step of a model: what its outputs are used for is not known, so that their gradients are ones."""

    def step() -> None:
        if isinstance(batch, Mapping):
            result = model(**batch)
        else:
            result = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        outputs = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor) and v.requires_grad]
        del result
        torch.autograd.backward(outputs, [torch.ones_like(v) for v in outputs])
        del outputs
        model.zero_grad(set_to_none=True)

    return step


def median_seconds(step: Callable[[], None], rounds: int = 5) -> float:
    step()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
