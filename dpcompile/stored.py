"""Graphs as plain data, to be stored and read again node by node.

torch.fx stores the code of a graph and traces it when it is read, which fails at an op that makes a tensor from sizes
alone, and changes what depends on whether it runs in a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

OWN = "dpcompile."  # what keys of a node's meta begin with that are stored: others hold fake tensors and traces


@dataclass(frozen=True)
class Reference:
    """A node among the arguments of another, by name."""

    name: str


@dataclass(frozen=True)
class Overload:
    """An op of torch.ops."""

    namespace: str
    name: str
    overload: str

    @classmethod
    def of(cls, op: torch._ops.OpOverload) -> Overload:
        return cls(op.namespace, op.overloadpacket.__name__, op._overloadname)

    def found(self) -> torch._ops.OpOverload:
        return getattr(getattr(getattr(torch.ops, self.namespace), self.name), self.overload)


@dataclass(frozen=True)
class StoredGraph:
    """Nodes in order, each with its name, kind, target, arguments and meta; and the tensors that `get_attr` reads."""

    nodes: tuple[tuple[str, str, Any, Any, Any, dict[str, Any]], ...]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: fx.GraphModule) -> StoredGraph:
        read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
        nodes = tuple(
            (n.name, n.op, _kept(n.target), _kept(n.args), _kept(dict(n.kwargs)), _own(n)) for n in module.graph.nodes
        )
        return cls(nodes, {name: getattr(module, name) for name in read})

    def module(self) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}
        for name, op, target, args, kwargs, meta in self.nodes:
            given = _found(args, made), _found(kwargs, made)
            node = graph.create_node(op, _found(target, made), *given, name=name)
            node.meta.update(meta)
            made[name] = node
        return fx.GraphModule(self.attributes, graph)


def _own(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key.startswith(OWN)}


def _kept(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return Reference(value.name)
    if isinstance(value, torch._ops.OpOverload):
        return Overload.of(value)
    return _mapped(value, _kept)


def _found(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, Reference):
        return made[value.name]
    return value.found() if isinstance(value, Overload) else _mapped(value, lambda item: _found(item, made))


def _mapped(value: Any, each: Any) -> Any:
    if isinstance(value, slice):
        return slice(each(value.start), each(value.stop), each(value.step))
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(each, value))
    return {key: each(item) for key, item in value.items()} if isinstance(value, dict) else value
