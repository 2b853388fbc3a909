"""What every batching rule is given (a `Call`) and what it may answer (a Value, one per result, or `Mixes`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from dpcompile.ir import Axis, Kind, Size, Value
from dpcompile.shapes import plain_size, size_of

Result = Value | tuple[Value, ...]

CONSTANT = Value(Kind.CONSTANT)
PARAMETER = Value(Kind.PARAMETER)
MIXED = Value(Kind.MIXED)

PER_SAMPLE = "Compute it for each sample by itself, along dimensions other than the batch."
NO_BATCH_SIZE = "Use a constant: with the batch size in it, a sample's gradient depends on how many others there are."
NEW_RULE = "Write a rule in dpcompile/rules/batching/ (CONTRIBUTING.md) or replace the op."
LOSS_PER_SAMPLE = "Return per-sample losses, one number for each sample, from loss_fn."


class Mixes(Exception):  # noqa: N818  (a verdict, not an error: it becomes a Finding)
    """Raised by a rule: the op's result is not per-sample. `never=False` means that no rule could tell."""

    def __init__(self, problem: str, cure: str = PER_SAMPLE, never: bool = True) -> None:
        super().__init__(problem)
        self.problem = problem
        self.cure = cure
        self.never = never


class BatchSymbol:
    """The batch size B as a sympy expression, and which sizes are multiples of it. Never guards on a SymInt."""

    def __init__(self, batch: torch.SymInt) -> None:
        self.expr: sympy.Expr = batch.node.expr
        self._multiples: dict[sympy.Expr, Size | None] = {self.expr: 1}

    def multiple(self, size: Size) -> Size | None:
        """c where size = c * B: 0 for a size without B, None for one that is no multiple, such as B + 1.

        Where lengths are free c may have them in it.
        """
        if isinstance(size, int):
            return 0
        if size not in self._multiples:
            self._multiples[size] = self._divide(size)
        return self._multiples[size]

    def _divide(self, size: sympy.Expr) -> Size | None:
        if self.expr not in size.free_symbols:
            return 0
        found = quotient(size, self.expr)
        return None if found is None or self.has(found) else found

    def has(self, size: Size) -> bool:
        return not isinstance(size, int) and self.expr in size.free_symbols

    def is_multiple(self, number: Any) -> bool:
        """Whether a number of the graph is B or an integer multiple of it."""
        return isinstance(number, sympy.Expr) and bool(self.multiple(number))

    def within(self, number: Any) -> bool:
        """Whether a plain number of the graph (SymInt, SymFloat, SymBool) depends on the batch size."""
        node = getattr(number, "node", None)
        return node is not None and self.expr in node.expr.free_symbols

    def dims(self, shape: Sequence[Size]) -> list[int]:
        """The dimensions whose size contains B."""
        return [i for i, size in enumerate(shape) if self.multiple(size) != 0]


