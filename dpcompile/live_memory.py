"""Peak of the memory that tensors hold, counted and not sampled: the same on every machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that ops made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}
        self._given: dict[int, torch.UntypedStorage] = {}  # what ops read and none of them has made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._alive:
                self._given[value.untyped_storage()._cdata] = value.untyped_storage()
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._alive and key not in self._given:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
                    self.peak = max(self.peak, sum(self._alive.values()))
        return result


def peak_of(step: Callable[[], Any], device: torch.device | None = None) -> int:
    """Bytes held at most at one time by what `step` makes; on a GPU, its allocator's own count."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        level = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - level
    with LiveBytes() as live:
        step()
    return live.peak
