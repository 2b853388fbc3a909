"""The largest batch of which one step stays within a memory limit, by method.

    python benchmarks/max_batch.py vgg19 --memory 4GB --methods plain-eager fused-eager opacus-hooks

A trial is a fresh process that measures the peak of one step above the level between steps, as step_time.py does; what
is held between steps (parameters, the batch) is not counted. The batch is doubled until a step takes too much, then
bisected. A trial may take three times the limit, and 2 GB for code and compiler, and no more: one that asks for more,
or is killed, took too much.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from step_time import METHODS, describe_run, measure_peak, open_console, resident_bytes
from workloads import WORKLOADS

BASE = "opacus-hooks"  # whose batch the others' are divided by
SLACK, LIBRARIES = 3, 2e9  # times the limit, and bytes: what a trial may take before it is stopped
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
TOO_MUCH = re.compile(
    r"MemoryError|bad_alloc|not enough memory|out of memory|allocate memory|could not create|start new thread", re.I
)
"""How Python, C++, torch, oneDNN and threads say that there is no memory left."""


def bytes_of(text: str) -> float:
    try:
        return float(text[:-2]) * UNITS[text[-2:].upper()]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a size such as 4GB or 512MB, got {text!r}") from None


def trial(args: argparse.Namespace) -> None:
    """In a process of its own: prints the peak of one step of a batch."""
    if args.threads:
        torch.set_num_threads(args.threads)
    workload = WORKLOADS[args.model]
    batch = workload.batch(args.batch)
    if args.device.type == "cpu":  # the address space that is used already, and what is allowed on top of it
        most = (resident_bytes("VmSize") or 0) + int(SLACK * args.memory + LIBRARIES)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sized = replace(workload, make_batch=lambda: batch)
    print(json.dumps(measure_peak(sized, args.methods[0], args.device, warm_up=1)))


def peak_of(method: str, batch: int, args: argparse.Namespace) -> float | None:
    """Peak bytes of a step in a fresh process; None where it did not get as much memory as it asked for."""
    command = [sys.executable, __file__, args.model, "--methods", method, "--batch", str(batch)]
    command += ["--memory", f"{args.memory / 1e6}MB", "--device", str(args.device)]
    if args.threads:
        command += ["--threads", str(args.threads)]
    # Every large block goes back to the system when freed; one arena, since each reserves addresses that are limited.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    if done.returncode < 0 or TOO_MUCH.search(done.stderr):
        return None
    raise RuntimeError(f"{method}, batch {batch}: {done.stderr.strip()[-2000:]}")


def largest(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """The largest batch within the limit, to args.precision, and every trial on the way to it."""
    trials: dict[int, float | None] = {}

    def fits(batch: int) -> bool:
        peak = trials[batch] = peak_of(method, batch, args)
        shown = "too much" if peak is None else f"{peak / 1e6:.0f} MB"
        print(f"{method}, batch {batch}: {shown}", file=sys.stderr, flush=True)
        return peak is not None and peak <= args.memory

    low, high = 0, args.start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(args.precision * low, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"batch": low, "peak_bytes": trials.get(low), "too_large": high, "trials": trials}


def table_of(args: argparse.Namespace, found: dict[str, Any]) -> Table:
    title = f"{args.model}: {WORKLOADS[args.model].note.rpartition(', B=')[0]}; a step within {args.memory / 1e9:g} GB"
    table = Table(title=title, title_justify="left")
    for heading in ("method", "largest batch", "its peak, MB", f"batch / {BASE}"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    base = found.get(BASE, {}).get("batch")
    for method, record in found.items():
        peak = f"{record['peak_bytes'] / 1e6:.0f}" if record["batch"] else "–"
        table.add_row(method, str(record["batch"]), peak, f"{record['batch'] / base:.1f}" if base else "–")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--memory", type=bytes_of, default=4e9, metavar="SIZE", help="limit of one step, such as 4GB")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["plain-eager", "fused-eager", BASE])
    parser.add_argument("--start", type=int, default=16, help="the first batch that is tried")
    parser.add_argument("--precision", type=float, default=0.05, help="how near to the largest, as a part of it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every trial")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)  # a trial of this batch
    args = parser.parse_args()
    if args.batch:
        trial(args)
        return
    report: dict[str, Any] = describe_run(args.device) | {"memory_bytes": args.memory, "methods": {}}
    console = open_console(report)
    for method in args.methods:
        report["methods"][method] = largest(method, args)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table_of(args, report["methods"]))


if __name__ == "__main__":
    main()
