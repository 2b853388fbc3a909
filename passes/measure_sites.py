"""measure-sites: what norm and clipped sum of every group take on this machine, by each method that may be the best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dpcompile.certified import kept_norm
from dpcompile.forms import weighted_sum_kept
from dpcompile.ir import Space
from dpcompile.passes.combine import GroupReader
from dpcompile.passes.insert_norms import norm_function
from dpcompile.passes.reweight_gradients import sum_function
from dpcompile.passes.tidy import drop_no_ops, merge_common, reshape_views
from dpcompile.plan import Costs, GroupCost, Method, Times
from dpcompile.shapes import B
from dpcompile.torch_internals import fake_mode_of, sample_sizes, trace
from dpcompile.tuning import Tuner

WORSE = 4.0
"""How much more time than the best a candidate may take by the model to be measured."""
LARGEST = 2e9
"""Bytes that a candidate may need beyond the tensors of its site to be measured."""


def candidates(costs: Costs, modelled: Times, batch_size: int) -> dict[str, list[Method]]:
    """Methods that may be the best, by group; groups without a choice are left out."""
    found: dict[str, list[Method]] = {}
    for group in costs.groups:
        times = {method: modelled[group.name][method] for method in group.choices}
        most = WORSE * min(times.values())
        near = [m for m, seconds in times.items() if seconds <= most and _space(group, m, batch_size) < LARGEST]
        if len(near) > 1:
            found[group.name] = near
    return found


def measure_sites(
    readers: Sequence[GroupReader],
    methods: Mapping[str, Sequence[Method]],
    batch_size: int,
    tuner: Tuner,
) -> Times:
    """Seconds by group and method. Gradients that are carried through what computes a parameter are left out."""
    found: dict[str, dict[Method, float]] = {}
    for reader in readers:
        own = methods.get(reader.group.name, ())
        if not own or reader.group.space is Space.PULLBACK:
            continue
        rows = min(site.work.p for site in reader.sites)  # of a table that is looked up
        kind = str(reader.key).replace(str(reader.batch), "B")
        what = (kind, batch_size, sorted(method.value for method in own))
        inputs = functools.cache(functools.partial(_inputs, reader, batch_size, rows))
        found[reader.group.name] = tuner.seconds(what, {m: functools.partial(_step, reader, m, inputs) for m in own})
    return found


def _space(group: GroupCost, method: Method, batch_size: int) -> float:
    costs = [part.options[method].numbers({**part.sizes, B: batch_size}) for part in group.parts]
    return sum(cost.held + cost.transient for cost in costs)


def _inputs(reader: GroupReader, batch_size: int, rows: int) -> list[Any]:
    """Random tensors like those of the group's sites; places of a look-up are among its rows."""
    sizes = sample_sizes(reader.batch) | {reader.batch.node.expr: batch_size}
    made = []
    for node in reader.inputs:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            made.append(value)
            continue
        shape = [s if isinstance(s, int) else int(s.node.expr.subs(list(sizes.items()))) for s in value.shape]
        if value.is_floating_point():
            made.append(torch.randn(shape, device=value.device).to(value.dtype))
        else:
            made.append(torch.randint(max(rows, 1), shape, device=value.device).to(value.dtype))
    return made


def _step(reader: GroupReader, method: Method, inputs: Callable[[], list[Any]]) -> Callable[[], Any]:
    """Norm, then clipped sum, as the emitted graph computes them."""

    def both(*tensors: torch.Tensor) -> list[torch.Tensor]:
        (made,) = norm_function(reader, method)(*tensors)
        factor = torch.ones([reader.batch], device=tensors[0].device)  # pyright: ignore[reportArgumentType]
        if method.keeps:
            return [kept_norm([made]), weighted_sum_kept(made, factor)]
        return [
            made,
            *sum_function(reader, method)(factor, None, *tensors),
        ]  # all samples are finite: nothing is cleared

    graph = trace(
        both,
        *(node.meta["val"] for node in reader.inputs),
        mode=fake_mode_of(reader.inputs[0].graph),
        vmapped=reader.vmapped,
    )
    drop_no_ops(graph.graph)
    reshape_views(graph.graph)
    merge_common(graph.graph)
    graph.recompile()
    given = inputs()

    def run() -> Any:
        with torch.no_grad():
            return graph(*given)

    return run
