"""The ops of recurrent layers against torch's own layers: every step, every gradient, in any shape and layout."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpcompile import native, recurrent

KINDS = ("lstm", "gru", "tanh", "relu")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1}


def layer(kind: str, d: int, width: int, **options: Any) -> nn.RNNBase:
    if kind in ("tanh", "relu"):
        return nn.RNN(d, width, nonlinearity=kind, batch_first=True, **options)
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](d, width, batch_first=True, **options)


def run(kind: str, gates: Tensor, bias: Tensor | None, weight: Tensor, *state: Tensor) -> tuple[Tensor, Tensor | None]:
    """h of every step, and the last c."""
    if kind == "lstm":
        h, c, _ = recurrent.LSTM(gates, bias, weight, *state)
        return h, c[:, -1]
    if kind == "gru":
        return recurrent.GRU(gates, bias, weight, *state)[0], None
    return recurrent.RNN(gates, bias, weight, *state, kind == "relu"), None


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    looped=st.booleans(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
    batch=st.sampled_from([0, 1, 3, 9, 17, 35]),
    steps=st.integers(1, 4),
    width=st.sampled_from([1, 2, 5, 8, 16, 19, 51]),
    reads=st.sampled_from(["every step", "the last step", "the last c"]),
    sequence_first=st.booleans(),
)
def test_an_op_is_the_layer_of_torch(
    looped: bool, kind: str, dtype: torch.dtype, batch: int, steps: int, width: int, reads: str, sequence_first: bool
) -> None:
    """`looped`: by torch's ops, as where there is no compiler. In bfloat16 layers are narrow: a rectifier near zero of
    one that is not has other values."""
    if dtype is torch.bfloat16:
        batch, width = min(batch, 3), min(width, 5)
    with mock.patch.object(native, "library", return_value=None) if looped else contextlib.nullcontext():
        _same_as_torch(kind, dtype, batch, steps, width, reads, sequence_first)


def _same_as_torch(
    kind: str, dtype: torch.dtype, batch: int, steps: int, width: int, reads: str, sequence_first: bool
) -> None:
    torch.manual_seed(0)
    d = 3
    own = layer(kind, d, width).to(dtype)
    x = torch.randn(batch, steps, d, dtype=dtype, requires_grad=True)
    state = tuple(torch.randn(1, batch, width, dtype=dtype, requires_grad=True) for _ in range(1 + (kind == "lstm")))
    expected, last = own(x, state if kind == "lstm" else state[0])
    gates = F.linear(x, own.weight_ih_l0, own.bias_ih_l0)
    if sequence_first:
        gates = gates.transpose(0, 1).contiguous().transpose(0, 1)
    bias = own.bias_hh_l0.detach().expand(gates.shape).requires_grad_()
    weight = own.weight_hh_l0.detach()
    h, c = run(kind, gates, bias, weight, *(part[0] for part in state))
    close(h, expected)
    if c is not None:
        close(c, last[1][0])
    slope = torch.randn(h.shape, dtype=dtype)
    losses = {
        "every step": (h * slope, expected * slope),
        "the last step": (h[:, -1].square(), expected[:, -1].square()),
        "the last c": (h[:, -1], expected[:, -1]) if c is None else (c.square(), last[1][0].square()),
    }[reads]
    inputs = [x, own.weight_ih_l0, own.bias_ih_l0, *state]
    *found, grad = torch.autograd.grad(losses[0].sum(), [*inputs, bias])
    *truth, of_weight, of_bias = torch.autograd.grad(losses[1].sum(), [*inputs, own.weight_hh_l0, own.bias_hh_l0])
    for a, b in zip(found, truth, strict=True):
        close(a, b)
    close(grad.sum((0, 1)), of_bias)
    close(torch.einsum("btp,btd->pd", grad, recurrent.previous(state[0][0], h)), of_weight)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_bias(kind: str) -> None:
    own = layer(kind, 3, 4, bias=False).double()
    x, zeros = torch.randn(2, 3, 3).double(), torch.zeros(2, 4).double()
    with torch.no_grad():
        h, _ = run(kind, F.linear(x, own.weight_ih_l0), None, own.weight_hh_l0, *[zeros] * (1 + (kind == "lstm")))
        close(h, own(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [1, 2])
def test_no_gradient_of_a_weight_or_a_shared_bias_is_asked_for(kind: str, which: int) -> None:
    count = {"lstm": 4, "gru": 3}.get(kind, 1)
    given = [torch.randn(2, 3, 2 * count), torch.randn(2 * count), torch.randn(2 * count, 2)]
    given[which].requires_grad_()
    h, _ = run(kind, *given, *[torch.zeros(2, 2)] * (1 + (kind == "lstm")))
    with pytest.raises(RuntimeError, match="form no gradient of a weight, nor of a bias"):
        h.sum().backward()


@pytest.mark.parametrize("op", recurrent.OPS)
def test_an_op_is_registered_as_it_is(op: torch._ops.OpOverload) -> None:
    count = {recurrent.LSTM: 4, recurrent.GRU: 3}.get(op, 1)
    states = [torch.randn(3, 2, requires_grad=True) for _ in range(2 if op is recurrent.LSTM else 1)]
    gates = torch.randn(3, 4, 2 * count, requires_grad=True)
    bias = torch.randn(2 * count).expand(gates.shape).requires_grad_()
    relu = (True,) if op is recurrent.RNN else ()
    torch.library.opcheck(op, (gates, bias, torch.randn(2 * count, 2), *states, *relu))


@pytest.mark.parametrize("bias", [torch.ones(3), torch.ones(4, 2, 12), torch.ones(12).double()])
def test_a_bias_that_does_not_fit_is_refused(bias: Tensor) -> None:
    gates, weight, state = torch.ones(4, 5, 12), torch.ones(12, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"is not torch\.float32"):
        recurrent.LSTM(gates, bias, weight, state, state)
