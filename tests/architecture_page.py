"""Writes docs/architectures.md: what becomes of every model of `architectures.py`.

python tests/architecture_page.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
import transformers
from architectures import ARCHITECTURES, REFUSED
from zoo import Case

from dpcompile.api import Analysis, prove
from dpcompile.errors import DPCompileError

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
FORMS = ("outer", "onehot", "explicit", "fallback")

HEAD = f"""# Architectures

Written by `python tests/architecture_page.py` (torch {torch.__version__.partition("+")[0]}, transformers \
{transformers.__version__}). {len(ARCHITECTURES) - len(REFUSED)} of {len(ARCHITECTURES)} are exact.

Tiny configs of Hugging Face models with random weights (`tests/architectures.py`). *Exact*: norms and clipped
gradients equal those of one sample at a time, at the batch size of the sample and at others: of some in float32 to
1e-4 (`pytest tests/test_architectures.py`), of all in float64 to 1e-8, with ghost and with explicit norms too (`-m
slow`). *Refused*: an error says why, where and what to do; nothing is trained wrongly. `_frozen`: batch norms in eval
mode. Mixtures of experts are exact with `experts_implementation="batched_mm"`.

Ops: aten ops that capture gives. Sites: uses of parameters by the form of their per-sample gradient; a fallback is the
vmap of an op's own vjp.

| name | model | | ops | {" | ".join(FORMS)} |
|---|---|---|--:|{"--:|" * len(FORMS)}
"""


def row_of(case: Case, analysis: Analysis) -> str:
    """The line of a model that is taken."""
    nodes = analysis.captured.program.graph.nodes
    ops = sum(isinstance(n.target, torch._ops.OpOverload) and "_assert" not in str(n.target) for n in nodes)
    sites = Counter("fallback" if s.rule == "fallback" else s.work.kind for s in analysis.uses.sites)
    numbers = " | ".join(str(n) for n in (ops, *(sites[form] for form in FORMS)))
    return f"| {case.name} | {type(case.model).__name__} | exact | {numbers} |"


def refused_row(case: Case, error: DPCompileError) -> str:
    """The line of a model that is refused: what the first finding says."""
    findings = getattr(error, "findings", ())
    if findings:
        reason = f"{findings[0].op} {findings[0].problem}"
    else:
        first, *rest = str(error).splitlines()
        line = next((text.partition(" at ")[2].split(": ", 1)[1] for text in rest if text.startswith("  at ")), "")
        reason = first.partition(type(case.model).__name__ + " ")[2].rstrip(".") + (f": `{line}`" if line else "")
    return f"| {case.name} | {type(case.model).__name__} | refused: {reason} | {' | '.join(' ' * (1 + len(FORMS)))} |"


def found(case: Case) -> str:
    """The line of a model, whichever it is."""
    try:
        return row_of(case, prove(case.model, case.sample_input).conclude())
    except DPCompileError as error:
        return refused_row(case, error)


def main() -> None:
    """Write the page, models in the order of the table, refused ones behind."""
    rows: list[str] = []
    for name in sorted(ARCHITECTURES, key=lambda name: name in REFUSED):
        rows.append(found(ARCHITECTURES[name]()))
        print(rows[-1], file=sys.stderr, flush=True)
        if ("| refused:" in rows[-1]) != (name in REFUSED):
            raise SystemExit(f"{name} is {'not ' * (name in REFUSED)}refused: see tests/architectures.py")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
