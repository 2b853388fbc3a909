"""Accounting: against dp-accounting called directly, closed forms, integrals and Opacus; and what is refused."""

from __future__ import annotations

import json
import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from selection import every

from dpcompile.accountant import DISTINCT, Accountant, Composition, calibrate, delta, epsilon
from dpcompile.errors import PrivacyError
from dpcompile.schemes import (
    KINDS,
    FixedSize,
    Neighbours,
    Poisson,
    Scheme,
    ShuffledEpochs,
    Stated,
    Step,
    merge,
    scheme_from_json,
    scheme_to_json,
    sensitivity,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Opacus imports what its dependencies deprecate
    warnings.simplefilter("ignore", FutureWarning)
    from opacus.accountants import PRVAccountant
    from opacus.accountants import RDPAccountant as OpacusRDP

ADD_OR_REMOVE, REPLACE = Neighbours.ADD_OR_REMOVE_ONE, Neighbours.REPLACE_ONE
PLD, RDP = Accountant.PLD, Accountant.RDP
DELTA = 1e-5
GRID = [(0.01, 1.0, 1000), (0.01, 0.8, 300), (0.05, 2.0, 400), (0.001, 1.0, 2000), (0.5, 20.0, 50)]


def gaussian_delta(noise: float, at: float) -> float:
    """Balle and Wang 2018, arXiv:1805.06530, theorem 8; noise per sensitivity."""
    return float(norm.cdf(0.5 / noise - at * noise) - math.exp(at) * norm.cdf(-0.5 / noise - at * noise))


@pytest.mark.parametrize(("rate", "noise", "count"), GRID[::2])
def test_poisson_is_what_dp_accounting_says(rate: float, noise: float, count: int) -> None:
    event = PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    steps = [Step(Poisson(rate), noise, count)]
    direct = PLDAccountant().compose(event, count).get_epsilon(DELTA)
    assert epsilon(steps, DELTA) == pytest.approx(direct, rel=1e-4)
    direct = RdpAccountant().compose(event, count).get_epsilon(DELTA)
    assert epsilon(steps, DELTA, accountant=RDP) == pytest.approx(direct, rel=1e-9)


@pytest.mark.slow
def test_epsilon_agrees_with_opacus() -> None:
    """RDP at the same orders to the convergence of its series; PRV to the error that it is asked for."""
    print("\n  rate  noise steps |    pld    prv |    rdp opacus")
    for rate, noise, count in GRID:
        steps = [Step(Poisson(rate), noise, count)]
        prv, renyi = PRVAccountant(), OpacusRDP()
        prv.history = renyi.history = [(noise, rate, count)]
        ours = epsilon(steps, DELTA), epsilon(steps, DELTA, accountant=RDP)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the best order is the last one
            theirs = (
                prv.get_epsilon(DELTA, eps_error=0.01),
                renyi.get_epsilon(DELTA, alphas=RdpAccountant().orders.tolist()),
            )
        print(f"{rate:6g} {noise:6g} {count:5d} | {ours[0]:.4f} {theirs[0]:.4f} | {ours[1]:.4f} {theirs[1]:.4f}")
        assert abs(ours[0] - theirs[0]) <= 0.012
        assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
        assert ours[0] <= ours[1]


@pytest.mark.parametrize("neighbours", Neighbours)
@pytest.mark.parametrize("noise", every(3, [1.0, 0.5, 3.0]))
def test_the_gaussian_mechanism_has_its_closed_form_under_both_relations(neighbours: Neighbours, noise: float) -> None:
    """So the sensitivity of replace-one is neither counted twice nor left out, by either accountant."""
    steps = [Step(Poisson(1.0), noise)]
    for at in (0.5, 2.0):
        exact = gaussian_delta(noise, at)
        tight = delta(steps, at, neighbours=neighbours)
        assert exact <= tight <= exact * 1.001 + 1e-12
        assert exact <= delta(steps, at, accountant=RDP, neighbours=neighbours)
    renyi = min(
        order / (2 * noise**2) + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)
        for order in RdpAccountant().orders
        if order > 1.01
    )
    assert epsilon(steps, DELTA, accountant=RDP, neighbours=neighbours) == pytest.approx(max(0, renyi), rel=1e-9)


@pytest.mark.parametrize("at", [0.0, 0.05, 0.2])
def test_poisson_under_replace_one_is_the_integral(at: float) -> None:
    """One step at noise 1: the sample is +R in one data set and -R in the other, noise std 2 R, R = 1."""
    rate, std = 0.2, 1.0 * sensitivity(REPLACE)
    x = np.linspace(-30, 30, 400_001)
    here, there = ((1 - rate) * norm.pdf(x, 0, std) + rate * norm.pdf(x, mean, std) for mean in (1, -1))
    exact = float(np.trapezoid(np.maximum(here - math.exp(at) * there, 0), x))
    assert delta([Step(Poisson(rate), 1.0)], at, neighbours=REPLACE) == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_sensitivity_doubles_when_a_sample_is_replaced() -> None:
    assert sensitivity(ADD_OR_REMOVE) == 1.0
    assert sensitivity(REPLACE) == 2.0


