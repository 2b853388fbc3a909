"""Graphs before and after tidy: no-ops dropped, equal nodes merged, sizes named, dead nodes gone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from dpcompile.api import prove
from dpcompile.inline import PHASE, inline
from dpcompile.ir import Output, OutputKind, Program
from dpcompile.passes.simplify import simplify
from dpcompile.passes.tidy import tidied


def program_of(function: Callable[[Tensor], Tensor]) -> Program:
    """x[B, 4] through `function`, as an untidy program; one parameter keeps it trainable."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    program = prove(Model(), torch.randn(2, 4)).conclude().program
    (product,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    (result,) = inline(program.graph, lambda x: [function(x)], [product])
    return Program(
        program.module, program.inputs, (Output(result.name, OutputKind.USER),), program.batch, program.constants
    )


def text(graph: fx.Graph) -> str:
    """One line for each node: op and operands, numbered in order of appearance."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_shown(node.args[0], names)}")
            continue
        names[node] = node.name if node.op == "placeholder" else f"v{len(lines)}"
        if node.op != "placeholder":
            packet = getattr(node.target, "overloadpacket", node.target)
            arguments = ", ".join(_shown(argument, names) for argument in node.args)
            lines.append(f"{names[node]} = {packet.__name__}({arguments})")
    return "\n".join(lines)


def _shown(value: object, names: dict[fx.Node, str]) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(item, names) for item in value) + "]"
    return names[value] if isinstance(value, fx.Node) else repr(value)


def test_equal_computations_become_one_and_dead_ones_none() -> None:
    def untidy(x: Tensor) -> Tensor:
        _ = x.cos()
        return x.detach().sin() + x.sin().detach()

    program = program_of(untidy)
    assert_expected_inline(
        text(tidied(program).graph),
        """\
v0 = mul(leaves_0, p_model_w)
v1 = sin(v0)
v2 = add(v1, v1)
return [v2]""",
    )


def test_sizes_are_read_off_the_input() -> None:
    """A size read off an activation would keep the activation alive for its shape alone."""
    program = program_of(lambda x: x.exp().new_zeros(x.exp().shape[0], 2))
    assert_expected_inline(
        text(tidied(program).graph),
        """\
v0 = sym_size(leaves_0, 0)
v1 = mul(leaves_0, p_model_w)
v2 = exp(v1)
v3 = new_zeros(v2, [v0, 2])
return [v3]""",
    )


def test_multiples_of_the_batch_size_are_made_from_it() -> None:
    program = program_of(lambda x: x.reshape(x.shape[0] * 2, 2).new_ones(x.shape[0] * 2, x.shape[0]))
    assert_expected_inline(
        text(tidied(program).graph),
        """\
v0 = sym_size(leaves_0, 0)
v1 = mul(2, v0)
v2 = mul(leaves_0, p_model_w)
v3 = reshape(v2, [v1, 2])
v4 = new_ones(v3, [v1, v0])
return [v4]""",
    )


def test_random_ops_are_never_merged() -> None:
    program = program_of(lambda x: torch.bernoulli(x) + torch.bernoulli(x))
    assert text(tidied(program).graph).count("bernoulli") == 2


def test_equal_computations_of_norm_and_sum_stay_apart() -> None:
    """Unfolded patches held from the norm to the sum would cost more memory than the time that they save."""
    program = program_of(lambda x: x.sin() + x.sin())
    first, second = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    first.meta[PHASE], second.meta[PHASE] = "norm", "sum"
    assert text(tidied(program).graph).count("sin(") == 2


def test_results_follow_their_replacements() -> None:
    program = program_of(lambda x: x.sin().detach())
    after = tidied(program)
    assert after.outputs[0].node == "sin"


def test_views_of_views_are_one_and_views_that_change_nothing_none() -> None:
    program = program_of(
        lambda x: x.sin().t().t().reshape(-1).reshape(-1, 2, 2).permute(0, 1, 2).transpose(0, 1).permute(0, 2, 1).cos()
    )
    assert_expected_inline(
        text(tidied(program).graph),
        """\
v0 = mul(leaves_0, p_model_w)
v1 = sin(v0)
v2 = reshape(v1, [-1, 2, 2])
v3 = permute(v2, [1, 2, 0])
v4 = cos(v3)
return [v4]""",
    )


def test_a_sum_over_dimensions_of_size_one_is_its_term() -> None:
    program = program_of(lambda x: x.unsqueeze(1).sum(1) * x.unsqueeze(0).sum(0, keepdim=True))
    assert_expected_inline(
        text(tidied(program).graph),
        """\
v0 = mul(leaves_0, p_model_w)
v1 = unsqueeze(v0, 1)
v2 = squeeze(v1, [1])
v3 = unsqueeze(v0, 0)
v4 = mul(v2, v3)
return [v4]""",
    )


def test_sums_into_fresh_zeros_are_made_in_place() -> None:
    """Not into zeros that are read twice."""

    def sums(x: Tensor) -> Tensor:
        index = torch.zeros(2, dtype=torch.long)
        once = x.new_zeros(3, 4).index_add(0, index, x.sum(0, keepdim=True).expand(2, 4))
        zeros = x.new_zeros(5, 4)
        twice = zeros.index_add(0, index, x.sum(0, keepdim=True).expand(2, 4))
        return once.sum() + twice.sum() + zeros.sum()

    assert_expected_inline(
        text(tidied(program_of(sums)).graph),
        """\
v0 = mul(leaves_0, p_model_w)
v1 = zeros([2])
v2 = new_zeros(v0, [3, 4])
v3 = sum(v0, [0], True)
v4 = expand(v3, [2, 4])
v5 = index_add_(v2, 0, v1, v4)
v6 = new_zeros(v0, [5, 4])
v7 = index_add(v6, 0, v1, v4)
v8 = sum(v5)
v9 = sum(v7)
v10 = add(v8, v9)
v11 = sum(v6)
v12 = add(v10, v11)
return [v12]""",
    )


def test_results_stay_tensors_of_their_own() -> None:
    """An input is not given back as a result, nor one result twice."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(3, 4)
    results = []
    for source in (x, x, graph.call_function(torch.ops.aten.sin.default, (x,))):
        source.meta["val"] = x.meta["val"]
        results += [source] * (source is not x)
        results.append(graph.call_function(torch.ops.aten.reshape.default, (source, [3, 4])))
        results[-1].meta["val"] = x.meta["val"]
    graph.output(results)
    simplify(graph)
    (given,) = graph.find_nodes(op="output")[0].args
    assert x not in given
    assert len(set(given)) == len(given)
