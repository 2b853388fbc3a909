"""The rows of a plan: every part with its costs as numbers, and repeated layers folded into one row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpcompile.flips import time_flip
from dpcompile.plan import GroupCost, Method, Part, Plan
from dpcompile.shapes import B, D, G, P, T


@dataclass(frozen=True)
class Numbers:
    """One method for one part at the plan's batch size and device."""

    flops: int
    bytes: int
    transient_bytes: int
    held_bytes: int
    time_s: float


@dataclass(frozen=True)
class Row:
    label: str
    group: str
    module: str
    op: str
    kind: str
    uses: int
    sizes: tuple[tuple[str, int], ...]
    plain: Numbers
    options: tuple[tuple[Method, Numbers], ...]
    method: Method
    reason: str
    flip_T: float | None
    place: str = " "  # where the row stands among those of one weight: a bracket at its left
    alike: int = 1  # rows that differ by layer numbers only
    span: tuple[int, int | None] | None = None  # T for which the choice stays, where a length is free

    @property
    def chosen(self) -> Numbers:
        return dict(self.options)[self.method]

    def size(self, letter: str) -> int:
        return dict(self.sizes)[letter]

    def option(self, method: Method) -> Numbers | None:
        return dict(self.options).get(method)


def rows_of(plan: Plan) -> list[list[Row]]:
    """The rows of every group, in graph order. A weight used in several ways has several."""
    return [_group_rows(plan, group) for group in plan.costs.groups]


def folded(groups: Sequence[list[Row]]) -> list[list[Row]]:
    """Groups that differ by layer numbers in their names only become one, at the place of the first."""
    alike: dict[Any, list[list[Row]]] = {}
    for rows in groups:
        alike.setdefault(tuple(_pattern(row) for row in rows), []).append(rows)
    return [rows for same in alike.values() for rows in _fold(same)]


def _group_rows(plan: Plan, group: GroupCost) -> list[Row]:
    choice = plan.choices[group.name]
    places = " " if len(group.parts) == 1 else "+" + "|" * (len(group.parts) - 2) + "+"
    rows = []
    for part, place in zip(group.parts, places, strict=True):
        options = tuple((m, _numbers(plan, part, m)) for m in part.options)
        if part.kind == "explicit":
            options = tuple(item for item in options if item[0] is choice.method)  # one way, whatever the method
        rows.append(
            Row(
                _label(group, part),
                group.name,
                part.module,
                "cross" if part.kind == "cross" else part.op,
                part.kind,
                part.uses,
                tuple((s.name, part.size(s)) for s in (T, D, P, G)),
                _numbers(plan, part, None),
                options,
                choice.method,
                choice.reason,
                time_flip(part, plan.device, plan.batch_size),
                place,
                span=choice.span.of(part.size(T)) if choice.span and part.free else None,
            )
        )
    return rows


def _label(group: GroupCost, part: Part) -> str:
    """The parameter where its name tells the module too, else module and parameter."""
    if part.kind == "cross":
        return " x ".join(dict.fromkeys(other.module for other in group.parts if other.kind != "cross"))
    if part.module == "(root)" or group.name.startswith(f"{part.module}."):
        return group.name
    return f"{part.module}: {group.name}"


def _numbers(plan: Plan, part: Part, method: Method | None) -> Numbers:
    cost = (part.plain if method is None else part.options[method]).at({**part.sizes, B: plan.batch_size})
    flops, moved, transient, held = (int(value) for value in (cost.flops, cost.bytes, cost.transient, cost.held))
    return Numbers(flops, moved, transient, held, plan.device.time_s(flops, moved, int(cost.calls)))


# ---------------------------------------------------------------- folding


def _words(row: Row) -> list[str]:
    return row.label.split(".")


def _layers(row: Row) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(row) if word.isdecimal())


def _pattern(row: Row) -> Row:
    """The row without its layer numbers: equal for rows that may be folded."""
    label = ".".join("{}" if word.isdecimal() else word for word in _words(row))
    return replace(row, label=label, group="", module="")


def _fold(same: list[list[Row]]) -> Iterator[list[Row]]:
    """Groups of one pattern, folded where their layer numbers fill a range in every place that varies."""
    numbers = [tuple(_layers(row) for row in rows) for rows in same]
    alone = any(len(set(layers)) > 1 for layers in numbers)  # rows of one group in different layers
    axes = [sorted(set(axis)) for axis in zip(*(layers[0] for layers in numbers), strict=True)]
    full = set(itertools.product(*axes)) == {layers[0] for layers in numbers}
    if len(same) == 1 or alone:
        yield from same
    elif full and len(set(numbers)) == len(numbers):
        yield [replace(row, label=_folded_label(row, axes), alike=len(same)) for row in same[0]]
    else:  # fold within each value of the first number that varies
        at = next((i for i, axis in enumerate(axes) if len(axis) > 1), None)
        if at is None or all(len(axis) == 1 for i, axis in enumerate(axes) if i != at):
            yield from same
            return
        for value in axes[at]:
            yield from _fold([rows for rows, layers in zip(same, numbers, strict=True) if layers[0][at] == value])


def _folded_label(row: Row, axes: Sequence[Sequence[int]]) -> str:
    names = iter(axes)
    return ".".join(_span(next(names)) if word.isdecimal() else word for word in _words(row))


def _span(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if list(values) == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}-{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"
