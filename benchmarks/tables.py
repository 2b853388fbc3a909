"""Results of step_time.py, predictions.py and least_memory.py as the Markdown tables of docs/speed.md, and the aims.

python benchmarks/tables.py benchmarks/results/epyc/*.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spreads import ratio_of, spread_text

FORMS = ("split", "fused")
MODES = ("eager", "compiled")
AIMS = {
    "split-eager": (1.10, 1.25),
    "fused-eager": (1.10, 1.25),
    "split-compiled": (1.10, 1.20),
    "fused-compiled": (1.05, 1.15),
}
"""Of each method over plain training of its mode: geometric mean over the workloads, and the most of any."""
MEMORY_AIM, OPACUS_AIM = 1.10, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    reports = [json.loads(path.read_text()) for path in parser.parse_args().files]
    models = models_of(reports)
    steps = {name: model["methods"] for name, model in models.items() if "methods" in model and "bfloat16" not in name}
    predicted = {name: model for name, model in models.items() if "seconds" in model}
    if steps:
        print("\n".join(step_table(steps)) + "\n")
        print("\n".join(memory_table(steps)) + "\n")
        print("\n".join(peer_table(steps)) + "\n")
        print("\n".join(aims(steps)) + "\n")
    if predicted:
        print("\n".join(prediction_table(predicted)) + "\n")
    least = {name: own for report in reports for name, own in report.get("least_memory", {}).items()}
    if least:
        print("\n".join(least_table(least)))


def models_of(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By name, and by what was measured of them: runs under autocast and predictions stand beside the others."""
    found: dict[str, Any] = {}
    for report in reports:
        for name, model in report.get("models", {}).items():
            kind = ", bfloat16" if "--autocast" in report["command"] else "" if "methods" in model else ", predicted"
            found[name + kind] = model
    return found


def step_table(models: dict[str, Any]) -> list[str]:
    """Time over plain training of the same mode, its geometric mean, and the largest error of a gradient."""
    columns = [(form, mode) for mode in MODES for form in FORMS]
    peers = sorted({m for own in models.values() for m in own if m.partition("-")[0] in ("opacus", "vmap")})
    lines = header(["", *(f"{form}, {mode}" for form, mode in columns), *peers, "error"])
    found: dict[str, list[float]] = {}
    for name, own in models.items():
        cells = [name]
        for method, base in [*((f"{f}-{m}", f"plain-{m}") for f, m in columns), *((p, "plain-eager") for p in peers)]:
            record = own.get(method, {})
            ratio = record.get(f"ratio_to_{base}")
            if ratio is None:
                cells.append("refuses" if "refused" in record else "")
                continue
            found.setdefault(method, []).append(ratio["median"])
            cells.append(spread_text(ratio))
        errors = [r["gradient_error"] for m, r in own.items() if m.partition("-")[0] in FORMS]
        lines.append(row([*cells, f"{max(errors):.0e}"]))
    methods = [*(f"{f}-{m}" for f, m in columns), *peers]
    means = [f"{statistics.geometric_mean(found[m]):.2f}" if m in found else "" for m in methods]
    return [*lines, row(["geometric mean", *means, ""])]


def over(models: dict[str, Any], method: str, base: str) -> dict[str, dict[str, Any]]:
    """By workload, where both were run: median and quartiles of the ratio of their times within a round."""
    found = {}
    for name, own in models.items():
        if "seconds" in own.get(method, {}) and "seconds" in own.get(base, {}):
            found[name] = ratio_of(own[method], own[base])
    return found


def peer_table(models: dict[str, Any]) -> list[str]:
    """Time of peers over the fused step, memory of a compiled vmap over it, and the errors of their gradients."""
    pairs = [
        ("opacus-hooks", "fused-eager"),
        ("opacus-hooks", "fused-compiled"),
        ("opacus-ghost", "fused-eager"),
        ("vmap-compiled", "fused-compiled"),
    ]
    peers = list(dict.fromkeys(peer for peer, _ in pairs))
    timed = [over(models, *pair) for pair in pairs]
    heads = [f"{peer} over {base}" for peer, base in pairs]
    lines = header(["", *heads, "memory, vmap over fused-compiled", *(f"error, {peer}" for peer in peers)])
    for name, own in models.items():
        if not any(peer in own for peer in peers):
            continue
        cells = [name]
        for (peer, _), ratios in zip(pairs, timed, strict=True):
            refused = "refused" in own.get(peer, {})
            cells.append("refuses" if refused else spread_text(ratios[name]) if name in ratios else "")
        bytes_of = [own.get(method, {}).get("peak_bytes") for method in ("vmap-compiled", "fused-compiled")]
        cells.append(f"{bytes_of[0] / bytes_of[1]:.1f}" if all(bytes_of) else "")
        errors = [own.get(peer, {}).get("gradient_error") for peer in peers]
        lines.append(row([*cells, *("" if error is None else f"{error:.0e}" for error in errors)]))
    means = [f"{mean_of(ratios):.2f}" if ratios else "" for ratios in timed]
    return [*lines, row(["geometric mean", *means, "", *[""] * len(peers)])]


