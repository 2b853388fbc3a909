"""Plans of one model, emitted, timed in turn with the chosen one, and checked: what plan_search.py searches among."""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from spreads import spread
from step_time import (
    MAX_GRAD_NORM,
    MEASUREMENT_SECONDS,
    Step,
    gradient_of,
    load,
    relative_error,
    seconds_per_step,
)
from torch import Tensor
from workloads import Workload

from dpcompile.api import prove
from dpcompile.clipping import clipping_of
from dpcompile.plan import Choice, Costs, GroupCost, Method, Plan
from dpcompile.runtime import DPModule
from dpcompile.shapes import B, at

HOPELESS = 1.4  # a plan this much slower in its first round gets no other
TOLERANCE = 1e-4  # of gradients, relative
NORM_TOLERANCE = 1e-2  # a certified norm is too large by what rounding may hide, which differs by method

Decisions = tuple[Method, ...]  # one for each variable


@dataclass(frozen=True)
class Variable:
    """One decision: groups that are alike, and the methods that they can follow."""

    groups: tuple[str, ...]
    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        first, *others = self.groups
        return f"{first} (+{len(others)})" if others else first


@dataclass
class Figure:
    decisions: Decisions
    ratios: list[float]  # to the chosen plan's time, one for each round
    error: float  # of the gradient
    norm_error: float
    final: list[float] = field(default_factory=list)  # the same, of the finalists' own run

    @property
    def right(self) -> bool:
        return self.error < TOLERANCE and self.norm_error < NORM_TOLERANCE

    def faster_than(self, other: Figure) -> bool:
        """By more than noise."""
        return self.right and spread(self.ratios)["quartiles"][1] < statistics.median(other.ratios)


def variables_of(costs: Costs) -> list[Variable]:
    """The decisions that are open."""
    sharing = Counter(product for group in costs.groups for part in group.parts for product in part.products)
    alike: dict[Any, list[GroupCost]] = {}
    key: Any
    for group in costs.groups:
        small = all(part.kind == "explicit" for part in group.parts)
        key = tuple(
            (
                *(p.op, p.kind, p.uses, frozenset(p.sizes.items()), frozenset(p.options.items())),
                *sorted((product.method.value, sharing[product]) for product in p.products),
            )
            for p in group.parts
        )
        alike.setdefault("small" if small else key, []).append(group)
    found = []
    for key, groups in alike.items():
        common = tuple(m for m in groups[0].methods if all(m in group.methods for group in groups))
        if key == "small":  # their "ghost" norm is the explicit one
            common = tuple(m for m in common if m is not Method.GHOST)
        if len(common) > 1:
            found.append(Variable(tuple(group.name for group in groups), common))
    return found


class Bench:
    """One model with everything needed to time a plan of it."""

    def __init__(self, workload: Workload, args: argparse.Namespace) -> None:
        self.args, self.workload = args, workload
        self.model, (self.inputs, self.targets) = load(workload, args.device)
        workload.loss(self.model(self.inputs), self.targets).mean().backward()
        self.expected = gradient_of(self.model)
        given: dict[str, Any] = {"loss_fn": workload.loss, "sample_targets": self.targets}
        self.analysis = prove(self.model, self.inputs, **given).conclude()
        self.clipping = clipping_of(list(self.analysis.trainable), MAX_GRAD_NORM)
        self.plan = self.analysis.plan(clipping=self.clipping)
        self.variables = variables_of(self.plan.costs)
        self.chosen = tuple(self.plan.method(variable.groups[0]) for variable in self.variables)
        self.figures: dict[Decisions, Figure] = {}
        self.too_large: set[Decisions] = set()
        self.step = self.emit(self.chosen)
        self.norms = self.step().clone()
        self.repeats = math.ceil(MEASUREMENT_SECONDS / seconds_per_step(self.step, 2, args.device))

    @property
    def size(self) -> int:
        return math.prod(len(variable.methods) for variable in self.variables)

    def plan_of(self, decisions: Decisions) -> Plan:
        changed = {
            name: Choice(method, "as asked")
            for variable, method in zip(self.variables, decisions, strict=True)
            for name in variable.groups
        }
        return replace(self.plan, choices={**self.plan.choices, **changed})

    def bytes_of(self, plan: Plan) -> float:
        """What the model of costs says that the norms take: all that is held, and the largest transient."""
        parts = [(part, plan.method(group.name)) for group in plan.costs.groups for part in group.parts]
        transient = [float(at(part.options[m].transient, {**part.sizes, B: plan.batch_size})) for part, m in parts]
        return float(plan.held_bytes().subs(B, plan.batch_size)) + max(transient, default=0.0)

    def emit(self, decisions: Decisions) -> Step:
        """A step of the plan, that gives the norms."""
        dp_model = DPModule(self.model, self.analysis.emit(self.plan_of(decisions), self.clipping))

        def step() -> Tensor:
            self.model.zero_grad(set_to_none=True)
            loss = dp_model(self.inputs, targets=self.targets)
            loss.backward()
            return dp_model.per_sample_norms

        step()  # warms up
        return step

    def seconds(self, step: Step) -> float:
        return seconds_per_step(step, self.repeats, self.args.device)

    def measure(self, decisions: Decisions) -> Figure | None:
        """The plan's figure; None where it would take too much memory."""
        if decisions in self.figures:
            return self.figures[decisions]
        if self.bytes_of(self.plan_of(decisions)) > self.args.memory * 1e9:
            self.too_large.add(decisions)
            return None
        step = self.emit(decisions)
        norms = step()
        errors = relative_error(gradient_of(self.model), self.expected), relative_error([norms], [self.norms])
        ratios: list[float] = []
        while len(ratios) < self.args.rounds and (not ratios or ratios[0] < HOPELESS):
            base = self.seconds(self.step)
            ratios.append(self.seconds(step) / base)
        found = self.figures[decisions] = Figure(decisions, ratios, *errors)
        return found

    def finals(self) -> list[Figure]:
        """The best plans and the chosen one, all timed in turn; the fastest first."""
        others = [figure for figure in self.figures.values() if figure.right and figure.decisions != self.chosen]
        best = sorted(others, key=lambda figure: statistics.median(figure.ratios))[: self.args.finalists]
        figures = [self.figures[self.chosen], *best]
        steps = [self.step, *(self.emit(figure.decisions) for figure in figures)]
        draw = random.Random(0)
        for _ in range(self.args.final_rounds):
            order = draw.sample(range(len(steps)), len(steps))
            seconds = {i: self.seconds(steps[i]) for i in order}
            for i, figure in enumerate(figures, start=1):
                figure.final.append(seconds[i] / seconds[0])
        return sorted(figures, key=lambda figure: statistics.median(figure.final))
