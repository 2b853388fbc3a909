"""Narrow types: autocast, loss scaling, and the precision of products, each right or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpcompile import DPCompileError, dpcompile, make_private
from dpcompile.errors import PrivacyError

X = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3))


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.float().square().mean((1, 2)).mean()


def one_by_one(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Gradients of each sample alone, under the same autocast."""
    found = []
    for i in range(len(x)):
        with torch.autocast(**BF16):
            loss = loss_of(model(x[i : i + 1]))
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    return found


@pytest.mark.parametrize(
    ("method", "compiled"),
    [pytest.param("ghost", False, marks=pytest.mark.slow), ("explicit", False), ("auto", False), ("ghost", True)],
)
def test_under_autocast_it_is_the_model_under_autocast(method: str, compiled: bool) -> None:
    model = net()
    with torch.autocast(**BF16):
        dp_model = dpcompile(model, X, norm_method=method, max_grad_norm=0.05)
    run: Any = torch.compile(dp_model, backend="aot_eager", fullgraph=True) if compiled else dp_model
    with torch.autocast(**BF16):
        outputs = run(X)
        loss_of(outputs).backward()  # within the region, as users write it
    assert outputs.dtype is torch.bfloat16
    truth = one_by_one(model, X)
    norms = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in truth])
    torch.testing.assert_close(dp_model.per_sample_norms, norms, rtol=0.02, atol=0)
    factors = (0.05 / norms).clamp(max=1) / len(X)
    for p, *grads in zip(dp_model.parameters(), *truth, strict=True):
        wanted = sum(f * g for f, g in zip(factors, grads, strict=True))
        assert isinstance(wanted, Tensor)
        assert p.grad is not None
        assert (p.grad - wanted).norm() <= 0.03 * wanted.norm()


def test_norms_are_products_in_float32_under_autocast() -> None:
    with torch.autocast(**BF16):
        dp_model = dpcompile(net(), X, norm_method="ghost")
    assert dp_model.backward_module is not None
    nodes = list(dp_model.backward_module.graph.nodes)
    grams = [n for n in nodes if n.target is torch.ops.aten.bmm.default and n.meta["val"].shape[1:] == (4, 4)]
    assert grams
    assert all(n.meta["val"].dtype is torch.float32 for n in grams)


def test_positions_that_cancel_are_bounded_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 8, bias=False)
    x = torch.randn(1, 32, 64).repeat(1, 2, 1)
    g = torch.randn(1, 32, 8)
    g = 100 * torch.cat([g, -g], 1)
    with torch.autocast(**BF16):
        dp_model = dpcompile(model, x, norm_method="ghost", max_grad_norm=1e-3, loss_reduction="sum")
        (dp_model(x).float() * g).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.double().norm() <= 1e-3 * (1 + 2**-7)  # the gradient of a bfloat16 product is one


@pytest.mark.parametrize("at_compile_time", [False, True])
def test_another_autocast_than_at_compile_time_is_refused(at_compile_time: bool) -> None:
    with torch.autocast(**BF16, enabled=at_compile_time):
        dp_model = dpcompile(net(), X)
    with (
        torch.autocast(**BF16, enabled=not at_compile_time),
        pytest.raises(DPCompileError, match=r"autocast.*Compile again"),
    ):
        dp_model(X)
    with torch.autocast(**BF16), torch.no_grad():
        assert dp_model.eval()(X).dtype is torch.bfloat16  # inference is the model's own


def test_a_model_in_bfloat16() -> None:
    model = net().bfloat16()
    dp_model = dpcompile(model, X.bfloat16(), max_grad_norm=0.05)
    loss_of(dp_model(X.bfloat16())).backward()
    truth = copy.deepcopy(model)
    norms = []
    for i in range(len(X)):
        grads = torch.autograd.grad(loss_of(truth(X[i : i + 1].bfloat16())), list(truth.parameters()))
        norms.append(torch.cat([g.float().flatten() for g in grads]).norm())
    torch.testing.assert_close(dp_model.per_sample_norms, torch.stack(norms), rtol=0.05, atol=0)


def test_loss_scaling_is_refused() -> None:
    """A scaled loss is clipped after scaling, and a step that is skipped for an infinity depends on the data."""
    dp_model = dpcompile(net(), X)
    data = TensorDataset(X, torch.randn(5, 4, 3))
    private = make_private(
        dp_model,
        torch.optim.SGD(dp_model.parameters(), lr=0.1),
        data,
        batch_size=3,
        noise_multiplier=1.0,
        target_delta=1e-3,
        seed=0,
    )
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(private.loader))
    scaler.scale(F.mse_loss(dp_model(x), y)).backward()
    with pytest.raises(PrivacyError, match=r"GradScaler.*bfloat16"):
        scaler.step(private.optimizer)
    assert private.released_steps == 0


def test_products_of_lower_precision_are_refused() -> None:
    dp_model = dpcompile(net(), X)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(DPCompileError, match="set_float32_matmul_precision"):
            loss_of(dp_model(X)).backward()
    finally:
        torch.set_float32_matmul_precision(before)
    loss_of(dp_model(X)).backward()
