"""The emitted graphs, and how autograd runs them: one function for the split form, one for the fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dpcompile import records
from dpcompile.attributes import ModuleRecord
from dpcompile.calls import CallSpec
from dpcompile.clipping import Clipping
from dpcompile.direct import direct
from dpcompile.ir import InputKind, Output, OutputKind, Program
from dpcompile.plan import Plan


@dataclass(frozen=True)
class Emitted:
    """The emitted graphs. Split form: forward and backward. Fused form: `forward` is the whole step.

    Positions of results are worked out once, here, so that a call only indexes.
    """

    forward: Program
    backward: Program | None
    saved: int  # how many results of `forward`, the last ones, go to the backward
    call: CallSpec
    out_spec: pytree.TreeSpec
    plan: Plan
    clipping: Clipping
    mean: bool  # the loss is a mean over samples
    trainable: tuple[str, ...]  # qualified names of the parameters that were trainable at compile time
    modules: Mapping[str, ModuleRecord]  # what the graph has taken from each module of the model
    penalty: Program | None  # fused form: the part of the loss that the parameters alone make
    drop_tangents: Callable[[Program, Sequence[str]], Program | None]  # the backward without gradients of some outputs
    compiled: Program  # `forward` as compilers see it; up to the norms where there are `sums`
    sums: Program | None  # fused form of one clip group, for compilers: the clipped sums, of what `compiled` saves

    own: tuple[Output, ...] = field(init=False)  # the model's own results: outputs and new buffer values, in order
    fixed: tuple[int, ...] = field(init=False)  # those of them that no gradient flows into
    tangents: tuple[int, ...] = field(init=False)  # those whose gradients the backward reads; fused: the loss
    gradients: tuple[int | None, ...] = field(init=False)  # for each input of `forward`, which gradient is its own
    eager_forward: Callable[..., Any] = field(init=False, compare=False, repr=False)
    boxed_backward: Callable[[list[Any]], Any] | None = field(init=False, compare=False, repr=False)
    shorter: dict[tuple[int, ...], Callable[[list[Any]], Any] | None] = field(init=False, compare=False, repr=False)
    """The same without the gradients of some outputs, made where a loss first leaves them out."""

    def __post_init__(self) -> None:
        own = tuple(o for o in self.forward.outputs if o.kind in (OutputKind.USER, OutputKind.BUFFER))
        made = (self.backward or self.forward).outputs
        places = {o.target: i for i, o in enumerate(o for o in made if o.kind is OutputKind.GRADIENT)}
        derived = {
            "own": own,
            "fixed": tuple(i for i, o in enumerate(own) if o.node is not None and not o.wants_gradient),
            "tangents": tuple(i for i, o in enumerate(own) if o.kind is OutputKind.USER)
            if self.backward is None
            else tuple(int(i.target) for i in self.backward.inputs if i.kind is InputKind.TANGENT),
            "gradients": tuple(
                places.get(i.target) if i.kind is InputKind.PARAMETER and i.trainable else None
                for i in self.forward.inputs
                if i.kind is not InputKind.BOUND
            ),
            "shorter": {},
            "eager_forward": direct(self.forward.module).forward,
            "boxed_backward": None if self.backward is None else direct(self.backward.module, boxed=True).forward,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def run_forward(self, *inputs: Any) -> Any:
        """The forward graph; a compiler sees ops by their overloads."""
        return self.compiled.module.forward(*inputs) if torch.compiler.is_compiling() else self.eager_forward(*inputs)

    def backward_without(self, missing: tuple[int, ...]) -> Callable[[list[Any]], Any] | None:
        """The backward for a loss that leaves these outputs out; None if it needs zeros for them."""
        if missing not in self.shorter:
            assert self.backward is not None
            made = self.drop_tangents(self.backward, [str(i) for i in missing])
            self.shorter[missing] = None if made is None else direct(made.module, boxed=True).forward
        return self.shorter[missing]

    def __deepcopy__(self, memo: dict[int, Any]) -> Emitted:
        """Nothing in here changes, and no parameter is in here: copies of a module share it."""
        return self

    def __reduce__(self) -> Any:
        return Emitted, tuple(getattr(self, f.name) for f in fields(self) if f.init)


def without_autocast(emitted: Emitted) -> torch.autocast:
    """Ops as they are in the graph, which has the casts of the autocast that it was captured under."""
    return torch.autocast(emitted.call.device.type, enabled=False)


class PrivateFunction(torch.autograd.Function):
    """The split form: the emitted forward, and behind it the emitted backward."""

    @staticmethod
    def forward(
        ctx: Any, emitted: Emitted, bound: torch.Tensor, weight: torch.Tensor, handle: int, *primals: Any
    ) -> Any:
        results = emitted.run_forward(*primals)
        count = len(results) - emitted.saved
        ctx.emitted, ctx.handle = emitted, handle
        ctx.save_for_backward(bound, weight, *results[count:])
        ctx.mark_non_differentiable(*[results[i] for i in emitted.fixed])
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
            ctx.own = [(results[i].shape, results[i].dtype, results[i].device) for i in emitted.tangents]
        return tuple(results[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        emitted = ctx.emitted
        if torch.compiler.is_compiling():
            tangents = [grads[i].contiguous() for i in emitted.tangents]
            bound, weight, *saved = ctx.saved_tensors
            with without_autocast(emitted):
                results = emitted.backward.module.forward(*saved, *tangents, bound, weight, ctx.handle)
        else:
            run = emitted.boxed_backward
            missing = tuple(i for i in emitted.tangents if grads[i] is None)
            tangents = [None if grads[i] is None else grads[i].contiguous() for i in emitted.tangents]
            if missing:
                run = emitted.backward_without(missing)
                if run is None:
                    run = emitted.boxed_backward
                    empty = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.own]
                    tangents = [e if t is None else t for t, e in zip(tangents, empty, strict=True)]
            bound, weight, *saved = ctx.saved_tensors
            ctx.maybe_clear_saved_tensors()  # from here on the graph alone holds them, and lets go after the last use
            if _is_retained(ctx):
                saved = [value.clone() for value in saved]  # the graph writes over some of them
            boxed = [*saved, *tangents, bound, weight, ctx.handle]
            del saved, tangents, grads
            with without_autocast(emitted):
                results = run(boxed)
        if ctx.handle < 0:  # an empty batch: its stand-in sample may have a gradient that is not finite
            results = [None if value is None else torch.zeros_like(value) for value in results]
            if torch.compiler.is_compiling():  # no result needs the graph's own record of norms now, and it is dropped
                zero = records.OP(torch.zeros_like(bound).unsqueeze(1), ctx.handle).sum()
                results = [None if value is None else value + zero.to(value.dtype) for value in results]
        gradients = [None if at is None else results[at] for at in emitted.gradients]
        if not torch.compiler.is_compiling():
            records.hand(ctx.handle, gradients)
        return (None, None, None, None, *gradients)


def _is_retained(ctx: Any) -> bool:
    """Whether the backward may run again, so that what was saved is still there."""
    try:
        return ctx.saved_tensors is not None
    except RuntimeError:
        return False


class FusedFunction(torch.autograd.Function):
    """The fused form: gradients are results of the forward; the backward hands them over.

    Where there is one clip group, compilers are given the clipped sums as the backward: there the gradient of the loss
    scales the samples' weights.
    """

    @staticmethod
    def forward(
        ctx: Any, emitted: Emitted, bound: torch.Tensor, weight: torch.Tensor, handle: int, *primals: Any
    ) -> Any:
        ctx.emitted, ctx.handle = emitted, handle
        ctx.cut = torch.compiler.is_compiling() and emitted.sums is not None
        if ctx.cut:
            results = emitted.compiled.module.forward(*primals, bound)
            count = len(emitted.own)
            norms, *saved = results[count:]
            ctx.save_for_backward(weight.to(norms.dtype), *saved)
        else:
            results = emitted.run_forward(*primals, bound, weight)
            count = len(results) - emitted.saved  # the model's own results; then gradients and norms
            *gradients, norms = results[count:]
            ctx.save_for_backward(*gradients)
        own = [value * 0 for value in results[:count]] if handle < 0 else results[:count]
        ctx.mark_non_differentiable(norms, *[own[i] for i in emitted.fixed])
        return (*own, norms)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scale = grads[ctx.emitted.tangents[0]]
        if ctx.cut:
            weight, *saved = ctx.saved_tensors
            with without_autocast(ctx.emitted):
                gradients = ctx.emitted.sums.module.forward(*saved, weight * scale.to(weight.dtype))
        else:
            gradients = ctx.saved_tensors
        if ctx.handle < 0:
            gradients = [torch.zeros_like(g) for g in gradients]
        elif not ctx.cut and (torch.compiler.is_compiling() or scale.device.type != "cpu" or scale.item() != 1.0):
            gradients = [g * scale for g in gradients]  # else scaled already, or by 1
        handed = [None if at is None else gradients[at] for at in ctx.emitted.gradients]
        if not torch.compiler.is_compiling():
            records.hand(ctx.handle, handed)
        return (None, None, None, None, *handed)
