"""scale-in-place: what is scaled by the clip factors is written over where nothing else reads it any more.

Output gradients, above all: no copy of them is made, and none takes memory beside them. Behind all passes that move
ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile.inline import PHASE
from dpcompile.ir import Draft, Program
from dpcompile.memory import Storages
from dpcompile.overwriting import unmark
from dpcompile.passes.rewrite import Order
from dpcompile.shapes import hint

aten = torch.ops.aten


def scale_in_place(draft: Draft, _order: Order) -> Draft:
    """The program with products in place among its clipped sums."""
    program = draft.program
    storages = Storages(program)
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    made = {node.name for node in program.graph.nodes if node.op == "call_function"}
    last: dict[Any, int] = {}
    for node, i in position.items():
        for source in node.all_input_nodes:
            for root in storages.possible(source):
                last[root] = i
    for node in program.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        roots = storages.possible(node.all_input_nodes[0])
        if node.meta.get(PHASE) != "sum" or not made.issuperset(root[0] for root in roots):
            continue
        first = node.all_input_nodes[0]
        dead = node.args[0] is first and all(last[root] == position[node] for root in roots)
        if dead and fits(node, first, {root[0] for root in roots}):
            node.target = aten.mul_.Tensor
    return replace(draft, program=program)


def copied(program: Program) -> None:
    """Undo it, before ops are taken out: what was written over may then be another value."""
    for node in program.graph.find_nodes(op="call_function", target=aten.mul_.Tensor):
        node.target = aten.mul.Tensor
    unmark(program.graph)


def fits(node: fx.Node, operand: fx.Node, made: set[str]) -> bool:
    """Whether a result has the type, shape and strides of an operand, whose numbers lie in places of their own.

    `made`: the names of the ops that make the operand's memory.
    """
    value, result = operand.meta["val"], node.meta["val"]
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    laid_out = [(str(x.shape), str(x.stride())) for x in (value, result)]
    alike = value.dtype is result.dtype and laid_out[0] == laid_out[1]
    return alike and not any(map(_overlaps, _views(operand, made)))


def _views(node: fx.Node, made: set[str]) -> Iterator[fx.Node]:
    """A value and what it is a view of, back to the op that made it."""
    yield node
    while node.name not in made:
        node = node.all_input_nodes[0]
        yield node


def _overlaps(node: fx.Node) -> bool:
    """Whether several of its numbers lie in one place, as those of windows do; also where sizes do not tell."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return False
    pairs = [(hint(s), hint(n), isinstance(n, int)) for s, n in zip(value.stride(), value.shape, strict=True)]
    if any(stride is None or size is None for stride, size, _ in pairs):
        return True
    several = [(stride, size if fixed else max(size, 2)) for stride, size, fixed in pairs if size != 1 or not fixed]
    reach = 0
    for stride, size in sorted(several):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
