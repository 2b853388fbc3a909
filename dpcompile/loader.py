"""A loader that hands out logical batches in physical ones, and says, right before it hands one over, which it is."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.sampling import Sampler, at_least

TAKEN_OVER = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


@dataclass(frozen=True)
class PhysicalBatch:
    """What a physical batch is within its logical one."""

    weights: Tensor | None  # [B] float32 on the CPU, 1 for a sample and 0 for padding; None without padding
    last: bool  # it completes the logical batch
    logical_step: int  # from 0, over all epochs
    size: int  # samples in it, padding not counted
    logical_size: int  # samples in the whole logical batch


class _Piece(NamedTuple):
    """What a worker makes one physical batch of."""

    indices: list[int]
    size: int  # samples of the result; padding makes it larger than the indices are many


class PrivateLoader:
    """Hands out the logical batches of `sampler` in physical batches.

    One `for` runs to the end of the epoch. A `for` that is broken off drops the rest of its epoch, and the next one
    begins the next epoch; a logical batch that was not completed is not counted (clear its gradients). Only
    after `load_state_dict` does a `for` begin inside an epoch.

    A logical batch without samples is one physical batch with 0 samples, made by cutting the batch of sample 0 down
    to nothing, so that its structure is always that of the others.

    Args:
        data: a map-style data set, or a DataLoader whose data set, collate function and workers are taken over. Its
            batch size and order are not: those are the sampler's.
        sampler: made for the length of the data set.
        max_physical_batch: most samples at a time; None for whole logical batches.
        pad: make every physical batch exactly that large. Padding repeats a sample with weight 0.
        on_batch: called with a batch's record right before the batch is handed over, however far workers are ahead.
            If it raises, the batch is not handed over.
        loader_options: for torch's DataLoader, among the names in TAKEN_OVER. They win over what is taken over.

    Raises:
        PrivacyError: `data` chooses samples in a way whose accounting is not known.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        sampler: Sampler,
        *,
        max_physical_batch: int | None = None,
        pad: bool = False,
        on_batch: Callable[[PhysicalBatch], None] | None = None,
        **loader_options: Any,
    ) -> None:
        options = _taken_over(data, loader_options.get("num_workers")) | loader_options
        if unknown := set(options) - set(TAKEN_OVER):
            raise TypeError(f"Expected loader options among {', '.join(TAKEN_OVER)}, got {', '.join(sorted(unknown))}.")
        dataset = data.dataset if isinstance(data, DataLoader) else data
        if max_physical_batch is None and pad:
            raise ValueError("Expected max_physical_batch with pad=True: it is the size to pad to.")
        if max_physical_batch is not None:
            at_least("max_physical_batch", max_physical_batch, 1)
        if _size(dataset) != sampler.dataset_size:
            raise ValueError(f"Expected dataset_size={sampler.dataset_size} of the sampler to be {_size(dataset)}.")
        self.dataset = dataset
        self.sampler = sampler
        self.on_batch = on_batch
        self.on_begin: Callable[[], None] | None = None  # called when a `for` begins
        self.begins_epoch = True  # whether the last logical batch that was completed was the first of its epoch
        collate = options.pop("collate_fn", None) or default_collate
        # Its own generator: without one, each `for` would move torch's global one, and a resumed run would differ.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self._plan = _Plan(sampler, max_physical_batch or sampler.dataset_size, pad)
        self._batches = _Batches(dataset, collate)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._plan,
            collate_fn=_unchanged,
            generator=generator,
            **options,
        )
        self._position = sampler.position  # behind the last logical batch that was handed over completely
        self._logical_steps = 0
        self._resumed = False

    def collated(self, indices: Sequence[int]) -> Any:
        """The batch of these samples, as the training loop gets it. Draws nothing."""
        return self._batches[_Piece(list(indices), len(indices))]

    @property
    def epoch(self) -> int:
        """Of the next batch, from 0: a resumed script goes on with `for epoch in range(loader.epoch, epochs)`."""
        return self._position[0]

    @property
    def logical_steps(self) -> int:
        """Logical batches that were handed over completely, over all epochs."""
        return self._logical_steps

    def __len__(self) -> int:
        """Physical batches of an epoch, for progress bars. Under Poisson sampling their number is random: the mean."""
        return max(1, round(self.sampler.expected_pieces(self._plan.limit) * self.sampler.steps_per_epoch))

    def __iter__(self) -> Iterator[Any]:
        self.sampler.seek(*self._position)  # forget what workers had drawn ahead
        if not self._resumed:
            self.sampler.restart()
        self._resumed = False
        self._position = self.sampler.position
        if self.on_begin is not None:
            self.on_begin()
        planned = self._plan.begin(self._logical_steps)
        for batch in self._loader:
            self._plan.check_current(planned)
            record, position = planned.popleft()
            if self.on_batch is not None:
                self.on_batch(record)
            if record.last:
                self.begins_epoch = self._position[1] == 0
                self._position = position
                self._logical_steps += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the training loop is, JSON-readable: behind the last logical batch that it got completely.

        Take it after the optimizer's step. Prefetched batches do not count. Not in it: the randomness of a data set
        that augments in worker processes; without workers that is torch's global generator.
        """
        epoch, step = self._position
        state = self.sampler.state_dict() | {"epoch": epoch, "step": step}
        return {"sampler": state, "logical_steps": self._logical_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next `for` goes on with the logical batch behind the state, bit for bit, to the end of its epoch."""
        self.sampler.load_state_dict(state["sampler"])
        self._position = self.sampler.position
        self._logical_steps = state["logical_steps"]
        self._resumed = True
        self._plan.begin(self._logical_steps)


