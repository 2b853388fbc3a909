"""Every product of a parameter with an activation: linear, mm, addmm, bmm, baddbmm, matmul, mv, einsum and others.

Each is read as one equation over labelled dimensions, x * w -> out. The labels say what every dimension is:

    in x, w and out   a group G (one independent block per head, say)
    in x and w        contracted: d
    in w and out      made by the weight: p
    in x and out      a position T, or the batch

so that the per-sample gradient is Outer(g[B,G,T,p], x[B,G,T,d]), whatever the op was called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpcompile.forms import Explicit, Form, Outer
from dpcompile.ir import Axis
from dpcompile.rules.batching.base import shape_of
from dpcompile.rules.sites.base import Call, Tap, Work, call_bound, per_sample_size, pick, tapped
from dpcompile.rules.sites.reduce import broadcasts, reduce_to
from dpcompile.shapes import batch_first

aten = torch.ops.aten

# op -> (left operand, right operand, added operand)
OPERANDS: dict[Any, tuple[str, str, str | None]] = {
    aten.linear.default: ("input", "weight", "bias"),
    aten.mm.default: ("self", "mat2", None),
    aten.addmm.default: ("mat1", "mat2", "self"),
    aten.bmm.default: ("self", "mat2", None),
    aten.baddbmm.default: ("batch1", "batch2", "self"),
    aten.matmul.default: ("self", "other", None),
    aten.mv.default: ("self", "vec", None),
    aten.inner.default: ("self", "other", None),
    aten.tensordot.default: ("self", "other", None),
    aten.einsum.default: ("tensors[0]", "tensors[1]", None),
}

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Equation:
    """Labels of both operands and of the result. A label that starts with "_" marks a dimension of size one."""

    left: Labels
    right: Labels
    out: Labels


def equation_of(call: Call) -> Equation | None:
    op = call.node.target
    if op is aten.einsum.default:
        return _einsum(call)
    left_slot, right_slot, _ = OPERANDS[op]
    left, right = call.meta(left_slot).dim(), call.meta(right_slot).dim()
    if op is aten.linear.default:
        lead = _lead(left - 1)
        return Equation((*lead, "k"), ("n", "k")[-right:], (*lead, "n")[: left - 2 + right])
    if op is aten.inner.default:
        return _tensordot(call, [left - 1], [right - 1]) if left and right else None
    if op is aten.tensordot.default:
        return _tensordot(call, call.arguments["dims_self"], call.arguments["dims_other"])
    return _matmul(*(shape_of(call.operand(slot)) for slot in (left_slot, right_slot)))


def _lead(count: int) -> Labels:
    return tuple(f"b{i}" for i in range(count))


def _matmul(left: tuple[Any, ...], right: tuple[Any, ...]) -> Equation:
    count = max(len(left), len(right)) - 2
    names = _lead(max(count, 0))
    a = list(names[count - (len(left) - 2) :] if len(left) > 2 else ())
    b = list(names[count - (len(right) - 2) :] if len(right) > 2 else ())
    for i in range(1, min(len(a), len(b)) + 1):
        if left[-2 - i] == 1 and right[-2 - i] != 1:
            a[-i] = "_" + a[-i]
        elif right[-2 - i] == 1 and left[-2 - i] != 1:
            b[-i] = "_" + b[-i]
    rows, cols = ("m",) if len(left) > 1 else (), ("n",) if len(right) > 1 else ()
    return Equation((*a, *rows, "k"), (*b, "k", *cols), (*names, *rows, *cols))


def _tensordot(call: Call, left_dims: list[int], right_dims: list[int]) -> Equation | None:
    left, right = shape_of(call.operand("self")), shape_of(call.operand("other"))
    names = [f"k{i}" for i in range(len(left_dims))]
    a, b = [f"m{i}" for i in range(len(left))], [f"n{i}" for i in range(len(right))]
    for name, i, j in zip(names, left_dims, right_dims, strict=True):
        if left[i] != right[j]:  # size one, summed on its own
            return None
        a[i] = b[j] = name
    return Equation(tuple(a), tuple(b), tuple(name for name in (*a, *b) if name not in names))


def _einsum(call: Call) -> Equation | None:
    text = str(call.arguments["equation"]).replace(" ", "")
    if len(call.arguments["tensors"]) != 2:
        return None
    inputs, arrow, result = text.partition("->")
    left, right = inputs.split(",")
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        result = "..." * ("." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    shapes = [shape_of(call.operand(slot)) for slot in ("tensors[0]", "tensors[1]")]
    a, b = (_labels(part, len(shape)) for part, shape in zip((left, right), shapes, strict=True))
    spread = max(len(a) - len(left.replace(".", "")), len(b) - len(right.replace(".", "")))
    out = _labels(result, len(result.replace(".", "")) + spread * ("." in result))
    if any(len(set(part)) != len(part) for part in (a, b, out)):
        return None
    sizes = [dict(zip(part, shape, strict=True)) for part, shape in zip((a, b), shapes, strict=True)]
    return Equation(_ones_marked(a, *sizes), _ones_marked(b, *reversed(sizes)), out)


def _labels(part: str, rank: int) -> Labels:
    """One label for each dimension; those of an ellipsis are counted from the last."""
    before, dots, after = part.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return (*before, *(f"...{count - i}" for i in range(count)), *after)


def _ones_marked(labels: Labels, own: dict[str, Any], other: dict[str, Any]) -> Labels:
    """Labels, marked where a dimension of size one meets a longer one."""
    return tuple("_" + name if own[name] == 1 and name in other and other[name] != 1 else name for name in labels)


@dataclass(frozen=True)
class Roles:
    """What each dimension of one use is, and how the other operand and the gradient are brought into [B, G, T, .]."""

    groups: Labels
    positions: Labels
    contracted: Labels
    made: Labels
    weight: Labels
    other: Labels
    out: Labels
    batch: str


def roles_of(call: Call, slot: str) -> Roles | None:
    equation = equation_of(call)
    if equation is None or not call.shape(slot):  # a parameter that is one number has no rows and columns
        return None
    left_slot, right_slot, _ = OPERANDS[call.node.target]
    weight, other = (equation.left, equation.right) if slot == left_slot else (equation.right, equation.left)
    axis = call.axis(right_slot if slot == left_slot else left_slot)
    if axis is None:
        return None
    batch = other[axis.dim]
    if batch in weight or equation.out.index(batch) != call.out_axis.dim:
        return None
    real = [label for label in weight if not label.startswith("_")]
    groups = tuple(label for label in real if label in other and label in equation.out)
    contracted = tuple(label for label in real if label in other and label not in equation.out)
    made = tuple(label for label in real if label not in other and label in equation.out)
    positions = tuple(label for label in other if label in equation.out and label not in weight and label != batch)
    unread = [label for label in other if label not in equation.out and label not in weight and label[0] != "_"]
    if len(groups) + len(contracted) + len(made) != len(real) or unread:
        return None
    return Roles(groups, positions, contracted, made, weight, other, equation.out, batch)


def _blocks(tensor: torch.Tensor, axis: Axis, labels: Labels, order: tuple[Labels, Labels, Labels]) -> torch.Tensor:
    """The tensor as [B, G, T, last], from labelled dimensions; folded batch factors count as positions."""
    moved = batch_first(tensor, axis)
    names: list[str] = []
    for i, label in enumerate(labels):
        if i == axis.dim:
            names += ["<outer", "<inner"] if axis.folded else []
        else:
            names.append(label)
    groups, positions, last = order
    positions = (("<outer", "<inner") if axis.folded else ()) + positions
    wanted = [*groups, *positions, *last]
    dropped = [i for i, name in enumerate(names) if name not in wanted]  # size one
    for i in reversed(dropped):
        moved = moved.select(1 + i, 0)
    names = [name for name in names if name in wanted]
    moved = moved.permute(0, *(1 + names.index(name) for name in wanted))
    sizes = dict(zip(wanted, moved.shape[1:], strict=True))
    return moved.reshape([moved.shape[0], *(math.prod(sizes[n] for n in part) for part in (groups, positions, last))])


class Contraction:
    name = "contraction"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        if call.node.target not in OPERANDS:
            return False
        *_, added = OPERANDS[call.node.target]
        return all(
            broadcasts(call.out.dim(), call.out_axis, call.shape(slot)) if slot == added else roles_of(call, slot)
            for slot in call.slots
        )

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        left, right, added = OPERANDS[call.node.target]
        result = tapped(call_bound(call.node.target, arguments))
        taps = {}
        for slot in call.slots:
            other = right if slot == left else left
            taps[slot] = Tap(result) if slot == added else Tap(result, (pick(arguments, other),))
        return result, taps

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        left, right, added = OPERANDS[call.node.target]
        axis, shape = call.out_axis, call.shape(slot)
        scale = call.arguments.get("beta" if slot == added else "alpha", 1)
        if slot == added:
            return lambda grad: Explicit(_scaled(reduce_to(grad, axis, shape), scale))
        roles = roles_of(call, slot)
        other_axis = call.axis(right if slot == left else left)
        assert roles is not None
        assert other_axis is not None
        dims = {label: i for i, label in enumerate(roles.weight)}
        ones = tuple(i for label, i in dims.items() if label.startswith("_"))

        def form(other: torch.Tensor, grad: torch.Tensor) -> Form:
            return Outer(
                _scaled(_blocks(grad, axis, roles.out, (roles.groups, roles.positions, roles.made)), scale),
                _blocks(other, other_axis, roles.other, (roles.groups, roles.positions, roles.contracted)),
                shape,
                row_dims=tuple(dims[label] for label in roles.made),
                col_dims=tuple(dims[label] for label in roles.contracted) + ones,
                group_dims=tuple(dims[label] for label in roles.groups),
            )

        return form

    def work(self, call: Call, slot: str) -> Work:
        shape = call.sizes(slot)
        size = per_sample_size(call.out, call.out_axis)
        roles = None if slot == OPERANDS[call.node.target][2] else roles_of(call, slot)
        if roles is None:
            return Work("explicit", size // max(math.prod(shape), 1), 1, math.prod(shape))
        sizes = dict(zip(roles.weight, shape, strict=True))
        p, d, groups = (math.prod(sizes[n] for n in part) for part in (roles.made, roles.contracted, roles.groups))
        return Work("outer", size // max(p * groups, 1), d, p, groups)


def _scaled(tensor: torch.Tensor, scale: Any) -> torch.Tensor:
    return tensor if scale == 1 else tensor * scale
