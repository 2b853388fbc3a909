"""The joint graph cut in two: what each half holds and what crosses between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from functorch.compile import make_boxed_func
from layers import Apply, compile_all, randomised
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from dpcompile import DPModule, dpcompile
from dpcompile.emitted import Emitted
from dpcompile.held import HELD
from dpcompile.inline import PHASE
from dpcompile.ir import InputKind, OutputKind, Program


def emitted(module: nn.Module, *shape: int) -> Emitted:
    return compile_all(randomised(module), torch.randn(2, *shape).double(), methods=("ghost",)).emitted["ghost"]


def interface(program: Program) -> str:
    results = [f"{o.kind.value} {o.target}".strip() for o in program.outputs]
    return "\n".join([f"{i.kind.value} {i.target}".strip() for i in program.inputs] + [f"-> {r}" for r in results])


def test_forward_gives_outputs_and_backward_gives_gradients_and_norms() -> None:
    parts = emitted(nn.Linear(4, 3), 4)
    assert parts.backward is not None
    assert_expected_inline(
        interface(parts.forward),
        """\
parameter weight
parameter bias
user input
-> user""",
    )
    assert_expected_inline(
        interface(parts.backward),
        """\
constant leaves_0
tangent 0
bound
weight
handle
-> gradient weight
-> gradient bias
-> norms""",
    )


def test_only_what_the_backward_reads_crosses() -> None:
    """The input of the layer and the result of tanh cross; what the addition gave does not."""
    module = Apply(lambda m, x: (m.f(x) + 1.0).tanh(), modules={"f": nn.Linear(4, 3)})
    parts = emitted(module, 4)
    assert parts.backward is not None
    crossing = [i.target for i in parts.backward.inputs if i.kind is InputKind.CONSTANT]
    assert len(crossing) == 2
    assert crossing[1] == "tanh"


def test_forward_holds_no_work_of_the_backward() -> None:
    parts = emitted(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), 4)
    ops = [node.target.overloadpacket for node in parts.forward.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert [op for op in ops if op is not aten.permute] == [aten.addmm, aten.tanh, aten.addmm]


def test_backward_forms_no_product_that_it_does_not_need() -> None:
    """Two linears: one output gradient between them, two clipped sums; the norms are products of norms."""
    parts = emitted(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), 4)
    assert parts.backward is not None
    products = parts.backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    weights = [o for o in parts.backward.outputs if o.kind is OutputKind.GRADIENT and "weight" in o.target]
    biases = [o for o in parts.backward.outputs if o.kind is OutputKind.GRADIENT and "bias" in o.target]
    assert len(weights) == len(biases) == 2
    assert len(products) == 1 + len(weights) + len(biases)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def fused(**options: Any) -> tuple[nn.Module, DPModule, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(5, 6, 4).double(), torch.arange(5) % 3

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.mean(1), targets)

    options = {"max_grad_norm": 0.05, "validate": "off", **options}
    return model, dpcompile(model, x, loss_fn=loss, sample_targets=y, **options), x, y


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_what_a_loss_is_scaled_by_scales_compiled_sums(backend: str, per_layer: bool) -> None:
    """And neither norms nor clip factors, one group or many."""
    model, dp_model, x, y = fused(**({"clip_groups": "per-layer"} if per_layer else {}))
    assert (dp_model._emitted.sums is None) == per_layer
    dp_model(x, targets=y).backward()
    expected, norms = gradients(model), dp_model.per_sample_norms
    torch._dynamo.reset()
    compiled = torch.compile(lambda scale: dp_model(x, targets=y) * scale, backend=backend, fullgraph=True)
    for scale in (1.0, -0.3, 0.0):
        compiled(torch.tensor(scale, dtype=torch.double)).backward()
        torch.testing.assert_close(gradients(model), [scale * grad for grad in expected], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(dp_model.per_sample_norms, norms, rtol=1e-12, atol=0)


def test_no_compiler_makes_again_what_is_summed() -> None:
    """What the sums read crosses as it is: of gelu's result neither it nor its gradient is made a second time."""
    _, dp_model, x, y = fused(norm_method="ghost")
    graphs: list[fx.GraphModule] = []

    def look(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    torch.compile(lambda: dp_model(x, targets=y), backend=aot_autograd(fw_compiler=look), fullgraph=True)().backward()
    forward, backward = graphs
    assert backward.graph.find_nodes(op="call_function", target=HELD)
    for op in (torch.ops.aten.gelu.default, torch.ops.aten.gelu_backward.default):
        assert forward.graph.find_nodes(op="call_function", target=op)
        assert not backward.graph.find_nodes(op="call_function", target=op)


def test_what_sums_alone_make_is_made_behind_the_cut() -> None:
    """Of a crowd of positions factors are widened for their sum: not all of them together, in front of it."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(300, 3)),
        torch.randn(4, 2, 12, 12),
        torch.arange(4) % 3,
    )
    loss: dict[str, Any] = {"loss_fn": nn.functional.cross_entropy, "sample_targets": y}
    emitted = dpcompile(model, x, max_grad_norm=0.1, norm_method="ghost", validate="off", **loss)._emitted
    assert emitted.sums is not None
    assert not [node for node in emitted.compiled.graph.nodes if node.meta.get(PHASE) == "sum"]
    assert [node for node in emitted.sums.graph.nodes if node.meta.get(PHASE) == "sum"]
    assert not emitted.sums.graph.find_nodes(op="call_function", target=torch.ops.aten.mul_.Tensor)


@pytest.mark.parametrize("form", ["split", "fused"])
def test_a_fixed_batch_leaves_no_size_to_any_graph(form: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(5, 6, 4), torch.randn(5, 6, 3)
    loss: dict[str, Any] = {"loss_fn": nn.functional.mse_loss, "sample_targets": y} if form == "fused" else {}
    emitted = dpcompile(model, x, dynamic=False, validate="off", **loss)._emitted
    for program in (emitted.forward, emitted.backward, emitted.compiled, emitted.sums):
        values = [] if program is None else [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
        assert not [value for value in values if isinstance(value, torch.SymInt)]
