"""Finds the chains of chains.py in a graph for eager calls. A compiler sees the ops, which it fuses itself.

passes/mark_numbers.py tells which values are so small. Ops keep their order, but for those of a chain, which all run
where the first of their results is read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from dpcompile import native
from dpcompile.chain_ops import Line, Value, Writer
from dpcompile.chains import OPS, Chain

APART = "dpcompile.apart"
"""node.meta key: of an op that writes over a tensor, that this is no memory of values of a chain."""
FEWEST = 4
"""Steps that are worth a call."""


def chained(graph: fx.Graph) -> dict[str, Chain]:
    """Put a call of a `Chain` in the place of each chain of a graph. The chains, by the names that are called."""
    made: dict[str, Chain] = {}
    if native.library() is None:
        return made
    nodes = list(graph.nodes)
    writer, taken = Writer(), set[fx.Node]()
    for i, node in enumerate(nodes):
        if node in taken or writer.add(node):
            continue
        if any(source in writer.values for source in node.all_input_nodes) or _changes(node):
            if writer.values and not _changes(node):
                _look_ahead(writer, [node for node in nodes[i:] if node not in taken])
            taken.update(_put(graph, writer, node, made))
            writer = Writer()
            writer.add(node)
    return made


def _look_ahead(writer: Writer, nodes: Sequence[fx.Node]) -> None:
    """Add what could be computed already, in front of the first of these nodes."""
    waiting = set(nodes)
    for node in nodes:
        if _changes(node):
            return
        if all(source in writer.values or source not in waiting for source in node.all_input_nodes):
            writer.add(node)


def _changes(node: fx.Node) -> bool:
    """Whether an op writes over what a chain may read."""
    return is_mutable(node) and APART not in node.meta


def is_mutable(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _put(graph: fx.Graph, writer: Writer, before: fx.Node, chains: dict[str, Chain]) -> list[fx.Node]:
    """A chain in the place of its ops, if it is worth a call. The ops."""
    nodes = list(writer.values)
    wanted = [node for node in nodes if any(user not in writer.values for user in node.users)]
    inputs = {node: value for node, value in writer.inputs.items() if any(user in writer.values for user in node.users)}
    results = [value for node in wanted if isinstance(value := writer.values[node], Value)]
    told = any(None in value.numbers.shape for value in inputs.values())  # how many samples there are
    if sum(op != "round" for op, _ in writer.steps) < FEWEST or len(results) < len(wanted) or not told:
        return []
    own = fx.Graph()
    made = {node: own.placeholder(node.name) for node in inputs}
    for node in nodes:
        made[node] = own.node_copy(node, made.__getitem__)
    own.output([made[node] for node in wanted])
    read, write = [value.numbers for value in inputs.values()], [value.numbers for value in results]
    name = f"chain_{before.name}"
    chains[name] = Chain(_steps(writer, inputs, results), read, write, fx.GraphModule({}, own))
    with graph.inserting_before(before):
        call = graph.call_module(name, tuple(inputs))
        for i, node in enumerate(wanted):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in writer.values)
    for node in reversed(nodes):
        graph.erase_node(node)
    return nodes


def _steps(writer: Writer, inputs: dict[fx.Node, Value], results: Sequence[Value]) -> native.Steps:
    first, starts = len(writer.constants), {}
    for node, value in inputs.items():
        starts[node] = first
        first += len(value.lines)

    def place(line: Line) -> int:
        kind, at = line
        if kind == "input":
            node, number = at
            return starts[node] + number
        return at if kind == "constant" else first + at

    code = [n for op, lines in writer.steps for n in (OPS.index(op), *(*map(place, lines), 0, 0)[:3])]
    return native.Steps.of(
        tuple(writer.constants),
        [value.numbers.kind for value in inputs.values()],
        code,
        [value.numbers.kind for value in results],
        [place(line) for value in results for line in value.lines],
    )
