"""check-supported: a model whose samples influence each other is refused, with every offender in one message."""

from __future__ import annotations

from dpcompile.errors import refusal
from dpcompile.ir import Program, Tracked


def check_supported(program: Program, tracked: Tracked) -> None:
    """Nothing, if batch tracking found every output to be per-sample.

    Raises:
        BatchMixingError: samples influence each other somewhere.
        NoRuleError: for some op no rule can tell.
    """
    if tracked.findings:
        raise refusal(tracked.findings, "check-supported")
