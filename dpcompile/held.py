"""What one graph leaves to another, as it is: an op that reads it and that no compiler fuses with what made it."""

from __future__ import annotations

from dpcompile.opaque import opaque

HELD = opaque(
    "held(Tensor values, Tensor[] beside) -> Tensor",
    lambda values, beside: values.clone(),
    lambda values, beside: values.new_empty(values.shape),
)
"""Values, and nothing of what is beside them: torch's partitioner makes nothing again that such an op reads."""
