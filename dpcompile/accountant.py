"""What a sequence of noisy steps costs in (epsilon, delta), by Google's dp-accounting.

The convention of `schemes.py` holds: `noise_multiplier` is noise per L2 sensitivity of the clipped sum.

dp-accounting 0.6.0 reads the noise multiplier of an event under replace-one in two ways. Its documentation
(dp_event.GaussianDpEvent) and its PLD accountant mean std / max_grad_norm and double the sensitivity themselves; its
RDP accountant means std / sensitivity (google/differential-privacy, issue 378: given the documented value, its epsilon
is far too low). Events are made here in the documented sense, twice our noise multiplier under replace-one, and are
halved before the RDP accountant sees them: nothing counts twice, nothing is left out. → `_event`, `_per_sensitivity`

| sampling | add-or-remove-one | replace-one |
|---|---|---|
| `Poisson` | PLD, RDP | PLD |
| `FixedSize` | | RDP |
| `ShuffledEpochs` | | PLD, RDP |
| `Stated` | as dp-accounting supports the event | the same |

Batches of a fixed size make the size of the data set public, so they have no guarantee when it may change by one.
Everything else is refused with the reason. Every value is an upper bound: PLD rounds losses up, and what is merged to
save time is merged to the smaller noise.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache

import attr
import dp_accounting
import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, UnsupportedEventError
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.optimize import brentq

from dpcompile.errors import PrivacyError
from dpcompile.schemes import (
    SENSITIVITY,
    FixedSize,
    Neighbours,
    Poisson,
    Scheme,
    ShuffledEpochs,
    Stated,
    Step,
    check_count,
    merge,
    sensitivity,
)

INTERVAL = 1e-4  # losses of the PLD are rounded up to multiples of this, in nats; as in dp-accounting
STEP_POINTS = 2**18  # grid points for one step: about 2 s. Little noise has large losses, so the grid gets coarser
TOTAL_POINTS = 2**22  # the same for all steps together
COARSEST = 1.0  # nats; where losses need more, at epsilon above 100 000, the PLD says inf
DISTINCT = 32  # more noise multipliers than this in one record are rounded down, for each costs 0.2 to 0.4 s
RATIO = 1.01  # ... to powers of this
LARGEST_NOISE = 2.0**24  # where calibration gives up
LARGEST_EPSILON = 10_000.0  # what calibration takes; no such target protects anyone


class Accountant(StrEnum):
    """PLD: privacy loss distributions, tight. RDP: Renyi divergences, quick and 5 to 30 % higher."""

    PLD = "pld"
    RDP = "rdp"


def usual_accountant(scheme: Scheme) -> Accountant:
    """PLD, where it accounts for the sampling."""
    return Accountant.RDP if isinstance(scheme, FixedSize) else Accountant.PLD


def epsilon(
    steps: Sequence[Step],
    delta: float,
    *,
    accountant: Accountant = Accountant.PLD,
    neighbours: Neighbours = Neighbours.ADD_OR_REMOVE_ONE,
    value_discretization_interval: float | None = None,
) -> float:
    """Epsilon of all steps together at `delta`: 0 for no step, inf for a step without noise.

    Args:
        value_discretization_interval: grid of the PLD in nats, at most 1. None: INTERVAL, doubled until STEP_POINTS
            and TOTAL_POINTS hold (below a noise multiplier of about 0.4, or at hundreds of epsilon).

    Raises:
        PrivacyError: the accountant has no result for this sampling under this relation.
    """
    return Composition(accountant, neighbours, value_discretization_interval).epsilon(steps, delta)


def delta(
    steps: Sequence[Step],
    epsilon: float,
    *,
    accountant: Accountant = Accountant.PLD,
    neighbours: Neighbours = Neighbours.ADD_OR_REMOVE_ONE,
    value_discretization_interval: float | None = None,
) -> float:
    """Delta of all steps together at `epsilon`. Arguments and errors are those of `epsilon`."""
    return Composition(accountant, neighbours, value_discretization_interval).delta(steps, epsilon)


def calibrate(
    target_epsilon: float,
    target_delta: float,
    scheme: Scheme,
    count: int,
    *,
    accountant: Accountant = Accountant.PLD,
    neighbours: Neighbours = Neighbours.ADD_OR_REMOVE_ONE,
) -> float:
    """The smallest noise multiplier, to 0.2 % and rounded up, with which `count` steps stay within the target.

    Raises:
        PrivacyError: no noise reaches the target, or the event is stated, so its noise cannot be chosen.
    """
    if not 0 < target_epsilon <= LARGEST_EPSILON:
        raise ValueError(f"Expected target_epsilon={target_epsilon!r} in (0, {LARGEST_EPSILON:g}].")
    _check_delta(target_delta)
    check_count("count", count, 1)
    if isinstance(scheme, Stated):
        raise PrivacyError("accountant: the noise of a stated event is part of it. Give the noise multiplier instead.")

    @cache
    def spent(noise: float) -> float:
        return epsilon([Step(scheme, noise, count)], target_delta, accountant=accountant, neighbours=neighbours)

    def excess(log_noise: float) -> float:
        return math.log(min(max(spent(math.exp(log_noise)), 1e-12), 1e12) / target_epsilon)

    high = 0.0
    while excess(high) > 0:
        high += math.log(2)
        if high > math.log(LARGEST_NOISE):
            raise PrivacyError(
                f"accountant: no noise multiplier up to {LARGEST_NOISE:g} gives epsilon {target_epsilon:g} at delta "
                f"{target_delta:g} over {count} steps by {accountant.value}. Raise epsilon or delta."
            )
    low = high - math.log(2)
    while excess(low) <= 0:
        low, high = low - math.log(2), low
    root = float(brentq(excess, low, high, xtol=2e-4, rtol=1e-6))  # pyright: ignore[reportArgumentType]
    while spent(noise := _rounded_up(math.exp(root))) > target_epsilon:
        root += 2e-4
    return noise


class Composition:
    """An accountant that keeps what it composed, so that the cost of steps that grow is cheap to ask for again."""

    def __init__(self, accountant: Accountant, neighbours: Neighbours, interval: float | None = None) -> None:
        if interval is not None and not 0 < interval <= COARSEST:
            raise ValueError(f"Expected value_discretization_interval={interval!r} in (0, {COARSEST:g}].")
        self.accountant = Accountant(accountant)
        self.neighbours = Neighbours(neighbours)
        self._interval = interval
        self._grid = 0.0  # interval of what is settled
        self._settled: list[_Charge] = []
        self._base: PLDAccountant | _Renyi | None = None  # composed of what is settled

    def epsilon(self, steps: Sequence[Step], delta: float) -> float:
        _check_delta(delta)
        charges = _charges(steps)
        if not charges:
            return 0.0
        return math.inf if self._unbounded(charges) else float(self._composed(charges).get_epsilon(delta))

    def delta(self, steps: Sequence[Step], epsilon: float) -> float:
        if not epsilon >= 0:
            raise ValueError(f"Expected epsilon={epsilon!r} >= 0.")
        charges = _charges(steps)
        if not charges:
            return 0.0
        if self._unbounded(charges):
            return 1.0
        return min(1.0, max(0.0, float(self._composed(charges).get_delta(epsilon))))

    def _unbounded(self, charges: list[_Charge]) -> bool:
        if any(charge.noise_multiplier == 0 for charge in charges):
            return True
        return self.accountant is Accountant.PLD and self._grid_of(charges) > COARSEST

    def _grid_of(self, charges: list[_Charge]) -> float:
        return _grid(charges) if self._interval is None else self._interval

    def _composed(self, charges: list[_Charge]) -> PLDAccountant | _Renyi:
        """All but the last charge are kept: the next question is most often about one more of the last."""
        *settled, last = charges
        grid = self._grid_of(charges)
        known = len(self._settled)
        if self._base is None or grid != self._grid or settled[:known] != self._settled:
            self._base, self._grid, known = self._fresh(grid), grid, 0
        self._settled = settled[:known]
        for charge in settled[known:]:
            self._compose(self._base, charge)
            self._settled.append(charge)
        whole = copy.deepcopy(self._base)
        self._compose(whole, last)
        return whole

    def _fresh(self, grid: float) -> PLDAccountant | _Renyi:
        return PLDAccountant(_RELATION[self.neighbours], grid) if self.accountant is Accountant.PLD else _Renyi()

    def _compose(self, composed: PLDAccountant | _Renyi, charge: _Charge) -> None:
        try:
            if isinstance(composed, PLDAccountant):
                composed.compose(_event(charge.scheme, charge.noise_multiplier, self.neighbours), charge.count)
            else:
                composed.add(_renyi(charge.scheme, charge.noise_multiplier, self.neighbours), charge.count)
        except (UnsupportedEventError, _NotAccountedError) as error:
            raise PrivacyError(
                f"accountant: {charge.scheme.name} sampling has no {self.accountant.value} accounting under "
                f"{self.neighbours.value}; it is accounted under: {charge.scheme.accounted}. "
                "Choose another accountant, relation or sampling."
            ) from error


class _Renyi:
    """Renyi divergences of all steps together, at dp-accounting's orders."""

    def __init__(self) -> None:
        self._orders = RdpAccountant().orders
        self._total = np.zeros_like(self._orders)

    def add(self, divergences: NDArray[np.float64], count: int) -> None:
        self._total = self._total + count * divergences

    def get_epsilon(self, delta: float) -> float:
        return rdp_privacy_accountant.compute_epsilon(self._orders.tolist(), self._total.tolist(), delta)[0]

    def get_delta(self, epsilon: float) -> float:
        return rdp_privacy_accountant.compute_delta(self._orders.tolist(), self._total.tolist(), epsilon)[0]


