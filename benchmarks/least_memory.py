"""Whether a step keeps to the least memory that a plan of it says it needs.

    python benchmarks/least_memory.py mlp cnn lstm --json least_memory.json

The least is what `dpcompile report` prints. The model is compiled with it as `memory_budget=`, and the peak of a step
measured in a fresh process, as step_time.py does; of a second process the same for plain training.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from step_time import describe_run, load, measure_peak, open_console
from workloads import WORKLOADS

from dpcompile.api import prove

METHODS = ("plain-eager", "split-eager", "fused-eager")


def least_of(name: str, method: str, device: torch.device) -> float:
    """Bytes."""
    workload = WORKLOADS[name]
    model, (inputs, targets) = load(workload, device)
    fused = {"loss_fn": workload.loss, "sample_targets": targets} if method == "fused-eager" else {}
    analysis = prove(model, inputs, **fused).conclude()
    memory = analysis.with_least(analysis.plan()).memory
    assert memory is not None
    assert memory.least is not None
    return memory.least


def trial(name: str, method: str, device: torch.device) -> dict[str, Any]:
    """In a process of its own: the peak of a step, and for what it was planned."""
    least = None if method == "plain-eager" else least_of(name, method, device)
    return {"least_bytes": least} | measure_peak(WORKLOADS[name], method, device, memory_budget=least)


def in_fresh_process(name: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--trial", method, "--device", str(args.device)]
    # A block goes back to the system when freed, so that what is resident is what is held and not what was.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "8192"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--trial", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        print(json.dumps(trial(args.models[0], args.trial, args.device)))
        return
    report: dict[str, Any] = describe_run(args.device) | {"least_memory": {}}
    console = open_console(report)
    table = Table(
        "model", "plain MB", *(f"{form} {what}" for form in ("split", "fused") for what in ("least", "measured"))
    )
    for name in args.models:
        found = report["least_memory"][name] = {method: in_fresh_process(name, method, args) for method in METHODS}
        cells = [name, f"{found['plain-eager']['peak_bytes'] / 1e6:.1f}"]
        for method in METHODS[1:]:
            peak, least = found[method]["peak_bytes"], found[method]["least_bytes"]
            cells += [f"{least / 1e6:.1f}", f"{peak / 1e6:.1f} ({peak / least:.2f})"]
        table.add_row(*cells)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
