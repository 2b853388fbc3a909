"""Memory of a graph over time: the bytes that are alive while each of its ops runs, as numbers in the batch size.

Peak memory here is what one step needs above the level between steps: parameters, buffers and inputs are there anyway.
A value lives from the op that makes it to the last op that reads it or a view of it, as in the code that torch.fx
generates. What a kernel takes for itself while it runs is not known and not in it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from dpcompile import records, settled
from dpcompile.finite import finite_rows
from dpcompile.ir import InputKind, Program
from dpcompile.overwriting import OVER
from dpcompile.shapes import hint, is_one, size_of
from dpcompile.torch_internals import sample_sizes
from dpcompile.twice import twice

aten = torch.ops.aten

Root = tuple[str, int]
"""A piece of memory: the op that makes it, and which of its results it is."""

INPUT: Root = ("", 0)
"""In the place of what is there between steps."""
_NOTHING = {settled.OP, records.OP}  # in eager calls (direct.py)
_RESHAPES = {aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints}  # views where strides allow it


@dataclass(frozen=True)
class Bytes:
    """So many for every sample and so many for all together."""

    each: float = 0.0
    fixed: float = 0.0

    def at(self, batch_size: int) -> float:
        return self.each * batch_size + self.fixed

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.each + other.each, self.fixed + other.fixed)


@dataclass(frozen=True)
class Life:
    """When a piece of memory is taken, by position in the graph, and when it is read for the last time."""

    size: Bytes
    birth: int
    death: int


@dataclass(frozen=True)
class Timeline:
    """Bytes alive while the ops of a graph run, one position for each."""

    each: np.ndarray
    fixed: np.ndarray

    @classmethod
    def of(cls, lives: Iterable[Life], length: int) -> Timeline:
        steps = np.zeros((2, length + 1))
        for life in lives:
            size = (life.size.each, life.size.fixed)
            steps[:, life.birth] += size
            steps[:, life.death + 1] -= size
        alive = steps.cumsum(1)[:, :length]
        return cls(alive[0], alive[1])

    def at(self, batch_size: int) -> np.ndarray:
        return self.each * batch_size + self.fixed

    def peak(self, batch_size: int) -> float:
        return float(self.at(batch_size).max(initial=0.0))

    def largest_batch(self, memory: float) -> int:
        """The most samples with which the peak stays within so many bytes: every position bounds the number by a line.

        0 if not even one fits. Solved, not searched for.
        """
        growing = self.each > 0
        if (self.fixed > memory).any():
            return 0
        return int(((memory - self.fixed[growing]) / self.each[growing]).min(initial=2.0**62))


class Storages:
    """Which memory every value of a graph lies in, and how large each piece is.

    `eager`: as in an eager call, where marked ops write over an operand and some ops are nothing.
    """

    def __init__(self, program: Program, *, eager: bool = False) -> None:
        self._eager = eager
        self._copies: dict[str, fx.Node] = {}  # reshapes that copy at the sample's sizes, and what they read
        self.sizes: dict[Root, Bytes] = {}
        self._batch = program.batch
        self._sizes: dict[sympy.Expr, Bytes] = {}
        self._roots: dict[str, tuple[Root, ...]] = {}
        known = {i.node for i in program.inputs if i.kind is not InputKind.TANGENT}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in known:
                self._roots[node.name] = ()
            elif node.op != "output":
                self._roots[node.name] = self._find(node)

    def of(self, node: fx.Node) -> tuple[Root, ...]:
        """Nothing for inputs that are there between steps, numbers and sizes."""
        return self._roots.get(node.name, ())

    def possible(self, node: fx.Node) -> set[Root]:
        """The same at any sizes: a reshape that copies at the sample's may be a view at others. Of inputs, INPUT."""
        found = set(self.of(node))
        for name, _ in tuple(found):
            if name in self._copies:
                found |= self.possible(self._copies[name])
        return found or {INPUT}

    def _find(self, node: fx.Node) -> tuple[Root, ...]:
        if node.op == "get_attr":
            return ()
        if node.target is operator.getitem:
            owner, index = node.args
            assert isinstance(owner, fx.Node)
            own = [root for root in self.of(owner) if root[1] == index]
            return tuple(own) if own and own[0][0] == owner.name else self.of(owner)
        if is_view(node):
            return self.of(node.all_input_nodes[0])
        if self._eager and (OVER in node.meta or node.target in _NOTHING):
            operand = node.args[node.meta.get(OVER, 0)]
            assert isinstance(operand, fx.Node)
            return self.of(operand)
        if node.target in _RESHAPES:
            self._copies[node.name] = node.all_input_nodes[0]
        made: list[Root] = []
        for i, value in enumerate(pytree.tree_leaves(node.meta.get("val"))):
            if isinstance(value, torch.Tensor):
                made.append((node.name, i))
                self.sizes[made[-1]] = self.size_of(value)
        return tuple(made)

    def size_of(self, value: torch.Tensor) -> Bytes:
        count: Any = sympy.Integer(value.element_size())
        for size in value.shape:
            count = count * size_of(size)
        if count not in self._sizes:
            self._sizes[count] = self._affine(count)
        return self._sizes[count]

    def _affine(self, count: sympy.Expr) -> Bytes:
        """A size in the batch size; free lengths are those of the sample."""
        symbol = self._batch.node.expr
        known = sample_sizes(self._batch)
        one, two = (int(sympy.sympify(count).subs(list((known | {symbol: n}).items()))) for n in (1, 2))
        return Bytes(two - one, 2 * one - two)


