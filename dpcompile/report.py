"""A plan in words: the table that `print(dp_model.plan)` shows, the same for a program to read, and symbolically."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sympy

from dpcompile.flips import PAPER, paper_flip, symbolic_time_flip, turns
from dpcompile.plan import Cost, Method, Part, Plan, Times
from dpcompile.rows import Row, folded, rows_of
from dpcompile.shapes import B, D, P
from dpcompile.units import human, rounded_up

WIDTH = 140
PLACES = " +|"  # where a row stands among the uses of one weight: rows.Row.place
SHORTEST = {"parameter": 24, "reason": 12}  # columns that give way where a table is wider, and how far
OPTIONAL = (Method.SHIFTED, Method.LOOPED, Method.STREAMED, Method.FLASH, Method.TILED)
"""Methods that have a column where some row has them."""
LEGEND = (
    "Times (by the device model), flops of the choice, bytes held from the norm until the clip factors are known: for",
    "the whole batch, and of one layer where a row stands for several (x12). Rows from + to + are uses of one weight.",
)


def plan_text(plan: Plan) -> str:
    """One row for each use of a parameter (repeated layers as one), then totals. Stable; at most WIDTH columns."""
    groups = rows_of(plan)
    shown = folded(groups)
    flat = [row for rows in shown for row in rows]
    optional = [
        ("uses", any(row.uses > 1 for row in flat)),
        ("G", any(row.size("G") > 1 for row in flat)),
        ("best for T", any(row.span for row in flat)),
        *((m.value, any(row.option(m) for row in flat)) for m in OPTIONAL),
    ]
    table = [{k: v for k, v in _cells(row).items() if (k, False) not in optional} for row in flat]
    return "\n".join(
        [
            f"policy {plan.policy}, batch size {plan.batch_size}{_lengths(plan)}, device {_device(plan)}",
            "",
            *table_text(table, left={"parameter", "op", "choice", "reason"}),
            "",
            *LEGEND,
            "",
            *_totals(plan, [row for rows in groups for row in rows]),
            *_flip_lines(),
            *_notes(plan),
        ]
    )


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan for a program to read: every row, none folded; flops, bytes and seconds as numbers."""
    rows = [row for rows in rows_of(plan) for row in rows]
    return {
        "policy": plan.policy,
        "batch_size": plan.batch_size,
        "device": {
            "name": plan.device.name,
            "flops_per_s": plan.device.flops_per_s,
            "bytes_per_s": plan.device.bytes_per_s,
        },
        "rows": [_row_dict(row) for row in rows],
        "totals": {
            "flops": _at(plan.flops(), plan),
            "plain_flops": _at(plan.plain_flops(), plan),
            "backbone_flops": _at(plan.costs.backbone_flops, plan),
            "shared_flops": _at(plan.shared_flops(), plan),
            "flops_again": _at(plan.again_flops, plan),
            "gradient_time_s": sum(row.chosen.time_s for row in rows),
            "plain_gradient_time_s": sum(row.plain.time_s for row in rows),
            "booked_bytes": _at(plan.booked_bytes(), plan),
            "held_bytes": _at(plan.held_bytes(), plan),
            "largest_transient_bytes": max((row.chosen.transient_bytes for row in rows), default=0),
        },
        "memory": None if plan.memory is None else vars(plan.memory),
        "symbolic": {"flops": str(plan.flops()), "plain_flops": str(plan.plain_flops())},
        "flip": {"paper": f"T < {paper_flip()}"},
        "unused": list(plan.unused),
        "checkpointed": plan.checkpointed,
        "lengths": dict(plan.lengths),
    }


def symbolic_text(plan: Plan) -> str:
    """The cost of every kind of use by method in B, T, d, p and G, and where choices turn over, solved for T."""
    parts = [part for group in plan.costs.groups for part in group.parts]
    kinds: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        kinds.setdefault((part.kind, part.plain, *part.options.items()), []).append(part)
    lines = ["B samples, T positions, d input features, p output features, G groups; bytes for the sizes of this dtype"]
    if any(Method.SHIFTED in part.options for part in parts):
        lines += ["C channels of a group, U positions of the padded image"]
    for alike in kinds.values():
        first = alike[0]
        lines += ["", f"{first.kind}: {len(alike)} of {len(parts)} uses, for example {first.group} ({first.op})"]
        forms = [("plain", first.plain), *((m.value, c) for m, c in first.options.items())]
        if first.kind == "explicit":
            forms = [forms[0], ("any", forms[1][1])]
        lines += table_text([_formulas(*form) for form in forms])
        if turns(first):
            lines += ["", "  ghost and kept take the same time at"]
            lines += [f"  T = {symbolic_time_flip(first)}", "  with F flops/s and W bytes/s of the device"]
    lines += ["", *_flip_lines(), ""]
    flips = [_flip_cells(row) for rows in folded(rows_of(plan)) for row in rows if row.kind in ("outer", "onehot")]
    lines += table_text(flips, left={"parameter", "choice"})
    lines += ["", f"flops of a private step  {plan.flops()}", f"flops of a plain step    {plan.plain_flops()}"]
    return "\n".join(lines)


