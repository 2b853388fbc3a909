"""Sums of products in one pass, and where a graph has them."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from dpcompile import dpcompile, group_norm, native, products


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 4, 5, 8, 9, 16, 17, 70, 130]), min_size=1, max_size=4),
    dims=st.sets(st.integers(0, 3), min_size=1),
    with_shift=st.booleans(),
    with_scale=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    beside=st.booleans(),
    keepdim=st.booleans(),
)
def test_a_sum_is_that_of_the_products(
    shape: list[int],
    dims: set[int],
    with_shift: bool,
    with_scale: bool,
    dtype: torch.dtype,
    beside: bool,
    keepdim: bool,
) -> None:
    summed = sorted(dim for dim in dims if dim < len(shape))
    assume(summed and torch.Size(shape).numel() < 10**6)
    front = products.lead(len(shape), summed)
    assume(front is not None)
    torch.manual_seed(0)
    x, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    each = torch.randn([*shape[:front], *(1 for _ in shape[front:])], dtype=torch.float64)
    shift, scale = each if with_shift else None, each + 2 if with_scale else None
    truth = ((x - (each if with_shift else 0)) * (each + 2 if with_scale else 1) * grad).sum(summed, keepdim)
    given = [None if t is None else t.to(dtype) for t in (x, shift, scale, grad)]
    if not beside:  # in another layout: by the ops of torch
        given[0] = given[0].mT.contiguous().mT if len(shape) > 1 else given[0]  # type: ignore[union-attr]
    with patch.object(products, "FEW", 0):
        found = products.summed(*given, summed, keepdim)  # type: ignore[arg-type]
    assert found.dtype is dtype
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(found.double(), truth, **close)


def test_numbers_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="products"):
        native.products(x, None, torch.randn(5), x, (2, 3, 4, 1))
    with pytest.raises(RuntimeError, match="products"):
        native.products(x, None, None, x.double(), (2, 3, 4, 1))


class Scaled(nn.Module):
    """A scale of features, behind a layer norm, and before a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.layer, self.group = nn.Linear(6, 8), nn.LayerNorm(8), nn.GroupNorm(5, 5)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group(self.layer(self.project(x)).tanh() * self.scale)


def test_norm_layers_and_scales_have_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(3, 5, 6)
    dp_model = dpcompile(model, x, max_grad_norm=0.5)
    assert dp_model._emitted.backward is not None
    graph = dp_model._emitted.backward.module.graph
    calls = graph.find_nodes(op="call_function", target=products.summed)
    assert sorted(sum(t is not None for t in node.args[:4]) for node in calls) == [2, 4]

    def gradients() -> tuple[list[Any], torch.Tensor]:
        model.zero_grad()
        dp_model(x).square().sum((1, 2)).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], dp_model.per_sample_norms

    found = gradients()
    monkeypatch.setattr(products, "is_native", lambda _: False)
    torch.testing.assert_close(found, gradients())


def test_output_gradients_are_scaled_in_their_own_place() -> None:
    """Those that were computed; not what the caller hands over, nor what the forward has saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    x, handed = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    dp_model = dpcompile(model, x, max_grad_norm=0.5)
    assert dp_model._emitted.backward is not None
    graph = dp_model._emitted.backward.module.graph
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.mul_.Tensor)) == 1
    out, before = dp_model(x), (x.clone(), handed.clone())
    out.backward(handed, retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert torch.equal(x, before[0])
    assert torch.equal(handed, before[1])
    model.zero_grad()
    out.backward(handed)
    torch.testing.assert_close([p.grad for p in model.parameters()], first, rtol=0, atol=0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    samples=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 5]),
    each=st.sampled_from([1, 3, 4]),
    size=st.lists(st.sampled_from([1, 2, 3, 7, 16, 33, 70]), min_size=1, max_size=2),
    scaled=st.booleans(),
    mean=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kernel=st.booleans(),
)
def test_group_norms_backward_is_that_of_torch(
    samples: int, groups: int, each: int, size: list[int], scaled: bool, mean: float, dtype: torch.dtype, kernel: bool
) -> None:
    torch.manual_seed(0)
    channels, places = groups * each, torch.Size(size).numel()
    x, grad = (torch.randn(samples, channels, *size, dtype=torch.float64) for _ in range(2))
    x, weight = x + mean, torch.rand(channels, dtype=torch.float64) + 0.5 if scaled else None
    sizes = (samples, channels, places, groups)
    kept = torch.native_group_norm(x, weight, None, *sizes, 1e-5)[1:]
    tensors = (grad, x, *kept, weight)
    truth = [group_norm.OP(*tensors, *sizes, [True, False, False])[0]]
    truth += [(x * grad).flatten(2).sum(2), grad.flatten(2).sum(2)]
    given = [None if t is None else t.to(dtype) for t in tensors]
    with patch.object(group_norm, "FEW", 0 if kernel else math.inf):
        found = group_norm.backward(*given, *sizes)  # type: ignore[arg-type]
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-10}
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype is dtype
        torch.testing.assert_close(value.double(), expected, **close)


def test_numbers_of_group_norm_that_do_not_fit_are_refused() -> None:
    x, kept = torch.randn(2, 4, 3), torch.randn(2, 2)
    with pytest.raises(RuntimeError, match="group norm"):
        native.group_norm_backward(x, x, kept, kept, torch.randn(3), (2, 4, 3, 2))
    with pytest.raises(RuntimeError, match="group norm"):
        native.group_norm_backward(x, x.double(), kept, kept, None, (2, 4, 3, 2))


class Frozen(nn.Sequential):
    """Convolutions with group norms between them, of which the first has a scale alone that is trained."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.GroupNorm(4, 4, affine=False),
            nn.ReLU(), nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6),
        )  # fmt: skip
        self[1].bias.requires_grad_(False)


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim() if isinstance(node.meta.get("val"), torch.Tensor) else 0


def test_group_norms_have_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """But the one that has nothing to train."""
    torch.manual_seed(0)
    model, x = Frozen(), torch.randn(3, 3, 12, 12)
    dp_model = dpcompile(model, x, max_grad_norm=0.5)
    assert dp_model._emitted.backward is not None
    graph = dp_model._emitted.backward.module.graph
    assert len(graph.find_nodes(op="call_function", target=group_norm.backward)) == 2
    assert len(graph.find_nodes(op="call_function", target=group_norm.OP)) == 1
    left = {products.summed, torch.ops.aten.mul.Tensor}
    assert not left & {node.target for node in graph.nodes if 4 in map(_rank, node.all_input_nodes)}

    def gradients() -> tuple[list[Any], torch.Tensor]:
        model.zero_grad()
        dp_model(x).square().sum((1, 2, 3)).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], dp_model.per_sample_norms

    monkeypatch.setattr(group_norm, "FEW", 0)
    found = gradients()
    monkeypatch.setattr(group_norm, "is_native", lambda _: False)
    torch.testing.assert_close(found, gradients())