Planned = deque[tuple[PhysicalBatch, tuple[int, int]]]  # records, each with the sampler's position behind its batch


class _Plan:
    """Cuts logical batches into pieces: what torch's DataLoader takes its indices from.

    Runs ahead of the training loop by what workers prefetch, and leaves the records of what it gave in a queue. It
    does not know its PrivateLoader: a cycle of references would leave workers to the garbage collector.
    """

    def __init__(self, sampler: Sampler, limit: int, pad: bool) -> None:
        self.limit = limit
        self._sampler = sampler
        self._pad = pad
        self._first_step = 0
        self._planned: Planned = deque()

    def begin(self, first_step: int) -> Planned:
        """The queue of a new `for`, whose first logical batch has this number. Ends every older one."""
        self._first_step = first_step
        self._planned = deque()
        return self._planned

    def __iter__(self) -> Iterator[_Piece]:
        planned = self._planned
        for step, indices in enumerate(self._sampler, self._first_step):
            for start in range(0, max(1, len(indices)), self.limit):
                part = indices[start : start + self.limit]
                weights = (torch.arange(self.limit) < len(part)).float() if self._pad else None
                last = start + self.limit >= len(indices)
                record = PhysicalBatch(weights, last, step, len(part), len(indices))
                planned.append((record, self._sampler.position))
                yield _Piece(part, self.limit if self._pad else len(part))
                self.check_current(planned)

    def check_current(self, planned: Planned) -> None:
        if planned is not self._planned:
            raise DPCompileError(
                "sampling: a newer `for` over this loader, or a loaded state, has ended this one. "
                "Run one `for` at a time."
            )