def measured_text(plan: Plan, measured: Times, step: Mapping[str, tuple[float, float]], unit: Mapping[str, str]) -> str:
    """Predicted against measured: time of norm and clipped sum by group, alike ones once; then of the whole `step`."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    alike: dict[tuple[Any, ...], int] = {}
    for group in rows_of(plan):
        first = group[0]
        if first.group not in measured:
            continue
        ((method, seconds),) = measured[first.group].items()
        predicted = sum(row.chosen.time_s for row in group)
        key = tuple((row.op, row.sizes, row.method) for row in group)
        alike[key] = alike.get(key, 0) + 1
        rows.setdefault(
            key,
            {
                "parameter": first.label,
                "uses alike": "",
                "choice": method.value,
                "predicted": human(predicted, "s"),
                "measured": human(seconds, "s"),
                "ratio": _ratio(predicted, seconds),
            },
        )
    for key, row in rows.items():
        row["uses alike"] = str(alike[key])
    totals = [
        {"one step": name, "predicted": human(a, unit[name]), "measured": human(b, unit[name]), "ratio": _ratio(a, b)}
        for name, (a, b) in step.items()
    ]
    left = {"parameter", "choice", "one step"}
    return "\n".join([*table_text(list(rows.values()), left=left), "", *table_text(totals, left=left)])


# ---------------------------------------------------------------- rows


def _cells(row: Row) -> dict[str, str]:
    times = {method.value: row.option(method) for method in Method}
    return {
        "parameter": _name(row),
        "op": row.op,
        "uses": f"x{row.uses}",
        **dict(zip("TdpG", _sizes(row), strict=True)),
        "plain": human(row.plain.time_s, "s"),
        **{name: human(numbers.time_s, "s") if numbers else "-" for name, numbers in times.items()},
        "flops": human(row.chosen.flops),
        "held": human(row.chosen.held_bytes, "B"),
        "flip T": "-" if row.flip_T is None else f"{row.flip_T:.0f}",
        "choice": row.method.value,
        "best for T": _span(row),
        "reason": _short(row.reason),
    }


def _span(row: Row) -> str:
    """The lengths for which the choice stays the best."""
    if row.span is None:
        return "-"
    least, greatest = row.span
    return f"{least} up" if greatest is None else f"{least}-{greatest}"


def _name(row: Row) -> str:
    return row.place + row.label + (f" x{row.alike}" if row.alike > 1 else "")


def _sizes(row: Row) -> list[str]:
    return [str(size) for _, size in row.sizes]


def _short(reason: str) -> str:
    """The reason without its figures, which stand in the columns beside it."""
    words = (
        reason.split(" (")[0].split(" of ")[0].replace("²", "^2").replace("≥", ">=")
    )  # plain ASCII prints everywhere
    return words if len(words) <= 28 else words.split(":")[0]


def _flip_cells(row: Row) -> dict[str, str]:
    paper = float(paper_flip().subs({P: row.size("p"), D: row.size("d")}))
    return {
        "parameter": _name(row),
        **dict(zip("TdpG", _sizes(row), strict=True)),
        "ghost by the paper: T <": f"{paper:.1f}",
        "by time: T <": "-" if row.flip_T is None else f"{row.flip_T:.1f}",
        "choice": row.method.value,
    }


def _formulas(name: str, cost: Cost) -> dict[str, str]:
    named = {"flops": cost.flops, "bytes moved": cost.bytes, "held": cost.held, "transient": cost.transient}
    return {"method": name, **{key: str(sympy.sympify(value)) for key, value in named.items()}}


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "parameter": row.group,
        "module": row.module,
        "op": row.op,
        "kind": row.kind,
        "uses": row.uses,
        **dict(row.sizes),
        "plain": vars(row.plain),
        "costs": {method.value: vars(numbers) for method, numbers in row.options},
        "flip_T": row.flip_T,
        "best_for_T": row.span,
        "choice": row.method.value,
        "reason": row.reason,
    }


# ---------------------------------------------------------------- totals


def _totals(plan: Plan, rows: Sequence[Row]) -> list[str]:
    flops, plain = _at(plan.flops(), plan), _at(plan.plain_flops(), plan)
    seconds, plain_seconds = sum(r.chosen.time_s for r in rows), sum(r.plain.time_s for r in rows)
    counts = [sum(choice.method is method for choice in plan.choices.values()) for method in Method]
    held, transient = _at(plan.held_bytes(), plan), max((r.chosen.transient_bytes for r in rows), default=0)
    booked = _at(plan.booked_bytes(), plan)
    totals = [
        ("flops, forward and backward", human(plain), human(flops), _ratio(flops, plain)),
        ("time of parameter gradients", human(plain_seconds, "s"), human(seconds, "s"), _ratio(seconds, plain_seconds)),
        ("layer inputs booked", human(booked, "B"), human(booked, "B"), _ratio(booked, booked) if booked else ""),
        ("held until the clip factors", human(0, "B"), human(held, "B"), ""),
        ("alive during one norm, at most", human(0, "B"), human(transient, "B"), ""),
    ]
    if plan.memory is not None:
        plain, peak = plan.memory.plain, plan.memory.peak
        totals.append(("peak memory of a step", human(plain, "B"), human(peak, "B"), _ratio(peak, plain)))
        if plan.memory.least is not None:
            least = plan.memory.least
            ratio = f"{rounded_up(least / plain, 2):.2f}"
            totals.append(("the least that a plan needs", "", human(least, "B", up=True), ratio))
    head = ("one step", "plain", "private", "ratio")
    table = table_text([dict(zip(head, line, strict=True)) for line in totals], left={"one step"})
    chosen = ", ".join(f"{count} {method.value}" for count, method in zip(counts, Method, strict=True) if count)
    shared = _at(plan.shared_flops(), plan)
    saved = (
        [f"equal Gram matrices are formed once: {human(shared)} flops less than the rows add up to"] if shared else []
    )
    again = human(_at(plan.again_flops, plan))
    twice = [f"{len(plan.again)} ops of the backward run twice, to book less: {again} flops more"] if plan.again else []
    return [*table, "", f"choices: {chosen or 'none'}", *saved, *twice]


def _flip_lines() -> list[str]:
    rule = " < ".join(map(str, PAPER))
    return [f"flip: paper ghost iff {rule}, that is T < {paper_flip()}; auto ghost as fast as kept at T = flip T"]


def _notes(plan: Plan) -> list[str]:
    notes = [f"unused: {', '.join(plan.unused)} (no output depends on them: no gradient)"] if plan.unused else []
    if plan.checkpointed:
        notes.append(
            f"checkpoint: {plan.checkpointed} regions of torch.utils.checkpoint are not computed again; what they "
            "compute is kept from the forward"
        )
    return notes


def _lengths(plan: Plan) -> str:
    """The sample's sizes of lengths that calls may choose: choices were made at them."""
    return "".join(f", {name} = {size} (free)" for name, size in plan.lengths.items())


