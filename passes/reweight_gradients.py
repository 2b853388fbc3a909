"""reweight-gradients: the clipped sum of per-sample gradients, one contraction for each use (Book-Keeping)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from dpcompile.forms import added, weighted_sum_kept, weighted_sums
from dpcompile.inline import inline
from dpcompile.ir import Chain, Draft, Output, OutputKind, Space
from dpcompile.passes.combine import GroupReader
from dpcompile.passes.rewrite import Order
from dpcompile.plan import Method


def reweight_gradients(draft: Draft, order: Order) -> Draft:
    """The program whose results also include, for every used parameter, sum_i w_i C_i g_i; and the norms."""
    program = draft.program
    graph = program.graph
    nodes = program.nodes()
    sums: dict[str, list[fx.Node]] = {}
    for reader in order.readers:
        group, method = reader.group, order.plan.method(reader.group.name)
        kept = [nodes[name] for name in draft.kept.get(group.name, ())]
        factor = [nodes[name] for name in draft.factors[group.params[0]]]
        if group.space is Space.PULLBACK:
            for param, gradient in zip(group.params, kept, strict=True):
                factor = [nodes[name] for name in draft.factors[param]]
                sums.setdefault(param, []).extend(inline(graph, _kept_sum, [*factor, gradient], "sum"))
            continue
        if kept:
            (total,) = inline(graph, _kept_sum, [*factor, *kept], "sum", memo=order.memo, key="kept sum")
        else:
            (total,) = inline(
                graph,
                sum_function(reader, method),
                [*factor, *reader.inputs],
                "sum",
                vmapped=reader.vmapped,
                memo=order.memo,
                key=("sum", method is Method.STREAMED, reader.key),
            )
        if group.space is Space.VALUE and group.values[0].chain is not Chain.PERMUTE:
            (total,) = inline(graph, _scatter(reader), [total, *reader.sources], "sum")
        sums.setdefault(group.params[0], []).append(total)
    targets = {i.node: i.target for i in program.inputs}
    gradients = []
    for param, parts in sums.items():
        (total,) = parts if len(parts) == 1 else inline(graph, _add, parts, "sum")
        dtype = nodes[param].meta["val"].dtype
        if total.meta["val"].dtype is not dtype:  # a parameter that autocast casts, or a narrow one
            (total,) = inline(graph, _cast(dtype), [total], "sum")
        gradients.append(Output(total.name, OutputKind.GRADIENT, targets[param]))
    outputs = (*program.outputs, *gradients, Output(draft.norms, OutputKind.NORMS))
    return replace(draft, program=replace(program, outputs=outputs))


def _cast(dtype: torch.dtype):
    return lambda total: [total.to(dtype)]


def _kept_sum(factor: torch.Tensor, finite: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    return [weighted_sum_kept(gradient, factor, finite)]


def _add(*parts: torch.Tensor) -> list[torch.Tensor]:
    return [added(parts)]


def sum_function(reader: GroupReader, method: Method) -> Callable[..., list[torch.Tensor]]:
    """Of clip factors, finite samples and a group's inputs: the clipped sum."""

    def clipped(factor: torch.Tensor, finite: torch.Tensor | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
        streamed = method is Method.STREAMED
        return [weighted_sums(reader.combined(tensors), factor, finite, streamed=streamed)]

    return clipped


def _scatter(reader: GroupReader):
    def back(total: torch.Tensor, *sources: torch.Tensor) -> list[torch.Tensor]:
        (param,) = reader.params(sources)
        with torch.enable_grad():
            leaf = param.detach().requires_grad_()
            value = reader.chain(reader.group.values[0], reader.with_params(sources, [leaf]))
        return list(torch.autograd.grad(value, leaf, total.reshape(value.shape)))

    return back
