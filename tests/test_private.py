"""make_private: the loop, what it adds up to, what it costs, and wrong use."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from selection import every
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dpcompile import DPCompileError, DPModule, PrivacyError, Private, dpcompile, make_private
from dpcompile.accountant import Accountant, epsilon
from dpcompile.adaptive import AdaptiveClipping
from dpcompile.optimizer import AdamBC
from dpcompile.sampling import PoissonSampler
from dpcompile.schemes import Poisson, Stated, Step

N, WIDTH, CLASSES, RATE = 60, 5, 3, 0.3
DELTA = 1e-3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, WIDTH, generator=GENERATOR)
Y = torch.randint(CLASSES, (N,), generator=GENERATOR)
DATA = TensorDataset(X, Y)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))


COMPILED = dpcompile(net(), X[:4], max_grad_norm=0.5)
"""Compiled once; every test takes a copy."""


def compiled(**options: Any) -> DPModule:
    return dpcompile(net(), X[:4], max_grad_norm=0.5, **options) if options else copy.deepcopy(COMPILED)


def run(
    dp_model: DPModule | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    data: Any = DATA,
    **options: Any,
) -> Private:
    dp_model = dp_model or compiled()
    defaults = {"sample_rate": RATE, "target_delta": DELTA, "noise_multiplier": 1.0, "seed": 0}
    if "sampling" in options or "batch_size" in options:
        del defaults["sample_rate"]
    made = optimizer(dp_model.parameters(), lr=0.1)
    return make_private(dp_model, made, data, **{**defaults, **options})


def step(private: Private, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(private.dp_model(x), y)
    if len(x) == 0:
        loss = private.dp_model(x).sum()
    loss.backward()
    private.optimizer.step()
    private.optimizer.zero_grad()


def train(private: Private, epochs: int = 1, after: Callable[[], None] = lambda: None) -> list[Tensor]:
    for _ in range(epochs):
        for x, y in private.loader:
            step(private, x, y)
            after()
    return [p.detach().clone() for p in private.dp_model.parameters()]


def noise_free(private: Private) -> Private:
    """The same run with noise of zero, to see the sums."""
    private.optimizer._noised = lambda total, std: total.clone()
    return private


def clipped_sum(indices: list[int]) -> list[Tensor]:
    """One sample at a time, in float64, by plain autograd."""
    model = net().double()
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in indices:
        loss = F.cross_entropy(model(X[i : i + 1].double()), Y[i : i + 1])
        grads = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        for t, g in zip(total, grads, strict=True):
            t += min(1.0, 0.5 / norm) * g
    return total


# ---------------------------------------------------------------- the sum


@pytest.mark.parametrize("options", [{}, {"pad": True}], ids=["ragged", "padded"])
@pytest.mark.parametrize("physical", [1, 7, 64])
def test_a_step_releases_the_clipped_sum_over_the_logical_batch(physical: int, options: dict[str, Any]) -> None:
    private = noise_free(run(max_physical_batch=physical, **options))
    indices = PoissonSampler(N, RATE, seed=0).draw()
    wanted = [-0.1 * g / (RATE * N) for g in clipped_sum(indices)]
    before = [p.detach().clone() for p in private.dp_model.parameters()]

    for x, y in private.loader:
        step(private, x, y)
        if private.optimizer.released:
            break

    assert private.released_steps == 1
    for p, old, w in zip(private.dp_model.parameters(), before, wanted, strict=True):
        torch.testing.assert_close((p - old).double(), w, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("groups", ["flat", "per-layer"])
def test_micro_batches_train_the_same_model(groups: str) -> None:
    dp_model = compiled(clip_groups=groups)
    whole = train(run(copy.deepcopy(dp_model)), 2)
    for physical, pad in ((1, False), (7, False), (7, True), (64, True)):
        private = run(copy.deepcopy(dp_model), max_physical_batch=physical, pad=pad)
        for a, b in zip(train(private, 2), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_fused_form_trains_the_same_model() -> None:
    def losses(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none")

    fused = run(compiled(loss_fn=losses, sample_targets=Y[:4]), max_physical_batch=7)
    for x, y in fused.loader:
        fused.dp_model(x, targets=y).backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
    for a, b in zip(fused.dp_model.parameters(), train(run()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", every(2, [False, True]), ids=["split", "fused"])
def test_a_compiled_module_trains_the_same_model_and_is_compiled_once_when_padded(fused: bool) -> None:
    extra = {"loss_fn": lambda out, y: F.cross_entropy(out, y, reduction="none"), "sample_targets": Y[:4]}
    private = run(compiled(**extra if fused else {"norm_method": "ghost"}), max_physical_batch=8, pad=True)
    forward = torch.compile(private.dp_model, fullgraph=True, backend="aot_eager")
    for i, (x, y) in enumerate(private.loader):
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            loss = forward(x, targets=y) if fused else F.cross_entropy(forward(x), y)
        loss.backward()
        private.optimizer.step()
        private.optimizer.zero_grad()
    for a, b in zip(private.dp_model.parameters(), train(run(max_physical_batch=8)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_sum_is_not_divided() -> None:
    mean, total = noise_free(run()), noise_free(run(compiled(loss_reduction="sum")))
    for private, reduction in ((mean, "mean"), (total, "sum")):
        x, y = next(iter(private.loader))
        F.cross_entropy(private.dp_model(x), y, reduction=reduction).backward()
        private.optimizer.step()
    for p, q in zip(mean.dp_model.parameters(), total.dp_model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad, p.grad * RATE * N, rtol=1e-4, atol=1e-6)


def test_empty_logical_batches_are_steps_of_noise_alone() -> None:
    private = run(sample_rate=0.005, noise_multiplier=2.0)
    sizes = []
    for x, y in private.loader:
        sizes.append(len(x))
        step(private, x, y)
        if len(sizes) == 20:
            break
    assert 0 in sizes
    assert private.released_steps == 20
    assert all(p.isfinite().all() for p in private.dp_model.parameters())


# ---------------------------------------------------------------- the noise


@pytest.mark.parametrize("secure", [False, True], ids=["seeded", "secure"])
def test_noise_has_the_stated_deviation_for_every_parameter_and_step(secure: bool) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(WIDTH, 200), nn.Linear(200, CLASSES))
    options: dict[str, Any] = {"secure_noise": True, "seed": None} if secure else {}
    dp_model = dpcompile(wide, X[:4], max_grad_norm=0.5, clip_groups="per-layer")
    private = run(dp_model, sample_rate=0.001, noise_multiplier=3.0, **options)
    assert private.noise_std == pytest.approx(3.0 * 0.5, rel=1e-6)
    found: list[list[Tensor]] = []
    for x, _ in private.loader:
        if len(x):
            continue
        private.dp_model(x).sum().backward()
        private.optimizer.step()
        found.append([p.grad.flatten() * 0.001 * N for p in dp_model.parameters() if p.grad is not None])
        if len(found) == 12:
            break
    assert len(found) == 12
    steps = torch.stack([torch.cat(grads) for grads in found])
    assert steps.std().item() == pytest.approx(1.5, rel=4 / math.sqrt(2 * steps.numel()))
    correlation = torch.corrcoef(steps) - torch.eye(len(steps))
    assert correlation.abs().max().item() < 5 / math.sqrt(steps.shape[1])
    for index in range(4):
        own = torch.stack([grads[index] for grads in found])
        assert own.std().item() == pytest.approx(1.5, rel=5 / math.sqrt(2 * own.numel()))


def test_noise_is_drawn_in_float32_for_a_bfloat16_model() -> None:
    dp_model = dpcompile(net().bfloat16(), X[:4].bfloat16(), max_grad_norm=0.5)
    private = run(dp_model, data=TensorDataset(X.bfloat16(), Y))
    drawn: list[torch.dtype] = []
    noised = private.optimizer._noised
    private.optimizer._noised = lambda total, std: (drawn.append((out := noised(total, std)).dtype), out)[1]
    x, y = next(iter(private.loader))
    step(private, x, y)
    assert set(drawn) == {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in dp_model.parameters())


def test_seeds_reproduce_a_run_and_differ_from_one_another() -> None:
    first, again, other = train(run(seed=1)), train(run(seed=1)), train(run(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_secure_noise_takes_no_seed() -> None:
    with pytest.raises(ValueError, match="no seed=3 with secure_noise"):
        run(seed=3, secure_noise=True)


# ---------------------------------------------------------------- the budget


def test_epsilon_is_that_of_the_steps_that_were_run() -> None:
    private = run(noise_multiplier=1.3)
    assert private.epsilon() == 0.0
    train(private, 2)
    steps = [Step(Poisson(RATE), 1.3, private.released_steps)]
    assert private.epsilon() == pytest.approx(epsilon(steps, DELTA))
    assert private.epsilon(1e-2) < private.epsilon()
    assert private.epsilon(accountant="rdp") > private.epsilon()


@pytest.mark.parametrize("accountant", [pytest.param("pld", marks=pytest.mark.slow), "rdp"])
def test_the_noise_is_calibrated_to_the_target_and_the_run_stops_before_exceeding_it(accountant: str) -> None:
    private = run(noise_multiplier=None, target_epsilon=4.0, epochs=2, accountant=accountant)
    before = train(private, 2)
    assert 3.9 < private.epsilon() <= 4.0
    with pytest.raises(PrivacyError, match=r"step 7 would exceed epsilon 4 at delta 0\.001"):
        train(private, 1)
    assert private.epsilon() <= 4.0
    assert all(torch.equal(a, b) for a, b in zip(before, private.dp_model.parameters(), strict=True))


@pytest.mark.parametrize(("sampling", "relation"), [("fixed-size", "replace-one"), ("shuffled", "replace-one")])
def test_other_samplings_have_their_own_accounting(sampling: str, relation: str) -> None:
    private = run(sampling=sampling, batch_size=20)
    assert private.ledger.neighbours == relation
    assert private.noise_std == pytest.approx(2 * 0.5)
    train(private, 2)
    assert private.released_steps == 6
    assert private.epsilon() > epsilon([Step(Poisson(20 / N), 1.0, 6)], DELTA)


def test_a_broken_off_shuffled_epoch_counts_as_one() -> None:
    private = run(sampling="shuffled", batch_size=20)
    whole = run(sampling="shuffled", batch_size=20)
    train(whole, 2)
    for _ in range(2):
        x, y = next(iter(private.loader))
        step(private, x, y)
    assert private.released_steps == 2
    assert private.epsilon() == pytest.approx(whole.epsilon())


def test_a_sampler_of_unknown_accounting_needs_a_stated_event() -> None:
    class Mine(PoissonSampler):
        kind = "mine"

    with pytest.raises(PrivacyError, match="the accounting of Mine is not known"):
        run(sampling=Mine(N, RATE))
    from dp_accounting import GaussianDpEvent

    private = run(sampling=Mine(N, RATE), event=Stated(GaussianDpEvent(1.0), 1.0))
    train(private)
    assert private.epsilon() == pytest.approx(epsilon([Step(Poisson(1.0), 1.0, 3)], DELTA))


@pytest.mark.slow
def test_schedules_are_accounted_as_run() -> None:
    private = run(
        noise_multiplier=None,
        target_epsilon=4.0,
        epochs=2,
        accountant="rdp",
        noise_schedule=lambda step: 1.0 + 0.1 * step,
        max_grad_norm_schedule=lambda step: 1.0 / (1 + step),
    )
    deviations, bounds = [], []
    for _ in range(2):
        for x, y in private.loader:
            deviations.append(private.noise_std)
            bounds.append(private.dp_model.max_grad_norm)
            step(private, x, y)
    assert bounds == pytest.approx([0.5 / (1 + i) for i in range(6)])
    z = deviations[0] / 0.5
    assert deviations == pytest.approx([z * (1 + 0.1 * i) * b for i, b in enumerate(bounds)])
    ran = [Step(Poisson(RATE), z * (1 + 0.1 * i)) for i in range(6)]
    assert private.epsilon() == pytest.approx(epsilon(ran, DELTA, accountant=Accountant.RDP))
    assert 3.9 < private.epsilon() <= 4.0
    with pytest.raises(PrivacyError, match="would exceed"):
        train(private)


# ---------------------------------------------------------------- adaptive clipping


def test_adaptive_clipping_finds_the_quantile_and_splits_the_noise() -> None:
    adaptive = AdaptiveClipping(target_quantile=0.7, learning_rate=0.3, count_noise=2.0)
    private = run(adaptive_clipping=adaptive, optimizer=lambda p, lr: SGD(p, lr=0.0))
    gradient_noise = (1.0**-2 - (2 * 2.0) ** -2) ** -0.5
    assert private.noise_std == pytest.approx(gradient_noise * 0.5)
    assert private.noise_multiplier == 1.0
    norms = []
    for i in range(N):
        private.dp_model.eval()
        one = net()
        F.cross_entropy(one(X[i : i + 1]), Y[i : i + 1]).backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in one.parameters() if p.grad is not None)))
    private.dp_model.train()
    found: list[float] = []
    train(private, 60, lambda: found.append(private.dp_model.max_grad_norm))
    quantile = torch.tensor(norms).quantile(torch.tensor([0.5, 0.9])).tolist()
    assert quantile[0] < sum(found[-60:]) / 60 < quantile[1]
    assert private.epsilon() == pytest.approx(epsilon([Step(Poisson(RATE), 1.0, len(found))], DELTA))


def test_the_counts_of_micro_batches_and_padding_are_those_of_the_whole_batch() -> None:
    def bounds(**options: Any) -> list[float]:
        private = run(adaptive_clipping=AdaptiveClipping(count_noise=5.0), **options)
        seen: list[float] = []
        train(private, 2, lambda: seen.append(private.dp_model.max_grad_norm) if private.optimizer.released else None)
        return seen

    assert bounds(max_physical_batch=4, pad=True) == pytest.approx(bounds())


def test_adaptive_clipping_within_every_group_costs_a_count_each() -> None:
    adaptive = AdaptiveClipping(count_noise=5.0)
    private = run(compiled(clip_groups="per-layer"), adaptive_clipping=adaptive)
    assert private.noise_std == pytest.approx((1 - 2 / 100) ** -0.5 * private.dp_model.max_grad_norm)
    before = private.dp_model.max_grad_norms
    train(private)
    after = private.dp_model.max_grad_norms
    assert all(after[name] != before[name] for name in before)
    with pytest.raises(ValueError, match=r"the counts alone would spend all of it"):
        run(adaptive_clipping=AdaptiveClipping(count_noise=0.4))
    with pytest.raises(ValueError, match="needs clipping='abadi'"):
        run(compiled(clipping="auto-s"), adaptive_clipping=adaptive)


# ---------------------------------------------------------------- optimizers and what hangs on them


def test_lr_schedulers_work_on_either_optimizer() -> None:
    private = run(optimizer=Adam)
    scheduler = StepLR(private.optimizer, step_size=1, gamma=0.5)
    inner = StepLR(private.optimizer.inner, step_size=1, gamma=0.5)
    train(private)
    scheduler.step()
    inner.step()
    assert private.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


def test_an_ema_is_updated_at_released_steps() -> None:
    private = run(max_physical_batch=7)
    ema = AveragedModel(private.dp_model.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(private, 1, lambda: ema.update_parameters(private.dp_model.module) if private.optimizer.released else None)
    assert int(ema.n_averaged) == private.released_steps


def test_adam_without_the_noise_variance_moves_further() -> None:
    private = run(optimizer=AdamBC, noise_multiplier=4.0)
    train(private)
    assert private.optimizer.param_groups[0]["noise_variance"] == pytest.approx((4.0 * 0.5 / (RATE * N)) ** 2)
    p = nn.Parameter(torch.zeros(1))
    corrected = AdamBC([p], lr=0.1, floor=1e-8)
    corrected.param_groups[0]["noise_variance"] = 0.75
    p.grad = torch.ones(1)
    corrected.step()
    assert p.item() == pytest.approx(-0.1 / math.sqrt(1 - 0.75))


def test_clearing_gradients_first_or_never_changes_nothing() -> None:
    def first() -> list[Tensor]:
        private = run(max_physical_batch=7)
        for x, y in private.loader:
            private.optimizer.zero_grad()
            F.cross_entropy(private.dp_model(x), y).backward()
            private.optimizer.step()
        return list(private.dp_model.parameters())

    def never() -> list[Tensor]:
        private = run(max_physical_batch=7)
        for x, y in private.loader:
            F.cross_entropy(private.dp_model(x), y).backward()
            private.optimizer.step()
        return list(private.dp_model.parameters())

    wanted = train(run(max_physical_batch=7))
    for found in (first(), never()):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_frozen_parameters_get_no_noise() -> None:
    model = net()
    model[0].requires_grad_(False)
    private = run(dpcompile(model, X[:4], max_grad_norm=0.5))
    before = model[0].weight.clone()
    train(private)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


# ---------------------------------------------------------------- checkpoints


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Any) -> None:
    def dropout() -> DPModule:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
        return dpcompile(model, X[:4], max_grad_norm=0.5)

    options = {"max_physical_batch": 7, "adaptive_clipping": AdaptiveClipping(count_noise=5.0), "optimizer": Adam}
    private = run(dropout(), **options)
    torch.manual_seed(5)
    train(private, 1)
    x, y = next(iter(private.loader))
    step(private, x, y)  # in the middle of a logical batch
    private.save(tmp_path / "run.pt", epoch=1)
    wanted = train(private, 2)

    resumed = run(dropout(), **options)
    assert resumed.load(tmp_path / "run.pt")["epoch"] == 1
    found = train(resumed, 2)

    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert resumed.epsilon() == private.epsilon()
    assert resumed.dp_model.max_grad_norm == private.dp_model.max_grad_norm


def test_the_ledger_of_a_checkpoint_is_json() -> None:
    private = run()
    train(private)
    state = json.loads(json.dumps(private.state_dict()["ledger"]))
    assert state["records"][0]["scheme"] == {"kind": "poisson", "sample_rate": RATE}
    assert state["steps"] == private.released_steps


def test_a_checkpoint_without_its_ledger_is_refused_and_nothing_is_loaded() -> None:
    private = run()
    state = private.state_dict()
    before = [p.clone() for p in private.dp_model.parameters()]
    for broken in ({k: v for k, v in state.items() if k != "ledger"}, {"model": {}}, {**state, "ledger": {}}):
        with pytest.raises(PrivacyError, match=r"no ledger|malformed|missing"):
            private.load_state_dict(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, private.dp_model.parameters(), strict=True))


def test_a_state_of_another_run_is_refused() -> None:
    other = run(sample_rate=0.5)
    train(other)
    with pytest.raises(PrivacyError, match="steps_per_epoch=2, this sampler has 3"):
        run().load_state_dict(other.state_dict())
    with pytest.raises(PrivacyError, match="target_delta"):
        run(target_delta=1e-4).load_state_dict(run().state_dict())


def test_a_ledger_file_outlives_a_crash_and_is_never_started_anew(tmp_path: Any) -> None:
    file = tmp_path / "ledger.json"
    private = run(ledger_file=file)
    saved = private.state_dict()
    train(private)
    again = run(ledger_file=file)
    assert again.epsilon() == private.epsilon() > 0
    again.load_state_dict(saved)  # a checkpoint from before the crash: what was released since still counts
    assert again.epsilon() == private.epsilon()
    assert again._step == 0


# ---------------------------------------------------------------- wrong use


def test_gradients_that_did_not_come_through_the_compiled_module_are_refused() -> None:
    private = run()
    x, y = next(iter(private.loader))
    F.cross_entropy(private.dp_model.module(x), y).backward()
    with pytest.raises(PrivacyError, match="did not come from the compiled module"):
        private.optimizer.step()
    private = run()
    x, y = next(iter(private.loader))
    F.cross_entropy(private.dp_model(x), y).backward()
    F.cross_entropy(private.dp_model.module(x), y).backward()
    with pytest.raises(PrivacyError, match="did not come from the compiled module"):
        private.optimizer.step()
    assert private.released_steps == 0


def test_a_second_backward_for_one_batch_is_refused() -> None:
    private = run()
    x, y = next(iter(private.loader))
    F.cross_entropy(private.dp_model(x), y).backward()
    with pytest.raises(PrivacyError, match="second backward for one batch"):
        F.cross_entropy(private.dp_model(x), y).backward()


def test_more_samples_than_the_loader_handed_out_are_refused() -> None:
    private = run()
    x, y = next(iter(private.loader))
    with pytest.raises(PrivacyError, match="compile with views="):
        F.cross_entropy(private.dp_model(torch.cat([x, x])), torch.cat([y, y])).backward()


def test_the_plain_optimizer_and_a_plain_loader_are_refused() -> None:
    dp_model = compiled()
    plain = SGD(dp_model.parameters(), lr=0.1)
    private = make_private(
        dp_model, plain, DATA, sample_rate=RATE, target_delta=DELTA, noise_multiplier=1.0, max_physical_batch=4
    )
    x, y = next(iter(private.loader))
    F.cross_entropy(dp_model(x), y).backward()
    with pytest.raises(PrivacyError, match="the plain optimizer adds no noise"):
        plain.step()
    private.optimizer.step()
    x, y = next(iter(DataLoader(DATA, batch_size=4)))
    with pytest.raises(PrivacyError, match=r"without a batch of private\.loader"):
        F.cross_entropy(dp_model(x), y).backward()
    with pytest.raises(PrivacyError, match=r"without a batch of private\.loader"):
        private.optimizer.step()


def test_a_step_that_was_left_out_is_noticed() -> None:
    private = run()
    batches = iter(private.loader)
    x, y = next(batches)
    F.cross_entropy(private.dp_model(x), y).backward()
    with pytest.raises(PrivacyError, match=r"had a backward but no private\.optimizer\.step"):
        next(batches)


def test_breaking_off_a_logical_batch_releases_nothing_of_it() -> None:
    private = noise_free(run(max_physical_batch=2))
    x, y = next(iter(private.loader))
    step(private, x, y)
    assert private.released_steps == 0
    for x, y in private.loader:
        step(private, x, y)
        if private.optimizer.released:
            break
    indices = PoissonSampler(N, RATE, seed=0).draw()
    start = net()
    for p, old, g in zip(private.dp_model.parameters(), start.parameters(), clipped_sum(indices), strict=True):
        torch.testing.assert_close((p - old).double(), -0.1 * g / (RATE * N), rtol=1e-4, atol=1e-7)


def test_evaluation_between_steps_is_free() -> None:
    private = run(max_physical_batch=7)

    def evaluate() -> None:
        private.dp_model.eval()
        with torch.no_grad():
            private.dp_model(X)
        private.dp_model.train()

    found = train(private, 1, evaluate)
    assert all(torch.equal(a, b) for a, b in zip(found, train(run(max_physical_batch=7)), strict=True))


@pytest.mark.parametrize("set_back", [False, True])
def test_max_grad_norm_changes_between_steps_only(set_back: bool) -> None:
    private = run(max_physical_batch=2)
    before = private.dp_model.max_grad_norm
    batches = iter(private.loader)
    step(private, *next(batches))
    private.dp_model.max_grad_norm = 5.0
    step(private, *next(batches))
    if set_back:
        private.dp_model.max_grad_norm = before

    def finish() -> None:
        for x, y in batches:
            step(private, x, y)

    with pytest.raises(PrivacyError, match="changed within a logical batch"):
        finish()
    assert private.released_steps == 0


def test_unfrozen_parameters_are_noticed() -> None:
    model = net()
    model[0].requires_grad_(False)
    private = run(dpcompile(model, X[:4], max_grad_norm=0.5))
    model[0].requires_grad_(True)
    x, y = next(iter(private.loader))
    with pytest.raises(DPCompileError, match="newly trainable"):
        step(private, x, y)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": TensorDataset(X[:0], Y[:0])}, ValueError, "at least one sample, got 0"),
        ({"data": Stream()}, PrivacyError, "map-style"),
        ({"batch_size": 0}, ValueError, "batch_size=0 from 1 to the 60"),
        ({"batch_size": 61}, ValueError, "batch_size=61 from 1 to the 60"),
        ({"sample_rate": 1.5}, ValueError, r"sample_rate=1\.5"),
        ({"sample_rate": None}, ValueError, "one of batch_size and sample_rate"),
        ({"target_delta": None}, ValueError, "target_delta=None"),
        ({"target_delta": 1.0}, ValueError, r"target_delta=1\.0"),
        ({"noise_multiplier": None}, ValueError, "noise_multiplier, or target_epsilon with epochs"),
        ({"noise_multiplier": -1.0}, ValueError, r"noise_multiplier=-1\.0"),
        ({"noise_multiplier": None, "target_epsilon": 1.0, "epochs": 0}, ValueError, "steps=0"),
        ({"sampling": "random", "batch_size": 20}, ValueError, "sampling='random'"),
        ({"sampling": "shuffled", "batch_size": 2.5}, ValueError, "whole batch_size"),
        ({"neighbours": "both"}, ValueError, "neighbours='both'"),
        ({"accountant": "gdp"}, ValueError, "accountant='gdp'"),
        ({"pad": True}, ValueError, "max_physical_batch with pad"),
        ({"optimizer": lambda p, lr: SGD([nn.Parameter(torch.zeros(1))], lr)}, PrivacyError, "neither clipped nor"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**options)


def test_a_model_that_was_not_compiled_or_does_not_clip_is_refused() -> None:
    model = net()
    with pytest.raises(PrivacyError, match="Sequential does not clip"):
        make_private(model, SGD(model.parameters(), lr=0.1), DATA, sample_rate=RATE, target_delta=DELTA)
    with pytest.raises(PrivacyError, match="infinite"):
        run(dpcompile(model, X[:4], max_grad_norm=math.inf))


def test_a_delta_that_is_too_large_warns() -> None:
    with pytest.warns(UserWarning, match="not below 1 / 60 samples"):
        run(target_delta=0.02)


def test_closures_new_parameters_and_copies_of_the_optimizer_are_refused() -> None:
    private = run()
    with pytest.raises(PrivacyError, match="closure"):
        private.optimizer.step(lambda: 0.0)
    with pytest.raises(PrivacyError, match="fixed when it is compiled"):
        private.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(PrivacyError, match="not copied"):
        copy.deepcopy(private.optimizer)


@pytest.mark.parametrize(
    ("criterion", "what"),
    [
        (lambda out, y: F.cross_entropy(out, y) / len(y), "a mean that is divided by the batch size again"),
        (lambda out, y: F.cross_entropy(out, y, reduction="sum"), "a sum over samples"),
        (lambda out, y: 3 * F.cross_entropy(out, y, reduction="sum") / len(y) ** 1.5, "neither mean nor sum"),
    ],
)
def test_a_criterion_that_does_not_reduce_as_was_said_is_refused(criterion: Any, what: str) -> None:
    run(criterion=F.cross_entropy)
    run(compiled(loss_reduction="sum"), criterion=lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    with pytest.raises(DPCompileError, match=what):
        run(criterion=criterion)


def test_a_fused_loss_that_sums_where_mean_was_said_is_refused() -> None:
    with pytest.raises(DPCompileError, match="loss_fn gives a sum over samples, but loss_reduction='mean'"):
        compiled(loss_fn=lambda out, y: F.cross_entropy(out, y, reduction="sum"), sample_targets=Y[:4])
    with pytest.raises(DPCompileError, match="depends on the number of samples"):
        compiled(loss_fn=lambda out, y: F.cross_entropy(out, y) / out.shape[0], sample_targets=Y[:4])
