"""tidy: results set, common subexpressions merged, no-op and dead nodes gone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from dpcompile.inline import PHASE
from dpcompile.ir import Draft, Program
from dpcompile.passes.rewrite import Order
from dpcompile.passes.simplify import add_in_place, simplify
from dpcompile.torch_internals import computed_size

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
    simplify(graph)
    name_sizes(program)
    merge_common(graph)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    add_in_place(graph)
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
    """Every size is computed from one node for the batch size and one for each free length.

    A size read off an activation would keep the activation alive for its shape alone.
    """
    graph = program.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    before = placeholders[-1].next
    made: dict[sympy.Expr, fx.Node] = {}
    for size in (program.batch, *program.lengths):
        source, dim = next(
            (node, dim)
            for node in placeholders
            for dim, own in enumerate(getattr(node.meta.get("val"), "shape", ()))
            if isinstance(own, torch.SymInt) and own.node.expr == size.node.expr
        )
        with graph.inserting_before(before):
            made[size.node.expr] = graph.call_function(aten.sym_size.int, (source, dim))
        made[size.node.expr].meta["val"] = size
    free = dict(made)
    node = before
    while node.op != "output":
        current, node = node, node.next
        value = current.meta.get("val")
        if current.op != "call_function" or not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols:
            continue
        expr = value.node.expr
        if expr not in made:
            with graph.inserting_before(before):
                made[expr] = computed_size(expr, free, graph)
        if current is before:
            before = current.next
        current.replace_all_uses_with(made[expr])
        graph.erase_node(current)


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