class _Batches(Dataset[Any]):
    """The data set as seen by a worker: one item is one physical batch. It keeps no state between items."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, piece: _Piece) -> Any:
        samples = self._fetch(piece.indices or [0])
        samples += samples[:1] * (piece.size - len(samples))
        batch = self._collate(samples)
        return batch if piece.size else without_samples(batch)

    def _fetch(self, indices: list[int]) -> list[Any]:
        if hasattr(self._dataset, "__getitems__"):
            return list(self._dataset.__getitems__(indices))  # pyright: ignore[reportAttributeAccessIssue]
        return [self._dataset[i] for i in indices]


def without_samples(batch: Any) -> Any:
    """The batch of one sample with that sample cut out: tensors and arrays lose it in dim 0, structure stays.

    Goes through dicts, lists, tuples, named tuples and dataclasses. Scalars, and strings outside of a list, stay.
    """
    if isinstance(batch, (Tensor, np.ndarray)) and batch.ndim:
        if batch.shape[0] != 1:
            raise DPCompileError(
                f"sampling: the collate function made shape {list(batch.shape)} of one sample, so dim 0 is not the "
                "batch and an empty batch cannot be made. Collate with the batch first, or pad with pad=True."
            )
        return batch[:0]
    if batch is None or isinstance(batch, (Tensor, np.ndarray, Number, str, bytes)):
        return batch
    if isinstance(batch, Mapping):
        empty: Any = copy.copy(batch)  # keeps the type, such as a BatchEncoding of Hugging Face
        for key, part in batch.items():
            empty[key] = without_samples(part)
        return empty
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: without_samples(getattr(batch, f.name)) for f in fields(batch) if f.init})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(without_samples, batch))
    if isinstance(batch, (list, tuple)):
        if all(isinstance(part, (str, bytes, Number)) for part in batch):
            return type(batch)()  # one per sample
        return type(batch)(map(without_samples, batch))
    raise DPCompileError(
        f"sampling: the collate function made a {type(batch).__name__}, of which no empty batch can be made. "
        "Collate into tensors in dicts, lists, tuples or dataclasses, or pad with pad=True."
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _taken_over(data: Dataset[Any] | DataLoader[Any], num_workers: int | None) -> dict[str, Any]:
    """Options of a DataLoader that go on; PrivacyError for data that choose their samples by themselves.

    `num_workers` is what was given beside it, if anything was: with 0 workers, options of workers do not go on.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise PrivacyError(
            f"sampling: {type(dataset).__name__} gives samples in an order of its own, so no sample has a known "
            "probability to be in a batch and nothing can be accounted. Use a map-style data set."
        )
    if not isinstance(data, DataLoader):
        return {}
    found = _own_choice(data)
    if found is not None:
        raise PrivacyError(
            f"sampling: the DataLoader has {found}. Its accounting is not known and private sampling would replace "
            "it without a word. Give the data set itself, or a DataLoader with shuffle=True or False."
        )
    names = TAKEN_OVER if num_workers != 0 else ("collate_fn", "pin_memory")
    return {name: getattr(data, name) for name in names}


def _own_choice(loader: DataLoader[Any]) -> str | None:
    """What in this DataLoader chooses samples in another way than in order or by a plain shuffle; None if nothing."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"an iteration of its own ({type(loader).__name__})"
    if loader.batch_size is None and loader.batch_sampler is None:
        return "batch_size=None: its data set makes batches, so one item is not one sample"
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return f"a custom batch_sampler ({type(batches).__name__})"
    chosen = batches.sampler  # not loader.sampler: a given batch_sampler has one of its own
    if type(chosen) not in (SequentialSampler, RandomSampler):
        return f"a custom sampler ({type(chosen).__name__})"
    if isinstance(chosen, RandomSampler) and chosen.replacement:
        return "a RandomSampler with replacement"
    asked = len(chosen)  # pyright: ignore[reportArgumentType]
    if asked != _size(loader.dataset):
        return f"a sampler of {asked} samples over a data set of {_size(loader.dataset)}"
    return None


def _size(dataset: Dataset[Any]) -> int:
    if not hasattr(dataset, "__len__"):
        raise PrivacyError(
            f"sampling: {type(dataset).__name__} has no len(), so the sampling rate is not known. Give it __len__."
        )
    return len(dataset)  # pyright: ignore[reportArgumentType]
