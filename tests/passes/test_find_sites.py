"""Uses of parameters: which ops, which groups, in which space their norms are taken, under which names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import Apply
from torch import Tensor, nn

from dpcompile.api import prove
from dpcompile.ir import Chain, Space, Uses
from dpcompile.passes.find_sites import use_graph

IDS = torch.zeros(3, 2, dtype=torch.long)


def uses_of(module: nn.Module, sample: Any) -> Uses:
    return prove(module, sample).conclude().uses


def test_tied_embedding_gives_two_sites_in_one_group() -> None:
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    (group,) = uses_of(nn.Sequential(embed, head), IDS).groups
    assert group.name == "0.weight"
    assert group.space is Space.PARAMETER
    assert [(site.op, site.slot, site.module, site.rule) for site in group.sites] == [
        ("embedding", "weight", "0", "embedding"),
        ("linear", "weight", "1", "contraction"),
    ]


def test_a_layer_called_twice_gives_two_sites_for_each_parameter() -> None:
    module = Apply(lambda m, x: m.f(m.f(x)), modules={"f": nn.Linear(4, 4)})
    groups = uses_of(module, torch.randn(3, 4)).groups
    assert [(group.name, len(group.sites)) for group in groups] == [("f.weight", 2), ("f.bias", 2)]


def test_distinct_slices_are_groups_of_their_own() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.w.chunk(3)
        return F.linear(x, q) * F.linear(x, k) + F.linear(x, v)

    groups = uses_of(Apply(run, w=(12, 4)), torch.randn(3, 4)).groups
    assert [(group.name, group.space) for group in groups] == [(f"w#{i}", Space.VALUE) for i in range(3)]


def test_overlapping_slices_are_one_group() -> None:
    module = Apply(lambda m, x: F.linear(x, m.w[:3]) + F.linear(x, m.w[1:]), w=(4, 4))
    (group,) = uses_of(module, torch.randn(3, 4)).groups
    assert group.space is Space.PULLBACK
    assert [value.chain for value in group.values] == [Chain.SELECT, Chain.SELECT]


def test_transposed_use_stays_in_the_space_of_the_parameter() -> None:
    module = Apply(lambda m, x: F.linear(F.linear(x, m.w), m.w.t()), w=(5, 4))
    (group,) = uses_of(module, torch.randn(3, 4)).groups
    assert group.space is Space.PARAMETER
    assert [value.permutation for value in group.values] == [(0, 1), (1, 0)]


def test_factors_of_one_product_are_one_group() -> None:
    uses = uses_of(Apply(lambda m, x: x @ (m.a @ m.b), a=(4, 2), b=(2, 5)), torch.randn(3, 4))
    (group,) = uses.groups
    assert (group.space, group.params, len(group.sites)) == (Space.PULLBACK, ("p_model_a", "p_model_b"), 1)


def test_the_use_graph_leads_from_parameters_over_values_to_sites() -> None:
    uses = uses_of(Apply(lambda m, x: x @ (m.a @ m.b), a=(4, 2), b=(2, 5)), torch.randn(3, 4))
    graph = use_graph(uses.values, uses.sites)
    assert sorted(graph.edges) == [
        (("parameter", "p_model_a"), ("value", "matmul")),
        (("parameter", "p_model_b"), ("value", "matmul")),
        (("value", "matmul"), ("site", "matmul_1:other")),
    ]


def test_position_table_is_a_use_of_the_addition() -> None:
    module = Apply(lambda m, x: x + m.f(torch.arange(2)), modules={"f": nn.Embedding(6, 4)})
    (site,) = uses_of(module, torch.randn(3, 2, 4)).sites
    assert (site.op, site.rule) == ("add", "broadcast")


def test_frozen_parameters_have_no_site_and_unused_ones_are_named() -> None:
    module = Apply(lambda m, x: x * m.a + m.b, a=(4,), b=(4,), spare=(2,))
    module.b.requires_grad_(False)
    uses = uses_of(module, torch.randn(3, 4))
    assert [group.name for group in uses.groups] == ["a"]
    assert uses.unused == ("p_model_spare",)


def test_a_site_that_no_output_needs_is_left_out() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        F.linear(x, m.w)
        return x * m.scale

    assert [group.name for group in uses_of(Apply(run, w=(5, 4), scale=(4,)), torch.randn(3, 4)).groups] == ["scale"]


@pytest.mark.parametrize(("layer", "positions"), [(nn.Linear(4, 4), 6), (nn.LayerNorm(4), 6)])
def test_positions_count_folded_rows(layer: nn.Module, positions: int) -> None:
    module = Apply(lambda m, x: m.f(x.flatten(0, 2)).unflatten(0, (-1, 2, 3)), modules={"f": layer})
    site = uses_of(module, torch.randn(3, 2, 3, 4)).sites[0]
    assert positions == site.work.T
