"""fuse-products: a sum over positions of a product that nothing else reads is one call (products.py).

What norm layers and scales of features need for every sample: x g, or (x - mean) rstd g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile import products
from dpcompile.inline import PHASE
from dpcompile.ir import Draft
from dpcompile.passes.compute_again import backward_of
from dpcompile.passes.rewrite import Order
from dpcompile.shapes import is_one, size_of

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float64)


def fuse_products(draft: Draft, order: Order) -> Draft:
    """The program with `products.summed` in the place of such sums in its backward."""
    program = draft.program
    once = run_once(backward_of(program), order)
    for node in program.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        found = _factors(node) if node in once else None
        if found is not None:
            node.target, node.args, node.kwargs = products.summed, found, {}
    program.graph.eliminate_dead_code()
    return replace(draft, program=program)


def run_once(backward: set[fx.Node], order: Order) -> set[fx.Node]:
    """What may be computed otherwise: the forward stays bit for bit.

    So does what is computed twice, where one of both might be left as it is: a clipped sum has to read what its norm
    was taken of.
    """
    return {node for node in backward if node.meta.get(PHASE) != "sum" and node.name not in order.plan.again}


def _factors(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of `summed`, if the node is one."""
    product, dims, keepdim = (*node.args, False)[:3]
    if not dims or not _alone(product, aten.mul.Tensor) or node.meta["val"].dtype not in FLOATS:
        return None
    assert isinstance(product, fx.Node)
    assert isinstance(dims, (list, tuple))
    rank = product.meta["val"].dim()
    summed = sorted(int(dim) % rank for dim in dims)  # type: ignore[arg-type]
    front = products.lead(rank, summed)
    if front is None:
        return None
    for left, grad in (product.args, product.args[::-1]):
        x, shift, scale = left, None, None
        if _alone(x, aten.mul.Tensor) and _spread(x.args[1], product, front):  # type: ignore[union-attr]
            x, scale = x.args  # type: ignore[union-attr]
        if _alone(x, aten.sub.Tensor) and _spread(x.args[1], product, front):  # type: ignore[union-attr]
            x, shift = x.args  # type: ignore[union-attr]
        if _full(x, product) and _full(grad, product):
            return x, shift, scale, grad, summed, keepdim
    return None


def _alone(node: Any, target: Any) -> bool:
    """Whether it is such an op, read here and nowhere else."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1 and not node.kwargs


def _full(node: Any, product: fx.Node) -> bool:
    return _is_like(node, product) and _sizes(node) == _sizes(product)


def _spread(node: Any, product: fx.Node, front: int) -> bool:
    """Whether it has one number for each place of the first dimensions."""
    if not _is_like(node, product):
        return False
    own, whole = node.meta["val"].shape, product.meta["val"].shape
    return len(own) == len(whole) and _sizes(node)[:front] == _sizes(product)[:front] and all(map(is_one, own[front:]))


def _is_like(node: Any, product: fx.Node) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype is product.meta["val"].dtype


def _sizes(node: fx.Node) -> Sequence[Any]:
    return tuple(map(size_of, node.meta["val"].shape))
