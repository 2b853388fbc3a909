"""The commands about machines: the largest batch that fits into memory, and what a device can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dpcompile.api import dpcompile
from dpcompile.calibration import calibrated
from dpcompile.cli_common import (
    BatchOption,
    DeviceOption,
    InputOption,
    SeqOption,
    SetOption,
    TargetArgument,
    proven,
    rates_of,
    say,
    told,
    write,
)
from dpcompile.device import save
from dpcompile.largest import largest_batches
from dpcompile.live_memory import peak_of
from dpcompile.report import table_text
from dpcompile.running import sized, step_of
from dpcompile.specs import TargetError
from dpcompile.targets import Target, load_target
from dpcompile.units import bytes_of, human


def register(app: typer.Typer) -> None:
    app.command()(maxbatch)
    app.command()(calibrate_device)


def maxbatch(
    target: TargetArgument,
    memory: Annotated[str, typer.Option(help="what there is, such as 24GB")],
    reserve: Annotated[str, typer.Option(help="what stays free, for the optimizer state")] = "0B",
    inputs: InputOption = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    settings: SetOption = None,
    device: DeviceOption = "cpu",
    run: Annotated[bool, typer.Option("--run", help="run both steps at these batches, and count their memory")] = False,
) -> None:
    """Print the largest physical batch whose step fits into memory, plain and private, solved without any trial."""
    with told():
        size, free = _bytes(memory), _bytes(reserve)
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        analysis = proven(loaded).conclude()
        found = largest_batches(analysis, size, rates_of(device), free)
        plain = analysis.schedule().plain()
        peaks = {"plain": (found.plain, plain.peak(found.plain) if found.plain else 0.0)}
        peaks["private"] = (found.private, found.plan.memory.peak if found.plan.memory else 0.0)
        real = None
        if run:
            real = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or (), real=True)
        rows = []
        for name, (number, peak) in peaks.items():
            row = {
                "step": name,
                "largest batch": str(number),
                "between steps": human(found.level.at(number), "B"),
                "peak above": human(peak, "B"),
            }
            if real is not None:
                row["counted"] = human(_counted(real, name, number, analysis.call.batch_size, found.plan.memory), "B")
            rows.append(row | {"in all": human(found.level.at(number) + peak, "B")})
        say(f"{target}: {type(loaded.model).__name__} in {human(size, 'B')}, {human(free, 'B')} of it left free")
        say("\n".join(table_text(rows, left={"step"})))


def calibrate_device(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the rates there too")] = None,
) -> None:
    """Measure what this machine can do; plans for it take these rates from then on."""
    with told():
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise TargetError(f"--device {device!r} is not here")
        spec = calibrated(torch.device(device))
        say(
            f"{spec.name}: {human(spec.flops_per_s)}flop/s, {human(spec.bytes_per_s, 'B')}/s, "
            f"{human(spec.s_per_call, 's')} for a convolution in a loop, {human(spec.s_per_op, 's')} for any op, "
            f"{human(spec.attention_flops_per_s)}flop/s in attention"
        )
        say(f"kept in {save(spec)}")
        if file is not None:
            write(file, json.dumps(asdict(spec), indent=1) + "\n")


def _bytes(text: str) -> float:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise TargetError(str(error)) from None


def _counted(target: Target, form: str, size: int, sample_size: int, memory: Any) -> float:
    """Peak of one step at a batch of `size`, as counted while it runs."""
    model, batch = target.model.train(), sized(target.sample_input, sample_size, size)
    if form == "private":
        model = dpcompile(model, batch, memory_budget=float(memory.budget), validate="off")
    return peak_of(step_of(model, batch))
