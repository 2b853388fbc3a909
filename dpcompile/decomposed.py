"""An exported program in simpler ops: what `run_decompositions` gives, for less where less is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.fx import traceback as fx_traceback

from dpcompile.torch_internals import mutates, trace_by

Table = Mapping[Any, Callable[..., Any]]


def decomposed(exported: ExportedProgram, table: Table) -> ExportedProgram:
    """`exported.run_decompositions(table)`.

    That traces once to see what is written in place, and once more through tensors that keep account of it, which for
    a deep model takes half of the time to capture it. A program that writes nothing in place and has no region (of
    autocast, no_grad or control flow) is the same after one plain trace.
    """
    if all(map(_plain, exported.graph.nodes)):
        module = _traced(exported.graph_module, table)
        if all(map(_plain, module.graph.nodes)):  # what an op is made of may write too
            return _with_graph(exported, module)
    return exported.run_decompositions(dict(table))


def _plain(node: fx.Node) -> bool:
    region = isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "get_attr"
    return not region and not mutates(node)


def _traced(module: fx.GraphModule, table: Table) -> fx.GraphModule:
    placeholders = module.graph.find_nodes(op="placeholder")

    def run(*values: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*values, enable_io_processing=False)

    traced = trace_by(table, run, *(node.meta["val"] for node in placeholders))
    traced.graph.eliminate_dead_code()
    for node, known in zip(traced.graph.find_nodes(op="placeholder"), placeholders, strict=True):
        node.target = known.name
        node._rename(known.name)
        node.meta = dict(known.meta)
    return traced


def _with_graph(exported: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    """The program with another graph of the same inputs and outputs."""
    (result,) = module.graph.find_nodes(op="output")
    signature = exported.graph_signature
    inputs = _named(signature.input_specs, module.graph.find_nodes(op="placeholder"))
    outputs = _named(signature.output_specs, result.args[0])
    return ExportedProgram(
        module,
        module.graph,
        replace(signature, input_specs=inputs, output_specs=outputs),
        exported.state_dict,
        exported.range_constraints,
        exported.module_call_graph,
        exported.example_inputs,
        exported.constants,
    )


def _named(specs: Sequence[Any], nodes: Iterable[Any]) -> list[Any]:
    """The specs of inputs or outputs with the names of these nodes; literals among the outputs have none."""
    return [
        spec if isinstance(spec.arg, ConstantArgument) else replace(spec, arg=replace(spec.arg, name=node.name))
        for spec, node in zip(specs, nodes, strict=True)
    ]
