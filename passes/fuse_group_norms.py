"""fuse-group-norms: group norm's backward and the sums of every channel that its parameters need are one call."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from dpcompile import group_norm, products
from dpcompile.ir import Draft
from dpcompile.passes.compute_again import backward_of
from dpcompile.passes.fuse_products import FLOATS, run_once
from dpcompile.passes.rewrite import Order

aten = torch.ops.aten


def fuse_group_norms(draft: Draft, order: Order) -> Draft:
    """The program with `group_norm.backward` in the place of torch's op and of sums over positions of what it reads,
    behind fuse-products. An op that runs twice is replaced both times, so that it has the same bits.
    """
    program = draft.program
    flowing = backward_of(program)
    once = run_once(flowing, order)
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in program.graph.find_nodes(op="call_function", target=group_norm.OP):
        wanted, value = node.args[9], node.meta["val"][0]
        if node in flowing and wanted == [True, False, False] and value.dtype in FLOATS and value.dim() > 2:
            there = max(position[source] for source in node.all_input_nodes)
            sums = [(at, which) for at, which in _channel_sums(node) if at in once and position[at] > there]
            if sums or node not in once:
                _fuse(program.graph, node, sums, min((node, *(at for at, _ in sums)), key=position.__getitem__))
    program.graph.eliminate_dead_code()
    return replace(draft, program=program)


def _channel_sums(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """Sums over all positions of the op's image times its gradient, and of the gradient: which result of `backward`."""
    grad, x = node.args[:2]
    assert isinstance(grad, fx.Node)
    assert isinstance(x, fx.Node)
    places = list(range(2, x.meta["val"].dim()))
    for user in x.users:
        if user.target is products.summed and user.args[4] == places:
            left, shift, scale, right = user.args[:4]
            if shift is scale is None and (left, right) in ((x, grad), (grad, x)):
                yield user, 1
    for user in grad.users:
        if user.target is aten.sum.dim_IntList and user.args[1] == places and not user.kwargs:
            yield user, 2


def _fuse(graph: fx.Graph, node: fx.Node, sums: list[tuple[fx.Node, int]], first: fx.Node) -> None:
    image, channels = node.meta["val"][0], node.args[6]
    each = image.flatten(2).sum(2)
    with graph.inserting_before(first):
        call = graph.call_function(group_norm.backward, node.args[:9])
    call.meta = {**node.meta, "val": (image, each, each.clone())}
    node.replace_all_uses_with(call)
    for at, which in sums:
        with graph.inserting_before(at):
            found = graph.call_function(operator.getitem, (call, which))
            found.meta = {**at.meta, "val": call.meta["val"][which]}
            if at.meta["val"].dim() > 2:
                sizes = [node.args[5], channels, *(1 for _ in image.shape[2:])]
                found = graph.call_function(aten.view.default, (found, sizes))
                found.meta = dict(at.meta)
        at.replace_all_uses_with(found)
