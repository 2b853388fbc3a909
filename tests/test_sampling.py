"""Samplers draw what their accounting assumes; the loader loses, repeats and renames nothing on the way.

Statistical bounds: every test has fixed randomness and would fail for about one seed in 10**6 (P below).
"""

from __future__ import annotations

import json
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import (
    Sampler as TorchSampler,
)

from dpcompile import sampling
from dpcompile.errors import DPCompileError, PrivacyError
from dpcompile.loader import PhysicalBatch, PrivateLoader, without_samples
from dpcompile.sampling import FixedSizeSampler, PoissonSampler, Sampler, ShuffledSampler

P = 1e-6
SIZE = 60

MAKERS: dict[str, Callable[..., Sampler]] = {
    "poisson": lambda **given: PoissonSampler(SIZE, 0.1, **given),
    "fixed-size": lambda **given: FixedSizeSampler(SIZE, 8, **given),
    "shuffled": lambda **given: ShuffledSampler(SIZE, 8, **given),
}


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[..., Sampler]:
    return MAKERS[request.param]


@pytest.fixture
def fixed_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secure samplers from a seeded generator: the distribution under test, without the chance of a failure."""
    monkeypatch.setattr(sampling, "random_words", np.random.PCG64(20).random_raw)


def batches(sampler: Sampler, count: int) -> list[list[int]]:
    return [sampler.draw() for _ in range(count)]


@pytest.mark.usefixtures("fixed_words")
@pytest.mark.parametrize("randomness", [{"seed": 4}, {"secure": True}], ids=["seeded", "secure"])
class TestDistribution:
    def test_poisson_sizes_are_binomial(self, randomness: dict[str, Any]) -> None:
        sampler = PoissonSampler(50, 0.1, **randomness)
        sizes = np.bincount([len(batch) for batch in batches(sampler, 4000)], minlength=51)[:51]
        expected = 4000 * stats.binom.pmf(np.arange(51), 50, 0.1)
        many = expected >= 5
        observed, wanted = np.append(sizes[many], sizes[~many].sum()), np.append(expected[many], expected[~many].sum())
        assert stats.chisquare(observed, wanted).pvalue > P
        assert sizes[0] > 0  # batches without samples are handed out too

    def test_poisson_samples_are_independent_and_equally_likely(self, randomness: dict[str, Any]) -> None:
        sampler = PoissonSampler(20, 0.3, **randomness)
        drawn = np.zeros((5000, 20))
        for row, batch in zip(drawn, batches(sampler, 5000), strict=True):
            row[batch] = 1
        for count in drawn.sum(0):
            assert stats.binomtest(int(count), 5000, 0.3).pvalue > P / 20
        pairs = np.hstack([drawn[1:], drawn[:-1]])  # of samples, within a step and with the next
        correlations = np.asarray(np.corrcoef(pairs.T))
        np.fill_diagonal(correlations, 0)
        assert abs(correlations).max() * math.sqrt(5000) < stats.norm.isf(P / 1600)

    def test_fixed_size_batches_are_uniform_without_replacement(self, randomness: dict[str, Any]) -> None:
        drawn = batches(FixedSizeSampler(6, 3, **randomness), 4000)
        assert all(len(set(batch)) == 3 for batch in drawn)
        sets, counts = np.unique(drawn, axis=0, return_counts=True)
        assert len(sets) == math.comb(6, 3)
        assert stats.chisquare(counts).pvalue > P

    def test_shuffled_epochs_are_uniform_permutations(self, randomness: dict[str, Any]) -> None:
        sampler = ShuffledSampler(4, 3, **randomness)
        orders = []
        for _ in range(4000):
            first, second = sampler
            assert (len(first), len(second)) == (3, 1)
            orders.append(first + second)
        kinds, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(kinds) == 24
        assert stats.chisquare(counts).pvalue > P

    def test_a_rate_of_one_takes_everything(self, randomness: dict[str, Any]) -> None:
        assert batches(PoissonSampler(5, 1.0, **randomness), 3) == [list(range(5))] * 3


class TestSamplers:
    def test_steps_and_sizes_follow_from_the_arguments(self) -> None:
        assert PoissonSampler(1000, 0.03).steps_per_epoch == 33
        assert PoissonSampler(1000, 0.03, steps_per_epoch=5).steps_per_epoch == 5
        assert PoissonSampler(1000, 0.0125).expected_batch_size == 12.5
        assert FixedSizeSampler(10, 4).steps_per_epoch == 2
        assert ShuffledSampler(10, 4).steps_per_epoch == 3
        assert ShuffledSampler(10, 4).expected_batch_size == 4

    def test_an_epoch_ends_by_itself(self, make: Callable[..., Sampler]) -> None:
        sampler = make(seed=1)
        first, second = list(sampler), list(sampler)
        assert len(first) == len(second) == sampler.steps_per_epoch
        assert first != second
        assert sampler.position == (2, 0)

    def test_seeds_reproduce_and_differ(self, make: Callable[..., Sampler]) -> None:
        assert batches(make(seed=1), 9) == batches(make(seed=1), 9)
        assert batches(make(seed=1), 9) != batches(make(seed=2), 9)
        assert batches(make(), 9) != batches(make(), 9)

    def test_resume_is_exact_at_every_step(self, make: Callable[..., Sampler]) -> None:
        sampler = make()
        for _ in range(20):
            state = json.loads(json.dumps(sampler.state_dict()))
            resumed = make(seed=5)
            resumed.load_state_dict(state)
            assert batches(resumed, 12) == [*batches(sampler, 1), *_peek(sampler, 11)]

    def test_a_state_of_something_else_is_refused(self) -> None:
        state = PoissonSampler(SIZE, 0.1).state_dict()
        others = {
            "sample_rate=0.1": PoissonSampler(SIZE, 0.2, steps_per_epoch=10),
            "dataset_size=60": PoissonSampler(SIZE + 1, 0.1),
            "secure=False": PoissonSampler(SIZE, 0.1, secure=True),
            "kind='poisson'": FixedSizeSampler(SIZE, 6),
        }
        for what, other in others.items():
            with pytest.raises(PrivacyError, match=what):
                other.load_state_dict(state)

    def test_secure_samplers_keep_no_secret_and_draw_afresh(self, make: Callable[..., Sampler]) -> None:
        sampler = make(secure=True)
        sampler.draw()
        state = sampler.state_dict()
        assert state["entropy"] is None
        resumed = make(secure=True)
        resumed.load_state_dict(state)
        assert batches(resumed, 9) != batches(sampler, 9)

    def test_a_secure_permutation_is_never_continued_by_another(self) -> None:
        sampler = ShuffledSampler(SIZE, 8, secure=True)
        assert sorted(i for batch in sampler for i in batch) == list(range(SIZE))
        sampler.draw()
        resumed = ShuffledSampler(SIZE, 8, secure=True)
        resumed.load_state_dict(sampler.state_dict())
        assert resumed.position == (2, 0)

    def test_pieces_of_the_data_set_join(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = batches(PoissonSampler(1000, 0.1, seed=1), 3)
        monkeypatch.setattr(sampling, "PIECE", 7)
        assert batches(PoissonSampler(1000, 0.1, seed=1), 3) == whole

    @pytest.mark.parametrize(
        ("sampler", "limit"),
        [
            (PoissonSampler(1000, 0.05, seed=1), 1),
            (PoissonSampler(1000, 0.05, seed=1), 8),
            (PoissonSampler(1000, 0.05, seed=1), 50),
            (PoissonSampler(1000, 0.05, seed=1), 1000),
            (PoissonSampler(1000, 0.002, seed=1), 4),
            (PoissonSampler(9, 1.0), 4),
            (FixedSizeSampler(100, 10), 4),
            (ShuffledSampler(103, 10), 4),
        ],
    )
    def test_the_expected_number_of_pieces_is_about_the_mean(self, sampler: Sampler, limit: int) -> None:
        steps = 2000 // sampler.steps_per_epoch * sampler.steps_per_epoch
        pieces = [max(1, math.ceil(len(batch) / limit)) for batch in batches(sampler, steps)]
        assert sampler.expected_pieces(limit) == pytest.approx(np.mean(pieces), rel=0.02)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda: PoissonSampler(0, 0.1), "Expected dataset_size=0 >= 1."),
            (lambda: FixedSizeSampler(0, 1), "Expected dataset_size=0 >= 1."),
            (lambda: ShuffledSampler(0, 1), "Expected dataset_size=0 >= 1."),
            (lambda: FixedSizeSampler(5, 0), "Expected batch_size=0 >= 1."),
            (lambda: ShuffledSampler(5, 0), "Expected batch_size=0 >= 1."),
            (lambda: FixedSizeSampler(5, 6), "Expected batch_size=6 <= 5, the size of the data set."),
            (lambda: PoissonSampler(5, 0.0), "Expected 0 < sample_rate=0.0 <= 1."),
            (lambda: PoissonSampler(5, 1.1), "Expected 0 < sample_rate=1.1 <= 1."),
            (lambda: PoissonSampler(5, math.nan), "Expected 0 < sample_rate=nan <= 1."),
            (lambda: PoissonSampler(5, 0.5, 0), "Expected steps_per_epoch=0 >= 1."),
            (lambda: PoissonSampler(5, 0.5, seed=-1), "Expected seed=-1 >= 0."),
        ],
    )
    def test_sizes_and_rates_out_of_range_are_refused(self, wrong: Callable[[], Sampler], message: str) -> None:
        with pytest.raises(ValueError, match="Expected") as caught:
            wrong()
        assert str(caught.value) == message

    def test_a_secure_sampler_takes_no_seed(self, make: Callable[..., Sampler]) -> None:
        with pytest.raises(PrivacyError, match="secure=True takes no seed"):
            make(seed=1, secure=True)


def _peek(sampler: Sampler, count: int) -> list[list[int]]:
    position = sampler.position
    ahead = batches(sampler, count)
    sampler.seek(*position)
    return ahead


Point = namedtuple("Point", "x y")


@dataclass
class Boxed:
    x: Tensor
    length: int


class Numbered(Dataset[Any]):
    """Sample i carries i in every shape that a collate function may return."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        row = torch.full((3,), float(index))
        return {"index": index, "nested": [row, (row.double(), Point(row, index))], "name": str(index)}


