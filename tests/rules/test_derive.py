"""Values computed from parameters before they meet a sample: views, products, normalised and adapted weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import Apply, LoRA, check_module
from selection import every
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

T, D, P = 3, 4, 5

# name: (function, parameters, expected spaces in which norms are taken)
DERIVED: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], set[str]]] = {
    "transpose": (lambda m, x: x @ m.w.t(), {"w": (P, D)}, {"parameter"}),
    "permutation": (lambda m, x: F.conv1d(x, m.w.permute(2, 1, 0)), {"w": (2, T, P)}, {"parameter"}),
    "mT of three dimensions": (lambda m, x: x.unsqueeze(1) @ m.w.mT, {"w": (2, P, D)}, {"parameter"}),
    "view": (lambda m, x: F.linear(x, m.w.view(P, D)), {"w": (P * D,)}, {"value"}),
    "flattened kernel": (lambda m, x: F.linear(x, m.w.flatten(1)), {"w": (P, 2, 2)}, {"value"}),
    "slice": (lambda m, x: F.linear(x, m.w[1 : P + 1]), {"w": (P + 2, D)}, {"value"}),
    "every second row": (lambda m, x: F.linear(x, m.w[::2]), {"w": (P, D)}, {"value"}),
    "row picked by a number": (lambda m, x: x * m.w[-1], {"w": (2, D)}, {"value"}),
    "rows picked by a constant": (lambda m, x: F.linear(x, m.w[torch.tensor([2, 0])]), {"w": (P, D)}, {"value"}),
    "rows picked twice": (lambda m, x: F.linear(x, m.w[torch.tensor([2, 0, 2])]), {"w": (P, D)}, {"pullback"}),
    "flip and roll": (lambda m, x: F.linear(x, m.w.flip(0).roll(1, 1)), {"w": (P, D)}, {"value"}),
    "diagonal": (lambda m, x: x * m.w.diagonal(), {"w": (D, D)}, {"value"}),
    "rows expanded": (lambda m, x: F.linear(x, m.w.expand(P, D)), {"w": (1, D)}, {"pullback"}),
    "two thirds and a third": (
        lambda m, x: F.linear(x, m.w[: 2 * D]).chunk(2, -1)[0] * F.linear(x, m.w[2 * D :]),
        {"w": (3 * D, D)},
        {"value"},
    ),
    "packed in three by chunk": (
        lambda m, x: sum(F.linear(x, w).tanh() * k for k, w in enumerate(m.w.chunk(3), 1)),
        {"w": (3 * D, D)},
        {"value"},
    ),
    "packed in two by unbind": (
        lambda m, x: F.linear(x, m.w.unbind(0)[0]) * F.linear(x, m.w.unbind(0)[1]),
        {"w": (2, P, D)},
        {"value"},
    ),
    "packed by split, one part unused": (
        lambda m, x: F.linear(x, m.w.split([2, P - 2])[1]),
        {"w": (P, D)},
        {"value"},
    ),
    "overlapping slices": (
        lambda m, x: F.linear(x, m.w[: P - 1]) * F.linear(x, m.w[1:]),
        {"w": (P, D)},
        {"pullback"},
    ),
    "whole and slice": (
        lambda m, x: F.linear(x, m.w).sum(-1, keepdim=True) * F.linear(x, m.w[:1]),
        {"w": (P, D)},
        {"pullback"},
    ),
    "scaled by a number": (lambda m, x: F.linear(x, m.w * 0.5), {"w": (P, D)}, {"pullback"}),
    "equalised learning rate": (lambda m, x: F.linear(x, m.w * (2 / D) ** 0.5, m.b), {"w": (P, D), "b": (P,)}, set()),
    "masked": (lambda m, x: F.linear(x, m.w.tril()), {"w": (D, D)}, {"pullback"}),
    "low rank": (lambda m, x: x @ (m.a @ m.b), {"a": (D, 2), "b": (2, P)}, {"pullback"}),
    "low rank, factors apart": (lambda m, x: x @ m.a @ m.b, {"a": (D, 2), "b": (2, P)}, {"parameter"}),
    "weight and low-rank update": (
        lambda m, x: F.linear(x, m.w + 0.5 * (m.a @ m.b)),
        {"w": (P, D), "a": (P, 2), "b": (2, D)},
        {"pullback"},
    ),
    "softmax": (lambda m, x: F.linear(x, m.w.softmax(0)), {"w": (P, D)}, {"pullback"}),
    "softplus of a scale": (lambda m, x: x * F.softplus(m.w), {"w": (D,)}, {"pullback"}),
    "concatenated": (lambda m, x: F.linear(x, torch.cat([m.a, m.b])), {"a": (2, D), "b": (3, D)}, {"pullback"}),
    "stacked": (lambda m, x: F.linear(x, torch.stack([m.a, m.b])), {"a": (D,), "b": (D,)}, {"pullback"}),
    "symmetric": (lambda m, x: F.linear(x, m.w + m.w.t()), {"w": (D, D)}, {"pullback"}),
    "matrix exponential of a skew matrix": (
        lambda m, x: F.linear(x, torch.linalg.matrix_exp(m.w - m.w.t())),
        {"w": (D, D)},
        {"pullback"},
    ),
    "kernel made by a small network": (
        lambda m, x: F.linear(x, (m.z @ m.u).tanh() @ m.v),
        {"z": (P, 2), "u": (2, 3), "v": (3, D)},
        {"pullback"},
    ),
    "table of positions, summed": (lambda m, x: x + m.table.cumsum(0), {"table": (T, D)}, {"pullback"}),
    "scale shared through two formulas": (
        lambda m, x: x * m.w.exp() + m.w.square(),
        {"w": (D,)},
        {"pullback"},
    ),
}


@pytest.mark.parametrize("name", every(3, DERIVED))
def test_derived_value(name: str) -> None:
    function, parameters, spaces = DERIVED[name]
    found = check_module(Apply(function, **parameters), torch.randn(3, T, D))
    assert not spaces or set(found.spaces.values()) == spaces


def test_rows_picked_by_a_buffer_are_carried_back() -> None:
    """What a buffer holds can change after compilation, so distinct rows must not be assumed."""
    module = Apply(lambda m, x: F.linear(x, m.w[m.rows]), w=(P, D))
    module.register_buffer("rows", torch.tensor([0, 2, 4]))
    found = check_module(module, torch.randn(3, T, D))
    assert found.spaces == {"w": "pullback"}


def test_weight_norm_as_a_parametrization() -> None:
    check_module(parametrizations.weight_norm(nn.Linear(D, P)), torch.randn(3, T, D))


def test_weight_norm_of_a_convolution() -> None:
    check_module(parametrizations.weight_norm(nn.Conv1d(D, P, 2)), torch.randn(3, D, T))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_as_a_hook() -> None:
    check_module(weight_norm(nn.Linear(D, P), dim=None), torch.randn(3, T, D))


def test_orthogonal_parametrization() -> None:
    check_module(
        parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="matrix_exp"),
        torch.randn(3, T, D),
        batch_sizes=(3,),
    )


def test_lora_leaves_the_base_alone() -> None:
    module = LoRA()
    found = check_module(nn.Sequential(module, nn.Tanh()), torch.randn(3, T, D))
    assert {site.value for site in found.analysis.uses.sites} == {"p_model_0_down_weight", "p_model_0_up_weight"}
    assert module.base.weight.grad is None


def test_linear_in_half_of_the_input_through_a_buffer_mask() -> None:
    module = Apply(lambda m, x: F.linear(x, m.w * m.mask), w=(P, D))
    module.register_buffer("mask", (torch.rand(P, D) > 0.5).double())
    check_module(module, torch.randn(3, T, D))


def test_a_value_used_by_two_sites_is_carried_back_once() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        w = m.a @ m.b
        return F.linear(F.linear(x, w).tanh(), w)

    check_module(Apply(run, a=(D, 2), b=(2, D)), torch.randn(3, T, D))


def test_spectral_norm_equals_autograd_step_by_step() -> None:
    """Its buffers follow from the weights alone, so the values written back are no leak."""
    module = parametrizations.spectral_norm(nn.Linear(D, P))
    check_spectral(module)


def check_spectral(module: nn.Module) -> None:
    from copy import deepcopy

    from dpcompile import dpcompile

    module = module.double()
    plain = deepcopy(module)
    dp_model = dpcompile(module, torch.randn(3, D, dtype=torch.double), max_grad_norm=float("inf"))
    x = torch.randn(4, D, dtype=torch.double)
    for _ in range(2):
        for model in (dp_model, plain):
            model.zero_grad()
            model(x).square().sum(1).mean().backward()
        for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9), name
        for (name, ours), theirs in zip(module.named_buffers(), plain.buffers(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9), name
