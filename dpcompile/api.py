"""`dpcompile(model, sample_input)`: the whole road, stage by stage. The only file that imports passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dpcompile import collector, steptime
from dpcompile.budget import Schedule
from dpcompile.calls import CallSpec, bind_sample, sample_values
from dpcompile.clipping import Clipping, clipping_of
from dpcompile.device import DeviceSpec, spec_for
from dpcompile.emitted import Emitted
from dpcompile.errors import CaptureError, DPCompileError
from dpcompile.inline import Memo
from dpcompile.ir import Backward, Draft, OutputKind, Program, Tracked, Uses
from dpcompile.kernels import available
from dpcompile.lengths import proven
from dpcompile.passes.capture import Captured, capture
from dpcompile.passes.check_supported import check_supported
from dpcompile.passes.choose_norms import POLICIES, choose_norms, modelled
from dpcompile.passes.combine import GroupReader
from dpcompile.passes.compute_again import compute_again, with_again
from dpcompile.passes.drop_tangents import drop_tangents
from dpcompile.passes.estimate_costs import estimate_costs
from dpcompile.passes.find_sites import find_sites
from dpcompile.passes.fix_batch import fix_batch
from dpcompile.passes.follow_memory import follow_memory, peak_when_compiled
from dpcompile.passes.fuse_group_norms import fuse_group_norms
from dpcompile.passes.fuse_products import fuse_products
from dpcompile.passes.insert_norms import insert_norms
from dpcompile.passes.keep_layouts import keep_layouts
from dpcompile.passes.mark_numbers import mark_numbers
from dpcompile.passes.mark_overwrites import mark_overwrites
from dpcompile.passes.measure_sites import candidates, measure_sites
from dpcompile.passes.normalise import normalise
from dpcompile.passes.part_gradients import part_gradients
from dpcompile.passes.penalty import penalty
from dpcompile.passes.pool_by_rows import pool_by_rows
from dpcompile.passes.recompute_pointwise import recompute_pointwise
from dpcompile.passes.reweight_gradients import reweight_gradients
from dpcompile.passes.rewrite import Order, Rewrite, rewrite
from dpcompile.passes.scale_in_place import scale_in_place
from dpcompile.passes.share_grams import share_grams
from dpcompile.passes.spare_masks import spare_masks
from dpcompile.passes.split import split, split_sums
from dpcompile.passes.tidy import tidy
from dpcompile.passes.trace_backward import loss_scale, trace_backward
from dpcompile.passes.track_batch import track_batch
from dpcompile.plan import Costs, Method, Plan, Times
from dpcompile.rounding import without_bounds
from dpcompile.runtime import NONFINITE, DPModule
from dpcompile.tuning import Tuner
from dpcompile.units import bytes_of
from dpcompile.validate import check_step
from dpcompile.verify import verify

VALIDATE = ("probe", "off")
REWRITES: tuple[Rewrite, ...] = (
    insert_norms,  # reads the tensors of every site: before tidy drops what nothing reads yet
    reweight_gradients,  # needs the clip factors
    compute_again,  # among the sums
    tidy,
    share_grams,  # of factors that tidy has made one
    part_gradients,  # that tidy has made one
    spare_masks,  # of the marks that tidy has merged
    fuse_products,  # that tidy has left apart
    fuse_group_norms,  # with sums that fuse_products has written
    keep_layouts,
    pool_by_rows,
    scale_in_place,  # when the order of ops is settled
)
"""What is written behind the traced backward, in order; the verifier runs behind each."""


def dpcompile(
    model: nn.Module,
    sample_input: Any,
    *,
    max_grad_norm: float = 1.0,
    norm_method: str = "auto",
    loss_reduction: str = "mean",
    batched: Any = None,
    dynamic: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    sample_targets: Any = None,
    clipping: str = "abadi",
    clip_groups: str | Sequence[str] | Mapping[str, float | None] = "flat",
    views: int = 1,
    nonfinite: str = "zero",
    memory_budget: float | str | None = None,
    tune: bool = False,
    validate: str = "probe",
) -> DPModule:
    """A module with the model's parameters, call and outputs, whose backward leaves clipped gradients.

    After `loss.backward()`, p.grad = sum_i min(1, R / ||g_i||) g_i over all trainable parameters jointly, times 1/B
    with `loss_reduction="mean"` (DP-SGD, Abadi et al. 2016; computed by Book-Keeping, arXiv:2210.00038).

    Args:
        model: any module that torch.export can follow.
        sample_input: what the model is called with: a tensor, a tuple (positional) or a dict (keyword). Dim 0 of each
            tensor is the batch. Other sizes are fixed by it, unless `dynamic` frees them.
        max_grad_norm: R, the largest norm of one sample's contribution; float("inf") clips nothing.
        norm_method: "auto", "ghost" or "explicit" per-sample norms; "paper" is the rule 2 T^2 < p d.
        loss_reduction: how the caller's loss reduces over samples: "mean" or "sum".
        batched: where the batch lies if dim 0 of every tensor is not the answer: {"mask": None, "x": 1}, a collection
            of the names that carry one, or a sequence in the order of the arguments.
        dynamic: other dimensions whose size may differ from call to call, as lengths of sequences do:
            {"input_ids": [1]}, or {"input_ids": {1: torch.export.Dim("T", max=1024)}}, or a sequence in the order of
            the arguments; targets go by the name "targets". What depends on a size is chosen at the sample's.
            False: the batch size is fixed as well, to the sample's; pad batches to it (`make_private(pad=True)`).
        loss_fn: `f(outputs, targets)` giving per-sample losses [B] (or their sum or mean). Then
            `dp_model(x, targets=y)` gives the loss, and forward, backward, norms and clipping are one graph. A term
            of the parameters alone (a penalty) that is added to the sum or mean is not clipped: its gradient is added
            as it is, by `make_private` once in each step. Added to per-sample losses it is part of every sample.
        sample_targets: targets of the sample, for `loss_fn`.
        clipping: the clip factor of a gradient of norm n: "abadi" min(1, R/n), "auto-s" R/(n + 0.01), "auto-v" or
            "normalise" R/n, "psac" R/(n + r/(n + r)) with r = 0.01. All bound the contribution by R.
        clip_groups: which parameters share a norm: "flat" all; "per-layer" those of one module; or name patterns, or
            a dict of pattern to bound. A group without a bound gets R / sqrt(number of groups).
        views: K rows of the batch, one after another, are views of one sample (or records of one user): its gradient
            is the mean over them, clipped as one (augmentation multiplicity, De et al. 2022). The model is called
            with B K rows, `per_sample_norms` is [B].
        nonfinite: a sample whose gradient is NaN or infinite adds nothing to the sum and is counted in
            `nonfinite_samples` ("zero", which keeps the sensitivity), or stops the backward ("raise").
        memory_budget: most bytes that a step may need at its peak, above what is there between steps, as the plan
            predicts it: a factor of plain training's peak if below 100, else bytes, or a text such as "24GB". The
            fastest norm methods within it are chosen. None: 1.1, of which 0.04 are left to what no graph shows, as
            workspace of kernels; or what the least plan needs if that is more. It holds of an estimate of the compiled
            step too, unless that takes more than 5 % of an eager step's time. Without `loss_fn` the loss lies outside
            of the graph: what cross-entropy would need is counted.
        tune: time the norm methods that are near the best by the cost model, each at the site's own sizes and on the
            model's device, and choose by that. Times are kept on disk (dpcompile/tuning.py) and used again.
        validate: "probe" runs the emitted graph on two samples like the first of `sample_input` and compares their
            norms, and their clipped sum parameter by parameter, with autograd on each alone; "off" does not.

    Raises:
        BatchMixingError: samples influence each other; every place is named.
        NoRuleError: an op is not known to be per-sample.
        CaptureError: torch.export cannot capture the model, or the sample does not fit it.
        DPCompileError: no plan fits the memory budget; says what would.
        InvalidGraphError: the probe found norms or sums that disagree; a bug of dpcompile.
        ValueError: an argument out of its range.
    """
    _check_arguments(model, max_grad_norm, norm_method, loss_reduction, loss_fn, sample_targets, views)
    if validate not in VALIDATE:
        raise ValueError(f"Expected validate={validate!r} to be one of {', '.join(VALIDATE)}.")
    if nonfinite not in NONFINITE:
        raise ValueError(f"Expected nonfinite={nonfinite!r} to be one of {', '.join(NONFINITE)}.")
    budget = _budget(memory_budget, norm_method)
    _check_parameters(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    clip = clipping_of(trainable, max_grad_norm, clipping, clip_groups)
    analysis = prove(
        model,
        sample_input,
        batched=batched,
        dynamic=dynamic,
        loss_fn=loss_fn,
        sample_targets=sample_targets,
        loss_reduction=loss_reduction,
        views=views,
    ).conclude()
    plan = analysis.plan(norm_method, clipping=clip, memory_budget=budget, tune=tune)
    emitted = analysis.emit(plan, clip, mean=loss_reduction == "mean")
    dp_model = DPModule(model, emitted, nonfinite)
    if validate == "probe":
        bare = partial(analysis.without_bounds, plan, clip, mean=loss_reduction == "mean")
        dp_model.validated = check_step(dp_model, sample_values(sample_input, sample_targets), loss_fn, bare)
    if dynamic is False:
        validated, dp_model = dp_model.validated, DPModule(model, fix_batch(emitted), nonfinite)
        dp_model.validated = validated
    return dp_model


@dataclass(frozen=True)
class Analysis:
    """What is known of a model before any choice is made."""

    call: CallSpec
    captured: Captured
    program: Program  # captured, normalised
    tracked: Tracked
    uses: Uses
    backward: Backward
    fused: bool
    trainable: tuple[str, ...]
    memo: Memo = field(default_factory=dict, compare=False, repr=False)  # what is written for every plan alike

    def plan(
        self,
        policy: str = "auto",
        *,
        device: DeviceSpec | None = None,
        batch_size: int | None = None,
        clipping: Clipping | None = None,
        memory_budget: float | None = None,
        tune: bool = False,
    ) -> Plan:
        costs = self.costs()
        device = device or spec_for(self.call.device)
        size = batch_size or max(self.call.batch_size, 1)
        times = {group.name: modelled(group, device, size) for group in costs.groups}
        measured = self.measured(candidates(costs, times, size), size) if tune else None
        schedule = self.schedule(costs, clipping)
        plan = choose_norms(
            self.program,
            self.uses,
            costs,
            device,
            policy=policy,
            batch_size=size,
            clipping=clipping,
            schedule=schedule,
            budget=memory_budget,
            measured=measured,
            again=partial(self._seconds_again, schedule, device, size),
            rest=partial(steptime.seconds, self.backward.program, device, size),
            written=partial(self._peak_when_compiled, clipping) if self.fused else None,
        )
        plan = with_again(plan, self._readers(self.backward), self.backward.program)
        sizes = (size.node.hint for size in self.program.lengths)
        lengths = dict(zip((length.name for length in self.call.lengths), sizes, strict=True))
        return replace(plan, checkpointed=self.captured.checkpointed, lengths=lengths)

    def _peak_when_compiled(self, clipping: Clipping | None, plan: Plan) -> float:
        """By the emitted graph, which the plan's gradients and recomputed values are in."""
        plan = with_again(plan, self._readers(self.backward), self.backward.program)
        emitted = self.emit(plan, clipping)
        return peak_when_compiled(emitted.compiled, emitted.sums, plan.batch_size)

    def with_least(self, plan: Plan) -> Plan:
        """The plan with the lowest peak that any plan has, at its batch size."""
        assert plan.memory is not None
        options = {group.name: dict.fromkeys(group.choices, 0.0) for group in plan.costs.groups}
        least = self.schedule(plan.costs).least(options, plan.batch_size, again=True).peak
        return replace(plan, memory=replace(plan.memory, least=min(least, plan.memory.peak)))

    def _seconds_again(self, schedule: Schedule, device: DeviceSpec, batch_size: int) -> list[float]:
        """What each segment of the backward takes if it is computed again."""
        own = {node.name: s for node, s in steptime.times(self.backward.program, device, batch_size).items()}
        return [sum(own[name] for _, name in segment.ops) for segment in schedule.segments]

    def costs(self) -> Costs:
        """Of every group of uses, by method."""
        return estimate_costs(self.backward, self._readers(self.backward), kernels=available(self.call.device))

    def measured(self, methods: Mapping[str, Sequence[Method]], batch_size: int) -> Times:
        """Seconds that norm and clipped sum of groups take by methods, on the model's device."""
        return measure_sites(self._readers(self.backward), methods, batch_size, Tuner(self.call.device))

    def schedule(self, costs: Costs | None = None, clipping: Clipping | None = None) -> Schedule:
        """The lives of all values of a step, before norm methods are chosen."""
        return follow_memory(self.backward, self._readers(self.backward), costs or self.costs(), clipping)

    def without_bounds(self, plan: Plan, clipping: Clipping | None = None, *, mean: bool = True) -> Emitted:
        """The same with norms as computed, to which no bound on rounding is added: not to train with."""
        with without_bounds():
            return replace(self, memo={}).emit(plan, clipping, mean=mean)

    def _readers(self, backward: Backward) -> list[GroupReader]:
        """One for each group that some output depends on."""
        readers = [GroupReader(group, self.program, self.tracked, backward) for group in self.uses.groups]
        return [reader for reader in readers if reader.sites]

    @collector.paused()
    def emit(self, plan: Plan, clipping: Clipping | None = None, *, mean: bool = True) -> Emitted:
        """The emitted graphs: norms, clip factors and clipped sums written behind the traced backward."""
        clipping = clipping or clipping_of(self.trainable, 1.0)
        backward = replace(self.backward, program=self.backward.program.copy())
        if self.fused:
            mean = loss_scale(self.program, self.tracked) == "mean"
        readers = tuple(self._readers(backward))
        order = Order(readers, plan, clipping, mean, self.fused, self.call.views, self.memo)
        program = rewrite(REWRITES, Draft(backward.program), order).program
        forward, back = program, None
        saved = sum(o.kind in (OutputKind.GRADIENT, OutputKind.NORMS) for o in program.outputs)
        if not self.fused:
            parts = split(program)
            forward, back = verify(parts.forward, "split"), verify(parts.backward, "split")
            saved = len(parts.saved)
        compiled, sums = forward, None
        if self.fused:
            compiled = recompute_pointwise(program)
            if len(clipping.groups) == 1:  # else the sums of a group let go of what they read before the next backward
                parts = split_sums(compiled)
                compiled, sums = verify(parts.forward, "split-sums"), verify(parts.backward, "split-sums")
        forward, back = mark_numbers(forward), back and mark_numbers(back)
        forward, back = mark_overwrites(forward), back and mark_overwrites(back)
        lengths = tuple(proven(*pair, program.batch) for pair in zip(self.call.lengths, program.lengths, strict=True))
        return Emitted(
            forward,
            back,
            saved,
            replace(self.call, lengths=lengths),
            self.captured.out_spec,
            plan,
            clipping,
            mean,
            self.trainable,
            self.captured.modules,
            penalty(self.program, self.tracked) if self.fused else None,
            drop_tangents,
            compiled,
            sums,
        )


