"""Finds the chains of chains.py in a graph for eager calls. A compiler sees the ops, which it fuses itself.

passes/mark_numbers.py tells which values are so small. Ops keep their order, but for those of a chain, which wait until
the first of their results is read.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dpcompile import native, settled
from dpcompile.chains import OPS, Chain, Numbers

aten = torch.ops.aten

NUMBERS = "dpcompile.numbers"
"""node.meta key: the `Numbers` that a value is."""
APART = "dpcompile.apart"
"""node.meta key: of an op that writes over a tensor, that this is no memory of such values."""
FEWEST = 4
"""Steps that are worth a call."""

Line = tuple[str, Any]
"""Where one number of each sample is: ("constant", place), ("input", (node, which of its lines)) or ("step", place)."""


class _ApartError(Exception):
    """An op that no chain has."""


@dataclass(frozen=True)
class _Value:
    """What a node of a chain is: numbers, and where each of their lines is."""

    numbers: Numbers
    lines: tuple[Line, ...]


@dataclass
class _Writer:
    """The steps of a chain, as nodes are added to it."""

    constants: dict[float, int] = field(default_factory=dict)
    inputs: dict[fx.Node, _Value] = field(default_factory=dict)
    steps: list[tuple[str, tuple[Line, ...]]] = field(default_factory=list)
    values: dict[fx.Node, _Value | list[_Value]] = field(default_factory=dict)  # of each node, or of all its results

    def add(self, node: fx.Node) -> bool:
        """Whether the op is one of a chain: it is added then."""
        write = _WRITTEN.get(node.target)
        if node.op != "call_function" or write is None:
            return False
        before = len(self.steps)
        try:
            for source in node.all_input_nodes:
                if source not in self.values:
                    self.operand(source)
            self.values[node] = write(self, node)
        except _ApartError:
            del self.steps[before:]
        return node in self.values

    def operand(self, given: Any) -> _Value:
        if isinstance(given, fx.Node):
            found = self.values.get(given) or self.inputs.get(given)
            if found is None and NUMBERS in given.meta:
                numbers = given.meta[NUMBERS]
                found = self.inputs[given] = _Value(numbers, tuple(("input", (given, i)) for i in range(numbers.lines)))
            if not isinstance(found, _Value):
                raise _ApartError
            return found
        if not isinstance(given, (int, float)):
            raise _ApartError
        return _Value(Numbers((), None), (self.constant(float(given)),))

    def constant(self, number: float) -> Line:
        if math.isnan(number) or (number == 0 and math.copysign(1, number) < 0):
            raise _ApartError
        return "constant", self.constants.setdefault(number, len(self.constants))

    def step(self, op: str, *lines: Line) -> Line:
        self.steps.append((op, lines))
        return "step", len(self.steps) - 1

    def rounded(self, line: Line, own: torch.dtype | None, wanted: torch.dtype) -> Line:
        """A line in the type that an op computes in."""
        return self.step("round", line) if wanted is torch.float32 and own in (None, torch.float64) else line


def _made_of(node: fx.Node) -> Numbers:
    if NUMBERS not in node.meta:
        raise _ApartError
    return node.meta[NUMBERS]


# ------------------------------------------------------------------ ops

_COMPARISONS = ("eq", "ne", "lt", "le")
_EXACT = ("where", "abs", "neg", "min", "max")


def _pointwise(writer: _Writer, op: str, given: Sequence[Any], made: Numbers) -> _Value:
    operands = [writer.operand(argument) for argument in given]
    for value in operands:
        if value.numbers.shape not in ((), made.shape, made.shape[1:]) or len(value.lines) not in (1, made.lines):
            raise _ApartError
    computed = made.dtype
    if computed is None or (computed is torch.bool and op not in (*_COMPARISONS, "mul", "where")):
        raise _ApartError
    if op in _COMPARISONS:
        batched = {value.numbers.dtype for value in operands if value.numbers.shape}
        computed = torch.float64 if torch.float64 in batched or not batched else torch.float32
    lines = []
    for i in range(made.lines):
        each = [(value.lines[i % len(value.lines)], value.numbers.dtype) for value in operands]
        result = writer.step(op, *(writer.rounded(line, dtype, computed) for line, dtype in each))
        whole = op in _COMPARISONS or op in _EXACT or made.dtype is not torch.float32
        lines.append(result if whole else writer.step("round", result))
    return _Value(made, tuple(lines))


def _elementwise(op: str, *, swapped: bool = False) -> Callable[[_Writer, fx.Node], _Value]:
    def write(writer: _Writer, node: fx.Node) -> _Value:
        if node.kwargs:
            raise _ApartError
        return _pointwise(writer, op, node.args[::-1] if swapped else node.args, _made_of(node))

    return write


def _power(writer: _Writer, node: fx.Node) -> _Value:
    base, exponent = node.args
    if exponent != 2:
        raise _ApartError
    return _pointwise(writer, "mul", (base, base), _made_of(node))


def _clamp(writer: _Writer, node: fx.Node) -> _Value:
    given, low, high = (*node.args, None)[:3]
    if node.kwargs or (low is None) == (high is None):
        raise _ApartError
    return _pointwise(writer, "max" if high is None else "min", (given, high if low is None else low), _made_of(node))


def _filled(number: float) -> Callable[[_Writer, fx.Node], _Value]:
    def write(writer: _Writer, node: fx.Node) -> _Value:
        made = _made_of(node)
        return _Value(made, (writer.constant(number),) * made.lines)

    return write


def _scalar(writer: _Writer, node: fx.Node) -> _Value:
    (number,), made = node.args, _made_of(node)
    narrow = made.dtype is torch.float32
    if not isinstance(number, (int, float)) or (narrow and ctypes.c_float(number).value != number):
        raise _ApartError
    return _Value(made, (writer.constant(float(number)),))


def _converted(writer: _Writer, node: fx.Node) -> _Value:
    value, made = writer.operand(node.args[0]), _made_of(node)
    if made.dtype is torch.bool or made.dtype is None:
        raise _ApartError
    return _Value(made, tuple(writer.rounded(line, value.numbers.dtype, made.dtype) for line in value.lines))


def _viewed(writer: _Writer, node: fx.Node) -> _Value:
    """The same numbers in another shape."""
    value, made = writer.operand(node.args[0]), _made_of(node)
    if (None in value.numbers.shape) != (None in made.shape):
        raise _ApartError
    return _Value(made, value.lines)


def _lines(value: _Value) -> tuple[_Value, ...]:
    """Along the first dimension, if that is not the batch."""
    count, *rest = value.numbers.shape or (None,)
    if count is None:
        raise _ApartError
    each = Numbers(tuple(rest), value.numbers.dtype)
    return tuple(_Value(each, value.lines[i * each.lines : (i + 1) * each.lines]) for i in range(count))


def _stacked(writer: _Writer, node: fx.Node) -> _Value:
    given, *dims = node.args
    assert isinstance(given, (list, tuple))
    values = [writer.operand(argument) for argument in given]
    if any(dims) or any(value.numbers.shape != (None,) for value in values):
        raise _ApartError
    return _Value(_made_of(node), tuple(line for value in values for line in value.lines))


def _unbound(writer: _Writer, node: fx.Node) -> list[_Value]:
    given, *dims = node.args
    if any(dims):
        raise _ApartError
    return list(_lines(writer.operand(given)))


def _item(writer: _Writer, node: fx.Node) -> _Value:
    source, index = node.args
    found = writer.values.get(source)  # type: ignore[arg-type]
    if not isinstance(found, list) or not isinstance(index, int):
        raise _ApartError
    return found[index]


def _selected(writer: _Writer, node: fx.Node) -> _Value:
    given, dim, index = node.args
    if dim != 0 or not isinstance(index, int):
        raise _ApartError
    return _lines(writer.operand(given))[index]


_WRITTEN: dict[Any, Callable[[_Writer, fx.Node], _Value | list[_Value]]] = {
    aten.add.Tensor: _elementwise("add"),
    aten.sub.Tensor: _elementwise("sub"),
    aten.mul.Tensor: _elementwise("mul"),
    aten.div.Tensor: _elementwise("div"),
    aten.minimum.default: _elementwise("min"),
    aten.maximum.default: _elementwise("max"),
    aten.sqrt.default: _elementwise("sqrt"),
    aten.abs.default: _elementwise("abs"),
    aten.neg.default: _elementwise("neg"),
    aten.where.self: _elementwise("where"),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _elementwise("eq")),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _elementwise("ne")),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _elementwise("lt")),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _elementwise("le")),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _elementwise("lt", swapped=True)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _elementwise("le", swapped=True)),
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamp,
    aten.zeros_like.default: _filled(0.0),
    aten.ones_like.default: _filled(1.0),
    aten.scalar_tensor.default: _scalar,
    aten._to_copy.default: _converted,
    **dict.fromkeys((aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, settled.OP), _viewed),
    aten.stack.default: _stacked,
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
    operator.getitem: _item,
}


# ------------------------------------------------------------------ graphs


def chained(module: fx.GraphModule) -> None:
    """Put a call of a `Chain` in the place of each chain of a graph."""
    if native.library() is None:
        return
    nodes = list(module.graph.nodes)
    writer, taken = _Writer(), set[fx.Node]()
    for i, node in enumerate(nodes):
        if node in taken or writer.add(node):
            continue
        if any(source in writer.values for source in node.all_input_nodes) or _changes(node):
            if writer.values and not _changes(node):
                _look_ahead(writer, [node for node in nodes[i:] if node not in taken])
            taken.update(_put(module, writer, node))
            writer = _Writer()
            writer.add(node)
    module.recompile()


def _look_ahead(writer: _Writer, nodes: Sequence[fx.Node]) -> None:
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


def _put(module: fx.GraphModule, writer: _Writer, before: fx.Node) -> list[fx.Node]:
    """A chain in the place of its ops, if it is worth a call. The ops."""
    graph, nodes = module.graph, list(writer.values)
    wanted = [node for node in nodes if any(user not in writer.values for user in node.users)]
    inputs = {node: value for node, value in writer.inputs.items() if any(user in writer.values for user in node.users)}
    results = [value for node in wanted if isinstance(value := writer.values[node], _Value)]
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
    module.add_submodule(name, Chain(_steps(writer, inputs, results), read, write, fx.GraphModule({}, own)))
    with graph.inserting_before(before):
        call = graph.call_module(name, tuple(inputs))
        for i, node in enumerate(wanted):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in writer.values)
    for node in reversed(nodes):
        graph.erase_node(node)
    return nodes


def _steps(writer: _Writer, inputs: dict[fx.Node, _Value], results: Sequence[_Value]) -> native.Steps:
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
