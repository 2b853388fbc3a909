"""Parameters in products: linear, mm, addmm, bmm, baddbmm, matmul, mv, einsum, on either side, in any layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import EVERY_FORM, FORCED, Apply, check_module, folded_loss, loss_at
from selection import every
from torch import nn

small = settings(max_examples=3, deadline=None, derandomize=True)


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


@pytest.mark.parametrize("name", every(3, PRODUCTS))
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


few = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])


@few
@given(data=st.data())
def test_einsum_of_any_two_operands(data: st.DataObject) -> None:
    """Letters by what they are: b the batch, t a position, g a group, d contracted, p made by the parameter."""
    there = {letter: data.draw(st.integers(0, 2), label=letter) for letter in "tgdp"}
    names = {letter: [chr(ord(letter.upper()) + k) for k in range(count)] for letter, count in there.items()}
    size = {name: data.draw(st.integers(1, 3)) for group in names.values() for name in group} | {"b": 3}
    own, weight = ["b", *names["t"], *names["g"], *names["d"]], [*names["g"], *names["d"], *names["p"]]
    made = ["b", *data.draw(st.permutations([*names["t"], *names["g"], *names["p"]]))]
    at = data.draw(st.integers(0, len(own) - 1))
    inside = own[1:]
    x = [*inside[:at], "b", *inside[at:]]
    weight = data.draw(st.permutations(weight))
    left = data.draw(st.booleans())
    text = f"{''.join(weight)},{''.join(x)}" if left else f"{''.join(x)},{''.join(weight)}"
    equation = f"{text}->{''.join(made)}"

    def run(m: nn.Module, value: torch.Tensor) -> torch.Tensor:
        moved = value.movedim(0, at)
        return torch.einsum(equation, *((m.w, moved) if left else (moved, m.w)))

    module = Apply(run, w=tuple(size[name] for name in weight))
    sample = torch.randn(3, *(size[name] for name in inside))
    found = check_module(module, sample, batch_sizes=(3, 0), methods=EVERY_FORM)
    assert set(found.rules.values()) == {"contraction" if weight else "fallback"}


@few
@given(
    left=st.lists(st.integers(1, 2), max_size=2),
    right=st.lists(st.integers(1, 2), max_size=2),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    flipped=st.booleans(),
)
def test_matmul_of_any_ranks(left: list[int], right: list[int], sizes: tuple[int, int, int], flipped: bool) -> None:
    """Leading dimensions of size one are spread on either side."""
    t, d, p = sizes
    shared = min(len(left), len(right))
    for i in range(1, shared + 1):  # equal, or one of them is one
        if left[-i] != right[-i]:
            left[-i], right[-i] = max(left[-i], right[-i]), 1
    x, w = ((*left, p, d), (*right, d, t)) if flipped else ((*left, t, d), (*right, d, p))

    def run(m: nn.Module, value: torch.Tensor) -> torch.Tensor:
        spread = value.reshape(-1, *[1] * (len(right) - len(left)), *x)
        return m.w.mT @ spread.mT if flipped else spread @ m.w

    check_module(Apply(run, w=w), torch.randn(3, *x), batch_sizes=(3, 0), methods=EVERY_FORM)


@few
@given(
    dims=st.permutations([0, 1, 2]),
    contracted=st.integers(0, 2),
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    flipped=st.booleans(),
)
def test_tensordot_over_any_dimensions(dims: list[int], contracted: int, sizes: tuple[int, ...], flipped: bool) -> None:
    *shape, p = sizes
    over = dims[:contracted]

    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mine, other = [1 + i for i in over], [1 + i for i in range(contracted)]
        if flipped:
            return torch.tensordot(m.w, x, dims=(other, mine)).movedim(1, 0)
        return torch.tensordot(x, m.w, dims=(mine, other))

    module = Apply(run, w=(p, *(shape[i] for i in over)))
    found = check_module(module, torch.randn(3, *shape), batch_sizes=(3, 0), methods=EVERY_FORM)
    assert set(found.rules.values()) == {"contraction"}


@few
@given(
    rows=st.integers(1, 3),
    width=st.integers(1, 3),
    alpha=st.sampled_from((1, 0, -2, 0.5)),
    beta=st.sampled_from((1, 0, 3, -0.5)),
    added=st.sampled_from(((1, 1), (2, 1), (1, "p"), (2, "p"))),
)
def test_added_products_with_any_factors(rows: int, width: int, alpha: float, beta: float, added: tuple) -> None:
    shape = (H, 1, width) if added[1] == "p" else (added[0], 1, 1)

    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(m.b, x.transpose(0, 1), m.w, alpha=alpha, beta=beta).transpose(0, 1)

    check_module(
        Apply(run, w=(H, rows, width), b=shape), torch.randn(3, H, rows), batch_sizes=(3, 0), methods=EVERY_FORM
    )


SPREAD = {
    "an ellipsis on both sides": ("...td,...dp->...tp", (H, T, D), (H, D, P)),
    "an ellipsis spread over the parameter's": ("...td,...dp->...tp", (H, T, D), (1, D, P)),
    "an ellipsis spread over the sample's": ("...td,...dp->...tp", (1, T, D), (H, D, P)),
    "an ellipsis and dimensions of the parameter's own": ("...d,edp->...ep", (T, D), (H, D, P)),
    "a named dimension of size one in the sample": ("bhd,hdp->bhp", (1, D), (H, D, P)),
    "a named dimension of size one in the parameter": ("bhd,hdp->bhp", (H, D), (1, D, P)),
    "no arrow": ("bd,dp", (D,), (D, P)),
    "no arrow, with an ellipsis": ("...d,dz", (T, D), (D, P)),
    "a diagonal of the parameter": ("bd,dd->bd", (D,), (D, D)),
    "a sum over a dimension of the parameter's own": ("bd,dp->bd", (D,), (D, P)),
}


@pytest.mark.parametrize("name", every(3, SPREAD))
def test_einsum_that_spreads(name: str) -> None:
    equation, sample, weight = SPREAD[name]
    check_module(
        Apply(lambda m, x: torch.einsum(equation, x, m.w), w=weight), torch.randn(3, *sample), methods=EVERY_FORM
    )


def test_inner_of_many_dimensions() -> None:
    module = Apply(lambda m, x: torch.inner(x, m.w), w=(2, P, D))
    found = check_module(module, torch.randn(3, T, D), methods=EVERY_FORM)
    assert set(found.rules.values()) == {"contraction"}


def test_product_of_three_with_a_folded_batch() -> None:
    """Rows of the batch that are folded with positions stay together in a sample's own gradient."""

    def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(0, 1).reshape(-1, D)  # [T * B, D]
        return torch.einsum("bi,ijk,bk->bj", rows, m.w, rows.sin()).unflatten(0, (T, -1)).transpose(0, 1)

    found = check_module(Apply(run, w=(D, P, D)), torch.randn(3, T, D))
    assert set(found.rules.values()) == {"contraction"}
