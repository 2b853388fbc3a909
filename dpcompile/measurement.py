"""What a plan predicts against what a real model takes on this machine."""

from __future__ import annotations

import torch

from dpcompile import steptime
from dpcompile.api import Analysis
from dpcompile.live_memory import peak_of
from dpcompile.plan import Plan
from dpcompile.report import measured_text
from dpcompile.running import median_seconds, sized, step_of
from dpcompile.runtime import DPModule
from dpcompile.targets import Target


def measurement(analysis: Analysis, plan: Plan, target: Target) -> str:
    """Time of every group's norm and clipped sum, and time and peak memory of the step; the split form, on a CPU."""
    size = plan.batch_size
    measured = analysis.measured({name: [choice.method] for name, choice in plan.choices.items()}, size)
    emitted = analysis.emit(plan)
    assert emitted.backward is not None
    predicted = sum(steptime.seconds(part, plan.device, size) for part in (emitted.forward, emitted.backward))
    model = target.model.train().to(torch.device("cpu"))
    step = step_of(DPModule(model, emitted), sized(target.sample_input, analysis.call.batch_size, size))
    seconds = median_seconds(step)
    totals = {"time": (predicted, seconds)}
    if plan.memory is not None:
        totals["peak memory"] = (plan.memory.peak, float(peak_of(step)))
    return measured_text(plan, measured, totals, {"time": "s", "peak memory": "B"})
