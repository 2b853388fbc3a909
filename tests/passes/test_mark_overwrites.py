"""Ops that write over an operand in eager calls: the same results, and nothing lost that is read later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dpcompile import DPModule, dpcompile
from dpcompile.api import prove
from dpcompile.direct import direct
from dpcompile.ir import Program
from dpcompile.overwriting import OVER, writing_over
from dpcompile.passes.mark_overwrites import mark_overwrites

aten = torch.ops.aten


class Residual(nn.Module):
    """Values that are read twice, a result from the middle, and gradients that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = F.relu(self.first(x))
        made = F.gelu(self.second(middle)) * torch.sigmoid(middle)
        return self.last(made + middle).tanh(), middle * 2 + 1


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.body(x)
        return made.mean((2, 3)), made.flatten(1)[:, :2]


def marked(program: Program | None) -> dict[str, Any]:
    assert program is not None
    return {node.name: node.target for node in program.graph.nodes if OVER in node.meta}


def step(dp_model: DPModule, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    first, second = dp_model(x)
    (first.square().sum() + second.sum()).backward()
    return [first, second, dp_model.per_sample_norms, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("build", "shape"), [(Residual, (5, 7, 6)), (Images, (5, 2, 9, 9))])
@pytest.mark.parametrize("method", ["auto", "ghost", "explicit"])
def test_results_are_the_same_to_the_bit(
    build: type[nn.Module], shape: tuple[int, ...], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    options: dict[str, Any] = {"max_grad_norm": 0.1, "norm_method": method, "validate": "off", "loss_reduction": "sum"}
    dp_model = dpcompile(model, x, **options)
    assert marked(dp_model._emitted.backward)
    found = step(dp_model, model, x)
    monkeypatch.setattr("dpcompile.direct.overwrite", lambda graph: None)
    expected = step(dpcompile(model, x, **options), model, x)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_nothing_is_written_over_that_is_read_later_or_comes_from_outside() -> None:
    """Inputs are as they were, results as those of the graph as it is, and nothing that is saved is an operand."""
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(5, 7, 6)
    dp_model = dpcompile(model, x, max_grad_norm=0.1, validate="off", loss_reduction="sum")
    forward = dp_model._emitted.forward
    primals = [value.detach() for value in dp_model._primals(forward, [x])]
    kept = [value.clone() for value in primals]
    results = direct(forward.module)(*primals)
    expected = forward.module(*primals)
    assert all(torch.equal(a, b) for a, b in zip(primals, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    saved = {node.name for node in forward.graph.find_nodes(op="output")[0].all_input_nodes}
    operands = {node.args[node.meta[OVER]].name for node in forward.graph.nodes if OVER in node.meta}
    assert operands
    assert operands.isdisjoint(saved)


@pytest.mark.parametrize("read_later", [True, False])
def test_a_reshape_may_be_a_view_of_one_sample(read_later: bool) -> None:
    """It copies [5, B, 4] of other strides, but for B = 1: what it reads must not be read again either."""
    program = prove(nn.Linear(4, 4), torch.randn(3, 5, 4)).conclude().program
    graph = program.graph
    made = program.nodes()[str(program.outputs[0].node)]
    (end,) = graph.find_nodes(op="output")

    def call(op: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(end):
            node = graph.call_function(op, args)
        node.meta["val"] = op(*(value.meta["val"] if isinstance(value, fx.Node) else value for value in args))
        return node

    others = [] if read_later else [call(aten.mul.Tensor, made, 2)]
    copy = call(aten.reshape.default, call(aten.permute.default, made, [1, 0, 2]), [-1, 4])
    result = call(aten.relu.default, copy)
    others += [call(aten.mul.Tensor, made, 2)] if read_later else []
    end.args = ([result, *others],)
    assert (result.name in marked(mark_overwrites(program))) != read_later


def test_a_gradient_on_its_way_takes_no_new_memory() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    backward = dpcompile(model, x, validate="off")._emitted.backward
    assert {aten.gelu_backward.default, aten.threshold_backward.default} <= set(marked(backward).values())


GRAD, X = torch.randn(3, 40), torch.randn(3, 40)


@pytest.mark.parametrize(
    ("op", "args", "position"),
    [
        (aten.add.Tensor, (GRAD, X), 0),
        (aten.add.Tensor, (GRAD, X), 1),
        (aten.mul.Tensor, (GRAD, X), 1),
        (aten.relu.default, (GRAD,), 0),
        (aten.gelu.default, (GRAD,), 0),
        (aten.gelu_backward.default, (GRAD, X), 0),
        (aten.gelu_backward.default, (GRAD, X), 1),
        (aten.threshold_backward.default, (GRAD, X, 0), 0),
        (aten.tanh_backward.default, (GRAD, X), 0),
        (aten.silu_backward.default, (GRAD, X), 0),
        (aten.sigmoid_backward.default, (GRAD, X), 0),
        (aten.where.self, (X > 0, GRAD, X), 1),
    ],
)
def test_ops_give_the_same_over_an_operand(op: Any, args: tuple[Any, ...], position: int) -> None:
    found = writing_over(op, position)
    assert found is not None
    given = [value.clone() if isinstance(value, Tensor) else value for value in args]
    over, out = found
    result = over(*given, **({out: given[position]} if out else {}))
    assert result.data_ptr() == given[position].data_ptr()
    assert torch.equal(result, op(*args))


def test_ops_that_only_copy_have_no_such_op() -> None:
    assert writing_over(aten.mm.default, 0) is None
    assert writing_over(aten.relu.default, 1) is None  # its `out` copies
    assert isinstance(aten.relu.out, torch._ops.OpOverload)


def test_a_backward_without_some_tangents_has_no_marks() -> None:
    model, x = Residual(), torch.randn(5, 7, 6)
    dp_model = dpcompile(model, x, max_grad_norm=0.1, validate="off", loss_reduction="sum")
    model.zero_grad()
    dp_model(x)[0].sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    emitted = dp_model._emitted
    assert emitted.backward is not None
    made = emitted.drop_tangents(emitted.backward, ["1"])
    assert made is not None
    assert not marked(made)
    assert marked(emitted.backward)
    model.zero_grad()
    first, second = dp_model(x)
    (first.sum() + 0 * second.sum()).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-5, atol=1e-7)


def test_a_mark_is_stored(tmp_path: Any) -> None:
    model, x = Residual(), torch.randn(5, 7, 6)
    emitted = dpcompile(model, x, validate="off")._emitted
    torch.save(emitted.forward, tmp_path / "graph.pt")
    read = torch.load(tmp_path / "graph.pt", weights_only=False)
    assert marked(read) == marked(emitted.forward)
    assert all(isinstance(node, fx.Node) for node in read.graph.nodes)
