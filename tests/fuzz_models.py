"""Random models: from a seed and the steps to keep, Python source, a module, inputs and a per-sample loss."""

from __future__ import annotations

import copy
import linecache
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_layers import STEPS, WEIGHTS, Builder, Input, Unfit, linear, unfold
from torch import Tensor, nn

LONGEST = 6
TRIES = 6  # for a step that fits

# A drawn module, with its inputs and outputs, as a part of a larger one.
TOGETHER = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, {arguments}):
        return {results}
"""

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn


"""


@dataclass(frozen=True)
class Model:
    """A drawn model: what is needed to build it, call it and take a loss."""

    seed: int
    source: str
    inputs: tuple[Input, ...]
    folded: tuple[int, ...]  # sizes behind the batch in the first dimension of the output; empty if it is the batch
    entropy: bool  # cross entropy over the features, else a curved sum

    def module(self) -> nn.Module:
        """The module in float32, every parameter moved off the zeros and ones of its initialiser."""
        file = f"fuzzed/{self.seed}.py"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        names: dict[str, Any] = {"__name__": "fuzzed"}
        torch.manual_seed(self.seed)
        exec(compile(self.source, file, "exec"), names)
        module = names["Model"]()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module.train()

    def batch(self, size: int, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed % 2**40 + size + seed)
        found = {}
        for given in self.inputs:
            shape = list(given.shape)
            if given.batch_dim is not None:
                shape.insert(given.batch_dim, size)
            if given.kind == "float":
                found[given.name] = torch.randn(shape, generator=generator, dtype=dtype)
            elif given.kind == "bool":
                found[given.name] = torch.rand(shape, generator=generator) > 0.5
            else:
                found[given.name] = torch.randint(given.high, shape, generator=generator)
        return found, torch.rand(size, generator=generator, dtype=dtype) + 0.5

    @property
    def batched(self) -> dict[str, int | None]:
        return {given.name: given.batch_dim for given in self.inputs}

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """[B]; a target is how much its sample counts."""
        total = torch.zeros_like(targets)
        for k, out in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            if self.folded and k == 0:
                out = out.unflatten(0, (-1, *self.folded))
            total = total + self._loss(out.reshape(out.shape[0], math.prod(out.shape[1:]))) * targets
        return total

    def _loss(self, flat: Tensor) -> Tensor:
        if self.entropy and flat.shape[1] > 1:
            return -F.log_softmax(flat, 1)[:, 0]
        slope = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype) + 0.3
        return (slope * flat + 0.25 * flat.square()).sum(1)


@dataclass(frozen=True)
class Bundle(Model):
    """Several models side by side as one: many small ones cost little more to compile than one.

    Parameters of part k are called `part{k}.*`; its inputs `part{k}_*`.
    """

    parts: tuple[Model, ...] = ()

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        losses = [part.loss(out, targets) for part, out in zip(self.parts, outputs, strict=True)]
        return torch.stack(losses, 1).sum(1)


def bundle_of(models: Sequence[Model]) -> Bundle:
    source = HEAD
    init, inputs, results = [], [], []
    for k, model in enumerate(models):
        source += model.source.removeprefix(HEAD).replace("class Model(", f"class Part{k}(") + "\n\n"
        init.append(f"        self.part{k} = Part{k}()")
        own = [replace(given, name=f"part{k}_{given.name}") for given in model.inputs]
        inputs += own
        results.append(f"self.part{k}({', '.join(given.name for given in own)})")
    arguments = ", ".join(given.name for given in inputs)
    source += TOGETHER.format(init="\n".join(init), arguments=arguments, results=f"({', '.join(results)},)").lstrip()
    return Bundle(models[0].seed, source, tuple(inputs), (), False, tuple(models))


