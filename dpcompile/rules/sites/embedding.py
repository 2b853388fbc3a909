"""Table look-ups: the gradient of row v is the sum of g over the positions that read it (Outer with one-hot rows)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dpcompile.errors import NoRuleError
from dpcompile.forms import Form, OneHot
from dpcompile.rules.sites.base import Call, Tap, Work, call_bound, per_sample_size, pick, tapped
from dpcompile.shapes import batch_first

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
        if call.node.target is aten.index.Tensor:
            return (
                all(other is None for other in call.arguments["indices"][1:]) and call.meta(index).dtype != torch.bool
            )
        return call.arguments.get("dim", 0) in (0, -len(call.shape(table)))

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
            if call.node.target is aten.index.Tensor:
                index_BT = index_BT.remainder(shape[0])  # table[-1] is the last row
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
