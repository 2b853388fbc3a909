"""What compilers make again for the backward: the same results, and less held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same_gradients, gradients
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from dpcompile import dpcompile
from dpcompile.ir import Program
from dpcompile.memory import Storages
from dpcompile.runtime import DPModule
from dpcompile.seed import OP as SEED


class Images(nn.Module):
    """Norms, maxima and a residual."""

    def __init__(self, width: int = 4, affine: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, width, affine=affine) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norms[0](self.first(x))), 2)
        for norm, conv in zip(self.norms[1:], self.convs, strict=True):
            x = x + F.gelu(norm(conv(x)), approximate="tanh")
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Products with few parameters, of what is made from others."""

    def __init__(self, width: int = 4, rate: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.up.weight.requires_grad_(False)
        self.small = nn.Linear(4 * width, 2, bias=False)
        self.drop = nn.Dropout(rate)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y = self.drop(F.gelu(self.up(self.norm(x)), approximate="tanh"))
        x = x + self.down(y) + self.small(y).sum(-1, keepdim=True)
        return self.head(x.mean(1))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def fused(model: nn.Module, x: Tensor, **options: Any) -> tuple[DPModule, Tensor]:
    y = torch.arange(len(x)) % 3
    loss: dict[str, Any] = {"loss_fn": cross_entropy, "sample_targets": y, "validate": "off"}
    return dpcompile(model, x, max_grad_norm=options.pop("bound", 0.05), **loss, **options), y


def sample(model: nn.Module, size: int = 6, batch_size: int = 4) -> Tensor:
    if isinstance(model, Images):
        return torch.randn(batch_size, 2, size, size, dtype=torch.double)
    return torch.randint(11, (batch_size, size))


def results(program: Program, dp_model: DPModule, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of the graph, op by op."""
    torch.manual_seed(3)
    with torch.no_grad():
        found = program.module(*dp_model._primals(program, [x, y]), torch.full((1,), 0.05), torch.ones(len(x)))
    return [value for value in found if isinstance(value, Tensor)]


def compiled_results(dp_model: DPModule, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of what compilers are given, in the order of the whole graph."""
    emitted = dp_model._emitted
    assert emitted.sums is not None
    torch.manual_seed(3)
    with torch.no_grad():
        primals = dp_model._primals(emitted.compiled, [x, y])
        made = emitted.compiled.module(*primals, torch.full((1,), 0.05))
        own, (norms, *saved) = made[: len(emitted.own)], made[len(emitted.own) :]
        return [*own, *emitted.sums.module(*saved, torch.ones(len(x))), norms]


def held(program: Program) -> float:
    """Numbers for each sample that the backward reads from the forward."""
    storages, order = Storages(program), list(program.graph.nodes)
    (seed,) = (i for i, node in enumerate(order) if node.target is SEED)
    made = {node.name for node in order[:seed]}
    roots = {r for node in order[seed + 1 :] for source in node.all_input_nodes for r in storages.of(source)}
    return sum(storages.sizes[root].each for root in roots if root[0] in made) / 8


@pytest.mark.slow
@settings(max_examples=2, deadline=None, derandomize=True)
@given(size=st.integers(4, 7), width=st.sampled_from((2, 4)), affine=st.booleans())
def test_results_are_the_same(size: int, width: int, affine: bool) -> None:
    for model in (Images(width, affine), Tokens(width, 0.3)):
        dp_model, _ = fused(model.double(), sample(model, size))
        x = sample(model, size, 3)
        emitted, y = dp_model._emitted, torch.arange(3)
        torch.manual_seed(0)
        expected = results(emitted.forward, dp_model, x, y)
        torch.testing.assert_close(compiled_results(dp_model, x, y), expected, rtol=1e-11, atol=1e-12)


def test_less_is_held() -> None:
    """Of images: before ReLU, maxima and both of gelu's inputs; of tokens: before gelu, and norms by statistics."""
    for model, most in ((Images(8), 0.75), (Tokens(8), 0.6)):
        dp_model, _ = fused(model.double(), sample(model, 16))
        before, after = held(dp_model._emitted.forward), held(dp_model._emitted.compiled)
        assert after < most * before, (after, before)


@pytest.mark.slow
def test_no_compiler_merges_the_copies() -> None:
    model = Images().double()
    dp_model, y = fused(model, x := sample(model))
    seen: list[fx.Node] = []

    def look(graph: fx.GraphModule, _: Any) -> Any:
        seen.extend(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    torch.compile(lambda: dp_model(x, targets=y), backend=aot_autograd(fw_compiler=look), fullgraph=True)().backward()
    assert len(seen) == 2
    found = gradients(model)
    model.zero_grad()
    dp_model(x, targets=y).backward()
    assert_same_gradients(found, gradients(model), 1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [Tokens, pytest.param(Images, marks=pytest.mark.slow)])
def test_without_clipping_it_is_plain_training(build: type[nn.Module], backend: str) -> None:
    model = build().double()
    dp_model, y = fused(model, x := sample(model), bound=float("inf"))
    torch._dynamo.reset()
    torch.compile(lambda: dp_model(x, targets=y), backend=backend, fullgraph=True)().backward()
    found = gradients(model)
    model.zero_grad()
    cross_entropy(model(x), y).mean().backward()
    assert_same_gradients(found, gradients(model), 1e-10)


class Residuals(nn.Module):
    """Sums that go through the whole model."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.mean(1)[:, :3]


def test_sums_through_the_model_are_not_made_from_its_beginning() -> None:
    torch.manual_seed(0)
    counts = []
    for depth in (3, 5, 7):
        dp_model, _ = fused(Residuals(depth).double(), torch.randn(4, 16, 8, dtype=torch.double))
        emitted = dp_model._emitted
        assert emitted.sums is not None
        made = len(emitted.compiled.graph.nodes) + len(emitted.sums.graph.nodes)
        counts.append(made - len(emitted.forward.graph.nodes))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_free_lengths_stay_free() -> None:
    model = Tokens().double()
    dp_model, _ = fused(model, sample(model, 6), dynamic={"tokens": {1}})
    for length in (3, 9):
        x, y = sample(model, length, 5), torch.arange(5) % 3
        expected = results(dp_model._emitted.forward, dp_model, x, y)
        torch.testing.assert_close(compiled_results(dp_model, x, y), expected, rtol=1e-11, atol=1e-12)


def test_the_split_form_has_one_forward_for_all() -> None:
    emitted = dpcompile(Tokens(), sample(Tokens()), validate="off")._emitted
    assert emitted.compiled is emitted.forward


class Diamonds(nn.Module):
    """Two ways through each of many sums, the last of which the backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(60):
            y = y.floor() + y
        return self.head(self.first(x) * (y / 2**60))


def test_many_ways_to_a_value_take_no_time() -> None:
    model = Diamonds().double()
    dp_model, y = fused(model, x := torch.randn(4, 4, dtype=torch.double))
    emitted = dp_model._emitted
    assert emitted.sums is not None
    assert len(emitted.compiled.graph.nodes) + len(emitted.sums.graph.nodes) > len(emitted.forward.graph.nodes) + 60
    expected = results(emitted.forward, dp_model, x, y)
    torch.testing.assert_close(compiled_results(dp_model, x, y), expected, rtol=1e-11, atol=1e-12)
