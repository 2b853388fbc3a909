"""Tracing a plain function of tensors and writing its ops into a graph: how every rewriting pass adds code."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from dpcompile.shapes import size_of
from dpcompile.torch_internals import fake_mode_of, trace, uncached

Memo = dict[Hashable, fx.Graph]
"""Graphs by what was traced: a layer that a model has many times is traced once."""

PHASE = "dpcompile.phase"  # node.meta key: which rewrite a node comes from, "" for the traced backbone


def inline(
    graph: fx.Graph,
    fn: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[fx.Node],
    phase: str = "",
    *,
    vmapped: bool = False,
    memo: Memo | None = None,
    key: Hashable = None,
) -> list[fx.Node]:
    """Results of `fn(*inputs)` as new nodes, placed right behind the last input so that memory is freed early.

    With a memo, functions of equal keys do the same to inputs of the same shapes.
    """
    inputs, count = [*inputs, *_lengths(graph)], len(inputs)
    kind = (key, *map(_layout, inputs), *map(inputs.index, inputs))  # a tensor that is given twice is traced as one
    traced = None if memo is None else memo.get(kind)
    if traced is None:
        values = _told_apart(inputs)
        mode = fake_mode_of(graph)
        with uncached(mode):  # what is alike is in the memo
            traced = trace(lambda *given: list(fn(*given[:count])), *values, mode=mode, vmapped=vmapped).graph
        traced.eliminate_dead_code()
        if memo is not None:
            memo[kind] = traced
    at = place(graph, inputs)
    env: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return [map_arg(item, env.__getitem__) for item in node.args[0]]
        with graph.inserting_after(at):
            copy = graph.node_copy(node, env.__getitem__)
        copy.meta[PHASE] = phase
        env[node] = at = copy
    raise AssertionError("a graph ends in its output")


def _told_apart(nodes: Sequence[fx.Node]) -> list[Any]:
    """Fake values, each of one node alone: copies of a traced graph share theirs, and would be traced as one."""
    owners: dict[int, fx.Node] = {}
    for node in nodes:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and owners.setdefault(id(value), node) is not node:
            node.meta["val"] = value.detach()
    return [node.meta["val"] for node in nodes]


def _lengths(graph: fx.Graph) -> list[fx.Node]:
    """Inputs of the program off which free lengths are read; none where only the batch size is free."""
    found: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, node)
    return list(dict.fromkeys(found.values())) if len(found) > 1 else []


def _layout(node: fx.Node) -> Hashable:
    value: Any = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return type(value), str(value)
    sizes = tuple(size_of(size) for size in (*value.shape, *value.stride(), value.storage_offset()))
    return sizes, value.dtype, value.device


def place(graph: fx.Graph, inputs: Sequence[fx.Node]) -> fx.Node:
    """The node behind which code that reads `inputs` can stand."""
    last_placeholder = list(graph.find_nodes(op="placeholder"))[-1]
    computed = [node for node in inputs if node.op != "placeholder"]
    return max(computed, key=lambda node: node._sort_key) if computed else last_placeholder


def carry_origin(source: fx.Node, targets: Sequence[fx.Node]) -> None:
    """Give new nodes the module and source line of the node that they replace."""
    for node in targets:
        for key in ("nn_module_stack", "stack_trace"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
