"""Recurrent layers and cells in ops that the rules know: linear and pointwise ones, and those of recurrent.py.

The inputs of all gates are one linear op; what goes from step to step is one op, so that the length may be free.
LSTMs with a projection are written out step by step, and so are layers without samples (of a learned prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OperatorBase

from dpcompile.recurrent import GRU, LSTM, RNN

aten = torch.ops.aten

State = tuple[Tensor, ...]
"""h, and c of an LSTM."""
Step = Callable[[Tensor, Tensor, State], State]
"""From what the input and what the state give to the gates, and the state, to the next state."""
Whole = Callable[[Tensor, Tensor, Tensor | None, State], tuple[Tensor, State]]
"""From what inputs give to the gates, weight and bias of the state, and the first state, to h and the last state."""

# ---------------------------------------------------------------- one step


def _gru_step(from_x: Tensor, from_h: Tensor, state: State) -> State:
    (h,) = state
    reset_x, update_x, new_x = from_x.chunk(3, -1)
    reset_h, update_h, new_h = from_h.chunk(3, -1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + (update_x + update_h).sigmoid() * (h - new),)


def _lstm_step(from_x: Tensor, from_h: Tensor, state: State) -> State:
    _, c = state
    enter, forget, new, leave = (from_x + from_h).chunk(4, -1)
    c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * c.tanh(), c


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda from_x, from_h, _: (activation(from_x + from_h),)


def _cell(step: Step) -> Callable[..., Any]:
    def cell(
        x: Tensor,
        given: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        given = [given] if isinstance(given, Tensor) else given
        state = step(F.linear(x, w_ih, b_ih), F.linear(given[0], w_hh, b_hh), tuple(given))
        h, *others = state
        return state if others else h

    return cell


CELLS: dict[OperatorBase, Callable[..., Any]] = {
    aten.gru_cell.default: _cell(_gru_step),
    aten.lstm_cell.default: _cell(_lstm_step),
    aten.rnn_tanh_cell.default: _cell(_rnn_step(torch.tanh)),
    aten.rnn_relu_cell.default: _cell(_rnn_step(torch.relu)),
}

# ---------------------------------------------------------------- all steps


def _lstm(gates_BTp: Tensor, w_hh: Tensor, b_hh: Tensor | None, state: State) -> tuple[Tensor, State]:
    h, c, _ = LSTM(*_alike(gates_BTp.dtype, gates_BTp, b_hh, w_hh, *state))
    return h, (h[:, -1], c[:, -1])


def _gru(gates_BTp: Tensor, w_hh: Tensor, b_hh: Tensor | None, state: State) -> tuple[Tensor, State]:
    dtype = torch.promote_types(gates_BTp.dtype, state[0].dtype)  # as without a kernel of its own: on a CPU
    h, _ = GRU(*_alike(dtype, gates_BTp, b_hh, w_hh, *state))
    return h, (h[:, -1],)


def _rnn(relu: bool) -> Whole:
    def whole(gates_BTp: Tensor, w_hh: Tensor, b_hh: Tensor | None, state: State) -> tuple[Tensor, State]:
        h = RNN(*_alike(gates_BTp.dtype, gates_BTp, b_hh, w_hh, *state), relu)
        return h, (h[:, -1],)

    return whole


def _alike(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """In one type: under autocast that of the gates is narrower."""
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors]


def _layers(whole: Whole, step: Step) -> Callable[..., tuple[Tensor, ...]]:
    def layers(
        x: Tensor,
        first: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        """h of the last layer for every step, and the last states of all: [layers * directions, B, H] each."""
        h_BTd = x if batch_first else x.transpose(0, 1)
        count = num_layers * (1 + bidirectional)
        size = len(params) // count
        states = list(zip(*(part.unbind(0) for part in ([first] if isinstance(first, Tensor) else first)), strict=True))
        last: list[State] = []
        for layer in range(num_layers):
            if layer and train and dropout:
                h_BTd = torch.dropout(h_BTd, dropout, True)
            results = []
            for backwards in (False, True)[: 1 + bidirectional]:
                own = params[len(last) * size : (len(last) + 1) * size]
                steps = h_BTd.flip(1) if backwards else h_BTd
                result, state = _one_layer(whole, step, steps, states[len(last)], own, has_biases)
                results.append(result.flip(1) if backwards else result)
                last.append(state)
            h_BTd = torch.cat(results, 2) if bidirectional else results[0]
        out = h_BTd if batch_first else h_BTd.transpose(0, 1)
        return out, *(torch.stack(part) for part in zip(*last, strict=True))

    return layers


def _one_layer(
    whole: Whole, step: Step, x_BTd: Tensor, state: State, params: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, State]:
    w_ih, w_hh, *others = params
    b_ih, b_hh, *others = others if has_biases else (None, None, *others)
    gates_BTp = F.linear(x_BTd, w_ih, b_ih)
    if not others and any(isinstance(size, torch.SymInt) for size in gates_BTp.shape):
        return whole(gates_BTp, w_hh, b_hh, state)
    results = []
    for from_x in gates_BTp.unbind(1):
        h, *rest = step(from_x, F.linear(state[0], w_hh, b_hh), state)
        for projection in others:
            h = F.linear(h, projection)
        state = (h, *rest)
        results.append(h)
    return torch.stack(results, 1), state


LAYERS: dict[OperatorBase, Callable[..., Any]] = {
    aten.lstm.input: _layers(_lstm, _lstm_step),
    aten.gru.input: _layers(_gru, _gru_step),
    aten.rnn_tanh.input: _layers(_rnn(relu=False), _rnn_step(torch.tanh)),
    aten.rnn_relu.input: _layers(_rnn(relu=True), _rnn_step(torch.relu)),
}
