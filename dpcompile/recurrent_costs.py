"""What recurrences cost: the products of all steps, and how many ops of torch they are where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from dpcompile.recurrent import (
    GRU,
    GRU_BACKWARD,
    LSTM,
    LSTM_BACKWARD,
    RNN,
    RNN_BACKWARD,
    goes_by_kernel,
)
from dpcompile.shapes import hint

_own = torch.ops.dpcompile


@register_flop_formula([_own.lstm, _own.gru, _own.rnn])
def _flops(gates_shape: Sequence[Any], bias_shape: Any, weight_shape: Sequence[Any], *_: Any, **__: Any) -> Any:
    return _products(gates_shape, weight_shape)


@register_flop_formula([_own.lstm_backward, _own.gru_backward])
def _flops_back(grad_h_shape: Sequence[Any], *shapes: Any, **__: Any) -> Any:
    return _products(grad_h_shape, shapes[-1])


@register_flop_formula(_own.rnn_backward)
def _flops_rnn_back(grad_h_shape: Sequence[Any], h_shape: Any, weight_shape: Sequence[Any], *_: Any, **__: Any) -> Any:
    return _products(grad_h_shape, weight_shape)


def _products(state_shape: Sequence[Any], weight_shape: Sequence[Any]) -> Any:
    """Of a product with the weight at every step."""
    return 2 * state_shape[0] * state_shape[1] * weight_shape[0] * weight_shape[1]


CALLS: dict[Any, int] = {LSTM: 7, GRU: 5, RNN: 2, LSTM_BACKWARD: 9, GRU_BACKWARD: 6, RNN_BACKWARD: 2}
"""Ops that each step consists of."""


def steps_of(node: fx.Node) -> int:
    """How many steps the op goes through one call after the other, for the sample; 1 for an op without steps."""
    return hint(_shape(node, 0)[1]) if _looped(node) else 1


def calls_of(node: fx.Node) -> int:
    """How many ops the op consists of."""
    return steps_of(node) * CALLS[node.target] if _looped(node) else 1


def _looped(node: fx.Node) -> bool:
    """Whether its steps are ops of torch."""
    return node.target in CALLS and not goes_by_kernel(_tensor(node, 0))


def by_kernel(node: fx.Node) -> bool:
    """Whether it is a recurrence that a kernel of our own goes through."""
    return node.target in CALLS and not _looped(node)


def sides_of_step(node: fx.Node) -> tuple[Any, ...]:
    """Of the product with the weight that each step has: samples, and the weight's own. None in a loop of our own."""
    if not _looped(node):
        return ()
    weight = next(i for i, argument in enumerate(node.target._schema.arguments) if argument.name == "weight")  # type: ignore[union-attr]
    return (_shape(node, 0)[0], *_shape(node, weight))


def _shape(node: fx.Node, at: int) -> tuple[Any, ...]:
    return tuple(_tensor(node, at).shape)


def _tensor(node: fx.Node, at: int) -> Tensor:
    argument = node.args[at]
    assert isinstance(argument, fx.Node)
    return argument.meta["val"]