def aims(models: dict[str, Any]) -> list[str]:
    """What was aimed at, and what was measured."""
    lines = header(["", "aim", "measured"])
    for method, (middle, most) in AIMS.items():
        form, _, mode = method.partition("-")
        ratios = over(models, method, f"plain-{mode}")
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name]["median"])
            found = f"{mean_of(ratios):.3f}, at most {ratios[worst]['median']:.3f} ({worst})"
            lines.append(row([f"time, {form}, {mode}, over plain", f"{middle:.2f}, at most {most:.2f}", found]))
    peaks = {
        (name, method): own[method]["peak_bytes"] / own[plain]["peak_bytes"]
        for name, own in models.items()
        for method, plain in ((method, f"plain-{method.partition('-')[2]}") for method in AIMS)
        if all("peak_bytes" in own.get(each, {}) for each in (method, plain))
    }
    if peaks:
        name, method = max(peaks, key=lambda key: peaks[key])
        lines.append(
            row(["memory over plain", f"at most {MEMORY_AIM:.2f}", f"{peaks[name, method]:.3f} ({name}, {method})"])
        )
    for base in ("fused-eager", "fused-compiled"):
        if ratios := over(models, "opacus-hooks", base):
            found = f"{mean_of(ratios):.2f} over {len(ratios)} workloads"
            lines.append(row([f"opacus-hooks over {base}", f"at least {OPACUS_AIM}", found]))
    if ratios := over(models, "vmap-compiled", "fused-compiled"):
        least = min(ratios, key=lambda name: ratios[name]["median"])
        slower = sum(ratio["median"] > 1 for ratio in ratios.values())
        found = f"{spread_text(ratios[least])} ({least}); above 1 on {slower} of {len(ratios)}"
        lines.append(row(["vmap-compiled over fused-compiled, least", "above 1", found]))
    return lines


def mean_of(ratios: dict[str, dict[str, Any]]) -> float:
    return statistics.geometric_mean([ratio["median"] for ratio in ratios.values()])


def memory_table(models: dict[str, Any]) -> list[str]:
    """Peak of a step in MB, and over that of plain training of the same mode."""
    columns = [*((form, mode) for mode in MODES for form in ("plain", *FORMS)), ("opacus", "hooks")]
    lines = header(["peak, MB", *(f"{form}, {mode}" for form, mode in columns)])
    for name, own in models.items():
        cells = [name]
        for form, mode in columns:
            peak = own.get(f"{form}-{mode}", {}).get("peak_bytes")
            base = own.get(f"plain-{mode}", own["plain-eager"]).get("peak_bytes")
            ratio = "" if form == "plain" or not base or peak is None else f" ({peak / base:.2f})"
            cells.append("" if peak is None else f"{peak / 1e6:.0f}{ratio}")
        lines.append(row(cells))
    return lines


def prediction_table(models: dict[str, Any]) -> list[str]:
    lines = header(["", "ms predicted", "measured", "ratio", "MB predicted", "measured", "ratio"])
    for name, own in models.items():
        cells = [name.partition(",")[0]]
        for what, unit in (("seconds", 1e3), ("peak_bytes", 1e-6)):
            predicted, measured = own[what]["predicted"], own[what]["measured"]
            cells += [f"{predicted * unit:.1f}", f"{measured * unit:.1f}", f"{predicted / measured:.2f}"]
        lines.append(row(cells))
    return lines


def least_table(models: dict[str, Any]) -> list[str]:
    """What a plan needs at least in MB, and what its step takes."""
    lines = header(["MB", "plain", *(f"{form}, {what}" for form in FORMS for what in ("least", "measured"))])
    for name, own in models.items():
        cells = [name, f"{own['plain-eager']['peak_bytes'] / 1e6:.1f}"]
        for form in FORMS:
            least, peak = (own[f"{form}-eager"][key] for key in ("least_bytes", "peak_bytes"))
            cells += [f"{least / 1e6:.1f}", f"{peak / 1e6:.1f} ({peak / least:.2f})"]
        lines.append(row(cells))
    return lines


def header(cells: list[str]) -> list[str]:
    return [row(cells), "|" + "---|" * len(cells)]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
