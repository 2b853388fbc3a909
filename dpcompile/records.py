"""How norms leave a compiled graph: ops that torch treats as opaque write them to a table on the Python side.

A module attribute cannot be set inside a compiled backward. Each DPModule owns one handle of the table. No compiler may
drop the ops: the clip factors depend on what `record_norms` returns, and `hand_over_norms` changes an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

_handles = itertools.count()
_norms: dict[int, torch.Tensor] = {}
_observers: dict[int, Callable[[torch.Tensor], None]] = {}


def new_handle() -> int:
    return next(_handles)


def recorded(handle: int) -> torch.Tensor | None:
    """[G, B] norms of the last backward under this handle; None before the first."""
    return _norms.get(handle)


def observe(handle: int, observer: Callable[[torch.Tensor], None]) -> None:
    """Call `observer` with the [G, B] norms of every backward under this handle, as it happens."""
    _observers[handle] = observer


def write(handle: int, norms: torch.Tensor) -> None:
    """Keep the norms of one backward. ~handle stands for an empty batch, which ran as one padded sample."""
    kept = norms.detach().clone()  # a compiler reuses the memory of what it handed over
    if handle < 0:
        handle, kept = ~handle, kept[:, :0]
    _norms[handle] = kept
    if handle in _observers:
        _observers[handle](kept)


def forget(handle: int) -> None:
    _norms.pop(handle, None)
    _observers.pop(handle, None)


@torch.library.custom_op("dpcompile::record_norms", mutates_args=())
def record_norms(norms: torch.Tensor, handle: int) -> torch.Tensor:
    write(handle, norms)
    return norms.clone()


@record_norms.register_fake
def _(norms: torch.Tensor, handle: int) -> torch.Tensor:
    return torch.empty_like(norms)


@torch.library.custom_op("dpcompile::hand_over_norms", mutates_args=("times",))
def hand_over_norms(norms: torch.Tensor, times: torch.Tensor, handle: int) -> None:
    """For the fused form, whose norms are a result of the graph: nothing else reads them there."""
    write(handle, norms)
    times.add_(1)


OP = torch.ops.dpcompile.record_norms.default
HAND_OVER = torch.ops.dpcompile.hand_over_norms.default
