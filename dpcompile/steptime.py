"""How long a graph takes on a device by its rates: arithmetic, memory traffic and one call for every op."""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from dpcompile.device import DeviceSpec
from dpcompile.flops import flops_of, is_attention
from dpcompile.ir import Program
from dpcompile.memory import Storages
from dpcompile.torch_internals import sample_sizes


def seconds(program: Program, device: DeviceSpec, batch_size: int) -> float:
    """Of all ops of a graph, one after the other; a view costs its call. Lengths are those of the sample."""
    return sum(times(program, device, batch_size).values())


def times(program: Program, device: DeviceSpec, batch_size: int) -> dict[fx.Node, float]:
    """The same for each op."""
    storages = Storages(program)
    sizes = sample_sizes(program.batch) | {program.batch.node.expr: batch_size}
    found: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        found[node] = device.s_per_op
        if not any(root[0] == node.name for root in storages.of(node)):
            continue
        values = [value for source in (node, *node.all_input_nodes) for value in pytree.tree_leaves(source.meta["val"])]
        moved = sum(storages.size_of(v).at(batch_size) for v in values if isinstance(v, torch.Tensor))
        flops = float(sympy.sympify(flops_of(node)).subs(list(sizes.items())))  # pyright: ignore[reportArgumentType]
        rate = (is_attention(node) and device.attention_flops_per_s) or device.flops_per_s
        found[node] += flops / rate + moved / device.bytes_per_s
    return found
