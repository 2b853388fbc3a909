"""insert-norms: the squared norm of every group behind its gradients, their joins, and the clip factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile import (
    records,  # registers the op that carries norms out of a compiled backward
    settled,
)
from dpcompile.certified import dropped_norm, ghost_norm, kept_norm, streamed_norm
from dpcompile.forms import Patched, added, written_out
from dpcompile.inline import inline
from dpcompile.ir import Draft, Input, InputKind, Program, Space
from dpcompile.joined import joined
from dpcompile.passes.combine import GroupReader
from dpcompile.passes.rewrite import Order
from dpcompile.plan import Method
from dpcompile.rounding import unit
from dpcompile.torch_internals import fake_mode_of


def insert_norms(draft: Draft, order: Order) -> Draft:
    """The program with norms and clip factors.

    One norm for each clip group, as soon as the gradients of its parameters are there: with one group for each layer
    a layer is clipped before the backward goes on, and nothing of it is kept (NanoBatch Privacy, arXiv:2109.12191).

    In the split form a loss that is a mean over samples hands over 1/B of each sample's own gradient: the norm is
    multiplied back by B. In the fused form the gradients are each sample's own, and the factors carry the 1/B. The
    norms leave as a result of the fused graph, and through records.record_norms where the backward is its own graph.
    """
    program, clipping = draft.program, order.clipping
    graph = program.graph
    targets = {i.node: i.target for i in program.inputs}
    totals: list[list[fx.Node]] = [[] for _ in clipping.groups]
    together: list[list[fx.Node]] = [[] for _ in clipping.groups]
    clip_group: dict[str, int] = {}
    kept: dict[str, tuple[str, ...]] = {}
    for reader in order.readers:
        own = {p: clipping.group_of(targets[p]) for p in reader.group.params}
        clip_group |= own
        norm, gradients = _norm_of(graph, reader, order)
        if norm is not None:
            totals[own[reader.group.params[0]]].append(norm)
            continue
        kept[reader.group.name] = tuple(node.name for node in gradients)
        for param, gradient in zip(reader.group.params, gradients, strict=True):
            together[own[param]].append(gradient)
    for total, gradients in zip(totals, together, strict=True):
        if gradients:
            total += inline(graph, _kept, gradients, "norm", memo=order.memo, key="kept norm")
    bound, weight = _bound_and_weight(program, len(clipping.groups))
    inputs = (*program.inputs, Input(bound.name, InputKind.BOUND), Input(weight.name, InputKind.WEIGHT))
    alive = [i for i, parts in enumerate(totals) if parts]
    trained = {graph_input.meta["val"].dtype for graph_input in _trainable(program)}
    join = _join(order, torch.float64 if torch.float64 in trained else torch.float32)
    key = ("join", order.fused, order.mean, order.views)
    norms = {i: inline(graph, join, totals[i], "norm", memo=order.memo, key=key)[0] for i in alive}
    last = max(alive, key=lambda i: norms[i]._sort_key)
    parts = [norms[i] for i in alive]
    count = len(clipping.groups)
    (stacked,) = inline(graph, _stack(alive, count), parts, "norm", memo=order.memo, key=("stack", *alive, count))
    if not order.fused:
        handle = _placeholder(graph, "handle", 0)
        inputs = (*inputs, Input(handle.name, InputKind.HANDLE))
        with graph.inserting_after(stacked):
            recorded = graph.call_function(records.OP, (stacked, handle))
        recorded.meta = dict(stacked.meta)
        stacked = recorded
    # The last factors are read off the record, so that no compiler drops it; earlier layers need not wait for it.
    factors = {
        i: inline(
            graph,
            _factor(order, i, stacked=i == last),
            [stacked if i == last else norms[i], bound, weight],
            "norm",
            memo=order.memo,
            key=("factor", clipping.function, i, i == last, order.fused, order.mean, order.views),
        )
        for i in alive
    }
    return replace(
        draft,
        program=replace(program, inputs=inputs),
        norms=stacked.name,
        factors={param: tuple(node.name for node in factors[i]) for param, i in clip_group.items()},
        kept=kept,
    )


def _norm_of(graph: fx.Graph, reader: GroupReader, order: Order) -> tuple[fx.Node | None, list[fx.Node]]:
    """The group's norm [2, B] (certified.py), or the gradients that are kept instead."""
    if reader.group.space is Space.PULLBACK:
        inputs = [*reader.inputs, *reader.sources]
        return None, inline(graph, reader.pulled_back, inputs, "norm", vmapped=True)
    method = order.plan.method(reader.group.name)
    (made,) = inline(
        graph,
        norm_function(reader, method),
        reader.inputs,
        "norm",
        vmapped=reader.vmapped,
        memo=order.memo,
        key=("norm", method, reader.key),
    )
    return (None, [made]) if method.keeps else (made, [])


