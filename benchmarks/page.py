"""Results as a page to read: bars of time and memory against plain training, lines of growth, and every number.

python benchmarks/page.py benchmarks/results/epyc/*.json --html page.html
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from tables import models_of

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

BASES = {"eager": "plain-eager", "compiled": "plain-compiled"}
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
svg { max-width: 100% }"""


def page(reports: Sequence[dict[str, Any]]) -> str:
    """HTML without references to anything outside of it, of what step_time.py and growth.py have written."""
    steps = [report for report in reports if _of_steps(report)]
    together = {"models": {name: model for name, model in models_of(steps).items() if "methods" in model}}
    parts = ["<!doctype html><meta charset='utf-8'><title>dpcompile: one private step against a plain one</title>"]
    parts.append(f"<style>{STYLE}</style><h1>One private step against a plain one</h1>")
    for mode, base in BASES.items():
        times = _values(together, mode, lambda record, b=base: record[f"ratio_to_{b}"]["median"])
        parts += _bars(f"Time of a step, {mode}, over {base}", times)
        parts += _bars(f"Peak memory, {mode}, over {base}", _peaks(together, mode, base))
    for report in reports:
        if "axis" in report.get("points", [{}])[0]:
            parts += [_facts(report), *_lines("Time of a fused step over a plain one, eager", report["points"])]
    for report in steps:
        parts += [_facts(report), *(_table(name, model) for name, model in report["models"].items())]
    return "\n".join(parts)


def _of_steps(report: dict[str, Any]) -> bool:
    return all("methods" in model for model in report.get("models", {"": {}}).values())


def _facts(report: dict[str, Any]) -> str:
    facts = report["hardware"] | report["versions"] | {"date": report["date"], "rounds": report["rounds"]}
    text = html.escape(", ".join(f"{name} {value}" for name, value in facts.items() if value))
    return f"<p><code>{html.escape(report['command'])}</code><br>{text}</p>"


def _lines(title: str, points: Sequence[dict[str, Any]]) -> list[str]:
    """One plot for each size that grows, one line for each model."""
    axes_of = list(dict.fromkeys(point["axis"] for point in points))
    figure, plots = plt.subplots(1, len(axes_of), figsize=(3.2 * len(axes_of), 3), sharey=True, squeeze=False)
    for axis, plot in zip(axes_of, plots[0], strict=True):
        for model in dict.fromkeys(point["model"] for point in points):
            own = [point for point in points if point["axis"] == axis and point["model"] == model]
            if own:
                medians = [point["ratio"]["median"] for point in own]
                low, high = zip(*(point["ratio"]["quartiles"] for point in own), strict=True)
                doublings = range(len(own))
                plot.plot(doublings, medians, marker="o", label=f"{model}, from {own[0]['sizes'][axis]}")
                plot.fill_between(doublings, low, high, alpha=0.2)
        plot.axhline(1, color="black", linewidth=0.8)
        plot.set_xlabel(f"doublings of {axis}")
        plot.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return [_drawn(figure)]


def _drawn(figure: Figure) -> str:
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _values(report: dict[str, Any], mode: str, value: Callable[[Any], float]) -> dict[str, dict[str, float]]:
    """Method -> workload -> number, of the methods of one mode; peers without a compiler stand with the eager ones."""
    found: dict[str, dict[str, float]] = {}
    for name, model in report["models"].items():
        methods = model["methods"]
        shown = methods if BASES[mode] in methods else ()
        for method in (m for m in shown if m not in BASES.values() and "refused" not in methods[m]):
            if ("compiled" if method.endswith("-compiled") else "eager") == mode:
                found.setdefault(method, {})[name] = value(methods[method])
    return found


def _peaks(report: dict[str, Any], mode: str, base: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, model in report["models"].items():
        methods = model["methods"]
        plain = methods.get(base, {}).get("peak_bytes")
        if plain:
            one = _values({"models": {name: model}}, mode, lambda r, p=plain: r.get("peak_bytes", 0) / p)
            for method, values in one.items():
                found.setdefault(method, {}).update({n: v for n, v in values.items() if v})
    return found


def _bars(title: str, values: dict[str, dict[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for own in values.values() for name in own))
    if not names:
        return []
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(names)), 3.4))
    width = 0.8 / len(values)
    for i, (method, own) in enumerate(values.items()):
        places = [names.index(name) + (i - (len(values) - 1) / 2) * width for name in own]
        bars = axes.bar(places, list(own.values()), width, label=method)
        axes.bar_label(bars, fmt="%.2f", fontsize=6, rotation=90, padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_title(title, fontsize=10)
    if max(v for own in values.values() for v in own.values()) > 4:
        axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.legend(fontsize=7)
    return [_drawn(figure)]


def _table(name: str, model: dict[str, Any]) -> str:
    heads = ("method", "step, ms", "over plain eager", "over plain compiled", "peak, MB", "error of the gradient")
    rows = []
    for method, record in model["methods"].items():
        if "refused" in record:
            rows.append([method, "refuses", html.escape(record["refused"]), "", "", ""])
            continue
        ratios = [_ratio(record.get(f"ratio_to_{base}")) for base in BASES.values()]
        peak = f"{record['peak_bytes'] / 1e6:.0f}" if record.get("peak_bytes") else ""
        rows.append([method, f"{1e3 * record['median_seconds']:.1f}", *ratios, peak, f"{record['gradient_error']:.0e}"])
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<h3>{html.escape(name)}: {html.escape(model['note'])}</h3><table><tr>{head}</tr>{body}</table>"


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="written by step_time.py and growth.py")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    args.html.write_text(page([json.loads(path.read_text()) for path in args.results]))


if __name__ == "__main__":
    main()
