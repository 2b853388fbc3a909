"""mark-overwrites: ops on number by number that may write over an operand which nothing reads behind them.

In eager calls (dpcompile/direct.py) they do: a gradient that is on its way takes no new memory at each op, which would
have to come from outside the caches. Compilers arrange memory themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from dpcompile.chain_ops import NUMBERS
from dpcompile.ir import Program
from dpcompile.memory import Root, Storages, is_view
from dpcompile.overwriting import OVER, writing_over
from dpcompile.passes.scale_in_place import fits


def mark_overwrites(program: Program) -> Program:
    """The program, whose nodes have the mark: the position of the operand."""
    for node, position in overwriting(list(program.graph.nodes), Storages(program, eager=True)):
        node.meta[OVER] = position
    return program


def overwriting(order: Sequence[fx.Node], storages: Storages) -> Iterator[tuple[fx.Node, int]]:
    """Such ops among some in this order, each with the position of the operand."""
    made = {node.name for node in order if node.op == "call_function"}
    last: dict[Root, fx.Node] = {}
    moving: set[Root] = set()  # that chains read, which may move
    for node in order:
        for source in node.all_input_nodes:
            last.update((root, node) for root in storages.possible(source))
            if NUMBERS in node.meta:
                moving |= storages.possible(source)
    for node in order:
        if node.op != "call_function" or NUMBERS in node.meta or is_view(node):
            continue
        for i, operand in enumerate(node.args):
            if not isinstance(operand, fx.Node) or writing_over(node.target, i) is None:
                continue
            roots = storages.possible(operand)
            others = [storages.possible(other) for other in node.all_input_nodes if other is not operand]
            free = made.issuperset(root[0] for root in roots) and roots.isdisjoint(moving.union(*others))
            if free and all(last[root] is node for root in roots) and fits(node, operand, {root[0] for root in roots}):
                yield node, i
                break