def _device(plan: Plan) -> str:
    device = plan.device
    return f"{device.name} ({human(device.flops_per_s)}flop/s, {human(device.bytes_per_s, 'B')}/s)"


def _at(expression: sympy.Expr, plan: Plan) -> int:
    return int(sympy.sympify(expression).subs({B: plan.batch_size}))


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else "-"


# ---------------------------------------------------------------- text


def shorten(text: str, width: int) -> str:
    """The text with ~ for outer names, then within the longest name, if longer than `width`. Layer numbers stay."""
    words = text.lstrip(PLACES).split(".")
    mark = text[: len(text) - len(text.lstrip(PLACES))]
    removable = [i for i, word in enumerate(words[:-2]) if "{" not in word]
    while len(mark) + len(".".join(words)) > width and removable:
        words[removable.pop(0)] = "~"
    short = mark + re.sub(r"~(\.~)+", "~", ".".join(words))
    excess = len(short) - width
    if excess <= 0:
        return short
    longest = max(words, key=len)
    kept = max(len(longest) - excess - 1, 0)
    cut = f"{longest[: kept - kept // 2]}~{longest[len(longest) - kept // 2 :]}"
    return short.replace(longest, cut, 1)[:width]


def table_text(rows: Sequence[Mapping[str, str]], left: Collection[str] | None = None) -> list[str]:
    """Columns with their heads: the ones in `left` (default: all) to the left, others to the right."""
    if not rows:
        return []
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    spare = WIDTH - sum(widths.values()) - (len(widths) - 1)
    for name in (n for n in SHORTEST if n in widths and spare < 0):
        taken = min(-spare, max(widths[name] - SHORTEST[name], 0))
        widths[name], spare = widths[name] - taken, spare + taken
    gap = "  " if spare >= len(widths) - 1 else " "
    lines = []
    for cells in ({name: name for name in widths}, {name: "-" * width for name, width in widths.items()}, *rows):
        aligned = [
            shorten(cells[n], w).ljust(w) if left is None or n in left else cells[n].rjust(w) for n, w in widths.items()
        ]
        lines.append(gap.join(aligned).rstrip())
    return lines
