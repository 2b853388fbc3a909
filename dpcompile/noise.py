"""Gaussian noise for the sum of clipped gradients: seeded and fast, or from a cryptographic generator on a grid.

`noised(sum, std)` is the whole operation, because secure noise has to round the sum before it adds to it.

Noise in floating point leaks: the set of floats that `value + noise` can reach depends on `value` (Mironov 2012, "On
Significance of the Least Significant Bits for Differential Privacy"; Holohan and Braghin 2021, arXiv:2107.10138, for
Gaussian samplers). SecureNoise closes this. With s = the std in steps of a power of two g, 2**40 <= s <= 2**41,

    released = g * (round(sum / g) + N),    P(N = x) proportional to exp(-x**2 / (2 s**2)), x an integer

which is the discrete Gaussian mechanism on integers (Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for
Differential Privacy", arXiv:2004.00010). Scaling by g and rounding to a float act on the exact integer alone.

  * Generator: ChaCha20, one key of the operating system per call. All below assumes that it looks uniform.
  * Sampling: by rejection, exact but for |x| > 12 s (probability 2**-107), which is never drawn. A comparison that
    float64 cannot decide is decided in 100 decimal digits. → `discrete_gaussian`, `_accepts`
  * Accounting: x = n s has the probability that real Gaussian noise rounded to the grid gives it, to a relative
    (n**2 - 1) / (24 s**2). Together, 2**64 draws are within total variation 2**-43 of rounded real noise, which is the
    Gaussian mechanism and nothing after it. So an accountant for the Gaussian mechanism holds, in every dimension and
    with subsampling, with (1 + exp(epsilon)) * 2**-43 added to delta.
  * Rounding: each coordinate moves by at most g / 2, so the L2 sensitivity grows by at most g * sqrt(coordinates),
    below 3e-8 std for 1e9 coordinates. → `sensitivity_slack`, `noise_std`

Not covered: rounding errors of clipping and of summing in float32, before the sum gets here (Casacuberta et al. 2022,
arXiv:2207.10635); how long a call takes, which depends on the noise drawn; memory that an attacker can read.
"""

from __future__ import annotations

import math
import os
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from torch import Tensor

from dpcompile.errors import PrivacyError

GRID_BITS = 40  # std >= 2**GRID_BITS grid steps
SMALLEST_STD, LARGEST_STD = 2.0**-900, 2.0**900  # SecureNoise: the grid step stays a normal float64
REACH = 12  # standard deviations; P(|x| > 12) = 2**-107
SLOTS = 2**16  # of the table that proposes strips
STRIPS_PER_STD = 64  # at least; more strips reject less and cost cache
MARGIN = 2.0**-42  # float64 decides a comparison outside of it; its own error is below 2**-45
PROPOSALS = 2**15  # at a time: about 2 MB of temporaries, near the size of a core's cache
PIECE = 2**20  # coordinates at a time: bounds the memory of float64 copies
ZEROS = bytes(2**18)


def noise_std(noise_multiplier: float, sensitivity: float, slack: float = 0.0) -> float:
    """Standard deviation whose ratio to the sensitivity is `noise_multiplier`, growth of the sensitivity included.

    Args:
        noise_multiplier: noise per sensitivity, as the accountant sees it.
        sensitivity: largest L2 change of the sum between neighbouring data sets.
        slack: what the noise source adds to the sensitivity, in stds: `NoiseSource.sensitivity_slack`.
    """
    for name, given in (("noise_multiplier", noise_multiplier), ("sensitivity", sensitivity), ("slack", slack)):
        if not 0 <= given < math.inf:
            raise ValueError(f"Expected a finite {name}={given!r} >= 0.")
    if noise_multiplier * slack >= 1:
        raise ValueError(f"Expected noise_multiplier={noise_multiplier!r} < {1 / slack:g}: the grid is too coarse.")
    return noise_multiplier * sensitivity / (1 - noise_multiplier * slack)


class NoiseSource(ABC):
    """Adds independent Gaussian noise; no two calls of one source ever share a draw."""

    secure: bool

    @abstractmethod
    def noised(self, value: Tensor, std: float, *, dtype: torch.dtype | None = None) -> Tensor:
        """`value` plus noise of standard deviation `std` on every coordinate, as a new tensor without a graph.

        Computed in float32 (float64 for float64) or better, also for bfloat16 and float16.

        Args:
            value: the sum of clipped gradients, floating point, on any device.
            std: in the units of `value`; 0 adds nothing.
            dtype: of the result; None for the dtype of the computation. Divide first and convert last.
        """

    @abstractmethod
    def sensitivity_slack(self, coordinates: int) -> float:
        """What this source adds to the L2 sensitivity of a sum of that many coordinates, in stds of the noise."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `load_state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. PrivacyError for a state of another kind of source."""


