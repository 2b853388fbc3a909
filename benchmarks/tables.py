"""Results of step_time.py, predictions.py and least_memory.py as the Markdown tables of docs/speed.md.

python benchmarks/tables.py benchmarks/results/cpu/*.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMS = ("split", "fused")
MODES = ("eager", "compiled")


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
            low, high = ratio["quartiles"]
            cells.append(f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})")
        errors = [r["gradient_error"] for m, r in own.items() if m.partition("-")[0] in FORMS]
        lines.append(row([*cells, f"{max(errors):.0e}"]))
    methods = [*(f"{f}-{m}" for f, m in columns), *peers]
    means = [f"{statistics.geometric_mean(found[m]):.2f}" if m in found else "" for m in methods]
    return [*lines, row(["geometric mean", *means, ""])]


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