@lru_cache(maxsize=4096)
def _renyi(scheme: Scheme, noise_multiplier: float, neighbours: Neighbours) -> NDArray[np.float64]:
    """Renyi divergences of one step. Kept, for they are the slow part and steps repeat."""
    event = _event(scheme, noise_multiplier, neighbours)
    if neighbours is Neighbours.REPLACE_ONE:
        event = _per_sensitivity(event)
    with _without_remarks():
        found = RdpAccountant(neighboring_relation=_RELATION[neighbours]).compose(event).rdp
    # Such a step costs something. Where rounding leaves nothing of it, dp-accounting would say epsilon 0.
    return found if isinstance(scheme, Stated) else np.where(found > 0, found, math.inf)


_RELATION = {
    Neighbours.ADD_OR_REMOVE_ONE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    Neighbours.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
}


class _NotAccountedError(Exception):
    """No known result, although dp-accounting would give a number."""


@dataclass(frozen=True)
class _Charge:
    """`count` times the event of a scheme: per step, or per epoch of ShuffledEpochs."""

    scheme: Scheme
    noise_multiplier: float
    count: int


def _event(scheme: Scheme, noise_multiplier: float, neighbours: Neighbours) -> DpEvent:
    """In dp-accounting's documented sense, noise per max_grad_norm."""
    if isinstance(scheme, ShuffledEpochs) and neighbours is not Neighbours.REPLACE_ONE:
        raise _NotAccountedError
    return scheme.event(GaussianDpEvent(noise_multiplier * sensitivity(neighbours)))


