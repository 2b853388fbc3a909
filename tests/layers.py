"""One check for small modules: compiled in every norm method, against one sample at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from oracle import PerSampleGradients, assert_close, assert_same_gradients, gradients
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from zoo import Inputs, call

from dpcompile import certified, gram
from dpcompile.api import Analysis, prove
from dpcompile.emitted import Emitted
from dpcompile.ir import Program
from dpcompile.passes.choose_norms import choose_norms
from dpcompile.passes.compute_again import with_again
from dpcompile.plan import Choice, Method, Plan
from dpcompile.runtime import DPModule

RTOL = 1e-8
BATCH_SIZES = (3, 1, 4, 0)
CHUNKED = "chunked"  # ghost norms whose products and sums are cut into the smallest parts
AGAIN = "again"  # ghost norms, and a backward that is computed a second time for the clipped sums
METHODS = ("auto", "ghost", "explicit")
FORCED = (
    *METHODS,
    "forced-explicit",
    "forced-flash",
    CHUNKED,
)  # and explicit gradients that are dropped, and a kernel's
EVERY = ("ghost", "forced-explicit", "forced-kept")  # what grids of shapes go through
EVERY_FORM = (*EVERY, CHUNKED)  # of uses that have Gram matrices

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Compiled:
    """What a check leaves for further questions."""

    analysis: Analysis
    emitted: dict[str, Emitted]  # by norm method; methods that choose the same for every group share one

    @property
    def plan(self) -> Plan:
        return self.emitted["auto"].plan

    @property
    def rules(self) -> dict[str, str]:
        """Site name to the rule that took it."""
        return {site.name: site.rule for site in self.analysis.uses.sites}

    @property
    def spaces(self) -> dict[str, str]:
        return {group.name: group.space.value for group in self.analysis.uses.groups}


def loss_at(batch_dim: int) -> Loss:
    """A loss for each sample of an output with the batch at `batch_dim`; curved, so that samples differ everywhere."""

    def loss(out: Tensor) -> Tensor:
        flat = out.movedim(batch_dim, 0).reshape(
            out.shape[batch_dim], math.prod(out.shape) // max(out.shape[batch_dim], 1)
        )
        slope = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype) + 0.3
        return (slope * flat + 0.25 * flat.square()).sum(1)

    return loss


def folded_loss(positions: int) -> Loss:
    """The loss of an output in which the batch is folded with positions behind it: [B * positions, ...]."""
    return lambda out: loss_at(0)(out.unflatten(0, (-1, positions)))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and train mode, every parameter moved off the zeros and ones of its initialiser."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def compile_all(
    module: nn.Module,
    sample: Inputs,
    *,
    batched: Any = None,
    reduction: str = "sum",
    methods: tuple[str, ...] = METHODS,
) -> Compiled:
    """The module analysed once and emitted for every norm method (or for those named)."""
    analysis = prove(module, sample, batched=batched, loss_reduction=reduction).conclude()
    made: dict[tuple[Any, ...], Emitted] = {}
    emitted: dict[str, Emitted] = {}
    for name, plan in _plans(analysis).items():
        if name not in methods:
            continue
        key = (name == CHUNKED, plan.again, *(choice.method for choice in plan.choices.values()))
        if key not in made:
            program = _copied(analysis.backward.program)
            fresh = replace(analysis, backward=replace(analysis.backward, program=program))
            with _in_chunks(fresh) if name == CHUNKED else nullcontext(fresh) as fresh:
                made[key] = fresh.emit(plan, mean=reduction == "mean")
        emitted[name] = made[key]
    return Compiled(analysis, emitted)


@contextmanager
def _in_chunks(analysis: Analysis) -> Iterator[Analysis]:
    """What is emitted here cuts every sum of more than two terms; nothing of it is shared with other plans."""
    with mock.patch.object(gram, "BLOCK", 2), mock.patch.multiple(certified, SHORT=2, LONG=2, BESIDE=2):
        yield replace(analysis, memo={})


def _plans(analysis: Analysis) -> dict[str, Plan]:
    """Plans by policy, and with each method forced on every group that has it, as "ghost" does with Gram matrices."""
    auto = analysis.plan("auto")
    by_policy = {
        policy: choose_norms(
            analysis.program, analysis.uses, auto.costs, auto.device, policy=policy, batch_size=auto.batch_size
        )
        for policy in ("ghost", "explicit")
    }
    plans = {"auto": auto, "explicit": by_policy["explicit"]}
    for method in Method:
        plan = by_policy["ghost" if method is Method.GHOST else "explicit"]
        able = {group.name for group in plan.costs.groups if method in group.choices}
        choices = {name: Choice(method, "forced") if name in able else old for name, old in plan.choices.items()}
        plans["ghost" if method is Method.GHOST else f"forced-{method.value}"] = replace(plan, choices=choices)
    return plans | {CHUNKED: plans["ghost"], AGAIN: all_again(analysis, plans["ghost"])}


def all_again(analysis: Analysis, plan: Plan) -> Plan:
    """The plan with all of the backward computed a second time that its clipped sums need."""
    ops = [name for segment in analysis.schedule(analysis.costs()).segments for _, name in segment.ops]
    return with_again(replace(plan, again=tuple(ops)), analysis._readers(analysis.backward), analysis.backward.program)


def _copied(program: Program) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    return replace(program, module=fx.GraphModule(program.module, graph))


def check_module(
    module: nn.Module,
    sample: Inputs,
    *,
    batched: Any = None,
    loss: Loss | None = None,
    reduction: str = "sum",
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    methods: tuple[str, ...] = METHODS,
    backend: str | None = None,
) -> Compiled:
    """Norms and clipped gradients of every norm method equal the oracle's; with an infinite bound, plain autograd's.

    The sample's tensors say which shapes and types later batches have; integers and booleans are drawn from its values.
    """
    module = randomised(module)
    sample = pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, sample)
    loss = loss or loss_at(0)
    compiled = compile_all(module, sample, batched=batched, reduction=reduction, methods=methods)
    for batch_size in batch_sizes:
        inputs = draw(compiled.analysis, sample, batch_size)
        truth = per_sample(module, compiled.analysis, inputs, loss, batch_size)
        for name, emitted in {id(e): (n, e) for n, e in compiled.emitted.items()}.values():
            bounds = (truth.splitting_norm(), float("inf")) if batch_size else (1.0,)
            for bound in bounds[:1] if backend else bounds:  # what a compiler makes does not depend on it
                label = f"{name}, B={batch_size}, R={bound}"
                _check_step(module, emitted, inputs, loss, reduction, truth, bound, label, backend)
        if batch_size:
            _check_autograd(module, inputs, loss, truth)
    return compiled


def draw(analysis: Analysis, sample: Inputs, batch_size: int, seed: int = 0) -> Inputs:
    """Inputs like the sample, with another batch size and other values."""
    generator = torch.Generator().manual_seed(seed)

    def one(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = batch_size
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=tensor.dtype)
        picked = torch.randint(tensor.numel(), shape, generator=generator)
        return tensor.flatten()[picked]

    flat, spec = pytree.tree_flatten(sample)
    dims = [leaf.batch_dim for leaf in analysis.call.leaves]
    return pytree.tree_unflatten([one(x, dim) for x, dim in zip(flat, dims, strict=True)], spec)


def per_sample(
    module: nn.Module, analysis: Analysis, inputs: Inputs, loss: Loss, batch_size: int
) -> PerSampleGradients:
    """Gradients of one sample at a time, by plain autograd."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows: Mapping[str, list[Tensor]] = {name: [] for name in parameters}
    flat, spec = pytree.tree_flatten(inputs)
    dims = [leaf.batch_dim for leaf in analysis.call.leaves]
    for i in range(batch_size):
        parts = [x if dim is None else x.narrow(dim, i, 1) for x, dim in zip(flat, dims, strict=True)]
        value = loss(call(module, pytree.tree_unflatten(parts, spec)))
        assert value.shape == (1,)
        grads = torch.autograd.grad(value.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            rows[name].append(grad)
    empty = {name: p.new_zeros(0, *p.shape) for name, p in parameters.items()}
    return PerSampleGradients({name: torch.stack(row) if row else empty[name] for name, row in rows.items()})


def step(
    module: nn.Module,
    emitted: Emitted,
    inputs: Inputs,
    loss: Loss,
    reduction: str = "sum",
    bound: float = 1.0,
    backend: str | None = None,
) -> DPModule:
    """One backward of the compiled module from cleared gradients, eager or by torch.compile with that backend."""
    dp_model = DPModule(module, emitted)
    dp_model.max_grad_norm = bound
    module.zero_grad()
    run: Any = torch.compile(dp_model, fullgraph=True, backend=backend) if backend else dp_model
    losses_B = loss(call(run, inputs))
    (losses_B.mean() if reduction == "mean" else losses_B.sum()).backward()
    return dp_model


def _check_step(
    module: nn.Module,
    emitted: Emitted,
    inputs: Inputs,
    loss: Loss,
    reduction: str,
    truth: PerSampleGradients,
    bound: float,
    label: str,
    backend: str | None,
) -> None:
    dp_model = step(module, emitted, inputs, loss, reduction, bound, backend)
    divisor = max(len(truth.norms), 1) if reduction == "mean" else 1
    expected = {name: g / divisor for name, g in truth.clipped_sum(bound).items()}
    try:
        assert_close(dp_model.per_sample_norms, truth.norms, RTOL, "per_sample_norms")
        assert_same_gradients(gradients(module), expected, RTOL)
    except AssertionError as error:
        raise AssertionError(f"{label}: {error}") from None
    unused = set(emitted.plan.unused)
    for name, parameter in module.named_parameters():
        absent = not parameter.requires_grad or name in unused
        assert (parameter.grad is None) == absent, f"{label}: {name}.grad is {parameter.grad}"


def _check_autograd(module: nn.Module, inputs: Inputs, loss: Loss, truth: PerSampleGradients) -> None:
    """The samples of the module do not influence each other: the oracle adds up to autograd over the whole batch."""
    module.zero_grad()
    loss(call(module, inputs)).sum().backward()
    assert_same_gradients(gradients(module), truth.clipped_sum(float("inf")), RTOL)


class Apply(nn.Module):
    """A module in one line: `Apply(lambda m, x: x * m.scale, scale=(4,))` has a parameter of shape [4]."""

    def __init__(self, function: Callable[..., Any], *, modules: Mapping[str, nn.Module] | None = None, **shapes: Any):
        super().__init__()
        self._function = function
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        for name, module in (modules or {}).items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


class TiedLanguageModel(nn.Module):
    """Token ids below 6 to scores of the next token, by one table for both."""

    def __init__(self, *, padding: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=padding)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(ids)).tanh())


class LoRA(nn.Module):
    """A frozen linear with a trainable low-rank path beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down = nn.Linear(4, 2, bias=False)
        self.up = nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))
