"""How batches are sampled, and what one step of it releases: the vocabulary of accounting, without its mathematics.

The convention, here and everywhere in dpcompile:

    noise std = noise_multiplier * max_grad_norm * sensitivity(neighbours)

so `noise_multiplier` is noise per L2 sensitivity of the clipped sum. Adding or removing one sample moves that sum by at
most max_grad_norm, replacing one by at most twice that. → `sensitivity`
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import attr
import dp_accounting
from dp_accounting import DpEvent, GaussianDpEvent, dp_event

from dpcompile.errors import PrivacyError


class Neighbours(StrEnum):
    """Which two data sets must be hard to tell apart."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


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
        check_count("count", self.count, 0)
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


def usual_neighbours(scheme: Scheme) -> Neighbours:
    """The relation that a sampling is accounted under where none is asked for."""
    return Neighbours.ADD_OR_REMOVE_ONE if isinstance(scheme, Poisson | Stated) else Neighbours.REPLACE_ONE


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


def check_count(name: str, count: int, least: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"Expected {name}={count!r} to be a whole number of at least {least}.")


def _check_sizes(dataset_size: int, batch_size: int) -> None:
    check_count("dataset_size", dataset_size, 1)
    check_count("batch_size", batch_size, 1)
    if batch_size > dataset_size:
        raise ValueError(f"Expected batch_size={batch_size} <= dataset_size={dataset_size}.")
