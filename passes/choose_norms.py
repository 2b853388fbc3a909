"""choose-norms: one method for every group of uses, by a stated policy and within a memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from dpcompile.budget import Fitted, Schedule
from dpcompile.clipping import Clipping
from dpcompile.device import DeviceSpec
from dpcompile.errors import DPCompileError
from dpcompile.ir import Program, Uses
from dpcompile.plan import Choice, Costs, GroupCost, Memory, Method, Part, Plan, Span, Times
from dpcompile.shapes import B, D, P, T, U
from dpcompile.units import human, rounded_up

POLICIES = ("auto", "paper", "ghost", "explicit")


def choose_norms(
    program: Program,
    uses: Uses,
    costs: Costs,
    device: DeviceSpec,
    *,
    policy: str,
    batch_size: int,
    clipping: Clipping | None = None,
    schedule: Schedule | None = None,
    budget: float | None = None,
    measured: Times | None = None,
    again: Callable[[], Sequence[float]] = tuple,
    rest: Callable[[], float] = float,
    written: Callable[[Plan], float] | None = None,
) -> Plan:
    """The plan. Policies:

    - "auto": least time, `measured` or by the device's rates, within the memory budget; memory breaks ties within 1 %.
    - "paper": ghost where 2 T^2 < p d, else explicit (mixed ghost clipping, arXiv:2205.10683 eq. 4.2).
    - "ghost", "explicit": that one wherever it exists.

    `budget` is in bytes, or a factor of plain training's peak if below 100; None: see `LOOSE`. `again` tells the
    seconds of every segment of the schedule, if it is computed again, `rest` those of a step without norms and sums,
    `written` the peak of a plan's graph as a compiler is given it: asked for where the schedule alone has it too high.

    Raises:
        DPCompileError: no plan fits a budget that was asked for; says what would.
    """
    measured = measured or {}
    times = {g.name: measured.get(g.name) or modelled(g, device, batch_size) for g in costs.groups}
    choices = {
        group.name: _choose(group, times[group.name], policy, batch_size)
        if group.name in measured
        else _with_span(group, device, policy, batch_size)
        for group in costs.groups
    }
    targets = {i.node: i.target for i in program.inputs}
    dead = [g for g in uses.groups if g.name not in choices]
    unused = tuple(targets[p] for p in uses.unused) + tuple(targets[p] for g in dead for p in g.params)
    together: dict[int, list[str]] = {}
    for group in uses.groups:
        if clipping is not None and group.name in choices:
            for index in sorted({clipping.group_of(targets[p]) for p in group.params}):
                together.setdefault(index, []).append(group.name)
    clip_groups = tuple(tuple(names) for names in together.values())

    def made(chosen: Mapping[str, Choice], segments: Sequence[int] = (), memory: Memory | None = None) -> Plan:
        ops = [] if schedule is None else [name for i in segments for _, name in schedule.segments[i].ops]
        unread = tuple(dict.fromkeys(unused))
        return Plan(policy, device, batch_size, costs, chosen, unread, clip_groups, memory, measured, again=tuple(ops))

    if schedule is None:
        return made(choices)
    among = {
        group.name: {m: s for m, s in times[group.name].items() if m in group.choices}
        if policy == "auto"
        else {choices[group.name].method: 0.0}
        for group in costs.groups
    }
    return _within(schedule, choices, among, again, rest, made, written, policy, batch_size, budget)


LOOSE, UNSEEN = 1.1, 0.04
"""Of plain training's peak: the budget where none is asked for, less what no graph shows (workspace of kernels, what a
compiler holds for longer). Where no plan fits, the least that one needs, with `SPARE` on top; and never less than
`SMALL` bytes."""
SPARE, SMALL = 1.02, 16e6
DEAR = 0.05
"""Of a step: more than that is not given for the default budget of the graph under a compiler, which is an estimate."""
FACTOR_BELOW = 100.0


def _within(
    schedule: Schedule,
    choices: Mapping[str, Choice],
    times: Times,
    again: Callable[[], Sequence[float]],
    rest: Callable[[], float],
    made: Callable[[Mapping[str, Choice], Sequence[int], Memory | None], Plan],
    written: Callable[[Plan], float] | None,
    policy: str,
    batch_size: int,
    budget: float | None,
) -> Plan:
    """The choices as they are if they fit; else the fastest that do, and the segments that are computed again."""
    plain, compiled = schedule.plain().peak(batch_size), math.inf
    if budget is None:
        asked = max((LOOSE - UNSEEN) * plain, SMALL)
        compiled = max((LOOSE - UNSEEN) * schedule.compiled().plain().peak(batch_size), SMALL)
    else:
        asked = budget * plain if budget < FACTOR_BELOW else budget
    methods = {name: choice.method for name, choice in choices.items()}
    found = fastest = Fitted(methods, schedule.private(methods).peak(batch_size))
    if policy != "auto":
        return made(choices, (), Memory(plain, found.peak, math.inf))
    seconds: Sequence[float] = ()
    if found.peak > asked:
        seconds = again()
        found = schedule.fit(times, batch_size, asked, seconds)
    if not found.methods:
        least = schedule.least(times, batch_size, again=True)
        if budget is not None:
            ratio = rounded_up(least.peak / plain, 2)
            raise DPCompileError(
                f"choose-norms: no plan fits a memory budget of {human(asked, 'B')}: the least needs "
                f"{human(least.peak, 'B', up=True)} at batch size {batch_size}, {ratio:.2f} of plain training "
                f"({human(plain, 'B')}). Raise memory_budget, or make the (physical) batch smaller."
            )
        asked = SPARE * least.peak
        found = schedule.fit(times, batch_size, asked, seconds)
        found = found if found.methods else least

    def plan_of(found: Fitted) -> Plan:
        return made(_fitted(found, choices, times), found.again, Memory(plain, found.peak, asked, found.proven))

    plan = plan_of(found)
    if schedule.compiled().private(found.methods, found.again).peak(batch_size) <= compiled:
        return plan
    if written is not None and written(plan) <= compiled:
        return plan
    seconds = seconds or again()
    smaller = schedule.fit(times, batch_size, asked, seconds, compiled)
    bearable = DEAR * (_seconds(fastest, times, seconds) + rest())
    if smaller.methods and _seconds(smaller, times, seconds) <= _seconds(found, times, seconds) + bearable:
        return plan_of(smaller)
    return plan


def _seconds(found: Fitted, times: Times, again: Sequence[float]) -> float:
    return sum(times[name][method] for name, method in found.methods.items()) + sum(again[i] for i in found.again)


def _fitted(found: Fitted, choices: Mapping[str, Choice], times: Times) -> dict[str, Choice]:
    made: dict[str, Choice] = {}
    for name, choice in choices.items():
        method = found.methods[name]
        if method is choice.method:
            made[name] = choice
            continue
        best = times[name][choice.method]
        by = f"{times[name][method] / best:.2f} of" if best else "in place of"
        made[name] = Choice(method, f"memory budget ({by} {choice.method.value})")
    return made


LONGEST = 2**20
"""Positions beyond which nobody asks for what a choice turns into."""


def _with_span(group: GroupCost, device: DeviceSpec, policy: str, batch_size: int) -> Choice:
    """The choice at the sample's lengths; where they are free, with those at which it is the same."""
    choice = _choose(group, modelled(group, device, batch_size), policy, batch_size)
    here = max((part.size(T) for part in group.parts if part.free and part.kind in ("outer", "onehot")), default=0)
    if here < 2:
        return choice

    def same(positions: int) -> bool:
        scaled = GroupCost(group.name, tuple(_scaled(part, Fraction(positions, here)) for part in group.parts))
        times = modelled(scaled, device, batch_size)
        return _choose(scaled, times, policy, batch_size).method is choice.method

    least, greatest = _edge(same, here, 2), _edge(same, here, LONGEST)
    return replace(choice, span=Span(Fraction(least, here), Fraction(greatest, here) if greatest < LONGEST else None))


