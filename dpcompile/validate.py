"""The second line of defence: the emitted graph is run on two samples and compared with autograd on each alone.

The proof is made by rules, and a rule can be wrong. What is looked at here is the result, so a mismatch is a bug of
ours whatever its cause.
"""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpcompile import records
from dpcompile.calls import CallSpec
from dpcompile.emitted import Emitted
from dpcompile.errors import InvalidGraphError
from dpcompile.ir import OutputKind
from dpcompile.runtime import DPModule

BELOW = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far below the truth a norm may be, by what rounding does to two ways of computing it; other types: 5 %."""
ABOVE = 0.05
"""How far above: certified norms over-estimate, by percents in long sequences."""
APART, FLOOR = 0.05, 1e-4
"""How far a parameter's clipped sum may be off, relative to its own size and to that of all: what rounding does to
gradients where it moves a sample over the edge of a ReLU, and to those that are zero on paper."""
NARROW = 5.0
"""How many times that in types narrower than float32."""
COMPARED = "norms and clipped sums of two samples"


def nearby(values: Tensor, noise: Tensor) -> Tensor:
    """The sample's floating-point data, so spread that equal rows differ."""
    return values * (1 + 0.1 * noise)


def scattered(values: Tensor, noise: Tensor) -> Tensor:
    """With factors around zero: positions that cancel, whose norm is over-estimated by any factor, do not any more."""
    return values * noise


def unrelated(_values: Tensor, noise: Tensor) -> Tensor:
    """Numbers of ordinary size, where those of the sample are too large for their squares."""
    return noise


DATA = (nearby, scattered, unrelated)
"""What is tried in turn. A wrong rule is wrong for all of them."""

NOTHING = 1e-15
"""A norm that is zero may be found to be so much: the bound on what underflow hides."""
VANISHING, VANISHED = 1e-13, 100.0
"""Norms below the first, relative to those gradients, are zero on paper, and may be so many roots of epsilon."""

LossFn = Callable[..., Tensor] | None


def check_step(
    dp_model: DPModule, leaves: Sequence[Any], loss_fn: LossFn, bare: Callable[[], Emitted] | None = None
) -> str:
    """Compare a step of two samples like those of `leaves`. Returns what was compared, or why nothing could be.

    Norms are compared with those of autograd's gradients, clipped sums with those gradients, scaled by the factors of
    the norms that the graph found.

    Norms that are above for all data, and nowhere below, may be so by the bound on rounding where positions cancel:
    `bare` emits them without it, and they are compared again.

    Gradients, buffers, attributes and flags of modules, norms and torch's generators are left as they were.

    Raises:
        InvalidGraphError: they disagree for all data that are tried; has what is needed to report it.
    """
    call = dp_model._emitted.call
    if call.batch_size_of(list(leaves)) == 0:
        return "nothing: the sample is empty"
    generator = torch.Generator().manual_seed(0)
    mismatch, above = "", False
    with _undone(dp_model):
        for data in DATA:
            two = _two(call, leaves, data, generator)
            try:
                probe = _compare(dp_model, two, loss_fn, generator)
            except _Incomparable as reason:
                return f"nothing: {reason}"
            if _agree(dp_model, probe):
                if not probe.apart:
                    return COMPARED
                mismatch, above = f"the clipped sum of {probe.apart} is not that of autograd's gradients", False
                continue
            if _is_rounding(dp_model, two, loss_fn, probe):
                return COMPARED
            above = bool((probe.found >= probe.truth).all())
            mismatch = (
                f"per-sample norms are {probe.found.tolist()} by the emitted graph, {probe.truth.tolist()} by autograd "
                "on each sample alone"
            )
    if above and bare is not None:
        return check_step(DPModule(dp_model.module, bare()), leaves, loss_fn)
    raise InvalidGraphError(
        f"validate: the emitted step and autograd disagree: {mismatch}. This is a bug of dpcompile: please report it "
        f"with the model, {_facts(dp_model)} "
        "dpcompile(..., validate='off') compiles all the same; do not train privately with it."
    )


_Parts = list[list[Tensor]]
"""The gradients of each sample's outputs."""


@dataclass(frozen=True)
class _Probe:
    """One step of two samples, twice."""

    found: Tensor  # [2] norms by the emitted graph
    truth: Tensor  # [2] by autograd on one sample at a time
    parts: _Parts  # the gradients that both started from
    apart: str  # the first parameter whose clipped sum is another; empty where none is


