"""The fuzzer: random models against one sample at a time in float64.

    python tests/fuzz.py --seed 1234                 # one model, with its source
    python tests/fuzz.py --seed 1234 --keep 0,2      # the same with some of its steps
    python tests/fuzz.py --minutes 30 --jobs 2       # models from --from on, until the time is up

A model that disagrees is made smaller by leaving out its steps and options, as long as it disagrees in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import multiprocessing
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any
from unittest import mock

import torch
from fuzz_models import LONGEST, Model, bundle_of, model_of, steps_of
from oracle import RTOL, PerSampleGradients, assert_close, assert_same_gradients, gradients
from torch import Tensor, nn

from dpcompile import BatchMixingError, DPCompileError, DPModule, InvalidGraphError, NoRuleError, dpcompile
from dpcompile.budget import Schedule
from dpcompile.passes import choose_norms
from dpcompile.rounding import without_bounds

INFINITE = float("inf")
ZERO = 1e-12  # errors are never measured against less: norms that are all zero need not be zero to the last bit


@dataclass(frozen=True)
class Options:
    """How a model is compiled and run."""

    norm_method: str = "auto"
    fused: bool = False
    loss_reduction: str = "sum"
    clip_groups: str | tuple[str, ...] = "flat"
    views: int = 1
    double: bool = True
    size: int = 3  # of the sample
    backend: str = ""  # of torch.compile; none: eager
    again: bool = False  # all of the backward runs a second time behind the clip factors


@dataclass(frozen=True)
class Recipe:
    """One run of the fuzzer: everything in it is printed by `command` and read back by the command line."""

    seed: int
    keep: tuple[int, ...] | None = None  # the steps; None: all
    longest: int = LONGEST
    together: int = 1  # models of this and the following seeds, compiled as one
    changed: tuple[tuple[str, Any], ...] = ()  # options other than the drawn ones

    @property
    def model(self) -> Model:
        if self.together > 1:
            return bundle_of([model_of(self.seed + k, None, self.longest) for k in range(self.together)])
        return model_of(self.seed, self.keep, self.longest)

    @property
    def options(self) -> Options:
        return replace(options_of(self.seed), **dict(self.changed))

    def command(self) -> str:
        parts = [f"python tests/fuzz.py --seed {self.seed}"]
        parts += [f"--longest {self.longest}"] if self.longest != LONGEST else []
        parts += [f"--together {self.together}"] if self.together > 1 else []
        parts += [f"--keep {','.join(map(str, self.keep)) or 'none'}"] if self.keep is not None else []
        parts += [f"--set {','.join(f'{name}={value}' for name, value in self.changed)}"] if self.changed else []
        return " ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """`kind`: ok, refused, rough (float32 autograd itself is as far off), or failed. `what` groups the like ones."""

    kind: str
    what: str = ""
    detail: str = field(default="", compare=False)


def options_of(seed: int) -> Options:
    rng = random.Random(f"{seed}/options")
    return Options(
        norm_method=rng.choice(["ghost", "explicit", "auto", "paper"]),
        fused=rng.random() < 0.4,
        loss_reduction=rng.choice(["mean", "sum"]),
        clip_groups=rng.choice(["flat", "flat", "flat", "per-layer"]),
        views=rng.choice([1] * 9 + [2, 3]),
        double=rng.random() < 0.5,
        size=rng.choice([2, 3, 3, 3, 4, 1]),
        backend="aot_eager" if rng.random() < 0.02 else "",
        again=rng.random() < 0.25,
    )


# ---------------------------------------------------------------- one model


def check(recipe: Recipe) -> Outcome:
    """Compile the model and hold its norms, gradients and outputs against the truth."""
    options = recipe.options
    dtype = torch.float64 if options.double else torch.float32
    model = recipe.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = model.module().to(dtype)
            if recipe.together > 1 and options.clip_groups != "per-layer":  # each part on its own, too
                options = replace(options, clip_groups=_parts(module))
            trains = _plain(model, module, options.size * options.views, dtype).requires_grad
        except Exception:
            return Outcome("failed", "the fuzzer drew a model that does not run", traceback.format_exc())
        if not trains:  # no parameter is left, or none is used
            return Outcome("ok", "nothing to train")
        try:
            dp_model = _compiled(model, module, options, dtype)
        except DPCompileError as error:
            return _refused(error)
        except Exception as error:
            return _crash("compilation", error)
        try:
            sizes = (options.size + 1, 1) if recipe.together > 1 else (options.size, 1, options.size + 1, 0)
            _check_all(model, module, dp_model, options, dtype, sizes)
        except AssertionError as error:
            if not options.double and _rough(model, dp_model, options):
                return Outcome("rough")
            if _certified(model, module, dp_model, options, dtype, sizes):
                return Outcome("ok", "norms with the certified bound")
            return Outcome("failed", _blank(str(error).partition(": relative error")[0]), str(error))
        except Exception as error:
            return _crash("a step", error)
        finally:
            if options.backend:
                torch._dynamo.reset()
    return Outcome("ok")


def _compiled(model: Model, module: nn.Module, options: Options, dtype: torch.dtype) -> DPModule:
    inputs, targets = model.batch(options.size * options.views, dtype)
    loss = {"loss_fn": model.loss, "sample_targets": targets} if options.fused else {}
    with everything_again() if options.again else contextlib.nullcontext():
        return dpcompile(
            module,
            inputs,
            max_grad_norm=1.0,
            norm_method=options.norm_method,
            loss_reduction=options.loss_reduction,
            batched=model.batched,
            clip_groups=options.clip_groups,
            views=options.views,
            **loss,
        )


@contextlib.contextmanager
def everything_again() -> Iterator[None]:
    """Plans run all of the backward a second time, whatever their memory budget."""
    within = choose_norms._within

    def all_again(schedule: Schedule, *rest: Any) -> tuple[Any, ...]:
        choices, memory, _ = within(schedule, *rest)
        return choices, memory, range(len(schedule.segments))

    with mock.patch.object(choose_norms, "_within", all_again):
        yield


def _parts(module: nn.Module) -> tuple[str, ...]:
    """A pattern for each part of a bundle that trains."""
    names = dict.fromkeys(name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad)
    return tuple(f"{name}.*" for name in names)


def _plain(model: Model, module: nn.Module, rows: int, dtype: torch.dtype) -> Tensor:
    inputs, targets = model.batch(rows, dtype)
    losses = model.loss(module(**inputs), targets)
    assert losses.shape == (rows,)
    return losses


def _check_all(
    model: Model,
    module: nn.Module,
    dp_model: DPModule,
    options: Options,
    dtype: torch.dtype,
    sizes: Sequence[int],
    *,
    not_below: bool = False,
) -> None:
    step = _step(model, dp_model, options)
    for size in dict.fromkeys(sizes):
        inputs, targets = model.batch(size * options.views, dtype)
        truth = per_sample(model, module, inputs, targets, options.views, torch.float64)
        dp_model.max_grad_norm = truth.splitting_norm() if size else 1.0
        step(inputs, targets)
        with _named(f"B={size}"):
            if not_below:
                _check_not_below(dp_model, truth)
            else:
                _check_step(module, dp_model, truth, options)
    inputs, targets = model.batch(options.size * options.views, dtype)
    dp_model.max_grad_norm = INFINITE
    step(inputs, targets)
    left = {name: g.clone() for name, g in gradients(module).items()}
    module.zero_grad()
    losses = model.loss(module(**inputs), targets)
    (losses.mean() if options.loss_reduction == "mean" else losses.sum() / options.views).backward()
    own = gradients(module)
    if max(g.abs().max().item() for g in own.values() if g.numel()) < ZERO:
        return
    with _named("R=inf, against autograd"):
        assert_same_gradients(left, own, RTOL[dtype])


def _step(model: Model, dp_model: DPModule, options: Options) -> Callable[[dict[str, Tensor], Tensor], None]:
    """Forward and backward; with the outputs or the loss held against the model's own."""
    run = torch.compile(dp_model, backend=options.backend) if options.backend else dp_model

    def step(inputs: dict[str, Tensor], targets: Tensor) -> None:
        dp_model.zero_grad()
        if options.fused:
            loss = run(**inputs, targets=targets)
        else:
            losses = model.loss(run(**inputs), targets)
            loss = losses.mean() if options.loss_reduction == "mean" else losses.sum()
        loss.backward()
        if len(targets):  # eager ops of torch refuse a batch of none here and there
            with torch.no_grad():
                own = model.loss(dp_model.module(**inputs), targets)
            own = own.mean() if options.loss_reduction == "mean" else own.sum()
            # in the fused form the loss of a sample is the mean over its views
            own = own / options.views if options.fused and options.loss_reduction == "sum" else own
            assert_close(loss.detach(), own, RTOL[own.dtype], "loss", 1.0)

    return step


