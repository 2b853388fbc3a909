"""What the commands about models share: their arguments, how errors are told, and how text is printed."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpcompile.api import Proof, prove
from dpcompile.calls import bind_sample
from dpcompile.device import DeviceSpec, spec_named
from dpcompile.errors import CaptureError, DPCompileError
from dpcompile.specs import TargetError
from dpcompile.targets import Target, misfit
from dpcompile.units import bytes_of

REFUSED, BAD_ARGUMENTS = 1, 2  # exit codes


class Policy(StrEnum):
    AUTO = "auto"
    PAPER = "paper"
    GHOST = "ghost"
    EXPLICIT = "explicit"


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
DeviceOption = Annotated[
    str,
    typer.Option(help="whose rates the time model takes: cpu, cuda, h100, a100, or a file of calibrate-device"),
]


def proven(target: Target, dynamic: Sequence[str] = ()) -> Proof:
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


def rates_of(device: str) -> DeviceSpec:
    """Of what --device names."""
    try:
        return spec_named(device)
    except ValueError as error:
        raise TargetError(f"--device: {error}") from None


def budget_of(text: str) -> float:
    """A number of bytes, or a factor."""
    try:
        return float(text) if text.replace(".", "", 1).isdecimal() else bytes_of(text)
    except ValueError as error:
        raise TargetError(str(error)) from None


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
def told() -> Iterator[None]:
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


def write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise TargetError(f"cannot write {str(file)!r}: {error.strerror}") from error


def say(text: str) -> None:
    """To stdout as it is: a table is not wrapped to the window, which would tear it."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False, emoji=False)