def test_fixed_size_is_accounted_at_noise_per_sensitivity() -> None:
    event = dp_accounting.SampledWithoutReplacementDpEvent(1000, 50, GaussianDpEvent(1.5))
    direct = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(event, 30).get_epsilon(DELTA)
    ours = epsilon([Step(FixedSize(1000, 50), 1.5, 30)], DELTA, accountant=RDP, neighbours=REPLACE)
    assert ours == pytest.approx(direct, rel=1e-9)
    full = epsilon([Step(FixedSize(50, 50), 1.5)], DELTA, accountant=RDP, neighbours=REPLACE)
    assert full == pytest.approx(epsilon([Step(Poisson(1.0), 1.5)], DELTA, accountant=RDP), rel=1e-9)


@pytest.mark.parametrize(
    ("scheme", "accountant", "neighbours", "cure"),
    [
        (FixedSize(100, 10), PLD, REPLACE, "replace-one by rdp"),
        (FixedSize(100, 10), RDP, ADD_OR_REMOVE, "replace-one by rdp"),
        (ShuffledEpochs(100, 10), PLD, ADD_OR_REMOVE, "replace-one by pld or rdp"),
        (Poisson(0.1), RDP, REPLACE, "replace-one by pld"),
        (Stated(dp_accounting.UnsupportedDpEvent(), 1.0), PLD, ADD_OR_REMOVE, "dp-accounting supports"),
        (Stated(dp_accounting.ZCDpEvent(1.0), 1.0), RDP, REPLACE, "dp-accounting supports"),
    ],
)
def test_what_has_no_accounting_is_refused_with_what_has(
    scheme: Scheme, accountant: Accountant, neighbours: Neighbours, cure: str
) -> None:
    with pytest.raises(PrivacyError, match=cure) as refusal:
        epsilon([Step(scheme, 1.0)], DELTA, accountant=accountant, neighbours=neighbours)
    assert scheme.name in str(refusal.value)


def shuffled(*steps: tuple[float, int, bool]) -> float:
    """Epsilon of (noise, count, reshuffled) with epochs of 4 steps."""
    scheme = ShuffledEpochs(10, 3)
    return epsilon([Step(scheme, *step) for step in steps], DELTA, accountant=RDP, neighbours=REPLACE)


def gaussians(*noises: float) -> float:
    steps = [Step(Poisson(1.0), noise) for noise in noises]
    return epsilon(steps, DELTA, accountant=RDP, neighbours=REPLACE)


def test_a_shuffled_epoch_costs_one_gaussian_mechanism() -> None:
    assert shuffled((2.0, 1, True)) == shuffled((2.0, 4, True)) == pytest.approx(gaussians(2.0))
    assert shuffled((2.0, 5, True)) == pytest.approx(gaussians(2.0, 2.0))
    assert shuffled((2.0, 12, True)) == pytest.approx(gaussians(2.0, 2.0, 2.0))
    assert shuffled((2.0, 3, True), (2.0, 1, False)) == pytest.approx(gaussians(2.0))


def test_an_epoch_costs_what_its_smallest_noise_costs() -> None:
    assert shuffled((2.0, 2, True), (3.0, 2, False)) == pytest.approx(gaussians(2.0))
    assert shuffled((3.0, 2, True), (2.0, 3, False), (5.0, 3, False)) == pytest.approx(gaussians(2.0, 2.0))
    assert shuffled((3.0, 6, True), (2.0, 6, False)) == pytest.approx(gaussians(3.0, 2.0, 2.0))


def test_an_epoch_that_was_broken_off_counts() -> None:
    assert shuffled((2.0, 1, True), (2.0, 1, True), (2.0, 1, True)) == pytest.approx(gaussians(2.0, 2.0, 2.0))
    assert shuffled((2.0, 4, True), (2.0, 4, True)) == pytest.approx(gaussians(2.0, 2.0))


def test_poisson_claims_less_than_shuffling_costs() -> None:
    honest = epsilon([Step(ShuffledEpochs(1000, 10), 1.0, 100)], DELTA, neighbours=REPLACE)
    assert honest > 3 * epsilon([Step(Poisson(0.01), 1.0, 100)], DELTA, neighbours=REPLACE)