def _check_step(module: nn.Module, dp_model: DPModule, truth: PerSampleGradients, options: Options) -> None:
    rtol = RTOL[next(module.parameters()).dtype]
    divisor = max(len(truth.norms), 1) if options.loss_reduction == "mean" else 1
    # a norm that is zero in theory is rounding noise: see assert_same_gradients
    floor = max(1e-3 * (truth.norms.max().item() if len(truth.norms) else 0.0), ZERO)
    unused = set(dp_model.plan.unused)
    for name, parameter in module.named_parameters():
        absent = not parameter.requires_grad or name in unused
        assert (parameter.grad is None) == absent, f"{name}.grad is {'missing' if not absent else 'there'}"
    # on paper; what is found is rounding where positions cancel
    most = 100 * torch.finfo(next(module.parameters()).dtype).eps ** 0.5
    if len(truth.norms) and truth.norms.max() < ZERO:
        assert dp_model.per_sample_norms.max() < most, "norms that are zero"
        return
    for group in dp_model.clipping.groups:
        own = PerSampleGradients({name: truth.grads[name] for name in group.parameters})
        found = dp_model.per_group_norms[group.name]
        if len(own.norms) and own.norms.max() < ZERO:
            assert found.max() < most, f"norms of {group.name} that are zero"
            continue
        assert_close(found, own.norms, rtol, f"norms of {group.name}", floor)
    assert_close(dp_model.per_sample_norms, truth.norms, rtol, "norms", ZERO)
    expected = {name: total / divisor for name, total in _clipped(dp_model, truth).items()}
    contribution = min(dp_model.max_grad_norm, truth.norms.max().item() if len(truth.norms) else 0.0) / divisor
    assert_same_gradients(gradients(module), expected, rtol, contribution)


