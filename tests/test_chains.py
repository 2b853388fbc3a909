"""Chains of ops on a few numbers of each sample: the same results as the ops, bit by bit, and in every graph."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpcompile import dpcompile, native
from dpcompile.chain_ops import NUMBERS
from dpcompile.chaining import APART, chained
from dpcompile.chains import Chain, Numbers
from dpcompile.direct import direct
from dpcompile.runtime import DPModule

aten = torch.ops.aten
STRANGE = [0.0, -0.0, 1.0, -2.5, 3e38, -3e38, 1e-40, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
BINARY = [
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.minimum.default,
    aten.maximum.default,
]
COMPARISONS = [aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor]
SCALAR = [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.ne.Scalar, aten.gt.Scalar, aten.le.Scalar]
UNARY = [aten.sqrt.default, aten.abs.default, aten.neg.default, aten.zeros_like.default, aten.ones_like.default]
SAMPLES = 71  # more than chains.cpp goes through together, and not a multiple


def numbers_of(value: Tensor) -> Numbers:
    return Numbers(tuple(None if size == SAMPLES else size for size in value.shape), value.dtype)


class Drawn:
    """A random graph of such ops, with what each of its values is for some input."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.graph, self.inputs = draw, fx.Graph(), list[Any]()
        self.values: dict[fx.Node, Any] = {}
        torch.manual_seed(draw(st.integers(0, 1000)))
        for shape in ((SAMPLES,), (SAMPLES,), (3, SAMPLES), ()):
            value = torch.randn(shape, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
            strange = torch.tensor(STRANGE, dtype=value.dtype)[torch.randint(len(STRANGE), shape)]
            self.read(torch.where(torch.rand(shape) < 0.2, strange, value))
        for _ in range(draw(st.integers(4, 25))):
            self.add_one()
        self.graph.output(list(self.values))

    def read(self, value: Any) -> None:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(value)
        self.keep(node, value)

    def keep(self, node: fx.Node, value: Any) -> None:
        node.meta[NUMBERS] = numbers_of(value)
        self.values[node] = value

    def one(self, *shapes: tuple[int, ...], floating: bool = True) -> fx.Node:
        fitting = [n for n, v in self.values.items() if not shapes or tuple(v.shape) in shapes]
        return self.draw(st.sampled_from([n for n in fitting if self.values[n].is_floating_point() or not floating]))

    def add_one(self) -> None:
        kind = self.draw(st.sampled_from(["binary", "compare", "scalar", "unary", "where", "clamp", "type", "stack"]))
        x = self.one()
        shape = tuple(self.values[x].shape)
        other = self.one(shape, (), shape[1:])
        number = self.draw(st.sampled_from([0.5, 1.0000001, 3.0, float("inf")]))
        options: dict[str, Any] = {}
        if kind == "binary":
            op, args = self.draw(st.sampled_from(BINARY)), (x, other)
        elif kind == "compare":
            op, args = self.draw(st.sampled_from(COMPARISONS)), (x, other)
        elif kind == "scalar":
            op, args = self.draw(st.sampled_from([*SCALAR, aten.pow.Tensor_Scalar])), (x, number)
            args = (x, 2) if op is aten.pow.Tensor_Scalar else args
        elif kind == "unary":
            op, args = self.draw(st.sampled_from(UNARY)), (x,)
        elif kind == "where":
            test = self.add(aten.lt.Scalar, (x, number))
            op, args = aten.where.self, (test, x, other)
        elif kind == "clamp":
            op, args = aten.clamp.default, self.draw(st.sampled_from([(x, None, number), (x, number)]))
        elif kind == "type":
            op, args = aten._to_copy.default, (self.one(floating=False),)
            options = {"dtype": self.draw(st.sampled_from([torch.float32, torch.float64]))}
        else:
            op, args = aten.stack.default, ([self.one((SAMPLES,)), self.one((SAMPLES,))],)
        self.add(op, args, options)

    def add(self, op: Any, args: Any, options: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.call_function(op, args, options or {})
        given = fx.map_arg(args, self.values.__getitem__)
        if op is aten.sqrt.default:  # torch's own is off by a unit in the last place now and then
            with np.errstate(invalid="ignore"):
                self.keep(node, torch.from_numpy(np.asarray(np.sqrt(given[0].numpy()))))
        else:
            self.keep(node, op(*given, **(options or {})))
        if op is aten.stack.default:
            for i in range(2):
                item = self.graph.call_function(aten.select.int, (node, 0, i))
                self.keep(item, self.values[node][i])
        return node


def with_chains(graph: fx.Graph) -> fx.GraphModule:
    own = fx.Graph()
    own.output(own.graph_copy(graph, {}))
    return fx.GraphModule(dict(chained(own)), own)


def chains_of(module: nn.Module) -> list[Chain]:
    return [part for part in module.modules() if isinstance(part, Chain)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_results_are_those_of_the_ops(data: st.DataObject) -> None:
    drawn = Drawn(data.draw)
    module = with_chains(drawn.graph)
    for found, expected in zip(module(*drawn.inputs), drawn.values.values(), strict=True):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def simple(before: Any = None) -> tuple[fx.GraphModule, Tensor]:
    """(2 x + 1)^2 in six steps, between two halves of which `before` may put an op of its own."""
    graph, x = fx.Graph(), torch.arange(1.0, 6.0)
    node = start = graph.placeholder("x")
    node.meta[NUMBERS] = Numbers((None,), torch.float32)
    for i in range(6):
        if i == 3 and before is not None:
            before(graph, start)
        node = (
            graph.call_function(aten.mul.Tensor, (node, 1.5))
            if i % 2
            else graph.call_function(aten.add.Tensor, (node, start))
        )
        node.meta[NUMBERS] = Numbers((None,), torch.float32)
    graph.output(node)
    return fx.GraphModule({}, graph), x


def test_what_is_written_over_is_read_before() -> None:
    def double(graph: fx.Graph, x: fx.Node) -> None:
        graph.call_function(aten.mul_.Tensor, (x, 2))

    module, x = simple(double)
    expected = module(x.clone())
    module = with_chains(module.graph)
    assert torch.equal(module(x.clone()), expected)
    assert not chains_of(module)  # three steps before, three behind: too few


def test_what_is_written_over_elsewhere_does_not_count() -> None:
    def double(graph: fx.Graph, _: fx.Node) -> None:
        other = graph.call_function(torch.ones, (3, 4))
        graph.call_function(aten.mul_.Tensor, (other, 2)).meta[APART] = True

    module, x = simple(double)
    expected = module(x)
    module = with_chains(module.graph)
    assert torch.equal(module(x), expected)
    assert len(chains_of(module)) == 1


def test_ops_run_by_themselves_on_other_tensors() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops.append(func)
            return func(*args, **(kwargs or {}))

    class Other(Tensor):
        pass

    module, x = simple()
    expected = module(x)
    module = with_chains(module.graph)
    with Seen() as seen:
        assert torch.equal(module(x), expected)
        assert aten.mul.Tensor not in seen.ops
        assert torch.equal(module(x.as_subclass(Other)), expected)
        assert aten.mul.Tensor in seen.ops
    assert torch.equal(module(x.repeat_interleave(2)[::2]), expected)


def test_a_tensor_of_another_size_is_refused() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta[NUMBERS] = y.meta[NUMBERS] = Numbers((None,), torch.float32)
    node = x
    for _ in range(4):
        node = graph.call_function(aten.add.Tensor, (node, y))
        node.meta[NUMBERS] = Numbers((None,), torch.float32)
    graph.output(node)
    module = with_chains(graph)
    with pytest.raises(RuntimeError, match=r"\[5\] has not 1 numbers of 3 samples"):
        module(torch.ones(3), torch.ones(5))


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    module, x = simple()
    expected = module(x)
    module = with_chains(module.graph)
    assert torch.equal(module(x), expected)
    assert not chains_of(module)


# ------------------------------------------------------------------ models


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.GroupNorm(2, 8), nn.Linear(6, 5), nn.Flatten(), nn.Linear(40, 2)
    )


X = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(0))


def ops_in_chains(dp_model: DPModule) -> int:
    emitted = dp_model._emitted
    graph = direct((emitted.backward or emitted.forward).module)
    return sum(node.op == "call_function" for chain in chains_of(graph) for node in chain._ops.graph.nodes)


def results(dp_model: DPModule) -> list[Tensor]:
    """Norms, and clipped gradients."""
    dp_model.zero_grad()
    dp_model(X).square().sum().backward()
    assert dp_model.per_sample_norms is not None
    return [dp_model.per_sample_norms, *(p.grad for p in dp_model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "options", [{}, {"dynamic": False}, {"clip_groups": "per-layer"}, {"clipping": "psac"}], ids=str
)
def test_norms_and_gradients_are_the_same_with_and_without(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dp_model = dpcompile(model(), X, max_grad_norm=0.1, **options)
    assert ops_in_chains(dp_model) > 20
    found = results(dp_model)
    monkeypatch.setattr(Chain, "forward", lambda self, *given: self._ops(*given))
    for own, expected in zip(found, results(dp_model), strict=True):
        torch.testing.assert_close(own, expected, rtol=3e-7, atol=1e-9)


def test_they_are_there_after_a_model_was_stored() -> None:
    dp_model = dpcompile(model(), X)
    count = ops_in_chains(dp_model)
    assert ops_in_chains(pickle.loads(pickle.dumps(dp_model))) == count
    assert ops_in_chains(copy.deepcopy(dp_model)) == count


def test_the_fused_form_has_them() -> None:
    targets = torch.zeros(9, dtype=torch.long)
    loss = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none")  # noqa: E731
    assert ops_in_chains(dpcompile(model(), X, loss_fn=loss, sample_targets=targets)) > 20
