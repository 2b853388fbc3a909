"""Masks that hide nothing are left out; every other one stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import Apply, check_module
from selection import every
from torch import Tensor

from dpcompile import dpcompile

MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "ones": (lambda x: torch.ones(5, 5, dtype=torch.bool).expand(x.shape[0], 1, 5, 5), True),
    "no position before the first": (lambda x: (torch.arange(5) >= 0)[None, None, :, None].expand(-1, 1, 5, 5), True),
    "causal": (lambda x: torch.ones(5, 5, dtype=torch.bool).tril(), False),
    "one hidden": (lambda x: (torch.arange(5) != 3)[None], False),
    "of the data": (lambda x: (x[:, :, 0] > -100).view(-1, 1, 1, 5).expand(-1, 1, 5, 5), False),
    "drawn": (lambda x: torch.rand(5, 5) >= 0, False),
    "added, not hidden": (lambda x: torch.ones(5, 5), False),
}


def attention(mask: Callable[[Tensor], Tensor]) -> Apply:
    def fn(m: Any, x: Tensor) -> Tensor:
        query, key, value = ((x @ w).unflatten(2, (2, 2)).transpose(1, 2) for w in m.w)
        return F.scaled_dot_product_attention(query, key, value, mask(x))

    return Apply(fn, w=(3, 4, 4))


@pytest.mark.parametrize("name", every(2, [name for name in MASKS if name not in ("drawn", "added, not hidden")]))
def test_norms_and_gradients_are_exact(name: str) -> None:
    check_module(attention(MASKS[name][0]), torch.randn(3, 5, 4))


@pytest.mark.parametrize("name", every(2, MASKS))
def test_the_graph_has_a_mask_where_something_may_be_hidden(name: str) -> None:
    mask, left_out = MASKS[name]
    dp_model = dpcompile(attention(mask), torch.randn(3, 5, 4), validate="off")
    (node,) = [n for n in dp_model._emitted.forward.graph.nodes if str(n.target).endswith("for_cpu.default")]
    assert (node.kwargs.get("attn_mask") is None) == left_out
