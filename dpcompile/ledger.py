"""The ledger: which noisy steps were released, and what they cost together. Steps are added and never taken away.

    ledger = Ledger(Neighbours.ADD_OR_REMOVE_ONE, target_delta=1e-5)
    step = Step(Poisson(0.01), noise_multiplier=1.0)
    if ledger.steps_left(step, target_epsilon) > 0:     # quick: searched once, then counted down
        ledger.record(step, max_grad_norm=1.0)          # before the noisy gradient is used, so a crash over-counts
    ledger.epsilon()

Its state is plain JSON, so that it can be read without dpcompile.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scipy.optimize import brentq

from dpcompile.accountant import Accountant, Composition
from dpcompile.errors import PrivacyError
from dpcompile.files import write_whole
from dpcompile.schemes import Neighbours, Step, merge, sensitivity

FORMAT = 1
MOST_STEPS = 10_000_000  # how far steps_left looks


@dataclass(frozen=True)
class Row:
    """Equal steps in a row, in the reader's terms. `first` and `last` count from 1 and are both included."""

    first: int
    last: int
    sampler: str
    rate: float | None  # expected batch size / data set size; None if the event was stated
    noise_multiplier: float  # noise std / (max_grad_norm * sensitivity)
    max_grad_norm: float  # of a whole sample, over all groups
    sensitivity: float  # of the clipped sum, in max_grad_norm

    @property
    def noise_std(self) -> float:
        """Of the noise that was added to the clipped sum."""
        return self.noise_multiplier * self.max_grad_norm * self.sensitivity


@dataclass(frozen=True)
class _Entry:
    step: Step
    max_grad_norm: float

    def joined(self, other: _Entry) -> _Entry | None:
        """Both as one entry, if they are equal but for how many."""
        steps = merge([self.step, other.step])
        same = self.max_grad_norm == other.max_grad_norm and len(steps) == 1
        return _Entry(steps[0], self.max_grad_norm) if same else None


@dataclass
class _Countdown:
    """How many more of one step fit, as searched once."""

    question: tuple[Step, float, float, Accountant]
    left: int


