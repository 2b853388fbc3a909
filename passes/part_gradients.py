"""part-gradients: parameters with equal gradients get a tensor each, as autograd adds to p.grad in place.

Two biases that are added up have one sum, which tidy forms once. Behind tidy.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dpcompile.inline import PHASE
from dpcompile.ir import Draft, Output, OutputKind
from dpcompile.memory import Root, Storages
from dpcompile.passes.rewrite import Order


def part_gradients(draft: Draft, _order: Order) -> Draft:
    """The program with a copy of every gradient that lies in the memory of an earlier one."""
    program = draft.program
    graph, nodes, storages = program.graph, program.nodes(), Storages(program)
    seen: set[Root] = set()
    outputs: list[Output] = []
    for output in program.outputs:
        if output.kind is OutputKind.GRADIENT and output.node is not None:
            node = nodes[output.node]
            roots = storages.of(node)
            if seen.intersection(roots):
                with graph.inserting_after(node):
                    copy = graph.call_function(torch.ops.aten.clone.default, (node,))
                copy.meta = {"val": node.meta["val"], PHASE: "sum"}
                output = replace(output, node=copy.name)
            seen.update(roots)
        outputs.append(output)
    nodes = program.nodes()
    graph.output_node().args = ([nodes[o.node] if o.node is not None else o.literal for o in outputs],)
    return replace(draft, program=replace(program, outputs=tuple(outputs)))