def _clipped(dp_model: DPModule, truth: PerSampleGradients) -> dict[str, Tensor]:
    """The clipped sums of per-sample gradients by the model's own clip groups and bounds."""
    sums: dict[str, Tensor] = {}
    for group in dp_model.clipping.groups:
        own = PerSampleGradients({name: truth.grads[name] for name in group.parameters})
        sums |= own.clipped_sum(dp_model.max_grad_norms[group.name])
    return {name: sums[name] for name in truth.grads}


def _check_not_below(dp_model: DPModule, truth: PerSampleGradients) -> None:
    least = RTOL[next(dp_model.parameters()).dtype] * truth.norms
    for group in dp_model.clipping.groups:
        own = PerSampleGradients({name: truth.grads[name] for name in group.parameters})
        assert (dp_model.per_group_norms[group.name] >= own.norms - least).all(), f"norms of {group.name} are below"


def _certified(
    model: Model, module: nn.Module, dp_model: DPModule, options: Options, dtype: torch.dtype, sizes: Sequence[int]
) -> bool:
    """Whether norms are off by nothing but the bound on what rounding hides where positions cancel (certified.py).

    They are then not below the truth; and without that bound the same model agrees with it in every respect.
    """
    with without_bounds():
        bare = _compiled(model, module, options, dtype)
    try:
        _check_all(model, module, dp_model, options, dtype, sizes, not_below=True)
        _check_all(model, module, bare, options, dtype, sizes)
    except AssertionError:
        return False
    return True


def per_sample(
    model: Model, module: nn.Module, inputs: dict[str, Tensor], targets: Tensor, views: int, dtype: torch.dtype
) -> PerSampleGradients:
    """The truth: one row at a time by plain autograd, in `dtype`; a sample of several views is their mean."""
    module = copy.deepcopy(module).to(dtype)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in trained}
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for i in range(len(targets)):
        one = {n: x if model.batched[n] is None else x.narrow(model.batched[n] or 0, i, 1) for n, x in given.items()}
        value = model.loss(module(**one), targets[i : i + 1].to(dtype)).sum()
        if value.requires_grad:
            grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True, materialize_grads=True)
        else:
            grads = [torch.zeros_like(p) for p in trained.values()]
        for name, grad in zip(trained, grads, strict=True):
            rows[name].append(grad)
    empty = {name: p.new_zeros(0, *p.shape) for name, p in trained.items()}
    found = {name: torch.stack(row) if row else empty[name] for name, row in rows.items()}
    return PerSampleGradients({name: g.unflatten(0, (-1, views)).mean(1) if len(g) else g for name, g in found.items()})


