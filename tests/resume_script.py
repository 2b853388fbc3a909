"""A private training script that is killed again and again, and what kills it.

    python tests/resume_script.py FOLDER

writes FOLDER/report.json, which test_resume.py reads. The killer imports and compiles once, and forks a child for
every run: a cold start for each would take minutes. It makes no backward of its own, so forking is safe.

The training knows nothing of the killer but that `moment(name)` is called between any two things that it does. There a
child sleeps a little, so that a SIGKILL from outside, at a random time, falls into each of the moments; or it sends
itself SIGKILL, where a certain moment is wanted. Nothing in a process runs after SIGKILL, no `finally` and no flush.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dpcompile import DPModule, PrivacyError, dpcompile, make_private
from dpcompile.ledger import Ledger

N, WIDTH, CLASSES, RATE, DELTA = 60, 5, 3, 0.2, 1e-3
STEPS = 240  # of the run without a target
SAVE_EVERY = 3
KILLS = 20  # at random times
MOST_MOMENTS = (
    80  # that a child lives to see: at least 8 belong to a step, so all killed ones together stay below STEPS
)
NAP = 0.002  # seconds, the longest sleep at a moment
TARGET_EPSILON = 8.0
MOMENTS = (
    "batch",  # a physical batch was handed out
    "backward",
    "writing",  # ledger or checkpoint is in its temporary file, not yet under its name
    "accounted",  # the ledger is written and the gradient noisy, the parameters are those of before
    "stepped",  # the parameters are changed, the release is not yet in the log
    "logged",
    "saved",  # the checkpoint is there
)
FINISHED, OVER_BUDGET = 0, 3  # exit codes


@dataclass(frozen=True)
class Folder:
    """The files of one run."""

    path: Path

    ledger = property(lambda self: self.path / "ledger.json")
    log = property(lambda self: self.path / "released.log")  # a line for every release, of all processes
    checkpoint = property(lambda self: self.path / "run.pt")
    final = property(lambda self: self.path / "final.pt")

    def made(self) -> Folder:
        self.path.mkdir(parents=True)
        self.log.touch()
        return self


@dataclass(frozen=True)
class Death:
    """What was on disk after a kill."""

    where: str  # "random", or the moment
    logged: int  # lines of released.log
    recorded: int  # steps of the ledger file; 0 if there is none
    saved: bool  # whether a checkpoint was there to resume from


# ---------------------------------------------------------------- the training script


def compiled() -> DPModule:
    """With dropout: a resumed run is the same only if torch's own generator is resumed too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES))
    return dpcompile(model, torch.zeros(4, WIDTH), max_grad_norm=0.5)


