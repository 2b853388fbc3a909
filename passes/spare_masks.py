"""spare-masks: samples that are not finite are looked for once; where there are none, nothing is copied."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from dpcompile import finite
from dpcompile.ir import Draft
from dpcompile.passes.rewrite import Order


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
    draft.program.module.recompile()
    return replace(draft, program=draft.program)
