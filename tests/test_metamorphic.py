"""What must hold between steps of one compiled model, whatever its gradients are: no oracle is needed.

Every relation holds in float32, for ghost and for explicit norms, on four small models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from layers import Apply, TiedLanguageModel, compile_all, loss_at
from torch import Tensor, nn

from dpcompile import DPCompileError, DPModule, dpcompile

B = 6
METHODS = ("ghost", "explicit")
TIGHT = 1e-6
SHORT = 1e-5  # by so much a contribution may stay below its bound: norms are rounded up


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, 3)
    )


def lstm() -> nn.Module:
    return Apply(
        lambda m, x: m.head(m.lstm(x)[0][:, -1]),
        modules={"lstm": nn.LSTM(3, 4, batch_first=True), "head": nn.Linear(4, 2)},
    )


def with_positions() -> nn.Module:
    """A table of positions that is the same for every sample, and a scale."""
    return Apply(
        lambda m, x: m.head((x + m.places(torch.arange(4))).tanh() * m.scale),
        modules={"places": nn.Embedding(4, 4), "head": nn.Linear(4, 3)},
        scale=(4,),
    )


def ids(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(6, (size, 3), generator=generator)


def randn(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda size, generator: torch.randn(size, *shape, generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], Tensor]]] = {
    "cnn": (cnn, randn(2, 5, 5)),
    "tied": (TiedLanguageModel, ids),
    "lstm": (lstm, randn(2, 3)),
    "positions": (with_positions, randn(4, 4)),
}


@dataclass(frozen=True)
class Subject:
    """A compiled model, and a step of it: the sum of clipped gradients as one vector in float64, and the norms."""

    model: nn.Module
    dp_model: DPModule
    make: Callable[[int, torch.Generator], Tensor]
    bound: float  # clips some samples and others not

    def batch(self, size: int = B, seed: int = 0) -> Tensor:
        return self.make(size, torch.Generator().manual_seed(seed))

    def step(self, x: Tensor, bound: float | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        self.dp_model.max_grad_norm = bound or self.bound
        self.model.zero_grad()
        (self.losses(x) * scale).sum().backward()
        return self.gradient(), self.dp_model.per_sample_norms

    def losses(self, x: Tensor) -> Tensor:
        return loss_at(0)(self.dp_model(x))

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None])

    def assert_near(self, actual: Tensor, expected: Tensor, rtol: float = TIGHT) -> None:
        """The difference as a vector is at most `rtol` of the expected vector, or of one contribution."""
        error = (actual - expected).norm().item() / max(expected.norm().item(), self.bound)
        assert error <= rtol, f"relative error {error:.1e}"


@functools.cache
def compiled(name: str) -> dict[str, Subject]:
    make_model, make_batch = MODELS[name]
    torch.manual_seed(0)
    model = make_model()
    emitted = compile_all(model, make_batch(3, torch.Generator()), methods=METHODS).emitted
    made = {method: Subject(model, DPModule(model, emitted[method]), make_batch, 1.0) for method in METHODS}
    _, norms = made["explicit"].step(made["explicit"].batch())
    return {method: replace(subject, bound=norms.median().item() * 1.01) for method, subject in made.items()}


@pytest.fixture(params=[(name, method) for name in MODELS for method in METHODS], ids="-".join)
def subject(request: pytest.FixtureRequest) -> Subject:
    name, method = request.param
    return compiled(name)[method]


@pytest.mark.slow
def test_ghost_and_explicit_are_two_ways() -> None:
    for name in MODELS:
        ghost, explicit = (compiled(name)[method].dp_model.plan for method in METHODS)
        chosen = [{choice.method.ghost for choice in plan.choices.values()} for plan in (ghost, explicit)]
        assert True in chosen[0]
        assert True not in chosen[1]


def test_the_bound_clips_some_samples(subject: Subject) -> None:
    _, norms = subject.step(subject.batch())
    assert norms.min() < subject.bound < norms.max()


def test_without_a_bound_it_is_autograd(subject: Subject) -> None:
    x = subject.batch()
    found, _ = subject.step(x, bound=math.inf)
    subject.model.zero_grad()
    loss_at(0)(subject.model(x)).sum().backward()
    subject.assert_near(found, subject.gradient())


def test_a_tiny_bound_gives_directions_alone(subject: Subject) -> None:
    x, tiny = subject.batch(), 1e-3
    directions = []
    for i in range(B):
        raw, norms = subject.step(x[i : i + 1], bound=math.inf)
        clipped, _ = subject.step(x[i : i + 1], bound=tiny)
        assert 1 - SHORT <= clipped.norm().item() / tiny <= 1 + TIGHT
        torch.testing.assert_close(clipped / clipped.norm(), raw / raw.norm(), rtol=0, atol=TIGHT)
        assert norms.item() == pytest.approx(raw.norm().item(), rel=SHORT)
        directions.append(clipped)
    together, _ = subject.step(x, bound=tiny)
    torch.testing.assert_close(together, torch.stack(directions).sum(0), rtol=0, atol=tiny * TIGHT)


def test_one_sample_more_or_less_moves_the_sum_by_the_bound_at_most(subject: Subject) -> None:
    x = subject.batch()
    for bound in (subject.bound, 1e-2):
        total, norms = subject.step(x, bound)
        for i in range(B):
            without, _ = subject.step(torch.cat([x[:i], x[i + 1 :]]), bound)
            moved = (total - without).norm().item()
            assert moved <= bound * (1 + TIGHT)
            assert moved == pytest.approx(min(bound, norms[i].item()), rel=1e-4)


def test_scaling_the_loss_scales_the_norms(subject: Subject) -> None:
    x = subject.batch()
    raw, norms = subject.step(x, bound=math.inf)
    for scale in (0.25, 3.0, 1e3, -2.0):
        scaled, scaled_norms = subject.step(x, bound=math.inf, scale=scale)
        torch.testing.assert_close(scaled_norms, abs(scale) * norms, rtol=TIGHT, atol=0)
        subject.assert_near(scaled / scale, raw)
        bounded, _ = subject.step(x, bound=abs(scale) * subject.bound, scale=scale)
        subject.assert_near(bounded / scale, subject.step(x)[0])


def test_a_sample_twice_counts_twice(subject: Subject) -> None:
    x = subject.batch()
    total, norms = subject.step(x)
    for i in (0, B - 1):
        part, _ = subject.step(x[i : i + 1])
        twice, twice_norms = subject.step(torch.cat([x, x[i : i + 1]]))
        subject.assert_near(twice, total + part)
        torch.testing.assert_close(twice_norms, torch.cat([norms, norms[i : i + 1]]), rtol=TIGHT, atol=0)


def test_the_order_of_samples_does_not_matter(subject: Subject) -> None:
    x = subject.batch()
    total, norms = subject.step(x)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    permuted, permuted_norms = subject.step(x[order])
    subject.assert_near(permuted, total)
    torch.testing.assert_close(permuted_norms, norms[order], rtol=TIGHT, atol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up(subject: Subject, size: int) -> None:
    x = subject.batch()
    total, norms = subject.step(x)
    steps = [subject.step(part) for part in x.split(size)]
    subject.assert_near(torch.stack([gradient for gradient, _ in steps]).sum(0), total)
    torch.testing.assert_close(torch.cat([own for _, own in steps]), norms, rtol=TIGHT, atol=0)


def test_a_sample_has_one_norm_wherever_it_stands(subject: Subject) -> None:
    """Alone, first, last, and among thousands."""
    x, others = subject.batch(1), subject.batch(3000, seed=1)
    _, alone = subject.step(x)
    for before in (0, 1, 1339, 3000):
        _, norms = subject.step(torch.cat([others[:before], x, others[before:]]))
        torch.testing.assert_close(norms[before : before + 1], alone, rtol=TIGHT, atol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_no_size_is_left_of_the_sample(subject: Subject, size: int) -> None:
    """Compiled with three samples, run with any number of them."""
    x = subject.batch(size)
    _, norms = subject.step(x)
    truth = []
    for one in x.split(1):
        subject.model.zero_grad()
        loss_at(0)(subject.model(one)).sum().backward()
        truth.append(subject.gradient().norm())
    torch.testing.assert_close(norms.double(), torch.stack(truth), rtol=SHORT, atol=0)


def test_two_backwards_add_up(subject: Subject) -> None:
    x, other = subject.batch(), subject.batch(4, seed=1)
    first, second = subject.step(x)[0], subject.step(other)[0]
    subject.model.zero_grad()
    subject.losses(x).sum().backward()
    subject.losses(other).sum().backward()
    subject.assert_near(subject.gradient(), first + second)


def test_a_step_leaves_nothing_for_the_next(subject: Subject) -> None:
    """The same numbers, bit for bit, whatever was done in between."""
    x = subject.batch()
    gradient, norms = subject.step(x)
    norms = norms.clone()
    subject.step(100 * x if x.is_floating_point() else x.flip(0), bound=1e-4)
    subject.step(subject.batch(1, seed=2), bound=math.inf)
    subject.step(subject.batch(0))
    subject.losses(subject.batch(3, seed=3))  # a forward without its backward
    with torch.no_grad():
        subject.dp_model(subject.batch(5, seed=4))
    again, again_norms = subject.step(x)
    assert torch.equal(again, gradient)
    assert torch.equal(again_norms, norms)


class Skips(nn.Module):
    """A layer that is left out while `use` is False."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.use = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.head(self.second(x).tanh() if self.use else x)


