"""What a private run does at each step, worked out from the arguments of `make_private`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from scipy.optimize import brentq
from torch import nn
from torch.optim import Optimizer

from dpcompile.accountant import Accountant, calibrate, epsilon, usual_accountant
from dpcompile.adaptive import AdaptiveClipping
from dpcompile.errors import PrivacyError
from dpcompile.runtime import DPModule
from dpcompile.sampling import FixedSizeSampler, PoissonSampler, Sampler, ShuffledSampler
from dpcompile.schemes import FixedSize, Neighbours, Poisson, Scheme, ShuffledEpochs, Stated, Step, usual_neighbours

_Kind = TypeVar("_Kind", Neighbours, Accountant)
Schedule = Callable[[int], float]  # logical step, from 0 -> a factor


def constant(_: int) -> float:
    """The schedule that changes nothing."""
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """What is done at each logical step."""

    scheme: Scheme
    noise_multiplier: float  # at factor 1
    noise_factor: Schedule
    bound_factor: Schedule | None
    adaptive: AdaptiveClipping | None
    target_epsilon: float | None
    accountant: Accountant
    bounds: tuple[float, ...]  # max_grad_norm of the clip groups at factor 1

    def multiplier(self, step: int) -> float:
        """Noise std per sensitivity at a logical step, as it is accounted."""
        multiplier = self.noise_multiplier * self.noise_factor(step)
        if not 0 < multiplier < math.inf:
            raise ValueError(f"Expected noise_schedule({step}) to be a positive number, got {multiplier!r}.")
        return multiplier

    def gradient_multiplier(self, step: int) -> float:
        """The noise multiplier of the gradients: larger where counts are released as well."""
        multiplier = self.multiplier(step)
        return multiplier if self.adaptive is None else self.adaptive.gradient_noise(multiplier, len(self.bounds))


def check_module(dp_model: nn.Module, optimizer: Optimizer) -> DPModule:
    """The compiled module itself.

    Raises:
        PrivacyError: it was not compiled, clips nothing, or the optimizer is not over its parameters.
    """
    module = getattr(dp_model, "_orig_mod", dp_model)
    if not isinstance(module, DPModule):
        raise PrivacyError(
            f"private: {type(module).__name__} does not clip. Give what dpcompile(model, sample_input) returned."
        )
    if math.isinf(module.max_grad_norm):
        raise PrivacyError("private: max_grad_norm is infinite, so no noise is enough. Compile with a finite one.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    own = {id(p) for p in module.parameters() if p.requires_grad}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.requires_grad and id(p) not in own for p in held):
        raise PrivacyError(
            "private: the optimizer has parameters that the compiled module does not, so their gradients would be "
            "neither clipped nor noised. Make it from dp_model.parameters()."
        )
    if not any(id(p) in own for p in held):
        raise PrivacyError("private: the optimizer has none of the module's parameters. Make it from them.")
    return module


def sampler_of(
    sampling: str | Sampler,
    dataset: Any,
    batch_size: float | None,
    sample_rate: float | None,
    seed: int | None,
    secure: bool,
) -> Sampler:
    """The sampler that the arguments describe."""
    if isinstance(sampling, Sampler):
        if batch_size is not None or sample_rate is not None:
            raise ValueError("Expected no batch_size or sample_rate beside a sampler, which has its own.")
        return sampling
    if not hasattr(dataset, "__len__"):
        raise PrivacyError("private: a data set without a length has no sample rate. Use a map-style data set.")
    size = len(dataset)
    if size < 1:
        raise ValueError("Expected a data set of at least one sample, got 0.")
    if (batch_size is None) == (sample_rate is None):
        raise ValueError("Expected one of batch_size and sample_rate.")
    if batch_size is not None and not 0 < batch_size <= size:
        raise ValueError(f"Expected batch_size={batch_size!r} from 1 to the {size} samples of the data set.")
    if sampling == "poisson":
        rate = sample_rate if batch_size is None else batch_size / size
        assert rate is not None
        return PoissonSampler(size, rate, seed=seed, secure=secure)
    if sampling not in ("fixed-size", "shuffled"):
        raise ValueError(f"Expected sampling={sampling!r} to be 'poisson', 'fixed-size', 'shuffled' or a Sampler.")
    if batch_size is None or batch_size != int(batch_size):
        raise ValueError(f"Expected a whole batch_size={batch_size!r} with sampling={sampling!r}.")
    kind = FixedSizeSampler if sampling == "fixed-size" else ShuffledSampler
    return kind(size, int(batch_size), seed=seed, secure=secure)


def scheme_of(sampler: Sampler, event: Stated | None) -> Scheme:
    """How the sampler is accounted: as what it is, or as the user states."""
    if event is not None:
        return event
    if type(sampler) is PoissonSampler:
        return Poisson(sampler.sample_rate)
    if type(sampler) is FixedSizeSampler:
        return FixedSize(sampler.dataset_size, sampler.batch_size)
    if type(sampler) is ShuffledSampler:
        return ShuffledEpochs(sampler.dataset_size, sampler.batch_size)
    raise PrivacyError(
        f"private: the accounting of {type(sampler).__name__} is not known. State what a step costs: event=Stated(...)"
    )


def relation_of(scheme: Scheme, neighbours: str | None) -> Neighbours:
    """The relation asked for; by default the one that the sampling has an accounting for."""
    return usual_neighbours(scheme) if neighbours is None else _member(Neighbours, "neighbours", neighbours)


def accountant_of(scheme: Scheme, accountant: str | None) -> Accountant:
    """The accountant asked for; by default PLD where it accounts for the sampling."""
    return usual_accountant(scheme) if accountant is None else _member(Accountant, "accountant", accountant)


def _member(kind: type[_Kind], name: str, value: str) -> _Kind:
    if value not in list(kind):
        raise ValueError(f"Expected {name}={value!r} to be one of {', '.join(kind)}.")
    return kind(value)


def calibrated(
    target_epsilon: float,
    target_delta: float,
    scheme: Scheme,
    steps: int,
    factor: Schedule,
    accountant: Accountant,
    neighbours: Neighbours,
) -> float:
    """The smallest noise multiplier with which `steps` steps stay within the target, times the schedule's factors."""
    if factor is constant:
        return calibrate(target_epsilon, target_delta, scheme, steps, accountant=accountant, neighbours=neighbours)
    factors = [factor(step) for step in range(steps)]

    def excess(log_noise: float) -> float:
        run = [Step(scheme, math.exp(log_noise) * f) for f in factors]
        spent = epsilon(run, target_delta, accountant=accountant, neighbours=neighbours)
        return math.log(min(max(spent, 1e-12), 1e12) / target_epsilon)

    least = calibrate(target_epsilon, target_delta, scheme, steps, accountant=accountant, neighbours=neighbours)
    low, high = math.log(least / max(factors)) - 1e-3, math.log(least / min(factors)) + 1e-3
    if excess(high) > 0:
        raise PrivacyError("private: no noise multiplier meets the target with this noise_schedule.")
    root = high if excess(low) <= 0 else float(brentq(excess, low, high, xtol=2e-3))  # pyright: ignore[reportArgumentType]
    while excess(root) > 0:
        root += 1e-3
    return math.exp(root)
