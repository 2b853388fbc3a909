"""The fastest plan whose memory stays within a budget, as an integer programme over the life of every value.

The traced backward is the clock. A group of uses takes its norm as soon as its gradients are there, and its clipped sum
when the clip factors are. What waits in between depends on the method: ghost and explicit norms read layer inputs and
output gradients once more for the sum, so that these stay booked (arXiv:2210.00038 section 3); a kept gradient lets go
of them, but stays itself. So memory at any moment is a constant plus a linear function of the choices, and the plan is

    minimise the sum of times, subject to one method for each group and memory <= budget at every moment,

which scipy's `milp` (HiGHS) solves.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, hstack

from dpcompile.forms import crowded
from dpcompile.memory import Bytes, Life, Root, Timeline
from dpcompile.plan import GroupCost, Method, Numbers, Times
from dpcompile.shapes import B, C, D, G, P, T, U

SECONDS = 20.0
"""After which the best plan found so far is taken."""
GAP = 1e-4
"""By how much of the least time a plan may be slower that is taken for the fastest."""


@dataclass(frozen=True)
class Use:
    """One group of uses as memory sees it. Moments are positions among the ops of the traced backward."""

    cost: GroupCost
    norm: int  # behind which op its norm is taken
    reads: frozenset[Root]  # values of the backbone: layer inputs, output gradients
    plain: tuple[tuple[int, frozenset[Root]], ...]  # behind which op plain training makes its gradients, of what
    gradient: Bytes  # of the parameters
    clip_group: int

    @property
    def name(self) -> str:
        return self.cost.name

    def kept(self, method: Method) -> Bytes:
        """Gradients that wait for the clip factors."""
        return _affine(lambda size: sum(cost.held for cost in self._costs(method, size))) if method.keeps else Bytes()

    def during_norm(self, method: Method, itemsize: int) -> Bytes:
        """Alive only while the norm is taken, and not kept."""

        def beyond(size: int) -> float:
            costs = self._costs(method, size)
            return max(sum(cost.transient - (cost.held if method.keeps else 0.0) for cost in costs), 0.0)

        return _affine(beyond) + self._joined(itemsize)

    def _joined(self, itemsize: int) -> Bytes:
        """Several uses of one weight, put side by side while each waits for the sum. An index has 8 bytes."""
        several = [part for part in self.cost.parts if part.uses > 1]
        dense = sum(s[G] * s[T] * (s[P] + s[D]) for s in (part.sizes for part in several if part.kind == "outer"))
        found = sum(s[T] * s[D] for s in (part.sizes for part in several if part.kind == "onehot"))
        rows = sum(part.sizes[T] for part in several if part.kind == "onehot")
        return Bytes(each=float(itemsize * (dense + found) + 8 * rows))

    def before_sum(self, method: Method, itemsize: int) -> Bytes:
        """Alive only while the clipped sum is made ready: a factor with each sample's weight, which takes its place.

        Several uses are put side by side, one factor after the other, and each of them is let go of then. Where
        products are added up in float64, both factors are there in float64 too.
        """
        if method.keeps:
            return Bytes()
        total = 0
        for part, s in ((part, part.sizes) for part in self.cost.parts):
            if part.kind == "onehot":
                total += s[T] * s[D]
            elif part.kind == "outer":
                total += s[G] * s[T] * (max(s[P], s[D]) if part.uses > 1 else min(s[P], s[D]))
                if itemsize == 4 and crowded(s[T], s[P], s[D]):
                    columns = s[U] * s[C] if U in s else s[T] * s[D]  # the image, of a convolution
                    total += 2 * s[G] * (s[T] * s[P] + columns)
        return Bytes(each=float(itemsize * total))

    def _costs(self, method: Method, batch_size: int) -> list[Numbers]:
        return [part.options[method].numbers({**part.sizes, B: batch_size}) for part in self.cost.parts]


def _affine(size: Callable[[int], float]) -> Bytes:
    one, two = size(1), size(2)
    return Bytes(two - one, 2 * one - two)


@dataclass(frozen=True)
class Fitted:
    """What was chosen for every group; nothing if nothing fits. `peak` is the predicted one, in bytes."""

    methods: Mapping[str, Method]
    peak: float
    proven: bool = True  # that no plan is better by more than GAP


@dataclass(frozen=True)
class Schedule:
    """The traced backward as a clock, the lives of its values by its own ops alone, and the uses of parameters."""

    length: int
    lives: Mapping[Root, Life]
    uses: tuple[Use, ...]
    itemsize: int

    def plain(self) -> Timeline:
        """Memory of plain training of the same graph: each use makes its part of the gradient at once."""
        deaths = {root: 2 * life.death for root, life in self.lives.items()}
        made: list[Life] = []
        end = 2 * self.length  # even moments are those of the ops, odd ones those behind them
        for use in self.uses:
            for i, (at, reads) in enumerate(use.plain):
                deaths.update({root: max(deaths[root], 2 * at + 1) for root in reads})
                made.append(Life(use.gradient, 2 * at + 1, 2 * at + 1 if i else end - 1))  # later ones are added to it
        lives = [Life(life.size, 2 * life.birth, deaths[root]) for root, life in self.lives.items()]
        return Timeline.of([*lives, *made], end)

    def private(self, methods: Mapping[str, Method]) -> Timeline:
        """Memory of private training by a plan."""
        programme = _Programme(self, {name: [method] for name, method in methods.items()})
        return programme.timeline(np.ones(len(programme.columns)))

    def fit(self, times: Times, batch_size: int, budget: float) -> Fitted:
        """The methods of least total time whose memory stays within `budget` bytes."""
        programme = _Programme(self, times)
        seconds = np.array([times[name][method] for name, method in programme.columns])
        return programme.solve(seconds / max(seconds.sum(), 1e-30), batch_size, budget)

    def least(self, times: Times, batch_size: int) -> Fitted:
        """The methods with the lowest peak, whatever they take."""
        return _Programme(self, times).solve(None, batch_size, np.inf)


class _Programme:
    """Columns: one choice for each group and method, then whether each value waits for each clip group's factors.

    Every column, as every value of the backbone, is so many bytes from one moment to another. The moments are those of
    the backbone with one more for each norm, and two for each clipped sum behind the last norm of its clip group.
    """

    def __init__(self, schedule: Schedule, options: Mapping[str, Iterable[Method]]) -> None:
        self._uses = {use.name: use for use in schedule.uses}
        self.columns = [(use.name, method) for use in schedule.uses for method in options[use.name]]
        starts, norms, sums, self._end = _moments(schedule)
        deaths = {root: starts[life.death] for root, life in schedule.lives.items()}
        waits: dict[tuple[Root, int], int] = {}  # until when, by value and clip group
        for use in schedule.uses:
            for root in use.reads:
                deaths[root] = max(deaths[root], norms[use.name])
                key = (root, use.clip_group)
                waits[key] = max(waits.get(key, 0), sums[use.name])
        lives = schedule.lives
        self._always = [Life(life.size, starts[life.birth], deaths[root]) for root, life in lives.items()]
        self._always += [Life(use.gradient, sums[use.name], self._end - 1) for use in schedule.uses]
        self._chosen: list[tuple[int, Life]] = []  # by column
        for i, (name, method) in enumerate(self.columns):
            use, at, later = self._uses[name], norms[name], sums[name]
            self._chosen.append((i, Life(use.kept(method), at, later)))
            self._chosen.append((i, Life(use.during_norm(method, schedule.itemsize), at, at)))
            self._chosen.append((i, Life(use.before_sum(method, schedule.itemsize), later - 1, later - 1)))
        self._waits = list(waits)
        for i, (root, clip_group) in enumerate(waits, start=len(self.columns)):
            if deaths[root] < waits[root, clip_group]:
                self._chosen.append((i, Life(lives[root].size, deaths[root] + 1, waits[root, clip_group])))

    def timeline(self, chosen: np.ndarray) -> Timeline:
        """Of a choice for each column."""
        again = [self._uses[n] for (n, method), x in zip(self.columns, chosen, strict=True) if x and not method.keeps]
        reread = {(root, use.clip_group) for use in again for root in use.reads}
        there = [*chosen, *(key in reread for key in self._waits)]
        return Timeline.of([*self._always, *(life for i, life in self._chosen if there[i])], self._end)

    def solve(self, objective: np.ndarray | None, batch_size: int, budget: float) -> Fitted:
        """The choice of least objective within the budget; without an objective, that of the lowest peak.

        The peak is a column of its own, behind the others.
        """
        count, width = len(self.columns), len(self.columns) + len(self._waits) + 1
        constant, matrix = self._rows(batch_size, width - 1)
        scale = float(constant.max(initial=1.0))
        peak = csr_array(-np.ones((len(constant), 1)))
        weights = np.zeros(width)
        if objective is None:
            weights[-1] = 1.0
        else:
            weights[:count] = objective
        found = milp(
            weights,
            integrality=np.arange(width) < count,
            bounds=Bounds(0, np.append(np.ones(width - 1), budget / scale)),  # pyright: ignore[reportArgumentType]
            constraints=[
                LinearConstraint(
                    hstack([matrix / scale, peak]),
                    -np.inf,
                    -constant / scale,  # pyright: ignore[reportArgumentType]
                ),
                LinearConstraint(self._one_of_each(width), 1, 1),
                *([LinearConstraint(self._waiting(width), -np.inf, 0)] if self._waits else []),
            ],
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
        if found.x is None:
            return Fitted({}, np.inf)
        chosen = np.round(found.x[:count])
        methods = {name: method for (name, method), x in zip(self.columns, chosen, strict=True) if x}
        return Fitted(methods, self.timeline(chosen).peak(batch_size), found.status == 0)

    def _rows(self, batch_size: int, width: int) -> tuple[np.ndarray, csr_array]:
        """Memory at every moment as constant + matrix @ columns; one row, the largest, while no column changes."""
        constant = Timeline.of(self._always, self._end).at(batch_size)
        spans = [(i, life.size.at(batch_size), life.birth, life.death + 1) for i, life in self._chosen]
        spans = [span for span in spans if span[1]]
        cuts = sorted({0, self._end, *(moment for *_, birth, end in spans for moment in (birth, end))})
        row_of = {moment: row for row, moment in enumerate(cuts)}
        rows = np.array([constant[start:stop].max() for start, stop in itertools.pairwise(cuts)])
        entries = [(row, i, size) for i, size, birth, end in spans for row in range(row_of[birth], row_of[end])]
        at, columns, sizes = zip(*entries, strict=True) if entries else ((), (), ())
        return rows, coo_array((sizes, (at, columns)), shape=(len(rows), width)).tocsr()

    def _one_of_each(self, width: int) -> csr_array:
        rows = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in self.columns))}
        at = [rows[name] for name, _ in self.columns]
        return csr_array((np.ones(len(at)), (at, np.arange(len(at)))), shape=(len(rows), width))

    def _waiting(self, width: int) -> csr_array:
        """A value waits if one of its uses has a method that reads it again: sum of those choices <= column."""
        again = defaultdict(list)
        for i, (name, method) in enumerate(self.columns):
            if not method.keeps:
                again[name].append(i)
        entries: list[tuple[int, int, float]] = []
        row = 0
        column_of = {key: i for i, key in enumerate(self._waits, start=len(self.columns))}
        for use in self._uses.values():
            for root in use.reads:
                entries += [(row, i, 1.0) for i in again[use.name]] + [(row, column_of[root, use.clip_group], -1.0)]
                row += 1
        at, columns, values = zip(*entries, strict=True)
        return csr_array((values, (at, columns)), shape=(row, width))


def _moments(schedule: Schedule) -> tuple[list[int], dict[str, int], dict[str, int], int]:
    """The moment of each op, of each norm and of each clipped sum, and how many there are."""
    ends: dict[int, int] = defaultdict(int)  # behind which op the clip factors of a clip group are there
    for use in schedule.uses:
        ends[use.clip_group] = max(ends[use.clip_group], use.norm)
    behind: dict[int, list[tuple[str, dict[str, int]]]] = defaultdict(list)
    norms: dict[str, int] = {}
    sums: dict[str, int] = {}
    for use in schedule.uses:
        behind[use.norm].append((use.name, norms))
    for use in reversed(schedule.uses):  # the order in which they are written
        behind[ends[use.clip_group]] += [(use.name, sums), (use.name, sums)]  # made ready, and formed
    starts: list[int] = []
    clock = itertools.count()
    for position in range(schedule.length):
        starts.append(next(clock))
        for name, moments in behind[position]:
            moments[name] = next(clock)
    return starts, norms, sums, next(clock)
