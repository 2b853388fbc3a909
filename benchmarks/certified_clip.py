"""What the certified clip costs: time of a step against uncertified norms, and over-estimate of norms on ordinary data.

    python benchmarks/certified_clip.py gpt2 --rounds 5
    python benchmarks/certified_clip.py resnet18 --compile

The uncertified variant is the same emitted graph with plain norms: float32 sums and Gram matrices, no bound added.
Rounds are interleaved: certified, plain, certified, plain.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from workloads import WORKLOADS, Workload

from dpcompile import certified, dpcompile, forms
from dpcompile.forms import Form, Outer, Patched, explicit, in_float64, merge
from dpcompile.passes import insert_norms
from dpcompile.patches import overlapped, padded

SIZES = ((16, 512), (128, 512), (512, 1024), (1024, 512), (1024, 2048))
"""T and d = p; at 1024 and 512 there are more positions than Gram matrices pay for (forms.crowded)."""


def plain_square(grad: Tensor) -> Tensor:
    flat = grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square()


def without_error(square: Tensor) -> Tensor:
    return torch.stack([square, torch.zeros_like(square)])


def plain_dropped(uses: Sequence[Form], **_: bool) -> Tensor:
    return without_error(plain_square(torch.stack(list(map(explicit, uses))).sum(0)))


def plain_ghost(uses: Sequence[Form], **_: bool) -> Tensor:
    merged = merge(uses)
    if len(merged) == 1 and isinstance(merged[0], Patched) and merged[0].window.groups == 1:
        return without_error((plain_patched_gram(merged[0]) * plain_gram(merged[0].rows)).sum((1, 2)))
    if len(merged) > 1 or not isinstance(merged[0], Outer):
        return certified_ghost(uses)  # tied tables: few, and not what is looked at here
    if merged[0].rows_BGTp.shape[1:3] == (1, 1):  # one position: a product of two norms
        return without_error(plain_square(merged[0].rows_BGTp) * plain_square(merged[0].cols_BGTd))
    rows, cols = merged[0].rows_BGTp.flatten(0, 1), merged[0].cols_BGTd.flatten(0, 1)
    total = ((rows @ rows.transpose(1, 2)) * (cols @ cols.transpose(1, 2))).sum((1, 2))
    return without_error(total.unflatten(0, merged[0].rows_BGTp.shape[:2]).sum(1))


def plain_gram(image: Tensor) -> Tensor:
    pixels = image.flatten(2)
    return pixels.transpose(1, 2) @ pixels


def plain_patched_gram(form: Patched) -> Tensor:
    positions = tuple(form.rows.shape[2:])
    return overlapped(plain_gram(padded(form.image, form.window, positions)), form.window, positions)


certified_ghost: Any = insert_norms.ghost_norm


@contextmanager
def uncertified() -> Iterator[None]:
    with (
        mock.patch.multiple(insert_norms, dropped_norm=plain_dropped, ghost_norm=plain_ghost),
        mock.patch.object(certified, "sq_norm", plain_square),
        mock.patch.object(forms, "doubled", return_value=False),
    ):
        yield


def step_of(workload: Workload, model: nn.Module, compiled: bool) -> Callable[[], None]:
    inputs, targets = workload.make_batch()
    dp_model = dpcompile(model, inputs, max_grad_norm=1.0, validate="off")
    forward: Any = torch.compile(dp_model, fullgraph=True) if compiled else dp_model

    def step() -> None:
        dp_model.zero_grad()
        workload.loss(forward(inputs), targets).mean().backward()

    return step


def ratio_of(name: str, rounds: int, compiled: bool) -> list[float]:
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = workload.build()
    certified = step_of(workload, model, compiled)
    with uncertified():
        plain = step_of(workload, model, compiled)
    for step in (certified, plain):  # compiles, warms up
        step()
        step()
    ratios = []
    for _ in tqdm(range(rounds), desc=name, unit="round"):
        times = []
        for step in (certified, plain):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return ratios


def over_estimate(length: int, width: int) -> dict[str, float]:
    """Certified over true norm, less 1, for a linear layer with normal data around a mean."""
    rows, cols = torch.randn(1, 1, length, width), torch.randn(1, 1, length, width) + 0.5
    form = Outer(rows, cols, (width, width), (0,), (1,))
    truth = explicit(in_float64(form)).norm().item()
    found = {
        "ghost": insert_norms.ghost_norm([form]),
        "explicit": insert_norms.dropped_norm([form]),
        "kept": insert_norms.kept_norm([explicit(form)]),
    }
    return {name: two.sqrt().sum().item() / truth - 1 for name, two in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*WORKLOADS, []], default=["gpt2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    console = Console() if Console().is_terminal else Console(width=100)

    table = Table(title="norms over-estimated by", title_justify="left")
    for heading in ("T", "d = p", "ghost", "explicit, dropped", "explicit, kept"):
        table.add_column(heading, justify="right")
    for length, width in SIZES:
        torch.manual_seed(0)
        found = over_estimate(length, width)
        table.add_row(str(length), str(width), *(f"{100 * value:.4f} %" for value in found.values()))
    console.print(table)

    table = Table(title="step, certified / plain norms", title_justify="left")
    for heading in ("model", "median", "least", "most"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in args.models:
        ratios = ratio_of(name, args.rounds, args.compile)
        table.add_row(name, *(f"{f(ratios):.3f}" for f in (statistics.median, min, max)))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
