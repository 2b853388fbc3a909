"""Flops of an op by torch's own formulas, and those that torch has none for: attention on a CPU.

FlopCounterMode counts these too from here on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dpcompile.finite import product
from dpcompile.layouts import convolution
from dpcompile.recurrent_costs import CALLS, sides_of_step

aten = torch.ops.aten
Shape = Sequence[Any]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> Any:
    """Scores and weighted values, as torch counts the kernels of other devices: a causal mask spares nothing."""
    batch, heads, positions, width = query
    return 2 * batch * heads * positions * key[2] * (width + value[3])


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any
) -> Any:
    """Scores once more, and the gradients of query, key, value and scores."""
    batch, heads, positions, width = query
    return 2 * batch * heads * positions * key[2] * (3 * width + 2 * value[3])


def _register(target: Any, formula: Callable[..., Any]) -> None:
    if target not in flop_registry:
        register_flop_formula(target)(formula)


_register(aten._scaled_dot_product_flash_attention_for_cpu, _attention)
_register(aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward)


def is_attention(node: fx.Node) -> bool:
    """Of a fused kernel for scores, softmax and weighted values."""
    return "scaled_dot_product" in str(node.target)


def sides_of(node: fx.Node) -> tuple[Any, ...]:
    """The three sides of a matrix product, of one of a batch or of the steps of a recurrence; of another op none."""
    if node.target in CALLS:
        return sides_of_step(node)
    if node.target not in (aten.mm.default, aten.bmm.default, aten.addmm.default, product):
        return ()
    factors = node.args[:2] if node.target is product else node.args[-2:]
    left, right = (source.meta["val"].shape for source in factors)  # type: ignore[union-attr]
    return (*left[-2:], right[-1])


_BY = {convolution: aten.convolution, product: aten.mm}
"""Functions of ours that are one op of torch."""


def flops_of(node: fx.Node) -> sympy.Expr:
    """Matmul flops of one op of a graph, on its symbolic shapes."""
    packet = _BY.get(node.target, getattr(node.target, "overloadpacket", None))
    if node.op != "call_function" or packet not in flop_registry:
        return sympy.Integer(0)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    count = flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    return count.node.expr if isinstance(count, torch.SymInt) else sympy.sympify(count)
