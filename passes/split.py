"""split: the joint graph cut into a forward and a backward graph.

The split form is cut at the gradients of the outputs. The fused form is one graph; for compilers it is cut behind the
norms, so that the gradient of the loss scales the weights of samples and not every gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dpcompile.errors import InvalidGraphError
from dpcompile.held import HELD
from dpcompile.inline import PHASE
from dpcompile.ir import Input, InputKind, Output, OutputKind, Program, ancestors
from dpcompile.memory import is_view


@dataclass(frozen=True)
class Split:
    """Two graphs. `forward` returns its outputs and then `saved`; `backward` takes `saved`, tangents and the bound."""

    forward: Program
    backward: Program
    saved: tuple[str, ...]  # nodes of the forward graph, inputs among them


_LATE = (InputKind.TANGENT, InputKind.BOUND, InputKind.WEIGHT, InputKind.HANDLE)


def split(program: Program) -> Split:
    """Cut at the gradients of the outputs: the forward is what the model's own results need, and no more."""
    graph = program.graph
    nodes = program.nodes()
    own = [o for o in program.outputs if o.kind in (OutputKind.USER, OutputKind.BUFFER)]
    made = [o for o in program.outputs if o.kind not in (OutputKind.USER, OutputKind.BUFFER)]
    forward = ancestors([nodes[o.node] for o in own if o.node is not None])
    forward |= {node for node in graph.nodes if node.target is operator.getitem and node.args[0] in forward}
    late = {nodes[i.node] for i in program.inputs if i.kind in _LATE}
    if forward & late:
        raise InvalidGraphError("split: the model's outputs depend on the gradients of the outputs")
    backward = ancestors([nodes[o.node] for o in made if o.node is not None])
    crossing = _crossing(graph, forward, backward, late)
    crossing = _with_lengths(program, crossing)
    forward_inputs = [i for i in program.inputs if nodes[i.node] not in late]
    saved = tuple(node.name for node in crossing)
    front = _extract(program, forward, [*forward_inputs], own, crossing)
    back_inputs = [
        *(Input(node.name, InputKind.CONSTANT, node.name) for node in crossing),
        *(i for kind in _LATE for i in program.inputs if i.kind is kind),
    ]
    sizes = {node for node in backward if _is_size(node)}
    back = _extract(program, (backward - forward - set(crossing)) | sizes, back_inputs, made, [])
    return Split(front, back, saved)


def split_sums(program: Program) -> Split:
    """Cut behind the norms: the backward is clip factors and clipped sums, with what these make of what they read.

    What it reads of the forward is read first by an op that no compiler fuses, so that none makes it a second time:
    of what norms were taken is what is summed, to the bit.
    """
    graph = program.graph
    nodes = program.nodes()
    made = [o for o in program.outputs if o.kind is OutputKind.GRADIENT]
    own = [o for o in program.outputs if o.kind is not OutputKind.GRADIENT]
    (norms,) = (nodes[o.node] for o in own if o.kind is OutputKind.NORMS and o.node is not None)
    while is_view(norms):
        norms = norms.all_input_nodes[0]
    (weight,) = (nodes[i.node] for i in program.inputs_of(InputKind.WEIGHT))
    first = ancestors([nodes[o.node] for o in own if o.node is not None])
    if weight in first:
        raise InvalidGraphError("split: the model's outputs depend on the weights of samples")
    behind = {norms, weight}
    for node in graph.nodes:
        later = node.meta.get(PHASE) == "sum" or not behind.isdisjoint(node.all_input_nodes)
        if node.op == "call_function" and later:
            behind.add(node)
    results = [nodes[o.node] for o in made if o.node is not None]
    needed = ancestors(results)
    late = (needed & behind) - first
    early = (first | needed) - late
    early |= {node for node in graph.nodes if node.target is operator.getitem and node.args[0] in early}
    reads = {*_crossing(graph, early, late, {weight}), *early.intersection(results)}
    crossing = _with_lengths(program, [node for node in graph.nodes if node in reads])
    front = _extract(program, early, [i for i in program.inputs if i.kind is not InputKind.WEIGHT], own, crossing)
    back_inputs = [Input(node.name, InputKind.CONSTANT, node.name) for node in crossing]
    back_inputs += program.inputs_of(InputKind.WEIGHT)
    back = _extract(program, late | {node for node in needed if _is_size(node)}, back_inputs, made, [])
    _hold(back)
    return Split(front, back, tuple(node.name for node in crossing))