@dataclass(frozen=True)
class Proof:
    """What batch tracking found in a model, before anything is refused."""

    call: CallSpec
    captured: Captured
    program: Program  # captured, normalised
    tracked: Tracked
    fused: bool
    loss_reduction: str
    trainable: tuple[str, ...]

    @collector.paused()
    def conclude(self) -> Analysis:
        """Uses and backward of a model whose samples stay apart.

        Raises:
            DPCompileError: they do not, or some use of a parameter has no rule.
        """
        program, tracked = self.program, self.tracked
        check_supported(program, tracked)
        uses = find_sites(program, tracked)
        if self.fused and loss_scale(program, tracked) != self.loss_reduction:
            raise DPCompileError(
                f"check-supported: loss_fn gives a {loss_scale(program, tracked)} over samples, but loss_reduction="
                f"{self.loss_reduction!r}. Say loss_reduction={loss_scale(program, tracked)!r}, or change loss_fn."
            )
        backward = trace_backward(program, tracked, uses, loss=self.fused)
        verify(backward.program, "trace-backward")
        return Analysis(self.call, self.captured, program, tracked, uses, backward, self.fused, self.trainable)


@collector.paused()
def prove(
    model: nn.Module,
    sample_input: Any,
    *,
    batched: Any = None,
    dynamic: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    sample_targets: Any = None,
    loss_reduction: str = "mean",
    views: int = 1,
) -> Proof:
    """Where the batch is in every value of a model, whether it is supported or not."""
    _check_parameters(model)
    call = bind_sample(model, sample_input, batched, sample_targets, views, dynamic)
    was_training = model.training
    flags = {module: module.training for module in model.modules()}
    if not was_training:
        model.train()
    try:
        captured = capture(model, call, loss_fn, loss_reduction)
    finally:
        for module, flag in flags.items():
            module.training = flag
    fused = loss_fn is not None
    program = verify(normalise(captured.program), "normalise")
    tracked = track_batch(program, loss=fused)
    trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    return Proof(captured.call, captured, program, tracked, fused, loss_reduction, trainable)


