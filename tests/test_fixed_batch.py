"""dynamic=False: graphs for one batch size, with batches padded to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import check_against_oracle, splitting_norm
from selection import every
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zoo import CASES, SAMPLE_BATCH, class_loss

from dpcompile import CaptureError, DPModule, dpcompile, make_private

SIZE, CLASSES = 6, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, CLASSES))


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 5, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def compiled(model: nn.Module, *, fused: bool, **options: Any) -> DPModule:
    x, y = batch(SIZE)
    loss: dict[str, Any] = {"loss_fn": class_loss, "sample_targets": y} if fused else {}
    return dpcompile(model, x, dynamic=False, max_grad_norm=0.5, **loss, **options)


def step(dp_model: DPModule, size: int, *, fused: bool, **weights: Tensor) -> tuple[list[Tensor], Tensor]:
    x, y = batch(size)
    dp_model.zero_grad()
    loss = dp_model(x, targets=y, **weights) if fused else class_loss(dp_model(x, **weights), y).mean()
    loss.backward()
    return [p.grad.clone() for p in dp_model.parameters() if p.grad is not None], dp_model.per_sample_norms.clone()


@pytest.mark.parametrize("fused", every(2, [True, False]))
@pytest.mark.parametrize("wrapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equals_the_graph_of_any_batch_size(fused: bool, wrapped: bool) -> None:
    model = network()
    x, y = batch(SIZE)
    loss: dict[str, Any] = {"loss_fn": class_loss, "sample_targets": y} if fused else {}
    expected = step(dpcompile(model, x, max_grad_norm=0.5, **loss), SIZE, fused=fused)
    dp_model: Any = compiled(model, fused=fused)
    for again in (dp_model, copy.deepcopy(dp_model), pickle.loads(pickle.dumps(dp_model))):
        found = step(torch.compile(again, backend="aot_eager") if wrapped else again, SIZE, fused=fused)
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "lstm"])
def test_real_models_agree_with_one_sample_at_a_time(name: str) -> None:
    case = CASES[name]()
    bound = splitting_norm(case, SAMPLE_BATCH)
    dp_model = dpcompile(case.model, case.sample_input, max_grad_norm=bound, dynamic=False)
    check_against_oracle(case, dp_model, SAMPLE_BATCH, max_grad_norm=bound)


@pytest.mark.parametrize("fused", [False, True])
def test_every_size_is_a_number(fused: bool) -> None:
    dp_model = compiled(network(), fused=fused)
    emitted = dp_model._emitted
    for program in (emitted.forward, emitted.backward):
        sizes = [] if program is None else [n for n in program.graph.nodes if n.target is torch.ops.aten.sym_size.int]
        assert not sizes


@pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 1])
def test_other_sizes_are_refused(size: int) -> None:
    dp_model = compiled(network(), fused=False)
    with pytest.raises(CaptureError, match=rf"{size} samples; compiled with dynamic=False for batches of {SIZE}"):
        dp_model(batch(size)[0])
    step(dp_model, SIZE, fused=False)


@pytest.mark.parametrize("fused", [False, True])
def test_an_empty_batch_has_no_gradient(fused: bool) -> None:
    grads, norms = step(compiled(network(), fused=fused), 0, fused=fused)
    assert norms.shape == (0,)
    assert not any(grad.abs().sum() for grad in grads)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(CaptureError, match="the sample is empty"):
        dpcompile(network(), torch.zeros(0, 5), dynamic=False)


@pytest.mark.parametrize("views", every(2, [2, 3]))
def test_views_count_as_their_sample(views: int) -> None:
    model, (x, y) = network(), batch(SIZE)
    found = []
    for dynamic in (None, False):
        dp_model = dpcompile(model, x, views=views, dynamic=dynamic)
        dp_model.zero_grad()
        class_loss(dp_model(x), y).mean().backward()
        found.append([p.grad.clone() for p in dp_model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_a_private_run_of_padded_batches_is_compiled_once() -> None:
    x, y = batch(40)
    dp_model = compiled(network(), fused=False)
    run = make_private(
        dp_model,
        torch.optim.SGD(dp_model.parameters(), lr=0.1),
        TensorDataset(x, y),
        sample_rate=0.3,
        target_delta=1e-3,
        noise_multiplier=1.0,
        max_physical_batch=SIZE,
        pad=True,
        criterion=lambda out, y: class_loss(out, y).mean(),
    )
    forward = torch.compile(run.dp_model, fullgraph=True, backend="aot_eager")
    stances = iter(["default"])
    steps = 0
    for inputs, targets in run.loader:
        with torch.compiler.set_stance(next(stances, "fail_on_recompile")):
            loss = class_loss(forward(inputs), targets).mean()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        steps += 1
    assert steps > 2
