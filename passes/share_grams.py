"""share-grams: norms by kernels that read a factor in common are one call, which forms its Gram matrix once.

Query, key and value read one activation, and both weights of a recurrent layer one gradient.
"""

from __future__ import annotations

import networkx as nx
import torch
from torch import fx

from dpcompile import kernels
from dpcompile.chain_ops import NUMBERS
from dpcompile.inline import PHASE
from dpcompile.ir import Draft, Program
from dpcompile.passes.rewrite import Order

aten = torch.ops.aten


def share_grams(draft: Draft, order: Order) -> Draft:
    """The program with `kernels.SHARED` in the place of such norms, where all of them are there before any factor."""
    if order.plan.shares_factors and len(set(draft.factors.values())) == 1:
        shared(draft.program)
    return draft


def shared(program: Program) -> None:
    """Norms move behind the last gradient that one of them reads; what is computed from them follows."""
    graph = program.graph
    together: nx.Graph = nx.Graph()
    for node in graph.find_nodes(op="call_function", target=kernels.PAIRED):
        rows, cols, wide = node.args
        if kernels.native_there(node.meta["val"].device):
            together.add_edges_from((node, (factor, wide)) for factor in (rows, cols))
    position = {node: i for i, node in enumerate(graph.nodes)}
    for component in list(nx.connected_components(together)):
        norms = sorted((node for node in component if isinstance(node, fx.Node)), key=position.__getitem__)
        if len(norms) > 1:
            _join(graph, norms, position)


def _join(graph: fx.Graph, norms: list[fx.Node], position: dict[fx.Node, int]) -> None:
    last = norms[-1]
    factors = list(dict.fromkeys(factor for node in norms for factor in node.args[:2]))
    pairs = [factors.index(factor) for node in norms for factor in node.args[:2]]
    moved = _behind(norms, position[last], position)
    with graph.inserting_after(last):
        made = graph.call_function(kernels.SHARED, (factors, pairs, last.args[2]))
    made.meta = {**last.meta, "val": torch.stack([node.meta["val"] for node in norms])}
    made.meta.pop(NUMBERS, None)  # those of one norm, where the program was marked before
    at = made
    for i, node in enumerate(norms):
        with graph.inserting_after(at):
            at = graph.call_function(aten.select.int, (made, 0, i))
        at.meta = node.meta
        node.replace_all_uses_with(at)
        graph.erase_node(node)
    for node in moved:
        at.append(node)
        at = node


def _behind(norms: list[fx.Node], end: int, position: dict[fx.Node, int]) -> list[fx.Node]:
    """What stands before a position and depends on them, in order."""
    found: set[fx.Node] = set()
    stack = list(norms)
    while stack:
        for user in stack.pop().users:
            if user not in found and position.get(user, end) < end:
                found.add(user)
                stack.append(user)
    assert all(node.meta[PHASE] == "norm" for node in found)
    return sorted(found, key=position.__getitem__)


def parted(program: Program) -> bool:
    """Undo it before ops are taken out: one call for each norm. False if there was nothing to undo."""
    graph = program.graph
    found = list(graph.find_nodes(op="call_function", target=kernels.SHARED))
    for node in found:
        factors, pairs, wide = node.args
        for one in list(node.users):
            _, _, i = one.args
            one.target = kernels.PAIRED
            one.args = (factors[pairs[2 * i]], factors[pairs[2 * i + 1]], wide)
        graph.erase_node(node)
    return bool(found)