def test_a_stated_event_is_taken_as_stated() -> None:
    event = PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0))
    stated, known = [Step(Stated(event, 1.0), 1.0, 100)], [Step(Poisson(0.01), 1.0, 100)]
    assert epsilon(stated, DELTA) == epsilon(known, DELTA)
    gaussian = [Step(Stated(GaussianDpEvent(2.0), 1.0), 1.0)]  # noise per max_grad_norm, so 1 per sensitivity
    for accountant in Accountant:
        ours = epsilon(gaussian, DELTA, accountant=accountant, neighbours=REPLACE)
        assert ours == pytest.approx(epsilon([Step(Poisson(1.0), 1.0)], DELTA, accountant=accountant), rel=1e-4)
    with pytest.raises(PrivacyError, match="stated for a noise multiplier of 1"):
        Step(Stated(event, 1.0), 0.9)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], DELTA) == delta([], 1.0) == epsilon([Step(Poisson(0.1), 1.0, 0)], DELTA) == 0.0
    bare = [Step(Poisson(0.1), 1.0), Step(Poisson(0.1), 0.0)]
    for accountant in Accountant:
        assert epsilon(bare, DELTA, accountant=accountant) == math.inf
        assert delta(bare, 5.0, accountant=accountant) == 1.0


def test_little_noise_gets_a_coarser_grid_and_an_answer() -> None:
    found = epsilon([Step(Poisson(0.01), 0.1, 1000)], DELTA)
    assert 1000 < found < epsilon([Step(Poisson(0.01), 0.1, 1000)], DELTA, accountant=RDP)
    mean = 1000 / (2 * 0.1**2)  # of the loss of 1000 Gaussian mechanisms, which is normal with variance 2 mean
    assert mean < epsilon([Step(Poisson(1.0), 0.1, 1000)], DELTA) < mean + 5 * math.sqrt(2 * mean)
    assert epsilon([Step(Poisson(1.0), 0.001, 1000)], DELTA) == math.inf


def test_a_cost_that_rounding_hides_is_not_free() -> None:
    steps = [Step(Poisson(1e-9), 1.0, 10**6)]
    assert epsilon(steps, 1e-9) > 0
    assert epsilon(steps, 1e-9, accountant=RDP) > 0


@pytest.mark.parametrize("interval", [1e-3, 1e-2])
def test_a_coarser_grid_never_claims_less(interval: float) -> None:
    steps = [Step(Poisson(0.01), 1.0, 1000)]
    assert epsilon(steps, DELTA, value_discretization_interval=interval) >= epsilon(steps, DELTA)


def test_many_noise_multipliers_are_rounded_to_more_cost() -> None:
    steps = [Step(Poisson(0.01), 1.5 + i / 1000, 7) for i in range(DISTINCT + 30)]
    exact = RdpAccountant()
    for step in steps:
        exact.compose(PoissonSampledDpEvent(0.01, GaussianDpEvent(step.noise_multiplier)), step.count)
    spent = exact.get_epsilon(DELTA)
    assert spent <= epsilon(steps, DELTA, accountant=RDP) <= 1.02 * spent
    assert epsilon(steps, DELTA) < spent


def test_what_grows_step_by_step_costs_what_it_costs_at_once() -> None:
    noises = [1.5, 2.0, 1.5]
    steps = [Step(Poisson(0.02), noise, 10) for noise in noises]
    for accountant in Accountant:
        growing = Composition(accountant, ADD_OR_REMOVE)
        spent = [growing.epsilon(steps[: i + 1], DELTA) for i in range(len(steps))]
        assert spent == sorted(spent)
        assert spent[-1] == pytest.approx(epsilon(steps[::-1], DELTA, accountant=accountant), rel=1e-6)


def test_equal_steps_merge() -> None:
    a, b = Step(Poisson(0.1), 1.0), Step(Poisson(0.1), 2.0)
    assert merge([a, a, b, Step(a.scheme, 9.0, 0), b, a]) == [Step(a.scheme, 1.0, 2), Step(a.scheme, 2.0, 2), a]
    again = Step(ShuffledEpochs(10, 3), 1.0, 2, reshuffled=True)
    assert merge([again, again]) == [again, again]
    assert merge([again, Step(again.scheme, 1.0, 2)]) == [Step(again.scheme, 1.0, 4, reshuffled=True)]


@pytest.mark.parametrize(("target", "at"), every(3, [(0.1, 1e-5), (0.5, 1e-7), (1.0, 1e-5), (8.0, 1e-7), (8.0, 1e-4)]))
def test_calibration_never_adds_too_little_noise(target: float, at: float) -> None:
    for scheme, count in ((Poisson(0.01), 500), (Poisson(0.3), 20)):
        noise = calibrate(target, at, scheme, count, accountant=RDP)
        assert epsilon([Step(scheme, noise, count)], at, accountant=RDP) <= target
        assert epsilon([Step(scheme, noise * 0.997, count)], at, accountant=RDP) > target