class Plain(Numbered):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index), torch.full((2,), float(index))


class Fetching(Plain):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def run(loader: PrivateLoader, stop_after: int | None = None) -> list[tuple[Any, PhysicalBatch]]:
    """One `for` over the loader: batches with their records."""
    records: list[PhysicalBatch] = []
    loader.on_batch = records.append
    seen = []
    for batch in loader:
        assert len(records) == len(seen) + 1  # one record per batch, and never ahead of the loop
        seen.append((batch, records[-1]))
        if len(seen) == stop_after:
            break
    return seen


def logical(seen: list[tuple[Any, PhysicalBatch]]) -> list[list[int]]:
    """Indices of the complete logical batches, without padding."""
    found: list[list[int]] = []
    current: list[int] = []
    for (index, _), record in seen:
        current += index[: record.size].tolist()
        if record.last:
            assert record.logical_size == len(current)
            found.append(current)
            current = []
    return found


class TestPrivateLoader:
    @pytest.mark.parametrize(("limit", "pad"), [(1, False), (1, True), (3, False), (3, True), (7, True), (None, False)])
    @pytest.mark.parametrize("dataset", [Plain(), Fetching()], ids=["items", "getitems"])
    def test_physical_batches_join_to_the_logical_ones(
        self, make: Callable[..., Sampler], limit: int | None, pad: bool, dataset: Dataset[Any]
    ) -> None:
        seen = run(PrivateLoader(dataset, make(seed=2), max_physical_batch=limit, pad=pad))
        assert logical(seen) == list(make(seed=2))
        for (index, rows), record in seen:
            assert torch.equal(rows, index[:, None].expand(-1, 2).float())
            assert len(index) == (limit if pad else record.size)
        steps = [record.logical_step for _, record in seen]
        assert steps == sorted(steps)
        assert set(steps) == set(range(make().steps_per_epoch))

    def test_padding_repeats_a_sample_with_weight_zero(self) -> None:
        seen = run(PrivateLoader(Plain(), PoissonSampler(SIZE, 0.05, 200, seed=1), max_physical_batch=4, pad=True))
        assert {record.size for _, record in seen} == {0, 1, 2, 3, 4}
        for (index, _), record in seen:
            assert record.weights is not None
            assert record.weights.tolist() == [1.0] * record.size + [0.0] * (4 - record.size)
            assert set(index[record.size :].tolist()) <= {int(index[0]) if record.size else 0}

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_empty_batch_has_the_structure_of_the_others(self, workers: int) -> None:
        sampler = PoissonSampler(SIZE, 0.01, 20, seed=2)
        seen = run(PrivateLoader(Numbered(), sampler, num_workers=workers))
        sizes = [record.size for _, record in seen]
        assert sizes.count(0) >= 5
        assert sizes[0] == 0  # nothing could have been learned from an earlier batch
        for batch, record in seen:
            size = record.size
            assert record.last
            assert batch["index"].shape == (size,)
            row, (double, point) = batch["nested"]
            assert row.shape == double.shape == (size, 3)
            assert double.dtype == torch.float64
            assert type(point) is Point
            assert point.x.shape == (size, 3)
            assert point.y.dtype == torch.int64
            assert len(batch["name"]) == size

    def test_samples_are_cut_out_of_any_structure(self) -> None:
        one = torch.ones(1, 2)
        batch = {
            "a": [one, (one, "kept")],
            "names": ["x"],
            "boxed": Boxed(one, 7),
            "scalar": torch.tensor(3),
            "n": None,
        }
        empty = without_samples(batch)
        assert empty["a"][0].shape == empty["a"][1][0].shape == empty["boxed"].x.shape == (0, 2)
        assert (empty["a"][1][1], empty["names"], empty["boxed"].length) == ("kept", [], 7)
        assert (empty["scalar"].item(), empty["n"]) == (3, None)
        assert len(batch["names"]) == 1  # the batch itself is not touched

    def test_batches_that_cannot_be_emptied_are_refused(self) -> None:
        with pytest.raises(DPCompileError, match=r"made shape \[5, 1\] of one sample"):
            without_samples([torch.ones(5, 1)])
        with pytest.raises(DPCompileError, match="made a object"):
            without_samples({"x": object()})

    def test_hugging_face_encodings_keep_their_type(self) -> None:
        transformers = pytest.importorskip("transformers")
        empty = without_samples(transformers.BatchEncoding({"input_ids": torch.ones(1, 5)}))
        assert type(empty) is transformers.BatchEncoding
        assert empty["input_ids"].shape == (0, 5)

    def test_a_break_drops_the_rest_of_the_epoch_and_nothing_else(self) -> None:
        loader = PrivateLoader(Plain(), ShuffledSampler(SIZE, 8, seed=1), max_physical_batch=3)
        run(loader, stop_after=8)  # two logical batches of three pieces, and two pieces of the third
        assert (loader.epoch, loader.logical_steps) == (0, 2)
        fresh = ShuffledSampler(SIZE, 8, seed=1)
        fresh.seek(1, 0)
        seen = run(loader)
        assert logical(seen) == list(fresh)
        assert seen[0][1].logical_step == 2
        assert (loader.epoch, loader.logical_steps) == (2, 10)

    def test_a_break_in_the_first_batch_begins_it_again(self) -> None:
        loader = PrivateLoader(Plain(), ShuffledSampler(SIZE, 8, seed=1), max_physical_batch=3)
        run(loader, stop_after=2)
        assert logical(run(loader)) == list(ShuffledSampler(SIZE, 8, seed=1))

    def test_an_older_for_cannot_go_on(self) -> None:
        loader = PrivateLoader(Plain(), ShuffledSampler(SIZE, 8), max_physical_batch=3)
        old = iter(loader)
        next(old)
        next(iter(loader))
        with pytest.raises(DPCompileError, match="a newer `for`"):
            next(old)

    def test_an_error_in_on_batch_keeps_the_batch_back(self) -> None:
        loader = PrivateLoader(Plain(), ShuffledSampler(SIZE, 8, seed=1))
        run(loader, stop_after=2)

        def refuse(record: PhysicalBatch) -> None:
            raise PrivacyError("budget")

        loader.on_batch = refuse
        with pytest.raises(PrivacyError, match="budget"):
            list(loader)
        assert loader.logical_steps == 2

    @pytest.mark.parametrize(("workers", "stop_after"), [(0, 1), (0, 4), (0, 5), (0, 17), (2, 5)])
    def test_resume_inside_an_epoch_is_exact(self, make: Callable[..., Sampler], workers: int, stop_after: int) -> None:
        def loader(**given: Any) -> PrivateLoader:
            return PrivateLoader(Plain(), make(**given), max_physical_batch=3, num_workers=workers)

        whole = loader(seed=6)
        epochs = [*run(whole), *run(whole)]
        broken = loader(seed=6)
        done = run(broken, stop_after=stop_after)
        resumed = loader()
        resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
        rest = [*run(resumed), *run(resumed)]
        assert logical(done) + logical(rest) == logical(epochs)
        assert [r.logical_step for _, r in rest] == [
            r.logical_step for _, r in epochs if r.logical_step >= broken.logical_steps
        ]

    def test_a_state_at_the_end_of_an_epoch_begins_the_next(self, make: Callable[..., Sampler]) -> None:
        loader = PrivateLoader(Plain(), make(seed=6))
        run(loader)
        resumed = PrivateLoader(Plain(), make())
        resumed.load_state_dict(loader.state_dict())
        assert resumed.epoch == 1
        assert logical(run(resumed)) == logical(run(loader))

    def test_len_is_about_the_number_of_batches(self) -> None:
        loader = PrivateLoader(Plain(600), PoissonSampler(600, 0.1, 50, seed=1), max_physical_batch=8)
        assert len(loader) == pytest.approx(len(run(loader)), rel=0.05)
        assert len(PrivateLoader(Plain(), ShuffledSampler(SIZE, 8), max_physical_batch=3)) == 7 * 3 + 2

    def test_torch_s_global_generator_is_left_alone(self) -> None:
        loader = PrivateLoader(Plain(), ShuffledSampler(SIZE, 8))
        before = torch.get_rng_state()
        run(loader)
        assert torch.equal(torch.get_rng_state(), before)


