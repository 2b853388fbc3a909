"""Parts of the backward that run a second time: the same sums bit for bit, and less memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import all_again, check_module, compile_all, loss_at, randomised, step
from oracle import PerSampleGradients, assert_close, assert_same_gradients, gradients
from selection import every
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from dpcompile import dpcompile
from dpcompile.api import prove
from dpcompile.budget import Schedule, Use
from dpcompile.clipping import clipping_of
from dpcompile.device import CPU
from dpcompile.inline import PHASE
from dpcompile.passes.choose_norms import modelled
from dpcompile.plan import Method
from dpcompile.products import summed
from dpcompile.runtime import DPModule
from dpcompile.twice import twice


class Net(nn.Module):
    """Images, then positions with a shared weight, a dropout and a residual."""

    def __init__(self, kernel: int = 3, width: int = 6, rate: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, kernel, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.shared = nn.Linear(width, width)
        self.drop = nn.Dropout(rate)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = x + self.drop(torch.tanh(self.shared(x)))
        return self.head(self.shared(x).sigmoid().mean(1))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(size=st.integers(3, 6), kernel=st.integers(1, 3), width=st.sampled_from((2, 6)))
def test_every_method_is_exact(size: int, kernel: int, width: int) -> None:
    check_module(Net(kernel, width), torch.randn(3, 2, size, size + 1), methods=("again",), batch_sizes=(3, 0))


@pytest.mark.parametrize(("form", "method"), every(3, itertools.product(("split", "fused"), ("ghost", "paper"))))
def test_sums_are_the_same_bit_for_bit_and_less_is_booked(method: str, form: str) -> None:
    torch.manual_seed(0)
    model, x, y = Net(rate=0.4), torch.randn(8, 2, 16, 16), torch.arange(8) % 3
    loss: dict[str, Any] = {"loss_fn": cross_entropy, "sample_targets": y} if form == "fused" else {}
    analysis = prove(model, x, **loss).conclude()
    plan = analysis.plan(method)
    again = all_again(analysis, plan)
    assert again.again
    assert "computed twice" in again.choices["conv.weight"].reason
    found = []
    for chosen in (plan, again):
        dp_model = DPModule(model, analysis.emit(chosen, clipping_of(analysis.trainable, 0.05)))
        model.zero_grad()
        torch.manual_seed(1)
        with FlopCounterMode(display=False) as counter:
            (dp_model(x, targets=y) if form == "fused" else cross_entropy(dp_model(x), y).mean()).backward()
        assert counter.get_total_flops() == chosen.to_dict()["totals"]["flops"]
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert again.to_dict()["totals"]["flops_again"] > 0
    assert f"{len(again.again)} ops of the backward run twice" in str(again)


class Gated(nn.Module):
    """The gradient of a gate is a sum of products over positions, on its way to earlier layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(h * self.gate(h.mean(1, keepdim=True)).sigmoid()).mean(1)


def test_sums_of_products_that_run_twice_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model, x, y = Gated(), torch.randn(8, 150, 4), torch.arange(8) % 3
    analysis = prove(model, x).conclude()
    plan = analysis.plan("ghost")
    again = all_again(analysis, plan)
    nodes = analysis.backward.program.nodes()
    assert torch.ops.aten.sum.dim_IntList in {nodes[name].target for name in again.again}
    emitted = analysis.emit(again, clipping_of(analysis.trainable, 0.05))
    assert emitted.backward is not None
    fused = emitted.backward.graph.find_nodes(op="call_function", target=summed)
    assert not [node for node in fused if node.name in again.again or node.meta.get(PHASE) == "sum"]
    found = []
    for chosen in (analysis.emit(plan, clipping_of(analysis.trainable, 0.05)), emitted):
        model.zero_grad()
        cross_entropy(DPModule(model, chosen)(x), y).mean().backward()
        found.append(gradients(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_exact(backend: str) -> None:
    check_module(Net(), torch.randn(3, 2, 5, 5), methods=("again",), batch_sizes=(3,), backend=backend)


@pytest.mark.slow
def test_compiled_it_is_not_merged_with_the_first_run() -> None:
    module, x = randomised(Net()), torch.randn(3, 2, 5, 5, dtype=torch.double)
    for method, runs in (("ghost", 1), ("again", 2)):
        seen: list[fx.Node] = []

        def look(graph: fx.GraphModule, _: Any, seen: list[fx.Node] = seen) -> Any:
            seen += graph.graph.find_nodes(op="call_function", target=torch.ops.aten.threshold_backward.default)
            return make_boxed_func(graph)

        torch._dynamo.reset()
        emitted = compile_all(module, x, methods=(method,)).emitted[method]
        step(module, emitted, x, loss_at(0), backend=aot_autograd(fw_compiler=look))
        assert len(seen) == runs


def test_a_sample_that_is_not_finite_still_adds_nothing() -> None:
    module, x = randomised(Net()), torch.randn(3, 2, 5, 5, dtype=torch.double)
    emitted = compile_all(module, x, methods=("again",)).emitted["again"]
    spoilt = x.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    assert step(module, emitted, spoilt, loss_at(0), bound=0.1).nonfinite_samples == 1
    found = gradients(module)
    step(module, emitted, x[[0, 2]], loss_at(0), bound=0.1)
    assert_same_gradients(found, gradients(module), 1e-12)


def test_a_budget_below_what_booking_needs_is_met() -> None:
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(32, 32), nn.Tanh())]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 3)).double(), torch.randn(8, 16, 32).double()
    schedule = prove(model, x).conclude().schedule()
    options = {use.name: dict.fromkeys(use.cost.choices, 0.0) for use in schedule.uses}
    plain = schedule.plain().peak(8)
    assert schedule.least(options, 8).peak > 1.1 * plain
    dp_model = dpcompile(model, x, max_grad_norm=0.1, memory_budget=1.06)
    memory = dp_model.plan.memory
    assert memory is not None
    assert memory.peak <= 1.06 * memory.plain
    assert dp_model.plan.again
    cross_entropy(dp_model(x), torch.arange(8) % 3).mean().backward()
    found = gradients(model)
    rows = [
        torch.autograd.grad(cross_entropy(model(x[i : i + 1]), torch.tensor([i % 3])).sum(), list(model.parameters()))
        for i in range(8)
    ]
    names = [name for name, _ in model.named_parameters()]
    truth = PerSampleGradients({n: torch.stack(g) for n, g in zip(names, zip(*rows, strict=True), strict=True)})
    assert_close(dp_model.per_sample_norms, truth.norms, 1e-8, "norms")
    assert_same_gradients(found, {name: g / 8 for name, g in truth.clipped_sum(0.1).items()}, 1e-8)


