"""How long a graph takes on a device by its rates: arithmetic, memory traffic and one call for every op."""

from __future__ import annotations

import sympy
import torch
from torch.utils import _pytree as pytree

from dpcompile.device import DeviceSpec
from dpcompile.flops import flops_of
from dpcompile.ir import Program
from dpcompile.memory import Storages
from dpcompile.torch_internals import sample_sizes


def seconds(program: Program, device: DeviceSpec, batch_size: int) -> float:
    """Of all ops of a graph, one after the other; views are free. Lengths are those of the sample."""
    storages = Storages(program)
    sizes = sample_sizes(program.batch) | {program.batch.node.expr: batch_size}
    total = 0.0
    for node in program.graph.nodes:
        made = [root for root in storages.of(node) if root[0] == node.name]
        if node.op != "call_function" or not made:
            continue
        values = [value for source in (node, *node.all_input_nodes) for value in pytree.tree_leaves(source.meta["val"])]
        moved = sum(storages.size_of(v).at(batch_size) for v in values if isinstance(v, torch.Tensor))
        flops = sympy.sympify(flops_of(node)).subs(list(sizes.items()))
        total += device.time_s(float(flops), moved, 1.0)  # pyright: ignore[reportArgumentType]
    return total
