"""How near the chosen plan is to the best one: other plans of the same model are emitted, timed and checked.

    python benchmarks/plan_search.py mlp gpt2 vit --minutes 10

A plan gives a method to every group of uses. Groups whose parts have equal sizes share one decision, and so do all
small parameters. Spaces of at most --limit plans are timed whole; of others the plans of a single method, then changes
of one decision at a time as long as they help, then random plans until --minutes are over.

A plan takes turns with the chosen one and its figure is the median of the ratios within a round. The best of many
noisy figures is too good: the --finalists are timed again, in a new order each round, with a second copy of the chosen
plan among them, whose distance from 1 is the noise. The last line is from that run alone. Every plan's gradient is
compared with plain autograd's and its norms with the chosen plan's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from plans import Bench, Decisions
from rich.console import Console
from rich.table import Table
from spreads import spread, spread_text
from step_time import describe_run, keep_freed_memory, open_console
from workloads import WORKLOADS

from dpcompile.plan import Method


def candidates(bench: Bench) -> Iterator[Decisions]:
    """Plans to time, until there is none left or nobody asks for more."""
    if bench.size <= bench.args.limit:
        yield from itertools.product(*(variable.methods for variable in bench.variables))
        return
    for method in Method:
        pairs = zip(bench.variables, bench.chosen, strict=True)
        yield tuple(method if method in variable.methods else chosen for variable, chosen in pairs)
    best, moved = bench.figures[bench.chosen], True
    while moved:  # one decision at a time
        moved = False
        for i, variable in enumerate(bench.variables):
            for method in variable.methods:
                trial = tuple(method if j == i else own for j, own in enumerate(best.decisions))
                yield trial
                figure = bench.figures.get(trial, best)
                if figure.faster_than(best):
                    best, moved = figure, True
    draw = random.Random(0)
    while len(bench.figures) + len(bench.too_large) < bench.size:
        share = draw.choice((1.0, 2.5 / len(bench.variables)))  # anywhere, or near the best
        pairs = zip(bench.variables, best.decisions, strict=True)
        yield tuple(draw.choice(v.methods) if draw.random() < share else method for v, method in pairs)


def differences(bench: Bench, decisions: Decisions) -> str:
    changed = []
    for variable, method, chosen in zip(bench.variables, decisions, bench.chosen, strict=True):
        if method is not chosen:
            changed.append(f"{variable.name}: {chosen.value} → {method.value}")
    return "\n".join(changed) or "the chosen plan, again"


def search(name: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    bench = Bench(WORKLOADS[name], args)
    ends = time.monotonic() + 60 * args.minutes
    bench.measure(bench.chosen)
    whole = bench.size <= args.limit
    for decisions in candidates(bench):
        if time.monotonic() > ends:
            whole = False
            break
        bench.measure(decisions)
    wrong = [figure for figure in bench.figures.values() if not figure.right]
    for figure in wrong:
        console.print(
            f"wrong by {figure.error:.0e}, norms {figure.norm_error:.0e}: {differences(bench, figure.decisions)}"
        )
    finals = bench.finals()
    table = Table(title=f"{name}: {len(bench.variables)} decisions, {bench.size} plans", title_justify="left")
    for heading in ("time / chosen", "when searching", "error", "of norms", "what differs"):
        table.add_column(heading)
    for figure in finals:
        found, before = spread_text(spread(figure.final)), spread_text(spread(figure.ratios))
        table.add_row(
            found, before, f"{figure.error:.0e}", f"{figure.norm_error:.0e}", differences(bench, figure.decisions)
        )
    console.print(table)
    copy = statistics.median(bench.figures[bench.chosen].final)
    best = min((statistics.median(f.final) for f in finals if f.decisions != bench.chosen), default=1.0)
    behind = max((1 + copy) / 2 / best - 1, 0.0)  # the chosen plan is there twice
    noise = abs(copy - 1)
    how = "exhaustive" if whole else f"search of {args.minutes:g} minutes"
    how += f", {len(bench.too_large)} left out for their memory" if bench.too_large else ""
    console.print(
        f"{name}: chosen is within {100 * behind:.1f} % of the best found ({len(bench.figures)} plans, {how}; "
        f"its own copy is off by {100 * noise:.1f} %)"
    )
    return {
        "within": behind,
        "noise": noise,
        "plans": len(bench.figures),
        "space": bench.size,
        "too_large": len(bench.too_large),
        "wrong": len(wrong),
        "exhaustive": whole,
        "finals": [
            {"ratio": spread(f.final), "rounds": f.final, "differs": differences(bench, f.decisions)} for f in finals
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--limit", type=int, default=64, help="most plans of a space that is timed whole")
    parser.add_argument("--minutes", type=float, default=10.0, help="for the plans of one model, finalists not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--finalists", type=int, default=4)
    parser.add_argument("--final-rounds", type=int, default=15)
    parser.add_argument("--memory", type=float, default=8.0, metavar="GB", help="most that a plan's norms may take")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = describe_run(args.device) | {"models": {}}
    console = open_console(report)
    for name in args.models:
        report["models"][name] = search(name, args, console)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
