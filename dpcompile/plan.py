"""What was decided for each group of uses, what it costs, and why: records and their printed form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Any

import sympy

from dpcompile.device import DeviceSpec
from dpcompile.shapes import B, C, D, G, P, T, U, at

ZERO = sympy.Integer(0)


class Method(Enum):
    GHOST = "ghost"
    EXPLICIT = "explicit"  # made for the norm, dropped, contracted again for the clipped sum
    KEPT = "kept"  # made for the norm, kept until the clip factors are known: no second contraction
    SHIFTED = "shifted"  # ghost norm of a convolution, its Gram of patches read off that of the image's positions
    LOOPED = "looped"  # kept, made for each sample off the image: by a kernel, or by convolution's own backward
    STREAMED = "streamed"  # explicit, made as `looped` a few at a time, dropped, made again so
    FLASH = "flash"  # ghost norm whose Gram matrices are formed and summed in tiles, by a kernel (kernels.py)
    TILED = "tiled"  # explicit, made for the norm in tiles that are not written down, by a kernel

    @property
    def ghost(self) -> bool:
        return self in (Method.GHOST, Method.SHIFTED, Method.FLASH)

    @property
    def keeps(self) -> bool:
        return self in (Method.KEPT, Method.LOOPED)


Times = Mapping[str, Mapping[Method, float]]
"""Seconds of the methods that a group may follow, by its name."""


@dataclass(frozen=True)
class Cost:
    """Of norm and clipped sum together. Sympy expressions in B, T, d, p, G; bytes in bytes."""

    flops: sympy.Expr  # matmul flops, two per multiply-add, as torch counts them
    bytes: sympy.Expr  # moved
    transient: sympy.Expr  # bytes alive only while the norm is computed
    held: sympy.Expr  # bytes alive from the norm until the clip factors are known
    calls: sympy.Expr = ZERO  # of ops in a loop over samples

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Cost:
        return Cost(*(at(e, sizes) for e in (self.flops, self.bytes, self.transient, self.held, self.calls)))

    def numbers(self, sizes: Mapping[sympy.Symbol, int]) -> Numbers:
        """The same as numbers, for choices that look at many of them."""
        return Numbers(*map(float, _function(self)(*(sizes.get(letter, 0) for letter in LETTERS))))


@dataclass(frozen=True)
class Numbers:
    """A Cost at given sizes."""

    flops: float
    bytes: float
    transient: float
    held: float
    calls: float


LETTERS = (B, T, D, P, G, C, U)


@functools.lru_cache(maxsize=1024)
def _function(cost: Cost) -> Callable[..., list[Any]]:
    terms = [cost.flops, cost.bytes, cost.transient, cost.held, cost.calls]
    return sympy.lambdify(LETTERS, terms, modules="math")


@dataclass(frozen=True)
class Product:
    """One matrix product of a part and what it is made from. Equal ones of several parts are formed once."""

    method: Method
    tensors: tuple[str, ...]  # nodes of the backward program, and what else tells the product from others of theirs
    flops: sympy.Expr  # in B


@dataclass(frozen=True)
class Part:
    """One row of the plan: uses of one kind that are concatenated along T and handled as one."""

    group: str
    module: str
    op: str
    kind: str  # outer, onehot, explicit, cross
    uses: int
    sizes: Mapping[sympy.Symbol, int]  # T, d, p, G; of a convolution C and U
    plain: Cost
    options: Mapping[Method, Cost]
    products: tuple[Product, ...] = ()  # those that other parts may share
    free: bool = False  # T follows a length that calls may choose, and is that of the sample
    booked: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))  # bytes of inputs kept from the forward

    def size(self, symbol: sympy.Symbol) -> int:
        return self.sizes[symbol]


@dataclass(frozen=True)
class GroupCost:
    name: str
    parts: tuple[Part, ...]

    @property
    def methods(self) -> tuple[Method, ...]:
        """Methods that every part of the group can follow."""
        return tuple(m for m in Method if all(m in part.options for part in self.parts))

    @property
    def choices(self) -> tuple[Method, ...]:
        """Those among which there is a choice: small gradients, and sums of two kinds of uses, are always kept."""
        kept = any(part.kind == "explicit" for part in self.parts) and Method.KEPT in self.methods
        return (Method.KEPT,) if kept else self.methods


@dataclass(frozen=True)
class Span:
    """Lengths relative to the sample's, from the least to the greatest; None: any greater one."""

    least: Fraction
    greatest: Fraction | None

    def of(self, positions: int) -> tuple[int, int | None]:
        """The same for something that has so many positions in the sample."""
        greatest = None if self.greatest is None else math.floor(self.greatest * positions)
        return math.ceil(self.least * positions), greatest


