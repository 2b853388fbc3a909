"""Where the time of a private step goes: every op of the emitted graphs, timed alone and added up.

    python benchmarks/where.py bert --rounds 9

The split form, eager, op by op: forward and backward of the model, norms, clipped sums. Each op's figure is its median
over the rounds. What Python takes between the ops is in the last line, as the difference to the step as it is.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table
from step_time import MAX_GRAD_NORM, WARM_UP_STEPS, describe_run, keep_freed_memory, load, open_console
from torch import fx, nn
from workloads import WORKLOADS, Workload

from dpcompile import dpcompile
from dpcompile.inline import PHASE

PARTS = {"": "the model's own", "norm": "norms", "sum": "clipped sums"}


class Timed(fx.Interpreter):
    """Runs a graph op by op and notes the seconds of each."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, list[float]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        started = time.perf_counter()
        result = super().run_node(n)
        self.seconds[n].append(time.perf_counter() - started)
        return result

    def medians(self) -> Iterator[tuple[fx.Node, float]]:
        return ((node, statistics.median(seconds)) for node, seconds in self.seconds.items())


def step(workload: Workload, model: nn.Module, trained: nn.Module, batch: tuple[Any, torch.Tensor]) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    model.zero_grad(set_to_none=True)
    workload.loss(trained(batch[0]), batch[1]).mean().backward()
    return time.perf_counter() - started


def measure(workload: Workload, rounds: int) -> tuple[dict[str, Timed], float, float]:
    """The timed graphs by name; seconds of the private step as it is, and of a plain one."""
    model, batch = load(workload, torch.device("cpu"))
    dp_model = dpcompile(model, batch[0], max_grad_norm=MAX_GRAD_NORM)
    whole: dict[nn.Module, list[float]] = {model: [], dp_model: []}
    for done in range(WARM_UP_STEPS + rounds):
        for trained, seconds in whole.items():
            taken = step(workload, model, trained, batch)
            if done >= WARM_UP_STEPS:
                seconds.append(taken)
    emitted = dp_model._emitted
    assert emitted.backward is not None
    timed = {"forward": Timed(emitted.forward.module), "backward": Timed(emitted.backward.module)}
    object.__setattr__(emitted, "eager_forward", timed["forward"].run)
    object.__setattr__(emitted, "boxed_backward", lambda given: timed["backward"].run(*given))
    for done in range(WARM_UP_STEPS + rounds):
        if done == WARM_UP_STEPS:
            for graph in timed.values():
                graph.seconds.clear()
        step(workload, model, dp_model, batch)
    return timed, statistics.median(whole[dp_model]), statistics.median(whole[model])


def tables(timed: dict[str, Timed], most: int) -> tuple[Table, Table, float]:
    """Milliseconds by part of the step, and by op; and their sum."""
    parts: dict[str, list[float]] = defaultdict(list)
    ops: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, graph in timed.items():
        for node, seconds in graph.medians():
            phase = node.meta.get(PHASE, "")
            part = name if not phase else PARTS.get(phase, phase)
            parts[part].append(1e3 * seconds)
            ops[part, str(node.target)].append(1e3 * seconds)
    by_part, by_op = Table("part", "ops", "ms"), Table("part", "op", "how often", "ms")
    for part, found in sorted(parts.items(), key=lambda item: -sum(item[1])):
        by_part.add_row(part, str(len(found)), f"{sum(found):.1f}")
    for (part, op), found in sorted(ops.items(), key=lambda item: -sum(item[1]))[:most]:
        by_op.add_row(part, op, str(len(found)), f"{sum(found):.1f}")
    return by_part, by_op, sum(map(sum, parts.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=WORKLOADS, metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--most", type=int, default=20, help="ops that are shown")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = open_console(describe_run(torch.device("cpu")))
    timed, private, plain = measure(WORKLOADS[args.model], args.rounds)
    by_part, by_op, total = tables(timed, args.most)
    console.print(by_part)
    console.print(by_op)
    console.print(
        f"{args.model}: {total:.1f} ms op by op; the private step as it is {1e3 * private:.1f}, plain {1e3 * plain:.1f}"
    )


if __name__ == "__main__":
    main()
