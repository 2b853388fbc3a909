"""Tracing a plain function of tensors and writing its ops into a graph: how every rewriting pass adds code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.fx.node import map_arg

from dpcompile.torch_internals import fake_mode_of, trace

PHASE = "dpcompile.phase"  # node.meta key: which rewrite a node comes from, "" for the traced backbone


def inline(
    graph: fx.Graph,
    fn: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[fx.Node],
    phase: str = "",
    *,
    vmapped: bool = False,
) -> list[fx.Node]:
    """Results of `fn(*inputs)` as new nodes, placed right behind the last input so that memory is freed early."""
    traced = trace(
        lambda *values: list(fn(*values)),
        *(node.meta["val"] for node in inputs),
        mode=fake_mode_of(graph),
        vmapped=vmapped,
    )
    traced.graph.eliminate_dead_code()
    at = place(graph, inputs)
    env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return [map_arg(item, env.__getitem__) for item in node.args[0]]
        with graph.inserting_after(at):
            copy = graph.node_copy(node, env.__getitem__)
        copy.meta[PHASE] = phase
        env[node] = at = copy
    raise AssertionError("a graph ends in its output")


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
