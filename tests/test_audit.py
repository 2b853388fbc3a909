"""The audit: its bound against closed forms and known mechanisms, and a small audit of the whole trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import binom
from torch import nn
from torch.utils.data import TensorDataset

from dpcompile import DPModule, dpcompile, make_private
from dpcompile.accountant import calibrate
from dpcompile.audit import Audit, audit, count_correct, epsilon_lower_bound, p_value
from dpcompile.schemes import Poisson, Step

SETTINGS = settings(max_examples=40, deadline=None)

# ---------------------------------------------------------------- the bound


def test_nothing_is_found_without_more_right_guesses_than_chance() -> None:
    for correct in (0, 30, 50, 55):
        assert epsilon_lower_bound(100, 100, correct) == 0
    assert epsilon_lower_bound(100, 0, 0) == 0


@pytest.mark.parametrize("guesses", [10, 100, 10_000])
def test_all_guesses_right_has_a_closed_form(guesses: int) -> None:
    """q^r = 1 - confidence."""
    wanted = logit(0.05 ** (1 / guesses))
    assert epsilon_lower_bound(2 * guesses, guesses, guesses) == pytest.approx(wanted, abs=2e-6)
    assert wanted < math.log(guesses / 3) + 0.01


def test_the_p_value_is_the_formula_of_the_paper() -> None:
    """Appendix D, term by term."""
    m, r, v, epsilon, delta = 60, 40, 34, 1.0, 1e-3
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    wins = [math.comb(r, w) * q**w * (1 - q) ** (r - w) for w in range(r + 1)]
    at_least = sum(wins[v:])
    slope = max(sum(wins[v - i : v]) / i for i in range(1, v + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(at_least + 2 * m * delta * slope, rel=1e-9)


def test_a_p_value_is_a_probability_at_the_ends() -> None:
    assert p_value(10, 0, 0, 1.0, 0.5) == 1
    assert p_value(10, 10, 10, 0.0) == pytest.approx(2**-10)
    assert p_value(10, 10, 10, 0.0, 1.0) == 1
    assert p_value(10, 10, 10, 1000.0) == 1


@SETTINGS
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 6), st.sampled_from([0.0, 1e-6, 1e-4]))
def test_the_bound_is_the_edge_of_what_is_refuted(guesses: int, share: float, epsilon: float, delta: float) -> None:
    correct = round(share * guesses)
    bound = epsilon_lower_bound(guesses, guesses, correct, delta)
    refuted = p_value(guesses, guesses, correct, epsilon, delta) < 0.05
    if abs(epsilon - bound) > 1e-5:
        assert refuted == (epsilon < bound)


def test_the_bound_grows_with_right_guesses_and_falls_with_delta_and_confidence() -> None:
    by_correct = [epsilon_lower_bound(1000, 400, correct, 1e-6) for correct in range(200, 401, 10)]
    by_delta = [epsilon_lower_bound(1000, 400, 390, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4, 1e-3)]
    by_confidence = [epsilon_lower_bound(1000, 400, 390, 1e-6, sure) for sure in (0.5, 0.9, 0.95, 0.99)]
    assert by_correct == sorted(by_correct)
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_confidence == sorted(by_confidence, reverse=True)
    assert by_correct[-1] > by_correct[0] == 0


def test_abstaining_pays_only_through_delta() -> None:
    assert epsilon_lower_bound(100, 100, 95) == epsilon_lower_bound(10_000, 100, 95)
    assert epsilon_lower_bound(100, 100, 95, 1e-5) > epsilon_lower_bound(10_000, 100, 95, 1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_bound_on_randomised_response_is_too_high_as_rarely_as_it_says(epsilon: float) -> None:
    """W is exactly binomial: the chance of a bound above epsilon is the sum over all w whose bound is."""
    guesses = 200
    chances = binom.pmf(np.arange(guesses + 1), guesses, expit(epsilon))
    bounds = np.array([epsilon_lower_bound(guesses, guesses, w) for w in range(guesses + 1)])
    too_high = float(chances[bounds > epsilon].sum())
    assert 0.005 < too_high <= 0.05  # the theorem is tight here, but for w being whole
    median = bounds[np.searchsorted(chances.cumsum(), 0.5)]
    assert median >= 0.7 * epsilon


# ---------------------------------------------------------------- guesses


def test_the_highest_are_guessed_in_and_the_lowest_out() -> None:
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    included = np.array([True, False, False, True, True])
    assert [count_correct(scores, included, k) for k in (0, 1, 2)] == [0, 2, 2]
    assert count_correct(-scores, included, 1) == 0


def test_scores_without_a_signal_find_nothing_more_often_than_they_say() -> None:
    source = np.random.default_rng(0)
    found = [audit(source.normal(size=500), source.random(500) < 0.5, 1e-5).epsilon for _ in range(200)]
    assert sum(epsilon > 0 for epsilon in found) <= 20  # 10 expected at most; 21 or more have a chance of 0.1 %


def test_equal_scores_tell_nothing() -> None:
    included = np.random.default_rng(1).random(2000) < 0.5
    assert audit(np.zeros(2000), included, 0.0).epsilon < 0.2


def gaussian(epsilon: float, delta: float) -> float:
    """Signal to noise of the Gaussian mechanism that is exactly (epsilon, delta)-private (Balle and Wang 2018)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(mu: float) -> float:
        upper, lower = norm.cdf(mu / 2 - epsilon / mu), norm.cdf(-mu / 2 - epsilon / mu)
        return float(upper - math.exp(epsilon) * lower - delta)

    return float(brentq(excess, 1e-3, 50.0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_a_gaussian_mechanism_stays_below_its_epsilon_and_three_times_its_signal_above(epsilon: float) -> None:
    mu, source = gaussian(epsilon, 1e-6), np.random.default_rng(2)
    for _ in range(4):
        included = source.random(20_000) < 0.5
        noise = source.normal(size=20_000)
        assert 0 < audit(noise + mu * included, included, 1e-6).epsilon < epsilon
        assert audit(noise + 3 * mu * included, included, 1e-6).epsilon > epsilon


def test_choosing_among_more_numbers_of_guesses_costs_confidence() -> None:
    source = np.random.default_rng(3)
    included = source.random(1000) < 0.5
    scores = source.normal(size=1000) + 2 * included
    one, two = audit(scores, included, 0.0, fractions=[0.2]), audit(scores, included, 0.0, fractions=[0.2, 0.2])
    assert one.epsilon == epsilon_lower_bound(1000, 400, one.correct)
    assert two.epsilon == epsilon_lower_bound(1000, 400, one.correct, 0.0, 0.975) < one.epsilon
    assert (one.guesses, one.accuracy) == (400, one.correct / 400)


# ---------------------------------------------------------------- wrong use


def test_wrong_arguments_are_refused() -> None:
    scores, included = np.arange(10.0), np.arange(10) < 5
    with pytest.raises(ValueError, match="guesses=11 <= canaries=10"):
        p_value(10, 11, 5, 1.0)
    with pytest.raises(ValueError, match=r"epsilon=-1\.0"):
        p_value(10, 10, 5, -1.0)
    with pytest.raises(ValueError, match="delta=2"):
        p_value(10, 10, 5, 1.0, 2)
    with pytest.raises(ValueError, match="confidence=1"):
        epsilon_lower_bound(10, 10, 10, 0.0, 1)
    with pytest.raises(ValueError, match="each_side=6"):
        count_correct(scores, included, 6)
    with pytest.raises(ValueError, match="int64"):
        audit(scores, included.astype(np.int64), 0.0)
    with pytest.raises(ValueError, match=r"scores \[m\]"):
        audit(scores[:5], included, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        audit(scores * np.nan, included, 0.0)
    for fractions in ((), (0.0,), (0.6,)):
        with pytest.raises(ValueError, match="of 10 canaries to be from 1"):
            audit(scores, included, 0.0, fractions=fractions)


# ---------------------------------------------------------------- the trainer

M, LABELS, STEPS, BOUND, STATED, DELTA = 4000, 3, 3, 0.1, 4.0, 1e-6
LABELS_M = torch.arange(M) % LABELS


def table() -> nn.Embedding:
    """A row of logits for each canary, which nothing but the canary moves."""
    return nn.Embedding(M, LABELS, _weight=torch.zeros(M, LABELS))


COMPILED = dpcompile(table(), torch.arange(4), max_grad_norm=BOUND)


def scores_of(included: NDArray[np.bool_], noise_multiplier: float, clip_factor: float) -> NDArray[np.float64]:
    """How far training moved along each canary's gradient. The clip may be wrong by a factor, unknown to the noise."""
    model = table()
    dp_model = DPModule(model, COMPILED._emitted)
    chosen = torch.from_numpy(np.flatnonzero(included))
    private = make_private(
        dp_model,
        torch.optim.SGD(dp_model.parameters(), lr=1.0),
        TensorDataset(chosen, LABELS_M[chosen]),
        sample_rate=1.0,
        target_delta=DELTA,
        noise_multiplier=noise_multiplier,
        max_physical_batch=1500,
        seed=0,
    )
    scores_m = torch.zeros(M)
    for _ in range(STEPS):
        for index, labels in private.loader:
            dp_model._bound.fill_(clip_factor * BOUND)  # what the graph clips with; nobody else hears of it
            F.cross_entropy(dp_model(index), labels).backward()
            direction_mC = F.normalize(model.weight.detach().softmax(1) - F.one_hot(LABELS_M, LABELS), dim=1)
            private.optimizer.step()
            if private.optimizer.released:
                assert model.weight.grad is not None
                scores_m += (direction_mC * model.weight.grad).sum(1)
            private.optimizer.zero_grad()
    assert private.ledger.steps() == [Step(Poisson(1.0), noise_multiplier, count=STEPS)]
    return scores_m.double().numpy()


def audited(noise_multiplier: float, clip_factor: float = 1.0) -> Audit:
    included = np.random.default_rng(4).random(M) < 0.5
    return audit(scores_of(included, noise_multiplier, clip_factor), included, DELTA)


def test_the_trainer_leaks_no_more_than_it_says_and_a_broken_clip_does() -> None:
    noise = calibrate(STATED, DELTA, Poisson(1.0), STEPS)
    sound, broken = audited(noise), audited(noise, clip_factor=3.0)
    assert 0.5 < sound.epsilon < STATED < broken.epsilon


def test_a_run_without_noise_is_caught() -> None:
    found = audited(1e-6)
    assert found.epsilon > 5
    assert found.correct == found.guesses
