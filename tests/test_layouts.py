"""Convolutions of a compiled graph stay in the layout of their images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from selection import every
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from dpcompile import dpcompile

Step = Callable[[], list[torch.Tensor]]


def steps(fused: bool, **compiled_by: Any) -> tuple[Step, Step]:
    """One step of a model with convolutions, eager and compiled: the gradients that it leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    more = {"loss_fn": lambda out, t: F.cross_entropy(out, t, reduction="none"), "sample_targets": y} if fused else {}
    dp_model = dpcompile(model, x, max_grad_norm=0.1, **more)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return dp_model(x, targets=y) if fused else F.cross_entropy(dp_model(x), y)

    def step(loss_of: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        loss_of(x, y).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    compiled = torch.compile(loss_of, fullgraph=True, **compiled_by)
    return lambda: step(loss_of), lambda: step(compiled)


@pytest.mark.parametrize("fused", every(2, [True, False]))
def test_a_compiler_sees_no_convolution_that_it_would_lay_out_anew(fused: bool) -> None:
    targets: list[str] = []

    def keep(module: GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module.forward)

    eager, compiled = steps(fused, backend=aot_autograd(fw_compiler=keep))
    torch.testing.assert_close(compiled(), eager())
    assert targets.count("dpcompile.convolution.default") == 2
    assert "aten.convolution.default" not in targets


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_inductor_computes_the_same(fused: bool) -> None:
    eager, compiled = steps(fused)
    found, code = run_and_get_code(compiled)
    assert not any("extern_kernels.convolution(" in text for text in code)
    torch.testing.assert_close(found, eager())
