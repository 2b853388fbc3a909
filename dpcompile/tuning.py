"""Seconds that candidates take on this machine, and the file that remembers them.

The times of one site are told by device, threads, torch version and what the site computes, so that a plan made from
them is the same again until one of these changes. The file is `tuning.json` in the cache directory: DPCOMPILE_CACHE, or
`dpcompile` in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dpcompile.device import cache_directory, device_name
from dpcompile.files import write_whole
from dpcompile.plan import Method

ROUNDS = 5
SECONDS = 0.01  # of one measurement: shorter candidates are repeated


class Tuner:
    """Measures candidates, or remembers what they took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._path = cache_directory() / "tuning.json"
        self._machine = f"{device_name(device)}, torch {torch.__version__}"
        self._known: dict[str, dict[str, float]] = _read(self._path)

    def seconds(
        self, what: object, candidates: Mapping[Method, Callable[[], Callable[[], Any]]]
    ) -> dict[Method, float]:
        """Of each candidate, taken in turns; what `candidates` give are made only if a time is not known yet.

        Times of several candidates are kept together: those that were taken in one run compare.
        """
        digest = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
        key = f"{self._machine}, {digest}"
        known = self._known.get(key, {})
        if not {method.value for method in candidates} <= set(known):
            known = {m.value: s for m, s in self._measure({m: make() for m, make in candidates.items()}).items()}
            self._remember(key, known)
        return {method: known[method.value] for method in candidates}

    def _measure(self, candidates: Mapping[Method, Callable[[], Any]]) -> dict[Method, float]:
        repeats = {}
        for method, run in candidates.items():
            run()
            repeats[method] = max(round(SECONDS / max(self._once(run, 1), 1e-9)), 1)
        taken: dict[Method, list[float]] = {method: [] for method in candidates}
        for _ in range(ROUNDS):
            for method, run in candidates.items():
                taken[method].append(self._once(run, repeats[method]))
        return {method: statistics.median(seconds) for method, seconds in taken.items()}

    def _once(self, run: Callable[[], Any], repeats: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        self._wait()
        return (time.perf_counter() - started) / repeats

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _remember(self, key: str, seconds: dict[str, float]) -> None:
        self._known = _read(self._path) | self._known | {key: seconds}
        text = json.dumps(self._known, indent=1, sort_keys=True).encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, lambda file: file.write(text))
        except OSError:  # a cache that cannot be written is measured anew
            pass


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
