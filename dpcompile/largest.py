"""The largest physical batch that fits into memory, plain and private: solved from the lives of all values.

Memory is parameters, buffers, the batch itself, and the peak of one step above these. Optimizer state is not in it:
what it takes goes into `reserve`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpcompile.api import Analysis
from dpcompile.device import DeviceSpec
from dpcompile.errors import DPCompileError
from dpcompile.ir import InputKind
from dpcompile.memory import Bytes, Storages, Timeline
from dpcompile.plan import Plan
from dpcompile.units import human


@dataclass(frozen=True)
class Largest:
    """`plan` is the fastest for the private batch within the memory."""

    plain: int
    private: int
    plan: Plan
    level: Bytes  # parameters, buffers and the batch


def largest_batches(analysis: Analysis, memory: float, device: DeviceSpec, reserve: float = 0.0) -> Largest:
    """The most samples whose step fits into `memory` bytes, of which `reserve` stay free.

    Raises:
        DPCompileError: not even one sample fits.
    """
    level = _level(analysis)
    schedule = analysis.schedule()

    def fitting(timeline: Timeline) -> int:
        whole = replace(timeline, each=timeline.each + level.each, fixed=timeline.fixed + level.fixed)
        return whole.largest_batch(memory - reserve)

    plain = fitting(schedule.plain())
    options = {use.name: dict.fromkeys(use.cost.choices, 0.0) for use in schedule.uses}
    best, size = 0, 1
    least = schedule.least(options, 1, again=True)
    for _ in range(8):  # which plan needs least depends on the batch, and the batch on the plan: ends at once or soon
        found = fitting(schedule.private(least.methods, least.again))
        best = max(best, found)
        if found in (size, 0):
            break
        size = found
        least = schedule.least(options, size, again=True)
    if best == 0:
        raise DPCompileError(
            f"maxbatch: not one sample fits into {human(memory - reserve, 'B')}: parameters and buffers take "
            f"{human(level.fixed, 'B')}, a private step {human(least.peak, 'B')} for one sample."
        )
    plan = analysis.plan("auto", device=device, batch_size=best, memory_budget=memory - reserve - level.at(best))
    return Largest(plain, best, plan, level)


def _level(analysis: Analysis) -> Bytes:
    """What is there between two steps."""
    program = analysis.backward.program
    nodes, storages = program.nodes(), Storages(program)
    total = Bytes()
    for item in program.inputs:
        value = nodes[item.node].meta["val"]
        if item.kind is not InputKind.TANGENT and isinstance(value, torch.Tensor):
            total += storages.size_of(value)
    return total
