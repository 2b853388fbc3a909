"""Adaptive clipping: the bound follows a private estimate of a quantile of the gradient norms.

Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", arXiv:1905.03871, algorithm 1 and
theorem 1: of the noise multiplier that is accounted, the gradients get z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2) and the
count of unclipped samples gets sigma_b. With G clip groups G counts are released; together they move by sqrt(G) / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dpcompile.noise import NoiseSource


@dataclass(frozen=True)
class AdaptiveClipping:
    """How max_grad_norm follows the norms.

    Args:
        target_quantile: fraction of samples whose gradient should stay unclipped.
        learning_rate: eta of the update R <- R exp(-eta (b - target_quantile)).
        count_noise: sigma_b, std of the noise on the count of unclipped samples, in samples. The paper takes a
            twentieth of the expected batch size.
        smallest, largest: R is kept within.
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float = 10.0
    smallest: float = 1e-6
    largest: float = 1e6

    def __post_init__(self) -> None:
        if not 0 <= self.target_quantile <= 1:
            raise ValueError(f"Expected target_quantile={self.target_quantile!r} in [0, 1].")
        if not 0 < self.count_noise < math.inf:
            raise ValueError(
                f"Expected count_noise={self.count_noise!r} > 0: the count is released with the gradients."
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"Expected learning_rate={self.learning_rate!r} > 0.")
        if not 0 < self.smallest <= self.largest < math.inf:
            raise ValueError(f"Expected 0 < smallest={self.smallest!r} <= largest={self.largest!r}.")

    def gradient_noise(self, noise_multiplier: float, groups: int) -> float:
        """The noise multiplier of the gradients, so that gradients and counts together have `noise_multiplier`.

        Raises:
            ValueError: the counts alone spend more than that.
        """
        left = noise_multiplier**-2 - groups / (2 * self.count_noise) ** 2
        if left <= 0:
            smallest = math.sqrt(groups) * noise_multiplier / 2
            raise ValueError(
                f"Expected count_noise={self.count_noise!r} > {smallest:g}: at noise_multiplier={noise_multiplier:g} "
                "the counts alone would spend all of it."
            )
        return left**-0.5

    def unclipped(self, norms_GB: torch.Tensor, bounds: list[float], weight_B: torch.Tensor | None) -> torch.Tensor:
        """[G] sum over samples of 1[norm <= R] - 1/2: one sample moves each by 1/2."""
        limits = torch.tensor(bounds, dtype=torch.float64, device=norms_GB.device)[:, None]
        counted = (norms_GB.double() <= limits).double() - 0.5
        real = counted if weight_B is None else counted * (weight_B.to(counted.device) > 0)
        return real.sum(1).cpu()

    def updated(
        self,
        bounds: list[float],
        counts_G: torch.Tensor,
        *,
        sensitivity: float,
        expected_batch_size: float,
        noise: NoiseSource,
    ) -> list[float]:
        """The bounds of the next step, from the counts of this one. `expected_batch_size` is never the realised one."""
        noisy = noise.noised(counts_G, self.count_noise * sensitivity, dtype=torch.float64)
        fractions = (noisy / expected_batch_size + 0.5).clamp(0, 1).tolist()
        return [
            min(max(bound * math.exp(-self.learning_rate * (b - self.target_quantile)), self.smallest), self.largest)
            for bound, b in zip(bounds, fractions, strict=True)
        ]
