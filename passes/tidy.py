"""tidy: results set, common subexpressions merged, no-op and dead nodes gone."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile.inline import PHASE
from dpcompile.ir import Draft, Program
from dpcompile.passes.rewrite import Order

aten = torch.ops.aten

_NO_OPS = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}


def tidy(draft: Draft, _order: Order) -> Draft:
    """The program with exactly its declared outputs as results and nothing that they do not need."""
    return replace(draft, program=tidied(draft.program))


def tidied(program: Program) -> Program:
    """The bundle of small passes below, on a program."""
    graph = program.graph
    nodes = program.nodes()
    output = graph.find_nodes(op="output")[0]
    output.args = ([nodes[o.node] if o.node is not None else o.literal for o in program.outputs],)
    drop_no_ops(graph)
    reshape_views(graph)
    name_sizes(program)
    merge_common(graph)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    graph.lint()
    program.module.recompile()
    results = output.args[0]
    assert isinstance(results, (list, tuple))
    outputs = tuple(
        replace(o, node=node.name) if isinstance(node, fx.Node) else o
        for o, node in zip(program.outputs, results, strict=True)
    )
    return replace(program, outputs=outputs)


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def drop_no_ops(graph: fx.Graph) -> None:
    """Detach and alias mean nothing once autograd is out of the graph."""
    for node in list(graph.nodes):
        if node.target in _NO_OPS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def reshape_views(graph: fx.Graph) -> None:
    """A view relies on strides, and those of a kernel (a convolution of a transposed input) need not be the traced."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def name_sizes(program: Program) -> None:
    """Every size that is a multiple of the batch size becomes that multiple of one node.

    A size read off an activation would keep the activation alive for its shape alone.
    """
    graph = program.graph
    symbol = program.batch.node.expr
    source = next(i for i in program.inputs if i.batch_dim is not None)
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        batch = graph.call_function(aten.sym_size.int, (program.node(source.node), source.batch_dim))
    batch.meta["val"] = program.batch
    made: dict[int, fx.Node] = {1: batch}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node is batch or node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        factor = value.node.expr / symbol
        if not factor.is_Integer:
            continue
        if int(factor) not in made:
            with graph.inserting_after(batch):
                made[int(factor)] = graph.call_function(operator.mul, (batch, int(factor)))
            made[int(factor)].meta["val"] = value
        node.replace_all_uses_with(made[int(factor)])
        graph.erase_node(node)


def merge_common(graph: fx.Graph) -> None:
    """One node for equal computations: a Gram matrix of an activation that three projections share is formed once.

    Not across the norm and the sum phase: unfolded patches held from one to the other would cost more memory than the
    time that they save.
    """
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _is_random(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs), node.meta.get(PHASE) == "sum")
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    return torch.Tag.nondeterministic_seeded in tags or (schema is not None and schema.is_mutable)


def _key(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_key(item) for item in value))
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    return (type(value), value)
