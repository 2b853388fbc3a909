"""spare-masks: samples that are not finite are looked for once; where there are none, nothing is copied.

Nor is anything of size under a compiler: kept gradients are masked as they are summed, and products of positions leave
out such samples by an op of their own.
"""

from __future__ import annotations

import math
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
LARGE = 2**16
"""Numbers of a factor from which on a copy of it takes longer than to call the op that needs none."""


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
        if not _mask_as_read(node):
            _leave_out(node)
    return replace(draft, program=draft.program)


def _mask_as_read(product: fx.Node) -> bool:
    """weight @ rows of kept gradients, by `finite.weighted_rows`. Returns whether it is that."""
    weight, flat = product.args
    assert isinstance(weight, fx.Node)
    assert isinstance(flat, fx.Node)
    shaped = flat.target is aten.reshape.default and len(flat.users) == 1
    rows: Any = flat.args[0] if shaped else flat
    if rows.target is not finite.finite_rows or len(rows.users) > 1:
        return False
    kept, mask = rows.args
    samples, count = flat.meta["val"].shape
    if not is_one(weight.meta["val"].shape[0]) or hint(count) <= LONG:
        return False
    if size_of(samples) != size_of(mask.meta["val"].shape[0]):  # positions are rows too, of a weight with one output
        return False
    rows.replace_all_uses_with(kept)
    product.graph.erase_node(rows)
    product.target, product.args = finite.weighted_rows, (weight, kept if rows is flat else flat, mask)
    return True


def _leave_out(product: fx.Node) -> None:
    """rows^T @ cols over all positions, of which one is cleared and not scaled, by `finite.product`."""
    left, right = product.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if product.meta["val"].device.type != "cpu" or is_one(left.meta["val"].shape[0]):
        return  # elsewhere the op would wait for the device; one row masks what it reads in the loop that scales it
    for factor in (right, left.args[0] if left.target is aten.permute.default and len(left.users) == 1 else None):
        marked = _marked(factor) if isinstance(factor, fx.Node) else None
        if marked is not None:
            mask = marked.args[1]
            marked.replace_all_uses_with(marked.args[0])  # type: ignore[arg-type]
            product.graph.erase_node(marked)
            product.target, product.args = finite.product, (*product.args, mask)
            return


def _marked(factor: fx.Node) -> fx.Node | None:
    """What clears a large factor [B T, d], itself [B, ..., d], if nothing else reads it."""
    source: Any = factor.args[0] if factor.target is aten.reshape.default and len(factor.users) == 1 else factor
    if source.target is not finite.finite_rows or len(source.users) > 1:
        return None
    width, own = (node.meta["val"].shape[-1] for node in (factor, source))
    sizes = [hint(size) for size in source.meta["val"].shape]
    large = None not in sizes and math.prod(sizes) >= LARGE  # None: only the data tell
    return source if large and size_of(width) == size_of(own) else None
