"""Graphs for eager calls.

Ops on a few numbers run in chains, others write over operands that nothing reads any more, and ops are called by the
functions of torch: `torch.mul` finds its op in half the time that `torch.ops.aten.mul.Tensor` takes, a microsecond less
for each of the hundreds of small ops of a private step. The op is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dpcompile import records, settled
from dpcompile.chaining import chained
from dpcompile.overwriting import overwrite
from dpcompile.torch_internals import take_one_list

aten = torch.ops.aten

_FUNCTIONS: dict[Any, Any] = {
    aten.abs.default: torch.abs,
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.div.Tensor: torch.div,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.sqrt.default: torch.sqrt,
    aten.stack.default: torch.stack,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.unsqueeze.default: torch.unsqueeze,
    settled.OP: settled.itself,
    records.OP: records.noted,
}
"""Of equal arguments."""


def direct(module: fx.GraphModule, *, boxed: bool = False) -> fx.GraphModule:
    """The same graph, for eager calls. `boxed`: its inputs are one list, which it empties."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=records.OP):
        node.replace_all_uses_with(node.args[0])  # norms are noted, and read as they are
    chains = chained(graph)
    overwrite(graph)
    for node in graph.nodes:
        node.target = _FUNCTIONS.get(node.target, node.target)
    if boxed:
        take_one_list(graph)
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    return fx.GraphModule({**{name: getattr(module, name) for name in read}, **chains}, graph)
