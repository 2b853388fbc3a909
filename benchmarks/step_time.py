"""Time and memory of one private training step against plain training of the same model.

    python benchmarks/step_time.py gpt2 --compile --rounds 9 --json gpt2.json

One step clears the gradients, runs forward, loss and backward; no noise, no optimizer. The methods take turns, one
measurement each per round, in one process, so that a busy machine disturbs all of them alike; in each round another one
is first. Ratios are taken within a round. Freed memory stays with the process (`keep_freed_memory`). "Compiled" methods
compile forward and loss together with torch.compile(fullgraph=True), plain training too.

The clipping bound is finite but far above every norm. The graph is the one that clips, yet its gradient has to equal
that of plain training, so the very step that is timed is also checked (column "error").

Memory is the peak of one step above what the process holds between steps, measured in a fresh process per method.
"""

from __future__ import annotations

import os

# Threads that spin while they wait make a shared machine many times slower. Read once, when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import ctypes
import gc
import json
import math
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from page import page
from peers import PEERS, peer_step
from rich.console import Console
from rich.table import Table
from spreads import ratio_of, spread_text
from torch import Tensor, nn
from workloads import WORKLOADS, Workload

EAGER_METHODS = ("plain-eager", "split-eager", "fused-eager")
COMPILED_METHODS = ("plain-compiled", "split-compiled", "fused-compiled")
METHODS = EAGER_METHODS + COMPILED_METHODS + PEERS
MAX_GRAD_NORM = 1e6  # every factor is exactly 1, yet nothing in the graph is left out
WARM_UP_STEPS = 3
MEASUREMENT_SECONDS = 0.05  # short steps are repeated until one measurement takes at least this long

Step = Callable[[], Tensor]


def make_step(
    workload: Workload,
    model: nn.Module,
    batch: tuple[Any, Tensor],
    method: str,
    autocast: bool = False,
    memory_budget: float | None = None,
) -> tuple[Step, float, nn.Module]:
    """A function that runs one step of `method`, the seconds dpcompile took, and the model with the gradients.

    `autocast`: forward and loss under torch.autocast to bfloat16. `memory_budget`: in bytes, for dpcompile.
    """
    if method in PEERS:
        step, model = peer_step(workload, model, batch, method, MAX_GRAD_NORM)
        return step, 0.0, model
    form, _, mode = method.partition("-")
    inputs, targets = batch
    narrow = torch.autocast(targets.device.type, torch.bfloat16, enabled=autocast)
    trained, prepare_seconds = model, 0.0
    if form != "plain":
        from dpcompile import dpcompile  # late: plain training does not need it

        options: dict[str, Any] = {"loss_fn": workload.loss, "sample_targets": targets} if form == "fused" else {}
        options |= {"max_grad_norm": MAX_GRAD_NORM, "memory_budget": memory_budget}
        started = time.perf_counter()
        with narrow:
            trained = dpcompile(model, inputs, **options)
        prepare_seconds = time.perf_counter() - started

    def loss_of(inputs: Any, targets: Tensor) -> Tensor:
        if form == "fused":
            return trained(inputs, targets=targets)
        return workload.loss(trained(inputs), targets).mean()

    if mode == "compiled":
        loss_of = torch.compile(loss_of, fullgraph=True)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with narrow:
            loss = loss_of(inputs, targets)
        loss.backward()
        return loss

    return step, prepare_seconds, model


def keep_freed_memory() -> None:
    """Freed memory stays with the process, as under the allocators that torch's tuning guide names for CPUs.

    glibc gives large blocks back to the system. On a virtual machine a fresh page may cost ten times what it costs to
    write it, and a step is timed that mostly waits for pages.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    no_mmap, trim_threshold, top_pad = -4, -1, -2  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((no_mmap, 0), (trim_threshold, -1), (top_pad, 2**28)):  # -1: never
        mallopt(option, value)


def trim() -> None:
    """Give freed blocks, small ones too, back to the system: what is there between steps is then what is held."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc


