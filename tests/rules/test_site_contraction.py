"""Parameters in products: linear, mm, addmm, bmm, baddbmm, matmul, mv, einsum, on either side, in any layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import FORCED, Apply, check_module, folded_loss, loss_at
from torch import nn

small = settings(max_examples=4, deadline=None, derandomize=True)


@small
@given(lead=st.lists(st.integers(1, 3), max_size=3), d=st.integers(1, 4), p=st.integers(1, 4), bias=st.booleans())
def test_linear_of_any_rank(lead: list[int], d: int, p: int, bias: bool) -> None:
    found = check_module(nn.Linear(d, p, bias=bias), torch.randn(3, *lead, d))
    assert set(found.rules.values()) == {"contraction"}


T, D, P, H = 3, 4, 5, 2

PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    # name: (function, parameters, shape of a sample)
    "mm, parameter right": (lambda m, x: x.mm(m.w), {"w": (D, P)}, (D,)),
    "mm, parameter left and transposed": (lambda m, x: m.w.mm(x.t()).t(), {"w": (P, D)}, (D,)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), {"w": (D, P), "b": (P,)}, (D,)),
    "addmm with alpha and beta": (
        lambda m, x: torch.addmm(m.b, x, m.w, alpha=0.5, beta=-2.0),
        {"w": (D, P), "b": (1, P)},
        (D,),
    ),
    "bmm, parameter right, expanded": (
        lambda m, x: x.bmm(m.w.unsqueeze(0).expand(x.shape[0], -1, -1)),
        {"w": (D, P)},
        (T, D),
    ),
    "bmm over heads, batch in the rows": (
        lambda m, x: x.transpose(0, 1).bmm(m.w).transpose(0, 1),
        {"w": (H, D, P)},
        (H, D),
    ),
    "bmm over heads, parameter left": (
        lambda m, x: m.w.bmm(x.permute(1, 2, 0)).permute(2, 0, 1),
        {"w": (H, P, D)},
        (H, D),
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w, alpha=0.5, beta=3.0).transpose(0, 1),
        {"w": (H, D, P), "b": (H, 1, P)},
        (H, D),
    ),
    "matmul by a matrix": (lambda m, x: x @ m.w, {"w": (D, P)}, (H, T, D)),
    "matmul by a vector": (lambda m, x: x @ m.w, {"w": (D,)}, (T, D)),
    "mv": (lambda m, x: x.mv(m.w), {"w": (D,)}, (D,)),
    "matmul from the left": (lambda m, x: m.w @ x, {"w": (P, T)}, (T, D)),
    "matmul of a vector from the left": (lambda m, x: m.w @ x, {"w": (T,)}, (T, D)),
    "matmul of a matrix and vectors": (lambda m, x: (m.w @ x.t()).t(), {"w": (P, D)}, (D,)),
    "matmul broadcast over heads": (lambda m, x: x @ m.w, {"w": (H, D, P)}, (H, T, D)),
    "matmul broadcast, size one in the parameter": (lambda m, x: x @ m.w, {"w": (1, D, P)}, (H, T, D)),
    "matmul broadcast, size one in the sample": (lambda m, x: x @ m.w, {"w": (H, D, P)}, (1, T, D)),
    "matmul broadcast from the left": (lambda m, x: m.w @ x, {"w": (H, P, T)}, (1, T, D)),
    "linear with the parameter as input": (
        lambda m, x: nn.functional.linear(m.w, x).t(),
        {"w": (P, D)},
        (D,),
    ),
    "einsum as a linear": (lambda m, x: torch.einsum("btd,pd->btp", x, m.w), {"w": (P, D)}, (T, D)),
    "einsum with heads": (lambda m, x: torch.einsum("bthd,hdp->bthp", x, m.w), {"w": (H, D, P)}, (T, H, D)),
    "einsum, two contracted dimensions": (
        lambda m, x: torch.einsum("bthd,hdp->btp", x, m.w),
        {"w": (H, D, P)},
        (T, H, D),
    ),
    "einsum, two made dimensions": (lambda m, x: torch.einsum("dhp,btd->bhtp", m.w, x), {"w": (D, H, P)}, (T, D)),
    "einsum, ellipsis": (lambda m, x: torch.einsum("...d,dp->...p", x, m.w), {"w": (D, P)}, (T, D)),
    "einsum outer product": (lambda m, x: torch.einsum("bd,p->bdp", x, m.w), {"w": (P,)}, (D,)),
    "einsum that sums positions away": (lambda m, x: torch.einsum("btd,dp->bp", x, m.w), {"w": (D, P)}, (T, D)),
    "einsum, elementwise": (lambda m, x: torch.einsum("btd,td->bt", x, m.w), {"w": (T, D)}, (T, D)),
    "inner": (lambda m, x: torch.inner(x, m.w), {"w": (P, D)}, (T, D)),
    "addbmm is a sum over samples of its own": (
        lambda m, x: torch.addmm(m.b, x.sum(1), m.w),
        {"w": (D, P), "b": (P,)},
        (T, D),
    ),
    "kron-like outer": (lambda m, x: x.unsqueeze(-1) @ m.w.unsqueeze(0), {"w": (P,)}, (D,)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_with_a_parameter(name: str) -> None:
    function, parameters, shape = PRODUCTS[name]
    check_module(Apply(function, **parameters), torch.randn(3, *shape))


def test_batch_folded_with_positions() -> None:
    module = Apply(lambda m, x: (x.reshape(-1, D) @ m.w).tanh(), w=(D, P))
    check_module(module, torch.randn(3, T, D), loss=folded_loss(T), methods=FORCED)


def test_batch_folded_behind_positions_and_unfolded_again() -> None:
    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(0, 1).reshape(-1, D)  # [T*B, D]
        return torch.addmm(m.b, rows, m.w).unflatten(0, (T, -1)).transpose(0, 1)

    check_module(Apply(run, w=(D, P), b=(P,)), torch.randn(3, T, D), methods=FORCED)


def test_batch_at_dim_one_of_input_and_output() -> None:
    check_module(nn.Linear(D, P), torch.randn(T, 3, D), batched={"input": 1}, loss=loss_at(1), methods=FORCED)


def test_batch_folded_between_heads_and_positions() -> None:
    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        middle = x.transpose(0, 1).reshape(-1, D)  # [H, B, T, D] as rows
        return nn.functional.linear(middle, m.w, m.b).view(H, -1, T, P).transpose(0, 1)

    check_module(Apply(run, w=(P, D), b=(P,)), torch.randn(3, H, T, D))