def _rough(model: Model, dp_model: DPModule, options: Options) -> bool:
    """Whether float32 autograd, one sample at a time or all at once, is itself about as far off as is allowed."""
    try:
        assert_same_gradients(
            _whole(model, options, torch.float32), _whole(model, options, torch.float64), RTOL[torch.float32] / 4
        )
    except AssertionError:
        return True
    for size in (options.size, 1, options.size + 1):
        module = model.module()
        inputs, targets = model.batch(size * options.views, torch.float32)
        rough = per_sample(model, module, inputs, targets, options.views, torch.float32)
        truth = per_sample(model, module, inputs, targets, options.views, torch.float64)
        try:
            assert_close(rough.norms, truth.norms, RTOL[torch.float32] / 4, "norms")
            dp_model.max_grad_norm = truth.splitting_norm()
            assert_same_gradients(_clipped(dp_model, rough), _clipped(dp_model, truth), RTOL[torch.float32] / 4)
        except AssertionError:
            return True
    return False


def _whole(model: Model, options: Options, dtype: torch.dtype) -> dict[str, Tensor]:
    """Autograd's gradients over the whole batch."""
    module = model.module().to(dtype)
    inputs, targets = model.batch(options.size * options.views, dtype)
    losses = model.loss(module(**inputs), targets)
    (losses.mean() if options.loss_reduction == "mean" else losses.sum()).backward()
    return gradients(module)


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{label}: {error}") from None


def _refused(error: DPCompileError) -> Outcome:
    """A gap, counted by its reasons. A message has to name the module, the op, the line and the cure."""
    findings = error.findings if isinstance(error, (BatchMixingError, NoRuleError)) else ()
    if isinstance(error, InvalidGraphError):
        return Outcome("failed", _blank(f"InvalidGraphError: {error}".splitlines()[0]), str(error))
    if not findings or any(not (f.module and f.op and f.line and f.cure) for f in findings):
        return Outcome("failed", _blank(f"a refusal without module, op, line or cure: {error}"[:160]), str(error))
    return Outcome("refused", "; ".join(sorted({_blank(f"{f.op} {f.problem}") for f in findings})), str(error))


def _crash(where: str, error: Exception) -> Outcome:
    head = (str(error).strip().splitlines() or [""])[0]
    return Outcome("failed", _blank(f"{where}: {type(error).__name__}: {head}")[:160], traceback.format_exc())


def _blank(text: str) -> str:
    """Without numbers and names, so that like reasons count as one."""
    return re.sub(r"\b[a-z]\d+\b(\.\w+)*|\d+(\.\d+)?", "#", text)


# ---------------------------------------------------------------- smaller


def shrink(recipe: Recipe, failed: Outcome, seconds: float = 120.0) -> Recipe:
    """The smallest recipe found that fails in the same way: one step left out at a time, then options made plain."""
    until = time.monotonic() + seconds
    plain = asdict(Options())

    def same(smaller: Recipe) -> bool:
        return time.monotonic() < until and check(smaller) == failed

    for name in (f.name for f in fields(Options)):
        smaller = replace(recipe, changed=(*recipe.changed, (name, plain[name])))
        if asdict(recipe.options)[name] != plain[name] and same(smaller):
            recipe = smaller
    keep = tuple(range(len(steps_of(recipe.seed, recipe.longest)))) if recipe.keep is None else recipe.keep
    again = True
    while again:
        again = False
        for step in reversed(keep):
            smaller = replace(recipe, keep=tuple(k for k in keep if k != step))
            if same(smaller):
                recipe, keep, again = smaller, smaller.keep or (), True
    return recipe


# ---------------------------------------------------------------- many models


