"""The commands about privacy: epsilon of a plan, noise for a target, and what a ledger has spent."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from dpcompile import accountant as accounting
from dpcompile.accountant import Accountant, usual_accountant
from dpcompile.errors import PrivacyError
from dpcompile.ledger import Ledger, Row
from dpcompile.schemes import (
    FixedSize,
    Neighbours,
    Poisson,
    Scheme,
    ShuffledEpochs,
    Step,
    sensitivity,
    usual_neighbours,
)
from dpcompile.specs import TargetError

REFUSED, BAD_ARGUMENTS = 1, 2  # exit codes
ROWS = 24  # a longer ledger is shown by its ends
POINTS = 24  # of a plot


class Sampling(StrEnum):
    POISSON = "poisson"
    FIXED_SIZE = "fixed-size"
    SHUFFLED = "shuffled"


NoiseOption = Annotated[float, typer.Option(help="noise std / (max_grad_norm * sensitivity)")]
StepsOption = Annotated[int, typer.Option(help="logical steps, one noisy gradient each")]
DeltaOption = Annotated[float, typer.Option(help="in (0, 1), well below 1 / data set size")]
RateOption = Annotated[float | None, typer.Option(help="expected batch size / data set size (poisson)")]
DatasetOption = Annotated[int | None, typer.Option(help="samples of the data set, instead of --sample-rate")]
BatchOption = Annotated[int | None, typer.Option(help="logical batch size, with --dataset-size")]
SchemeOption = Annotated[Sampling, typer.Option(help="how batches are drawn")]
AccountantOption = Annotated[
    Accountant | None, typer.Option(help="default: pld where it has a result for the sampling, else rdp")
]
NeighboursOption = Annotated[
    Neighbours | None,
    typer.Option(help="default: add-or-remove-one for poisson, replace-one for batches of fixed size"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to a command line."""
    for command in (epsilon, calibrate, ledger):
        app.command()(command)


def epsilon(
    noise_multiplier: NoiseOption,
    steps: StepsOption,
    delta: DeltaOption,
    sample_rate: RateOption = None,
    dataset_size: DatasetOption = None,
    batch_size: BatchOption = None,
    scheme: SchemeOption = Sampling.POISSON,
    accountant: AccountantOption = None,
    neighbours: NeighboursOption = None,
) -> None:
    """Print the epsilon of a training run, by every accountant that has a result for it."""
    with _told():
        sampled = _scheme(scheme, sample_rate, dataset_size, batch_size)
        relation = neighbours or usual_neighbours(sampled)
        asked = tuple(Accountant) if accountant is None else (accountant,)
        lines = _epsilons([Step(sampled, noise_multiplier, steps)], delta, relation, asked)
        _say(f"{_named(sampled)}, {steps} steps, noise multiplier {noise_multiplier:g}")
        _say(f"{relation.value}: noise std = {noise_multiplier * sensitivity(relation):g} * max_grad_norm")
        for line in lines:
            _say(line)
        if isinstance(sampled, ShuffledEpochs):
            as_poisson = [Step(Poisson(sampled.rate), noise_multiplier, steps)]
            claim = accounting.epsilon(as_poisson, delta, neighbours=relation)
            _say(f"Accounted as if it were poisson, wrongly: epsilon {_up(claim)} (pld). Do not claim that.")


def calibrate(
    target_epsilon: Annotated[float, typer.Option("--epsilon", help="not to be exceeded")],
    steps: StepsOption,
    delta: DeltaOption,
    sample_rate: RateOption = None,
    dataset_size: DatasetOption = None,
    batch_size: BatchOption = None,
    scheme: SchemeOption = Sampling.POISSON,
    accountant: AccountantOption = None,
    neighbours: NeighboursOption = None,
) -> None:
    """Print the smallest noise multiplier that keeps a training run within epsilon."""
    with _told():
        sampled = _scheme(scheme, sample_rate, dataset_size, batch_size)
        relation = neighbours or usual_neighbours(sampled)
        chosen = accountant or usual_accountant(sampled)
        noise = accounting.calibrate(target_epsilon, delta, sampled, steps, accountant=chosen, neighbours=relation)
        _say(f"{_named(sampled)}, {steps} steps, epsilon {target_epsilon:g} at delta {delta:g} ({chosen.value})")
        _say(f"noise multiplier {noise:.5g}")
        _say(f"{relation.value}: noise std = {noise * sensitivity(relation):.5g} * max_grad_norm")
        for line in _epsilons([Step(sampled, noise, steps)], delta, relation, tuple(Accountant)):
            _say(line)


def ledger(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="ledger in JSON, or torch checkpoint that has one")],
    delta: Annotated[float | None, typer.Option(help="default: the target delta of the ledger")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw epsilon against steps there")] = None,
) -> None:
    """Print what was released, step by step, and what it has spent."""
    with _told():
        found = _ledger_of(file)
        at = found.target_delta if delta is None else delta
        by = _first_that_works(found)
        _say(f"{file}: {len(found)} steps, {found.neighbours.value}, target delta {found.target_delta:g}")
        Console(width=120).print(_table(found, at, by))
        for line in _epsilons(found.steps(), at, found.neighbours, tuple(Accountant)):
            _say(line)
        if plot is not None:
            _draw(found, at, by, plot)
            _say(f"{plot}: epsilon against steps")


