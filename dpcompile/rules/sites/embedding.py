"""Table look-ups: the gradient of row v is the sum of g over the positions that read it (Outer with one-hot rows)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpcompile.errors import NoRuleError
from dpcompile.forms import Form, OneHot
from dpcompile.rules.sites.base import Call, Tap, Work, call_bound, per_sample_size, tapped
from dpcompile.shapes import batch_first

aten = torch.ops.aten


class Embedding:
    name = "embedding"
    vmapped = False

    def accepts(self, call: Call) -> bool:
        if call.node.target is not aten.embedding.default or call.slots != ("weight",):
            return False
        if call.arguments["scale_grad_by_freq"]:
            raise NoRuleError(
                "find-sites: an embedding with scale_grad_by_freq=True divides a row's gradient by how often the "
                "whole batch reads it: samples influence each other. Set scale_grad_by_freq=False."
            )
        return call.axis("indices") is not None

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        result = tapped(call_bound(call.node.target, arguments))
        return result, {"weight": Tap(result, (arguments["indices"],))}

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        axis, shape, padding = call.axis("indices"), call.shape(slot), call.arguments["padding_idx"]
        assert axis is not None

        def form(indices: torch.Tensor, grad: torch.Tensor) -> Form:
            index_BT = batch_first(indices, axis)
            index_BT = index_BT.reshape(index_BT.shape[0], per_sample_size(indices, axis))
            cols_BTd = batch_first(grad, axis).reshape(*index_BT.shape, shape[1])
            if padding >= 0:
                cols_BTd = cols_BTd * (index_BT != padding).unsqueeze(-1).to(cols_BTd.dtype)
            return OneHot(index_BT, cols_BTd, shape)

        return form

    def work(self, call: Call, slot: str) -> Work:
        rows, width = call.shape(slot)
        return Work("onehot", per_sample_size(call.out, call.out_axis) // width, width, rows)


