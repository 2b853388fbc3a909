"""The proof in words: where the batch is in what each module gives, and the way by which samples reach an offender."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import fx

from dpcompile.errors import Finding
from dpcompile.ir import Input, InputKind, Kind, OutputKind, Program, Tracked, Value
from dpcompile.origin import modules_of, op_name, origin
from dpcompile.rules.batching.base import shape_of

WITHOUT_BATCH = {
    Kind.CONSTANT: "none: constant",
    Kind.PARAMETER: "none: made from parameters alone",
    Kind.MIXED: "samples mixed",
}
ACROSS = (Kind.REDUCED, Kind.ROWS)
SAMPLES = (Kind.BATCHED, Kind.MIXED, *ACROSS)
LEGEND = (
    "Batch: the dimension in which sample i has slice i. (5 x B x 2): folded, 5 before it and 2 behind it in one "
    "dimension."
)


def proof_text(program: Program, tracked: Tracked) -> str:
    """A table of the inputs and of every module: what it gives, and where the batch is in that."""
    rows = [("input", "", "gives", "batch")]
    for item in program.inputs_of(InputKind.USER):
        node = program.node(item.node)
        if isinstance(node.meta.get("val"), torch.Tensor):
            rows.append((item.target, "", _shape(program, node), _batch(_value(tracked, node))))
    rows += [("", "", "", ""), ("module", "class", "gives", "batch")]
    last = None
    for given in _folded(_modules(program, tracked)):
        path = given.label()
        rows.append(("" if path == last else path, "" if path == last else given.type, given.shape, given.batch))
        last = path
    return f"{LEGEND}\n\n{_table(rows)}"


def chains_text(program: Program, tracked: Tracked, findings: Sequence[Finding]) -> str:
    """For every finding the shortest way from an input of the model to its op, one op a line."""
    return "\n\n".join(_chain_text(program, tracked, at, finding) for at, finding in enumerate(findings, 1))


# ---------------------------------------------------------------- modules


@dataclass(frozen=True)
class _Given:
    """One result of one module, or of several that differ by layer numbers only."""

    words: tuple[str, ...]  # the path, with "{}" for each number
    numbers: tuple[tuple[int, ...], ...]  # for each of them, the numbers that it stands for
    type: str
    shape: str
    batch: str

    def label(self) -> str:
        spans = map(_span, self.numbers)
        return ".".join(next(spans) if word == "{}" else word for word in self.words)


def _modules(program: Program, tracked: Tracked) -> Iterator[_Given]:
    """What leaves each module, in the order in which the modules are first called."""
    results = {output.node for output in program.outputs if output.kind is OutputKind.USER}
    found: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for node in program.graph.nodes:
        for call, module in (modules_of(node) or {}).items():
            rows = found.setdefault(module, {})
            if isinstance(node.meta.get("val"), torch.Tensor) and (node.name in results or _leaves(node, call)):
                rows[_shape(program, node), _batch(_value(tracked, node))] = None
    for (path, kind), rows in found.items():
        parts = path.split(".")
        words = tuple("{}" if part.isdecimal() else part for part in parts)
        numbers = tuple((int(part),) for part in parts if part.isdecimal())
        yield from (_Given(words, numbers, kind, shape, batch) for shape, batch in rows)


def _leaves(node: fx.Node, call: str) -> bool:
    """Whether something outside a module call reads a value."""
    for user in node.users:
        modules = modules_of(user)
        if user.op == "output" or not isinstance(user.meta.get("val"), (torch.Tensor, list, tuple)):
            continue  # the results are known by name; sizes are no data
        if _leaves(user, call) if modules is None else call not in modules:
            return True
    return False


def _folded(rows: Iterable[_Given]) -> list[_Given]:
    """Rows that differ in one layer number only become one, at the place of the first; then in the next number."""
    found = list(rows)
    for at in range(max((len(row.numbers) for row in found), default=0)):
        alike: dict[_Given, list[_Given]] = {}
        for row in found:
            blank = tuple(() if i == at else numbers for i, numbers in enumerate(row.numbers))
            alike.setdefault(replace(row, numbers=blank), []).append(row)
        found = [_joined(same, at) for same in alike.values()]
    return found


def _joined(rows: list[_Given], at: int) -> _Given:
    if len(rows) == 1:
        return rows[0]
    numbers = list(rows[0].numbers)
    numbers[at] = tuple(sorted({number for row in rows for number in row.numbers[at]}))
    return replace(rows[0], numbers=tuple(numbers))


def _span(numbers: tuple[int, ...]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


# ---------------------------------------------------------------- chains


def _chain_text(program: Program, tracked: Tracked, at: int, finding: Finding) -> str:
    node = _offender(program, finding)
    if node is None:
        return f"{at}. {finding.op} in `{finding.module}`: not found in the graph"
    chain = _chain(program, tracked, node)
    inputs = {item.node: item for item in program.inputs}
    rows = [("", "op", "module", "gives", "batch", "source")]
    for step in chain:
        if step.op == "placeholder":
            rows.append(("", _kind(inputs[step.name]), inputs[step.name].target, *_given(program, tracked, step), ""))
        elif op_name(step) != "getitem":  # it picks one of several results: no step of its own
            where = origin(step)
            module = f"{where.module} ({where.module_type})" if where.module_type else where.module
            mark = "->" if step is node else ""
            rows.append((mark, op_name(step), module, *_given(program, tracked, step), where.line))
    start = inputs.get(chain[0].name)
    source = f"from {_kind(start)} `{start.target}` " if start is not None else ""
    return f"{at}. the way {source}to {finding.op} in `{finding.module}`:\n{_table(rows)}"


def _offender(program: Program, finding: Finding) -> fx.Node | None:
    """The node that a finding is about: as it says, else the first op of that module and line."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        where = origin(node)
        op = finding.op.partition(".")[0]
        if node.name == finding.node or (
            not finding.node and (where.module, where.line, op_name(node)) == (finding.module, finding.line, op)
        ):
            return node
    return None