def test_a_layer_that_a_flag_leaves_out_is_noticed_and_leaves_nothing_behind() -> None:
    """A step of the graph with the layer is refused once the flag is changed, and the same as ever with it back.

    Compiled again it follows the flag, and the layer that is left out has neither norm nor gradient of a step before.
    """
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(B, 4)

    def subject_of_now() -> Subject:
        dp_model = dpcompile(model, x, norm_method="ghost", loss_reduction="sum")
        return Subject(model, dp_model, randn(4), 0.5)

    longer = subject_of_now()
    gradient, norms = longer.step(x)
    norms = norms.clone()
    model.use = False
    with pytest.raises(DPCompileError, match="`use` was True and is False now"):
        longer.dp_model(x)

    shorter = subject_of_now()
    total, _ = shorter.step(x)
    assert model.second.weight.grad is None
    assert shorter.dp_model.plan.unused == ("second.weight", "second.bias")
    shorter.assert_near(total, torch.stack([shorter.step(x[i : i + 1])[0] for i in range(B)]).sum(0))
    raw = torch.stack([shorter.step(x[i : i + 1], bound=math.inf)[0].norm() for i in range(B)])
    torch.testing.assert_close(shorter.step(x)[1].double(), raw, rtol=SHORT, atol=0)

    model.use = True
    again, again_norms = longer.step(x)
    assert torch.equal(again, gradient)
    assert torch.equal(again_norms, norms)
