"""`fix(model)`: the usual cures for layers in which samples meet, applied to the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from dpcompile.errors import DPCompileError
from dpcompile.origin import ROOT
from dpcompile.runtime import DPModule

MOST_GROUPS = 32  # Wu and He 2018 (arXiv:1803.08494)
CHANNELS = 4  # of a group, at least: one channel of one position is normalised to zero, two to their signs
CHANNELS_1D = 8  # the input of a BatchNorm1d may have no positions, so that only channels are left to normalise
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of nn.Module


@dataclass(frozen=True)
class Change:
    """One layer that was changed."""

    path: str  # the module's first name, "(root)" for the model itself
    before: str  # as print(module) shows it
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"


def fix(model: nn.Module) -> tuple[nn.Module, list[Change]]:
    """The model with layers that dpcompile accepts in place of those in which samples meet, and what was changed.

    - BatchNorm1d, 2d, 3d and SyncBatchNorm become GroupNorm: as many groups as divide the channels, at most 32, of at
      least 4 channels each (8 for BatchNorm1d). It holds the same parameters, so an optimizer made before goes on;
      running statistics are dropped.
    - InstanceNorm with running statistics goes on without them.

    As with `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, the modules of the model are exchanged in place and the
    model is returned: use what is returned, since a model that is a BatchNorm itself becomes another object. A layer
    that stands in several places is one layer afterwards too. The model computes something else then: train it, or
    train it further.

    Left as they are, for `dpcompile` to judge: layers that are put in eval mode while the model trains (frozen running
    statistics mix no samples), classes with a forward of their own, a BatchNorm1d of fewer than 3 channels, and
    functional calls. `state_dict()` keeps its names, without the running statistics.

    Raises:
        DPCompileError: a layer is lazy, or a BatchNorm has hooks or parametrizations. Nothing is changed then.
    """
    if isinstance(model, DPModule):
        raise DPCompileError("fix: the model is compiled already. Fix the model first, then compile it.")
    found = {name: m for name, m in model.named_modules() if isinstance(m, (_BatchNorm, _InstanceNorm))}
    found = {name: m for name, m in found.items() if _meets(m, model)}
    for name, module in found.items():
        _check(name or ROOT, module)
    changes: list[Change] = []
    instead: dict[nn.Module, nn.Module] = {}
    for name, module in found.items():
        before = repr(module)
        if isinstance(module, _BatchNorm):
            instead[module] = after = _group_norm(module)
        else:
            after = _without_statistics(module)
        changes.append(Change(name or ROOT, before, repr(after)))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in instead:
                parent._modules[name] = instead[child]
    return instead.get(model, model), changes


def _meets(module: _BatchNorm | _InstanceNorm, model: nn.Module) -> bool:
    """Whether it is a layer to be changed: a known forward that reads or writes statistics of the batch."""
    if isinstance(module, LazyModuleMixin):
        return True  # refused by name
    frozen = model.training and not module.training and module.running_mean is not None
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats and not frozen
    known = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    few = isinstance(module, nn.BatchNorm1d) and module.num_features < 3
    return known and not frozen and not few


def _check(name: str, module: nn.Module) -> None:
    """Raise where the layer cannot be exchanged without losing something of it."""
    problem = None
    if isinstance(module, LazyModuleMixin):
        problem = "is not initialised yet. Run the model once first."
    elif isinstance(module, _BatchNorm) and parametrize.is_parametrized(module):
        problem = "has parametrizations. Remove them first (torch.nn.utils.parametrize), or replace it yourself."
    elif isinstance(module, _BatchNorm) and any(getattr(module, hooks) for hooks in HOOKS):
        problem = "has hooks. Remove them first, or replace it yourself."
    if problem is not None:
        raise DPCompileError(f"fix: `{name}` ({type(module).__name__}) {problem}")


def _group_norm(module: _BatchNorm) -> nn.GroupNorm:
    channels = module.num_features
    least = CHANNELS_1D if isinstance(module, nn.BatchNorm1d) else CHANNELS
    divisors = [n for n in range(1, MOST_GROUPS + 1) if channels % n == 0 and channels // n >= least]
    made = nn.GroupNorm(max(divisors, default=1), channels, module.eps, affine=False)
    made.affine, made.weight, made.bias = module.affine, module.weight, module.bias
    made.training = module.training
    return made


def _without_statistics(module: _InstanceNorm) -> _InstanceNorm:
    module.track_running_stats = False
    module.running_mean = module.running_var = module.num_batches_tracked = None
    return module