@dataclass(frozen=True)
class Choice:
    method: Method
    reason: str
    span: Span | None = None  # where T follows a free length: the lengths for which the choice stays


@dataclass(frozen=True)
class Costs:
    groups: tuple[GroupCost, ...]
    backbone_flops: sympy.Expr  # forward and output gradients, in B
    itemsize: int


@dataclass(frozen=True)
class Memory:
    """Peak memory of one step above the level between steps, in bytes at the plan's batch size, as predicted."""

    plain: float  # of plain training
    peak: float
    budget: float
    exact: bool = True  # no plan within the budget is faster, by the times that were given
    least: float | None = None  # of any plan, where it was asked for


@dataclass(frozen=True)
class Plan:
    """The decisions. `print(plan)` shows one row for each use of a parameter, and totals against plain training."""

    policy: str
    device: DeviceSpec
    batch_size: int  # at which choices were made
    costs: Costs
    choices: Mapping[str, Choice]  # by group name
    unused: tuple[str, ...] = ()
    clip_groups: tuple[tuple[str, ...], ...] = ()  # groups of uses that are clipped by one norm; empty: all by one
    memory: Memory | None = None
    measured: Times = field(default_factory=dict)  # seconds on this machine, where candidates were timed
    checkpointed: int = 0  # regions of torch.utils.checkpoint in the model
    lengths: Mapping[str, int] = field(default_factory=dict)  # free lengths by name, with the sample's sizes
    again: tuple[str, ...] = ()  # ops of the backward that run a second time behind the clip factors
    again_flops: sympy.Expr = ZERO  # of these, in B

    def method(self, group: str) -> Method:
        return self.choices[group].method

    def flops(self) -> sympy.Expr:
        """All matmul flops of one private step, in B: what FlopCounterMode counts on the emitted graphs."""
        chosen = [(part, self.method(group.name)) for group in self.costs.groups for part in group.parts]
        total = self.costs.backbone_flops + self.again_flops
        total += sum(at(part.options[m].flops, part.sizes) for part, m in chosen)
        return sympy.expand(total - self.shared_flops())

    @property
    def shares_factors(self) -> bool:
        """Whether norms by kernels that read a factor in common are one call.

        Not where a clip group would wait for another, or what is computed again be held for longer.
        """
        return len(self.clip_groups) <= 1 and not self.again

    def shared_flops(self) -> sympy.Expr:
        """What is saved by forming equal products once: query, key and value share a Gram matrix."""
        seen: set[Product] = set()
        saved: sympy.Expr = sympy.Integer(0)
        for group in self.costs.groups:
            for part in group.parts:
                method = self.method(group.name)
                if part.kind == "onehot" and method is Method.FLASH:
                    method = Method.GHOST  # no kernel does look-ups
                elif method is Method.FLASH and not self.shares_factors:
                    continue
                for product in (product for product in part.products if product.method is method):
                    saved += product.flops if product in seen else 0
                    seen.add(product)
        return sympy.expand(saved)

    def plain_flops(self) -> sympy.Expr:
        """The same for plain training: backbone and one contraction for each use."""
        return sympy.expand(
            self.costs.backbone_flops
            + sum(at(part.plain.flops, part.sizes) for group in self.costs.groups for part in group.parts)
        )

    def held_bytes(self) -> sympy.Expr:
        """Bytes alive from the norms until the clip factors, in B. Clip groups are done one after the other."""
        held = {
            group.name: sum(
                (at(part.options[self.method(group.name)].held, part.sizes) for part in group.parts), sympy.Integer(0)
            )
            for group in self.costs.groups
        }
        together = self.clip_groups or (tuple(held),)
        sums = [sympy.expand(sum((held[name] for name in names), sympy.Integer(0))) for names in together]
        return max(sums, key=lambda total: total.subs(B, self.batch_size), default=sympy.Integer(0))

    def booked_bytes(self) -> sympy.Expr:
        """Bytes of layer inputs that are kept from the forward for parameter gradients, in B: none for biases alone."""
        parts = [part for group in self.costs.groups for part in group.parts]
        return sympy.expand(sum((at(part.booked, part.sizes) for part in parts), sympy.Integer(0)))

    def __str__(self) -> str:
        from dpcompile.report import plan_text

        return plan_text(self)

    def to_dict(self) -> dict[str, Any]:
        from dpcompile.report import plan_dict

        return plan_dict(self)


SYMBOLS = (B, T, D, P, G)