def _bound_and_weight(program: Program, groups: int) -> tuple[fx.Node, fx.Node]:
    nodes = program.nodes()
    device = next(nodes[i.node].meta["val"].device for i in program.inputs if i.kind is InputKind.PARAMETER)
    with fake_mode_of(program.graph):
        bound = torch.empty(groups, dtype=torch.float64, device=device)
        weight = torch.empty([program.batch], device=device)  # pyright: ignore[reportArgumentType]
    made = _placeholder(program.graph, "max_grad_norm", bound)
    return made, _placeholder(program.graph, "sample_weight", weight)


def _placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _trainable(program: Program) -> list[fx.Node]:
    nodes = program.nodes()
    return [nodes[item.node] for item in program.inputs if item.trainable]


def _join(order: Order, dtype: torch.dtype):
    def join(*parts: torch.Tensor) -> list[torch.Tensor]:
        square, error = added(parts).unbind()
        norms = ((square.sqrt() + error.sqrt()) * (1 + 8 * unit(dtype))).to(dtype)  # and for the factors' own rounding
        norms = settled.OP(norms)
        if order.fused:
            return [norms]
        return [norms * norms.shape[0] if order.mean else norms / order.views if order.views > 1 else norms]

    return join


def _stack(alive: Sequence[int], count: int):
    def stack(*norms: torch.Tensor) -> list[torch.Tensor]:
        given = dict(zip(alive, norms, strict=True))
        zero = torch.zeros_like(norms[0])
        if count == 1:
            return [norms[0].unsqueeze(0)]
        return [joined([given.get(i, zero).unsqueeze(0) for i in range(count)], 0)]

    return stack


def _factor(order: Order, group: int, *, stacked: bool):
    def factor(norms: torch.Tensor, bound: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        own = norms[group] if stacked else norms
        finite = own.isfinite()
        clipped = order.clipping.factor(own, bound[group]) * weight.to(own.dtype)
        clipped = torch.where(finite, clipped, 0)
        if order.fused:
            return [clipped / own.shape[0] if order.mean else clipped, finite]
        return [clipped / order.views if order.views > 1 and not order.mean else clipped, finite]

    return factor


def norm_function(reader: GroupReader, method: Method) -> Callable[..., list[torch.Tensor]]:
    """Of a group's inputs: its norm [2, B], or the gradients that are kept."""

    def norm(*tensors: torch.Tensor) -> list[torch.Tensor]:
        if method.keeps:
            return [reader.explicit_sum(tensors, looped=method is Method.LOOPED)]
        forms = reader.combined(tensors)
        if method is Method.STREAMED:
            (form,) = forms
            assert isinstance(form, Patched)
            return [streamed_norm(form)]
        if method not in (Method.SHIFTED, Method.FLASH, Method.TILED):  # kernels may read patches off the image
            forms = list(map(written_out, forms))
        if method.ghost:
            return [ghost_norm(forms, flash=method is Method.FLASH)]  # type: ignore[arg-type]
        return [dropped_norm(forms, tiled=method is Method.TILED)]

    return norm


def _kept(*gradients: torch.Tensor) -> list[torch.Tensor]:
    return [kept_norm(gradients)]