def steps_of(seed: int, longest: int = LONGEST) -> list[str]:
    """The names of the steps that a seed draws; each fits behind those before it."""
    rng = random.Random(f"{seed}/steps")
    builder = _start(seed)
    found: list[str] = []
    for at in range(rng.randint(1, longest)):
        for name in rng.choices(list(STEPS), list(WEIGHTS.values()), k=TRIES):
            grown = _grown(builder, seed, at, name)
            if grown is not None:
                builder = grown
                found.append(name)
                break
        else:
            found.append("linear")
    return found


def model_of(seed: int, keep: tuple[int, ...] | None = None, longest: int = LONGEST) -> Model:
    """The model of a seed, of all its steps or of those named."""
    builder = _start(seed)
    for at, name in enumerate(steps_of(seed, longest)):
        if keep is None or at in keep:
            builder = _grown(builder, seed, at, name) or builder
    rng = random.Random(f"{seed}/end")
    if not any("nn." in line for line in builder.init) and builder.shape and keep is None:
        builder = _applied(builder, linear) or builder
    folded: tuple[int, ...] = ()
    while builder.folds:
        if len(builder.folds) == 1 and builder.folds[0][0] in ("inner", "two") and rng.random() < 0.3:
            folded = builder.folds.pop()[1]
        else:
            builder = _applied(builder, unfold) or _closed(builder)
    return Model(seed, _source(builder), tuple(builder.inputs), folded, rng.random() < 0.3)


def _closed(builder: Builder) -> Builder:
    """Too large to be unfolded as it is: the mean over features first."""
    changed = copy.deepcopy(builder)
    changed.body.append(f"h = h.flatten({changed.lead}).mean(-1)")
    changed.shape = ()
    unfold(changed)
    return changed


def _start(seed: int) -> Builder:
    rng = random.Random(f"{seed}/input")
    shapes: list[Callable[[], tuple[int, ...]]] = [
        lambda: (rng.randint(1, 5),),
        lambda: (rng.randint(1, 4), rng.randint(1, 4)),
        lambda: (rng.randint(1, 3), rng.randint(2, 4), rng.randint(2, 4)),
        lambda: (rng.randint(1, 3), rng.randint(1, 3), rng.randint(2, 3), rng.randint(2, 3)),
    ]
    shape = rng.choices(shapes, [2, 5, 4, 1])[0]()
    builder = Builder(rng, shape)
    if rng.random() < 0.25:
        high, width = rng.randint(3, 6), rng.randint(1, 4)
        shape = shape[: rng.randint(0, 2)]
        x = builder.argument("ids", shape, high=high)
        padding = rng.choice(["", f", padding_idx={rng.randrange(-high, high)}"])
        embed = builder.module(f"nn.Embedding({high}, {width}{padding})")
        builder.table = (f"{embed}.weight", high, width)
        builder.then(f"{embed}({x})", (*shape, width))
    elif len(shape) > 1 and rng.random() < 0.1:
        x = builder.argument("float", shape, 1)
        builder.then(f"{x}.transpose(0, 1)", shape)
    else:
        builder.then(builder.argument("float", shape), shape)
    return builder


def _grown(builder: Builder, seed: int, at: int, name: str) -> Builder | None:
    changed = copy.deepcopy(builder)
    changed.rng = random.Random(f"{seed}/{at}/{name}")
    changed.count = 10 * (at + 1)
    return _applied(changed, STEPS[name])


def _applied(builder: Builder, step: Callable[[Builder], None]) -> Builder | None:
    """What the step makes of it; None where it does not fit."""
    changed = copy.deepcopy(builder)
    try:
        step(changed)
    except Unfit:
        return None
    return changed


def _source(builder: Builder) -> str:
    lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in builder.init]
    lines += ["", f"    def forward(self, {', '.join(given.name for given in builder.inputs)}):"]
    lines += [f"        {line}" for line in builder.body]
    lines += [f"        return {', '.join(['h', *builder.outputs])}"]
    return HEAD + "\n".join(lines) + "\n"
