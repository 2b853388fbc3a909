"""How the price of privacy and the time to compile grow with the model: step time against plain, and compile time.

    python benchmarks/growth.py step --axis B T depth width --rounds 5 --json growth.json
    python benchmarks/growth.py compile --depths 1 2 4 8 16 48

`step` doubles one size of a small model at a time and leaves the others. At each point plain and fused training take
turns in one process, as in step_time.py, and the gradient is checked in the same run. An axis ends early where the
next point would not fit into memory, or where a plain step takes longer than --longest. "Rise" is the most by which
the lower quartile of a point exceeds the upper quartile of a smaller one: at most 0 % where the ratio does not rise.

`compile` times dpcompile(model, sample) of a narrow GPT-2: what counts is the number of layers.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import gc
import json
import math
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import AXES, FAMILIES, Sizes, gpt2
from rich.console import Console
from rich.table import Table
from spreads import spread_text
from step_time import (
    MAX_GRAD_NORM,
    describe_run,
    gradient_of,
    keep_freed_memory,
    load,
    measure_times,
    open_console,
    relative_error,
    reset_peak,
    resident_bytes,
    summarize,
)

from dpcompile import dpcompile

GROWTH_OF_MEMORY = 4.0  # of one doubling, at most: T squared in Gram matrices, width squared in weights


def available_bytes() -> float:
    """What the system can still give; infinite where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def along(family: str, axis: str, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One record for each point of an axis, until its end or until the machine's."""
    make, base, _ = FAMILIES[family]
    kind = "compiled" if args.compile else "eager"
    points: list[dict[str, Any]] = []
    for doubling in range(args.doublings + 1):
        sizes = replace(base, **{axis: getattr(base, axis) * 2**doubling})
        torch._dynamo.reset()
        gc.collect()
        level, measured = resident_bytes("VmRSS") or 0, reset_peak()
        methods: list[str] = list(dict.fromkeys(("plain-eager", f"plain-{kind}", f"fused-{kind}")))
        records = measure_times(make(sizes), methods, args.rounds, args.device)
        summarize(records)
        plain, fused = records[f"plain-{kind}"], records[f"fused-{kind}"]
        points.append(
            {
                "model": family,
                "axis": axis,
                "sizes": asdict(sizes),
                "plain_seconds": plain["median_seconds"],
                "ratio": fused[f"ratio_to_plain-{kind}"],
                "error": fused["gradient_error"],
                "records": records,
            }
        )
        if doubling == args.doublings:
            break
        taken = (resident_bytes("VmHWM") or 0) - level if measured else 0
        if GROWTH_OF_MEMORY * taken > available_bytes():
            console.print(f"{family}, {axis}: ends at {2**doubling} times the base, for want of memory")
            break
        if plain["median_seconds"] > args.longest:
            console.print(f"{family}, {axis}: ends at {2**doubling} times the base, a step takes long enough")
            break
    return points


def trend(points: list[dict[str, Any]]) -> dict[str, float]:
    """Of the ratio: its factor for each doubling (least squares in logarithms), and the greatest rise (see above)."""
    logs = [math.log2(point["ratio"]["median"]) for point in points]
    slope = float(np.polyfit(range(len(logs)), logs, 1)[0]) if len(logs) > 1 else 0.0
    rises = [
        later["ratio"]["quartiles"][0] / earlier["ratio"]["quartiles"][1] - 1
        for i, later in enumerate(points)
        for earlier in points[:i]
    ]
    return {"factor_per_doubling": 2**slope, "rise": max(rises, default=0.0)}


def step_table(points: list[dict[str, Any]]) -> Table:
    found, first = trend(points), points[0]
    title = f"{first['model']}, {first['axis']}: x{found['factor_per_doubling']:.3f} for each doubling, "
    table = Table(title=f"{title}rise {100 * found['rise']:+.1f} %", title_justify="left")
    for heading in (*AXES, "plain ms", "fused / plain", "error"):
        table.add_column(heading, justify="right")
    for point in points:
        row = (f"{1e3 * point['plain_seconds']:.1f}", spread_text(point["ratio"]), f"{point['error']:.0e}")
        table.add_row(*(str(size) for size in point["sizes"].values()), *row)
    return table


def run_step(args: argparse.Namespace, report: dict[str, Any], console: Console) -> None:
    report["points"], report["trends"] = [], []
    for family in args.models:
        for axis in (axis for axis in args.axis if axis in FAMILIES[family][2]):
            points = along(family, axis, args, console)
            console.print(step_table(points))
            report["points"] += points
            report["trends"].append({"model": family, "axis": axis} | trend(points))
            write(args.json, report)


def compile_point(depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of dpcompile by what is validated, in turns, and the error of the gradient of what came out."""
    workload = gpt2(Sizes(B=2, T=args.length, depth=depth, width=args.width))
    model, (inputs, targets) = load(workload, args.device)
    workload.loss(model(inputs), targets).mean().backward()
    expected = gradient_of(model)
    seconds: dict[str, list[float]] = {validate: [] for validate in args.validate}
    error = 0.0
    for _ in range(args.rounds):
        for validate in args.validate:
            gc.collect()
            started = time.perf_counter()
            dp_model = dpcompile(model, inputs, max_grad_norm=MAX_GRAD_NORM, validate=validate)
            seconds[validate].append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
            workload.loss(dp_model(inputs), targets).mean().backward()
            error = max(error, relative_error(gradient_of(model), expected))
    return {"depth": depth, "seconds": seconds, "error": error}


def line(points: list[dict[str, Any]], validate: str) -> dict[str, float]:
    """Least squares of seconds = first + slope (layers - 1), and by how much of the time the points miss it at most."""
    depths = np.array([point["depth"] - 1 for point in points])
    times = np.array([statistics.median(point["seconds"][validate]) for point in points])
    slope, first = np.polyfit(depths, times, 1)
    miss = float(np.abs(times - (first + slope * depths)).max() / times.max())
    return {"first_layer_s": float(first), "further_layer_s": float(slope), "largest_miss": miss}


def run_compile(args: argparse.Namespace, report: dict[str, Any], console: Console) -> None:
    report["points"], report["lines"] = [], {}
    compile_point(1, argparse.Namespace(**(vars(args) | {"rounds": 1})))  # what the process pays once
    table = Table(title=f"dpcompile of GPT-2, width {args.width}, T={args.length}", title_justify="left")
    for heading in ("layers", *(h for v in args.validate for h in (f"{v}, s", "s / further layer")), "error"):
        table.add_column(heading, justify="right")
    for depth in sorted(args.depths):
        report["points"].append(compile_point(depth, args))
        *before, point = report["points"]
        row = []
        for validate in args.validate:
            now = statistics.median(point["seconds"][validate])
            row.append(f"{now:.2f}")
            added = depth - before[-1]["depth"] if before else 0
            last = statistics.median(before[-1]["seconds"][validate]) if before else now
            row.append(f"{(now - last) / added:.3f}" if added else "–")
        table.add_row(str(depth), *row, f"{point['error']:.0e}")
        write(args.json, report)
    console.print(table)
    for validate in args.validate if len(args.depths) > 1 else ():
        found = report["lines"][validate] = line(report["points"], validate)
        console.print(
            f'validate="{validate}": {found["first_layer_s"]:.2f} s + {found["further_layer_s"]:.3f} s for each '
            f"further layer; missed by at most {100 * found['largest_miss']:.1f} % of the longest time"
        )
    write(args.json, report)


def write(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step", help="step time against plain training as one size doubles")
    step.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    step.add_argument("--axis", nargs="+", choices=AXES, default=AXES)
    step.add_argument("--doublings", type=int, default=4)
    step.add_argument("--compile", action="store_true", help="both under torch.compile")
    step.add_argument("--longest", type=float, default=10.0, help="seconds of a plain step that end an axis")
    step.set_defaults(run=run_step)
    build = commands.add_parser("compile", help="time of dpcompile against the number of layers")
    build.add_argument("--depths", nargs="+", type=int, default=[1, 2, 4, 8, 16, 48])
    build.add_argument("--width", type=int, default=64)
    build.add_argument("--length", type=int, default=32, help="T")
    build.add_argument("--validate", nargs="+", choices=["off", "probe"], default=["off", "probe"])
    build.set_defaults(run=run_compile)
    for command, rounds in ((step, 5), (build, 3)):
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--device", type=torch.device, default=torch.device("cpu"))
        command.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
        command.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = describe_run(args.device) | {"rounds": args.rounds}
    args.run(args, report, open_console(report))


if __name__ == "__main__":
    main()
