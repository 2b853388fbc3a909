"""Regions of torch.utils.checkpoint: exact, said in the report not to save memory, and refused where reentrant."""

from __future__ import annotations

import pytest
import torch
from layers import check_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from dpcompile import CaptureError, DPCompileError, dpcompile

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.inner = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, self.first(x).tanh(), use_reentrant=self.reentrant)
        return checkpoint_sequential(self.inner, 2, hidden, use_reentrant=self.reentrant) + self.last(hidden).sum(
            1, True
        )


def test_regions_are_exact_and_counted() -> None:
    plan = check_module(Checkpointed(), X).plan
    assert plan.checkpointed == 2
    assert "2 regions of torch.utils.checkpoint are not computed again" in str(plan)
    assert plan.to_dict()["checkpointed"] == 2


def test_a_model_without_says_nothing() -> None:
    assert "checkpoint" not in str(dpcompile(nn.Linear(5, 2), X, validate="off").plan)


def test_a_reentrant_region_is_refused_with_its_line_and_cure() -> None:
    with pytest.raises(CaptureError, match=r"(?s)test_checkpointing.py:\d+: hidden = checkpoint.*use_reentrant=False"):
        dpcompile(Checkpointed(reentrant=True), X)
    model = Checkpointed()
    model(X).sum().backward()  # torch is left as it was
    assert model.first.weight.grad is not None


def test_a_model_whose_outputs_are_cut_off_is_refused() -> None:
    class CutOff(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach() * x.sum(1, keepdim=True)

    with pytest.raises(DPCompileError, match="no output depends on a trainable parameter"):
        dpcompile(CutOff(5, 2), X)
