"""A penalty on the parameters in the fused loss: outside the clip, and once in the gradient of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from selection import every
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from dpcompile import DPModule, dpcompile, make_private

R = 0.1
N = 40
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, generator=GENERATOR)
Y = torch.randint(3, (N,), generator=GENERATOR)


class Net(nn.Module):
    """With a parameter that no sample meets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))
        self.spare = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def ridge(model: nn.Module) -> Tensor:
    return 0.1 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


def orthogonality(model: nn.Module) -> Tensor:
    weight = model.get_parameter("layers.0.weight")
    return (weight.T @ weight - torch.eye(weight.shape[1])).norm()


Loss = Callable[[Tensor, Tensor], Tensor]

# penalty -> the whole loss, the loss of the samples, what is left of the penalty
LOSSES: dict[str, Callable[[Callable[[], Tensor]], tuple[str, Loss, Loss, float]]] = {
    "added": lambda p: ("mean", lambda o, y: F.cross_entropy(o, y) + p(), F.cross_entropy, 1.0),
    "added to": lambda p: ("mean", lambda o, y: p() + F.cross_entropy(o, y), F.cross_entropy, 1.0),
    "scaled with it": lambda p: (
        "mean",
        lambda o, y: 0.5 * (F.cross_entropy(o, y) + p()) / 2,
        lambda o, y: 0.25 * F.cross_entropy(o, y),
        0.25,
    ),
    "subtracted, twice": lambda p: (
        "sum",
        lambda o, y: -(p() - F.cross_entropy(o, y, reduction="sum")) - p(),
        lambda o, y: F.cross_entropy(o, y, reduction="sum"),
        -2.0,
    ),
    "before a second sum": lambda p: (
        "mean",
        lambda o, y: (F.cross_entropy(o, y) + p()) + o.square().mean(),
        lambda o, y: F.cross_entropy(o, y) + o.square().mean(),
        1.0,
    ),
}


def compiled(model: nn.Module, loss_fn: Loss, reduction: str = "mean", **options: float) -> DPModule:
    return dpcompile(model, X[:4], loss_fn=loss_fn, sample_targets=Y[:4], loss_reduction=reduction, **options)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("backend", "form", "penalty"),
    [
        *((None, form, ridge) for form in list(LOSSES)[::2]),
        *(pytest.param(None, form, ridge, marks=pytest.mark.slow) for form in list(LOSSES)[1::2]),
        pytest.param(None, "scaled with it", orthogonality, marks=pytest.mark.slow),
        pytest.param("aot_eager", "added", orthogonality, marks=pytest.mark.slow),
        pytest.param("aot_eager", "subtracted, twice", ridge, marks=pytest.mark.slow),
    ],
)
def test_it_is_added_once_and_not_clipped(backend: str | None, form: str, penalty: Callable[..., Tensor]) -> None:
    model = Net()
    reduction, whole, own, share = LOSSES[form](lambda: penalty(model))
    dp_model = compiled(model, whole, reduction, max_grad_norm=R)
    without = compiled(model, own, reduction, max_grad_norm=R)
    call = dp_model if backend is None else torch.compile(dp_model, backend=backend, fullgraph=True)
    for size in (6, 1):
        x, y = X[:size], Y[:size]
        found = gradients(model, lambda x=x, y=y: call(x, targets=y))
        clipped = gradients(model, lambda x=x, y=y: without(x, targets=y))
        added = gradients(model, lambda: share * penalty(model))
        for name, p in model.named_parameters():
            wanted = clipped.get(name, torch.zeros_like(p)) + added.get(name, torch.zeros_like(p))
            torch.testing.assert_close(found.get(name, torch.zeros_like(p)), wanted)
        torch.testing.assert_close(dp_model.per_sample_norms, without.per_sample_norms)
        torch.testing.assert_close(call(x, targets=y), whole(model(x), y))


def test_without_a_clip_it_is_plain_autograd() -> None:
    model = Net()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + ridge(model)

    dp_model = compiled(model, loss_fn, max_grad_norm=float("inf"))
    found = gradients(model, lambda: dp_model(X, targets=Y))
    plain = gradients(model, lambda: loss_fn(model(X), Y))
    assert found.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize(("reduction", "physical"), every(3, itertools.product(("mean", "sum"), (3, 64))))
def test_a_private_step_adds_it_once(physical: int, reduction: str) -> None:
    """However many physical batches a logical one has, none included."""
    model = Net()

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    steps = []
    for loss_fn in (own, lambda o, y: own(o, y) + ridge(model)):
        model.load_state_dict(Net().state_dict())
        dp_model = compiled(model, loss_fn, reduction)
        optimizer = SGD(model.parameters(), lr=0.0)
        private = make_private(
            dp_model,
            optimizer,
            TensorDataset(X, Y),
            sample_rate=0.1,
            noise_multiplier=1.0,
            target_delta=1e-3,
            max_physical_batch=physical,
            seed=0,
        )
        steps.append([])
        for x, y in private.loader:
            dp_model(x, targets=y).backward()
            private.optimizer.step()
            if private.optimizer.released:
                steps[-1].append([p.grad.clone() for p in model.parameters()])
            private.optimizer.zero_grad()
    added = list(gradients(model, lambda: ridge(model)).values())
    assert len(steps[0]) == len(steps[1]) > 5
    for plain, with_penalty in zip(*steps, strict=True):
        for a, b, wanted in zip(plain, with_penalty, added, strict=True):
            torch.testing.assert_close(b - a, wanted, atol=1e-5, rtol=1e-4)