def quotient(size: Size, by: Size) -> Size | None:
    """size / by where that is a whole number whatever the lengths are, and positive; else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 and size // by > 0 else None
    found = sympy.cancel(sympy.sympify(size) / by)
    if found.is_Integer:
        return int(found) if found > 0 else None
    over = sympy.fraction(sympy.together(found))[1]
    return found if over == 1 and found.is_integer and found.is_polynomial() else None


def product(sizes: Iterable[Size]) -> Size:
    """As one number or expression; two that are equal for all lengths compare equal."""
    return plain_size(sympy.expand(sympy.prod(sizes)))


def total(sizes: Iterable[Size]) -> Size:
    """As `product`."""
    return plain_size(sympy.expand(sympy.Add(*sizes)))


def batched(axis: Axis) -> Value:
    return Value(Kind.BATCHED, axis)


@functools.cache
def _signature(op: torch._ops.OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments)


@dataclass(frozen=True)
class Call:
    """One op call: its arguments by their names in the op's schema, and what is known about each tensor."""

    node: fx.Node
    op: torch._ops.OpOverload
    args: Mapping[str, Any]
    known: Callable[[fx.Node], Value]
    batch: BatchSymbol

    @classmethod
    def of(cls, node: fx.Node, known: Callable[[fx.Node], Value], batch: BatchSymbol) -> Call:
        assert isinstance(node.target, torch._ops.OpOverload)
        args: dict[str, Any] = {}
        for i, (name, default) in enumerate(_signature(node.target)):
            args[name] = node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
        return cls(node, node.target, args, known, batch)

    def batch_of(self, name: str) -> Axis:
        """The axis of an argument that must be the batched one."""
        axis = self.value(name).axis
        if axis is None:
            raise Mixes(f"has no batching rule for a `{name}` that is the same for all samples", NEW_RULE, never=False)
        return axis

    def value(self, name: str) -> Value:
        """What is known of a tensor argument; a plain number or a missing argument is constant."""
        arg = self.args.get(name)
        return self.known(arg) if isinstance(arg, fx.Node) else CONSTANT

    def axis(self, name: str) -> Axis | None:
        return self.value(name).axis

    def shape(self, name: str) -> tuple[Size, ...]:
        return shape_of(self.args[name])

    @property
    def out_shape(self) -> tuple[Size, ...]:
        return shape_of(self.node)

    def tensors(self) -> Iterator[fx.Node]:
        """All tensor arguments, those within lists included."""
        for arg in self.node.all_input_nodes:
            if isinstance(arg.meta.get("val"), torch.Tensor):
                yield arg

    def number(self, name: str) -> Any:
        """An argument with the nodes of plain numbers replaced by the numbers' symbols."""
        return number_of(self.args.get(name))

    def dim(self, name: str, ndim: int) -> int:
        """A dimension argument, counted from the left."""
        return self.args[name] % ndim if ndim else 0

    def dims(self, name: str, ndim: int) -> tuple[int, ...] | None:
        """A list of dimensions counted from the left; None for "all of them"."""
        dims = self.args.get(name)
        if dims is None or dims == []:
            return None
        return tuple(d % max(ndim, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims]))

    def require_unbatched(self, *names: str) -> None:
        """The named arguments must be the same for every sample."""
        for name in names:
            if self.value(name).kind not in (Kind.CONSTANT, Kind.PARAMETER):
                raise Mixes(
                    f"takes a `{name}` that differs between samples", "Apply it to each sample with a bmm or an einsum."
                )

    def require_no_batch_size(self, *names: str) -> None:
        """The named arguments must not be computed from the batch size; all arguments where none is named."""
        for name in names or self.args:
            arg = self.args.get(name)
            for item in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(item, fx.Node) and self.batch.within(item.meta.get("val")):
                    raise Mixes("depends on the number of samples in the batch", NO_BATCH_SIZE)

    def everywhere(self, value: Value) -> Result:
        """The same value for every result of the op."""
        several = self.node.meta["val"]
        return (value,) * len(several) if isinstance(several, (list, tuple)) else value

    def where_batched(self, axis: Axis) -> tuple[Value, ...]:
        """The same axis for every result that carries the batch, constant for the others (seeds, counters)."""
        return tuple(
            batched(axis) if isinstance(val, torch.Tensor) and self.batch.dims(shape_of(val)) else CONSTANT
            for val in self.node.meta["val"]
        )


def shape_of(item: Any) -> tuple[Size, ...]:
    value = item.meta["val"] if isinstance(item, fx.Node) else item
    return tuple(size_of(size) for size in value.shape)


def number_of(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        arg = arg.meta["val"]
    return size_of(arg) if isinstance(arg, torch.SymInt) else arg


def move(value: Value, dim: int) -> Value:
    """The same value with its batch in another dimension; kept as it is where there is no batch."""
    if value.axis is None:
        return value
    return Value(value.kind, Axis(dim, value.axis.outer, value.axis.inner))
