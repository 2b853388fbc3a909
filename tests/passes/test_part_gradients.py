"""Parameters with equal gradients: each has a tensor of its own, so that a second backward is added once to each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from selection import every
from torch import Tensor, nn

from dpcompile import dpcompile


class Added(nn.Module):
    """Three biases that are added up, and an LSTM, whose two biases are."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.shift, self.offset = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1]) + self.shift + self.offset


@pytest.mark.parametrize("fused", every(2, [False, True]))
@pytest.mark.parametrize(
    "backend", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")
def test_two_backwards_add_up(backend: str | None, fused: bool) -> None:
    torch.manual_seed(0)
    model = Added().double()
    first, second = (torch.randn(n, 5, 3).double() for n in (3, 4))
    given: dict[str, Any] = (
        {"loss_fn": lambda out, target: (out - target).square().sum(1), "sample_targets": torch.zeros(3, 2).double()}
        if fused
        else {}
    )
    dp_model = dpcompile(model, first, max_grad_norm=0.1, validate="off", **given)

    def loss_of(x: Tensor) -> Tensor:
        if fused:
            return dp_model(x, targets=x.new_zeros(len(x), 2))
        return dp_model(x).square().sum(1).mean()

    step = loss_of if backend is None else torch.compile(loss_of, backend=backend, fullgraph=True)

    def gradient(*batches: Tensor) -> Tensor:
        model.zero_grad()
        for batch in batches:
            step(batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    apart = gradient(first) + gradient(second)
    torch.testing.assert_close(gradient(first, second), apart)
    assert len({p.grad.data_ptr() for p in model.parameters() if p.grad is not None}) == 8