def flat_collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Recognisable: the rows come back negated."""
    return torch.stack([index for index, _ in samples]), -torch.stack([rows for _, rows in samples])


class TestTakingOver:
    def test_collate_and_workers_of_a_loader_go_on(self) -> None:
        theirs = DataLoader(
            Plain(),
            batch_size=5,
            shuffle=True,
            drop_last=True,
            num_workers=2,
            collate_fn=flat_collate,
            prefetch_factor=3,
        )
        loader = PrivateLoader(theirs, PoissonSampler(SIZE, 0.1, seed=2), max_physical_batch=4)
        seen = run(loader)
        assert logical(seen) == list(PoissonSampler(SIZE, 0.1, seed=2))
        assert all(torch.equal(rows, -index[:, None].expand(-1, 2).float()) for (index, rows), _ in seen)
        assert (loader._loader.num_workers, loader._loader.prefetch_factor) == (2, 3)

    def test_persistent_workers_survive_a_break(self) -> None:
        theirs = DataLoader(Plain(), batch_size=5, num_workers=2, persistent_workers=True)
        loader = PrivateLoader(theirs, ShuffledSampler(SIZE, 8, seed=1), max_physical_batch=3)
        run(loader, stop_after=4)
        fresh = ShuffledSampler(SIZE, 8, seed=1)
        fresh.seek(1, 0)
        assert logical(run(loader)) == list(fresh)
        assert logical(run(loader)) == list(fresh)

    def test_given_options_win(self) -> None:
        theirs = DataLoader(Plain(), batch_size=5, num_workers=2)
        loader = PrivateLoader(theirs, ShuffledSampler(SIZE, 8), num_workers=0, collate_fn=flat_collate)
        assert loader._loader.num_workers == 0
        assert float(run(loader)[0][0][1].max()) <= 0

    def test_any_batch_size_of_theirs_gives_the_same_batches(self) -> None:
        found = [
            logical(run(PrivateLoader(theirs, PoissonSampler(SIZE, 0.1, seed=2))))
            for theirs in (DataLoader(Plain(), batch_size=1), DataLoader(Plain(), batch_size=16, drop_last=True))
        ]
        assert found[0] == found[1]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


class EveryOther(TorchSampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(0, SIZE, 2))


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Filtering(DataLoader[Any]):
    def __iter__(self) -> Any:
        return filter(None, super().__iter__())


DATA = TensorDataset(torch.arange(SIZE))
WEIGHTED = WeightedRandomSampler([1.0] * SIZE, SIZE)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (Stream(), "Stream gives samples in an order of its own"),
        (DataLoader(Stream()), "Stream gives samples in an order of its own"),
        (DataLoader(DATA, sampler=WEIGHTED), r"a custom sampler \(WeightedRandomSampler\)"),
        (DataLoader(DATA, batch_sampler=BatchSampler(WEIGHTED, 4, False)), "a custom sampler"),
        (DataLoader(DATA, sampler=EveryOther()), r"a custom sampler \(EveryOther\)"),
        (DataLoader(DATA, batch_sampler=[[0], [1]]), r"a custom batch_sampler \(list\)"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), "a RandomSampler with replacement"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=7)), "a sampler of 7 samples over a data set of 60"),
        (DataLoader(DATA, batch_size=None), "one item is not one sample"),
        (Filtering(DATA), r"an iteration of its own \(Filtering\)"),
        (Unsized(), "Unsized has no len"),
    ],
)
def test_data_with_a_choice_of_its_own_are_refused(data: Any, why: str) -> None:
    with pytest.raises(PrivacyError, match=why):
        PrivateLoader(data, PoissonSampler(SIZE, 0.1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_physical_batch": 0}, "Expected max_physical_batch=0 >= 1"),
        ({"pad": True}, "Expected max_physical_batch with pad=True"),
        ({"sampler": PoissonSampler(SIZE + 1, 0.1)}, "Expected dataset_size=61 of the sampler to be 60"),
    ],
)
def test_impossible_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateLoader(DATA, **{"sampler": PoissonSampler(SIZE, 0.1), **given})


@pytest.mark.parametrize("option", ["batch_size", "shuffle", "batch_sampler", "drop_last"])
def test_options_that_choose_samples_are_refused(option: str) -> None:
    given: dict[str, Any] = {option: 1}
    with pytest.raises(TypeError, match=f"got {option}"):
        PrivateLoader(DATA, PoissonSampler(SIZE, 0.1), **given)
