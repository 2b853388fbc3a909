"""Which samples make the next logical batch.

A sampler gives one list of indices per logical step. Its randomness is a function of (seed, epoch, step), so its
position is its whole state, and what a prefetching loader draws ahead can be drawn again. With `secure=True` the
randomness is ChaCha20 under keys of the operating system and nothing can be drawn again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from dpcompile.errors import PrivacyError
from dpcompile.noise import random_words

Words = Callable[[int], NDArray[np.uint64]]  # gives that many uniform 64-bit words
PIECE = 2**20  # samples that are decided at a time


class Sampler(ABC):
    """Gives the indices of one logical batch per step.

    Args:
        seed: reproduces the batches; None takes one from the operating system and keeps it in the state.
        secure: cryptographic randomness; then a seed is refused and the state holds no more than the position.
    """

    kind: ClassVar[str]

    def __init__(self, dataset_size: int, steps_per_epoch: int, seed: int | None, secure: bool) -> None:
        at_least("steps_per_epoch", steps_per_epoch, 1)
        if secure and seed is not None:
            raise PrivacyError(
                "sampling: secure=True takes no seed, for whoever knows it knows the batches. "
                "Leave the seed out, or give up secure=True."
            )
        if seed is not None:
            at_least("seed", seed, 0)
        self.dataset_size = dataset_size
        self.steps_per_epoch = steps_per_epoch
        self.secure = secure
        self._entropy = None if secure else np.random.SeedSequence(seed).entropy
        self._epoch = 0
        self._step = 0

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step in it of the next batch, both from 0. A broken-off epoch counts too."""
        return self._epoch, self._step

    @property
    @abstractmethod
    def expected_batch_size(self) -> float:
        """Samples per logical batch on average. It follows from the arguments, never from a realised batch."""

    @abstractmethod
    def expected_pieces(self, limit: int) -> float:
        """Physical batches of at most `limit` samples per logical batch, on average."""

    def draw(self) -> list[int]:
        """The next logical batch, in ascending order or that of the permutation. It may be empty."""
        batch = self._draw()
        self._step += 1
        if self._step == self.steps_per_epoch:
            self.restart()
        return batch

    def __iter__(self) -> Iterator[list[int]]:
        """The batches from here to the end of the epoch."""
        epoch = self._epoch
        while self._epoch == epoch:
            yield self.draw()

    def restart(self) -> None:
        """Leave the rest of an epoch that has begun, and begin the next one."""
        if self._step:
            self.seek(self._epoch + 1, 0)

    def seek(self, epoch: int, step: int) -> None:
        """Make (epoch, step) the next batch."""
        self._epoch, self._step = epoch, step

    def state_dict(self) -> dict[str, Any]:
        """JSON-readable. Without `secure` it has the seed: whoever reads it knows every batch."""
        return self._settings() | {"entropy": self._entropy, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit; the state's seed replaces this sampler's own. In secure mode draw afresh.

        Raises:
            PrivacyError: the state is of another sampler, rate or data set, so the accounting would be of another.
        """
        for name, own in self._settings().items():
            if state.get(name) != own:
                raise PrivacyError(
                    f"sampling: the state was saved with {name}={state.get(name)!r}, this sampler has {own!r}. "
                    "Resume with the sampler that the accounting began with."
                )
        self._entropy = state["entropy"]
        self.seek(state["epoch"], state["step"])

    @abstractmethod
    def _draw(self) -> list[int]:
        """The batch at the present position."""

    def _settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "dataset_size": self.dataset_size}
        return own | {"steps_per_epoch": self.steps_per_epoch, "secure": self.secure}

    def _words(self, *key: int) -> Words:
        """The stream of words that belongs to this key."""
        if self._entropy is None:
            return random_words
        return np.random.PCG64(np.random.SeedSequence(self._entropy, spawn_key=key)).random_raw


class PoissonSampler(Sampler):
    """Each sample of the data set is in each batch with probability `sample_rate`, independently.

    So batch sizes vary and a batch may be empty; leaving empty batches out would not be Poisson sampling. The
    probability is exact to 2**-64.

    Args:
        dataset_size: n, of the whole data set.
        sample_rate: q of the data set, 0 < q <= 1.
        steps_per_epoch: logical steps that count as one epoch; 1 / q rounded when left out.
    """

    kind = "poisson"

    def __init__(
        self,
        dataset_size: int,
        sample_rate: float,
        steps_per_epoch: int | None = None,
        seed: int | None = None,
        *,
        secure: bool = False,
    ) -> None:
        at_least("dataset_size", dataset_size, 1)
        if not 0 < sample_rate <= 1:
            raise ValueError(f"Expected 0 < sample_rate={sample_rate!r} <= 1.")
        steps = round(1 / sample_rate) if steps_per_epoch is None else steps_per_epoch
        super().__init__(dataset_size, steps, seed, secure)
        self.sample_rate = float(sample_rate)

    @property
    def expected_batch_size(self) -> float:
        return self.sample_rate * self.dataset_size

    def expected_pieces(self, limit: int) -> float:
        """By the normal approximation of the binomial; an empty batch is one piece."""
        mean = self.expected_batch_size
        deviation = math.sqrt(mean * (1 - self.sample_rate)) + 1e-9
        full = torch.arange(1, math.ceil((mean + 10 * deviation) / limit) + 1, dtype=torch.float64)
        more_than_full = torch.erfc((full * limit + 0.5 - mean) / (deviation * math.sqrt(2))) / 2
        return 1 + float(more_than_full.sum())

    def _draw(self) -> list[int]:
        words = self._words(self._epoch, self._step)
        highest = np.uint64(math.ceil(Fraction(self.sample_rate) * 2**64) - 1)
        batch: list[int] = []
        for start in range(0, self.dataset_size, PIECE):
            taken = words(min(PIECE, self.dataset_size - start)) <= highest
            batch += (np.flatnonzero(taken) + start).tolist()
        return batch

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"sample_rate": self.sample_rate}


class FixedSizeSampler(Sampler):
    """`batch_size` different samples, uniformly among all such sets, drawn anew at every step.

    Args:
        steps_per_epoch: logical steps that count as one epoch; dataset_size / batch_size rounded when left out.
    """

    kind = "fixed-size"

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        steps_per_epoch: int | None = None,
        seed: int | None = None,
        *,
        secure: bool = False,
    ) -> None:
        _check_batch_size(dataset_size, batch_size)
        steps = round(dataset_size / batch_size) if steps_per_epoch is None else steps_per_epoch
        super().__init__(dataset_size, steps, seed, secure)
        self.batch_size = batch_size

    @property
    def expected_batch_size(self) -> float:
        return float(self.batch_size)

    def expected_pieces(self, limit: int) -> float:
        return float(math.ceil(self.batch_size / limit))

    def _draw(self) -> list[int]:
        keys = self._words(self._epoch, self._step)(self.dataset_size)  # equal keys: fewer than n**2 / 2**65
        return np.sort(np.argpartition(keys, self.batch_size - 1)[: self.batch_size]).tolist()

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"batch_size": self.batch_size}


class ShuffledSampler(Sampler):
    """A permutation of the data set for each epoch, cut into batches; the last one may be short.

    Every sample is used once per epoch. This is not Poisson sampling and must not be accounted as such. A secure
    permutation is never stored, so a run that resumes inside such an epoch begins the next one.
    """

    kind = "shuffled"

    def __init__(self, dataset_size: int, batch_size: int, seed: int | None = None, *, secure: bool = False) -> None:
        _check_batch_size(dataset_size, batch_size)
        super().__init__(dataset_size, math.ceil(dataset_size / batch_size), seed, secure)
        self.batch_size = batch_size
        self._order: tuple[int, NDArray[np.intp]] | None = None  # of which epoch, and the permutation

    @property
    def expected_batch_size(self) -> float:
        """The size of every batch but a short last one."""
        return float(self.batch_size)

    def expected_pieces(self, limit: int) -> float:
        full, short = divmod(self.dataset_size, self.batch_size)
        pieces = full * math.ceil(self.batch_size / limit) + math.ceil(short / limit)
        return pieces / self.steps_per_epoch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._order = None
        if self.secure:
            self.restart()

    def _draw(self) -> list[int]:
        if self._order is None or self._order[0] != self._epoch:
            keys = self._words(self._epoch)(self.dataset_size)
            self._order = self._epoch, np.argsort(keys, kind="stable")
        start = self._step * self.batch_size
        return self._order[1][start : start + self.batch_size].tolist()

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"batch_size": self.batch_size}


def _check_batch_size(dataset_size: int, batch_size: int) -> None:
    at_least("dataset_size", dataset_size, 1)
    at_least("batch_size", batch_size, 1)
    if batch_size > dataset_size:
        raise ValueError(f"Expected batch_size={batch_size!r} <= {dataset_size}, the size of the data set.")


def at_least(name: str, given: int, least: int) -> None:
    if given < least:
        raise ValueError(f"Expected {name}={given!r} >= {least}.")