def train(dp_model: DPModule, folder: Folder, target_epsilon: float | None, moment: Callable[[str], None]) -> int:
    """Train to STEPS or to the budget, from the checkpoint if there is one. The exit code."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(N, WIDTH, generator=generator), torch.randint(CLASSES, (N,), generator=generator))
    torch.manual_seed(1)
    private = make_private(
        dp_model,
        torch.optim.Adam(dp_model.parameters(), lr=0.01),
        data,
        sample_rate=RATE,
        target_delta=DELTA,
        target_epsilon=target_epsilon,
        noise_multiplier=1.0,
        accountant="rdp",  # quick
        max_physical_batch=8,
        seed=0,
        ledger_file=folder.ledger,
    )
    private.optimizer.inner.register_step_pre_hook(lambda *_: moment("accounted"))
    if folder.checkpoint.exists():
        private.load(folder.checkpoint)
    while private.released_steps < STEPS:
        for x, y in private.loader:
            moment("batch")
            F.cross_entropy(dp_model(x), y, reduction="sum" if len(x) == 0 else "mean").backward()
            moment("backward")
            try:
                private.optimizer.step()
            except PrivacyError as error:
                print(error, file=sys.stderr)
                return OVER_BUDGET
            private.optimizer.zero_grad()
            if not private.optimizer.released:
                continue
            moment("stepped")
            with folder.log.open("a") as log:
                log.write(f"{private.released_steps}\n")
                log.flush()
                os.fsync(log.fileno())
            moment("logged")
            if private.released_steps % SAVE_EVERY == 0:
                private.save(folder.checkpoint)
                moment("saved")
            if private.released_steps == STEPS:
                break
    torch.save([p.detach() for p in dp_model.parameters()], folder.final)
    return FINISHED


# ---------------------------------------------------------------- what kills it


@dataclass
class Killer:
    """Forks children that train, and kills them."""

    dp_model: DPModule
    source: random.Random

    def run(self, folder: Folder, target_epsilon: float | None = None) -> int:
        """Let a child train to its end. Its exit code."""
        child = self._fork(folder, target_epsilon, lambda _: None)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def kill_at_random(self, folder: Folder, target_epsilon: float | None = None) -> Death:
        """After a random number of moments, and from there a random time later."""
        moments, delay = self.source.randrange(1, MOST_MOMENTS), self.source.uniform(0, 2 * NAP)
        naps, (read_end, write_end) = random.Random(self.source.random()), os.pipe()

        def moment(_: str) -> None:
            os.write(write_end, b".")
            time.sleep(naps.uniform(0, NAP))

        child = self._fork(folder, target_epsilon, moment)
        os.close(write_end)
        while moments and (seen := os.read(read_end, moments)):  # nothing is read of a child that has ended
            moments -= len(seen)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.close(read_end)
        return self._killed(child, folder, "random")

    def kill_at(self, wanted: str, folder: Folder, target_epsilon: float | None = None) -> Death:
        """At one of the first few times that a moment comes."""
        times = self.source.randrange(1, 2 * SAVE_EVERY if wanted != "saved" else 3)

        def moment(name: str) -> None:
            nonlocal times
            times -= name == wanted
            if times == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return self._killed(self._fork(folder, target_epsilon, moment), folder, wanted)

    def _fork(self, folder: Folder, target_epsilon: float | None, moment: Callable[[str], None]) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            fsync = os.fsync

            def slow_fsync(descriptor: int) -> None:
                moment("writing")
                fsync(descriptor)

            os.fsync = slow_fsync
            code = train(self.dp_model, folder, target_epsilon, moment)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _killed(self, child: int, folder: Folder, where: str) -> Death:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the child that was to be killed ({where}) ended with {code}")
        recorded = len(Ledger.load(folder.ledger)) if folder.ledger.exists() else 0
        return Death(where, lines(folder), recorded, folder.checkpoint.exists())


def lines(folder: Folder) -> int:
    return len(folder.log.read_text().splitlines())


def main(root: Path) -> None:
    torch.set_num_threads(1)
    killer = Killer(compiled(), random.Random(0))
    started = time.perf_counter()

    whole = Folder(root / "whole").made()
    whole_code = killer.run(whole)

    killed = Folder(root / "killed").made()
    deaths = [killer.kill_at(name, killed) for name in MOMENTS]
    deaths += [killer.kill_at_random(killed) for _ in range(KILLS)]
    killed_code = killer.run(killed)

    budget = Folder(root / "budget").made()
    budget_deaths = [killer.kill_at(name, budget, TARGET_EPSILON) for name in ("writing", "accounted", "stepped")]
    budget_deaths += [killer.kill_at_random(budget, TARGET_EPSILON) for _ in range(2)]
    stops = []
    for _ in range(3):
        code = killer.run(budget, TARGET_EPSILON)
        stops.append((code, lines(budget), len(Ledger.load(budget.ledger))))

    report = {
        "whole_code": whole_code,
        "deaths": [asdict(death) for death in deaths],
        "killed_code": killed_code,
        "budget_deaths": [asdict(death) for death in budget_deaths],
        "stops": stops,
        "seconds": time.perf_counter() - started,
    }
    (root / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