class _Incomparable(Exception):  # noqa: N818  (an answer, not an error)
    pass


def _agree(dp_model: DPModule, probe: _Probe) -> bool:
    """Whether the norms are the same."""
    found, truth = probe.found, probe.truth
    below = max(BELOW.get(p.dtype, ABOVE) for p in dp_model.parameters() if p.requires_grad)
    least = 1e-6 * truth.max().clamp(min=1e-30)
    return bool(((found >= truth * (1 - below) - least) & (found <= truth * (1 + ABOVE) + least + NOTHING)).all())


def _is_rounding(dp_model: DPModule, leaves: list[Any], loss_fn: LossFn, probe: _Probe) -> bool:
    """Whether the gradients are zero on paper, and what is found is what rounding can be where positions cancel.

    In float32 it cannot be seen that they are: a copy of the model in float64 tells.
    """
    started = max(t.double().norm().item() for part in probe.parts for t in part)
    exact = _exact(dp_model, leaves, loss_fn, probe.parts)
    narrowest = max(torch.finfo(p.dtype).eps for p in dp_model.parameters() if p.requires_grad)
    vanish = (probe.truth if exact is None else exact).max() <= VANISHING * started
    return bool(vanish and (probe.found <= VANISHED * narrowest**0.5 * started).all())


def _exact(dp_model: DPModule, leaves: list[Any], loss_fn: LossFn, parts: _Parts) -> Tensor | None:
    """[2] norms by autograd on one sample at a time, of a copy of the model in float64; None where that is another."""
    if _draws(dp_model) or dp_model._emitted.penalty is not None:
        return None  # another type draws other numbers; the penalty is one on the model's own parameters
    model = copy.deepcopy(dp_model.module).double()
    wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in leaves]
    try:
        return _norms(dp_model, _alone(dp_model, model, wide, loss_fn, parts))
    except (_Incomparable, RuntimeError):  # a model that names its types is not to be had in another
        return None


def _two(
    call: CallSpec, leaves: Sequence[Any], data: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator
) -> list[Any]:
    """Leaves of two samples, with other floating-point data."""
    made = []
    for spec, value in zip(call.leaves, leaves, strict=True):
        if spec.batch_dim is None:
            made.append(value)
            continue
        rows = [min(i, value.shape[spec.batch_dim] - 1) for i in range(2 * call.views)]
        chosen = value.detach().index_select(spec.batch_dim, torch.tensor(rows, device=value.device))
        if chosen.is_floating_point():
            chosen = data(chosen, torch.randn(chosen.shape, generator=generator).to(chosen))
        made.append(chosen)
    return made


def _one(call: CallSpec, leaves: Sequence[Any], i: int) -> list[Any]:
    return [
        value if spec.batch_dim is None else value.narrow(spec.batch_dim, i * call.views, call.views)
        for spec, value in zip(call.leaves, leaves, strict=True)
    ]


_Gradients = list[list[Tensor]]
"""Those of each sample's parameters, in their order."""


def _compare(dp_model: DPModule, leaves: list[Any], loss_fn: LossFn, generator: torch.Generator) -> _Probe:
    """A step of the emitted graph, and the same by autograd on one sample at a time."""
    call, model = dp_model._emitted.call, dp_model.module
    ones = [_one(call, leaves, i) for i in range(2)]
    if not _draws(dp_model):
        buffers = list(model.buffers())
        versions, own = [b._version for b in buffers], []
        for one in ones:
            with _buffers_put_back(model):
                own.append(_plain(dp_model, model, one, loss_fn))
        moved = versions != [b._version for b in buffers]
        with _buffers_put_back(model):
            whole = _private(dp_model, leaves)
            tangents = [_tangent(a, b, c, generator) for a, b, c in zip(whole, own[0], own[1], strict=True)]
            sums = _gradients(model, whole, tangents)
        parts = [[_part(t, o, i) for t, o in zip(tangents, own[i], strict=True)] for i in range(2)]
        if moved:  # what autograd holds of the first time may be read no more
            truths = _alone(dp_model, model, leaves, loss_fn, parts)
        else:
            truths = [_gradients(model, own[i], parts[i]) for i in range(2)]
        return _Probe(_found(dp_model), _norms(dp_model, truths), parts, _apart(dp_model, sums, truths))
    probes = []
    for i, one in enumerate(ones):  # alone, so that both draw the same random numbers
        torch.manual_seed(i)
        with _buffers_put_back(model):
            whole = _private(dp_model, one)
            fused = dp_model._emitted.backward is None  # its norms are those of the loss itself
            tangents = [torch.ones_like(o) if fused else torch.randn(o.shape, generator=generator).to(o) for o in whole]
            sums = _gradients(model, whole, tangents)
        torch.manual_seed(i)
        with _buffers_put_back(model):
            own = _plain(dp_model, model, one, loss_fn)
            if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(whole, own, strict=True)):
                raise _Incomparable("the model draws random numbers in another order than the graph")
            truths = [_gradients(model, own, tangents)]
        apart = _apart(dp_model, sums, truths)
        probes.append(_Probe(_found(dp_model), _norms(dp_model, truths), [tangents], apart))
    first, second = probes
    return _Probe(
        torch.cat([first.found, second.found]),
        torch.cat([first.truth, second.truth]),
        [*first.parts, *second.parts],
        first.apart or second.apart,
    )


