"""Look-ups: embedding, padding, what is refused, tables read by constants, EmbeddingBag."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import EVERY_FORM, FORCED, Apply, check_module
from torch import nn

from dpcompile import DPCompileError, dpcompile
from dpcompile.ir import Chain, Space
from dpcompile.plan import Method

IDS = torch.tensor([[0, 1, 2], [2, 3, 4], [4, 4, 1]])


@settings(max_examples=3, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 3), max_size=2), rows=st.integers(2, 5), width=st.integers(1, 3))
def test_embedding_of_any_shape(shape: list[int], rows: int, width: int) -> None:
    found = check_module(
        nn.Embedding(rows, width),
        torch.arange(3 * 9).reshape(3, 9)[:, :1].expand(3, 1).reshape(3, *[1] * len(shape)).expand(3, *shape) % rows,
    )
    assert found.rules == {"embedding:weight": "embedding"}


def test_padding_rows_get_no_gradient() -> None:
    module = nn.Embedding(5, 3, padding_idx=4)
    check_module(module, IDS, methods=FORCED)
    assert module.weight.grad is not None
    assert not module.weight.grad[4].any()


def test_padding_counted_from_the_end() -> None:
    check_module(nn.Embedding(5, 3, padding_idx=-3), IDS)


def test_functional_embedding_after_a_gather_of_ids() -> None:
    check_module(Apply(lambda m, ids: nn.functional.embedding(ids.flip(1) % 3, m.table), table=(5, 2)), IDS)


def test_table_indexed_with_brackets() -> None:
    check_module(Apply(lambda m, ids: m.table[ids], table=(5, 2)), IDS)


def test_index_select_of_a_table() -> None:
    module = Apply(lambda m, ids: m.table.index_select(0, ids.flatten()).unflatten(0, (-1, 3)), table=(5, 2))
    check_module(module, IDS)


def test_batch_folded_with_positions() -> None:
    module = Apply(lambda m, ids: m.embed(ids.flatten()).unflatten(0, (-1, 3)), modules={"embed": nn.Embedding(5, 2)})
    check_module(module, IDS, methods=FORCED)


def test_scale_grad_by_freq_is_refused() -> None:
    with pytest.raises(DPCompileError, match="scale_grad_by_freq"):
        dpcompile(nn.Embedding(5, 3, scale_grad_by_freq=True), IDS)


def test_max_norm_is_refused() -> None:
    with pytest.raises(DPCompileError, match="max_norm"):
        dpcompile(nn.Embedding(5, 3, max_norm=1.0), IDS)


def test_bags_that_do_not_follow_the_samples_are_refused_by_name() -> None:
    def fn(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding_bag(ids.flatten(), m.table, torch.arange(0, ids.numel(), 2))

    with pytest.raises(DPCompileError, match="embedding_bag"):
        dpcompile(Apply(fn, table=(5, 2)), IDS)


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    positions=st.integers(0, 3),
    rows=st.integers(1, 4),
    width=st.integers(1, 3),
    padding=st.one_of(st.none(), st.integers(-1, 0)),
    way=st.sampled_from(("module", "sparse", "functional", "brackets", "index_select", "negative", "one row", "tail")),
)
def test_look_up_with_any_arguments(positions: int, rows: int, width: int, padding: int | None, way: str) -> None:
    """Rows that many positions read, rows that none reads, a table of one row; every spelling."""
    ids = torch.arange(3 * max(positions, 1)).reshape(3, -1) % rows
    ids = ids if positions else ids[:, 0]

    def run(m: nn.Module, given: torch.Tensor) -> torch.Tensor:
        if way == "brackets":
            return m.table[given]
        if way == "negative":
            return m.table[given - rows]
        if way == "index_select":
            return m.table.index_select(0, given.flatten()).reshape(*given.shape, width)
        if way == "one row":
            return m.table[given.flatten()].reshape(*given.shape, width)
        if way == "tail":
            return m.table[:, 0][given].unsqueeze(-1)
        return nn.functional.embedding(given, m.table, padding_idx=padding)

    if way in ("module", "sparse"):
        module: nn.Module = nn.Embedding(rows, width, padding_idx=padding, sparse=way == "sparse")
    else:
        module = Apply(run, table=(rows, width))
    check_module(module, ids, batch_sizes=(3, 0), methods=EVERY_FORM)


def test_rows_that_are_matrices() -> None:
    check_module(Apply(lambda m, ids: m.table[ids], table=(5, 2, 3)), IDS, methods=EVERY_FORM)


@pytest.mark.parametrize("dim", [1, -1])
def test_table_looked_up_along_its_second_dimension_by_folded_ids(dim: int) -> None:
    module = Apply(lambda m, ids: m.table.index_select(dim, ids.flatten()).t().unflatten(0, (-1, 3)), table=(2, 5))
    check_module(module, IDS, methods=EVERY_FORM)


def test_two_indices_at_once() -> None:
    check_module(Apply(lambda m, ids: m.table[ids, ids.flip(1)], table=(5, 5)), IDS, methods=EVERY_FORM)


# ---------------------------------------------------------------- one index for all samples


class Shared(nn.Module):
    """Rows of a table at places that a buffer holds, some of them twice: learned positions, as BERT has them."""

    def __init__(self, way: str, places: list[int]) -> None:
        super().__init__()
        self.way, self.table, self.head = way, nn.Embedding(7, 3), nn.Linear(3, 2)
        self.register_buffer("places", torch.tensor(places))
        self.places: torch.Tensor

    def rows(self) -> torch.Tensor:
        if self.way == "brackets":
            return self.table.weight[self.places - 7]
        if self.way == "index_select":
            return self.table.weight.index_select(0, self.places)
        return self.table(self.places.unsqueeze(0) if self.way == "unsqueezed" else self.places)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (x + self.rows()).tanh()
        if self.way == "twice":
            hidden = hidden * self.table(self.places.flip(0))
        return hidden @ self.table.weight.T if self.way == "tied" else self.head(hidden)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    way=st.sampled_from(("module", "unsqueezed", "brackets", "index_select", "twice", "tied")),
    places=st.lists(st.integers(0, 6), min_size=1, max_size=4),
)
def test_rows_at_places_of_a_buffer_are_looked_up_for_each_sample(way: str, places: list[int]) -> None:
    found = check_module(Shared(way, places), torch.randn(3, len(places), 3), batch_sizes=(3, 0), methods=EVERY_FORM)
    group = found.analysis.uses.groups[0]
    assert (group.name, group.space) == ("table.weight", Space.PARAMETER)
    assert Chain.LOOKUP in [value.chain for value in group.values]


def test_such_rows_need_no_table_for_each_sample() -> None:
    module = Shared("module", [4, 0, 4])
    module.table = nn.Embedding(1000, 3)
    plan = dpcompile(module, torch.randn(3, 3, 3)).plan
    assert plan.choices["table.weight"].method is not Method.KEPT


def test_rows_at_places_of_a_buffer_that_multiply_are_carried_back() -> None:
    module = Shared("module", [5, 1, 5])
    product = Apply(lambda m, x: x @ m.inner.rows().T, modules={"inner": module})
    found = check_module(product, torch.randn(4, 2, 3))
    (group,) = found.analysis.uses.groups
    assert group.space is Space.PULLBACK
