"""Samples that are not finite, in sums of kept gradients and products of positions: eagerly and under a compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpcompile import dpcompile, finite, settled


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("method", "length", "width", "op"),
    [
        ("auto", 200, 48, finite.weighted_rows),  # gradients are kept, and worth a loop
        ("ghost", 40, 400, finite.product),
        ("ghost", 1, 14000, finite.product),
    ],
)
def test_such_a_sample_adds_nothing(
    method: str, length: int, width: int, op: object, fused: bool, backend: str | None
) -> None:
    torch.manual_seed(0)
    last = min(width, 450)
    model = nn.Sequential(nn.Linear(width, last), nn.Tanh(), nn.Linear(last, last))
    x, y = torch.randn(5, length, width), torch.randn(5, length, last)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean((1, 2))

    options = {"loss_fn": loss, "sample_targets": y} if fused else {}
    dp_model = dpcompile(model, x, max_grad_norm=0.01, loss_reduction="sum", norm_method=method, **options)
    program = dp_model._emitted.backward or dp_model._emitted.forward
    assert list(program.graph.find_nodes(op="call_function", target=op))

    def gradients(rows: Tensor, targets: Tensor) -> list[Tensor]:
        model.zero_grad()
        run = dp_model if backend is None else torch.compile(dp_model, fullgraph=True, backend=backend)
        (run(rows, targets=targets) if fused else loss(run(rows), targets).sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    strange = x.clone()
    strange[1, 0] = torch.nan
    strange[4, 0] = torch.inf
    others = [0, 2, 3]
    for found, expected in zip(gradients(strange, y), gradients(x[others], y[others]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_positions_of_a_weight_with_one_output_are_no_samples(backend: str | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(2100, 1), torch.randn(3, 4, 2100)
    dp_model = dpcompile(model, x, max_grad_norm=0.1, loss_reduction="sum", norm_method="ghost")
    run = dp_model if backend is None else torch.compile(dp_model, fullgraph=True, backend=backend)
    found = []
    for rows in (x[1:], torch.cat([torch.full_like(x[:1], torch.nan), x[1:]])):
        model.zero_grad()
        run(rows).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_rows_are_weighted_without_those_to_be_cleared() -> None:
    weight, rows, mask = torch.randn(1, 3), torch.randn(3, 7), torch.tensor([True, False, True])
    torch.testing.assert_close(finite.weighted_rows(weight, rows, None), weight @ rows)
    rows[1] = torch.nan
    expected = weight[:, mask] @ rows[mask]
    compiled = torch.compile(finite.weighted_rows, fullgraph=True, backend="aot_eager")
    for run in (finite.weighted_rows, compiled):
        torch.testing.assert_close(run(weight, rows, mask), expected)


def test_a_product_leaves_out_positions_of_samples_to_be_cleared() -> None:
    left, right, mask = torch.randn(2, 6), torch.randn(6, 4), torch.tensor([True, False, True])
    torch.testing.assert_close(finite.product(left, right, None), left @ right)
    compiled = torch.compile(finite.product, fullgraph=True, backend="aot_eager")
    for run in (finite.product, compiled):
        torch.testing.assert_close(run(left, right, torch.ones(3, dtype=torch.bool)), left @ right)
    rest = [0, 1, 4, 5]
    expected = left[:, rest] @ right[rest]
    left[:, 2], right[3] = torch.nan, torch.inf
    for run in (finite.product, compiled):
        torch.testing.assert_close(run(left, right, mask), expected)


def test_what_is_settled_is_itself_in_eager_calls_and_a_copy_for_a_compiler() -> None:
    values = torch.randn(2, 3)
    assert settled.itself(values) is values
    copy = settled.OP(values)
    assert torch.equal(copy, values)
    assert copy.data_ptr() != values.data_ptr()
    dp_model = dpcompile(nn.Linear(3, 2), torch.randn(4, 3))
    assert dp_model._emitted.backward is not None
    assert list(dp_model._emitted.backward.graph.find_nodes(op="call_function", target=settled.OP))
