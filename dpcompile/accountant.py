"""What a sequence of noisy steps costs in (epsilon, delta), by Google's dp-accounting.

The convention, here and everywhere in dpcompile:

    noise std = noise_multiplier * max_grad_norm * sensitivity(neighbours)

so `noise_multiplier` is noise per L2 sensitivity of the clipped sum. Adding or removing one sample moves that sum by at
most max_grad_norm, replacing one by at most twice that. → `sensitivity`

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
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, lru_cache
from typing import Any, ClassVar

import attr
import dp_accounting
import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, UnsupportedEventError, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.optimize import brentq

from dpcompile.errors import PrivacyError

INTERVAL = 1e-4  # losses of the PLD are rounded up to multiples of this, in nats; as in dp-accounting
STEP_POINTS = 2**18  # grid points for one step: about 2 s. Little noise has large losses, so the grid gets coarser
TOTAL_POINTS = 2**22  # the same for all steps together
COARSEST = 1.0  # nats; where losses need more, at epsilon above 100 000, the PLD says inf
DISTINCT = 32  # more noise multipliers than this in one record are rounded down, for each costs 0.2 to 0.4 s
RATIO = 1.01  # ... to powers of this
LARGEST_NOISE = 2.0**24  # where calibration gives up
LARGEST_EPSILON = 10_000.0  # what calibration takes; no such target protects anyone


class Neighbours(StrEnum):
    """Which two data sets must be hard to tell apart."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


class Accountant(StrEnum):
    """PLD: privacy loss distributions, tight. RDP: Renyi divergences, quick and 5 to 30 % higher."""

    PLD = "pld"
    RDP = "rdp"


SENSITIVITY = {Neighbours.ADD_OR_REMOVE_ONE: 1.0, Neighbours.REPLACE_ONE: 2.0}


def sensitivity(neighbours: Neighbours) -> float:
    """By how many max_grad_norm one change of the data moves the sum of clipped gradients."""
    return SENSITIVITY[neighbours]


@dataclass(frozen=True)
class Poisson:
    """Every sample is in every batch with probability `sample_rate`, independently."""

    sample_rate: float

    name: ClassVar[str] = "poisson"
    accounted: ClassVar[str] = "add-or-remove-one by pld or rdp, replace-one by pld"

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"Expected sample_rate={self.sample_rate!r} in (0, 1].")

    @property
    def rate(self) -> float:
        return self.sample_rate

    def event(self, gaussian: GaussianDpEvent) -> DpEvent:
        """What one step releases."""
        return gaussian if self.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(self.sample_rate, gaussian)


@dataclass(frozen=True)
class FixedSize:
    """`batch_size` different samples, uniformly among all such sets, drawn anew at every step.

    References: Wang, Balle and Kasiviswanathan 2019, "Subsampled Renyi Differential Privacy and Analytical Moments
    Accountant", arXiv:1808.00087, theorem 27. There is no PLD here on purpose: the worst pair of data sets for one step
    is not the worst for many (Lebeda, Regehr, Kamath and Steinke 2024, "Avoiding Pitfalls for Privacy Accounting of
    Subsampled Mechanisms under Composition", arXiv:2405.20769).
    """

    dataset_size: int
    batch_size: int

    name: ClassVar[str] = "fixed-size"
    accounted: ClassVar[str] = "replace-one by rdp"

    def __post_init__(self) -> None:
        _check_sizes(self.dataset_size, self.batch_size)

    @property
    def rate(self) -> float:
        return self.batch_size / self.dataset_size

    def event(self, gaussian: GaussianDpEvent) -> DpEvent:
        """What one step releases."""
        return dp_accounting.SampledWithoutReplacementDpEvent(self.dataset_size, self.batch_size, gaussian)


@dataclass(frozen=True)
class ShuffledEpochs:
    """A fresh permutation of the data set per epoch, cut into batches; the last one may be short.

    A sample is in exactly one batch of an epoch, so an epoch costs one Gaussian mechanism on the whole data set, and no
    amplification is claimed for the shuffling. If noise changes within an epoch, its smallest noise counts: given the
    permutation the sample meets one of the noises, and divergences are jointly convex. A begun epoch counts as a whole.

    Only replace-one: a replaced sample keeps its place, so one batch changes, by 2 max_grad_norm. If a sample is
    removed, its place is filled: at best a sample of the last batch moves there. So two batches change, by 2 and by 1
    max_grad_norm, or the number of batches does, which anyone can see. The proofs in the references are for "zero-out"
    (the place stays, empty), which no loader of a smaller data set does.

    References: Chua et al. 2024, "How Private are DP-SGD Implementations?", arXiv:2403.17673, and "Scalable DP-SGD:
    Shuffling vs. Poisson Subsampling", arXiv:2411.04205: shuffled epochs can cost far more than Poisson sampling of the
    same batch size, so accounting them as Poisson claims what is not true.
    """

    dataset_size: int
    batch_size: int

    name: ClassVar[str] = "shuffled"
    accounted: ClassVar[str] = "replace-one by pld or rdp"

    def __post_init__(self) -> None:
        _check_sizes(self.dataset_size, self.batch_size)

    @property
    def rate(self) -> float:
        return self.batch_size / self.dataset_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.dataset_size // self.batch_size)

    def event(self, gaussian: GaussianDpEvent) -> DpEvent:
        """What one epoch releases about one sample."""
        return gaussian