def _alone(dp_model: DPModule, model: nn.Module, leaves: list[Any], loss_fn: LossFn, parts: _Parts) -> _Gradients:
    """Gradients by autograd on one sample at a time, in the type of `model`."""
    found = []
    for i, part in enumerate(parts):
        with _buffers_put_back(model):
            own = _plain(dp_model, model, _one(dp_model._emitted.call, leaves, i), loss_fn)
            found.append(_gradients(model, own, [t.to(o) for t, o in zip(part, own, strict=True)]))
    return found


def _norms(dp_model: DPModule, truths: _Gradients) -> Tensor:
    """[number of samples] norms of what the emitted graph calls a sample's gradient."""
    norms = [torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gs]).norm() for gs in truths]
    samples = len(truths) if _mean_is_taken_back(dp_model) else 1
    return torch.stack(norms) * samples * _per_view(dp_model)


def _apart(dp_model: DPModule, sums: list[Tensor], truths: _Gradients) -> str:
    """The first parameter whose clipped sum is not that of `truths`, scaled by the factors of the recorded norms."""
    emitted, clipping = dp_model._emitted, dp_model.clipping
    scale = _per_view(dp_model) / (len(truths) if emitted.backward is None and emitted.mean else 1)
    norms, bounds = dp_model.per_group_norms, dp_model.max_grad_norms
    factors = {
        name: (clipping.factor(norms[group.name].double(), norms[group.name].new_tensor(group_bound)) * scale).tolist()
        for group, group_bound in zip(clipping.groups, bounds.values(), strict=True)
        for name in group.parameters
    }
    names = [name for name, p in dp_model.module.named_parameters() if p.requires_grad]
    errors, sizes = [], []
    for name, total, *parts in zip(names, sums, *truths, strict=True):
        scaled = [part * factor for part, factor in zip(parts, factors[name], strict=True)]
        errors.append(torch.linalg.vector_norm(total - sum(scaled), dtype=torch.float64))
        sizes.append(sum(torch.linalg.vector_norm(part, dtype=torch.float64) for part in scaled))
    error, size = torch.stack(errors), torch.stack(sizes)
    times = NARROW if any(torch.finfo(p.dtype).bits < 32 for p in dp_model.parameters() if p.requires_grad) else 1.0
    off = error > times * (APART * size + FLOOR * size.norm()) + NOTHING
    return next((name for name, is_off in zip(names, off.tolist(), strict=True) if is_off), "")


def _draws(dp_model: DPModule) -> bool:
    """Whether the graph has random numbers in it."""
    nodes = dp_model._emitted.forward.graph.nodes
    return any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in nodes)


def _mean_is_taken_back(dp_model: DPModule) -> bool:
    return dp_model._emitted.backward is not None and dp_model._emitted.mean


def _per_view(dp_model: DPModule) -> float:
    views = dp_model._emitted.call.views
    return 1.0 if dp_model._emitted.backward is None or dp_model._emitted.mean else 1.0 / views


def _private(dp_model: DPModule, leaves: list[Any]) -> list[Tensor]:
    """The results of the emitted graph that have gradients: floating-point outputs, or the loss."""
    args, kwargs, targets = dp_model._emitted.call.unflatten(leaves)
    if dp_model._emitted.backward is None:
        return [_without_penalty(dp_model, dp_model(*args, **kwargs, targets=targets))]
    return _floats(dp_model, dp_model(*args, **kwargs))


