"""docs/batching.md, written from the rules: `python -m dpcompile.rules.batching.table` prints it."""

from __future__ import annotations

from functools import partial
from typing import Any

from dpcompile.rules import batching
from dpcompile.rules.batching import Rule

CLASSES = {
    "Copies, types and devices": "COPIES",
    "Views, folds, joining and splitting": "VIEWS",
    "Element by element": "POINTWISE",
    "Reductions, scans, sorts, matrices": "REDUCTIONS",
    "Products": "CONTRACTIONS",
    "Attention": "ATTENTION",
    "Recurrent layers": "RECURRENCE",
    "Convolution, pooling, resizing, padding, look-up": "LOCAL",
    "Normalisation": "NORMS",
    "Indexing": "INDEXING",
    "Losses": "LOSSES",
    "Constructors": "CONSTRUCTORS",
}

HEAD = """# What keeps samples apart

Written by `python -m dpcompile.rules.batching.table > docs/batching.md`; a test fails when it is stale.

A model is taken only if every op on the way to its outputs keeps the data of each sample in that sample's own slice of
one dimension, the batch, which may be folded with others. Each line below is a rule: what it demands of its ops. What
does not meet it, and any op without a line, is refused by name of module, op and source line, with what to do.

Ops that torch itself tags as pointwise need no line: they follow the first rule of "Element by element". An op
that is composed of others and has no line is written out in those (`passes/capture.py`). Inputs that are the same for
all samples (constants, parameters and what is computed from them) meet every demand, unless they hold the batch size.

A buffer may be written only what depends on no sample: a counter is, running statistics of the data are not. With
`loss_fn`, the loss is one value for each sample, or their sum or mean, and nothing but constants may scale it.
"""


def demand(rule: Rule) -> str:
    """What a rule asks for: the first line of its docstring."""
    given = rule.keywords if isinstance(rule, partial) else {}
    text = (rule.func if isinstance(rule, partial) else rule).__doc__
    assert text, f"the rule {rule} has no docstring"
    return text.strip().split("\n")[0].format(**given)


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, name in CLASSES.items():
        parts += [f"## {title}", "", "| ops | what is demanded |", "|---|---|"]
        parts += [f"| {', '.join(ops)} | {text} |" for text, ops in _lines(getattr(batching, name)).items()]
        parts.append("")
    return "\n".join(parts)


def _lines(table: dict[Any, Rule]) -> dict[str, list[str]]:
    """The demand of each rule, and the ops that have it."""
    found: dict[str, list[str]] = {}
    for key, rule in table.items():
        found.setdefault(demand(rule), []).append(f"`{str(key).removeprefix('aten.').removesuffix('.default')}`")
    return found


if __name__ == "__main__":
    print(markdown(), end="")
