"""Ops as steps of a chain: what each of them does to the few numbers of every sample."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dpcompile import settled
from dpcompile.chains import Numbers

aten = torch.ops.aten

NUMBERS = "dpcompile.numbers"
"""node.meta key: the `Numbers` that a value is."""

Line = tuple[str, Any]
"""Where one number of each sample is: ("constant", place), ("input", (node, which of its lines)) or ("step", place)."""


class ApartError(Exception):
    """What no chain has."""


@dataclass(frozen=True)
class Value:
    """What a node of a chain is: numbers, and where each of their lines is."""

    numbers: Numbers
    lines: tuple[Line, ...]


@dataclass
class Writer:
    """The steps of a chain, as nodes are added to it."""

    constants: dict[float, int] = field(default_factory=dict)
    inputs: dict[fx.Node, Value] = field(default_factory=dict)
    steps: list[tuple[str, tuple[Line, ...]]] = field(default_factory=list)
    values: dict[fx.Node, Value | list[Value]] = field(default_factory=dict)  # of each node, or of all its results

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
        except ApartError:
            del self.steps[before:]
        return node in self.values

    def operand(self, given: Any) -> Value:
        if isinstance(given, fx.Node):
            found = self.values.get(given) or self.inputs.get(given)
            if found is None and NUMBERS in given.meta:
                numbers = given.meta[NUMBERS]
                found = self.inputs[given] = Value(numbers, tuple(("input", (given, i)) for i in range(numbers.lines)))
            if not isinstance(found, Value):
                raise ApartError
            return found
        if not isinstance(given, (int, float)):
            raise ApartError
        return Value(Numbers((), None), (self.constant(float(given)),))

    def constant(self, number: float) -> Line:
        if math.isnan(number) or (number == 0 and math.copysign(1, number) < 0):
            raise ApartError
        return "constant", self.constants.setdefault(number, len(self.constants))

    def step(self, op: str, *lines: Line) -> Line:
        self.steps.append((op, lines))
        return "step", len(self.steps) - 1

    def rounded(self, line: Line, own: torch.dtype | None, wanted: torch.dtype) -> Line:
        """A line in the type that an op computes in."""
        return self.step("round", line) if wanted is torch.float32 and own in (None, torch.float64) else line


def _made_of(node: fx.Node) -> Numbers:
    if NUMBERS not in node.meta:
        raise ApartError
    return node.meta[NUMBERS]


_COMPARISONS = ("eq", "ne", "lt", "le")
_EXACT = ("where", "abs", "neg", "min", "max")


def _pointwise(writer: Writer, op: str, given: Sequence[Any], made: Numbers) -> Value:
    operands = [writer.operand(argument) for argument in given]
    for value in operands:
        if value.numbers.shape not in ((), made.shape, made.shape[1:]) or len(value.lines) not in (1, made.lines):
            raise ApartError
    computed = made.dtype
    if computed is None or (computed is torch.bool and op not in (*_COMPARISONS, "mul", "where")):
        raise ApartError
    if op in _COMPARISONS:
        batched = {value.numbers.dtype for value in operands if value.numbers.shape}
        computed = torch.float64 if torch.float64 in batched or not batched else torch.float32
    lines = []
    for i in range(made.lines):
        each = [(value.lines[i % len(value.lines)], value.numbers.dtype) for value in operands]
        result = writer.step(op, *(writer.rounded(line, dtype, computed) for line, dtype in each))
        whole = op in _COMPARISONS or op in _EXACT or made.dtype is not torch.float32
        lines.append(result if whole else writer.step("round", result))
    return Value(made, tuple(lines))


def _elementwise(op: str, *, swapped: bool = False) -> Callable[[Writer, fx.Node], Value]:
    def write(writer: Writer, node: fx.Node) -> Value:
        if node.kwargs:
            raise ApartError
        return _pointwise(writer, op, node.args[::-1] if swapped else node.args, _made_of(node))

    return write


def _power(writer: Writer, node: fx.Node) -> Value:
    base, exponent = node.args
    if exponent != 2:
        raise ApartError
    return _pointwise(writer, "mul", (base, base), _made_of(node))


def _clamp(writer: Writer, node: fx.Node) -> Value:
    given, low, high = (*node.args, None)[:3]
    if node.kwargs or (low is None) == (high is None):
        raise ApartError
    return _pointwise(writer, "max" if high is None else "min", (given, high if low is None else low), _made_of(node))


def _filled(number: float) -> Callable[[Writer, fx.Node], Value]:
    def write(writer: Writer, node: fx.Node) -> Value:
        made = _made_of(node)
        return Value(made, (writer.constant(number),) * made.lines)

    return write


def _scalar(writer: Writer, node: fx.Node) -> Value:
    (number,), made = node.args, _made_of(node)
    narrow = made.dtype is torch.float32
    if not isinstance(number, (int, float)) or (narrow and ctypes.c_float(number).value != number):
        raise ApartError
    return Value(made, (writer.constant(float(number)),))


def _converted(writer: Writer, node: fx.Node) -> Value:
    value, made = writer.operand(node.args[0]), _made_of(node)
    if made.dtype is torch.bool or made.dtype is None:
        raise ApartError
    return Value(made, tuple(writer.rounded(line, value.numbers.dtype, made.dtype) for line in value.lines))


def _viewed(writer: Writer, node: fx.Node) -> Value:
    """The same numbers in another shape."""
    value, made = writer.operand(node.args[0]), _made_of(node)
    if (None in value.numbers.shape) != (None in made.shape):
        raise ApartError
    return Value(made, value.lines)


def _lines(value: Value) -> tuple[Value, ...]:
    """Along the first dimension, if that is not the batch."""
    count, *rest = value.numbers.shape or (None,)
    if count is None:
        raise ApartError
    each = Numbers(tuple(rest), value.numbers.dtype)
    return tuple(Value(each, value.lines[i * each.lines : (i + 1) * each.lines]) for i in range(count))


def _stacked(writer: Writer, node: fx.Node) -> Value:
    given, *dims = node.args
    assert isinstance(given, (list, tuple))
    values = [writer.operand(argument) for argument in given]
    if any(dims) or any(value.numbers.shape != (None,) for value in values):
        raise ApartError
    return Value(_made_of(node), tuple(line for value in values for line in value.lines))


def _unbound(writer: Writer, node: fx.Node) -> list[Value]:
    given, *dims = node.args
    if any(dims):
        raise ApartError
    return list(_lines(writer.operand(given)))


def _item(writer: Writer, node: fx.Node) -> Value:
    source, index = node.args
    found = writer.values.get(source)  # type: ignore[arg-type]
    if not isinstance(found, list) or not isinstance(index, int):
        raise ApartError
    return found[index]


def _selected(writer: Writer, node: fx.Node) -> Value:
    given, dim, index = node.args
    if dim != 0 or not isinstance(index, int):
        raise ApartError
    return _lines(writer.operand(given))[index]


_WRITTEN: dict[Any, Callable[[Writer, fx.Node], Value | list[Value]]] = {
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