@pytest.mark.parametrize(
    ("target", "scheme", "accountant", "neighbours"),
    [
        (0.3, Poisson(0.02), PLD, ADD_OR_REMOVE),
        (0.3, Poisson(0.02), PLD, REPLACE),
        (2.0, FixedSize(500, 10), RDP, REPLACE),
        (2.0, ShuffledEpochs(500, 10), PLD, REPLACE),
    ],
)
def test_calibration_holds_for_every_scheme(
    target: float, scheme: Scheme, accountant: Accountant, neighbours: Neighbours
) -> None:
    noise = calibrate(target, DELTA, scheme, 120, accountant=accountant, neighbours=neighbours)
    assert epsilon([Step(scheme, noise, 120)], DELTA, accountant=accountant, neighbours=neighbours) <= target
    assert epsilon([Step(scheme, noise * 0.997, 120)], DELTA, accountant=accountant, neighbours=neighbours) > target


def test_calibration_refuses_what_cannot_be_reached() -> None:
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="Expected target_epsilon"):
            calibrate(target, DELTA, Poisson(0.1), 10)
    for at in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="Expected delta"):
            calibrate(1.0, at, Poisson(0.1), 10)
    with pytest.raises(ValueError, match="Expected count=0"):
        calibrate(1.0, DELTA, Poisson(0.1), 0)
    with pytest.raises(PrivacyError, match="stated event"):
        calibrate(1.0, DELTA, Stated(GaussianDpEvent(1.0), 1.0), 10)
    with pytest.raises(PrivacyError, match="no noise multiplier up to"):
        calibrate(1.0, 1e-17, Poisson(0.1), 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(1.5), r"Expected sample_rate=1.5 in \(0, 1\]."),
        (lambda: Poisson(0.0), "Expected sample_rate=0.0"),
        (lambda: Poisson(math.nan), "Expected sample_rate=nan"),
        (lambda: FixedSize(0, 0), "Expected dataset_size=0"),
        (lambda: ShuffledEpochs(10, 11), "Expected batch_size=11 <= dataset_size=10"),
        (lambda: Step(Poisson(0.1), -1.0), "Expected noise_multiplier=-1.0"),
        (lambda: Step(Poisson(0.1), math.nan), "Expected noise_multiplier=nan"),
        (lambda: Step(Poisson(0.1), 1.0, -1), "Expected count=-1"),
        (lambda: Stated("gaussian", 1.0), "Expected event_of_step='gaussian'"),  # pyright: ignore[reportArgumentType]
        (lambda: delta([], -1.0), "Expected epsilon=-1.0 >= 0"),
        (lambda: epsilon([], 0.0), "Expected delta=0.0"),
        (lambda: epsilon([], DELTA, value_discretization_interval=0.0), "Expected value_discretization_interval=0.0"),
    ],
)
def test_arguments_out_of_range_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


EVENTS = st.recursive(
    st.builds(GaussianDpEvent, st.floats(0.1, 9.0)) | st.builds(dp_accounting.NoOpDpEvent),
    lambda inner: (
        st.builds(PoissonSampledDpEvent, st.floats(0.001, 1.0), inner)
        | st.builds(dp_accounting.SelfComposedDpEvent, inner, st.integers(1, 9))
        | st.builds(dp_accounting.ComposedDpEvent, st.lists(inner, max_size=3))
    ),
    max_leaves=4,
)
SIZES = st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
SCHEMES = (
    st.builds(Poisson, st.floats(0, 1, exclude_min=True))
    | SIZES.map(lambda sizes: FixedSize(*sizes))
    | SIZES.map(lambda sizes: ShuffledEpochs(*sizes))
    | st.builds(Stated, EVENTS, st.just(0.1))
)
STEPS = st.builds(Step, SCHEMES, st.floats(0.1, 1e6), st.integers(0, 10**9), st.booleans())


@given(STEPS)
@settings(max_examples=50, deadline=None)
def test_steps_survive_json(step: Step) -> None:
    again = Step.from_json(json.loads(json.dumps(step.to_json())))
    assert again == step
    assert hash(again) == hash(step)
    assert scheme_from_json(scheme_to_json(step.scheme)) == step.scheme


def test_json_makes_no_other_object_than_an_event() -> None:
    for name in ("DpEventNamedTuple", "importlib", "os.system"):
        with pytest.raises(ValueError, match="Expected class="):
            scheme_from_json({"kind": "stated", "event": {"class": name}, "noise_multiplier": 1.0})
    assert set(KINDS) == {"poisson", "fixed-size", "shuffled", "stated"}
