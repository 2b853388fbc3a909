"""The fastest plan whose memory stays within a budget, as an integer programme over the life of every value.

The traced backward is the clock. A group of uses takes its norm as soon as its gradients are there, and its clipped sum
when the clip factors are. What waits in between depends on the method: ghost and explicit norms read layer inputs and
output gradients once more for the sum, so that these stay booked (arXiv:2210.00038 section 3); a kept gradient lets go
of them, but stays itself. Or a segment of the backward is computed a second time, behind the clip factors: what it
makes need not be booked then, but what it reads has to wait. So memory at any moment is a constant plus a linear
function of the choices, and the plan is

    minimise the sum of times, subject to one method for each group and memory <= budget at every moment,

which scipy's `milp` (HiGHS) solves.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        if method.keeps or method is Method.STREAMED:
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
class Segment:
    """Consecutive ops of the backward that may be computed again, by position. Some of them need not be."""

    ops: tuple[tuple[int, str], ...]  # position and name
    makes: Mapping[Root, int]  # by which op
    reads: Mapping[Root, int]  # by which op for the last time, its own among them


@dataclass(frozen=True)
class Fitted:
    """What was chosen for every group; nothing if nothing fits. `peak` is the predicted one, in bytes."""

    methods: Mapping[str, Method]
    peak: float
    proven: bool = True  # that no plan is better by more than GAP
    again: tuple[int, ...] = ()  # segments that are computed again


@dataclass(frozen=True)
class Schedule:
    """The traced backward as a clock, the lives of its values by its own ops alone, and the uses of parameters."""

    length: int
    lives: Mapping[Root, Life]
    uses: tuple[Use, ...]
    itemsize: int
    segments: tuple[Segment, ...] = ()  # from the loss to the inputs; none where there are several clip groups
    fusible: frozenset[Root] = frozenset()  # values that a compiler does not write down
    of_plain: Mapping[Root, Bytes] = field(default_factory=dict)  # values that are larger in plain training, eager
    handed_out: Mapping[Root, Life] = field(default_factory=dict)  # outputs as the graph itself reads them
    overwritten: frozenset[Root] = frozenset()  # by the last op that reads them, in eager private training
    gathered: bool = False  # the parts of a tied parameter's plain gradient are formed where they are added up

    def compiled(self) -> Schedule:
        """The same under a compiler, about: it may compute what is fusible wherever that is read, and outputs go into a
        loss that is compiled with them, so that nobody holds them. Inductor moves ops to what reads them
        (reorder_for_locality): the parts of a tied parameter's gradient to their sum."""
        lives = {**self.lives, **self.handed_out}
        lives = {r: replace(life, size=Bytes()) if r in self.fusible else life for r, life in lives.items()}
        own = replace(self, lives=lives, fusible=frozenset(), of_plain={}, handed_out={}, overwritten=frozenset())
        return replace(own, gathered=True)

    def plain(self) -> Timeline:
        """Memory of plain training of the same graph: each use makes its part of the gradient at once."""
        deaths = {root: 2 * life.death for root, life in self.lives.items()}
        made: list[Life] = []
        end = 2 * self.length  # even moments are those of the ops, odd ones those behind them
        for use in self.uses:
            last = use.plain[-1][0]
            for i, (own, reads) in enumerate(use.plain):
                at = last if self.gathered else own
                deaths.update({root: max(deaths[root], 2 * at + 1) for root in reads})
                made.append(Life(use.gradient, 2 * at + 1, 2 * at + 1 if i else end - 1))  # later ones are added to it
        sizes = {root: life.size for root, life in self.lives.items()} | dict(self.of_plain)
        lives = [Life(sizes[root], 2 * life.birth, deaths[root]) for root, life in self.lives.items()]
        return Timeline.of([*lives, *made], end)

    def private(self, methods: Mapping[str, Method], again: Collection[int] = ()) -> Timeline:
        """Memory of private training by a plan."""
        programme = _Programme(self, {name: [method] for name, method in methods.items()}, again)
        return programme.timeline({*methods.items(), *again})

    def fit(
        self, times: Times, batch_size: int, budget: float, again: Sequence[float] = (), compiled: float = np.inf
    ) -> Fitted:
        """The methods of least total time whose memory stays within `budget` bytes, and within `compiled` under a
        compiler.

        `again` has the seconds of every segment. Without any segment the programme is much smaller; its plan is taken
        if a segment costs more than what could be gained.
        """

        def solve(segments: Collection[int] = ()) -> Fitted:
            beside = None if compiled == np.inf else (_Programme(self.compiled(), times, segments), compiled)
            return _Programme(self, times, segments).solve(times, again, batch_size, budget, beside)

        found = solve()
        if not again:
            return found
        least = sum(min(own.values()) for own in times.values())
        if found.methods and sum(times[n][m] for n, m in found.methods.items()) <= (least + min(again)) * (1 + GAP):
            return found
        better = solve(range(len(again)))
        return better if better.methods else found

    def least(self, times: Times, batch_size: int, *, again: bool = False) -> Fitted:
        """The methods with the lowest peak, whatever they take; with `again` segments may be computed again."""
        segments = range(len(self.segments)) if again else ()
        return _Programme(self, times, segments).solve(None, (), batch_size, np.inf)


