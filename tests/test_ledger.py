"""The ledger: what it adds up, what it refuses, and that its file is never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcompile.accountant import Accountant, epsilon
from dpcompile.errors import PrivacyError
from dpcompile.ledger import Ledger
from dpcompile.schemes import FixedSize, Neighbours, Poisson, ShuffledEpochs, Step

ADD_OR_REMOVE, REPLACE = Neighbours.ADD_OR_REMOVE_ONE, Neighbours.REPLACE_ONE
RDP = Accountant.RDP
DELTA = 1e-5
STEP = Step(Poisson(0.02), 2.0)


def ledger_of(*steps: Step, max_grad_norm: float = 1.0) -> Ledger:
    ledger = Ledger(ADD_OR_REMOVE, DELTA)
    for step in steps:
        ledger.record(step, max_grad_norm=max_grad_norm)
    return ledger


def test_the_ledger_costs_what_its_steps_cost() -> None:
    steps = [STEP, STEP, Step(Poisson(0.02), 1.5, 30)]
    ledger = ledger_of(*steps)
    assert len(ledger) == 32
    for accountant in Accountant:
        assert ledger.epsilon(accountant=accountant) == epsilon(steps, DELTA, accountant=accountant)
        assert ledger.epsilon(1e-7, accountant) == epsilon(steps, 1e-7, accountant=accountant)
    assert ledger.epsilon(accountant=RDP, until=2) == epsilon([STEP, STEP], DELTA, accountant=RDP)
    assert ledger.epsilon(until=0) == Ledger(REPLACE, DELTA).epsilon() == 0.0
    assert ledger.delta(ledger.epsilon()) <= DELTA * 1.0001


def test_rows_say_what_each_step_was() -> None:
    ledger = Ledger(REPLACE, DELTA)
    for _ in range(3):
        ledger.record(Step(FixedSize(100, 5), 1.5), max_grad_norm=0.5)
    ledger.record(Step(FixedSize(100, 5), 1.5), max_grad_norm=0.25)
    first, second = ledger.rows()
    assert (first.first, first.last, second.first, second.last) == (1, 3, 4, 4)
    assert (first.sampler, first.rate, first.noise_multiplier, first.sensitivity) == ("fixed-size", 0.05, 1.5, 2.0)
    assert first.noise_std == 1.5 * 0.5 * 2.0
    assert ledger.steps() == [Step(FixedSize(100, 5), 1.5, 4)]


def test_after_is_what_the_ledger_says_afterwards() -> None:
    ledger = ledger_of(Step(Poisson(0.02), 1.5, 30))
    for accountant in Accountant:
        foretold = ledger.after(STEP, accountant=accountant)
        assert ledger.epsilon(accountant=accountant) < foretold
        assert ledger_of(*ledger.steps(), STEP).epsilon(accountant=accountant) == pytest.approx(foretold, rel=1e-9)
    assert len(ledger) == 30


@pytest.mark.parametrize("accountant", Accountant)
def test_steps_left_is_the_most_that_fits(accountant: Accountant) -> None:
    ledger = ledger_of(Step(Poisson(0.02), 1.5, 30))
    left = ledger.steps_left(STEP, 1.0, accountant=accountant)
    assert left > 50
    many = Step(STEP.scheme, STEP.noise_multiplier, left)
    assert ledger.after(many, accountant=accountant) <= 1.0
    assert ledger.after(Step(STEP.scheme, STEP.noise_multiplier, left + 1), accountant=accountant) > 1.0


def test_steps_left_is_counted_down_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_of()
    left = ledger.steps_left(STEP, 1.0, accountant=RDP)
    monkeypatch.setattr(Ledger, "_epsilon", None)
    for used in range(5):
        assert ledger.steps_left(STEP, 1.0, accountant=RDP) == left - used
        ledger.record(STEP, max_grad_norm=0.1 * (1 + used))
    monkeypatch.undo()
    ledger.record(Step(Poisson(0.02), 1.0, 5), max_grad_norm=1.0)
    assert ledger.steps_left(STEP, 1.0, accountant=RDP) < left - 10
    assert ledger.steps_left(STEP, 2.0, accountant=RDP) > left
    assert ledger.steps_left(STEP, 2.0, accountant=RDP, limit=7) == 7


def test_nothing_is_left_of_a_spent_budget() -> None:
    ledger = ledger_of(Step(Poisson(0.02), 1.0, 500))
    assert ledger.steps_left(STEP, 1.0, accountant=RDP) == 0
    assert ledger_of().steps_left(Step(Poisson(0.1), 0.0), 100.0) == 0


def test_a_shuffled_epoch_that_is_open_may_be_finished() -> None:
    ledger = Ledger(REPLACE, DELTA)
    ledger.record(Step(ShuffledEpochs(100, 10), 5.0, 3, reshuffled=True), max_grad_norm=1.0)
    assert ledger.steps_left(Step(ShuffledEpochs(100, 10), 5.0), ledger.epsilon()) == 7


def test_the_state_is_plain_json_and_comes_back() -> None:
    ledger = Ledger(REPLACE, DELTA)
    ledger.record(Step(ShuffledEpochs(100, 10), 5.0, 3, reshuffled=True), max_grad_norm=1.0)
    ledger.record(Step(FixedSize(100, 10), 5.0, 3), max_grad_norm=0.3)
    state = json.loads(json.dumps(ledger.state_dict(), allow_nan=False))
    again = Ledger.from_state_dict(state)
    assert again.rows() == ledger.rows()
    assert again.state_dict() == ledger.state_dict()
    assert again.steps() == ledger.steps()


NOISES = st.lists(st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([0.5, 1.0]), st.integers(0, 3)), max_size=8)


@given(NOISES, NOISES)
@settings(max_examples=50, deadline=None)
def test_a_ledger_only_ever_grows(own: list[tuple[float, float, int]], more: list[tuple[float, float, int]]) -> None:
    ledger, longer = ledger_of(), ledger_of()
    for noise, norm, count in own:
        ledger.record(Step(Poisson(0.1), noise, count), max_grad_norm=norm)
    for noise, norm, count in (*own, *more):
        longer.record(Step(Poisson(0.1), noise, count), max_grad_norm=norm)
    shorter = ledger.state_dict()
    ledger.load_state_dict(longer.state_dict())
    assert ledger.rows() == longer.rows()
    if shorter["steps"] < len(longer):
        with pytest.raises(PrivacyError, match="none can be taken back"):
            ledger.load_state_dict(shorter)
        assert ledger.rows() == longer.rows()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version of dpcompile reads 1"),
        ({"format": None}, "format None"),
        ({"neighbours": "none"}, "malformed"),
        ({"target_delta": "0.1"}, "malformed"),
        ({"target_delta": 2.0}, "malformed"),
        ({"sensitivity": 2.0}, "malformed"),
        ({"steps": 3}, "3 steps are stated and 4 recorded"),
        ({"records": None}, "malformed"),
        ({"records": [{}]}, "malformed"),
        ({"records": []}, "malformed"),
    ],
)
def test_a_state_that_is_not_whole_is_refused(change: dict[str, Any], message: str) -> None:
    state = ledger_of(STEP, STEP, STEP, STEP).state_dict()
    ledger = ledger_of()
    with pytest.raises(PrivacyError, match=message):
        ledger.load_state_dict(state | change)
    assert len(ledger) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"count": 3},
        {"count": -1},
        {"count": 4.0},
        {"first": 2, "last": 5},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": "2"},
        {"max_grad_norm": 0},
        {"max_grad_norm": None},
        {"scheme": {"kind": "poisson", "sample_rate": 2}},
        {"scheme": {"kind": "poisson", "rate": 0.1}},
        {"scheme": {"kind": "lottery"}},
        {"scheme": "poisson"},
    ],
)
def test_a_record_that_is_not_whole_is_refused(change: dict[str, Any]) -> None:
    state = ledger_of(STEP, STEP, STEP, STEP).state_dict()
    state["records"][0] |= change
    with pytest.raises(PrivacyError, match="what was spent is not known"):
        Ledger.from_state_dict(state)


@pytest.mark.parametrize("state", [None, [], "ledger", {}, 3])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(PrivacyError, match="malformed"):
        Ledger.from_state_dict(state)


def test_another_relation_or_delta_is_refused() -> None:
    state = ledger_of(STEP).state_dict()
    with pytest.raises(PrivacyError, match="neighbours=add-or-remove-one, this ledger has replace-one"):
        Ledger(REPLACE, DELTA).load_state_dict(state)
    with pytest.raises(PrivacyError, match="target_delta=1e-05, this ledger has 1e-06"):
        Ledger(ADD_OR_REMOVE, 1e-6).load_state_dict(state)


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="Expected target_delta=1"):
        Ledger(ADD_OR_REMOVE, 1)
    for norm in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="Expected max_grad_norm="):
            ledger_of(STEP, max_grad_norm=norm)


def test_a_ledger_survives_its_file(tmp_path: Path) -> None:
    ledger = ledger_of(STEP, Step(Poisson(0.3), 1.0, 4))
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json").state_dict() == ledger.state_dict()
    assert os.listdir(tmp_path) == ["ledger.json"]


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ledger.json"
    ledger_of(STEP).save(file)
    old = file.read_text()

    def crash(*_: object) -> None:
        raise OSError("power")

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, crash)
        with pytest.raises(OSError, match="power"):
            ledger_of(STEP, STEP).save(file)
        monkeypatch.undo()
        assert file.read_text() == old
        assert os.listdir(tmp_path) == ["ledger.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format": 1', b"[1]"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.json").write_bytes(content)
    with pytest.raises(PrivacyError, match="ledger: "):
        Ledger.load(tmp_path / "ledger.json")
