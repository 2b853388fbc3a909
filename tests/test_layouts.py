"""Convolutions of a compiled graph stay in the layout of their images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

from dpcompile import dpcompile


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_no_tensor_is_put_into_channels_last(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    more = {"loss_fn": lambda out, t: F.cross_entropy(out, t, reduction="none"), "sample_targets": y} if fused else {}
    dp_model = dpcompile(model, x, max_grad_norm=0.1, **more)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return dp_model(x, targets=y) if fused else F.cross_entropy(dp_model(x), y)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        compiled(x, y).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    compiled = loss_of
    expected = step()
    compiled = torch.compile(loss_of, fullgraph=True)
    found, code = run_and_get_code(step)
    assert any("dpcompile.convolution" in text for text in code)
    assert not any("extern_kernels.convolution(" in text for text in code)
    torch.testing.assert_close(found, expected)
