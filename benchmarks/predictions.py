"""What a plan predicts against what its step takes: time and peak memory of the fused form, run eagerly.

    python benchmarks/predictions.py mlp cnn resnet18 vgg19 vit gpt2 bert lstm --json predictions.json

Rates of the device (what `dpcompile calibrate-device` measures) are measured before the steps, among them and after
them, since those of a shared machine change; predictions are the mean. Memory is measured in a fresh process, as
step_time.py does, and predicted at the default budget.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import math
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from step_time import (
    describe_run,
    keep_freed_memory,
    load,
    measure_peak_in_fresh_process,
    open_console,
    seconds_per_step,
)
from torch import Tensor
from workloads import WORKLOADS, Workload

from dpcompile import dpcompile, steptime
from dpcompile.calibration import calibrated

PARTS = 3
"""Of the steps, between which rates are measured."""


def predictions(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    model, (inputs, targets) = load(workload, args.device)
    dp_model = dpcompile(model, inputs, loss_fn=workload.loss, sample_targets=targets, max_grad_norm=1e6)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = dp_model(inputs, targets=targets)
        loss.backward()
        return loss

    seconds_per_step(step, 3, args.device)
    specs, taken = [calibrated(args.device)], list[float]()
    for _ in range(PARTS):
        taken += [seconds_per_step(step, 1, args.device) for _ in range(math.ceil(args.rounds / PARTS))]
        specs.append(calibrated(args.device))
    ops: Counter[str] = Counter()
    for spec in specs:
        for node, seconds in steptime.times(dp_model._emitted.forward, spec, dp_model.plan.batch_size).items():
            ops[str(node.target)] += seconds / len(specs)
    memory = dp_model.plan.memory
    return {
        "seconds": {"predicted": ops.total(), "measured": statistics.median(taken)},
        "peak_bytes": {
            "predicted": None if memory is None else memory.peak,
            "measured": measure_peak_in_fresh_process(workload.name, "fused-eager", args)["peak_bytes"],
        },
        "rates": [asdict(spec) for spec in specs],
        "predicted_by_op": dict(ops.most_common(8)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = describe_run(args.device) | {"models": {}}
    console = open_console(report)
    table = Table(
        "model", *(f"{what} {which}" for what in ("ms", "MB") for which in ("predicted", "measured", "ratio"))
    )
    for name in args.models:
        found = report["models"][name] = predictions(WORKLOADS[name], args)
        cells = [name]
        for what, unit in (("seconds", 1e3), ("peak_bytes", 1e-6)):
            pair = found[what]["predicted"], found[what]["measured"]
            cells += [f"{pair[0] * unit:.1f}", f"{pair[1] * unit:.1f}", f"{pair[0] / pair[1]:.2f}"]
        table.add_row(*cells)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
