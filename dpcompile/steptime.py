"""How long a graph takes on a device by its rates: arithmetic, memory traffic and one call for every op.

A recurrence consists of several ops for each step, of which one is a product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from dpcompile import kernels, patches
from dpcompile.device import FORK, DeviceSpec
from dpcompile.finite import finite_rows
from dpcompile.flops import flops_of, is_attention, sides_of
from dpcompile.ir import Program
from dpcompile.layouts import convolution
from dpcompile.memory import Storages
from dpcompile.pools import max_pool
from dpcompile.recurrent import GRU, LSTM, RNN
from dpcompile.recurrent_costs import by_kernel, calls_of, steps_of
from dpcompile.shapes import size_of
from dpcompile.torch_internals import sample_sizes

aten = torch.ops.aten

_LAID_OUT = (aten.convolution.default, convolution, aten.convolution_backward.default)
"""Ops of oneDNN that bring images and weight into an order of their own, and the result back: as much traffic again."""
_OURS = (*kernels.OPS, patches.OP, patches.SQUARES, patches.SUM)


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
        found[node] = device.s_per_op * calls_of(node)
        in_place = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        if node.target is finite_rows or not (in_place or any(root[0] == node.name for root in storages.of(node))):
            continue
        values = [value for source in (node, *node.all_input_nodes) for value in pytree.tree_leaves(source.meta["val"])]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        moved = sum(storages.size_of(tensor).at(batch_size) for tensor in tensors)
        elements = storages.size_of(tensors[0]).at(batch_size) / tensors[0].element_size()
        laid_out = node.target in _LAID_OUT and device.s_per_fork > 0  # on a CPU
        flops = _number(flops_of(node), sizes)
        rate = _rate(node, device, sizes)
        shared = bool(flops) or elements >= FORK
        slow = elements * _slow(device).get(node.target, 0.0)
        forks = shared * (steps_of(node) + 3 * laid_out)
        found[node] += forks * device.s_per_fork + flops / rate + max((1 + laid_out) * moved / device.bytes_per_s, slow)
    return found


def _rate(node: fx.Node, device: DeviceSpec, sizes: Mapping[sympy.Symbol, int]) -> float:
    """Flops per second."""
    if is_attention(node) and device.attention_flops_per_s:
        return device.attention_flops_per_s
    if (node.target in _OURS or by_kernel(node)) and device.kernel_flops_per_s:
        return device.kernel_flops_per_s
    if node.target in _LAID_OUT:
        return device.convolution_rate(_row(node, sizes), strided=_strided(node))
    sides = [_number(size_of(side), sizes) for side in sides_of(node)]
    return device.product_rate(min(sides)) if sides else device.flops_per_s


def _row(node: fx.Node, sizes: Mapping[sympy.Symbol, int]) -> float:
    """Positions of a convolution that lie side by side: those of a row, or all where a patch is a single one."""
    backward = node.target is aten.convolution_backward.default
    positions = (node.args[0].meta["val"] if backward else node.meta["val"]).shape[2:]  # type: ignore[union-attr]
    weight = node.args[2 if backward else 1].meta["val"]  # type: ignore[union-attr]
    row = positions if all(size == 1 for size in weight.shape[2:]) else positions[-1:]
    return math.prod(_number(size_of(size), sizes) for size in row)


def _strided(node: fx.Node) -> bool:
    stride = node.args[4 if node.target is aten.convolution_backward.default else 3]
    return any(step != 1 for step in stride)  # type: ignore[union-attr]


def _number(count: Any, sizes: Mapping[sympy.Symbol, int]) -> float:
    """A size that only the data tell counts as 1."""
    found = sympy.sympify(count).subs(list(sizes.items()))
    return float(found.subs(dict.fromkeys(found.free_symbols, 1)))


def _slow(device: DeviceSpec) -> dict[Any, float]:
    """Seconds for an element of the result, of ops that take longer than to read and write their tensors."""
    gates = {LSTM: 5, GRU: 3, RNN: 1}  # sigmoids and tanhs for each element of a state
    return {
        aten.tanh.default: device.s_per_tanh,
        max_pool: device.s_per_maximum,
        **{op: count * device.s_per_tanh for op, count in gates.items()},
    }