class GaussianNoise(NoiseSource):
    """Noise from torch's generators: fast and reproducible, for experiments. Not safe against the attacks above.

    One running generator per device, so parameters and steps draw independently. It is seeded with
    numpy.random.SeedSequence(seed, spawn_key=(rank, device type, device index)), hence ranks with equal seeds draw
    independently too. (torch's CPU generator keeps 32 bits of a seed: one of the reasons why this mode is not secure.)

    A resumed run repeats what an interrupted one drew after its checkpoint. That is harmless only if it repeats the
    same batches too; two sums noised alike tell their difference exactly.
    """

    secure = False

    def __init__(self, seed: int | None = None, *, rank: int = 0) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"Expected seed={seed!r} >= 0, or None for a seed of the operating system.")
        if rank < 0:
            raise ValueError(f"Expected rank={rank!r} >= 0.")
        self.rank = rank
        self._entropy = np.random.SeedSequence(seed).entropy
        self._generators: dict[str, torch.Generator] = {}
        self._loaded: dict[str, Tensor] = {}  # states of devices that were not used since

    def noised(self, value: Tensor, std: float, *, dtype: torch.dtype | None = None) -> Tensor:
        compute = _compute_dtype(value, std)
        generator = self._generator(value.device)
        noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=compute)
        return torch.add(value.detach().to(compute), noise, alpha=std).to(dtype or compute)

    def sensitivity_slack(self, coordinates: int) -> float:
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Seed and generator states (tensors). Whoever reads it can take the noise off again."""
        states = self._loaded | {device: generator.get_state() for device, generator in self._generators.items()}
        return {"kind": "gaussian", "rank": self.rank, "entropy": self._entropy, "generators": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit. The state's seed replaces this source's own."""
        _check_kind(state, "gaussian")
        if state["rank"] != self.rank:
            raise PrivacyError(
                f"noise: the state of rank {state['rank']} does not fit rank {self.rank}: two ranks would draw the "
                "same noise. Load each rank's own state."
            )
        self._entropy = state["entropy"]
        self._generators = {}
        self._loaded = dict(state["generators"])

    def _generator(self, device: torch.device) -> torch.Generator:
        name = str(device)
        if name not in self._generators:
            key = (self.rank, int.from_bytes(device.type.encode()), device.index or 0)
            seed = int(np.random.SeedSequence(self._entropy, spawn_key=key).generate_state(1, np.uint64)[0])
            generator = torch.Generator(device).manual_seed(seed)
            if name in self._loaded:
                generator.set_state(self._loaded.pop(name).cpu())
            self._generators[name] = generator
        return self._generators[name]


class SecureNoise(NoiseSource):
    """Discrete Gaussian noise on a grid from a cryptographic generator; the module docstring says what is claimed.

    It has no seed and no state: a resumed run draws afresh, and nothing in a checkpoint helps to remove the noise.
    Drawn on the CPU, whatever the device of the sum, which has to know float64.
    """

    secure = True

    def noised(self, value: Tensor, std: float, *, dtype: torch.dtype | None = None) -> Tensor:
        """As the base class says. Every result is a multiple of `grid_step(std)`, before and after conversion.

        Raises:
            PrivacyError: the sum has a NaN or an infinity, so nothing bounds its sensitivity.
        """
        compute = _compute_dtype(value, std)
        if std == 0:
            return value.detach().to(dtype or compute, copy=True)
        step = grid_step(std)
        scale = math.ceil(std / step)  # never less noise than asked for, at most 2**-40 of it more
        result = torch.empty(value.shape, dtype=dtype or compute, device=value.device)
        flat, out = value.detach().reshape(-1), result.view(-1)
        for start in range(0, flat.numel(), PIECE):
            sums = (flat[start : start + PIECE].double() / step).round()
            if not bool(sums.isfinite().all()):
                raise PrivacyError("noise: the sum of clipped gradients is not finite, so no noise makes it private.")
            noise = torch.from_numpy(discrete_gaussian(sums.numel(), scale)).to(value.device)
            # Both are integers. Their float64 sum is a function of the exact one: IEEE addition rounds correctly.
            out[start : start + PIECE] = (sums + noise) * step
        return result

    def sensitivity_slack(self, coordinates: int) -> float:
        return 2.0**-GRID_BITS * math.sqrt(coordinates)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "secure"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, "secure")


def grid_step(std: float) -> float:
    """Distance of neighbouring grid points: the power of two with 2**GRID_BITS <= std / step < 2**(GRID_BITS + 1)."""
    if not SMALLEST_STD <= std <= LARGEST_STD:
        raise ValueError(f"Expected std={std!r} to be 0 or from 2**-900 to 2**900.")
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - GRID_BITS)


