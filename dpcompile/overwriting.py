"""Ops that write their result over one of their operands."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

OVER = "dpcompile.over"
"""node.meta key: which operand an op may write over, by position (passes/mark_overwrites.py)."""


@functools.cache
def writing_over(op: Any, position: int) -> tuple[Any, str] | None:
    """The op that puts an op's result in the place of an operand, and the argument to name that by ("" for none).

    None where there is none, or one that copies the result there.
    """
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.pointwise not in op.tags:
        return None
    if position == 0:
        in_place = getattr(getattr(torch.ops, op.namespace), f"{op.overloadpacket.__name__}_", None)
        found = getattr(in_place, op._overloadname, None)
        if found is not None and torch.Tag.generated not in found.tags and _arguments(found) == _arguments(op):
            return found, ""
    for name in op.overloadpacket.overloads():
        found = getattr(op.overloadpacket, name)
        out = [argument.name for argument in found._schema.arguments if argument.is_out]
        if len(out) == 1 and torch.Tag.generated not in found.tags and _arguments(found) == _arguments(op):
            return found, out[0]
    return None


def _arguments(op: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]


def overwrite(graph: fx.Graph) -> None:
    """Have the marked ops do so."""
    for node in graph.nodes:
        if OVER in node.meta:
            found = writing_over(node.target, node.meta[OVER])
            assert found is not None
            node.target, out = found
            if out:
                node.kwargs = {**node.kwargs, out: node.args[node.meta[OVER]]}


def unmark(graph: fx.Graph) -> None:
    """Before ops are taken out: what was written over may then be another value."""
    for node in graph.nodes:
        node.meta.pop(OVER, None)
