"""What is known of ops that compute one parameter-derived value from another, before any sample meets it."""

from __future__ import annotations

from typing import Any

import torch

from dpcompile.rules.sites.base import bind

aten = torch.ops.aten

_SAME = {aten.alias.default, aten.clone.default, aten.contiguous.default}
_PERMUTE = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default}

# Each element of the result is one element of the first argument.
_SELECT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.expand.default,
    aten.flip.default,
    aten.roll.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
    aten.diagonal.default,
}


def permutation_of(node: torch.fx.Node) -> tuple[int, ...] | None:
    """`result = input.permute(permutation)`; None if the op does anything else."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    order = list(range(value.dim()))
    if node.target in _SAME or _casts(node, value):
        return tuple(order)
    if node.target not in _PERMUTE:
        return None
    if node.target is aten.permute.default:
        return tuple(dim % value.dim() for dim in node.args[1])  # type: ignore[union-attr]
    if value.dim() < 2:
        return tuple(order)
    arguments: dict[str, Any] = bind(node)
    a, b = (arguments["dim0"], arguments["dim1"]) if node.target is aten.transpose.int else (-2, -1)
    if node.target is aten.numpy_T.default:
        return tuple(reversed(order))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _casts(node: torch.fx.Node, value: torch.Tensor) -> bool:
    """A cast from one floating-point type to another and nothing else: what autocast does to parameters."""
    if node.target is not aten._to_copy.default:
        return False
    source = bind(node)["self"].meta["val"]
    return source.is_floating_point() and value.is_floating_point() and source.device == value.device


def selects(node: torch.fx.Node) -> bool:
    """Whether every element of the result is a copy of one element of the first argument."""
    if node.target is aten.embedding.default:
        arguments = bind(node)
        return not arguments["scale_grad_by_freq"] and arguments["padding_idx"] < 0
    return node.target in _SELECT or node.target in _SAME or node.target in _PERMUTE