def random_words(count: int) -> NDArray[np.uint64]:
    """[count] uniform 64-bit words: ChaCha20 under a fresh key of the operating system, so forks never share them.

    One key gives 2**32 blocks of 8 words before its counter would repeat.
    """
    words = np.empty(count, np.uint64)
    if count:
        stream = Cipher(ChaCha20(os.urandom(32), nonce=bytes(16)), mode=None).encryptor()
        room = words.data.cast("B")
        for start in range(0, len(room), len(ZEROS)):
            part = room[start : start + len(ZEROS)]
            stream.update_into(memoryview(ZEROS)[: len(part)], part)
    return words


def discrete_gaussian(count: int, scale: int) -> NDArray[np.int64]:
    """[count] integers with P(x) proportional to exp(-x**2 / (2 scale**2)), |x| at most about REACH * scale.

    By rejection: a table proposes a strip of equal-sized neighbouring magnitudes, random bits the place in it and the
    sign, and a uniform number accepts.
    """
    strips = _strips(scale)
    out = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        missing = count - filled
        proposals = min(PROPOSALS, missing + missing // 16 + 16)  # about 97 % are accepted
        words = random_words(2 * proposals)
        found = _accepted(strips, words[:proposals], words[proposals:])[:missing]
        out[filled : filled + len(found)] = found
        filled += len(found)
    return out


@dataclass(frozen=True)
class _Strips:
    """How magnitudes are proposed. Magnitude x in strip z is accepted with probability

    height * exp(-x**2 / (2 scale**2)) / slots[z],

    and proposed in proportion to slots[z], so its product with that is the same constant times the Gaussian.
    """

    scale: int
    width_bits: int  # a strip has 2**width_bits magnitudes
    height: float
    slots: NDArray[np.int64]  # [strips] how many of SLOTS slots propose this strip
    strip_of: NDArray[np.int64]  # [SLOTS]


@lru_cache(maxsize=8)
def _strips(scale: int) -> _Strips:
    """Slots in proportion to the Gaussian at the inner edge of each strip, rounded up, so that nothing exceeds 1."""
    if not 1 <= scale <= 2 ** (GRID_BITS + 1):
        raise ValueError(f"Expected scale={scale!r} from 1 to 2**{GRID_BITS + 1}.")
    width_bits = max(0, scale.bit_length() - STRIPS_PER_STD.bit_length())
    edges = np.arange(math.ceil(REACH * scale / 2**width_bits)) * (2.0**width_bits / scale)
    gaussian = np.exp(-0.5 * edges**2)
    height = (SLOTS - len(edges)) / float(gaussian.sum())
    slots = np.floor(height * gaussian).astype(np.int64) + 1
    slots[0] += SLOTS - slots.sum()
    # A little lower than the slots allow, whatever the rounding of the lines above.
    return _Strips(scale, width_bits, height * (1 - 2.0**-40), slots, np.repeat(np.arange(len(slots)), slots))


def _accepted(strips: _Strips, words: NDArray[np.uint64], trials: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The accepted ones of the signed integers that `words` propose; `trials` are compared with their probability."""
    bits = words.view(np.int64)
    strip = strips.strip_of[bits & (SLOTS - 1)]  # bits 0 to 15
    negative = (bits >> 16) & 1
    place = (bits >> 17) & (2**strips.width_bits - 1)  # up to bit 51
    magnitude = (strip << strips.width_bits) | place
    probability = np.exp(-0.5 * (magnitude / strips.scale) ** 2) * (strips.height / strips.slots)[strip]
    uniform = (trials >> np.uint64(11)).view(np.int64) * 2.0**-53
    keep = uniform < probability
    for i in np.flatnonzero(np.abs(uniform - probability) < MARGIN):
        keep[i] = _accepts(strips, int(strip[i]), int(magnitude[i]), int(trials[i]))
    keep &= (magnitude != 0) | (negative == 0)  # zero would count twice
    return (magnitude * (1 - 2 * negative))[keep]


def _accepts(strips: _Strips, strip: int, magnitude: int, trial: int) -> bool:
    """The comparison of `_accepted` in 100 digits, the trial continued by 192 random bits."""
    with localcontext(Context(prec=100)):
        exponent = -(Decimal(magnitude) ** 2) / (2 * Decimal(strips.scale) ** 2)
        probability = Decimal(strips.height) * exponent.exp() / int(strips.slots[strip])
        return Decimal((trial << 192) | secrets.randbits(192)) / 2**256 < probability


def _compute_dtype(value: Tensor, std: float) -> torch.dtype:
    if not value.dtype.is_floating_point:
        raise ValueError(f"Expected a sum of floating-point numbers, got {value.dtype}.")
    if not 0 <= std < math.inf:
        raise ValueError(f"Expected a finite std={std!r} >= 0.")
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _check_kind(state: dict[str, Any], kind: str) -> None:
    if state.get("kind") != kind:
        raise PrivacyError(
            f"noise: expected a state of {kind} noise, got {state.get('kind')!r}. "
            "A run goes on with the kind of noise that it began with."
        )
