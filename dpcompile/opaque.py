"""Ops that no compiler looks into, with less in the way of a call.

`torch.library.custom_op` takes a little longer for each of its calls, and there are many in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def opaque(schema: str, compute: Callable[..., Any], shape: Callable[..., Any]) -> torch._ops.OpOverload:
    """The op of a schema, "name(Tensor x, ...) -> Tensor", on every device; `shape` makes its fake results.

    A backward through it raises RuntimeError: it has no derivative. As of every op, no result is one of the arguments
    or shares its memory.
    """
    name, _, rest = schema.partition("(")
    torch.library.define(f"dpcompile::{name}", f"({rest}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"dpcompile::{name}", "default", compute)
    torch.library.register_fake(f"dpcompile::{name}", shape)

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"dpcompile::{name} has no derivative: clipped gradients are differentiated once.")

    torch.library.register_autograd(f"dpcompile::{name}", refuse)
    return getattr(torch.ops.dpcompile, name).default
