"""Recurrent layers: one op for each layer and direction, exact for every use of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import FORCED, Apply, check_module, folded_loss, loss_at, randomised
from oracle import assert_close
from selection import every
from test_recurrent import KINDS, layer
from torch import Tensor, nn

from dpcompile import dpcompile, recurrent
from dpcompile.errors import BatchMixingError

B, T, D, H = 3, 3, 4, 5
FEW = ("auto", "forced-explicit")


def outputs(kind: str, **options: Any) -> Apply:
    """A model that gives h of every step."""
    return Apply(lambda m, x: m.f(x)[0], modules={"f": layer(kind, D, H, **options)})


def everything(m: Any, x: Tensor) -> Tensor:
    """h of every step and all last states, as one row for each sample."""
    result, last = m.f(x)
    states = last if isinstance(last, tuple) else (last,)
    return torch.cat([result.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)


OPTIONS: list[dict[str, Any]] = [{}, {"bias": False}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}]


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    kind=st.sampled_from(["lstm", "gru", "tanh"]),  # a few rectified units may all be dead
    steps=st.integers(1, 4),
    d=st.integers(1, 3),
    width=st.integers(1, 3),
    options=st.sampled_from(OPTIONS),
)
def test_layer(kind: str, steps: int, d: int, width: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Apply(everything, modules={"f": layer(kind, d, width, **options)})
    sizes = (3, 1, 0)
    found = check_module(module, torch.randn(B, steps, d), methods=("ghost", "forced-explicit"), batch_sizes=sizes)
    assert set(found.rules.values()) == {"contraction", "recurrence"}


@pytest.mark.parametrize("kind", ["lstm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_every_method(kind: str) -> None:
    found = check_module(outputs(kind), torch.randn(B, T, D), methods=FORCED)
    assert {rule for name, rule in found.rules.items() if name.startswith(("lstm", "gru", "rnn"))} == {"recurrence"}
    ops = [node.target for node in found.emitted["auto"].forward.graph.nodes]
    assert sum(op in recurrent.OPS for op in ops) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_sequence_first(kind: str) -> None:
    own = layer(kind, D, H, num_layers=2, bidirectional=True)
    own.batch_first = False
    module = Apply(lambda m, x: m.f(x)[0], modules={"f": own})
    check_module(module, (torch.randn(T, B, D),), batched=[1], loss=loss_at(1), methods=FEW)


@pytest.mark.parametrize("kind", ["lstm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_first_states_that_are_parameters(kind: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        states = tuple(start.expand(1, x.shape[0], -1).contiguous() for start in (m.h, m.c))
        return m.f(x, states if isinstance(m.f, nn.LSTM) else states[0] * states[1])[0]

    module = Apply(run, modules={"f": layer(kind, D, 3)}, h=(1, 1, 3), c=(1, 1, 3))
    check_module(module, torch.randn(B, T, D), batch_sizes=(3, 1), methods=FEW)


def test_first_states_that_are_inputs() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.LSTM(D, 3, batch_first=True), nn.LSTM(D, 3, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            _, state = self.encode(x)
            return self.decode(y, state)[0]

    check_module(Decoder(), {"x": torch.randn(B, T, D), "y": torch.randn(B, 2, D)}, methods=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_one_layer_called_twice(kind: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.f(m.f(x)[0].flip(1))[0]

    found = check_module(Apply(run, modules={"f": layer(kind, D, D)}), torch.randn(B, T, D), methods=FORCED)
    assert found.emitted["ghost"].plan.method("f.weight_hh_l0").value == "ghost"


@pytest.mark.slow
def test_one_weight_of_two_layers() -> None:
    first, second = layer("lstm", D, 3), layer("lstm", 3, 3)
    second.weight_hh_l0 = first.weight_hh_l0
    second.bias_ih_l0 = second.bias_hh_l0  # both are added to the gates
    module = Apply(lambda m, x: m.v(m.u(x)[0])[0], modules={"u": first, "v": second})
    check_module(module, torch.randn(B, T, D), methods=FORCED)


@pytest.mark.parametrize("frozen", every(2, ["weight_hh", "bias_hh", "_ih", "weight"]))
def test_frozen_parts(frozen: str) -> None:
    module = outputs("gru")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name)
    check_module(module, torch.randn(B, T, D), batch_sizes=(3, 1), methods=FEW)


def test_a_weight_that_is_computed() -> None:
    own = nn.utils.parametrizations.weight_norm(layer("lstm", D, 3), "weight_hh_l0")
    check_module(Apply(lambda m, x: m.f(x)[0], modules={"f": own}), torch.randn(B, T, D), methods=FEW)


def test_a_batch_folded_with_windows() -> None:
    """Windows of a sequence become rows beside the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.f(x.flatten(0, 1))[0][:, -1]

    module = Apply(run, modules={"f": layer("gru", D, 3)})
    check_module(module, torch.randn(B, 2, T, D), loss=folded_loss(2), methods=FORCED)


