"""keep-layouts: convolutions that leave tensors in their layout when the graph is compiled (dpcompile/layouts.py)."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpcompile import layouts
from dpcompile.ir import Draft
from dpcompile.passes.rewrite import Order


def keep_layouts(draft: Draft, _order: Order) -> Draft:
    """The program with `layouts.convolution` in place of `aten.convolution`."""
    for node in draft.program.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
        node.target = layouts.convolution
    return replace(draft, program=draft.program)