class Ledger:
    """What was released.

    Args:
        neighbours: the relation that the noise was scaled for.
        target_delta: the delta that epsilon is given at when none is named.
    """

    def __init__(self, neighbours: Neighbours, target_delta: float) -> None:
        if not 0 < target_delta < 1:
            raise ValueError(f"Expected target_delta={target_delta!r} in (0, 1).")
        self.neighbours = Neighbours(neighbours)
        self.target_delta = target_delta
        self._entries: list[_Entry] = []
        self._compositions = {kind: Composition(kind, self.neighbours) for kind in Accountant}
        self._countdown: _Countdown | None = None

    def __len__(self) -> int:
        """How many steps were released."""
        return sum(entry.step.count for entry in self._entries)

    def record(self, step: Step, *, max_grad_norm: float) -> None:
        """Add what is being released.

        Args:
            max_grad_norm: of a whole sample; noise std = step.noise_multiplier * max_grad_norm * sensitivity.
        """
        if not 0 < max_grad_norm < math.inf:
            raise ValueError(f"Expected max_grad_norm={max_grad_norm!r} in (0, inf).")
        if step.count == 0:
            return
        self._append(_Entry(step, float(max_grad_norm)))
        if self._countdown is not None:
            if self._countdown.question[0] == replace(step, count=1):
                self._countdown.left -= step.count
            else:
                self._countdown = None

    def steps(self, until: int | None = None) -> list[Step]:
        """The released steps, equal ones together; with `until` only that many from the first on."""
        found: list[Step] = []
        left = len(self) if until is None else until
        for entry in self._entries:
            if left <= 0:
                break
            found.append(replace(entry.step, count=min(left, entry.step.count)))
            left -= entry.step.count
        return merge(found)

    def rows(self) -> list[Row]:
        """One row for each run of equal steps."""
        rows: list[Row] = []
        first = 1
        for entry in self._entries:
            step = entry.step
            rows.append(
                Row(
                    first=first,
                    last=first + step.count - 1,
                    sampler=step.scheme.name,
                    rate=step.scheme.rate,
                    noise_multiplier=step.noise_multiplier,
                    max_grad_norm=entry.max_grad_norm,
                    sensitivity=sensitivity(self.neighbours),
                )
            )
            first += step.count
        return rows

    def epsilon(
        self, delta: float | None = None, accountant: Accountant = Accountant.PLD, *, until: int | None = None
    ) -> float:
        """What was spent at `delta` (the target's when left out), or by the first `until` steps of it."""
        return self._epsilon(self.steps(until), delta, accountant)

    def delta(self, epsilon: float, accountant: Accountant = Accountant.PLD) -> float:
        """What was spent, as delta at `epsilon`."""
        return self._compositions[accountant].delta(self.steps(), epsilon)

    def after(self, step: Step, delta: float | None = None, accountant: Accountant = Accountant.PLD) -> float:
        """Epsilon if `step` were taken too. Nothing is recorded."""
        return self._epsilon([*self.steps(), step], delta, accountant)

    def steps_left(
        self,
        step: Step,
        target_epsilon: float,
        delta: float | None = None,
        accountant: Accountant = Accountant.PLD,
        limit: int = MOST_STEPS,
    ) -> int:
        """How many more steps like `step` stay within `target_epsilon`, up to `limit`.

        The search asks for epsilon about ten times. While only such steps are recorded its answer is counted down
        instead of searched again.
        """
        at = self.target_delta if delta is None else delta
        question = replace(step, count=1), target_epsilon, at, accountant
        if self._countdown is None or self._countdown.question != question:
            released = self.steps()

            def spent(count: int) -> float:
                return self._epsilon([*released, replace(step, count=count)], at, accountant)

            self._countdown = _Countdown(question, _largest(spent, target_epsilon, limit))
        return max(0, min(limit, self._countdown.left))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types. Samplers, rates and sensitivities are there for the reader too."""
        rows = [
            {**entry.step.to_json(), "max_grad_norm": entry.max_grad_norm, "first": row.first, "last": row.last}
            for entry, row in zip(self._entries, self.rows(), strict=True)
        ]
        return {
            "format": FORMAT,
            "neighbours": self.neighbours.value,
            "sensitivity": sensitivity(self.neighbours),
            "target_delta": self.target_delta,
            "steps": len(self),
            "records": rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the ledger of `state`.

        Raises:
            PrivacyError: the state is malformed, of a later format, of another relation or delta, or lacks steps that
                this ledger already has.
        """
        loaded = Ledger.from_state_dict(state)
        for name in ("neighbours", "target_delta"):
            own, other = getattr(self, name), getattr(loaded, name)
            if own != other:
                raise PrivacyError(
                    f"ledger: the state was written with {name}={other}, this ledger has {own}. Resume with the same."
                )
        if not _continues(self._entries, loaded._entries):
            raise PrivacyError(
                f"ledger: this ledger holds {len(self)} released steps that the state does not have, and none can be "
                "taken back. Load the state into a new one only if those steps were never released."
            )
        self._entries = loaded._entries
        self._countdown = None

    def joined(self, other: Ledger) -> Ledger:
        """The longer of two ledgers of one run. PrivacyError if neither continues the other."""
        shorter, longer = sorted((self, other), key=len)
        copied = Ledger.from_state_dict(shorter.state_dict())
        copied.load_state_dict(longer.state_dict())
        return copied

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Ledger:
        """A ledger as `state` has it. PrivacyError if it is malformed or of a later format."""
        try:
            if state["format"] != FORMAT:
                raise PrivacyError(
                    f"ledger: the state has format {state['format']!r}, this version of dpcompile reads {FORMAT}. "
                    "Install a version that knows it."
                )
            ledger = cls(Neighbours(state["neighbours"]), _number(state["target_delta"]))
            for record in state["records"]:
                ledger._append_record(record)
            if (len(ledger), sensitivity(ledger.neighbours)) != (state["steps"], state["sensitivity"]):
                raise ValueError(f"{state['steps']!r} steps are stated and {len(ledger)} recorded")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PrivacyError(
                f"ledger: the state is malformed ({type(error).__name__}: {error}), so what was spent is not known. "
                "Resume from a checkpoint whose ledger is whole."
            ) from error
        return ledger

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as JSON: after a crash at any moment the file is the old or the new one, whole."""
        text = json.dumps(self.state_dict(), indent=1)
        write_whole(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """The ledger of a file that `save` wrote. PrivacyError if it is none."""
        try:
            state = json.loads(Path(path).read_text())
        except ValueError as error:
            raise PrivacyError(f"ledger: {str(path)!r} is no ledger, it is not JSON.") from error
        return cls.from_state_dict(state)

    def _epsilon(self, steps: Sequence[Step], delta: float | None, accountant: Accountant) -> float:
        return self._compositions[accountant].epsilon(steps, self.target_delta if delta is None else delta)

    def _append(self, entry: _Entry) -> None:
        joined = self._entries[-1].joined(entry) if self._entries else None
        if joined is None:
            self._entries.append(entry)
        else:
            self._entries[-1] = joined

    def _append_record(self, record: dict[str, Any]) -> None:
        step = Step.from_json(record)
        first = len(self) + 1
        if (record["first"], record["last"]) != (first, first + step.count - 1):
            raise ValueError(f"steps {record['first']} to {record['last']} do not follow step {first - 1}")
        self.record(step, max_grad_norm=_number(record["max_grad_norm"]))


def _largest(spent: Callable[[int], float], target: float, limit: int) -> int:
    """The largest count up to `limit` with spent(count) <= target, if more never costs less; 0 if there is none."""
    spent = cache(spent)
    low, high = 0, 1
    while spent(high) <= target:
        if high == limit:
            return limit
        low, high = high, min(16 * high, limit)
    if low == 0:
        return 0

    def excess(count: float) -> float:
        return min(spent(round(count)), 2 * target + 1) - target

    count = round(float(brentq(excess, low, high, xtol=0.5)))  # pyright: ignore[reportArgumentType]
    while spent(count) > target:
        count -= 1
    while spent(count + 1) <= target:
        count += 1
    return count


def _continues(own: Sequence[_Entry], loaded: Sequence[_Entry]) -> bool:
    """Whether every step of `own` is in `loaded`, in the same places."""
    if not own:
        return True
    if len(loaded) < len(own) or list(loaded[: len(own) - 1]) != list(own[:-1]):
        return False
    last, same = own[-1], loaded[len(own) - 1]
    grown = _Entry(replace(last.step, count=same.step.count), last.max_grad_norm)
    return grown == same and same.step.count >= last.step.count


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
