"""find-sites: every use of every trainable parameter, grouped by which uses must be added before a norm is taken.

The parameter-use graph is a networkx DiGraph: parameter -> derived value -> site. Tied and shared weights, packed
projections and low-rank factors are its connected components.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.fx.node import map_arg

from dpcompile.errors import Finding, refusal
from dpcompile.ir import (
    Chain,
    Derived,
    Group,
    InputKind,
    Kind,
    Program,
    Site,
    Space,
    Tracked,
    Uses,
    Value,
    ancestors,
)
from dpcompile.origin import origin
from dpcompile.rules.derive import permutation_of, selects
from dpcompile.rules.sites import rule_for
from dpcompile.rules.sites.base import Call, Work, bind, slots_of
from dpcompile.rules.sites.embedding import shared_index, shared_work


def find_sites(program: Program, tracked: Tracked) -> Uses:
    """Every use, in graph order.

    Raises:
        NoRuleError: an op reads a parameter in a way that no rule handles.
    """
    placeholders = {i.node: i for i in program.inputs if i.kind is InputKind.PARAMETER and i.trainable}
    live = _live(program)
    derived: dict[str, Derived] = {}
    sites: list[Site] = []
    findings: list[Finding] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in live or node.target is operator.getitem:
            continue
        if not _is_batched(tracked.values.get(node.name)):
            continue
        call = call_of(node, tracked)
        if not call.slots or _adds_penalty(node, tracked):
            continue
        rule = rule_for(call)
        where = origin(node)
        if rule is None:
            findings.append(_no_rule(node, call))
            continue
        for slot in call.slots:
            value = call.operand(slot)
            derived.setdefault(value.name, _derive(value, tracked))
            sites.append(
                Site(
                    f"{node.name}:{slot}",
                    node.name,
                    slot,
                    value.name,
                    rule.name,
                    node.target._schema.name.split("::")[1],  # type: ignore[union-attr]
                    where.module,
                    rule.work(call, slot),
                )
            )
    if findings:
        raise refusal(findings, "find-sites")
    graph = use_graph(derived.values(), sites)
    groups = [group for part in _components(graph, placeholders) for group in _groups(part, program, derived, sites)]
    reached = {param for group in groups for param in group.params}
    unused = tuple(name for name in placeholders if name not in reached)
    return Uses(tuple(groups), unused, tuple(derived.values()))


def call_of(node: fx.Node, tracked: Tracked) -> Call:
    arguments = bind(node)
    slots = tuple(
        slot for slot, operand in slots_of(arguments).items() if _is_parameter(tracked.values.get(operand.name))
    )
    return Call(node, arguments, tracked.values, slots)


def use_graph(values: Iterable[Derived], sites: Iterable[Site]) -> nx.DiGraph:
    """Edges parameter -> value -> site; nodes are ("parameter" | "value" | "site", name)."""
    graph = nx.DiGraph()
    for value in values:
        for param in value.params:
            graph.add_edge(("parameter", param), ("value", value.node))
    for site in sites:
        graph.add_edge(("value", site.value), ("site", site.name))
    return graph


def _live(program: Program) -> set[fx.Node]:
    """Nodes that some result depends on."""
    nodes = program.nodes()
    return ancestors([nodes[o.node] for o in program.outputs if o.node is not None])


def _is_batched(value: Value | tuple[Value, ...] | None) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return any(part is not None and part.kind in (Kind.BATCHED, Kind.REDUCED) for part in parts)


def _adds_penalty(node: fx.Node, tracked: Tracked) -> bool:
    """What is done with a sum over samples reads parameters as a penalty only, which no sample has a part in."""
    values = [tracked.values.get(arg.name) for arg in node.all_input_nodes]
    return any(isinstance(value, Value) and value.kind is Kind.REDUCED for value in values)


def _is_parameter(value: Value | tuple[Value, ...] | None) -> bool:
    return isinstance(value, Value) and value.kind is Kind.PARAMETER


def _no_rule(node: fx.Node, call: Call) -> Finding:
    where = origin(node)
    name = str(node.target).removeprefix("aten.")
    return Finding(
        where.module,
        where.module_type,
        name,
        where.line,
        f"uses a parameter (argument {', '.join(call.slots)}) in a way that no site rule handles",
        "write a rule in dpcompile/rules/sites/ (see CONTRIBUTING.md), or write the op with linear, conv, embedding "
        "or pointwise ops",
        mixes=False,
    )


def _derive(value: fx.Node, tracked: Tracked) -> Derived:
    """How a value is computed from parameters: walk back until constants and placeholders."""
    body: dict[fx.Node, None] = {}
    params: dict[fx.Node, None] = {}
    leaves: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in body or node in params or node in leaves:
            return
        known = tracked.values.get(node.name)
        parts = known if isinstance(known, tuple) else (known,)
        if not any(_is_parameter(part) for part in parts):
            leaves[node] = None
        elif node.op == "placeholder":
            params[node] = None
        else:
            for source in node.all_input_nodes:
                visit(source)
            body[node] = None

    visit(value)
    chain, permutation = _chain(value, body, params)
    return Derived(
        value.name,
        tuple(node.name for node in params),
        chain,
        permutation,
        tuple(node.name for node in body),
        tuple(node.name for node in leaves),
    )


def _chain(value: fx.Node, body: dict[fx.Node, None], params: dict[fx.Node, None]) -> tuple[Chain, tuple[int, ...]]:
    if len(params) != 1 or any(not isinstance(node.meta["val"], torch.Tensor) for node in params):
        return Chain.GENERAL, ()
    order = tuple(range(value.meta["val"].dim()))
    composed: tuple[int, ...] | None = order
    for node in reversed(body):
        own = permutation_of(node)
        if own is None or composed is None:
            composed = None
            break
        composed = tuple(own[i] for i in composed)
    if composed is not None:
        return Chain.PERMUTE, composed
    if len(body) == 1 and shared_index(value) is not None:  # of the parameter itself: an index is none
        return Chain.LOOKUP, ()
    if all(selects(node) or node.target is operator.getitem for node in body):
        return Chain.SELECT, ()
    return Chain.GENERAL, ()


def _components(graph: nx.DiGraph, placeholders: Iterable[str]) -> list[set[tuple[str, str]]]:
    """Connected components, in the order of their first parameter."""
    order = {name: i for i, name in enumerate(placeholders)}
    parts = [set(part) for part in nx.weakly_connected_components(graph)]
    return sorted(parts, key=lambda part: min(order[name] for kind, name in part if kind == "parameter"))


def _groups(
    part: set[tuple[str, str]], program: Program, derived: dict[str, Derived], sites: list[Site]
) -> list[Group]:
    values = tuple(v for v in derived.values() if ("value", v.node) in part)
    own = tuple(s for s in sites if ("site", s.name) in part)
    params = tuple(dict.fromkeys(p for v in values for p in v.params))
    name = next(i.target for i in program.inputs if i.node == params[0])
    if all(v.chain is Chain.PERMUTE for v in values):
        return [Group(name, Space.PARAMETER, values, params, own)]
    if len(params) == 1 and all(v.chain is not Chain.GENERAL for v in values) and distinct(program, values):
        return [
            Group(
                name if len(values) == 1 else f"{name}#{i}",
                Space.VALUE,
                (value,),
                params,
                tuple(s for s in own if s.value == value.node),
            )
            for i, value in enumerate(values)
        ]
    if all(v.chain in (Chain.PERMUTE, Chain.LOOKUP) for v in values):
        looked_up = {v.node: v for v in values if v.chain is Chain.LOOKUP}
        if all(s.work.kind == "explicit" for s in own if s.value in looked_up):
            sizes = {name: _work_of(v, program) for name, v in looked_up.items()}
            own = tuple(replace(s, work=sizes.get(s.value, s.work)) for s in own)
            return [Group(name, Space.PARAMETER, values, params, own)]
    return [Group(name, Space.PULLBACK, values, params, own)]


def _work_of(lookup: Derived, program: Program) -> Work:
    """The size of one use of rows that every sample reads."""
    nodes = program.nodes()
    index = shared_index(nodes[lookup.node])
    assert index is not None
    return shared_work(index.meta["val"], tuple(nodes[lookup.params[0]].meta["val"].shape))


# Index maps of larger parameters are not evaluated at compile time; the exact pullback is taken instead.
_LARGEST_INDEX_MAP = 2**26


def distinct(program: Program, values: tuple[Derived, ...]) -> bool:
    """Whether no element of the parameter is read twice, within a value or across values.

    Decided by running the chain on the numbers 0..n-1 in the parameter's place. Only literals may steer it: what a
    buffer holds can change after compilation.
    """
    nodes = program.nodes()
    param = nodes[values[0].params[0]].meta["val"]
    if any(not isinstance(size, int) for size in param.shape) or param.numel() > _LARGEST_INDEX_MAP:
        return False
    literals = {i.node: program.constants[i.target] for i in program.inputs if i.kind is InputKind.CONSTANT}
    seen = torch.zeros(param.numel(), dtype=torch.bool)
    for value in values:
        index = _index_map(nodes, value, literals)
        if index is None:
            return False
        flat = index.flatten()
        if bool(seen[flat].any()) or flat.unique().numel() != flat.numel():
            return False
        seen[flat] = True
    return True


def _index_map(nodes: dict[str, fx.Node], value: Derived, literals: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    known: dict[fx.Node, Any] = {nodes[name]: tensor.cpu() for name, tensor in literals.items()}

    def literal(node: fx.Node) -> Any:
        if node in known:
            return known[node]
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise _NotLiteralError
        value_ = node.meta.get("val")
        if isinstance(value_, torch.Tensor) and any(not isinstance(size, int) for size in value_.shape):
            raise _NotLiteralError
        args, kwargs = map_arg((node.args, dict(node.kwargs)), literal)
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    param = nodes[value.params[0]]
    shape = param.meta["val"].shape
    known[param] = torch.arange(param.meta["val"].numel()).reshape(shape)
    try:
        found = literal(nodes[value.node])
    except _NotLiteralError:
        return None
    assert isinstance(found, torch.Tensor)
    return found


class _NotLiteralError(Exception):
    """The value depends on something that may change after compilation."""