def _scaled(part: Part, factor: Fraction) -> Part:
    """The part at other lengths; pairs of positions, those of a cross term, grow with the square."""
    if not part.free:
        return part
    power = 2 if part.kind == "cross" else 1
    grown = {symbol: max(int(size * factor**power), 1) for symbol, size in part.sizes.items() if symbol in (T, U)}
    return replace(part, sizes={**part.sizes, **grown})


def _edge(same: Callable[[int], bool], inside: int, end: int) -> int:
    """The last number from `inside` towards `end` of which `same` is true, if it turns at most once on the way."""
    if same(end):
        return end
    outside = end
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if same(middle) else (inside, middle)
    return inside


def _choose(group: GroupCost, timed: Mapping[Method, float], policy: str, batch_size: int) -> Choice:
    if all(part.kind == "explicit" for part in group.parts):
        return Choice(Method.KEPT, "small: one gradient per sample is kept")
    if any(part.kind == "explicit" for part in group.parts) and Method.KEPT in group.methods:
        return Choice(Method.KEPT, "uses of two kinds: their sum is kept")
    ghost = min((m for m in timed if m.ghost), key=timed.__getitem__, default=None)
    if policy == "ghost" and ghost is not None:
        return Choice(ghost, "asked for")
    if policy == "paper" and ghost is not None:
        space = sum(2 * part.size(T) ** 2 for part in group.parts if part.kind != "cross")
        explicit = max(part.size(P) * part.size(D) for part in group.parts)
        if space < explicit:
            return Choice(ghost, f"2T² = {space} < pd = {explicit}")
        return Choice(Method.EXPLICIT, f"2T² = {space} ≥ pd = {explicit}")
    allowed = [m for m in timed if policy == "auto" or not m.ghost]
    best = min(timed[m] for m in allowed)
    close = [m for m in allowed if timed[m] <= 1.01 * best]
    chosen = min(close, key=lambda m: _memory(group, m, batch_size))
    if len(allowed) == 1:
        return Choice(chosen, "the only method for this use")
    others = ", ".join(f"{m.value} {timed[m] / best:.2f}" for m in allowed if m is not chosen)
    why = "least memory of equal times" if timed[chosen] > best or len(close) > 1 else "least time"
    return Choice(chosen, f"{why} (1.00; {others})")


def modelled(group: GroupCost, device: DeviceSpec, batch_size: int) -> dict[Method, float]:
    """Seconds of every method of a group by the device's rates."""
    return {method: _time(group, method, device, batch_size) for method in group.methods}


def _time(group: GroupCost, method: Method, device: DeviceSpec, batch_size: int) -> float:
    costs = [part.options[method].numbers({**part.sizes, B: batch_size}) for part in group.parts]
    return sum(device.time_s(cost.flops, cost.bytes, cost.calls) for cost in costs)


def _memory(group: GroupCost, method: Method, batch_size: int) -> float:
    costs = [part.options[method].numbers({**part.sizes, B: batch_size}) for part in group.parts]
    return sum(cost.held + cost.transient for cost in costs)
