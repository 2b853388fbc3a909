"""The command `dpcompile`: report, check and graph of a model that is built without memory for its parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dpcompile import cli_machine, cli_privacy
from dpcompile.api import Proof
from dpcompile.cli_common import (
    BAD_ARGUMENTS,
    REFUSED,
    BatchOption,
    DeviceOption,
    DynamicOption,
    InputOption,
    Policy,
    PolicyOption,
    SeqOption,
    SetOption,
    TargetArgument,
    budget_of,
    proven,
    rates_of,
    say,
    told,
    write,
)
from dpcompile.drawing import flow_of, uses_of, write_svg
from dpcompile.errors import DPCompileError
from dpcompile.explain import chains_text, proof_text
from dpcompile.fix import fix
from dpcompile.measurement import measurement
from dpcompile.report import plan_dict, plan_text, symbolic_text
from dpcompile.rules.sites.fallback import Fallback
from dpcompile.targets import load_target

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


class Part(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    USES = "uses"


@app.command()
def report(
    target: TargetArgument,
    inputs: InputOption = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    settings: SetOption = None,
    dynamic: DynamicOption = None,
    policy: PolicyOption = Policy.AUTO,
    device: DeviceOption = "cpu",
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="most memory of a step: 2GB, or 1.2 (of plain training)"),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="choose by times that are measured here")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="build the model for real and run it: predicted times and memory against")
    ] = False,
    symbolic: Annotated[bool, typer.Option("--symbolic", help="costs in B, T, d, p, and flips solved for T")] = False,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the plan there too")] = None,
) -> None:
    """Print what private training of a model costs, and what would be chosen for every use of a parameter."""
    with told():
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        analysis = proven(loaded, dynamic or ()).conclude()
        budget = None if memory_budget is None else budget_of(memory_budget)
        rates = rates_of(device)
        plan = analysis.plan(policy.value, device=rates, batch_size=batch, memory_budget=budget, tune=tune)
        plan = analysis.with_least(plan)
        if file is not None:
            write(file, json.dumps(plan_dict(plan), indent=1) + "\n")
        say(f"{target}: {type(loaded.model).__name__}, {analysis.call.describe()}")
        say(symbolic_text(plan) if symbolic else plan_text(plan))
        if measure:
            real = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or (), real=True)
            say(f"\n{measurement(analysis, plan, real)}")


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
    with told():
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        proof: Proof | None = None
        try:
            if repair:
                model, changes = fix(loaded.model)
                loaded = replace(loaded, model=model)
                say("\n".join(map(str, changes)) or "nothing to fix")
            proof = proven(loaded, dynamic or ())
            if explain:
                say(f"{proof_text(proof.program, proof.tracked)}\n")
            uses = proof.conclude().uses
        except DPCompileError as error:
            say(f"not supported: {type(loaded.model).__name__}\n{error}")
            findings = getattr(error, "findings", ())
            if explain and proof is not None and findings:
                say(f"\n{chains_text(proof.program, proof.tracked, findings)}")
            raise typer.Exit(REFUSED) from None
        rules = sorted({site.rule for site in uses.sites})
        slow = [site for site in uses.sites if site.rule == Fallback.name]
        say(
            f"supported: {type(loaded.model).__name__}, {len(uses.sites)} sites in {len(uses.groups)} groups, "
            f"rules {', '.join(rules)}, {len(slow)} fallbacks"
        )
        for site in slow:
            say(f"  fallback (exact, slow): {site.op} in `{site.module}`")


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
    with told():
        loaded = load_target(target, inputs or (), batch=batch, seq=seq, settings=settings or ())
        analysis = proven(loaded).conclude()
        if part is Part.USES:
            drawn = uses_of(analysis.uses)
            code = "\n".join(f"{a} -> {b}" for a, b in drawn.edges)
        else:
            emitted = analysis.emit(analysis.plan(policy.value, batch_size=batch), mean=True)
            program = emitted.forward if part is Part.FORWARD else emitted.backward
            assert program is not None
            drawn, code = flow_of(program), program.module.print_readable(print_output=False)
        if svg is None:
            say(code)
            return
        write_svg(drawn, svg, f"{type(loaded.model).__name__}: {part.value}")
        say(f"{svg}: {drawn.number_of_nodes()} nodes")


cli_machine.register(app)
cli_privacy.register(app)


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