def _per_sensitivity(event: DpEvent) -> DpEvent:
    """The event under replace-one as the RDP accountant reads it: noise per sensitivity, which is half as much.

    Any event of which it is not known how that accountant reads it is refused.
    """
    if isinstance(event, GaussianDpEvent | dp_accounting.LaplaceDpEvent):
        return attr.evolve(event, noise_multiplier=event.noise_multiplier / SENSITIVITY[Neighbours.REPLACE_ONE])
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return attr.evolve(event, events=[_per_sensitivity(part) for part in event.events])
    if isinstance(event, dp_accounting.SelfComposedDpEvent | dp_accounting.SampledWithoutReplacementDpEvent):
        return attr.evolve(event, event=_per_sensitivity(event.event))
    if isinstance(event, dp_accounting.NoOpDpEvent | dp_accounting.NonPrivateDpEvent):
        return event
    raise _NotAccountedError


def _charges(steps: Iterable[Step]) -> list[_Charge]:
    """What the steps cost, equal things together, the last used last."""
    counts: dict[tuple[Scheme, float], int] = {}
    for scheme, noise, count in _paid(merge(steps)):
        counts[scheme, noise] = counts.pop((scheme, noise), 0) + count
    if len(counts) > DISTINCT:
        exact, counts = counts, {}
        for (scheme, noise), count in exact.items():
            key = scheme, noise if isinstance(scheme, Stated) else _rounded_down(noise)
            counts[key] = counts.pop(key, 0) + count
    return [_Charge(scheme, noise, count) for (scheme, noise), count in counts.items()]