def _check_arguments(
    model: object,
    max_grad_norm: float,
    norm_method: str,
    loss_reduction: str,
    loss_fn: object,
    sample_targets: object,
    views: object,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be an nn.Module, got {type(model).__name__}.")
    if not isinstance(max_grad_norm, (int, float)) or math.isnan(max_grad_norm) or max_grad_norm <= 0:
        raise ValueError(f"Expected max_grad_norm={max_grad_norm!r} > 0 (float('inf') for no clipping).")
    if norm_method not in POLICIES:
        raise ValueError(f"Expected norm_method={norm_method!r} to be one of {', '.join(POLICIES)}.")
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"Expected loss_reduction={loss_reduction!r} to be 'mean' or 'sum'.")
    if not isinstance(views, int) or views < 1:
        raise ValueError(f"Expected views={views!r} to be a whole number >= 1.")
    if (loss_fn is None) != (sample_targets is None):
        raise ValueError("Give loss_fn and sample_targets together: the fused form needs both.")


def _budget(memory_budget: float | str | None, norm_method: str) -> float | None:
    """Bytes, or a factor."""
    if memory_budget is None:
        return None
    if norm_method != "auto":
        raise ValueError(f"memory_budget chooses among norm methods: it needs norm_method='auto', not {norm_method!r}.")
    budget = bytes_of(memory_budget) if isinstance(memory_budget, str) else memory_budget
    if not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(f"Expected memory_budget={memory_budget!r} > 0: bytes, a factor below 100, or '24GB'.")
    return budget


def _check_parameters(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise DPCompileError(
            f"dpcompile: {type(model).__name__} has no trainable parameters. Call requires_grad_(True) on some."
        )
    bad = [name for name, p in trainable.items() if p.is_complex()]
    if bad:
        raise DPCompileError(
            f"dpcompile: complex parameters are not supported: {', '.join(bad)}. Keep real and imaginary parts as "
            "two real parameters (torch.view_as_real)."
        )
    lazy = [name for name, p in trainable.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise CaptureError(f"dpcompile: {', '.join(lazy)} not initialised yet. Run the model once first.")
