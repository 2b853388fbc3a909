"""How one sample's gradient is bounded: the clip factor as a function of its norm, and which parameters share a norm.

Every clip factor C(n) here satisfies n C(n) <= R, so that R is the sensitivity of a group's clipped sum to adding or
removing one sample; with groups of bounds R_1 ... R_G the sensitivity of all of them is sqrt(sum_g R_g^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

STABILITY = 0.01
"""gamma of AUTO-S and r of PSAC, the authors' defaults."""


def abadi(norms_B: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """min(1, R / n) (Abadi et al. 2016, arXiv:1607.00133, algorithm 1)."""
    return (bound / norms_B).clamp(max=1.0)


def auto_s(norms_B: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """R / (n + gamma) (Bu et al. 2023, arXiv:2206.07136, AUTO-S)."""
    return bound / (norms_B + STABILITY)


def auto_v(norms_B: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """R / n, 0 for a gradient of zero (Bu et al. 2023, arXiv:2206.07136, AUTO-V; also: normalised gradients)."""
    return torch.where(norms_B > 0, bound / norms_B, 0.0)


def psac(norms_B: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """R / (n + r / (n + r)) (Xia et al. 2023, arXiv:2212.00328, eq. 4)."""
    return bound / (norms_B + STABILITY / (norms_B + STABILITY))


FUNCTIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "abadi": abadi,
    "auto-s": auto_s,
    "auto-v": auto_v,
    "psac": psac,
    "normalise": auto_v,
}


@dataclass(frozen=True)
class ClipGroup:
    """Parameters whose gradients are clipped by one norm."""

    name: str
    parameters: tuple[str, ...]  # qualified names
    bound: float  # R of this group at compile time; a run may change it


@dataclass(frozen=True)
class Clipping:
    """The clip function, and a partition of the trainable parameters."""

    function: str
    groups: tuple[ClipGroup, ...]

    def factor(self, norms_B: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        """[B] clip factors from [B] norms and the group's bound."""
        return FUNCTIONS[self.function](norms_B, bound)

    def group_of(self, parameter: str) -> int:
        """Which group a parameter is in."""
        return next(i for i, group in enumerate(self.groups) if parameter in group.parameters)


def total_bound(bounds: Sequence[float]) -> float:
    """Norm of what one sample contributes at most to all groups together: sqrt(sum of squares)."""
    return math.hypot(*bounds)


def clipping_of(
    parameters: Sequence[str],
    max_grad_norm: float,
    function: str = "abadi",
    groups: str | Sequence[str] | Mapping[str, float | None] = "flat",
) -> Clipping:
    """The clipping that the arguments of `dpcompile` describe.

    Args:
        parameters: qualified names of the trainable parameters.
        max_grad_norm: R of all groups together; a group without a bound of its own gets R / sqrt(number of groups).
        function: one of FUNCTIONS.
        groups: "flat"; "per-layer": one group for each module that owns parameters; name patterns (as in a shell,
            the first that matches counts), or a dict of pattern to bound.

    Raises:
        ValueError: an unknown function, a bound that is not positive, a parameter that no pattern matches.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"Expected clipping={function!r} to be one of {', '.join(FUNCTIONS)}.")
    bounds: Mapping[str, float | None]
    if groups == "flat":
        members, bounds = {"all": list(parameters)}, {"all": max_grad_norm}
    elif groups == "per-layer":
        members = _by_module(parameters)
        bounds = dict.fromkeys(members)
    elif isinstance(groups, str):
        raise ValueError(f"Expected clip_groups={groups!r} to be 'flat', 'per-layer', patterns or a dict of them.")
    else:
        bounds = groups if isinstance(groups, Mapping) else dict.fromkeys(groups)
        members = _by_pattern(parameters, tuple(bounds))
    share = max_grad_norm / math.sqrt(len(members))
    made = tuple(ClipGroup(name, tuple(names), _bound(name, bounds[name], share)) for name, names in members.items())
    if function != "abadi" and any(math.isinf(group.bound) for group in made):
        raise ValueError(f"Expected a finite max_grad_norm with clipping={function!r}: it scales every gradient to it.")
    return Clipping(function, made)


def _bound(name: str, given: float | None, share: float) -> float:
    bound = share if given is None else float(given)
    if not bound > 0:
        raise ValueError(f"Expected the bound {given!r} of clip group {name!r} > 0.")
    return bound


def _by_module(parameters: Sequence[str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for name in parameters:
        members.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return members


def _by_pattern(parameters: Sequence[str], patterns: Sequence[str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    left: list[str] = []
    for name in parameters:
        pattern = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        (left if pattern is None else members[pattern]).append(name)
    if left:
        raise ValueError(
            f"clip_groups: no pattern matches {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}. "
            "Add a last pattern '*' for the rest."
        )
    empty = [pattern for pattern, names in members.items() if not names]
    if empty:
        raise ValueError(f"clip_groups: no trainable parameter matches {', '.join(map(repr, empty))}.")
    return members
