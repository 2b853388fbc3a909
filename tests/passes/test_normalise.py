"""normalise: what is written in other ops gives the same per-sample gradients, without the fallback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import Apply, check_module
from selection import every
from torch import Tensor, nn

from dpcompile import dpcompile
from dpcompile.errors import BatchMixingError

IDS = torch.tensor([[0, 1, 2], [2, 3, 4], [4, 4, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "padding_idx"), every(4, [(mode, row) for row in (None, 0, -1) for mode in ("sum", "mean", "max")])
)
def test_bags_of_equal_size_are_look_ups(mode: str, padding_idx: int | None) -> None:
    found = check_module(nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding_idx), IDS)
    assert found.rules == {"embedding:weight": "embedding"}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_gives_what_torch_gives(mode: str) -> None:
    from dpcompile import dpcompile

    module = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=0)
    model = dpcompile(module, IDS)
    assert torch.allclose(model(IDS), module(IDS))
    assert torch.allclose(model(IDS[:1]), module(IDS[:1]))
    assert model(IDS[:0]).shape == (0, 3)


def test_bags_with_weights_of_their_own() -> None:
    def fn(m: Any, ids: Tensor) -> Tensor:
        return nn.functional.embedding_bag(ids, m.table, mode="sum", per_sample_weights=ids.float() + m.scale)

    check_module(Apply(fn, table=(5, 2), scale=(1,)), IDS)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bi,oij,bj->bo", (2, 6, 6)),
        ("oij,bi,bj->bo", (2, 6, 6)),
        ("...i,ij,...j->...", (6, 6)),
    ],
)
def test_a_product_of_three_has_no_fallback(equation: str, shape: tuple[int, ...]) -> None:
    def fn(m: Any, x: Tensor) -> Tensor:
        inputs = iter([x, x.tanh()])
        return torch.einsum(equation, *[m.w if len(t) == len(shape) and "b" not in t else next(inputs) for t in terms])

    terms = equation.partition("->")[0].replace("...", "b").split(",")
    found = check_module(Apply(fn, w=shape), torch.randn(4, 6))
    assert set(found.rules.values()) == {"contraction"}


def test_a_product_of_two_matrices_and_an_activation() -> None:
    found = check_module(
        Apply(lambda m, x: torch.einsum("ij,jk,bi->bk", m.v, m.w, x), v=(6, 3), w=(3, 2)), torch.randn(4, 6)
    )
    assert set(found.rules.values()) == {"contraction"}


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_with_running_statistics_is_refused(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=affine, track_running_stats=True))
    with pytest.raises(BatchMixingError, match="track_running_stats=False"):
        dpcompile(model, torch.randn(2, 3, 8, 8))