@dataclass(frozen=True)
class Stated:
    """A step whose event the user states, for a sampler that dpcompile does not know.

    Args:
        event_of_step: in dp-accounting's documented sense: noise per max_grad_norm. Under replace-one that is twice
            the noise multiplier of dpcompile.
        noise_multiplier: at which the event holds, in dpcompile's sense. A step with less noise is refused.
    """

    event_of_step: DpEvent
    noise_multiplier: float

    name: ClassVar[str] = "stated"
    accounted: ClassVar[str] = "what dp-accounting supports for the stated event"

    def __post_init__(self) -> None:
        if not isinstance(self.event_of_step, DpEvent):
            raise ValueError(f"Expected event_of_step={self.event_of_step!r} to be a dp_accounting.DpEvent.")
        _check_noise(self.noise_multiplier)

    def __hash__(self) -> int:
        return hash((repr(self.event_of_step), self.noise_multiplier))

    @property
    def rate(self) -> None:
        return None

    def event(self, gaussian: GaussianDpEvent) -> DpEvent:
        """What one step releases, as the user said."""
        return self.event_of_step


Scheme = Poisson | FixedSize | ShuffledEpochs | Stated
KINDS: dict[str, type[Scheme]] = {kind.name: kind for kind in (Poisson, FixedSize, ShuffledEpochs, Stated)}


@dataclass(frozen=True)
class Step:
    """`count` equal steps, one after the other, as they were released.

    Args:
        reshuffled: of ShuffledEpochs: before the first of these steps the data set was shuffled anew, whether or not
            the epoch before was complete. Set it at the first step of every epoch; it makes a broken-off epoch count.
    """

    scheme: Scheme
    noise_multiplier: float
    count: int = 1
    reshuffled: bool = False

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_count("count", self.count, 0)
        if isinstance(self.scheme, Stated) and self.noise_multiplier < self.scheme.noise_multiplier:
            raise PrivacyError(
                f"accountant: the event was stated for a noise multiplier of {self.scheme.noise_multiplier:g}, this "
                f"step had {self.noise_multiplier:g}. State the event of this step."
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": scheme_to_json(self.scheme),
            "noise_multiplier": self.noise_multiplier,
            "count": self.count,
            "reshuffled": self.reshuffled,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> Step:
        return Step(
            scheme_from_json(record["scheme"]), record["noise_multiplier"], record["count"], record["reshuffled"]
        )


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """Plain JSON types, with the scheme's name under "kind"."""
    if isinstance(scheme, Stated):
        fields: dict[str, Any] = {"event": _event_to_json(scheme.event_of_step)}
        return {"kind": scheme.name, **fields, "noise_multiplier": scheme.noise_multiplier}
    return {"kind": scheme.name, **vars(scheme)}


def scheme_from_json(record: dict[str, Any]) -> Scheme:
    """The scheme of `scheme_to_json`. KeyError, TypeError or ValueError if it is none."""
    fields = {name: value for name, value in record.items() if name != "kind"}
    if record["kind"] == Stated.name:
        return Stated(_event_from_json(fields["event"]), fields["noise_multiplier"])
    return KINDS[record["kind"]](**fields)


def merge(steps: Iterable[Step]) -> list[Step]:
    """The same steps with equal neighbours joined. A new shuffle begins a new one."""
    merged: list[Step] = []
    for step in steps:
        last = merged[-1] if merged else None
        if step.count == 0:
            continue
        if last and replace(step, count=last.count, reshuffled=last.reshuffled) == last and not step.reshuffled:
            merged[-1] = replace(last, count=last.count + step.count)
        else:
            merged.append(step)
    return merged


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
    _check_count("count", count, 1)
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


def _event_to_json(value: Any) -> Any:
    if isinstance(value, DpEvent):
        fields = {field.name: _event_to_json(getattr(value, field.name)) for field in attr.fields(type(value))}
        return {"class": type(value).__name__, **fields}
    return [_event_to_json(part) for part in value] if isinstance(value, list | tuple) else value


def _event_from_json(value: Any) -> Any:
    """Only events of dp-accounting itself are made, whatever the record names."""
    if isinstance(value, dict):
        kind = getattr(dp_event, str(value["class"]), None)
        if not (isinstance(kind, type) and issubclass(kind, DpEvent)):
            raise ValueError(f"Expected class={value['class']!r} to be an event of dp_accounting.dp_event.")
        return kind(**{name: _event_from_json(part) for name, part in value.items() if name != "class"})
    return [_event_from_json(part) for part in value] if isinstance(value, list) else value


def _check_noise(noise_multiplier: float) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"Expected noise_multiplier={noise_multiplier!r} in [0, inf).")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta!r} in (0, 1).")


def _check_count(name: str, count: int, least: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"Expected {name}={count!r} to be a whole number of at least {least}.")


def _check_sizes(dataset_size: int, batch_size: int) -> None:
    _check_count("dataset_size", dataset_size, 1)
    _check_count("batch_size", batch_size, 1)
    if batch_size > dataset_size:
        raise ValueError(f"Expected batch_size={batch_size} <= dataset_size={dataset_size}.")
