"""The truth to compare with: per-sample gradients taken one sample at a time, in float64, by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import Case, Inputs, call, cast, map_inputs

RTOL = {torch.float32: 1e-4, torch.float64: 1e-8}


class NoSinglePrecision(TorchFunctionMode):
    """Casts to float32 go to float64: Llama and T5 take their norms in float32 whatever the type of the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        given = {key: _double(value) for key, value in (kwargs or {}).items()}
        return func(*map(_double, args), **given)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def arithmetic_of(dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context in which a model of this type computes in this type throughout."""
    return NoSinglePrecision() if dtype is torch.float64 else nullcontext()


@dataclass(frozen=True)
class PerSampleGradients:
    """Gradient of each sample's own loss for each trainable parameter, by name: shape [B, *parameter.shape]."""

    grads: dict[str, Tensor]

    @property
    def norms(self) -> Tensor:
        """Norm of each sample's gradient over all parameters together, shape [B]."""
        return sum(g.unsqueeze(-1).flatten(1).square().sum(1) for g in self.grads.values()).sqrt()

    def clipped_sum(self, max_grad_norm: float) -> dict[str, Tensor]:
        """sum_i min(1, max_grad_norm / norm_i) * g_i, by parameter name."""
        scale_B = (max_grad_norm / self.norms).clamp(max=1.0)  # a norm of zero gives inf, hence 1
        return {name: torch.tensordot(scale_B, g, 1) for name, g in self.grads.items()}

    def splitting_norm(self) -> float:
        """A clipping bound halfway between two of the norms in the middle: some samples are clipped and some not.

        Norms of next to nothing are zero in theory, and a bound like them would measure noise; 1 where all are, as
        those of a network of dead units.
        """
        norms = self.norms[self.norms > 1e-9 * self.norms.max()].sort().values if len(self.norms) else self.norms
        middle = len(norms) // 2
        return norms[max(middle - 1, 0) : middle + 1].mean().item() if len(norms) else 1.0


def per_sample_gradients(
    model: nn.Module, loss: Callable[[Any, Tensor], Tensor], inputs: Inputs, targets: Tensor
) -> PerSampleGradients:
    """Obviously right and slow. Parameters count once, under their first name, however many modules share them."""
    model = copy.deepcopy(model).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(targets)):
        one = map_inputs(lambda x, i=i: cast(x, torch.float64)[i : i + 1], inputs)
        value = loss(call(model, one), cast(targets, torch.float64)[i : i + 1]).sum()
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            rows[name].append(grad)
    empty = {name: p.new_zeros(0, *p.shape) for name, p in parameters.items()}
    return PerSampleGradients({name: torch.stack(row) if row else empty[name] for name, row in rows.items()})


_truths: WeakKeyDictionary[nn.Module, dict[tuple[int, int, torch.dtype], PerSampleGradients]] = WeakKeyDictionary()


def truth_of(case: Case, batch_size: int, seed: int = 0) -> PerSampleGradients:
    """The truth for a batch of a case, whose parameters no test changes: worked out once for all norm methods."""
    known = _truths.setdefault(case.model, {})
    key = (batch_size, seed, next(case.model.parameters()).dtype)
    if key not in known:
        inputs, targets = case.batch(batch_size, seed)
        known[key] = per_sample_gradients(case.model, case.loss, inputs, targets)
    return known[key]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """`p.grad` of every trainable parameter by name; a parameter without one counts as zero."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable.items()}


def assert_close(actual: Tensor, expected: Tensor, rtol: float, name: str, floor: float = 0.0) -> None:
    """The largest difference is at most `rtol` times the largest expected value (or `floor`, if that is larger)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    size = max(expected.abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    error = (actual.double() - expected.double()).abs().max().item() / size
    assert error <= rtol, f"{name}: relative error {error:.2e}, allowed {rtol:.0e}"


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, contribution: float = 0.0
) -> None:
    """Compare parameter by parameter.

    A gradient that is zero in theory (a key bias under softmax) is rounding noise, so errors are never measured
    against less than a thousandth of the largest gradient of the model; nor, where samples may cancel as a whole (all
    of one number, clipped to +R and -R), of the contribution of one.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max((g.abs().max().item() for g in expected.values() if g.numel()), default=0.0)
    floor = max(floor, 1e-3 * contribution)
    for name, grad in expected.items():
        assert_close(actual[name], grad, rtol, name, floor)


def run_step(
    case: Case, dp_model: nn.Module, inputs: Inputs, targets: Tensor, loss_reduction: str, fused: bool
) -> None:
    """One training step of the compiled model from cleared gradients, in the split or the fused form."""
    case.model.zero_grad()
    if fused:
        loss = call(dp_model, inputs, targets=targets)
    else:
        losses_B = case.loss(call(dp_model, inputs), targets)
        loss = losses_B.mean() if loss_reduction == "mean" else losses_B.sum()
    loss.backward()


def check_against_oracle(
    case: Case,
    dp_model: nn.Module,
    batch_size: int,
    *,
    max_grad_norm: float,
    loss_reduction: str = "mean",
    fused: bool = False,
    seed: int = 0,
) -> None:
    """Norms and clipped gradients of one step agree with the oracle, to the tolerance of the model's own type."""
    inputs, targets = case.batch(batch_size, seed)
    rtol = RTOL[next(case.model.parameters()).dtype]
    truth = truth_of(case, batch_size, seed)
    divisor = max(batch_size, 1) if loss_reduction == "mean" else 1

    run_step(case, dp_model, inputs, targets, loss_reduction=loss_reduction, fused=fused)

    assert_close(dp_model.per_sample_norms, truth.norms, rtol, "per_sample_norms")
    expected = {name: g / divisor for name, g in truth.clipped_sum(max_grad_norm).items()}
    assert_same_gradients(gradients(case.model), expected, rtol)


def check_against_autograd(
    case: Case,
    dp_model: nn.Module,
    batch_size: int,
    *,
    loss_reduction: str = "mean",
    fused: bool = False,
    seed: int = 0,
) -> None:
    """A model compiled with an infinite bound leaves the gradients that plain autograd leaves."""
    inputs, targets = case.batch(batch_size, seed)
    run_step(case, case.model, inputs, targets, loss_reduction=loss_reduction, fused=False)
    expected = {name: g.clone() for name, g in gradients(case.model).items()}

    run_step(case, dp_model, inputs, targets, loss_reduction=loss_reduction, fused=fused)

    assert_same_gradients(gradients(case.model), expected, RTOL[next(case.model.parameters()).dtype])


def splitting_norm(case: Case, batch_size: int, seed: int = 0) -> float:
    """A clipping bound under which some samples of that batch are clipped and some are not."""
    return truth_of(case, batch_size, seed).splitting_norm()
