"""How norms leave a compiled backward: an op that torch treats as opaque writes them to a table on the Python side.

A module attribute cannot be set inside a compiled backward. Each DPModule owns one handle of the table; the op returns
a copy that the clip factors depend on, so no compiler may drop it.
"""

from __future__ import annotations

import itertools

import torch

_handles = itertools.count()
_norms: dict[int, torch.Tensor] = {}


def new_handle() -> int:
    return next(_handles)


def recorded(handle: int) -> torch.Tensor | None:
    """[G, B] norms of the last backward under this handle; None before the first."""
    return _norms.get(handle)


def write(handle: int, norms: torch.Tensor) -> None:
    """Keep the norms of one backward. ~handle stands for an empty batch, which ran as one padded sample."""
    kept = norms.detach().clone()  # a compiler reuses the memory of what it handed over
    if handle < 0:
        _norms[~handle] = kept[:, :0]
    else:
        _norms[handle] = kept


def forget(handle: int) -> None:
    _norms.pop(handle, None)


@torch.library.custom_op("dpcompile::record_norms", mutates_args=())
def record_norms(norms: torch.Tensor, handle: int) -> torch.Tensor:
    write(handle, norms)
    return norms.clone()


@record_norms.register_fake
def _(norms: torch.Tensor, handle: int) -> torch.Tensor:
    return torch.empty_like(norms)


OP = torch.ops.dpcompile.record_norms.default