def _scheme(kind: Sampling, rate: float | None, dataset_size: int | None, batch_size: int | None) -> Scheme:
    if rate is not None and (dataset_size is not None or batch_size is not None):
        raise TargetError("give --sample-rate or --dataset-size with --batch-size, not both")
    if kind is Sampling.POISSON and rate is not None:
        return Poisson(rate)
    if dataset_size is None or batch_size is None:
        rated = "--sample-rate, or " if kind is Sampling.POISSON else ""
        raise TargetError(f"--scheme {kind.value} needs {rated}--dataset-size and --batch-size")
    if kind is Sampling.POISSON:
        FixedSize(dataset_size, batch_size)  # the same sizes are possible
        return Poisson(batch_size / dataset_size)
    fixed = FixedSize if kind is Sampling.FIXED_SIZE else ShuffledEpochs
    return fixed(dataset_size, batch_size)


def _named(scheme: Scheme) -> str:
    if isinstance(scheme, FixedSize | ShuffledEpochs):
        return f"{scheme.name} sampling, batches of {scheme.batch_size} from {scheme.dataset_size}"
    return f"{scheme.name} sampling, rate {scheme.rate:g}"


def _epsilons(steps: Sequence[Step], delta: float, relation: Neighbours, asked: Sequence[Accountant]) -> list[str]:
    """A line for each accountant asked; one that has no result says so, unless none has."""
    lines: list[str] = []
    refusals: list[PrivacyError] = []
    for by in asked:
        try:
            found = accounting.epsilon(steps, delta, accountant=by, neighbours=relation)
            lines.append(f"epsilon {_up(found)} at delta {delta:g} ({by.value})")
        except PrivacyError as error:
            refusals.append(error)
            lines.append(f"no result by {by.value} for this sampling under {relation.value}")
    if len(refusals) == len(asked):
        raise refusals[0]
    return lines


def _up(value: float) -> str:
    """Four digits, never rounded down."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit - 1e-9) * unit:.4g}"


def _ledger_of(file: Path) -> Ledger:
    """From JSON, or from a checkpoint whose "ledger" is at the top or one level below."""
    try:
        start = file.read_bytes()[:64].lstrip()
        if start.startswith(b"{"):
            return Ledger.load(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TargetError(f"cannot read {str(file)!r}: {error.strerror}") from error
    except PrivacyError as error:
        raise TargetError(str(error)) from error
    except Exception as error:  # bytes that are no checkpoint fail in any way
        raise TargetError(f"{str(file)!r} is neither a ledger in JSON nor a torch checkpoint") from error
    for part in (state, *(state.values() if isinstance(state, dict) else ())):
        if isinstance(part, dict) and "ledger" in part:
            try:
                return Ledger.from_state_dict(part["ledger"])
            except PrivacyError as error:
                raise TargetError(str(error)) from error
    raise TargetError(f"{str(file)!r} is a checkpoint without a ledger, so what it has spent is not known")


def _first_that_works(found: Ledger) -> Accountant:
    for by in Accountant:
        with contextlib.suppress(PrivacyError):
            found.epsilon(accountant=by)
            return by
    return Accountant.PLD  # its own refusal tells why


def _table(found: Ledger, delta: float, by: Accountant) -> Table:
    table = Table(title=None)
    names = ("steps", "sampler", "rate", "noise multiplier", "max_grad_norm", "sensitivity", "noise std")
    for name in (*names, f"epsilon so far ({by.value})"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    rows = found.rows()
    shown = rows if len(rows) <= ROWS else [*rows[: ROWS // 2], None, *rows[-ROWS // 2 :]]
    for row in shown:
        if row is None:
            table.add_row("...", f"{len(rows) - ROWS} rows")
        else:
            table.add_row(*_cells(row), _up(found.epsilon(delta, by, until=row.last)))
    return table


def _cells(row: Row) -> list[str]:
    steps = str(row.first) if row.first == row.last else f"{row.first}-{row.last}"
    rate = "stated" if row.rate is None else f"{row.rate:.4g}"
    numbers = (row.noise_multiplier, row.max_grad_norm, row.sensitivity, row.noise_std)
    return [steps, row.sampler, rate, *(f"{number:.4g}" for number in numbers)]


def _draw(found: Ledger, delta: float, by: Accountant, file: Path) -> None:
    """Epsilon against steps, at POINTS steps and wherever a row ends while these are few."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TargetError("--plot needs matplotlib: pip install matplotlib") from error
    total = len(found)
    at = {round(total * i / POINTS) for i in range(POINTS + 1)}
    rows = found.rows()
    if len(rows) <= POINTS:
        at |= {row.last for row in rows}
    steps = sorted(at)
    spent = [found.epsilon(delta, by, until=count) for count in steps]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, spent)
    for before, after in pairwise(rows[: POINTS + 1]):
        if before.noise_multiplier != after.noise_multiplier or before.sampler != after.sampler:
            axes.axvline(before.last, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="steps", ylabel=f"epsilon at delta {delta:g} ({by.value})", xlim=(0, max(total, 1)))
    axes.set_ylim(bottom=0)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot write {str(file)!r}: {error}") from error


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors as one line on stderr and an exit code."""
    try:
        yield
    except (TargetError, ValueError) as error:
        print(f"dpcompile: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(BAD_ARGUMENTS) from None
    except PrivacyError as error:
        print(f"dpcompile: {error}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(text, markup=False, emoji=False)
