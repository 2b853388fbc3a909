"""The joint graph cut in two: what each half holds and what crosses between them."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from layers import Apply, compile_all, randomised
from torch import nn

from dpcompile.emitted import Emitted
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