def test_no_plan_within_a_budget_is_faster() -> None:
    """All methods and all subsets of the segments, one by one, against the integer programme."""
    layers = [
        nn.Linear(32, 48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.Tanh(),
        nn.Linear(48, 48),
        nn.ReLU(),
        nn.Linear(48, 5),
    ]
    schedule = prove(nn.Sequential(*layers), torch.randn(8, 64, 32)).conclude().schedule()
    times = {use.name: _few(use) for use in schedule.uses}
    again = [2e-5 * (1 + i % 3) for i in range(len(schedule.segments))]
    names = list(times)
    subsets = [chosen for n in range(len(again) + 1) for chosen in itertools.combinations(range(len(again)), n)]
    known = [
        (sum(times[n][m] for n, m in plan.items()) + sum(again[i] for i in chosen), _peak(schedule, plan, chosen))
        for plan in (dict(zip(names, ms, strict=True)) for ms in itertools.product(*(times[n] for n in names)))
        for chosen in subsets
    ]
    assert 100 < len(known) < 3000
    least = min(peak for _, peak in known)
    assert schedule.least(times, 8, again=True).peak == pytest.approx(least, rel=1e-6)
    used = 0
    for factor in (1.0, 1.02, 1.1, 1.3, 2.0):
        found = schedule.fit(times, 8, factor * least * (1 + 1e-9), again)
        best = min(seconds for seconds, peak in known if peak <= factor * least * (1 + 1e-9))
        took = sum(times[n][m] for n, m in found.methods.items()) + sum(again[i] for i in found.again)
        assert took == pytest.approx(best, rel=1e-3)
        assert found.peak == pytest.approx(_peak(schedule, found.methods, found.again))
        used += bool(found.again)
    assert used


def _few(use: Use) -> dict[Method, float]:
    """Two methods that keep nothing, where there are any: with those that do, nothing has to be booked here."""
    times = modelled(use.cost, CPU, 8)
    dropped = [method for method in (Method.GHOST, Method.EXPLICIT) if method in use.cost.choices]
    return {method: times[method] for method in (dropped or use.cost.choices)}


def _peak(schedule: Schedule, methods: Any, again: Any) -> float:
    return schedule.private(methods, again).peak(8)


def test_several_clip_groups_book_as_before() -> None:
    analysis = prove(Net(), torch.randn(3, 2, 5, 5)).conclude()
    clipping = clipping_of(analysis.trainable, 1.0, "abadi", "per-layer")
    assert not analysis.schedule(clipping=clipping).segments
    assert analysis.schedule().segments


def test_random_numbers_are_drawn_once() -> None:
    analysis = prove(Net(rate=0.5), torch.randn(3, 2, 5, 5)).conclude()
    names = {name for segment in analysis.schedule().segments for _, name in segment.ops}
    nodes = [
        node for node in analysis.backward.program.graph.nodes if node.target is torch.ops.aten.native_dropout.default
    ]
    assert len(nodes) == 1
    assert nodes[0].name not in names


def test_a_second_run_reads_the_tensor_itself() -> None:
    x = torch.randn(3)
    assert twice(x, x) is x
