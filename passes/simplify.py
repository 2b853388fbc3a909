"""Part of tidy: views of views are one view, what changes nothing is gone, fresh zeros are added to in place.

Every op that runs eagerly costs some microseconds, and a step on small tensors is made of thousands. None of this
changes a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dpcompile.ir import Size
from dpcompile.memory import of_one_term
from dpcompile.shapes import size_of

aten = torch.ops.aten


def simplify(graph: fx.Graph) -> None:
    """Views made fewer, from the first op on: each rule gives the value that a node is, or None if it is its own.

    A value that has become a result or an input is not given as a second result: those stay tensors of their own.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            rewrite(graph, node)
        rule = _SAME.get(node.target)
        if rule is None or not rule(node):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if any(user.op == "output" for user in node.users) and _is_named(source):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def add_in_place(graph: fx.Graph) -> None:
    """Into zeros or a product that nothing else reads; behind the merging of equal nodes, which would merge the zeros
    of two sums.

    A table of embeddings is written once and not copied.
    """
    for target, in_place in _IN_PLACE.items():
        for node in graph.find_nodes(op="call_function", target=target):
            if _is_fresh(node.args[0]):
                node.target = in_place


def _is_fresh(node: Any) -> bool:
    """Whether it lies in memory that has just been written for the one op that reads it."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    return node.target in _MADE or (node.target in _SEEN_THROUGH and _is_fresh(node.args[0]))


_MADE = {aten.new_zeros.default, aten.bmm.default, aten.mm.default}
_SEEN_THROUGH = {aten.reshape.default, aten.permute.default}
_IN_PLACE = {aten.index_add.default: aten.index_add_.default, aten.scatter_add.default: aten.scatter_add_.default}


def _is_named(node: fx.Node) -> bool:
    return node.op == "placeholder" or any(user.op == "output" for user in node.users)


def _shape(node: Any) -> tuple[Size, ...]:
    return tuple(size_of(size) for size in node.meta["val"].shape)


# ------------------------------------------------------------------ ops as others


def _as_permute(graph: fx.Graph, node: fx.Node) -> None:
    """A transposition as the permutation that it is, and a permutation of a permutation as one."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    count = source.meta["val"].dim()
    order = list(range(count))
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        order = [dim % count for dim in dims]
    elif count > 1:
        first, second = (0, 1) if node.target is aten.t.default else (dim % count for dim in _numbers(node.args[1:]))
        order[first], order[second] = order[second], order[first]
    if source.target is aten.permute.default:
        before: Any = source.args[1]
        order, source = [before[dim] % count for dim in order], source.args[0]
    node.target, node.args, node.kwargs = aten.permute.default, (source, order), {}


def _numbers(values: Any) -> list[int]:
    return [int(value) for value in values]


def _one_reshape(graph: fx.Graph, node: fx.Node) -> None:
    """Of a reshape that is read here alone: another would make the same copy, if it makes one, twice."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is aten.reshape.default and len(source.users) == 1:
        node.args = (source.args[0], *node.args[1:])


def _sum_of_one(graph: fx.Graph, node: fx.Node) -> None:
    """A sum over dimensions of size 1 is its only term."""
    if of_one_term(node) and not any(user.op == "output" for user in node.users):
        source, dims, keepdim = (*node.args, False)[:3]
        node.target, node.kwargs = aten.squeeze.dims, {}
        node.args = (source, [] if keepdim else dims)


_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    aten.permute.default: _as_permute,
    aten.transpose.int: _as_permute,
    aten.t.default: _as_permute,
    aten.reshape.default: _one_reshape,
    aten.sum.dim_IntList: _sum_of_one,
}


# ------------------------------------------------------------------ ops that give their first argument


def _keeps_order(node: fx.Node) -> bool:
    order: Any = node.args[1]
    return list(order) == list(range(len(order)))


def _keeps_shape(node: fx.Node) -> bool:
    return _shape(node) == _shape(node.args[0])


_SAME: dict[Any, Callable[[fx.Node], bool]] = {
    aten.permute.default: _keeps_order,
    aten.reshape.default: _keeps_shape,
    aten.expand.default: _keeps_shape,
    aten.squeeze.dims: _keeps_shape,
}
