"""Symbolic costs against torch's own counter, run on the emitted graphs and on a plain step: equal, not close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import (
    AGAIN,
    Apply,
    LoRA,
    Loss,
    TiedLanguageModel,
    compile_all,
    draw,
    folded_loss,
    loss_at,
    randomised,
    step,
)
from selection import every
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import Inputs, call

from dpcompile.shapes import B

IDS = torch.tensor([[0, 1, 2], [5, 3, 4], [4, 4, 1]])
METHODS = (
    "auto",
    "ghost",
    "forced-explicit",
    "forced-kept",
    "forced-shifted",
    "forced-looped",
    "forced-streamed",
    AGAIN,
)

MODULES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "linear of vectors": (lambda: nn.Linear(4, 5), torch.randn(3, 4)),
    "linear of sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)), torch.randn(3, 6, 4)),
    "long sequences, cut into bands": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        torch.randn(3, 203, 4),
    ),
    "shared input": (
        lambda: Apply(lambda m, x: m.u(x) * m.v(x), modules={"u": nn.Linear(4, 5), "v": nn.Linear(4, 5)}),
        torch.randn(3, 6, 4),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2, stride=2)
        ),
        torch.randn(3, 2, 6, 6),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.ConvTranspose1d(4, 2, 3, stride=2)),
        torch.randn(3, 2, 5),
    ),
    "tied embedding": (TiedLanguageModel, IDS),
    "embedding": (lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)), IDS),
    "layer norm and scale": (
        lambda: Apply(lambda m, x: m.n(x) * m.scale, modules={"n": nn.LayerNorm(4)}, scale=(4,)),
        torch.randn(3, 5, 4),
    ),
    "weight used twice": (
        lambda: Apply(lambda m, x: m.f(m.f(x).tanh()), modules={"f": nn.Linear(4, 4)}),
        torch.randn(3, 5, 4),
    ),
    "weight and its transpose": (
        lambda: Apply(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=(5, 4)),
        torch.randn(3, 6, 4),
    ),
    "packed weight": (
        lambda: Apply(lambda m, x: sum(F.linear(x, w).tanh() for w in m.w.chunk(3)), w=(12, 4)),
        torch.randn(3, 5, 4),
    ),
    "low rank": (lambda: Apply(lambda m, x: x @ (m.a @ m.b), a=(4, 2), b=(2, 5)), torch.randn(3, 6, 4)),
    "lora": (LoRA, torch.randn(3, 6, 4)),
    "heads by matmul": (lambda: Apply(lambda m, x: x @ m.w, w=(2, 4, 5)), torch.randn(3, 2, 6, 4)),
    "fallback": (lambda: Apply(lambda m, x: torch.tensordot(x, m.w, 1), w=(4, 5)), torch.randn(3, 6, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True),
        torch.randn(3, 5, 4),
    ),
}


@pytest.mark.parametrize("name", every(3, MODULES))
def test_flops_equal_the_counted_ones(name: str) -> None:
    build, sample = MODULES[name]
    module = randomised(build())
    sample = sample.double() if sample.is_floating_point() else sample
    compiled = compile_all(module, sample, methods=METHODS)
    differences = []
    for batch_size in (2, 5):
        inputs = draw(compiled.analysis, sample, batch_size)
        plain = _counted(lambda inputs=inputs: loss_at(0)(call(module, inputs)).sum().backward())
        _compare(differences, f"plain, B={batch_size}", compiled.plan.plain_flops(), batch_size, plain)
        for method, emitted in compiled.emitted.items():
            found = _counted(lambda e=emitted, inputs=inputs: step(module, e, inputs, loss_at(0)))
            _compare(differences, f"{method}, B={batch_size}", emitted.plan.flops(), batch_size, found)
    assert not differences, "\n".join(differences)


def test_flops_of_groups_equal_the_counted_ones() -> None:
    """The private step only: torch 2.13 counts the plain weight gradient of a grouped convolution `groups` times."""
    module = randomised(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2)))
    sample = torch.randn(3, 2, 5, 5, dtype=torch.double)
    for emitted in compile_all(module, sample, methods=METHODS).emitted.values():
        found = _counted(lambda e=emitted: step(module, e, sample, loss_at(0)))
        assert int(emitted.plan.flops().subs(B, 3)) == found


@pytest.mark.parametrize(
    "layer", every(2, [nn.LSTM(4, 3, batch_first=True), nn.GRU(4, 3, bidirectional=True, batch_first=True)])
)
def test_flops_of_recurrent_layers_equal_the_counted_ones(layer: nn.RNNBase) -> None:
    """The private step only: plain training's takes no product with a first state of zeros, forward or backward."""
    module = randomised(Apply(lambda m, x: m.f(x)[0], modules={"f": layer}))
    sample = torch.randn(3, 5, 4, dtype=torch.double)
    methods = tuple(m for m in METHODS if m != "forced-explicit")  # both biases of an LSTM have one sum then
    for emitted in compile_all(module, sample, methods=methods).emitted.values():
        found = _counted(lambda e=emitted: step(module, e, sample, loss_at(0)))
        assert int(emitted.plan.flops().subs(B, 3)) == found


def test_flops_of_folded_rows_equal_the_counted_ones() -> None:
    module = randomised(nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    sample = torch.randn(3, 6, 4, dtype=torch.double)
    loss: Loss = folded_loss(6)
    compiled = compile_all(module, sample, methods=("ghost",))
    emitted = compiled.emitted["ghost"]
    found = _counted(lambda: step(module, emitted, sample, loss))
    assert int(emitted.plan.flops().subs(B, 3)) == found


def _counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _compare(differences: list[str], label: str, expression: Any, batch_size: int, found: int) -> None:
    claimed = int(expression.subs(B, batch_size))
    if claimed != found:
        differences.append(f"{label}: the plan says {claimed} ({expression}), counted {found}")
