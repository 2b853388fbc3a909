"""penalty: the part of a loss that the parameters alone make (a regulariser), as a program of its own.

Behind the sum over samples every op is linear with constant coefficients (rules/batching/reduced.py), so the loss is
L(samples) + P(parameters), and P is the loss with zeros in the place of every sum over samples. It is the same for
every data set: no clip and no noise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from dpcompile.ir import InputKind, Kind, OutputKind, Program, Tracked, Value


def penalty(program: Program, tracked: Tracked) -> Program | None:
    """The program whose one result is the penalty, up to a constant; None for a loss that has none.

    Its inputs are all parameters, and the buffers and constants that it reads.
    """
    (output,) = (o for o in program.outputs if o.kind is OutputKind.USER)
    assert output.node is not None
    if not _penalised(tracked.values[output.node]):
        return None
    own = program.copy()
    nodes = own.nodes()
    for node in list(own.graph.nodes):
        value = tracked.values.get(node.name)
        if not _penalised(value) and isinstance(value, Value) and value.kind is Kind.REDUCED:
            with own.graph.inserting_before(node):
                val = node.meta["val"]
                options = {"dtype": val.dtype, "device": val.device}
                zero = own.graph.call_function(torch.ops.aten.zeros.default, (list(val.shape),), options)
                zero.meta["val"] = val
            node.replace_all_uses_with(zero)
    _returns(own.graph, nodes[output.node])
    own.graph.eliminate_dead_code()
    used = tuple(i for i in own.inputs if nodes[i.node].users or i.kind is InputKind.PARAMETER)
    for item in own.inputs:
        if item not in used:
            own.graph.erase_node(nodes[item.node])
    assert all(i.kind is not InputKind.USER for i in used)
    own.module.recompile()
    return replace(own, inputs=used, outputs=(output,))


def _penalised(value: Value | tuple[Value, ...] | None) -> bool:
    return isinstance(value, Value) and value.penalised


def _returns(graph: fx.Graph, result: fx.Node) -> None:
    graph.erase_node(next(iter(graph.find_nodes(op="output"))))
    graph.output((result,))