def load(workload: Workload, device: torch.device) -> tuple[nn.Module, tuple[Any, Tensor]]:
    torch.manual_seed(0)
    model = workload.build().train().to(device)
    inputs, targets = workload.make_batch()
    return model, (inputs.to(device), targets.to(device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(step: Step, repeats: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def gradient_of(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over norm of the expected gradient, all parameters together, in float64."""
    difference = sum((a.double() - e.double()).square().sum().item() for a, e in zip(actual, expected, strict=True))
    size = sum(e.double().square().sum().item() for e in expected)
    return math.sqrt(difference / size)


def measure_times(
    workload: Workload, methods: list[str], rounds: int, device: torch.device, autocast: bool = False
) -> dict[str, Any]:
    """Per method: seconds of each round, seconds to prepare, and the error of its gradient against plain-eager's.

    A peer that does not take the model has its reason instead.
    """
    model, batch = load(workload, device)
    steps: dict[str, Step] = {}
    records: dict[str, Any] = {}
    expected: list[Tensor] = []
    for method in methods:  # plain-eager is the first
        started = time.perf_counter()
        try:
            step, dpcompile_seconds, trained = make_step(workload, model, batch, method, autocast)
            for _ in range(WARM_UP_STEPS):
                step()
        except Exception as error:
            if method not in PEERS:
                raise
            records[method] = {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
            continue
        prepare_seconds = time.perf_counter() - started
        expected = expected or gradient_of(model)
        records[method] = {
            "prepare_seconds": prepare_seconds,  # until after the first steps, torch.compile included
            "dpcompile_seconds": dpcompile_seconds,
            "gradient_error": relative_error(gradient_of(trained), expected),
            "seconds": [],
        }
        steps[method] = step

    repeats = math.ceil(MEASUREMENT_SECONDS / seconds_per_step(steps["plain-eager"], 3, device))
    turns = list(steps)
    for _ in range(rounds):
        for method in turns:
            records[method]["seconds"].append(seconds_per_step(steps[method], repeats, device))
        turns = [*turns[1:], turns[0]]  # what a method leaves in the caches is not always for the same next one
    return records


def resident_bytes(field: str) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Bring VmHWM back to VmRSS, so that a peak of the compiler is not taken for one of the step."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return resident_bytes("VmHWM") is not None


def release(model: nn.Module) -> None:
    """Drop the gradients that a step leaves, with those of single samples that Opacus holds until the next step."""
    for parameter in model.parameters():
        parameter.grad = None
        for name in ("grad_sample", "summed_grad"):
            if hasattr(parameter, name):
                setattr(parameter, name, None)


def measure_peak(
    workload: Workload,
    method: str,
    device: torch.device,
    warm_up: int = WARM_UP_STEPS,
    autocast: bool = False,
    memory_budget: float | None = None,
) -> dict[str, Any]:
    """Peak bytes of one step above the level between steps; without /proc, above the loaded model."""
    model, batch = load(workload, device)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    step, _, model = make_step(workload, model, batch, method, autocast, memory_budget)
    for _ in range(warm_up):
        step()
    release(model)
    gc.collect()
    trim()
    if device.type == "cuda":
        synchronize(device)
        level = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return {"peak_bytes": torch.cuda.max_memory_allocated(device) - level, "peak_above": "level between steps"}
    level = resident_bytes("VmRSS")
    if level is not None and reset_peak():
        step()
        return {"peak_bytes": (resident_bytes("VmHWM") or 0) - level, "peak_above": "level between steps"}
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak - loaded, "peak_above": "loaded model"}


def measure_peak_in_fresh_process(
    name: str, method: str, args: argparse.Namespace, memory_budget: float | None = None
) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--peak-of", method, "--device", str(args.device)]
    command += ["--autocast"] * getattr(args, "autocast", False)
    if memory_budget is not None:
        command += ["--memory-budget", str(memory_budget)]
    if args.threads:
        command += ["--threads", str(args.threads)]
    # A block goes back to the system when freed, so that what is resident is what is held and not what was.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "8192"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def summarize(records: dict[str, Any]) -> None:
    """Add the median and the ratios to plain training: median and quartiles of the ratios within each round."""
    for record in records.values():
        if "refused" in record:
            continue
        record["median_seconds"] = statistics.median(record["seconds"])
        for base in ("plain-eager", "plain-compiled"):
            if base in records:
                record[f"ratio_to_{base}"] = ratio_of(record, records[base])


def describe_machine(device: torch.device) -> dict[str, Any]:
    try:
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].partition(":")[2].strip()
    except (OSError, IndexError):
        cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "gpu": gpu}


def describe_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "opacus", "dpcompile"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_run(device: torch.device) -> dict[str, Any]:
    """What a report states besides its numbers."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": describe_machine(device),
        "versions": describe_versions(),
    }


def open_console(run: dict[str, Any]) -> Console:
    """A console on which hardware and versions stand already."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a file has no width to fit
    console.print(", ".join(f"{k}: {v}" for k, v in (run["hardware"] | run["versions"]).items() if v))
    return console


def as_table(workload: Workload, records: dict[str, Any]) -> Table:
    table = Table(title=f"{workload.name}: {workload.note}", title_justify="left")
    table.add_column("method")
    headings = (
        "step ms", "time / plain-eager", "time / plain-compiled", "peak MB", "peak / plain-eager", "prepare s", "error"
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    plain_peak = records["plain-eager"].get("peak_bytes")
    for method, record in records.items():
        if "refused" in record:
            table.add_row(method, "refuses", *["–"] * 6)
            continue
        ratios = []
        for base in ("plain-eager", "plain-compiled"):
            ratio = record.get(f"ratio_to_{base}")
            ratios.append(spread_text(ratio) if ratio else "–")
        peak = record.get("peak_bytes")
        table.add_row(
            method,
            f"{1e3 * record['median_seconds']:.1f}",
            *ratios,
            f"{peak / 1e6:.0f}" if peak is not None else "–",
            f"{peak / plain_peak:.2f}" if peak is not None and plain_peak else "–",
            f"{record['prepare_seconds']:.1f}",
            f"{record['gradient_error']:.0e}",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", choices=WORKLOADS, help=", ".join(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: eager; those compiled with --compile")
    parser.add_argument("--peers", action="store_true", help="time Opacus and vmap(grad) as well")
    parser.add_argument("--compile", action="store_true", help="time the torch.compile'd methods as well")
    parser.add_argument("--autocast", action="store_true", help="forward and loss under autocast to bfloat16")
    parser.add_argument("--against", choices=["plain"], default="plain", help="what the ratios are to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the memory measurements")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number with hardware and versions")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots (page.py)")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-budget", type=float, help=argparse.SUPPRESS)  # bytes, of --peak-of
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.autocast and (args.peers or set(args.methods or ()) & set(PEERS)):
        parser.error("--autocast is for plain training and dpcompile: peers are timed in float32")
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.peak_of:
        options = {"autocast": args.autocast, "memory_budget": args.memory_budget}
        print(json.dumps(measure_peak(WORKLOADS[args.models[0]], args.peak_of, device, **options)))
        return

    keep_freed_memory()
    wanted = args.methods or (*EAGER_METHODS, *COMPILED_METHODS * args.compile, *PEERS * args.peers)
    methods = [method for method in METHODS if method in wanted or method == "plain-eager"]
    report: dict[str, Any] = describe_run(device) | {"rounds": args.rounds, "models": {}}
    console = open_console(report)
    for name in args.models:
        torch._dynamo.reset()
        records = measure_times(WORKLOADS[name], methods, args.rounds, device, args.autocast)
        summarize(records)
        if args.memory:
            for method in (m for m in methods if "refused" not in records[m]):
                records[method] |= measure_peak_in_fresh_process(name, method, args)
        report["models"][name] = {"note": WORKLOADS[name].note, "methods": records}
        console.print(as_table(WORKLOADS[name], records))
        for method, record in records.items():
            if "refused" in record:
                console.print(f"{method}: {record['refused']}")
        if args.json:  # after every model, so that an interrupted run leaves what it has
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if args.html:
            args.html.write_text(page([report]))


if __name__ == "__main__":
    main()
