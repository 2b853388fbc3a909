"""Any logical batch from physical batches down to one sample (NanoBatch): same gradient, less memory, some speed.

    python examples/nanobatch.py
    python examples/nanobatch.py --logical 512 --physical 1 16 256 --model resnet18 --plot nanobatch.png

One private step of an expected 4096 samples is taken from the same weights with physical batches of 1, 8 and 64, with
flat and with per-layer clipping. The same seed gives the same Poisson batch and the same noise each time, so the noise
drops out of a difference, and what is left is that of the clipped sums: it has to be rounding. (Activations are smooth:
rounding can turn a ReLU over at zero, and one such unit is worth some percent of R.) The images are
scikit-learn's digits, repeated with pixel noise: something to measure with, nothing that is learnt or released.

Throughput is that of the whole step: sampling, forward, backward, clipping, noise, update. Memory is the most bytes of
tensors alive at a time within a step, beside model and data, as torch's profiler counts allocations (what convolution
libraries take for themselves is not in it). It comes from one physical batch, so a step of a few of them is profiled.
Flat clipping keeps the output gradient of every layer until the last norm is known; per-layer clipping keeps none. It
shows where a layer keeps little else: in `deep` (tanh keeps what the next layer needs anyway) more than in `small`.
"""

from __future__ import annotations

import os

# Threads that spin while they wait make a shared machine many times slower. Read once, when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# The profiler says on stderr that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import copy
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import resnet18
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset
from tqdm import tqdm

from dpcompile import DPModule, Private, dpcompile, make_private

CLASSES = 10
CLIP_GROUPS = ("flat", "per-layer")
MAX_GRAD_NORM = 1.0
PROFILED_BATCHES = 4  # physical batches of the step whose memory is measured
TOLERANCE = 1e-3  # of the difference of two sums, over R, which is what one sample may add

# ---------------------------------------------------------------- models and images


def convolution(channels_in: int, channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, 3, stride, padding=1),
        nn.GroupNorm(math.gcd(8, channels), channels),
        nn.SiLU(),
    ]


def small() -> nn.Module:
    layers = [*convolution(1, 8), *convolution(8, 16, 2), *convolution(16, 32, 2), *convolution(32, 32)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, CLASSES))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, CLASSES))


def deep() -> nn.Module:
    """Eight linear layers over 16 patches."""
    layers: list[nn.Module] = [nn.Unfold(4, stride=4), nn.Linear(16, 128), nn.Tanh()]
    for _ in range(7):
        layers += [nn.Linear(128, 128), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 128, CLASSES))


def residual() -> nn.Module:
    return resnet18(1, 16, 64, nn.SiLU)


MODELS: dict[str, Callable[[], nn.Module]] = {"deep": deep, "small": small, "mlp": mlp, "resnet18": residual}


