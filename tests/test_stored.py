"""Modules that are stored and read again, also those that no trace of their code could read."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from selection import every
from torch import Tensor, nn

from dpcompile import DPModule, dpcompile


class Last(nn.Module):
    """Its first state is made from the batch size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class Scaled(nn.Module):
    """Slices, types and a tensor that is written as a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, 1:]).double() * torch.tensor([1.0, 2.0])


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "lstm": lambda: (Last(), torch.randn(3, 5, 3)),
    "convolution": lambda: (nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()), torch.randn(3, 2, 6)),
    "constant": lambda: (Scaled(), torch.randn(3, 3)),
}


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


def gradients(dp_model: DPModule, x: Tensor, fused: bool, backend: str | None = None) -> list[Tensor]:
    def loss_of(x: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=x.dtype)
        return dp_model(x, targets=zero.expand(len(x), 1)) if fused else own_loss(dp_model(x), zero).mean()

    dp_model.zero_grad()
    (torch.compile(loss_of, backend=backend, fullgraph=True) if backend else loss_of)(x).backward()
    return [p.grad for p in dp_model.parameters() if p.grad is not None]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", every(2, LAYERS))
def test_a_module_that_was_stored_trains_as_before(name: str, fused: bool) -> None:
    torch.manual_seed(0)
    model, x = LAYERS[name]()
    given: dict[str, Any] = {"loss_fn": own_loss, "sample_targets": torch.zeros(3, 1)} if fused else {}
    dp_model = dpcompile(model, x, max_grad_norm=0.1, validate="off", **given)
    stored = pickle.dumps(dp_model)
    expected = gradients(dp_model, x, fused)
    norms = dp_model.per_sample_norms
    twin = pickle.loads(stored)
    for backend in (None, "aot_eager"):
        for found, want in zip(gradients(twin, x, fused, backend), expected, strict=True):
            torch.testing.assert_close(found, want)
        torch.testing.assert_close(twin.per_sample_norms, norms)
    again = pickle.loads(pickle.dumps(twin))
    for found, want in zip(gradients(again, x, fused), expected, strict=True):
        torch.testing.assert_close(found, want)
