"""drop-tangents: a backward without what the gradients of outputs that took no part in the loss would cost.

Hidden states and caches are outputs that a loss seldom uses. Their gradients are zero, and zeros are followed through
the graph: what is computed from zero alone is zero, and adding zero is nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile import group_norm, joined, kernels, patches, settled
from dpcompile.finite import finite_rows, product, weighted_rows
from dpcompile.ir import InputKind, OutputKind, Program
from dpcompile.passes.scale_in_place import copied
from dpcompile.passes.share_grams import parted, shared
from dpcompile.products import summed
from dpcompile.twice import twice

aten = torch.ops.aten

# Zero where their first argument is.
_KEEP_ZERO = {
    aten.view, aten.reshape, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.expand, aten.clone,
    aten._to_copy, aten.neg, aten.sum, aten.mean, aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.div,
    aten.split, aten.split_with_sizes, aten.unbind, aten.sqrt, aten.unfold, aten.flip, aten.roll, aten.repeat,
    aten.index_select, aten.gather, aten.diagonal, aten.movedim, aten.abs, aten.zeros_like, aten.linalg_vector_norm,
    aten.square, aten.constant_pad_nd, settled.OP.overloadpacket,
}  # fmt: skip
# Zero where any argument is.
_PRODUCTS = {aten.mul, aten.mm, aten.bmm, aten.matmul, patches.OP.overloadpacket}
_PRODUCTS |= {patches.SQUARES.overloadpacket, patches.SUM.overloadpacket}
_PRODUCTS |= {op.overloadpacket for op in kernels.OPS}
_JOINS = (aten.cat, joined.OP.overloadpacket)

UNDERFLOW = 1e-10
"""More than certified.py adds to sizes in case products underflow. Nothing is hidden in a gradient that is zero."""


def drop_tangents(program: Program, missing: Sequence[str]) -> Program | None:
    """The backward program with these tangents taken as zero; their placeholders stay, unread.

    A gradient that is zero then is no result of a node any more. None where zeros cannot be followed to the end: the
    caller passes zeros.
    """
    program = program.copy()
    copied(program)
    was_shared = parted(program)
    graph = program.graph
    nodes = program.nodes()
    zeros = {nodes[i.node] for i in program.inputs if i.kind is InputKind.TANGENT and i.target in missing}
    for node in list(graph.nodes):
        if node.op != "call_function" or not any(a in zeros for a in node.all_input_nodes):
            continue
        if "val" not in node.meta:
            return None  # a stored program has no shapes
        if _is_zero(node, zeros):
            zeros.add(node)
            continue
        if _beside_zeros(node, zeros):
            continue
        rest = _added_to_zero(node, zeros)
        if rest is None:
            return None
        node.replace_all_uses_with(rest)
        graph.erase_node(node)
    results = list(graph.find_nodes(op="output")[0].args[0])  # type: ignore[call-overload]
    if any(r in zeros and o.kind is not OutputKind.GRADIENT for r, o in zip(results, program.outputs, strict=True)):
        return None
    results = [None if r in zeros else r for r in results]
    graph.find_nodes(op="output")[0].args = (results,)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    if was_shared:
        shared(program)
    graph.lint()
    program.module.recompile()
    outputs = tuple(
        replace(o, node=r.name if isinstance(r, fx.Node) else None)
        for o, r in zip(program.outputs, results, strict=True)
    )
    return replace(program, outputs=outputs)


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    first: Any = node.args[0]
    if node.target is operator.getitem:
        return first in zeros
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _PRODUCTS:
        return True
    if node.target in (finite_rows, twice, group_norm.backward):
        return first in zeros
    if node.target is product:
        return first in zeros or node.args[1] in zeros
    if node.target is weighted_rows:
        return node.args[1] in zeros
    if node.target is summed:
        return first in zeros or node.args[3] in zeros
    if packet is aten.convolution_backward and node.args[-1] == [False, True, False]:  # of the kernel: a product
        return first in zeros or node.args[1] in zeros
    if packet is aten.add and isinstance(node.args[1], float):
        return first in zeros and 0 <= node.args[1] < UNDERFLOW
    if packet in (aten.add, aten.sub):
        return first in zeros and node.args[1] in zeros
    if packet in (*_JOINS, aten.stack):
        return all(item in zeros for item in first)
    if packet is aten.pow:
        exponent = node.args[1]
        return first in zeros and isinstance(exponent, (int, float)) and exponent > 0
    if packet is aten.clamp:
        return first in zeros and node.args[1:] == (0,)
    backward = packet is not None and str(packet).endswith(("_backward", "_backward_data"))
    return first in zeros and (packet in _KEEP_ZERO or backward)


def _beside_zeros(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Whether zeros that a node puts beside other values could be written down in their place."""
    if getattr(node.target, "overloadpacket", None) not in _JOINS:
        return False
    items: Any = node.args[0]
    other = next(item for item in items if item not in zeros)
    with node.graph.inserting_before(node):
        made = [_written_down(item, other) if item in zeros else item for item in items]
    node.args = (made, *node.args[1:])
    return None not in made


def _written_down(zero: fx.Node, other: fx.Node) -> fx.Node | None:
    """Zeros of its shape, if the other tensor tells all sizes that are not plain numbers."""
    have, want = other.meta["val"], zero.meta["val"]
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(want.shape):
        if isinstance(size, int):
            sizes.append(size)
        elif dim < have.dim() and _equal(have.shape[dim], size):
            sizes.append(zero.graph.call_function(aten.sym_size.int, (other, dim)))
        else:
            return None
    return zero.graph.call_function(aten.new_zeros.default, (other, sizes), {"dtype": want.dtype})


def _added_to_zero(node: fx.Node, zeros: set[fx.Node]) -> fx.Node | None:
    """The other summand, where it is the sum as it stands."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in (aten.add, aten.sub):
        return None
    left, right = node.args[:2]
    if right in zeros:
        rest = left
    elif packet is aten.add and node.kwargs.get("alpha", 1) == 1:
        rest = right
    else:
        return None
    if not isinstance(rest, fx.Node) or not isinstance(rest.meta["val"], torch.Tensor):
        return None
    have, want = rest.meta["val"], node.meta["val"]
    same = have.dtype == want.dtype and have.dim() == want.dim()
    return rest if same and all(map(_equal, have.shape, want.shape)) else None


def _equal(one: Any, other: Any) -> bool:
    """Equality of sizes, without a guard on the batch size."""
    return str(one) == str(other)
