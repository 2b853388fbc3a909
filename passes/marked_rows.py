"""Rows that a mask selects, the same number in each sample: x[mask].view(B, k, d) as a look-up within each sample.

Such code picks the state at a mark (the end of a text, a masked token) that every sample has equally often. As written
the rows of all samples stand in one list whose length is data; only the view tells whose they are. Written as a gather
along each sample's own positions it is per-sample whatever the mask holds, and where samples differ in their number,
of which the view would make a mixture, the run stops with an error (`rules/places.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dpcompile.inline import carry_origin, inline
from dpcompile.rules.places import OP
from dpcompile.rules.sites.base import is_tensor

aten = torch.ops.aten

_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def gather_marked_rows(graph: fx.Graph) -> None:
    """Rewrite every x[mask] whose rows are given back to their samples; anything else stays and is refused later."""
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        x, mask = node.args[0], _mask(node)
        if mask is None or not x.meta["val"].is_floating_point():
            continue
        for view in list(node.users):
            if view.target in _RESHAPES:
                _rewrite(graph, x, mask, view)


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask of x[mask], if it is one over at least a batch and one other dimension."""
    indices: Any = node.args[1]
    if len(indices) != 1 or not is_tensor(indices[0]):
        return None
    mask = indices[0].meta["val"]
    batched = mask.dtype is torch.bool and mask.dim() > 1 and isinstance(mask.shape[0], torch.SymInt)
    return indices[0] if batched and all(isinstance(size, int) for size in mask.shape[1:]) else None


def _rewrite(graph: fx.Graph, x: fx.Node, mask: fx.Node, view: fx.Node) -> None:
    batch, *sizes = view.meta["val"].shape
    rest = list(x.meta["val"].shape[mask.meta["val"].dim() :])
    if str(batch) != str(mask.meta["val"].shape[0]) or any(not isinstance(size, int) for size in rest):
        return
    if sizes == rest:  # [B, *rest]: one row of each sample
        _replace(graph, x, mask, view, [0], 1, [])
    elif sizes[1:] == rest and isinstance(sizes[0], int) and sizes[0] > 0:  # [B, k, *rest]
        _replace(graph, x, mask, view, list(range(sizes[0])), sizes[0], [sizes[0]])
    elif sizes[1:] == rest:  # [B, as many as there are, *rest], of which single ones are read
        for select, n in _selects(view):
            _replace(graph, x, mask, select, [n], -1, [])


def _selects(view: fx.Node) -> list[tuple[fx.Node, int]]:
    """Every view[:, n] with a number n, also behind slices that leave all as it is."""
    found: list[tuple[fx.Node, int]] = []
    for user in view.users:
        if user.target is aten.select.int and user.args[1] == 1 and isinstance(user.args[2], int):
            found.append((user, user.args[2]))
        elif user.target is aten.slice.Tensor and str(user.meta["val"].shape) == str(view.meta["val"].shape):
            found += _selects(user)
    return found


def _replace(
    graph: fx.Graph, x: fx.Node, mask: fx.Node, old: fx.Node, order: list[int], count: int, sizes: list[int]
) -> None:
    def pick(x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        rest = x.shape[mask.dim() :]
        rows_BTd = x.flatten(1, mask.dim() - 1).flatten(2) if rest else x.flatten(1).unsqueeze(2)
        places_Bk = OP(mask.flatten(1), order, count).unsqueeze(2)
        index_Bkd = places_Bk.clamp(min=0).expand(-1, -1, rows_BTd.shape[2])
        picked = torch.where(places_Bk < 0, float("nan"), rows_BTd.gather(1, index_Bkd))
        return [picked.reshape([x.shape[0], *sizes, *rest])]

    before = set(graph.nodes)
    (new,) = inline(graph, pick, [x, mask])
    carry_origin(old, [node for node in graph.nodes if node not in before])
    old.replace_all_uses_with(new)
