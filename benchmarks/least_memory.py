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
from pathlib import Path
from typing import Any

import torch
from step_time import describe_run, load, measure_peak_in_fresh_process, open_console
from tables import least_table
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    report: dict[str, Any] = describe_run(args.device) | {"least_memory": {}}
    open_console(report)
    for name in args.models:
        found = report["least_memory"][name] = {}
        for method in METHODS:
            least = None if method == "plain-eager" else least_of(name, method, args.device)
            found[method] = {"least_bytes": least} | measure_peak_in_fresh_process(name, method, args, least)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(least_table(report["least_memory"])))


if __name__ == "__main__":
    main()
