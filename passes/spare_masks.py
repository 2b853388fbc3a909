"""spare-masks: samples that are not finite are looked for once; where there are none, nothing is copied.

Nor is anything under a compiler, where kept gradients are summed: they are masked as they are read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile import finite
from dpcompile.ir import Draft
from dpcompile.passes.rewrite import Order
from dpcompile.shapes import hint, is_one, size_of

aten = torch.ops.aten

LONG = 2048
"""Numbers of a sample from which on a copy of them is worth a loop of its own."""


def spare_masks(draft: Draft, _order: Order) -> Draft:
    """The program with `finite.finite_rows` in place of the op that marked where rows have to be cleared.

    Behind tidy, which merges equal marks.
    """
    graph = draft.program.graph
    masks: dict[fx.Node, fx.Node] = {}
    for node in list(graph.find_nodes(op="call_function", target=finite.OP)):
        tensor, finite_B = node.args
        if finite_B not in masks:
            with graph.inserting_after(finite_B):
                masks[finite_B] = graph.call_function(finite.unless_all, (finite_B,))
            masks[finite_B].meta["val"] = finite_B.meta["val"]
        node.target = finite.finite_rows
        node.args = (tensor, masks[finite_B])
    for node in list(graph.find_nodes(op="call_function", target=aten.mm.default)):
        _mask_as_read(node)
    draft.program.module.recompile()
    return replace(draft, program=draft.program)


def _mask_as_read(product: fx.Node) -> None:
    """weight @ rows of kept gradients, by `finite.weighted_rows`."""
    weight, flat = product.args
    assert isinstance(weight, fx.Node)
    assert isinstance(flat, fx.Node)
    shaped = flat.target is aten.reshape.default and len(flat.users) == 1
    rows: Any = flat.args[0] if shaped else flat
    if rows.target is not finite.finite_rows or len(rows.users) > 1:
        return
    kept, mask = rows.args
    samples, count = flat.meta["val"].shape
    if not is_one(weight.meta["val"].shape[0]) or hint(count) <= LONG:
        return
    if size_of(samples) != size_of(mask.meta["val"].shape[0]):  # positions are rows too, of a weight with one output
        return
    rows.replace_all_uses_with(kept)
    product.graph.erase_node(rows)
    product.target, product.args = finite.weighted_rows, (weight, kept if rows is flat else flat, mask)
