"""estimate-costs: the price of every group of uses, by method, as sympy expressions; and of what all methods share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from dpcompile.ir import Backward, Group, Program, Site, Space, Uses
from dpcompile.plan import Cost, Costs, GroupCost, Method, Part
from dpcompile.rules import costs as rules
from dpcompile.shapes import B, D, G, P, T


def estimate_costs(program: Program, backward: Backward, uses: Uses) -> Costs:
    """Costs of every group that has a live site. Flops of the backbone are counted on the traced graph."""
    nodes = program.nodes()
    groups = []
    for group in uses.groups:
        live = [site for site in group.sites if site.name in backward.sites]
        if live:
            itemsize = nodes[live[0].value].meta["val"].element_size()
            groups.append(GroupCost(group.name, tuple(_parts(group, live, itemsize))))
    itemsize = max((nodes[p].meta["val"].element_size() for g in uses.groups for p in g.params), default=4)
    return Costs(tuple(groups), count_flops(backward.program), itemsize)


def _parts(group: Group, sites: Sequence[Site], e: int) -> list[Part]:
    kinds: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        work = site.work
        shape = (work.kind, frozenset((work.p, work.d)), work.G) if work.kind == "outer" else (work.kind, work.p, work.d)
        kinds.setdefault(shape, []).append(site)
    merged = []
    for alike in kinds.values():
        work = alike[0].work
        positions = sum(site.work.T for site in alike)
        merged.append((alike, work, positions))
    factored = all(work.kind != "explicit" for _, work, _ in merged) and group.space is not Space.PULLBACK
    spans = {frozenset((work.p, work.d)) for _, work, _ in merged}
    ghost = factored and len(spans) == 1
    parts = []
    for alike, work, positions in merged:
        sizes = {T: positions, D: work.d, P: work.p, G: work.G}
        if work.kind == "outer":
            plain, options = rules.outer(e, positions)
        elif work.kind == "onehot":
            plain, options = rules.onehot(e)
        else:
            plain, options = rules.explicit(e)
        if not ghost and work.kind != "explicit":
            options = {m: c for m, c in options.items() if m is not Method.GHOST}
        parts.append(_part(group, alike, work.kind, sizes, plain, options))
    if ghost and len(merged) == 2:
        (left, work, left_T), (_, _, right_T) = sorted(merged, key=lambda item: item[1].kind)
        plain, options = rules.cross(e, left_T, right_T)
        sizes = {T: left_T * right_T, D: work.d, P: work.p, G: 1}
        parts.append(_part(group, left, "cross", sizes, plain, options))
    return parts


def _part(group: Group, sites: Sequence[Site], kind: str, sizes: Any, plain: Cost, options: Any) -> Part:
    modules = list(dict.fromkeys(site.module for site in sites))
    label = modules[0] if len(modules) == 1 else f"{modules[0]} (+{len(modules) - 1})"
    return Part(group.name, label, sites[0].op, kind, len(sites), sizes, plain, options)


def count_flops(program: Program) -> sympy.Expr:
    """Matmul flops of a graph, in B, by torch's own formulas (torch.utils.flop_counter) on symbolic shapes."""
    batch = program.batch.node.expr
    total: sympy.Expr = sympy.Integer(0)
    for node in program.graph.nodes:
        total += flops_of(node)
    return sympy.expand(total.subs({batch: B}))


def flops_of(node: fx.Node) -> sympy.Expr:
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return sympy.Integer(0)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    count = flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    return count.node.expr if isinstance(count, torch.SymInt) else sympy.sympify(count)
