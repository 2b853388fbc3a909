"""insert-norms: the squared norm of every group behind its gradients, their join, and the clip factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dpcompile import records  # registers the op that carries norms out of a compiled backward
from dpcompile.forms import Explicit, ghost_sq_norm, sq_norm
from dpcompile.inline import inline
from dpcompile.ir import Input, InputKind, Normed, Program, Space
from dpcompile.passes.combine import GroupReader
from dpcompile.plan import Method, Plan
from dpcompile.torch_internals import fake_mode_of


def insert_norms(program: Program, readers: Sequence[GroupReader], plan: Plan, *, mean: bool, fused: bool) -> Normed:
    """The program with norms and clip factors.

    C_i = min(1, R / ||g_i||) (Abadi et al. 2016, algorithm 1). In the split form a loss that is a mean over samples
    hands over 1/B of each sample's own gradient: with `mean` the norm is multiplied back by B. In the fused form the
    gradients are each sample's own, and with `mean` the factors carry the 1/B. The norms leave as a result of the
    fused graph, and through records.record_norms where the backward is a graph of its own.
    """
    graph = program.graph
    nodes = program.nodes()
    totals = []
    kept: dict[str, tuple[str, ...]] = {}
    for reader in readers:
        method = plan.method(reader.group.name)
        if reader.group.space is Space.PULLBACK:
            first, *gradients = inline(
                graph, reader.pullback_norm, [*reader.inputs, *reader.sources], "norm", vmapped=True
            )
        else:
            first, *gradients = inline(graph, _norm(reader, method), reader.inputs, "norm", vmapped=reader.vmapped)
        totals.append(first)
        if gradients:
            kept[reader.group.name] = tuple(node.name for node in gradients)
    device = _device(nodes, program)
    with fake_mode_of(graph):
        bound = _placeholder(graph, "max_grad_norm", torch.empty((), dtype=torch.float64, device=device))
    (norms,) = inline(graph, _join(mean and not fused), totals, "norm")
    inputs = (*program.inputs, Input(bound.name, InputKind.BOUND))
    if not fused:
        handle = _placeholder(graph, "handle", 0)
        inputs = (*inputs, Input(handle.name, InputKind.HANDLE))
        with graph.inserting_after(norms):
            recorded = graph.call_function(records.OP, (norms, handle))
        recorded.meta = dict(norms.meta)
        norms = recorded
    (factor,) = inline(graph, _factor(mean and fused), [norms, bound], "norm")
    return Normed(
        Program(program.module, inputs, program.outputs, program.batch, program.constants),
        norms.name,
        factor.name,
        kept,
    )


def _placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _join(mean: bool):
    def join(*parts: torch.Tensor) -> list[torch.Tensor]:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        norms = total.sqrt()
        return [norms * norms.shape[0] if mean else norms]

    return join


def _factor(mean: bool):
    def factor(norms: torch.Tensor, bound: torch.Tensor) -> list[torch.Tensor]:
        clipped = (bound / norms).clamp(max=1.0)
        return [clipped / norms.shape[0] if mean else clipped]

    return factor


def _device(nodes: Mapping[str, fx.Node], program: Program) -> torch.device:
    return next(nodes[i.node].meta["val"].device for i in program.inputs if i.kind is InputKind.PARAMETER)


def _norm(reader: GroupReader, method: Method):
    def norm(*tensors: torch.Tensor) -> list[torch.Tensor]:
        forms = reader.combined(tensors)
        if method is Method.GHOST and not any(isinstance(form, Explicit) for form in forms):
            return [ghost_sq_norm(forms)]  # type: ignore[arg-type]
        grad = reader.explicit_sum(tensors)
        return [sq_norm(grad)] + ([grad] if method is Method.KEPT else [])

    return norm
