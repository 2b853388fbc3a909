"""Kill -9 in the middle of training, again and again, and resume: nothing is released that the ledger does not hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_script import (
    FINISHED,
    KILLS,
    MOMENTS,
    OVER_BUDGET,
    RATE,
    STEPS,
    TARGET_EPSILON,
    Death,
    Folder,
    lines,
)

from dpcompile.accountant import Accountant
from dpcompile.ledger import Ledger
from dpcompile.schemes import Poisson, Step

SCRIPT = Path(__file__).with_name("resume_script.py")

pytestmark = pytest.mark.slow  # a minute of training and dying, which all tests here look at


@dataclass(frozen=True)
class Report:
    """What resume_script.py left behind."""

    root: Path
    found: dict[str, Any]

    def deaths(self, name: str) -> list[Death]:
        return [Death(**death) for death in self.found[name]]

    def folder(self, name: str) -> Folder:
        return Folder(self.root / name)

    def parameters(self, name: str) -> list[torch.Tensor]:
        return torch.load(self.folder(name).final, weights_only=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All runs and kills, once, in a process of its own: it forks, and this one may have threads."""
    root = tmp_path_factory.mktemp("resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return Report(root, json.loads((root / "report.json").read_text()))


def test_after_every_kill_the_ledger_holds_at_least_what_was_released(report: Report) -> None:
    deaths = report.deaths("deaths") + report.deaths("budget_deaths")
    assert all(death.recorded >= death.logged for death in deaths), deaths


def test_every_kill_over_counts_by_one_step_at_most(report: Report) -> None:
    for name in ("deaths", "budget_deaths"):
        excess = [0] + [death.recorded - death.logged for death in report.deaths(name)]
        assert all(0 <= after - before <= 1 for before, after in pairwise(excess)), excess


def test_a_kill_between_ledger_and_update_or_log_over_counts(report: Report) -> None:
    deaths = report.deaths("deaths")
    for before, death in pairwise(deaths):
        if death.where in ("accounted", "stepped"):
            assert death.recorded - death.logged == before.recorded - before.logged + 1


def test_the_kills_came_at_every_moment_with_and_without_a_checkpoint(report: Report) -> None:
    deaths = report.deaths("deaths")
    assert [death.where for death in deaths] == [*MOMENTS, *["random"] * KILLS]
    assert {death.saved for death in deaths} == {False, True}
    assert deaths[-1].logged > 2 * KILLS  # they did train in between


def test_a_run_that_was_killed_ends_with_the_parameters_of_one_that_was_not(report: Report) -> None:
    assert report.found["whole_code"] == report.found["killed_code"] == FINISHED
    for a, b in zip(report.parameters("killed"), report.parameters("whole"), strict=True):
        assert torch.equal(a, b)
    last = (report.folder("killed").log.read_text().splitlines()[-1], lines(report.folder("whole")))
    assert last == (str(STEPS), STEPS)


def test_what_was_done_twice_is_paid_twice(report: Report) -> None:
    whole, killed = (Ledger.load(report.folder(name).ledger) for name in ("whole", "killed"))
    assert len(whole) == STEPS < lines(report.folder("killed")) <= len(killed)
    assert whole.epsilon(accountant=Accountant.RDP) < killed.epsilon(accountant=Accountant.RDP)


def test_a_run_stops_at_its_budget_and_no_resume_goes_on(report: Report) -> None:
    ledger = Ledger.load(report.folder("budget").ledger)
    stops = report.found["stops"]
    assert [code for code, _, _ in stops] == [OVER_BUDGET] * len(stops)
    assert {tuple(counts) for _, *counts in stops} == {(lines(report.folder("budget")), len(ledger))}
    assert lines(report.folder("budget")) > report.deaths("budget_deaths")[-1].logged  # it went on until the budget
    one_more = Step(Poisson(RATE), 1.0)
    assert ledger.epsilon(accountant=Accountant.RDP) <= TARGET_EPSILON
    assert ledger.after(one_more, accountant=Accountant.RDP) > TARGET_EPSILON
