"""The module that dpcompile gives back: the model's own parameters and call, with a private backward."""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dpcompile import records
from dpcompile.attributes import changes
from dpcompile.calls import TARGETS, CallSpec
from dpcompile.clipping import Clipping, total_bound
from dpcompile.emitted import Emitted, FusedFunction, PrivateFunction, without_autocast
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.ir import InputKind, OutputKind, Program
from dpcompile.plan import Plan

NONFINITE = ("zero", "raise")  # what becomes of a sample whose gradient is not finite
WEIGHT = "sample_weight"  # an extra keyword of the call, unless the model's own forward has it


class DPModule(nn.Module):
    """A model whose backward leaves clipped gradients. Made by `dpcompile.dpcompile`.

    Shares the parameters and buffers of `model`: an optimizer, `state_dict()` and `to()` see the model's own.
    In eval mode, or without gradients, it is the model itself.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> DPModule:
        """A module of a class of its own, whose `forward` is a copy with a code object of its own.

        torch.compile keeps at most `recompile_limit` graphs for one code object: were it shared, the ninth module
        compiled in a process would be refused or run uncompiled.
        """
        code = DPModule.forward.__code__.replace()
        forward = types.FunctionType(code, globals(), "forward", DPModule.forward.__defaults__)
        own = type("DPModule", (cls,), {"forward": forward, "__module__": __name__})
        return super().__new__(own)  # pyright: ignore[reportArgumentType]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (), self.__getstate__()

    def __init__(self, model: nn.Module, emitted: Emitted, nonfinite: str = "zero") -> None:
        super().__init__()
        object.__setattr__(self, "module", model)  # not a submodule: names stay the model's own
        self._emitted = emitted
        named = dict(model.named_parameters(remove_duplicate=False))
        # held directly: torch.compile cannot look into an nn.LSTM for its parameters
        self._held = [named[i.target] for i in emitted.forward.inputs if i.kind is InputKind.PARAMETER]
        self._dtypes = [p.dtype for p in self._held]
        self._autocast = _autocast(emitted.call.device.type)
        self._share()
        self.training = model.training
        self._set_bounds([group.bound for group in emitted.clipping.groups])
        self._weight: torch.Tensor | None = None
        self._summed = False
        self._times = torch.zeros((), dtype=torch.int64)  # changed by every fused step: see records.py
        self._nonfinite = nonfinite
        self.validated = "nothing: it was not asked for"  # what the probe of dpcompile(validate=) compared
        self._handle = self._new_handle()
        weakref.finalize(self, records.forget, self._handle)

    def _new_handle(self) -> int:
        handle = records.new_handle()
        if self._nonfinite == "raise":
            records.refuse_nonfinite(handle)
        return handle

    def _share(self) -> None:
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, kind, getattr(self.module, kind))

    # ------------------------------------------------------------ what was compiled

    @property
    def plan(self) -> Plan:
        """What was decided for every use of every parameter, and why."""
        return self._emitted.plan

    @property
    def forward_module(self) -> fx.GraphModule:
        """The emitted forward graph (in the fused form the whole step)."""
        return self._emitted.forward.module

    @property
    def backward_module(self) -> fx.GraphModule | None:
        """The emitted backward graph; None in the fused form."""
        return None if self._emitted.backward is None else self._emitted.backward.module

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted step: the fused graph, or the backward with norms, clip factors and clipped sums."""
        return self.backward_module or self.forward_module

    @property
    def clipping(self) -> Clipping:
        """The clip function and groups that were compiled."""
        return self._emitted.clipping

    @property
    def max_grad_norm(self) -> float:
        """R, the bound on what one sample contributes to all gradients together. May be set between steps."""
        return total_bound(list(self._bounds))

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"Expected max_grad_norm={value!r} > 0.")
        now = self.max_grad_norm
        infinite = value == float("inf") or now == float("inf")
        share = value / len(self._bounds) ** 0.5
        self._set_bounds([share if infinite else bound * (value / now) for bound in self._bounds])

    @property
    def max_grad_norms(self) -> dict[str, float]:
        """R of every clip group. May be set between steps; the graph stays as it is."""
        return {group.name: bound for group, bound in zip(self.clipping.groups, self._bounds, strict=True)}

    @max_grad_norms.setter
    def max_grad_norms(self, values: Mapping[str, float]) -> None:
        names = [group.name for group in self.clipping.groups]
        if sorted(values) != sorted(names) or not all(value > 0 for value in values.values()):
            raise ValueError(f"Expected a bound > 0 for each of the clip groups {names}, got {dict(values)}.")
        self._set_bounds([values[name] for name in names])

    def _set_bounds(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._bound = torch.tensor(self._bounds, dtype=torch.float64)  # an input of the graph: no new compilation

    @property
    def per_sample_norms(self) -> torch.Tensor:
        """[B] norms of the unscaled per-sample gradients of the last backward, detached. Not private."""
        norms = self._recorded()
        return norms[0] if norms.shape[0] == 1 else norms.square().sum(0).sqrt()

    @property
    def nonfinite_samples(self) -> int:
        """Samples so far whose gradient was NaN or infinite: they added nothing to any sum. Not private."""
        return records.nonfinite_samples(self._handle)

    @property
    def per_group_norms(self) -> dict[str, torch.Tensor]:
        """The same for every clip group: [B] norms by name. Not private."""
        return {group.name: norms for group, norms in zip(self.clipping.groups, self._recorded(), strict=True)}

    def _recorded(self) -> torch.Tensor:
        norms = records.recorded(self._handle)
        if norms is None:
            raise DPCompileError("per_sample_norms: there was no backward yet.")
        return norms

    # ------------------------------------------------------------ the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self._inference(args, kwargs)
        self._check_unchanged()
        if self._summed and WEIGHT in kwargs and WEIGHT not in self._emitted.call.names:
            raise PrivacyError(f"call: in a private run every sample counts once; {WEIGHT} is the loader's own.")
        weight = kwargs.pop(WEIGHT, self._weight) if WEIGHT not in self._emitted.call.names else self._weight
        leaves = self._emitted.call.flatten(args, kwargs)
        size = self._emitted.call.batch_size_of(leaves)
        self._emitted.call.check_size(size)
        padded = _pad_empty(self._emitted.call, leaves) if size == 0 else leaves
        weight = self._weight_of(weight, size, padded)
        with without_autocast(self._emitted):
            if self._emitted.backward is None:
                return self._fused(padded, weight, empty=size == 0)
            return self._split(padded, weight, empty=size == 0)

    def _inference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model itself. Parameters enter detached: no gradient could be clipped on this way."""
        kwargs.pop(TARGETS, None) if self._emitted.backward is None else None
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        held = {name: p.detach() for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, held, args, kwargs)

    def _split(self, leaves: list[Any], weight: torch.Tensor, *, empty: bool) -> Any:
        emitted = self._emitted
        assert emitted.backward is not None
        primals = self._primals(emitted.forward, emitted.call.as_samples(leaves))
        flat = PrivateFunction.apply(
            emitted, self._bound_tensor(primals), weight, ~self._handle if empty else self._handle, *primals
        )
        flat = self._write_buffers(flat)
        if empty:
            flat = [value[:0] if isinstance(value, torch.Tensor) and value.dim() else value for value in flat]
        return pytree.tree_unflatten(flat, emitted.out_spec)

    def _fused(self, leaves: list[Any], weight: torch.Tensor, *, empty: bool) -> Any:
        emitted = self._emitted
        primals = self._primals(emitted.forward, emitted.call.as_samples(leaves))
        handle = ~self._handle if empty else self._handle
        flat = FusedFunction.apply(emitted, self._bound_tensor(primals), weight, handle, *primals)
        *flat, norms = flat
        if torch.compiler.is_compiling():
            records.HAND_OVER(norms, self._times, handle)
        else:
            records.write(handle, norms)
        (loss,) = self._write_buffers(flat)
        if emitted.penalty is None or self._summed:
            return loss
        penalty = self._penalty(emitted.penalty)
        return loss + (penalty - penalty.detach())  # in its value already

    def _penalty(self, program: Program) -> torch.Tensor:
        with without_autocast(self._emitted):
            return program.module.forward(*self._primals(program, []))[0]

    def penalty_gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of what the parameters alone add to the fused loss, by parameter name. The same for all data."""
        if self._emitted.penalty is None:
            return {}
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            penalty = self._penalty(self._emitted.penalty)
        grads = torch.autograd.grad(penalty, list(named.values()), allow_unused=True)
        return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}

    def _bound_tensor(self, primals: list[Any]) -> torch.Tensor:
        return self._bound.to(primals[0].device)

    def _weight_of(self, given: torch.Tensor | None, size: int, leaves: list[Any]) -> torch.Tensor:
        """[B] how often each sample counts in the clipped sum; with `_summed` a mean's 1/B is taken back."""
        device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        if given is None or size == 0:
            weight = torch.ones(size or self._emitted.call.least, device=device)
        else:
            if given.shape != (size,):
                raise ValueError(f"Expected sample_weight of shape [{size}], got {list(given.shape)}.")
            weight = given.to(device, torch.float32)
        return weight * size if self._summed and self._emitted.mean else weight

    def _primals(self, program: Program, leaves: list[Any]) -> list[Any]:
        users, parameters = iter(leaves), iter(self._held)
        found = []
        for item in program.inputs:
            if item.kind is InputKind.USER:
                value = next(users)
                value = value.contiguous() if isinstance(value, torch.Tensor) else value
                twice = isinstance(value, torch.Tensor) and any(value is other for other in found)
                found.append(value.view_as(value) if twice else value)  # a compiler takes no tensor two times
            elif item.kind is InputKind.CONSTANT:
                found.append(program.constants[item.target])
            elif item.kind is InputKind.PARAMETER:
                found.append(next(parameters))
            elif item.kind is InputKind.BUFFER:
                found.append(self._buffer(item.target))
        return found

    def _buffer(self, target: str) -> torch.Tensor:
        owner, _, name = target.rpartition(".")
        return getattr(self.module.get_submodule(owner), name)

    def _write_buffers(self, results: Sequence[Any]) -> list[Any]:
        """The model's outputs, after new buffer values (which depend on no sample) went to their buffers."""
        outputs = []
        for value, output in zip(results, self._emitted.own, strict=True):
            if output.kind is OutputKind.BUFFER:
                with torch.no_grad():
                    self._buffer(output.target).copy_(value)
            else:
                outputs.append(value)
        return outputs

    def _check_unchanged(self) -> None:
        """Raise where the model is not as it was compiled: its parameters, and what its code read from its modules."""
        if any(p.dtype is not dtype for p, dtype in zip(self._held, self._dtypes, strict=True)):
            raise DPCompileError(
                "call: the parameters have another type than when they were compiled, and norms are certified for that "
                "one. Compile again with dpcompile(...)."
            )
        now, then = _autocast(self._emitted.call.device.type), self._autocast
        if now is not then:
            raise DPCompileError(
                f"call: compiled {_autocast_text(then)} and called {_autocast_text(now)}; casts are part of the graph. "
                "Compile again within the torch.autocast that you train with."
            )
        inputs = [i for i in self._emitted.forward.inputs if i.kind is InputKind.PARAMETER]
        flags = all(p.requires_grad == i.trainable for p, i in zip(self._held, inputs, strict=True))
        if flags and torch.compiler.is_compiling():
            return  # what the model holds beside them is looked at in eager calls only
        now = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        held = {i.target: p for p, i in zip(self._held, inputs, strict=True)}
        replaced = [name for name, p in held.items() if name in now and now[name] is not p]
        if not flags or tuple(now) != self._emitted.trainable or replaced:
            raise DPCompileError(_changed_message(self._emitted.trainable, tuple(now), replaced))
        changed = list(itertools.islice(changes(self.module, self._emitted.modules), 3))
        if changed:
            raise DPCompileError(
                f"call: the model is not as it was compiled: {'; '.join(changed)}. The graph does not follow such a "
                "change: take it back, or compile again with dpcompile(...)."
            )

    # ------------------------------------------------------------ being a module

    def train(self, mode: bool = True) -> DPModule:
        """The model in train or eval mode. Parts that were in eval mode when it was compiled stay in it."""
        self.module.train(mode)
        for path, module in self.module.named_modules():
            record = self._emitted.modules.get(path)
            if mode and record is not None:
                module.training = record.values.get("training", True)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", "_emitted", "__setstate__"):
                raise
            return getattr(self.module, name)

    def __getstate__(self) -> dict[str, Any]:
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_handle")
        return {key: value for key, value in self.__dict__.items() if key not in shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()
        self.__dict__["_handle"] = self._new_handle()
        weakref.finalize(self, records.forget, self._handle)

    def __repr__(self) -> str:
        return f"DPModule(max_grad_norm={self.max_grad_norm:g}, {self.module!r})"


def _bare() -> DPModule:
    """What a copy or a pickle fills with its state."""
    return DPModule.__new__(DPModule)


def _changed_message(then: tuple[str, ...], now: tuple[str, ...], replaced: list[str]) -> str:
    frozen = [name for name in then if name not in now]
    added = [name for name in now if name not in then]
    parts = [f"no longer trainable: {', '.join(frozen[:5])}"] if frozen else []
    parts += [f"newly trainable: {', '.join(added[:5])}"] if added else []
    parts += [f"replaced: {', '.join(replaced[:5])}"] if replaced else []
    return (
        f"call: the trainable parameters changed after compilation ({'; '.join(parts) or 'their order'}). "
        "Compile again with dpcompile(...)."
    )


def _autocast(device: str) -> torch.dtype | None:
    """The type that autocast casts to; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast_text(dtype: torch.dtype | None) -> str:
    return "without autocast" if dtype is None else f"under autocast to {str(dtype).removeprefix('torch.')}"


def _pad_empty(call: CallSpec, leaves: list[Any]) -> list[Any]:
    """An empty batch as one sample of zeros (or as many as are fixed), which has no part in outputs or gradients."""
    padded = []
    for leaf, value in zip(call.leaves, leaves, strict=True):
        if leaf.batch_dim is None:
            padded.append(value)
        else:
            shape = list(value.shape)
            shape[leaf.batch_dim] = call.views * call.least
            padded.append(value.new_zeros(shape))
    return padded