def images(count: int) -> TensorDataset:
    """`count` digits of 16 x 16: the same ones again and again, each with its own pixel noise."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = torch.arange(count) % len(labels)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[chosen] / 16
    x = F.interpolate(small, 16, mode="bilinear", align_corners=False)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.tensor(labels)[chosen])


# ---------------------------------------------------------------- one logical step


@dataclass(frozen=True)
class Measured:
    """One private step, taken in physical batches of at most `physical`."""

    groups: str
    physical: int
    samples: int  # in the logical batch, padding included
    seconds: float
    noisy_sum: Tensor  # all gradients in one row
    peak_bytes: int


def compiled(name: str, groups: str) -> DPModule:
    torch.manual_seed(0)
    return dpcompile(MODELS[name](), images(8).tensors[0], max_grad_norm=MAX_GRAD_NORM, clip_groups=groups)


def run_of(dp_model: DPModule, logical: int, physical: int, *, pad: bool) -> Private:
    """A private run over twice as many images as a logical batch has on average; a fresh copy of the model."""
    dp_model = copy.deepcopy(dp_model)
    optimizer = torch.optim.SGD(dp_model.parameters(), lr=0.1)
    return make_private(
        dp_model,
        optimizer,
        images(2 * logical),
        batch_size=logical,
        max_physical_batch=physical,
        pad=pad,
        noise_multiplier=1.0,
        target_delta=1e-5,
        seed=0,
    )


def take_step(private: Private, forward: Any, progress: tqdm[Any] | None = None) -> int:
    """Physical batches until the logical one is complete; how many samples it had. Gradients stay: noisy means."""
    samples = 0
    for x, y in private.loader:
        F.cross_entropy(forward(x), y).backward()
        private.optimizer.step()
        samples += len(x)
        if progress is not None:
            progress.update(len(x))
        if private.optimizer.released:
            break
    return samples


def forward_of(private: Private, compiled: bool) -> Any:
    """The module, or its compiled form: padded batches have one shape, so it is compiled once."""
    if not compiled:
        return private.dp_model
    torch.compiler.reset()  # it counts how often it compiles one piece of code, here for a new copy of the model
    return torch.compile(private.dp_model, fullgraph=True)


def timed_step(private: Private, forward: Any, name: str, logical: int) -> tuple[Tensor, float, int]:
    """The noisy sum of the gradients in one row, seconds, samples."""
    private.optimizer.zero_grad()
    with tqdm(total=logical, desc=name, unit="sample") as progress:
        started = time.perf_counter()
        samples = take_step(private, forward, progress)
        seconds = time.perf_counter() - started
    grads = [p.grad.flatten() for p in private.dp_model.parameters() if p.grad is not None]
    return torch.cat(grads).double() * private.loader.sampler.expected_batch_size, seconds, samples


def measure(dp_model: DPModule, groups: str, logical: int, physical: int, compiled: bool) -> Measured:
    peak_bytes = peak_of(dp_model, logical, physical, compiled)
    private = run_of(dp_model, logical, physical, pad=compiled)
    forward = forward_of(private, compiled)
    noisy_sum, seconds, samples = timed_step(private, forward, f"{groups}, {physical} at a time", logical)
    if compiled:  # the first step compiled
        _, seconds, samples = timed_step(private, forward, f"{groups}, {physical} at a time, again", logical)
    return Measured(groups, physical, samples, seconds, noisy_sum, peak_bytes)


# ---------------------------------------------------------------- memory


def peak_of(dp_model: DPModule, logical: int, physical: int, compiled: bool) -> int:
    """Most bytes of tensors alive at a time within one step, beside those that were there before it."""
    private = run_of(dp_model, min(logical, PROFILED_BATCHES * physical), physical, pad=compiled)
    forward = forward_of(private, compiled)
    take_step(private, forward)
    private.optimizer.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_step(private, forward)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))


# ---------------------------------------------------------------- the table


def difference(a: Measured, b: Measured) -> float:
    """Norm of the difference of two clipped sums, over R. Both have the same noise."""
    return (a.noisy_sum - b.noisy_sum).norm().item() / MAX_GRAD_NORM


def as_table(name: str, rows: list[Measured]) -> Table:
    table = Table(title=f"{name}: one private step of {min(row.samples for row in rows)} samples", title_justify="left")
    table.add_column("clipping")
    for heading in ("physical batch", "step s", "samples/s", "peak MB", "sum differs by (of R)"):
        table.add_column(heading, justify="right")
    for row in rows:
        reference = next(other for other in reversed(rows) if other.groups == row.groups)
        table.add_row(
            row.groups,
            str(row.physical),
            f"{row.seconds:.2f}",
            f"{row.samples / row.seconds:.0f}",
            f"{row.peak_bytes / 1e6:.1f}",
            "–" if row is reference else f"{difference(row, reference):.0e}",
        )
    return table


def plot(file: str, rows: list[Measured]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for groups in CLIP_GROUPS:
        own = [row for row in rows if row.groups == groups]
        sizes = [row.physical for row in own]
        left.plot(sizes, [row.samples / row.seconds for row in own], marker="o", label=groups)
        right.plot(sizes, [row.peak_bytes / 1e6 for row in own], marker="o", label=groups)
    left.set(xlabel="physical batch", ylabel="samples per second", xscale="log", yscale="log")
    right.set(xlabel="physical batch", ylabel="peak memory of a step, MB", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(title="clipping")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logical", type=int, default=4096, help="expected size of the logical batch")
    parser.add_argument("--physical", type=int, nargs="+", default=[1, 8, 64], help="most samples in one forward")
    parser.add_argument("--model", choices=MODELS, default="deep")
    parser.add_argument("--compile", action="store_true", help="run the emitted graph through torch.compile")
    parser.add_argument("--plot", metavar="FILE", help="draw throughput and memory against the physical batch")
    args = parser.parse_args(argv)
    if args.logical < 1 or min(args.physical) < 1:
        parser.error("--logical and --physical must be at least 1")

    rows: list[Measured] = []
    for groups in CLIP_GROUPS:
        dp_model = compiled(args.model, groups)
        for physical in sorted(set(args.physical)):
            rows.append(measure(dp_model, groups, args.logical, physical, args.compile))

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a file has no width to fit
    console.print(as_table(args.model, rows))
    worst = max(difference(a, b) for a in rows for b in rows if a.groups == b.groups)
    if args.plot:
        plot(args.plot, rows)
        print(f"figure in {args.plot}")
    agree = worst < TOLERANCE
    print(f"the clipped sums {'agree' if agree else 'DISAGREE'}: they differ by at most {worst:.1e} of R")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
