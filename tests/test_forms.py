"""Outer, OneHot and Explicit against the per-sample gradients that they stand for, written out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcompile import forms as forms_module
from dpcompile.bounds import sum_gamma, sum_gammas
from dpcompile.certified import dropped_norm, ghost_norm, sq_norm
from dpcompile.forms import (
    CROWD,
    Explicit,
    Form,
    OneHot,
    Outer,
    bands,
    explicit,
    in_float64,
    merge,
    segment_sums,
    transposed,
    weighted_sum,
    weighted_sums,
)

check = settings(max_examples=40, deadline=None, derandomize=True)
batches = st.integers(0, 4)
sizes = st.integers(1, 4)
seeds = st.integers(0, 10**6)


def written_out(form: Form) -> torch.Tensor:
    """[B, *shape] by the definition: a loop over samples, groups and positions."""
    if isinstance(form, Explicit):
        return form.grad
    if isinstance(form, OneHot):
        batch, length, _ = form.cols_BTd.shape
        rows = torch.zeros(batch, 1, length, form.shape[form.row_dims[0]], dtype=form.cols_BTd.dtype)
        rows.scatter_(3, form.index_BT[:, None, :, None], 1.0)
        form = Outer(rows, form.cols_BTd[:, None], form.shape, form.row_dims, form.col_dims)
    blocks = torch.einsum("bgtp,bgtd->bgpd", form.rows_BGTp, form.cols_BGTd)
    order = form.group_dims + form.row_dims + form.col_dims
    shaped = blocks.reshape(len(blocks), *(form.shape[i] for i in order))
    return shaped.permute(0, *(1 + order.index(i) for i in range(len(order))))


def outer(batch: int, length: int, rows: int, cols: int, *, swapped: bool = False) -> Outer:
    """A use of a matrix [rows, cols]; `swapped` is a use of its transpose."""
    p, d = (cols, rows) if swapped else (rows, cols)
    dims = ((1,), (0,)) if swapped else ((0,), (1,))
    return Outer(_randn(batch, 1, length, p), _randn(batch, 1, length, d), (rows, cols), *dims)


def grouped(batch: int, groups: int, length: int, rows: int, cols: int) -> Outer:
    """A use of heads [cols, groups, rows]."""
    return Outer(
        _randn(batch, groups, length, rows), _randn(batch, groups, length, cols), (cols, groups, rows), (2,), (0,), (1,)
    )


def onehot(batch: int, length: int, rows: int, cols: int) -> OneHot:
    return OneHot(torch.randint(rows, (batch, length)), _randn(batch, length, cols), (rows, cols))


def _ghost_square(forms: list[Form]) -> torch.Tensor:
    """Without what the clipped sum may round, which is nothing to these small numbers in float64."""
    square, error = ghost_norm(forms).unbind()  # type: ignore[arg-type]
    torch.testing.assert_close(error, torch.zeros_like(error), atol=1e-20, rtol=0)
    return square


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double)


def some_forms(seed: int, batch: int, length: int, rows: int, cols: int) -> list[Form]:
    torch.manual_seed(seed)
    return [
        outer(batch, length, rows, cols),
        outer(batch, length + 1, rows, cols, swapped=True),
        onehot(batch, length, rows, cols),
        onehot(batch, length + 2, rows, cols),
        outer(batch, 1, rows, cols),
        Explicit(_randn(batch, rows, cols)),
    ]


@check
@given(seed=seeds, batch=batches, length=sizes, rows=sizes, cols=sizes, groups=sizes)
def test_explicit_is_the_definition(seed: int, batch: int, length: int, rows: int, cols: int, groups: int) -> None:
    for form in [*some_forms(seed, batch, length, rows, cols), grouped(batch, groups, length, rows, cols)]:
        torch.testing.assert_close(explicit(form), written_out(form))


@check
@given(seed=seeds, batch=batches, length=st.integers(0, 9), rows=sizes, cols=sizes)
def test_segment_sums_are_the_rows_that_are_not_zero(seed: int, batch: int, length: int, rows: int, cols: int) -> None:
    torch.manual_seed(seed)
    form = onehot(batch, length, rows, cols)
    whole, found = written_out(form), segment_sums(form)
    assert found.shape == (batch, length, cols)
    for i in range(batch):
        used = form.index_BT[i].unique()
        torch.testing.assert_close(found[i, : len(used)], whole[i, used])
        assert not found[i, len(used) :].any()


@check
@given(seed=seeds, batch=batches, length=sizes, rows=sizes, cols=sizes, groups=sizes)
def test_weighted_sum_is_the_weighted_sum(
    seed: int, batch: int, length: int, rows: int, cols: int, groups: int
) -> None:
    for form in [*some_forms(seed, batch, length, rows, cols), grouped(batch, groups, length, rows, cols)]:
        weight = _randn(batch)
        torch.testing.assert_close(weighted_sum(form, weight), torch.tensordot(weight, written_out(form), 1))


@check
@given(seed=seeds, batch=batches, length=sizes, rows=sizes, cols=sizes, uses=st.sets(st.integers(0, 4), min_size=1))
def test_weighted_sums_are_those_of_all_uses(
    seed: int, batch: int, length: int, rows: int, cols: int, uses: set[int]
) -> None:
    """Also where look-ups are added to what others give, as rows of the matrix or of its transpose."""
    first, *_ = forms = some_forms(seed, batch, length, rows, cols)
    looked_up = onehot(batch, length, cols, rows)
    forms += [transposed(looked_up, (1, 0)), outer(batch, length, rows, cols)]
    chosen = [form for i, form in enumerate(forms) if i in uses and form.shape == first.shape] or [first]
    weight, finite = _randn(batch), torch.rand(batch) < 0.7
    kept = torch.where(finite, weight, 0)
    wanted = sum(torch.tensordot(kept, written_out(form), 1) for form in chosen)
    torch.testing.assert_close(weighted_sums(merge(chosen), weight, finite), wanted)


def test_look_ups_of_a_table_and_of_its_transpose_are_added_to_one_sum() -> None:
    torch.manual_seed(0)
    forms = [outer(3, 4, 5, 6), onehot(3, 4, 5, 6), transposed(onehot(3, 4, 6, 5), (1, 0))]
    weight = _randn(3)
    wanted = sum(torch.tensordot(weight, written_out(form), 1) for form in forms)
    torch.testing.assert_close(weighted_sums(forms, weight), wanted)
    dense, first, second = sum_gammas(forms)
    assert dense > first == second > sum_gamma(forms[1])  # what was there before is rounded again with every term


def test_equal_places_of_narrow_look_ups_are_added_up_in_float32() -> None:
    cols = torch.full((1, 513, 4), -0.5, dtype=torch.bfloat16)
    cols[0, 0] = 256
    form = OneHot(torch.zeros(1, 513, dtype=torch.int64), cols, (3, 4))
    assert not weighted_sum(form, torch.ones(1)).any()
    dense = Outer(
        torch.zeros(1, 1, 1, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16), (3, 4), (0,), (1,)
    )
    assert not weighted_sums([dense, form], torch.ones(1)).any()


@check
@given(seed=seeds, batch=batches, length=sizes, rows=sizes, cols=sizes, mask=st.integers(1, 31))
def test_ghost_norm_of_several_uses_is_the_norm_of_their_sum(
    seed: int, batch: int, length: int, rows: int, cols: int, mask: int
) -> None:
    factored = [form for form in some_forms(seed, batch, length, rows, cols) if not isinstance(form, Explicit)]
    chosen = [form for i, form in enumerate(factored) if mask >> i & 1]
    total = sum(written_out(form) for form in chosen)
    torch.testing.assert_close(_ghost_square(chosen), total.square().sum((1, 2)))


@check
@given(seed=seeds, batch=batches, groups=sizes, length=sizes, rows=sizes, cols=sizes)
def test_ghost_norm_of_groups(seed: int, batch: int, groups: int, length: int, rows: int, cols: int) -> None:
    torch.manual_seed(seed)
    forms = [grouped(batch, groups, length, rows, cols), grouped(batch, groups, 1, rows, cols)]
    total = sum(written_out(form) for form in forms)
    torch.testing.assert_close(_ghost_square(forms), total.square().sum((1, 2, 3)))


@settings(check, max_examples=15)
@given(seed=seeds, batch=batches, groups=st.integers(1, 2), length=st.integers(14, 48), size=sizes)
def test_ghost_norm_by_bands_of_positions(seed: int, batch: int, groups: int, length: int, size: int) -> None:
    torch.manual_seed(seed)
    with mock.patch.object(forms_module, "WIDE", 8):
        assert len(bands(length, torch.device("cpu"))) == (min(length // 8, 4) if length >= 16 else 1)
        one = grouped(batch, groups, length, size, 3)
        torch.testing.assert_close(_ghost_square([one]), written_out(one).square().sum((1, 2, 3)))
        two: list[Form] = [outer(batch, length, size, 3), outer(batch, length + 1, size, 3, swapped=True)]
        total = sum(written_out(form) for form in two)
        torch.testing.assert_close(_ghost_square(two), total.square().sum((1, 2)))


@check
@given(seed=seeds, batch=batches, length=sizes, size=sizes)
def test_uses_that_share_no_factor_are_multiplied_out(seed: int, batch: int, length: int, size: int) -> None:
    """w[H, K, K] read once with rows K and once with rows H * K."""
    torch.manual_seed(seed)
    shape = (2, size, size)
    rows, cols = _randn(batch, 1, length, size), _randn(batch, 1, length, 2 * size)
    left, right = Outer(rows, cols, shape, (2,), (0, 1)), Outer(cols, rows, shape, (0, 2), (1,))
    total = written_out(left) + written_out(right)
    torch.testing.assert_close(_ghost_square([left, right]), total.square().sum((1, 2, 3)))


@check
@given(seed=seeds, batch=batches, length=sizes, rows=sizes, cols=sizes)
def test_merge_keeps_the_sum_and_leaves_one_form_of_each_kind(
    seed: int, batch: int, length: int, rows: int, cols: int
) -> None:
    forms = [*some_forms(seed, batch, length, rows, cols), Explicit(_randn(batch, rows, cols))]
    merged = merge(forms)
    assert [type(form) for form in merged] == [Outer, OneHot, Explicit]
    torch.testing.assert_close(sum(written_out(form) for form in merged), sum(written_out(form) for form in forms))


@check
@given(seed=seeds, batch=batches, length=sizes, rows=sizes, cols=sizes)
def test_a_use_of_the_transpose_is_carried_back(seed: int, batch: int, length: int, rows: int, cols: int) -> None:
    for form in some_forms(seed, batch, length, rows, cols):
        back = transposed(form, (1, 0))
        torch.testing.assert_close(written_out(back), written_out(form).transpose(1, 2))


@check
@given(seed=seeds, batch=batches, permutation=st.permutations([0, 1, 2]))
def test_a_use_of_a_permutation_is_carried_back(seed: int, batch: int, permutation: list[int]) -> None:
    torch.manual_seed(seed)
    form = grouped(batch, 2, 3, 4, 5)
    back = transposed(form, tuple(permutation))
    torch.testing.assert_close(written_out(back).permute(0, *(1 + i for i in permutation)), written_out(form))
    dense = transposed(Explicit(written_out(form)), tuple(permutation))
    torch.testing.assert_close(written_out(dense), written_out(back))


@pytest.mark.parametrize("uses", [(0,), (1,), (0, 1), (0, 2), (0, 1, 2)], ids=str)
def test_positions_of_a_crowd_that_cancel_are_seen_through(uses: tuple[int, ...]) -> None:
    """A gradient a thousandth and less of what its positions add up to without their signs."""
    torch.manual_seed(0)
    batch, length, rows, cols = 3, 2 * CROWD, 6, 8
    signs = (-1.0) ** torch.arange(length)[:, None]
    steady = torch.randn(batch, 1, 1, rows) * (1 + 1e-4 * torch.randn(batch, 1, length, rows)) * signs
    features = torch.randn(batch, 1, 1, cols).expand(-1, -1, length, -1).contiguous()
    forms = [
        Outer(steady, features, (rows, cols), (0,), (1,)),
        Outer(features * signs, steady * signs, (rows, cols), (1,), (0,)),
        OneHot(torch.randint(rows, (batch, length)), 1e-4 * torch.randn(batch, length, cols), (rows, cols)),
    ]
    chosen = [forms[i] for i in uses]
    truth = sum(written_out(in_float64(form)) for form in chosen)
    norms = truth.flatten(1).norm(dim=1)
    assert (norms < 1e-3 * features.flatten(1).norm(dim=1) * steady.flatten(1).norm(dim=1)).all()
    for square, error in (ghost_norm(chosen), dropped_norm(chosen)):
        torch.testing.assert_close(square.sqrt() + error.sqrt(), norms, rtol=1e-3, atol=0)
    weight = torch.rand(batch)
    found = weighted_sums(merge(chosen), weight).double()
    wanted = torch.tensordot(weight.double(), truth, 1)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_norm_of_gradients_of_a_scalar_parameter() -> None:
    grad = _randn(3)
    torch.testing.assert_close(sq_norm(grad), grad.square())
    torch.testing.assert_close(weighted_sum(Explicit(grad), torch.ones(3)), grad.sum())


def test_half_precision_is_accumulated_in_float32() -> None:
    """In bfloat16 the sum of 4096 ones stops at 256."""
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert sq_norm(ones).item() == pytest.approx(4096, rel=1e-5)
    form = Outer(ones.reshape(1, 1, 4096, 1), ones.reshape(1, 1, 4096, 1), (1, 1), (0,), (1,))
    assert ghost_norm([form])[0].item() == pytest.approx(4096.0**2, rel=1e-3)