@pytest.mark.slow
def test_a_layer_without_samples() -> None:
    """A prompt that is computed from parameters by a recurrent layer, as in p-tuning."""

    def run(m: Any, x: Tensor) -> Tensor:
        prompt, _ = m.f(m.prompt)
        return x + prompt

    module = Apply(run, modules={"f": layer("lstm", D, D)}, prompt=(1, T, D))
    found = check_module(module, torch.randn(B, T, D), batch_sizes=(3, 1), methods=("auto",))
    assert set(found.rules.values()) == {"broadcast"}


def test_a_projection_is_written_out_step_by_step() -> None:
    module = outputs("lstm", proj_size=2)
    found = check_module(module, torch.randn(B, 2, D), batch_sizes=(3, 1), methods=FEW)
    assert set(found.rules.values()) == {"contraction"}


def test_the_batch_is_not_a_sequence() -> None:
    """A layer with the sequence first is given the batch first."""
    with pytest.raises(BatchMixingError, match=r"as if they were the steps of one sequence.*\n.*batch_first=True"):
        dpcompile(nn.Sequential(nn.Linear(D, D), nn.RNN(D, H)), torch.randn(B, T, D))


@pytest.mark.parametrize("kind", ["lstm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_compiled(kind: str) -> None:
    sizes = (3, 1, 0)
    check_module(outputs(kind), torch.randn(B, T, D), batch_sizes=sizes, methods=("ghost",), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm", "tanh"])
def test_dropout_between_layers_is_applied_with_one_mask(kind: str) -> None:
    """With all of it dropped the second layer sees zeros; with half, norms and gradients see the same half."""
    x = torch.randn(1, T, D).double()
    for rate in (1 - 1e-12, 0.5):
        module = randomised(outputs(kind, num_layers=2, dropout=rate))
        dp_model = dpcompile(module, x.expand(B, -1, -1), max_grad_norm=float("inf"))
        for seed in range(3):
            torch.manual_seed(seed)
            module.zero_grad()
            result = dp_model(x)
            result.square().sum().backward()
            norm = sum(p.grad.square().sum() for p in module.parameters()).sqrt()
            assert_close(dp_model.per_sample_norms, norm.reshape(1), 1e-10, "norm")
            if rate > 0.5:
                assert_close(result.detach(), module(0 * x).detach(), 1e-8, "of zeros")
                assert not module.f.weight_ih_l0.grad.any()
            else:
                assert module.f.weight_ih_l0.grad.any()
    dp_model.eval()
    assert torch.equal(dp_model(x), module(x))


def test_a_sample_that_is_not_finite_adds_nothing() -> None:
    module = randomised(outputs("lstm"))
    x = torch.randn(B, T, D).double()
    dp_model = dpcompile(module, x, max_grad_norm=0.1)
    x[1, 1, 0] = torch.inf
    dp_model(x).sum().backward()
    assert dp_model.nonfinite_samples == 1
    assert all(p.grad.isfinite().all() for p in module.parameters())