def _paid(steps: Iterable[Step]) -> Iterator[tuple[Scheme, float, int]]:
    """(scheme, noise multiplier, how often): a step each, but of ShuffledEpochs an epoch at its smallest noise."""
    epochs: ShuffledEpochs | None = None
    done, noise = 0, math.inf  # steps of the epoch that is open, and their smallest noise
    for step in steps:
        if not isinstance(step.scheme, ShuffledEpochs):
            yield step.scheme, step.noise_multiplier, step.count
            continue
        if epochs and done and (step.reshuffled or step.scheme != epochs):
            yield epochs, noise, 1
            done, noise = 0, math.inf
        epochs, left = step.scheme, step.count
        if done:
            taken = min(left, epochs.steps_per_epoch - done)
            done, left, noise = done + taken, left - taken, min(noise, step.noise_multiplier)
            if done < epochs.steps_per_epoch:
                continue
            yield epochs, noise, 1
        whole, done = divmod(left, epochs.steps_per_epoch)
        noise = step.noise_multiplier if done else math.inf
        if whole:
            yield epochs, step.noise_multiplier, whole
    if epochs and done:
        yield epochs, noise, 1


def _grid(charges: Iterable[_Charge]) -> float:
    """INTERVAL, doubled until known losses fit: those of one step, and those of all, which are near normal.

    With s the noise multiplier and q the rate, one step loses at most about 1 / (2 s^2) + 10 / s nats, and its mean
    loss is below 1 / (2 s^2) and near q^2 (exp(1 / s^2) - 1) / 2.
    """
    mean, largest = 0.0, 0.0
    for charge in charges:
        if isinstance(charge.scheme, Stated):
            continue
        inverse = 1 / charge.noise_multiplier
        if isinstance(charge.scheme, Poisson) and charge.scheme.sample_rate < 1:
            rate = charge.scheme.sample_rate
            mean += charge.count * min(inverse**2, rate**2 * math.expm1(min(inverse**2, 500.0))) / 2
        else:
            mean += charge.count * inverse**2 / 2
            inverse *= math.sqrt(charge.count)  # composed Gaussians are one
        largest = max(largest, inverse**2 / 2 + 10 * inverse)
    needed = max(largest / STEP_POINTS, 2 * (mean + 10 * math.sqrt(2 * mean)) / TOTAL_POINTS)
    return INTERVAL * 2.0 ** max(0, math.ceil(math.log2(max(needed, INTERVAL) / INTERVAL)))


def _rounded_down(noise: float) -> float:
    """To a power of RATIO: a little more cost, and far fewer distinct values."""
    return noise and min(noise, RATIO ** math.floor(math.log(noise, RATIO)))


def _rounded_up(value: float) -> float:
    """To four digits behind the first, so that what is printed is what was meant."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 4)
    return math.ceil(value / unit) * unit


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Without dp-accounting's warning that it leaves a Renyi order out, which costs tightness alone."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in str(record.msg)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta!r} in (0, 1).")