def of_one_term(node: fx.Node) -> bool:
    """Whether a node is a sum over dimensions of size 1 alone: tidy makes a view of it."""
    if node.target is not aten.sum.dim_IntList or not node.args[1]:
        return False
    (source, *_), dims = node.all_input_nodes, node.args[1]
    given, value = source.meta["val"], node.meta["val"]
    assert isinstance(dims, (list, tuple))
    return given.dtype is value.dtype and all(is_one(given.shape[dim]) for dim in dims)


def is_view(node: fx.Node) -> bool:
    """Whether the result lies in the memory of the first input, if the sample's sizes tell."""
    if of_one_term(node) or node.target in (finite_rows, twice):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info is not None for r in schema.returns):
        return node.target is aten._unsafe_view.default
    if node.target not in _RESHAPES:
        return True
    (source, *_), value = node.all_input_nodes, node.meta["val"]
    given = source.meta["val"]
    shape, strides, wanted = (_numbers(sizes) for sizes in (given.shape, given.stride(), value.shape))
    if None in (*shape, *strides, *wanted):  # only the data tell: it may be one
        return True
    try:
        torch.empty_strided(shape, strides, device="meta").view(wanted)
    except RuntimeError:
        return False
    return True


def _numbers(sizes: Any) -> list[Any]:
    return [hint(size) for size in sizes]


def timeline(program: Program) -> Timeline:
    """Of a whole eager step in one graph, in the order of its ops; results stay to the end."""
    nodes = [node for node in program.graph.nodes if node.op != "placeholder"]
    lives = lives_of(Storages(program, eager=True), nodes, {node.name: i for i, node in enumerate(nodes)})
    return Timeline.of(lives.values(), len(nodes))


def lives_of(storages: Storages, nodes: Sequence[fx.Node], position: Mapping[str, int]) -> dict[Root, Life]:
    """The life of every piece of memory among some ops: from the first that makes or reads it to the last."""
    births: dict[Root, int] = {}
    deaths: dict[Root, int] = {}
    for node in nodes:
        here = position[node.name]
        for root in (root for source in (node, *node.all_input_nodes) for root in storages.of(source)):
            births.setdefault(root, here)
            deaths[root] = max(deaths.get(root, here), here)
    return {root: Life(storages.sizes[root], birth, deaths[root]) for root, birth in births.items()}
