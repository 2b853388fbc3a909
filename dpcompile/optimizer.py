"""The private step: when a logical batch is complete its clipped sum is noised, averaged and given to the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpcompile import records
from dpcompile.errors import PrivacyError
from dpcompile.loader import PhysicalBatch
from dpcompile.runtime import DPModule

NOISE_VARIANCE = "noise_variance"  # key of a param group: of the noise in each coordinate of the gradient


@dataclass
class _Logical:
    """What is known of the logical batch under way."""

    physical: PhysicalBatch | None = None  # handed out, and its `step()` not called yet
    backwards: int = 0  # since it was handed out
    foreign: bool = False  # some gradient is not what the compiled module gave
    complete: bool = False  # the last physical batch was stepped over; gradients are released, or never were there
    counts: Tensor | None = None  # adaptive clipping: [G] unclipped samples so far


SLACK = 1.01
"""Of the length of a sum of clipped gradients, for rounding in narrow types."""
Release = Callable[[Tensor | None], float]  # unclipped counts -> std of the noise to add to the sum


class PrivateOptimizer(Optimizer):
    """Any torch optimizer, stepping on noisy means of clipped gradients. Made by `make_private`.

    `step()` and `zero_grad()` are called for every physical batch; while the logical batch is incomplete they leave
    the gradients to accumulate. Shares param groups and state with the optimizer it wraps: lr schedulers work on
    either. `released` says whether the last `step()` updated the parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dp_model: DPModule,
        release: Release,
        noised: Callable[[Tensor, float], Tensor],
        divisor: float,
        count_unclipped: Callable[[Tensor, Tensor | None], Tensor] | None,
    ) -> None:
        # Not Optimizer.__init__, which would build param groups of its own.
        self.inner = optimizer
        self.released = False
        self._dp_model = dp_model
        self._release = release
        self._noised = noised
        self._divisor = divisor
        self._count_unclipped = count_unclipped
        self._logical = _Logical(complete=True)
        self._stepping = False
        self.defaults = optimizer.defaults
        self.parameters = [p for p in dp_model.parameters() if p.requires_grad]
        self._accumulations = dict.fromkeys(map(id, self.parameters), 0)  # since the physical batch was handed out
        records.observe(dp_model._handle, self._on_backward)
        for p in self.parameters:
            p.register_hook(self._on_gradient)
            p.register_post_accumulate_grad_hook(self._on_accumulation)
        optimizer.register_step_pre_hook(self._refuse_plain_step)

    # torch.amp.GradScaler asks for the first, and then sets the second before it steps
    _step_supports_amp_scaling = True

    @property
    def grad_scale(self) -> float:
        return 1.0

    @grad_scale.setter
    def grad_scale(self, _scale: Any) -> None:
        raise PrivacyError(
            "optimizer: no GradScaler in private training: a scaled loss is clipped after scaling, and a step that is "
            "skipped for an infinity depends on the data. Use bfloat16 (torch.autocast), which needs none."
        )

    # shared with the wrapped optimizer, which replaces both when its state is loaded
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.state

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise PrivacyError(
            "optimizer: the parameters of a private run are fixed when it is compiled. Compile again for new ones."
        )

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise PrivacyError("optimizer: a private optimizer is not copied or pickled. Save private.state_dict().")

    # ------------------------------------------------------------ the loop

    def on_batch(self, batch: PhysicalBatch) -> bool:
        """The loader hands out a physical batch. Returns whether a logical batch begins with it."""
        logical = self._logical
        begins = logical.complete
        if begins:
            self._clear()
            logical = self._logical = _Logical()
        if logical.physical is not None and logical.backwards:
            raise PrivacyError(
                "optimizer: the last batch had a backward but no private.optimizer.step(). Call it for every batch of "
                "private.loader: it knows when the logical batch is complete."
            )
        logical.physical, logical.backwards = batch, 0
        records.hand_nothing(self._dp_model._handle)
        self._accumulations = dict.fromkeys(map(id, self.parameters), 0)
        self._dp_model._weight = batch.weights
        return begins

    def abandon(self) -> None:
        """A new pass over the loader begins: what was not completed is not released."""
        self._logical = _Logical(complete=True)
        self._clear()

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Noise, average and update, if the logical batch is complete; else nothing.

        Raises:
            PrivacyError: the target epsilon would be exceeded, or gradients did not come from exactly one backward of
                the compiled module for each batch of the private loader. Nothing is released then.
        """
        self.released = False
        if closure is not None:
            raise PrivacyError("optimizer: step(closure) computes gradients anew, several times. Call step() alone.")
        logical = self._logical
        batch = logical.physical
        if batch is None:
            raise PrivacyError(
                "optimizer: step() without a batch of private.loader, so nothing is known of how its samples were "
                "chosen. Iterate over private.loader, and call step() once for each batch."
            )
        if logical.foreign or max(self._accumulations.values()) > logical.backwards:
            raise PrivacyError(
                "optimizer: there are gradients that did not come from the compiled module. Call it, and not the "
                "model that it was made from; a penalty on weights belongs into loss_fn, or "
                "into the optimizer (weight_decay)."
            )
        logical.physical = None
        if not batch.last:
            return
        logical.complete = True
        self._check_size(batch)
        std = self._release(logical.counts)
        self._write_noisy_means(std)
        self._stepping = True
        try:
            self.inner.step()
        finally:
            self._stepping = False
        self.released = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless a logical batch is incomplete: they are its sum so far."""
        if self._logical.complete:
            self.inner.zero_grad(set_to_none)

    # ------------------------------------------------------------

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _write_noisy_means(self, std: float) -> None:
        """p.grad = (sum + noise) / divisor for every trainable parameter, whether a sample reached it or not.

        And, once for each logical batch, the gradient of a penalty in the loss.
        """
        for p in self.parameters:
            total = torch.zeros_like(p) if p.grad is None else p.grad
            noisy = self._noised(total, std)
            p.grad = noisy.div_(self._divisor).to(p.dtype)
        penalties = self._dp_model.penalty_gradients()
        for name, p in self._dp_model.named_parameters():
            if name in penalties:
                assert p.grad is not None
                p.grad.add_(penalties[name])
        for group in self.param_groups:
            if NOISE_VARIANCE in group:
                group[NOISE_VARIANCE] = (std / self._divisor) ** 2

    def _check_size(self, batch: PhysicalBatch) -> None:
        """No sum of clipped gradients is longer than the bound for every sample. All that a compiled backward shows."""
        squares = [p.grad.detach().double().square().sum() for p in self.parameters if p.grad is not None]
        most = batch.logical_size * self._dp_model.max_grad_norm
        if squares and torch.stack(squares).sum().sqrt() > SLACK * most:
            raise PrivacyError(
                f"optimizer: the sum of {batch.logical_size} clipped gradients is longer than {most:.4g}, so there are "
                "gradients in it that did not come from the compiled module. Nothing was released."
            )

    def _on_gradient(self, gradient: Tensor | None) -> None:
        if gradient is None:  # of a parameter that no sample meets
            return
        if records.is_handed(self._dp_model._handle, gradient) is False:
            self._logical.foreign = True

    def _on_accumulation(self, p: Tensor) -> None:
        self._accumulations[id(p)] += 1

    def _on_backward(self, norms_GB: Tensor) -> None:
        logical = self._logical
        batch = logical.physical
        logical.backwards += 1
        if batch is None:
            raise PrivacyError(
                "optimizer: a backward without a batch of private.loader, so nothing is known of how its samples were "
                "chosen. Iterate over private.loader."
            )
        if logical.backwards > 1:
            raise PrivacyError(
                "optimizer: a second backward for one batch of private.loader, so its samples would count twice. "
                "Add the losses and call backward once; evaluate in eval mode or under torch.no_grad()."
            )
        rows = batch.size if batch.weights is None else len(batch.weights)
        if norms_GB.shape[1] > rows:
            raise PrivacyError(
                f"optimizer: {norms_GB.shape[1]} samples in a backward of a batch of {rows}. For several views of "
                "one sample compile with views=."
            )
        if self._count_unclipped is not None:
            weights = None if batch.weights is None else batch.weights[: norms_GB.shape[1]]
            counts = self._count_unclipped(norms_GB, weights)
            logical.counts = counts if logical.counts is None else logical.counts + counts

    def _refuse_plain_step(self, *_: Any) -> None:
        if not self._stepping:
            raise PrivacyError("optimizer: step() of the plain optimizer adds no noise. Call private.optimizer.step().")


class AdamBC(Optimizer):
    """Adam whose second moment is freed of the noise variance (DP-AdamBC).

    Tang, Shpilevskiy and Lecuyer 2024, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)",
    arXiv:2312.14334, algorithm 1: update = m_hat / sqrt(max(v_hat - noise variance, floor)).

    Args:
        floor: gamma', smallest second moment; the paper's gamma' is the square root's lower bound squared.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Expected lr={lr!r} >= 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Expected betas={betas!r} in [0, 1).")
        if not 0 < floor < math.inf:
            raise ValueError(f"Expected floor={floor!r} > 0.")
        defaults = {"lr": lr, "betas": betas, "floor": floor, "weight_decay": weight_decay, NOISE_VARIANCE: 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                count = state["step"].item()
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1**count)
                second = state["exp_avg_sq"] / (1 - beta2**count)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mean / (second - group[NOISE_VARIANCE]).clamp(min=group["floor"]).sqrt())
        return loss