def _chain(program: Program, tracked: Tracked, node: fx.Node) -> list[fx.Node]:
    """The shortest way to a node from an input with samples, through values that carry samples where there is one.

    It leads through what was taken over several samples before (the mean in `x - x.mean(0)`) where the node reads
    that. A node that only takes the batch size is reached through that size, and one that no sample reaches from a
    parameter.
    """
    nodes = program.nodes()
    users = [item.node for item in program.inputs_of(InputKind.USER)]
    batched = [item.node for item in program.inputs_of(InputKind.USER) if item.batch_dim is not None]
    others = [item.node for item in program.inputs if item.kind is not InputKind.USER]
    everything = nx.DiGraph((a.name, b.name) for b in nodes.values() for a in b.all_input_nodes)
    everything.add_node(node.name)
    samples = everything.subgraph([name for name, n in nodes.items() if n is node or _carries(tracked, n, *SAMPLES)])
    across = [arg.name for arg in node.all_input_nodes if _carries(tracked, arg, *ACROSS)]
    for graph, sources in ((samples, batched), (everything, batched), (everything, users), (everything, others)):
        for ends in (across, [node.name]):
            ways = [
                nx.shortest_path(graph, source, end)
                for source in sources
                for end in ends
                if source in graph and end in graph and nx.has_path(graph, source, end)
            ]
            if ways:
                names = min(ways, key=len)
                return [nodes[name] for name in names] + ([] if names[-1] == node.name else [node])
    return [node]


def _carries(tracked: Tracked, node: fx.Node, *kinds: Kind) -> bool:
    found = tracked.values.get(node.name)
    return any(v is not None and v.kind in kinds for v in (found if isinstance(found, tuple) else (found,)))


# ---------------------------------------------------------------- words


def _given(program: Program, tracked: Tracked, node: fx.Node) -> tuple[str, str]:
    """Shape and batch of a node's result, of the first of several."""
    return _shape(program, node), _batch(_value(tracked, node))


def _kind(item: Input) -> str:
    return "input" if item.kind is InputKind.USER else item.kind.value


def _value(tracked: Tracked, node: fx.Node) -> Value:
    found = tracked.values[node.name]
    return found[0] if isinstance(found, tuple) else found


def _shape(program: Program, node: fx.Node) -> str:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(first, torch.Tensor):
        return "a number"
    symbol = str(program.batch.node.expr)
    return "[" + ", ".join("B" if str(s) == symbol else str(s).replace(symbol, "B") for s in shape_of(first)) + "]"


def _batch(value: Value) -> str:
    if value.kind is Kind.REDUCED:
        return "mean over samples" if value.mean else "sum over samples"
    if value.axis is None:
        return WITHOUT_BATCH[value.kind]
    fold = f" ({value.axis.outer} x B x {value.axis.inner})" if value.axis.folded else ""
    rows = ", numbers of the samples" if value.kind is Kind.ROWS else ""
    return f"dim {value.axis.dim}{fold}{rows}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, each as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
