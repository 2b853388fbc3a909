"""Look-ups: embedding, padding, what is refused, tables read by constants, EmbeddingBag."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import FORCED, Apply, check_module
from torch import nn

from dpcompile import DPCompileError, dpcompile

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


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_is_refused_by_name(mode: str) -> None:
    with pytest.raises(DPCompileError, match="embedding_bag"):
        dpcompile(nn.EmbeddingBag(5, 3, mode=mode), IDS)
