"""TARGET: which model a command is about, built without memory for its parameters.

`package.module:callable` and `file.py:callable` name a callable that returns a model, or a model and its sample input;
`hf:GPT2LMHeadModel` is a transformers class, built from its config.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dpcompile.huggingface import build_hf, sample_specs
from dpcompile.specs import FORM, TargetError, parse_spec, sample_of
from dpcompile.torch_internals import dry_run, without_memory


@dataclass(frozen=True)
class Target:
    """A model, whose tensors have shapes and no memory unless it is real, and what it is called with."""

    model: nn.Module
    sample_input: Any


def load_target(
    target: str,
    inputs: Sequence[str] = (),
    *,
    batch: int | None = None,
    seq: int | None = None,
    settings: Sequence[str] = (),
    real: bool = False,
) -> Target:
    """The model of TARGET with the sample that `--input` describes, else with the target's own.

    `real` models have memory and the weights that they are built with.

    Raises:
        TargetError: an argument names nothing, or is malformed. The message is one line.
    """
    specs = [parse_spec(text) for text in inputs]
    sample = sample_of(specs) if specs else None
    if target.startswith("hf:"):
        model = build_hf(target.removeprefix("hf:"), settings, real=real)
        if sample is None:
            sample = sample_of(sample_specs(model, batch or 8, seq))
    else:
        if settings:
            raise TargetError(f"--set is for hf: targets; {target!r} builds its own model")
        model, own = _build(target, real=real)
        sample = own if sample is None else sample
        if sample is None:
            raise TargetError(f"{target!r} returns no sample input; give one with --input, like {FORM}")
    return Target(model if real else weightless(model), pytree.tree_map_only(torch.Tensor, _on_cpu, sample))


def weightless(model: nn.Module) -> nn.Module:
    """The model itself with every parameter and buffer replaced by one without memory. Tied weights stay tied.

    Fake tensors on the CPU rather than meta tensors: the forward may make constants of its own on the CPU.
    """
    lazy = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_lazy(value)]
    if lazy:
        raise TargetError(f"{', '.join(lazy)} not initialised yet. Run the model once in the function that builds it.")
    made: dict[int, torch.Tensor] = {}
    fake = without_memory()
    for module in model.modules():
        held = {**module._parameters, **module._buffers}
        held |= {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor) and v.is_meta}
        for name, value in held.items():
            if value is not None:
                setattr(module, name, made.setdefault(id(value), fake(value)))
    return model


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(value, device="cpu") if value.device.type != "cpu" else value


def _build(target: str, *, real: bool) -> tuple[nn.Module, Any]:
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise TargetError(f"TARGET {target!r} is not of the form package.module:callable, file.py:callable or hf:Class")
    module = _load_file(Path(where)) if where.endswith(".py") else _import(where)
    function = getattr(module, name, None)
    if function is None:
        raise TargetError(f"{where!r} has no {name!r}")
    if not callable(function):
        raise TargetError(f"{target!r} is not callable")
    built = _call(target, function, real=real)
    model, sample = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise TargetError(f"{target!r} returned {type(model).__name__}, expected a model or (model, sample input)")
    return model, sample


def _call(target: str, function: Any, *, real: bool) -> Any:
    if not real:
        with contextlib.suppress(Exception), torch.device("meta"):
            return function()
    try:  # some models read values while they are built: these take their memory
        return function()
    except Exception as error:
        raise TargetError(f"{target!r} raised {describe(error)}") from error


def _import(name: str) -> ModuleType:
    sys.path.insert(0, "")  # as `python -m` does: modules beside the caller are found
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise TargetError(f"there is no module {missing!r}") from error
    except Exception as error:
        raise TargetError(f"importing {name!r} raised {describe(error)}") from error
    finally:
        sys.path.remove("")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetError(f"{str(path)!r} raised {describe(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def misfit(target: Target) -> str | None:
    """Why the model cannot be called with the sample, in one line; None if it can, or if that needs real values."""
    sample = target.sample_input
    kwargs = sample if isinstance(sample, Mapping) else {}
    args = () if isinstance(sample, Mapping) else tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)
    error = dry_run(target.model, args, kwargs)
    return None if error is None else describe(error)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
