"""Each rule of the verifier fires on a program that breaks it, and names the pass before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dpcompile import DPCompileError
from dpcompile.api import prove
from dpcompile.ir import Output, OutputKind, Program
from dpcompile.verify import verify

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    return prove(nn.Linear(4, 3), torch.randn(2, 4)).conclude().program


def linear(program: Program) -> torch.fx.Node:
    return program.graph.find_nodes(op="call_function", target=aten.linear.default)[0]


def assert_refused(program: Program, pattern: str) -> None:
    with pytest.raises(DPCompileError, match=f"(?s)some-pass: .*{pattern}.*bug of dpcompile"):
        verify(program, "some-pass")


def test_a_sound_program_passes(program: Program) -> None:
    assert verify(program, "some-pass") is program


def test_a_node_used_before_it_is_defined(program: Program) -> None:
    placeholder = program.graph.find_nodes(op="placeholder")[0]
    linear(program).append(placeholder)
    assert_refused(program, "not well formed")


def test_placeholders_in_another_order(program: Program) -> None:
    assert_refused(replace(program, inputs=program.inputs[::-1]), "do not match inputs")


def test_a_result_that_is_not_in_the_graph(program: Program) -> None:
    assert_refused(replace(program, outputs=(Output("nowhere", OutputKind.USER),)), "nowhere")


def test_a_batch_size_that_was_fixed(program: Program) -> None:
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        assert program.batch == program.batch.node.hint  # a guard that fixes the symbol
    assert_refused(program, "was fixed")


@pytest.mark.parametrize("factor", [1, 3])
def test_a_traced_size_written_into_an_argument(program: Program, factor: int) -> None:
    node = linear(program)
    with program.graph.inserting_after(node):
        view = program.graph.call_function(aten.view.default, (node, [program.batch.node.hint * factor, -1]))
    view.meta = dict(node.meta)
    assert_refused(program, "written into it")


def test_a_traced_size_in_a_shape(program: Program) -> None:
    node = linear(program)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(program.batch.node.hint, 3)
    assert_refused(program, "in its shape")