@dataclass
class Tally:
    """What came out of a range of seeds."""

    count: int = 0
    refused: dict[str, list[int]] = field(default_factory=dict)
    failed: list[tuple[Recipe, Outcome]] = field(default_factory=list)
    rough: list[int] = field(default_factory=list)

    def add(self, recipe: Recipe, outcome: Outcome) -> None:
        self.count += 1
        if outcome.kind == "failed":
            self.failed.append((recipe, outcome))
        elif outcome.kind == "refused":
            self.refused.setdefault(outcome.what, []).append(recipe.seed)
        elif outcome.kind == "rough":
            self.rough.append(recipe.seed)

    def __str__(self) -> str:
        refused = sum(map(len, self.refused.values()))
        lines = [
            f"{self.count} models: {len(self.failed)} failed, {refused} refused, {len(self.rough)} too rough in float32"
        ]
        for what, seeds in sorted(self.refused.items(), key=lambda item: -len(item[1])):
            lines.append(f"  refused {len(seeds)} times, first by seed {seeds[0]}: {what}")
        lines += [f"  failed: {outcome.what}\n    {recipe.command()}" for recipe, outcome in self.failed]
        return "\n".join(lines)


def run(recipe: Recipe) -> tuple[Recipe, Outcome]:
    """The outcome of a recipe; for a failure, that of the smallest recipe that fails alike."""
    torch.set_num_threads(1)
    outcome = check(recipe)
    if outcome.kind != "failed":
        return recipe, replace(outcome, detail="")
    smaller = shrink(recipe, outcome)
    return smaller, check(smaller)


def recipes(first: int, backend: str = "", longest: int = LONGEST) -> Iterator[Recipe]:
    while True:
        yield Recipe(first, longest=longest, changed=(("backend", backend),) if backend else ())
        first += 1


def run_for(seconds: float, first: int, jobs: int, backend: str = "") -> Tally:
    """As many seeds as the time allows."""
    until, tally = time.monotonic() + seconds, Tally()
    source = recipes(first, backend)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=200) as pool:
        running: dict[Future[tuple[Recipe, Outcome]], Recipe] = {}
        while running or time.monotonic() < until:
            while len(running) < jobs and time.monotonic() < until:
                recipe = next(source)
                running[pool.submit(run, recipe)] = recipe
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                recipe = running.pop(done)
                if done.exception() is not None:  # the process died
                    print(f"{recipe.command()}: {done.exception()}", flush=True)
                    raise SystemExit(1)
                tally.add(*done.result())
                _report(*done.result())
    print(f"seeds {first} to {first + tally.count - 1}", flush=True)
    return tally


def _report(recipe: Recipe, outcome: Outcome) -> None:
    if outcome.kind == "failed":
        print(f"FAILED {outcome.what}\n  {recipe.command()}", flush=True)


def _show(recipe: Recipe) -> Outcome:
    """One recipe with its source, as long as it is."""
    print(recipe.model.source)
    print(f"# {recipe.options}\n# steps: {', '.join(steps_of(recipe.seed, recipe.longest))}")
    outcome = check(recipe)
    print(f"# {outcome.kind} {outcome.what}\n{outcome.detail}")
    return outcome


def _options_from(text: str) -> tuple[tuple[str, Any], ...]:
    kinds = {f.name: type(getattr(Options(), f.name)) for f in fields(Options)}
    pairs = [part.split("=") for part in text.split(",") if part]
    return tuple((name, value == "True" if kinds[name] is bool else kinds[name](value)) for name, value in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="one model, with its source")
    parser.add_argument("--keep", help="which of its steps: 0,2 or none")
    parser.add_argument("--set", default="", help="options other than the drawn ones: views=1,fused=False")
    parser.add_argument("--longest", type=int, default=LONGEST, help="the most steps of a model")
    parser.add_argument("--together", type=int, default=1, help="how many models are compiled as one")
    parser.add_argument("--shrink", action="store_true", help="make a failing model smaller")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--from", dest="first", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--inductor", action="store_true", help="every model by torch.compile")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.seed is None:
        tally = run_for(60 * given.minutes, given.first, given.jobs, "inductor" if given.inductor else "")
        print(tally)
        return 1 if tally.failed else 0
    keep = None if given.keep is None else tuple(int(k) for k in given.keep.split(",") if k != "none")
    recipe = Recipe(given.seed, keep, given.longest, given.together, _options_from(given.set))
    if given.shrink:
        recipe, _ = run(recipe)
        print(recipe.command())
    return 1 if _show(recipe).kind == "failed" else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
