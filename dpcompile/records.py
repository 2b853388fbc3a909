"""How norms leave a compiled graph: ops that torch treats as opaque write them to a table on the Python side.

A module attribute cannot be set inside a compiled backward. Each DPModule owns one handle of the table. No compiler may
drop the ops: the clip factors depend on what `record_norms` returns, and `hand_over_norms` changes an argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch

from dpcompile.errors import DPCompileError, NonFiniteGradientError

_handles = itertools.count()
_norms: dict[int, torch.Tensor] = {}
_observers: dict[int, Callable[[torch.Tensor], None]] = {}
_nonfinite: dict[int, torch.Tensor] = {}  # [] samples so far
_handed: dict[int, set[tuple[int, int]]] = {}
_strict: set[int] = set()  # handles under which such a sample is an error


def new_handle() -> int:
    return next(_handles)


def recorded(handle: int) -> torch.Tensor | None:
    """[G, B] norms of the last backward under this handle; None before the first."""
    return _norms.get(handle)


def observe(handle: int, observer: Callable[[torch.Tensor], None]) -> None:
    """Call `observer` with the [G, B] norms of every backward under this handle, as it happens."""
    _observers[handle] = observer


def nonfinite_samples(handle: int) -> int:
    """How many samples under this handle had a gradient that was not finite, so far."""
    return int(_nonfinite.get(handle, 0))


def refuse_nonfinite(handle: int) -> None:
    _strict.add(handle)


def write(handle: int, norms: torch.Tensor) -> None:
    """Keep the norms of one backward, a tensor that nobody else writes to.

    ~handle stands for an empty batch, which ran as one padded sample.
    """
    if norms.dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        raise DPCompileError(
            "backward: norms are certified for products of full float32 precision. Set "
            'torch.set_float32_matmul_precision("highest"), or train in bfloat16 with torch.autocast.'
        )
    kept = norms.detach()
    if handle < 0:
        handle, kept = ~handle, kept[:, :0]
    _norms[handle] = kept
    if kept.device.type != "cpu" or not math.isfinite(kept.sum()):  # a GPU is not waited for
        _count_nonfinite(handle, kept)
    if handle in _observers:
        _observers[handle](kept)


def _count_nonfinite(handle: int, norms: torch.Tensor) -> None:
    strange = (~norms.isfinite()).any(0).sum()
    _nonfinite[handle] = _nonfinite[handle] + strange if handle in _nonfinite else strange
    if handle in _strict and int(strange):
        raise NonFiniteGradientError(
            f"{int(strange)} of {norms.shape[1]} samples have a gradient that is NaN or infinite (nonfinite='raise'). "
            "Look at these samples and at the loss, or compile with nonfinite='zero' to leave them out."
        )


def hand(handle: int, gradients: Iterable[torch.Tensor | None]) -> None:
    """Remember which gradients an eager backward gave to autograd, for `is_handed`."""
    _handed[max(handle, ~handle)] = {(g.data_ptr(), g._version) for g in gradients if g is not None}


def hand_nothing(handle: int) -> None:
    """A new batch: its backward has yet to tell."""
    _handed.pop(handle, None)


def is_handed(handle: int, gradient: torch.Tensor) -> bool | None:
    """Whether this is such a gradient, unchanged: autograd adds what reaches a parameter on other ways to it.

    None if no eager backward told: a compiled one cannot.
    """
    known = _handed.get(handle)
    return None if known is None else (gradient.data_ptr(), gradient._version) in known


def clear(handle: int) -> None:
    """As before the first backward."""
    _norms.pop(handle, None)
    _nonfinite.pop(handle, None)
    _handed.pop(handle, None)


def forget(handle: int) -> None:
    clear(handle)
    _observers.pop(handle, None)
    _strict.discard(handle)


@torch.library.custom_op("dpcompile::record_norms", mutates_args=())
def record_norms(norms: torch.Tensor, handle: int) -> torch.Tensor:
    write(handle, norms.clone())  # a compiler reuses the memory of what it handed over
    return norms.clone()


@record_norms.register_fake
def _(norms: torch.Tensor, handle: int) -> torch.Tensor:
    return torch.empty_like(norms)


@torch.library.custom_op("dpcompile::hand_over_norms", mutates_args=("times",))
def hand_over_norms(norms: torch.Tensor, times: torch.Tensor, handle: int) -> None:
    """For the fused form, whose norms are a result of the graph: nothing else reads them there."""
    write(handle, norms.clone())
    times.add_(1)


def noted(norms: torch.Tensor, handle: int) -> torch.Tensor:
    """In the place of the op in eager calls."""
    write(handle, norms)
    return norms


OP = torch.ops.dpcompile.record_norms.default
HAND_OVER = torch.ops.dpcompile.hand_over_norms.default
