"""The command `dpcompile`: report, check and graph of a model that is built without memory for its parameters."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dpcompile.api import Proof, prove
from dpcompile.calls import bind_sample
from dpcompile.cli_privacy import register
from dpcompile.device import spec_for
from dpcompile.drawing import flow_of, uses_of, write_svg
from dpcompile.errors import CaptureError, DPCompileError
from dpcompile.explain import chains_text, proof_text
from dpcompile.fix import fix
from dpcompile.report import plan_dict, plan_text, symbolic_text
from dpcompile.rules.sites.fallback import Fallback
from dpcompile.specs import TargetError
from dpcompile.targets import Target, load_target, misfit

REFUSED, BAD_ARGUMENTS = 1, 2  # exit codes

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


class Policy(StrEnum):
    AUTO = "auto"
    PAPER = "paper"
    GHOST = "ghost"
    EXPLICIT = "explicit"


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Part(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    USES = "uses"


TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="package.module:callable, file.py:callable or hf:GPT2LMHeadModel")
]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="SPEC", help="float32[32,3,224,224] or input_ids=int64[8,1024]<50257"),
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="batch size to decide for (hf: default 8)")]
SeqOption = Annotated[int | None, typer.Option(min=1, help="hf: positions of a sample (default 128)")]
DynamicOption = Annotated[
    list[str] | None,
    typer.Option("--dynamic", metavar="NAME:DIM", help="a size that calls may choose, such as input_ids:1"),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="hf: a field of the config")]
PolicyOption = Annotated[Policy, typer.Option(help="how norm methods are chosen")]
DeviceOption = Annotated[Device, typer.Option(help="device whose rates the time model takes")]


@app.command()
def report(
    target: TargetArgument,
    inputs: InputOption = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    settings: SetOption = None,
    dynamic: DynamicOption = None,
    policy: PolicyOption = Policy.AUTO,
    device: DeviceOption = Device.CPU,
    symbolic: Annotated[bool, typer.Option("--symbolic", help="costs in B, T, d, p, and flips solved for T")] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the plan there too")] = None,
) -> None:
    """Print what private training of a model costs, and what would be chosen for every use of a parameter."""
    with _told():
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        analysis = _proven(loaded, dynamic or ()).conclude()
        plan = analysis.plan(policy.value, device=spec_for(torch.device(device.value)), batch_size=batch)
        if file is not None:
            _write(file, json.dumps(plan_dict(plan), indent=1) + "\n")
        _say(f"{target}: {type(loaded.model).__name__}, {analysis.call.describe()}")
        _say(symbolic_text(plan) if symbolic else plan_text(plan))


@app.command()
def check(
    target: TargetArgument,
    inputs: InputOption = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    settings: SetOption = None,
    dynamic: DynamicOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="print the proof: the batch in every module, the way to every offender")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--fix", help="check the model as dpcompile.fix changes it, and print the changes")
    ] = False,
) -> None:
    """Say whether a model is supported. If not: every reason with module, op, line and cure, and exit code 1."""
    with _told():
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        proof: Proof | None = None
        try:
            if repair:
                model, changes = fix(loaded.model)
                loaded = replace(loaded, model=model)
                _say("\n".join(map(str, changes)) or "nothing to fix")
            proof = _proven(loaded, dynamic or ())
            if explain:
                _say(f"{proof_text(proof.program, proof.tracked)}\n")
            uses = proof.conclude().uses
        except DPCompileError as error:
            _say(f"not supported: {type(loaded.model).__name__}\n{error}")
            findings = getattr(error, "findings", ())
            if explain and proof is not None and findings:
                _say(f"\n{chains_text(proof.program, proof.tracked, findings)}")
            raise typer.Exit(REFUSED) from None
        rules = sorted({site.rule for site in uses.sites})
        slow = [site for site in uses.sites if site.rule == Fallback.name]
        _say(
            f"supported: {type(loaded.model).__name__}, {len(uses.sites)} sites in {len(uses.groups)} groups, "
            f"rules {', '.join(rules)}, {len(slow)} fallbacks"
        )
        for site in slow:
            _say(f"  fallback (exact, slow): {site.op} in `{site.module}`")


@app.command()
def graph(
    target: TargetArgument,
    inputs: InputOption = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    settings: SetOption = None,
    policy: PolicyOption = Policy.AUTO,
    part: Annotated[
        Part, typer.Option(help="emitted forward or backward, or which parameter is used where")
    ] = Part.BACKWARD,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it there (needs matplotlib)")] = None,
) -> None:
    """Print the emitted graph as code, or draw it."""
    with _told():
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        analysis = _proven(loaded).conclude()
        if part is Part.USES:
            drawn = uses_of(analysis.uses)
            code = "\n".join(f"{a} -> {b}" for a, b in drawn.edges)
        else:
            emitted = analysis.emit(analysis.plan(policy.value, batch_size=batch), mean=True)
            program = emitted.forward if part is Part.FORWARD else emitted.backward
            assert program is not None
            drawn, code = flow_of(program), program.module.print_readable(print_output=False)
        if svg is None:
            _say(code)
            return
        write_svg(drawn, svg, f"{type(loaded.model).__name__}: {part.value}")
        _say(f"{svg}: {drawn.number_of_nodes()} nodes")


register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(arguments, prog_name="dpcompile", standalone_mode=False)
    except typer.TyperException as error:
        say = getattr(error, "format_message", error.__str__)
        print(f"dpcompile: {' '.join(say().split())}", file=sys.stderr)
        code = BAD_ARGUMENTS
    except typer.Abort:
        code = REFUSED
    sys.exit(code if isinstance(code, int) else 0)


def _proven(target: Target, dynamic: Sequence[str] = ()) -> Proof:
    """The proof; a sample that the model itself does not take is a bad argument, not a fault of the model."""
    free = _free_dims(dynamic)
    try:
        bind_sample(target.model, target.sample_input, None, dynamic=free)
    except CaptureError as error:
        raise TargetError(str(error)) from error
    try:
        return prove(target.model, target.sample_input, dynamic=free)
    except CaptureError as error:
        reason = misfit(target)
        if reason is None:
            raise
        raise TargetError(f"{type(target.model).__name__} does not take this sample input: {reason}") from error


def _free_dims(texts: Sequence[str]) -> dict[str, list[int]]:
    """NAME:DIM as what dpcompile(dynamic=) takes."""
    found: dict[str, list[int]] = {}
    for text in texts:
        name, _, dim = text.rpartition(":")
        if not name or not dim.removeprefix("-").isdecimal():
            raise TargetError(f"--dynamic {text!r} is not of the form NAME:DIM, such as input_ids:1")
        found.setdefault(name, []).append(int(dim))
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors as one message on stderr and an exit code, and nothing there from libraries."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except TargetError as error:
            print(f"dpcompile: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(BAD_ARGUMENTS) from None
        except DPCompileError as error:
            print(f"dpcompile: {error}", file=sys.stderr)
            raise typer.Exit(REFUSED) from None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise TargetError(f"cannot write {str(file)!r}: {error.strerror}") from error


def _say(text: str) -> None:
    """To stdout as it is: a table is not wrapped to the window, which would tear it."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False, emoji=False)
