"""A lower bound on epsilon from one training run: what the run leaked, whatever was promised of it.

    included_m = fair coins                     # canary i is in the training data if included_m[i]
    scores_m = ...                              # from what training released: high means "was in"
    found = audit(scores_m, included_m, delta=1e-5)
    found.epsilon                               # with confidence 95 %, the training is not (less, delta)-private

The canaries with the highest scores are guessed to be in, those with the lowest to be out, and there is no guess on the
rest. If training is (epsilon, delta)-private when one sample is added or removed, then out of r guesses

    P(at least v right) <= P(W >= v) + 2 m delta max_{1<=i<=v} P(v - i <= W < v) / i,    W ~ Binomial(r, q)

with q = e^epsilon / (1 + e^epsilon), over the coins and the training. → `p_value`. Every epsilon for which that is
below 1 - confidence is rejected. → `epsilon_lower_bound`

This is theorem 5.2 of the paper, as its appendix D computes it. It needs the coins fair, independent of one another and
of everything else, and guesses made of the training's results alone. It needs nothing of the model, the scores or the
other data. So a bound above the promise is a fault of the training, but for a chance of 1 - confidence; a bound below
it proves nothing. At 95 % and delta = 0 no bound is above ln(r / 3): to find more takes more canaries.

References: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import binom

FRACTIONS = (0.01, 0.05, 0.2, 0.3)  # of the canaries, guessed on each side: few for small epsilons, many for large
TOLERANCE = 1e-6  # of the bound, in nats


@dataclass(frozen=True)
class Audit:
    """What one run gave away."""

    epsilon: float  # lower bound
    delta: float  # that it holds at
    confidence: float  # of the bound, all choices of how many to guess together
    canaries: int  # m, with a coin each
    guesses: int  # r, of the choice that gave the bound; half of them "in" and half "out"
    correct: int  # v

    @property
    def accuracy(self) -> float:
        """Share of the guesses that were right."""
        return self.correct / self.guesses


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float = 0.0) -> float:
    """At most how probable this many right guesses are if training is (epsilon, delta)-private.

    Args:
        canaries: m, each in the training data with probability 1/2.
        guesses: r <= m, fixed before the coins were thrown.
        correct: v <= r.
        epsilon: in nats, when one sample is added or removed.
        delta: at that epsilon.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"Expected 0 <= correct={correct!r} <= guesses={guesses!r} <= canaries={canaries!r}.")
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon={epsilon!r} >= 0.")
    if not 0 <= delta <= 1:
        raise ValueError(f"Expected delta={delta!r} in [0, 1].")
    right = expit(epsilon)  # a guess on randomised response
    probability = float(binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return probability
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))  # P(v - i <= W < v), i from 1 to v
    slope = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, probability + 2 * canaries * delta * slope)


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon (within TOLERANCE, below) that this many right guesses refute at `delta`; 0 if none.

    The search takes the p-value to grow with epsilon. Should it not, the bound is smaller than it could be and still
    one: what is not (epsilon, delta)-private is not so for any smaller epsilon either.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence={confidence!r} in (0, 1).")

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def count_correct(scores: ArrayLike, included: ArrayLike, each_side: int) -> int:
    """How many guesses are right: the `each_side` highest scores are guessed in, the `each_side` lowest out.

    Args:
        scores: [m] high where a canary seems to be in the data. Of equal ones the first counts as the lower.
        included: [m] whether it is.
        each_side: guesses on each side; at most m / 2.
    """
    scores_m, included_m = _checked(scores, included)
    if not 0 <= each_side <= len(scores_m) // 2:
        raise ValueError(f"Expected each_side={each_side!r} from 0 to half of the {len(scores_m)} canaries.")
    ascending_m = included_m[np.argsort(scores_m, kind="stable")]
    return int((~ascending_m[:each_side]).sum() + ascending_m[len(ascending_m) - each_side :].sum())


def audit(
    scores: ArrayLike,
    included: ArrayLike,
    delta: float,
    *,
    fractions: Sequence[float] = FRACTIONS,
    confidence: float = 0.95,
) -> Audit:
    """The best bound over several numbers of guesses.

    Each of the J fractions is tested at confidence 1 - (1 - confidence) / J (Bonferroni), so that taking the best of
    them is paid for. Fix the fractions before looking at scores; one fraction alone pays nothing.

    Args:
        scores: [m] of training's results alone: high where a canary seems to be in the data.
        included: [m] its coin.
        delta: of the claim that is tested.
        fractions: how many of the canaries to guess on each side, as parts of m up to 1/2.
        confidence: of the bound that is returned.
    """
    scores_m, included_m = _checked(scores, included)
    canaries = len(scores_m)
    sides = [round(fraction * canaries) for fraction in fractions]
    if not sides or not all(1 <= side <= canaries // 2 for side in sides):
        raise ValueError(
            f"Expected fractions={tuple(fractions)!r} of {canaries} canaries to be from 1 to half of them."
        )
    each = 1 - (1 - confidence) / len(sides)
    found: list[Audit] = []
    for side in sides:
        correct = count_correct(scores_m, included_m, side)
        bound = epsilon_lower_bound(canaries, 2 * side, correct, delta, each)
        found.append(Audit(bound, delta, confidence, canaries, 2 * side, correct))
    return max(found, key=lambda one: one.epsilon)


def _checked(scores: ArrayLike, included: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores_m, included_m = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if scores_m.ndim != 1 or included_m.shape != scores_m.shape or included_m.dtype != np.bool_:
        raise ValueError(
            f"Expected scores [m] and included [m] of bool, got {list(scores_m.shape)} and {list(included_m.shape)} of "
            f"{included_m.dtype}."
        )
    if np.isnan(scores_m).any():
        raise ValueError("Expected scores without NaN: a canary without a score has no place in the order.")
    return scores_m, included_m
