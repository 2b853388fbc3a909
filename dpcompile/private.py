"""`make_private`: a compiled module, an optimizer and a data set become one run whose (epsilon, delta) is known.

The mechanism, step by step: the loader draws a logical batch by a sampler whose accounting is known; the compiled
module sums clipped gradients over its physical batches; the ledger records the step; noise of

    std = noise_multiplier * max_grad_norm * sensitivity(neighbours)

is added to every coordinate of the sum; the result is divided by the expected batch size, which does not depend on
the data, and handed to the optimizer. Whatever is computed from parameters afterwards costs nothing.

Not private, and not released by this module: losses, norms and clip fractions of single batches.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from dpcompile.accountant import Accountant
from dpcompile.adaptive import AdaptiveClipping
from dpcompile.errors import PrivacyError
from dpcompile.files import write_whole
from dpcompile.ledger import Ledger
from dpcompile.loader import PhysicalBatch, PrivateLoader
from dpcompile.noise import GaussianNoise, NoiseSource, SecureNoise, noise_std
from dpcompile.optimizer import PrivateOptimizer
from dpcompile.probe import check_loss
from dpcompile.recipe import (
    Recipe,
    Schedule,
    accountant_of,
    calibrated,
    check_module,
    constant,
    relation_of,
    sampler_of,
    scheme_of,
)
from dpcompile.runtime import DPModule
from dpcompile.sampling import Sampler
from dpcompile.schemes import Neighbours, Poisson, ShuffledEpochs, Stated, Step, sensitivity

FORMAT = 1


def make_private(
    dp_model: nn.Module,
    optimizer: Optimizer,
    data: Dataset[Any] | DataLoader[Any],
    *,
    batch_size: float | None = None,
    sample_rate: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    noise_multiplier: float | None = None,
    max_physical_batch: int | None = None,
    pad: bool = False,
    sampling: str | Sampler = "poisson",
    event: Stated | None = None,
    accountant: str | None = None,
    neighbours: str | None = None,
    noise_schedule: Schedule | None = None,
    max_grad_norm_schedule: Schedule | None = None,
    adaptive_clipping: AdaptiveClipping | None = None,
    secure_noise: bool = False,
    seed: int | None = None,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    ledger_file: str | os.PathLike[str] | None = None,
    **loader_options: Any,
) -> Private:
    """A private run of `dp_model`.

    Args:
        dp_model: made by `dpcompile`; also as torch.compile returned it.
        optimizer: any torch optimizer over the module's parameters. It is stepped through `private.optimizer`.
        data: a map-style data set, or a DataLoader whose data set, collate function and workers are taken over.
        batch_size: expected size of a logical batch.
        sample_rate: instead of it, the probability of each sample (Poisson).
        target_epsilon: what may be spent at `target_delta`. The step that would exceed it is refused.
        target_delta: required; below 1 / len(data).
        epochs, steps: how long the run is planned to be; one of them, to calibrate the noise to `target_epsilon`.
        noise_multiplier: noise std per sensitivity, instead of calibrating it.
        max_physical_batch: most samples in one forward. None: the whole logical batch.
        pad: fill every physical batch up to that with samples of weight 0: one shape for a compiled graph.
        sampling: "poisson"; "fixed-size" without replacement; "shuffled" epochs; or a Sampler of your own with `event`.
        event: what one step of your own sampler costs, stated by you.
        accountant: "pld" or "rdp"; default: what accounts for the sampling, PLD where both do.
        neighbours: "add-or-remove-one" or "replace-one"; default: what the sampling has an accounting for.
        noise_schedule: factor on the noise multiplier at each logical step.
        max_grad_norm_schedule: factor on max_grad_norm at each logical step. The noise follows it.
        adaptive_clipping: max_grad_norm follows a private quantile of the norms; its cost is in the accounting.
        secure_noise: cryptographic generators for noise and sampling, and discrete noise. Not reproducible.
        seed: makes noise and sampling reproducible; not with `secure_noise`.
        criterion: `criterion(outputs, targets)` of the training loop: checked on three samples, (inputs, targets) of
            the data set, to reduce as `loss_reduction` says (`probe.check_loss`).
        ledger_file: the ledger is written there before every release: a crash can only over-count.
        loader_options: num_workers and so on, for torch's DataLoader.

    Raises:
        PrivacyError: the request would void the guarantee, or its accounting is not known.
        ValueError: an argument out of its range.
    """
    module = check_module(dp_model, optimizer)
    if target_delta is None or not 0 < target_delta < 1:
        raise ValueError(f"Expected target_delta={target_delta!r} in (0, 1); below 1 / len(data).")
    if secure_noise and seed is not None:
        raise ValueError(f"Expected no seed={seed!r} with secure_noise=True: its noise is not reproducible.")
    dataset = data.dataset if isinstance(data, DataLoader) else data
    sampler = sampler_of(sampling, dataset, batch_size, sample_rate, seed, secure_noise)
    if target_delta >= 1 / sampler.dataset_size:
        warnings.warn(
            f"target_delta={target_delta:g} is not below 1 / {sampler.dataset_size} samples: to release one in full "
            "would be allowed. Choose a smaller one.",
            stacklevel=2,
        )
    scheme = scheme_of(sampler, event)
    relation, kind = relation_of(scheme, neighbours), accountant_of(scheme, accountant)
    factor = noise_schedule or constant
    if noise_multiplier is None:
        planned = epochs * sampler.steps_per_epoch if steps is None and epochs is not None else steps
        if target_epsilon is None or planned is None:
            raise ValueError("Expected noise_multiplier, or target_epsilon with epochs (or steps) to calibrate it.")
        if planned < 1:
            raise ValueError(f"Expected steps={planned!r} >= 1.")
        noise_multiplier = calibrated(target_epsilon, target_delta, scheme, planned, factor, kind, relation)
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"Expected a finite noise_multiplier={noise_multiplier!r} > 0.")
    if adaptive_clipping is not None and module.clipping.function != "abadi":
        raise ValueError(f"adaptive_clipping needs clipping='abadi', the module has {module.clipping.function!r}.")
    if adaptive_clipping is not None and max_grad_norm_schedule is not None:
        raise ValueError("Expected one of adaptive_clipping and max_grad_norm_schedule: both set max_grad_norm.")
    recipe = Recipe(
        scheme,
        float(noise_multiplier),
        factor,
        max_grad_norm_schedule,
        adaptive_clipping,
        target_epsilon,
        kind,
        tuple(module.max_grad_norms.values()),
    )
    recipe.gradient_multiplier(0)  # refuses counts that would spend everything
    noise = SecureNoise() if secure_noise else GaussianNoise(seed)
    ledger = Ledger(relation, target_delta)
    loader = PrivateLoader(data, sampler, max_physical_batch=max_physical_batch, pad=pad, **loader_options)
    if criterion is not None:
        check_loss(module, criterion, *loader.collated(range(min(3, sampler.dataset_size))))
    return Private(module, optimizer, loader, ledger, noise, recipe, ledger_file)


class Private:
    """A private run: `loader`, `optimizer`, `ledger`. Made by `make_private`."""

    def __init__(
        self,
        dp_model: DPModule,
        optimizer: Optimizer,
        loader: PrivateLoader,
        ledger: Ledger,
        noise: NoiseSource,
        recipe: Recipe,
        ledger_file: str | os.PathLike[str] | None,
    ) -> None:
        self.dp_model = dp_model
        self.loader = loader
        self.ledger = ledger
        self._noise = noise
        self._recipe = recipe
        self._ledger_file = None if ledger_file is None else Path(ledger_file)
        self._step = 0
        self._bounds: list[float] = []  # of the logical batch under way
        self._bound: Tensor | None = None  # what the graph clips with: another one whenever a bound is set
        self._coordinates = sum(p.numel() for p in dp_model.parameters() if p.requires_grad)
        if self._ledger_file is not None and self._ledger_file.exists():
            ledger.load_state_dict(Ledger.load(self._ledger_file).state_dict())  # a run never begins with less spent
        self.optimizer = PrivateOptimizer(
            optimizer,
            dp_model,
            self._release,
            lambda total, std: noise.noised(total, std),
            loader.sampler.expected_batch_size if dp_model._emitted.mean else 1.0,
            self._unclipped if recipe.adaptive is not None else None,
        )
        loader.on_batch = self._on_batch
        loader.on_begin = self.optimizer.abandon
        dp_model._summed = True
        if recipe.bound_factor is not None:
            self._set_bounds(self._next_bounds(None))

    @property
    def noise_multiplier(self) -> float:
        """Noise std per sensitivity at the next step, as it is accounted."""
        return self._recipe.multiplier(self._step)

    @property
    def noise_std(self) -> float:
        """Of the noise on each coordinate of the next step's sum, before the division by the expected batch size."""
        scale = self.dp_model.max_grad_norm * sensitivity(self.ledger.neighbours)
        slack = self._noise.sensitivity_slack(self._coordinates)
        return noise_std(self._recipe.gradient_multiplier(self._step), scale, slack)

    @property
    def released_steps(self) -> int:
        """Logical steps that made the parameters what they are. The ledger may hold more, which a crash undid."""
        return self._step

    def epsilon(self, delta: float | None = None, accountant: str | None = None) -> float:
        """What was spent so far, at `delta` (the target's when left out)."""
        return self.ledger.epsilon(delta, Accountant(accountant) if accountant else self._recipe.accountant)

    def __repr__(self) -> str:
        return (
            f"Private({self._recipe.scheme}, noise_multiplier={self.noise_multiplier:.4g}, "
            f"max_grad_norm={self.dp_model.max_grad_norm:.4g}, {self.ledger.neighbours.value}, "
            f"{len(self.ledger)} steps released)"
        )

    # ------------------------------------------------------------ one logical step

    def _on_batch(self, batch: PhysicalBatch) -> None:
        if self.optimizer.on_batch(batch):
            self._bounds = list(self.dp_model.max_grad_norms.values())
            self._bound = self.dp_model._bound

    def _unclipped(self, norms_GB: Tensor, weight_B: Tensor | None) -> Tensor:
        assert self._recipe.adaptive is not None
        return self._recipe.adaptive.unclipped(norms_GB, self._bounds, weight_B)

    def _release(self, unclipped: Tensor | None) -> float:
        """Account for the step that is complete, before anything of it is used; the std of its noise."""
        if self._bound is not self.dp_model._bound:  # to set a bound and to set it back is a change too
            raise PrivacyError("private: max_grad_norm was changed within a logical batch. Change it between steps.")
        shuffled = isinstance(self._recipe.scheme, ShuffledEpochs)
        step = Step(self._recipe.scheme, self.noise_multiplier, reshuffled=shuffled and self.loader.begins_epoch)
        self._check_budget(step)
        std = self.noise_std
        self.ledger.record(step, max_grad_norm=self.dp_model.max_grad_norm)
        if self._ledger_file is not None:
            self.ledger.save(self._ledger_file)
        self._step += 1
        self._set_bounds(self._next_bounds(unclipped))
        return std

    def _next_bounds(self, unclipped: Tensor | None) -> list[float]:
        adaptive, schedule = self._recipe.adaptive, self._recipe.bound_factor
        if schedule is not None:
            return [bound * schedule(self._step) for bound in self._recipe.bounds]
        if adaptive is None:
            return self._bounds
        return adaptive.updated(
            self._bounds,
            torch.zeros(len(self._bounds), dtype=torch.float64) if unclipped is None else unclipped,
            sensitivity=sensitivity(self.ledger.neighbours),
            expected_batch_size=self.loader.sampler.expected_batch_size,
            noise=self._noise,
        )

    def _check_budget(self, step: Step) -> None:
        target = self._recipe.target_epsilon
        if target is None or self._fits(step, target):
            return
        raise PrivacyError(
            f"private: step {self._step + 1} would exceed epsilon {target:g} at delta "
            f"{self.ledger.target_delta:g} (spent so far: {self.epsilon():.4g}). Training is over: keep the model, "
            "or plan a longer run with more noise."
        )

    def _fits(self, step: Step, target: float) -> bool:
        if self._recipe.noise_factor is constant:
            return self.ledger.steps_left(step, target, accountant=self._recipe.accountant) > 0
        poisson = isinstance(self._recipe.scheme, Poisson) and self.ledger.neighbours is Neighbours.ADD_OR_REMOVE_ONE
        if poisson and self.ledger.after(step, accountant=Accountant.RDP) <= target:
            return True  # an upper bound, and quick
        return self.ledger.after(step, accountant=self._recipe.accountant) <= target

    def _set_bounds(self, bounds: Sequence[float]) -> None:
        names = self.dp_model.max_grad_norms
        self.dp_model.max_grad_norms = dict(zip(names, bounds, strict=True))

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All of the run: ledger (plain JSON), model, optimizer, sampler position, noise, bounds, torch's generators.

        Take it between logical steps. It loads with torch.load(weights_only=True). Without `secure_noise` it holds the
        seed: whoever reads it can take the noise off again.
        """
        return {
            "format": FORMAT,
            "ledger": self.ledger.state_dict(),
            "model": self.dp_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "noise": self._noise.state_dict(),
            "step": self._step,
            "max_grad_norms": dict(self.dp_model.max_grad_norms),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the run of `state`: never with a fresh budget, and bit for bit without `secure_noise`.

        Raises:
            PrivacyError: the state has no ledger, or is of another sampler, relation or delta. Nothing is loaded then.
        """
        if not isinstance(state, dict) or not isinstance(state.get("ledger"), dict):
            raise PrivacyError(
                "private: this checkpoint has no ledger, so what it has spent is not known. Resume from a "
                "private.state_dict()."
            )
        missing = [key for key in self.state_dict() if key not in state]
        if missing or state["format"] != FORMAT:
            raise PrivacyError(
                f"private: not a checkpoint of this version (format {state.get('format')!r}, "
                f"missing: {', '.join(missing) or 'nothing'})."
            )
        ledger = self.ledger.joined(Ledger.from_state_dict(state["ledger"]))
        self.loader.load_state_dict(state["loader"])
        self._noise.load_state_dict(state["noise"])
        self.dp_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.abandon()
        self.ledger.load_state_dict(ledger.state_dict())
        self._step = state["step"]
        self.dp_model.max_grad_norms = state["max_grad_norms"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write state and `extra` with torch.save: after a crash the file is the old or the new one, whole."""
        state = {**extra, **self.state_dict()}
        write_whole(path, lambda file: torch.save(state, file))

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue the run of a file that `save` wrote. Returns what it holds, `extra` included."""
        state = torch.load(path, weights_only=True)
        self.load_state_dict(state)
        return state
