"""tidy: results set, common subexpressions merged, no-op and dead nodes gone."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import sympy
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
    """Every size that is a polynomial in the batch size and free lengths is computed from one node for each of them.

    A size read off an activation would keep the activation alive for its shape alone.
    """
    graph = program.graph
    named = _Named(program)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt) or node in named.nodes.values():
            continue
        made = named.computed(value.node.expr)
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)


class _Named:
    """Nodes for the free sizes of a program and what is computed from them, behind its placeholders."""

    def __init__(self, program: Program) -> None:
        self._graph = program.graph
        placeholders = list(program.graph.find_nodes(op="placeholder"))
        self._at = placeholders[-1]
        self.nodes: dict[sympy.Expr, fx.Node] = {}
        for size in (program.batch, *program.lengths):
            source, dim = next(
                (node, dim)
                for node in placeholders
                for dim, own in enumerate(getattr(node.meta.get("val"), "shape", ()))
                if isinstance(own, torch.SymInt) and own.node.expr == size.node.expr
            )
            self._add(size.node.expr, aten.sym_size.int, source, dim).meta["val"] = size
        self._symbols = list(self.nodes)

    def computed(self, expr: sympy.Expr) -> fx.Node | None:
        """The node of a polynomial in the free sizes; None for anything else."""
        if not expr.free_symbols or not expr.is_polynomial(*self._symbols):
            return None
        expr = sympy.expand(expr)
        if expr not in self.nodes:
            terms = sympy.Poly(expr, *self._symbols).terms()
            if any(not factor.is_Integer for _, factor in terms):
                return None
            for powers, factor in terms:
                parts = [s for s, power in zip(self._symbols, powers, strict=True) for _ in range(power)]
                self._join(operator.mul, [*parts, factor] if factor != 1 or not parts else parts)
            self._join(operator.add, [factor * sympy.prod(map(sympy.Pow, self._symbols, p)) for p, factor in terms])
        return self.nodes[expr]

    def _join(self, op: Any, parts: list[Any]) -> None:
        so_far = parts[0]
        for part in parts[1:]:
            both = op(so_far, part)
            if both not in self.nodes:
                left, right = (int(p) if p.is_Integer else self.nodes[p] for p in (so_far, part))
                made = self._add(both, op, left, right)
                made.meta["val"] = op(*(p.meta["val"] if isinstance(p, fx.Node) else p for p in (left, right)))
            so_far = both

    def _add(self, expr: sympy.Expr, target: Any, *args: Any) -> fx.Node:
        with self._graph.inserting_after(self._at):
            self._at = self.nodes[expr] = self._graph.call_function(target, args)
        return self._at


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
