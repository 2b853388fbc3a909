"""The errors of dpcompile: one small family, each member telling the user what kind of answer to expect.

A message names the pass, the user's own name for the thing, what was found, what was needed and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class DPCompileError(Exception):
    """Base of every refusal. The model is left as it was."""


class CaptureError(DPCompileError):
    """The model or its sample input cannot be turned into a graph."""


class BatchMixingError(DPCompileError):
    """Samples influence each other, so no per-sample gradient exists. Never supportable as it stands."""

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class NoRuleError(DPCompileError):
    """An op has no rule yet. The message says which rule file to write."""

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class InvalidGraphError(DPCompileError):
    """A pass produced a graph that breaks an invariant. A bug of dpcompile, never of the user."""


class NonFiniteGradientError(DPCompileError):
    """A sample's gradient is NaN or infinite, and `nonfinite="raise"` was asked for."""


class PrivacyError(DPCompileError):
    """A request that would void the privacy guarantee."""


@dataclass(frozen=True)
class Finding:
    """One reason why a model is refused, in the user's own names."""

    module: str  # path of the user's module, "(root)" for the model itself
    module_type: str  # class name of that module, for the reader only
    op: str  # aten op, "batch_norm"
    line: str  # the user's source line, 'model.py:12: y = x - x.mean(0)'; "" where torch kept none
    problem: str  # what was found
    cure: str  # what to do about it
    mixes: bool = True  # True: samples mix (never supportable); False: no rule yet
    node: str = field(default="", compare=False)  # in the captured graph; "" where it was not told

    def __str__(self) -> str:
        where = f"`{self.module}`" + (f" ({self.module_type})" if self.module_type else "")
        line = f"\n      at {self.line}" if self.line else ""
        return f"{where}: {self.op} {self.problem}{line}\n      cure: {self.cure}"


def refusal(findings: Sequence[Finding], stage: str) -> BatchMixingError | NoRuleError:
    """One error that lists every finding; a BatchMixingError if any sample mixes, else a NoRuleError."""
    mixes = any(finding.mixes for finding in findings)
    what = "samples influence each other here" if mixes else "no rule proves these ops to be per-sample"
    lines = "\n".join(f"  {i}. {finding}" for i, finding in enumerate(findings, 1))
    kind = BatchMixingError if mixes else NoRuleError
    return kind(f"{stage}: the model is refused, {what}:\n{lines}", findings)