def _hold(program: Program) -> None:
    """Read all that crosses beside the weights."""
    *crossing, weight = program.graph.find_nodes(op="placeholder")
    with program.graph.inserting_after(weight):
        held = program.graph.call_function(HELD, (weight, crossing))
    held.meta["val"] = weight.meta["val"]
    weight.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)
    program.module.recompile()


def _crossing(graph: fx.Graph, forward: set[fx.Node], backward: set[fx.Node], late: set[fx.Node]) -> list[fx.Node]:
    """Values of the forward (or inputs) that the backward reads, in graph order; tuples cross as their items."""
    found = []
    for node in graph.nodes:
        early = (node in forward or node.op == "placeholder") and node not in late and not _is_size(node)
        if early and any(user in backward and user not in forward for user in node.users):
            found.append(node)
    return found


def _with_lengths(program: Program, crossing: list[fx.Node]) -> list[fx.Node]:
    """With an input of the user for each free length that nothing else shows to the backward."""
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node not in crossing]
    more = [
        next(node for node in inputs if _dim_of(node, length) is not None)
        for length in program.lengths
        if all(_dim_of(node, length) is None for node in crossing)
    ]
    return [*dict.fromkeys(more), *crossing]


def _is_size(node: fx.Node) -> bool:
    """Sizes, and numbers made from them, do not cross: each graph reads them off its own inputs."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _dim_of(node: fx.Node, size: torch.SymInt) -> int | None:
    """The dimension of a node's tensor that has this size."""
    value = node.meta.get("val")
    for dim, own in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
        if isinstance(own, torch.SymInt) and own.node.expr == size.node.expr:
            return dim
    return None


def _read(graph: fx.Graph, size: torch.SymInt, placeholders: Sequence[fx.Node]) -> fx.Node:
    """A size, read off an input that has it: for the batch a user's in the forward, the weights in the backward."""
    for node in placeholders:
        dim = _dim_of(node, size)
        if dim is not None:
            read = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
            read.meta["val"] = size
            return read
    raise InvalidGraphError(f"split: no input of the graph has the size {size}")


def _again(result: fx.Node) -> fx.Node:
    """The same value as another result: torch.compile takes no function that returns a tensor twice."""
    alias = result.graph.call_function(torch.ops.aten.alias.default, (result,))
    alias.meta = dict(result.meta)
    return alias


def _extract(
    program: Program,
    keep: set[fx.Node],
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    saved: Sequence[fx.Node],
) -> Program:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    nodes = program.nodes()
    for item in inputs:
        node = nodes[item.node]
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in program.graph.nodes:
        if node in keep and node.target is torch.ops.aten.sym_size.int and node.args[0] not in env:
            env[node] = _read(graph, node.meta["val"], list(env.values()))
        elif (node in keep and node.op == "call_function" and node not in env) or (
            node in keep and node.op == "get_attr"
        ):
            env[node] = graph.node_copy(node, env.__getitem__)
    results: list[Any] = []
    for o in outputs:
        result = env[nodes[o.node]] if o.node is not None else o.literal
        results.append(_again(result) if isinstance(result, fx.Node) and result in results else result)
    graph.output(results + [env[node] for node in saved])
    module = fx.GraphModule(program.module, graph)
    renamed = tuple(
        replace(o, node=result.name if isinstance(result, fx.Node) else None)
        for o, result in zip(outputs, results, strict=True)
    )
    own_inputs = tuple(Input(env[nodes[i.node]].name, i.kind, i.target, i.trainable, i.batch_dim) for i in inputs)
    return replace(program, module=module, inputs=own_inputs, outputs=renamed)