Column = tuple[str, Method] | int
"""Something to choose: a method for a group, or a segment that is computed again."""


class _Programme:
    """Columns: what there is to choose, then whether a value is still there from one of its readers to the next.

    Every column, as every value of the backbone, is so many bytes from one moment to another. The moments are those of
    the backbone with one more for each norm; behind the last norm of a clip group two for each clipped sum, and one for
    each op of the backward that may be computed again.
    """

    def __init__(
        self, schedule: Schedule, options: Mapping[str, Iterable[Method]], segments: Collection[int] = ()
    ) -> None:
        self._uses = {use.name: use for use in schedule.uses}
        self._itemsize = schedule.itemsize
        self.columns: list[Column] = [(use.name, method) for use in schedule.uses for method in options[use.name]]
        self.columns += segments
        self._index = {column: i for i, column in enumerate(self.columns)}
        self._chosen: list[tuple[int, Life]] = []  # by column
        self._bounds: list[tuple[int, tuple[int, ...], int | None]] = []
        """A column, others of which it is no less than the sum, and one that makes up for it."""
        self._width = len(self.columns)
        clock = _Clock.of(schedule, segments)
        self._end = clock.end
        for column, index in self._index.items():
            if isinstance(column, tuple):
                self._add_method(index, *column, clock)
        self._always = [Life(use.gradient, clock.sums[use.name], self._end - 1) for use in schedule.uses]
        readers = self._readers(schedule, segments, clock)
        second = {
            root: (self._index[i], clock.again[at]) for i in segments for root, at in schedule.segments[i].makes.items()
        }
        for root, life in schedule.lives.items():
            own = clock.ops[life.death] - (root in schedule.overwritten)
            death = max([own, *(clock.norms[use.name] for use in self._reading.get(root, ()))])
            self._always.append(Life(life.size, clock.ops[life.birth], death))
            self._add_waits(life.size, death, readers.get(root, {}), second.get(root))

    def _add_method(self, index: int, name: str, method: Method, clock: _Clock) -> None:
        use, at, later = self._uses[name], clock.norms[name], clock.sums[name]
        self._chosen.append((index, Life(use.kept(method), at, later)))
        self._chosen.append((index, Life(use.during_norm(method, self._itemsize), at, at)))
        self._chosen.append((index, Life(use.before_sum(method, self._itemsize), later - 1, later - 1)))

    def _readers(
        self, schedule: Schedule, segments: Iterable[int], clock: _Clock
    ) -> dict[Root, dict[int, list[tuple[int, ...]]]]:
        """Who reads a value behind the clip factors: by moment, columns of which one at most is chosen."""
        found: dict[Root, dict[int, list[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(list))
        self._reading: dict[Root, list[Use]] = defaultdict(list)
        rereading: dict[str, list[int]] = defaultdict(list)
        for column, i in self._index.items():
            if isinstance(column, tuple) and not column[1].keeps:
                rereading[column[0]].append(i)
        for use in schedule.uses:
            again = tuple(rereading[use.name])
            for root in use.reads:
                self._reading[root].append(use)
                if again:
                    found[root][clock.sums[use.name]].append(again)
        for i in segments:
            segment = schedule.segments[i]
            for root, at in [*segment.makes.items(), *segment.reads.items()]:
                found[root][clock.again[at]].append((self._index[i],))
        return found

    def _add_waits(
        self,
        size: Bytes,
        death: int,
        readers: Mapping[int, Sequence[tuple[int, ...]]],
        second: tuple[int, int] | None,
    ) -> None:
        """One column from each reader of a value to the next; it is no less than that reader, and than the next column.

        A value that is made again does not wait for that: `second` is the column of the segment, and the moment.
        """
        moments = sorted(moment for moment in readers if moment > death)
        if not moments:
            return
        if second is not None:
            moments.insert(0, second[1] - 1)
        since = death
        for moment in moments:
            column, self._width = self._width, self._width + 1
            self._chosen.append((column, Life(size, since + 1, moment)))
            self._bounds += [(column, reader, None) for reader in readers.get(moment, ())]
            if moment != moments[-1]:
                instead = second[0] if second is not None and moment == second[1] - 1 else None
                self._bounds.append((column, (column + 1,), instead))
            since = moment

    def timeline(self, chosen: Collection[Column]) -> Timeline:
        """Of what is chosen among the columns."""
        there = [column in chosen for column in self.columns] + [False] * (self._width - len(self.columns))
        for column, others, instead in reversed(self._bounds):  # later moments first
            wanted = any(there[i] for i in others)
            there[column] |= wanted and not (instead is not None and there[instead])
        return Timeline.of([*self._always, *(life for i, life in self._chosen if there[i])], self._end)

    def solve(
        self,
        times: Times | None,
        again: Sequence[float],
        batch_size: int,
        budget: float,
        beside: tuple[_Programme, float] | None = None,
    ) -> Fitted:
        """The choice of least time within the budget; without times, that of the lowest peak.

        The peak is a column of its own, behind the others. `beside`: a programme of the same columns, with its budget.
        """
        count = len(self.columns)
        constant, matrix = self._rows(batch_size)
        scale = float(constant.max(initial=1.0))
        peak = csr_array(-np.ones((len(constant), 1)))
        weights = np.zeros(self._width + 1)
        if times is None:
            weights[-1] = 1.0
        else:
            seconds = [again[c] if isinstance(c, int) else times[c[0]][c[1]] for c in self.columns]
            weights[:count] = np.array(seconds) / max(sum(seconds), 1e-30)
        found = milp(
            weights,
            integrality=np.arange(self._width + 1) < count,
            bounds=Bounds(0, np.append(np.ones(self._width), budget / scale)),  # pyright: ignore[reportArgumentType]
            constraints=[
                LinearConstraint(
                    hstack([matrix / scale, peak]),
                    -np.inf,
                    -constant / scale,  # pyright: ignore[reportArgumentType]
                ),
                LinearConstraint(self._one_of_each(), 1, 1),
                *([LinearConstraint(self._waiting(), -np.inf, 0)] if self._bounds else []),
                *([beside[0].within(batch_size, beside[1])] if beside is not None else []),
            ],
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
        if found.x is None:
            return Fitted({}, np.inf)
        chosen = {column for column, x in zip(self.columns, np.round(found.x[:count]), strict=True) if x}
        methods = dict(column for column in chosen if isinstance(column, tuple))
        segments = tuple(sorted(column for column in chosen if isinstance(column, int)))
        return Fitted(methods, self.timeline(chosen).peak(batch_size), found.status == 0, segments)

    def within(self, batch_size: int, budget: float) -> LinearConstraint:
        """That the peak is within a budget, beside the columns of another programme and its peak."""
        constant, matrix = self._rows(batch_size)
        wider = hstack([matrix / budget, csr_array((len(constant), 1))])
        return LinearConstraint(wider, -np.inf, 1 - constant / budget)  # pyright: ignore[reportArgumentType]

    def _rows(self, batch_size: int) -> tuple[np.ndarray, csr_array]:
        """Memory as constant + matrix @ columns, at the moments at which it may be at its peak.

        While nothing of a column begins or ends there is one, the largest; and where nothing ends behind a moment, the
        next has no less.
        """
        constant = Timeline.of(self._always, self._end).at(batch_size)
        spans = [(i, life.size.at(batch_size), life.birth, life.death + 1) for i, life in self._chosen]
        spans = [span for span in spans if span[1]]
        cuts = sorted({0, self._end, *(moment for *_, birth, end in spans for moment in (birth, end))})
        rows = np.array([constant[start:stop].max() for start, stop in itertools.pairwise(cuts)])
        ending = {end for *_, end in spans}
        follows = [*(stop in ending for stop in cuts[1:-1]), True]
        keep = [
            here or before > after for here, before, after in zip(follows, rows, np.append(rows[1:], 0.0), strict=True)
        ]
        number = np.cumsum([0, *keep])  # of the first row kept at or behind a cut
        row_of = dict(zip(cuts, number, strict=True))
        first = np.array([row_of[birth] for _, _, birth, _ in spans], dtype=int)
        counts = np.array([row_of[end] for *_, end in spans], dtype=int) - first
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        at = np.repeat(first, counts) + within
        columns, sizes = (np.repeat([span[k] for span in spans], counts) for k in (0, 1))
        shape = (int(number[-1]), self._width)
        return rows[np.array(keep, dtype=bool)], coo_array((sizes, (at, columns)), shape=shape).tocsr()

    def _one_of_each(self) -> csr_array:
        names = [column[0] for column in self.columns if isinstance(column, tuple)]
        rows = {name: i for i, name in enumerate(dict.fromkeys(names))}
        at = [rows[name] for name in names]
        return csr_array((np.ones(len(at)), (at, np.arange(len(at)))), shape=(len(rows), self._width + 1))

    def _waiting(self) -> csr_array:
        """The sum of others <= column (+ what makes up for it)."""
        entries: list[tuple[int, int, float]] = []
        for row, (column, others, instead) in enumerate(self._bounds):
            entries += [(row, column, -1.0), *((row, other, 1.0) for other in others)]
            if instead is not None:
                entries.append((row, instead, -1.0))
        at, columns, values = zip(*entries, strict=True)
        return csr_array((values, (at, columns)), shape=(len(self._bounds), self._width + 1))


@dataclass(frozen=True)
class _Clock:
    """The moment of each op, of each norm and clipped sum by use, and of each op that may be computed again."""

    ops: Sequence[int]
    norms: Mapping[str, int]
    sums: Mapping[str, int]
    again: Mapping[int, int]  # by position
    end: int

    @classmethod
    def of(cls, schedule: Schedule, segments: Iterable[int]) -> _Clock:
        ends: dict[int, int] = defaultdict(int)  # behind which op the clip factors of a clip group are there
        behind: dict[int, list[Use]] = defaultdict(list)
        for use in schedule.uses:
            ends[use.clip_group] = max(ends[use.clip_group], use.norm)
            behind[use.norm].append(use)
        last: dict[int, list[int]] = defaultdict(list)
        for group, position in ends.items():
            last[position].append(group)
        again = {at for i in segments for at, _ in schedule.segments[i].ops}
        clock = itertools.count()
        ops: list[int] = []
        norms: dict[str, int] = {}
        sums: dict[str, int] = {}
        second: dict[int, int] = {}
        for position in range(schedule.length):
            ops.append(next(clock))
            norms |= {use.name: next(clock) for use in behind[position]}
            for group in last[position]:
                for at in sorted({*behind, *again}):  # the order in which they are written
                    if at in again:
                        second[at] = next(clock)
                    for use in reversed(behind[at]):
                        if use.clip_group == group:
                            next(clock)  # made ready, and formed
                            sums[use.name] = next(clock)
        return cls(ops, norms, sums, second, next(clock))
