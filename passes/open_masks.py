"""Attention masks that hide nothing, whatever the data are: attention without a mask.

A library that may not look at values while it is traced writes down the mask of ones that it leaves out otherwise.
Where it is made of numbers alone it can be computed here. Without it no layer keeps T x T numbers for each sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from dpcompile.ir import ancestors
from dpcompile.rules.sites.base import bind

aten = torch.ops.aten

MOST = 2**24
"""Elements of a mask that is computed to see what it hides."""
_SPREAD = (aten.expand.default, aten.unsqueeze.default, aten.squeeze.dims, aten.alias.default)


def drop_open_masks(graph: fx.Graph) -> None:
    """Take away every boolean mask of an attention that is made of numbers alone and true everywhere."""
    open_masks: dict[fx.Node, bool] = {}
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask = bind(node).get("attn_mask")
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype is not torch.bool:
            continue
        if mask not in open_masks:
            open_masks[mask] = _hides_nothing(mask)
        if open_masks[mask]:
            node.args = tuple(None if argument is mask else argument for argument in node.args)
            node.kwargs = {name: value for name, value in node.kwargs.items() if value is not mask}


def _hides_nothing(mask: fx.Node) -> bool:
    while mask.target in _SPREAD:  # the same values, more often
        (mask,) = mask.all_input_nodes[:1]
    made_of = ancestors([mask])
    if not all(_is_number(node) for node in made_of):
        return False
    values: dict[fx.Node, Any] = {}
    for node in mask.graph.nodes:
        if node in made_of:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return bool(values[mask].all())


def _is_number(node: fx.Node) -> bool:
    """Whether a value is the same in every call: of fixed size, from no input, not drawn."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return False
    fixed = all(isinstance(size, int) for size in value.shape) and value.numel() <= MOST
    schema = getattr(node.target, "_schema", None)
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return fixed and not drawn and schema is not None and not schema.is_mutable
