"""Ops that no special rule knows: exact per-sample gradients by vmap of the op's own vjp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import Apply, check_module, loss_at
from selection import every
from torch import Tensor, nn

from dpcompile import NoRuleError
from dpcompile.torch_internals import without_vmap_loops

T, D = 3, 4


def cdist_to_prototypes(m: Any, x: Tensor) -> Tensor:
    return torch.cdist(x, m.prototypes.unsqueeze(0).expand(x.shape[0], -1, -1))


OPS = {
    "bilinear": (Apply(lambda m, x: m.f(x, x.tanh()), modules={"f": nn.Bilinear(D, D, 2)}), (D,)),
    "cdist": (Apply(lambda m, x: torch.cdist(x, m.prototypes), prototypes=(5, D)), (T, D)),
    "cdist to spread prototypes": (Apply(cdist_to_prototypes, prototypes=(5, D)), (T, D)),
    "three operands in one einsum": (
        Apply(lambda m, x: torch.einsum("bi,ijk,bk->bj", x, m.w, x.sin()), w=(D, 2, D)),
        (D,),
    ),
    "tensordot": (Apply(lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [0, 1])), w=(T, D, 2)), (T, D)),
    "addmv": (Apply(lambda m, x: torch.addmv(m.b, x, m.w, alpha=2.0), w=(D,), b=(1,)), (D,)),
    "grid sample of a learned picture": (
        Apply(
            lambda m, x: F.grid_sample(
                m.picture.expand(x.shape[0], -1, -1, -1), x.tanh().unsqueeze(2)[..., :2], align_corners=False
            ),
            picture=(1, 2, 4, 4),
        ),
        (T, D),
    ),
}


@pytest.mark.parametrize("name", every(2, OPS))
def test_any_other_op(name: str) -> None:
    module, shape = OPS[name]
    check_module(module, torch.randn(3, *shape))


def test_the_rule_is_named_for_the_report() -> None:
    found = check_module(Apply(lambda m, x: torch.cdist(x, m.w), w=(5, D)), torch.randn(3, T, D), batch_sizes=(3,))
    assert set(found.rules.values()) == {"fallback"}


def test_the_batch_at_another_dimension() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return torch.tensordot(m.w, x, dims=([1], [1]))  # [2, D] x [B, D, T] -> [2, B, T]

    check_module(Apply(run, w=(2, D)), torch.randn(3, D, T), loss=loss_at(1))


def test_embedding_and_fallback_of_one_table() -> None:
    def run(m: Any, ids: Tensor) -> Tensor:
        rows = m.table[ids]
        return torch.cdist(rows, m.table)

    check_module(Apply(run, table=(5, 2)), torch.tensor([[0, 1, 2], [2, 3, 4], [4, 4, 1]]), batch_sizes=(3, 1))


def test_an_op_that_vmap_cannot_follow_is_refused_by_name() -> None:
    """A loop over the samples would fix the batch size."""
    x = torch.randn(3, 1, D, D)
    with pytest.raises(NoRuleError, match="_trilinear"), without_vmap_loops():
        torch.func.vmap(lambda x_i: torch._trilinear(x_i, x_i, x_i, [], [], [], [1]))(x)
