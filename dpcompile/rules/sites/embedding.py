"""Table look-ups: the gradient of row v is the sum of g over the positions that read it (Outer with one-hot rows)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from dpcompile.errors import NoRuleError
from dpcompile.forms import Form, OneHot
from dpcompile.rules.sites.base import Call, Tap, Work, bind, call_bound, per_sample_size, pick, tapped
from dpcompile.shapes import batch_first, hint

aten = torch.ops.aten

# op -> (table, row numbers): embedding(table, ids), table.index_select(0, ids), table[ids]
OPERANDS: dict[Any, tuple[str, str]] = {
    aten.embedding.default: ("weight", "indices"),
    aten.index_select.default: ("self", "index"),
    aten.index.Tensor: ("self", "indices[0]"),
}


class Embedding:
    name = "embedding"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        if call.node.target not in OPERANDS:
            return False
        table, index = OPERANDS[call.node.target]
        if call.slots != (table,) or call.axis(index) is None:
            return False
        if call.arguments.get("scale_grad_by_freq"):
            raise NoRuleError(
                "find-sites: an embedding with scale_grad_by_freq=True divides a row's gradient by how often the "
                "whole batch reads it: samples influence each other. Set scale_grad_by_freq=False."
            )
        return _reads_rows(call.node.target, call.arguments)

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        table, index = OPERANDS[call.node.target]
        result = tapped(call_bound(call.node.target, arguments))
        return result, {table: Tap(result, (pick(arguments, index),))}

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape = call.axis(OPERANDS[call.node.target][1]), call.shape(slot)
        padding = call.arguments.get("padding_idx", -1)
        assert axis is not None

        def form(indices: torch.Tensor, grad: torch.Tensor) -> Form:
            index_BT = batch_first(indices, axis)
            index_BT = index_BT.reshape(index_BT.shape[0], math.prod(index_BT.shape[1:]))
            index_BT = _row_numbers(call.node.target, index_BT, shape[0])
            cols_BTd = batch_first(grad, axis).reshape(*index_BT.shape, math.prod(shape[1:]))
            if padding >= 0:
                cols_BTd = cols_BTd * (index_BT != padding).unsqueeze(-1).to(cols_BTd.dtype)
            return OneHot(index_BT, cols_BTd, shape, col_dims=tuple(range(1, len(shape))))

        return form

    def work(self, call: Call, slot: str) -> Work:
        rows, *rest = call.sizes(slot)
        width = math.prod(rest)
        padding = call.arguments.get("padding_idx", -1)
        marker = f"without row {padding}" if padding >= 0 else ""
        return Work("onehot", per_sample_size(call.out, call.out_axis) // width, width, rows, marker=marker)


def _reads_rows(op: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the op reads whole rows of its table."""
    table, index = (pick(arguments, slot).meta["val"] for slot in OPERANDS[op])
    if op is aten.index.Tensor:
        return all(other is None for other in arguments["indices"][1:]) and index.dtype != torch.bool
    return arguments.get("dim", 0) in (0, -table.dim())


def _row_numbers(op: Any, index: torch.Tensor, rows: Any) -> torch.Tensor:
    return index.remainder(rows) if op is aten.index.Tensor else index  # table[-1] is the last row


# ------------------------------------------------------------------ one index for all samples


def shared_index(node: fx.Node) -> fx.Node | None:
    """The index of an op that reads rows of a parameter before any sample meets them; None for any other op."""
    if node.target not in OPERANDS:
        return None
    arguments = bind(node)
    if arguments.get("scale_grad_by_freq") or arguments.get("padding_idx", -1) >= 0:
        return None
    index = pick(arguments, OPERANDS[node.target][1])
    return index if index is not None and _reads_rows(node.target, arguments) else None


def shared_form(node: fx.Node, grad: torch.Tensor, index: torch.Tensor, shape: tuple[int, ...]) -> OneHot:
    """Of gradients [B, *index.shape, d] of the rows that such an op reads from a table of that shape."""
    index_T = _row_numbers(node.target, index.reshape(-1), shape[0])
    index_BT = index_T.unsqueeze(0).expand(grad.shape[0], -1)
    cols_BTd = grad.reshape(*index_BT.shape, math.prod(shape[1:]))
    return OneHot(index_BT, cols_BTd, shape, col_dims=tuple(range(1, len(shape))))


def shared_work(index: torch.Tensor, shape: tuple[int, ...]) -> Work:
    return Work("onehot", math.prod(map(hint, index.shape)), math.prod(shape[1:]), shape[0])
