"""Samples per second of seeded and of secure noise, and of the parts of the secure one.

    python benchmarks/noise.py --coordinates 4000000 --rounds 9

The sources take turns, one measurement each per round, in one process, so that a busy machine disturbs all of them
alike; the ratio is taken within a round. One thread.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch

from dpcompile.noise import GaussianNoise, SecureNoise, discrete_gaussian, random_words

STD = 1.3
SCALE = int(STD * 2**40)  # of the discrete Gaussian, in grid steps


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(coordinates: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by name, one for each round; the first round warms up and is left out."""
    value = torch.zeros(coordinates)
    seeded, secure = GaussianNoise(seed=0), SecureNoise()
    runs: dict[str, Callable[[], object]] = {
        "seeded": lambda: seeded.noised(value, STD),
        "secure": lambda: secure.noised(value, STD),
        "of it: discrete Gaussian": lambda: discrete_gaussian(coordinates, SCALE),
        "of it: ChaCha20": lambda: random_words(2 * coordinates),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: found[1:] for name, found in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinates", type=int, default=4_000_000, help="coordinates of the sum")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    taken = measure(arguments.coordinates, arguments.rounds)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "cryptography"))
    print(f"{platform.machine()}, one thread, float32 sum of {arguments.coordinates:,} coordinates; {names}")
    for name, found in taken.items():
        rate = arguments.coordinates / statistics.median(found) / 1e6
        print(f"{name:26s} {rate:8.1f} million samples a second (median of {arguments.rounds})")
    ratios = [secure / seeded for secure, seeded in zip(taken["secure"], taken["seeded"], strict=True)]
    print(f"secure noise takes {statistics.median(ratios):.1f} times as long ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