def _plain(dp_model: DPModule, model: nn.Module, leaves: list[Any], loss_fn: LossFn) -> list[Tensor]:
    """The same by the model itself on one sample; the loss is that of its views together."""
    args, kwargs, targets = dp_model._emitted.call.unflatten(leaves)
    try:
        outputs = model(*args, **kwargs)
        if loss_fn is None:
            return _floats(dp_model, outputs)
        loss = _without_penalty(dp_model, loss_fn(outputs, targets))
    except Exception as error:  # of the user's code, which was never called with one sample before
        raise _Incomparable(f"the model fails on one sample alone ({type(error).__name__}: {error})") from error
    mean = dp_model._emitted.mean or loss.dim()
    return [loss.mean() if mean else loss / dp_model._emitted.call.views]


def _without_penalty(dp_model: DPModule, loss: Tensor) -> Tensor:
    """What samples contribute to the loss: a penalty on the parameters is in no sample's gradient."""
    penalty = dp_model._emitted.penalty
    return loss if penalty is None else loss - dp_model._penalty(penalty)


def _floats(dp_model: DPModule, outputs: Any) -> list[Tensor]:
    flat = pytree.tree_leaves(outputs)
    kinds = [o for o in dp_model._emitted.own if o.kind is OutputKind.USER]
    if len(flat) != len(kinds):
        raise _Incomparable("the model gives other outputs for one sample")
    return [value for value, kind in zip(flat, kinds, strict=True) if isinstance(value, Tensor) and kind.wants_gradient]


def _tangent(whole: Tensor, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """A random gradient of an output of two samples; zero where it does not show which half is whose."""
    if whole.dim() == 0:
        return torch.ones_like(whole)
    if _axis(whole, first) is None or first.shape != second.shape:
        return torch.zeros_like(whole)
    return torch.randn(whole.shape, generator=generator).to(whole)


def _axis(whole: Tensor, one: Tensor) -> int | None:
    """The dimension in which two samples are twice as large as one."""
    if whole.dim() != one.dim():
        return None
    differ = [i for i, (a, b) in enumerate(zip(whole.shape, one.shape, strict=True)) if a != b]
    return differ[0] if len(differ) == 1 and whole.shape[differ[0]] == 2 * one.shape[differ[0]] else None


def _part(tangent: Tensor, one: Tensor, i: int) -> Tensor:
    """What the gradient of both samples' output is for sample i."""
    if tangent.dim() == 0:
        return tangent
    axis = _axis(tangent, one)
    return torch.zeros_like(one) if axis is None else tangent.narrow(axis, i * one.shape[axis], one.shape[axis])


def _found(dp_model: DPModule) -> Tensor:
    """[B] norms that the last backward of the emitted graph has recorded."""
    return dp_model.per_sample_norms.double()


def _gradients(model: nn.Module, results: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """Those of the trainable parameters. None is accumulated."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    pairs = [(r, t) for r, t in zip(results, tangents, strict=True) if r.requires_grad]
    if not pairs:
        raise _Incomparable("no output depends on a trainable parameter")
    roots, grads = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, trainable, grads, allow_unused=True, materialize_grads=True))


@contextlib.contextmanager
def _undone(dp_model: DPModule) -> Iterator[None]:
    """In the modes that the model was captured in, with everything that a step changes put back behind it."""
    flag, attributes = dp_model.training, {module: dict(module.__dict__) for module in dp_model.module.modules()}
    devices = sorted({p.device.index or 0 for p in dp_model.parameters() if p.device.type == "cuda"})
    if not dp_model.module.training:
        dp_model.module.train()
    dp_model.training = True
    try:
        with _buffers_put_back(dp_model.module), torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        dp_model.training = flag
        for module, own in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(own)
        records.clear(dp_model._handle)


@contextlib.contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    """A forward and its backward: the next one starts where this did, as a power iteration moves its vectors."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _facts(dp_model: DPModule) -> str:
    call = dp_model._emitted.call
    choices = ", ".join(f"{name}: {choice.method.value}" for name, choice in dp_model.plan.choices.items())
    return (
        f"the sample ({call.describe()}), torch {torch.__version__}, Python {platform.python_version()} and the "
        f"choices ({choices})."
    )
