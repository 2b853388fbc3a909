"""mark-numbers: values of a CPU with a few numbers of each sample are told apart, for dpcompile/chaining.py.

The mark is kept with a graph that is stored, which loses the fake tensors that it is made from.
"""

from __future__ import annotations

import torch
from torch import fx

from dpcompile.chain_ops import NUMBERS
from dpcompile.chaining import APART, is_mutable
from dpcompile.chains import TYPES, Numbers
from dpcompile.ir import Program
from dpcompile.memory import Root, Storages
from dpcompile.shapes import size_of

MOST = 16
"""Numbers of one sample that are few."""


def mark_numbers(program: Program) -> Program:
    """The program, whose nodes have the mark."""
    batch, storages = size_of(program.batch), Storages(program)
    few: set[Root] = set()
    for node in program.graph.nodes:
        numbers = _numbers(node, batch)
        if numbers is not None:
            node.meta[NUMBERS] = numbers
            few.update(storages.of(node))
    for node in program.graph.nodes:
        if is_mutable(node) and all(few.isdisjoint(storages.of(source)) for source in node.all_input_nodes):
            node.meta[APART] = True
    return program


def _numbers(node: fx.Node, batch: object) -> Numbers | None:
    value = node.meta.get("val")
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return Numbers((), None)
    if not isinstance(value, torch.Tensor) or value.dtype not in TYPES or value.device.type != "cpu":
        return None
    sizes = [size_of(size) for size in value.shape]
    shape = tuple(None if size == batch else size for size in sizes)
    if shape.count(None) > 1 or any(not isinstance(size, int) for size in shape if size is not None):
        return None
    behind = shape[shape.index(None) + 1 :] if None in shape else ()
    numbers = Numbers(shape, value.dtype)  # type: ignore[arg-type]
    return numbers if 1 <= numbers.lines <= MOST and all(size == 1 for size in behind) else None
