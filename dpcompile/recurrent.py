"""Recurrences as ops of our own: one for each layer and direction, whose loop over the steps no graph sees.

With the inputs of all gates computed beforehand, gates = x W_ih^T + b_ih, step t of a layer adds h[t-1] W_hh^T + b_hh:

    lstm   i, f, g, o     c[t] = f c[t-1] + i g,  h[t] = o tanh(c[t])
    gru    r, z, n        n = tanh(gates_n + r (h[t-1] W_n^T + b_n)),  h[t] = (1 - z) n + z h[t-1]
    rnn    one            h[t] = tanh or relu

The backward gives the gradient of what step t adds, for every t: all that per-sample gradients of W_hh and b_hh need.
The ops hold W_hh itself constant. Their bias is b_hh, or b_hh for each sample and step, whose gradient can be read.

H is the width of a state, p that of all gates together. What a backward reads of the activations is computed for all
steps at once, into the tensor that its result is in; the loop multiplies it by what flows back. Samples come first in
memory, as they do in all that reads the results; a step is a slice with its features side by side.

On a CPU the loop is that of recurrent.cpp, where there is g++ and every thread has some samples: each goes through all
steps of its own, without waiting for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpcompile import native
from dpcompile.shapes import hint

Carried = Callable[[int, Tensor, Tensor], Any]


def _with_bias(gates_BTp: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return out.copy_(gates_BTp) if bias is None else torch.add(gates_BTp, bias, out=out)


BLOCK = 8
"""Samples that a thread goes through the steps with, at most twice as many."""


def goes_by_kernel(tensor_BT: Tensor) -> bool:
    """Whether the loop over such gates, or gradients of states, is that of recurrent.cpp."""
    if tensor_BT.device.type != "cpu" or tensor_BT.dtype not in (torch.float32, torch.float64):
        return False
    return 2 * -(-hint(tensor_BT.shape[0]) // BLOCK) >= torch.get_num_threads() and native.library() is not None


def _beside(tensor: Tensor) -> Tensor:
    """The same with its features side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _part(tensor: Tensor, width: int, first: int, last: int) -> Tensor:
    """Some of the gates, by number."""
    return tensor[..., first * width : last * width]


def _slope(gate: Tensor, out: Tensor) -> Tensor:
    """s (1 - s): the derivative of a sigmoid. (addcmul would be several times slower.)"""
    torch.mul(gate, gate, out=out)
    return torch.sub(gate, out, out=out)


def _carrier(grad_BTp: Tensor, weight_pH: Tensor) -> Carried:
    """A function of (t, added, out) that writes added + grad[:, t] @ weight.

    A CPU's kernels for matrices split a long sum among threads, which then wait for each other; those for batches of
    matrices, here one for each gate, give every thread some of them.
    """
    blocks = weight_pH.shape[0] // weight_pH.shape[1]
    wide = grad_BTp.dtype in (torch.float32, torch.float64)  # narrow parts would be rounded before they are added
    if blocks == 1 or not wide or grad_BTp.device.type != "cpu":
        steps = grad_BTp.unbind(1)
        return lambda t, added, out: torch.addmm(added, steps[t], weight_pH, out=out)
    by_gate = grad_BTp.unflatten(2, (blocks, -1)).permute(1, 2, 0, 3).unbind(0)
    weights = weight_pH.unflatten(0, (blocks, -1))
    products = weight_pH.new_empty(blocks, grad_BTp.shape[0], weight_pH.shape[1])
    first, *others = products.unbind(0)

    def carried(t: int, added: Tensor, out: Tensor) -> None:
        torch.bmm(by_gate[t], weights, out=products)
        torch.add(added, first, out=out)
        for product in others:
            out.add_(product)

    return carried


def previous(h0_BH: Tensor, h_BTH: Tensor) -> Tensor:
    """[B, T, H]: the state that each step begins with."""
    return torch.cat([h0_BH.unsqueeze(1), h_BTH[:, :-1]], 1)


# ---------------------------------------------------------------- lstm


@torch.library.custom_op("dpcompile::lstm", mutates_args=())
def _lstm(gates: Tensor, bias: Tensor | None, weight: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h and c after every step, [B, T, H], and i, f, o, g in this order, [B, T, 4 H]: three go through one sigmoid."""
    width = weight.shape[1]
    acts = gates.new_empty(gates.shape)
    h_BTH, c_BTH = (gates.new_empty([*gates.shape[:2], width]) for _ in range(2))
    if goes_by_kernel(gates):
        own_bias = None if bias is None else _beside(bias)
        steps = [_beside(gates), own_bias, acts, h_BTH, c_BTH]
        native.recurrence("lstm", weight.contiguous(), [h0.contiguous(), c0.contiguous()], steps)
        return h_BTH, c_BTH, acts
    for to, gate in (((0, 2), (0, 2)), ((2, 3), (3, 4)), ((3, 4), (2, 3))):
        own_bias = None if bias is None else _part(bias, width, *gate)
        _with_bias(_part(gates, width, *gate), own_bias, _part(acts, width, *to))
    weight_Hp = torch.cat([_part(weight.t(), width, *gate) for gate in ((0, 2), (3, 4), (2, 3))], 1)
    enter, forget, leave, new = (_part(acts, width, i, i + 1).unbind(1) for i in range(4))
    gated = _part(acts, width, 0, 3).unbind(1)
    h, c = h0, c0
    for t, (here, h_next, c_next) in enumerate(zip(acts.unbind(1), h_BTH.unbind(1), c_BTH.unbind(1), strict=True)):
        here.addmm_(h, weight_Hp)
        gated[t].sigmoid_()
        new[t].tanh_()
        torch.mul(forget[t], c, out=c_next).addcmul_(enter[t], new[t])
        torch.tanh(c_next, out=h_next).mul_(leave[t])
        h, c = h_next, c_next
    return h_BTH, c_BTH, acts


@_lstm.register_fake
def _(gates: Tensor, bias: Tensor | None, weight: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = [*gates.shape[:2], weight.shape[1]]
    return gates.new_empty(state), gates.new_empty(state), gates.new_empty(gates.shape)


@torch.library.custom_op("dpcompile::lstm_backward", mutates_args=())
def _lstm_backward(
    grad_h: Tensor, grad_c: Tensor | None, c0: Tensor, c: Tensor, acts: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, h0 and c0."""
    width = weight.shape[1]
    grad = acts.new_empty(acts.shape)
    flow_h = torch.empty_like(c0, memory_format=torch.contiguous_format)
    if goes_by_kernel(grad):
        flow_c = torch.zeros_like(flow_h)
        steps = [_beside(grad_h), None if grad_c is None else _beside(grad_c), c, acts, grad]
        native.recurrence("lstm_backward", weight.contiguous(), [c0.contiguous()], steps, [flow_h, flow_c])
        return grad, flow_h, flow_c
    i, f, o, g = acts.chunk(4, -1)
    of_i, of_f, of_g, of_o = grad.chunk(4, -1)
    _slope(i, of_i).mul_(g)
    _slope(f, of_f)
    of_f[:, :1].mul_(c0.unsqueeze(1))
    of_f[:, 1:].mul_(c[:, :-1])
    torch.mul(g, g, out=of_g).neg_().add_(1).mul_(i)
    narrowed = c.tanh()
    _slope(o, of_o).mul_(narrowed)
    to_c = narrowed.square_().neg_().add_(1).mul_(o).unbind(1)
    del narrowed
    carried, forget, leave = _carrier(grad, weight), f.unbind(1), of_o.unbind(1)
    others = _part(grad, width, 0, 3).unflatten(2, (3, width)).unbind(1)
    grads_h, grads_c = grad_h.unbind(1), None if grad_c is None else grad_c.unbind(1)
    flow_B1H = torch.zeros_like(flow_h).unsqueeze(1)
    flow_c, last = flow_B1H.select(1, 0), len(to_c) - 1
    for t in range(last, -1, -1):
        if t < last:
            carried(t + 1, grads_h[t], flow_h)
        else:
            flow_h.copy_(grads_h[t])
        if grads_c is not None:
            flow_c.add_(grads_c[t])
        leave[t].mul_(flow_h)
        flow_c.addcmul_(flow_h, to_c[t])
        others[t].mul_(flow_B1H)
        flow_c.mul_(forget[t])
    carried(0, torch.zeros_like(flow_h), flow_h)
    return grad, flow_h, flow_c.clone()


@_lstm_backward.register_fake
def _(
    grad_h: Tensor, grad_c: Tensor | None, c0: Tensor, c: Tensor, acts: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return acts.new_empty(acts.shape), c0.new_empty(c0.shape), c0.new_empty(c0.shape)


# ---------------------------------------------------------------- gru


@torch.library.custom_op("dpcompile::gru", mutates_args=())
def _gru(gates: Tensor, bias: Tensor | None, weight: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """h after every step, [B, T, H], and [B, T, 4 H]: r, z, what the state adds to n, and n."""
    width = weight.shape[1]
    acts = gates.new_empty([*gates.shape[:2], 4 * width])
    h_BTH = gates.new_empty([*gates.shape[:2], width])
    both, hidden = _part(acts, width, 0, 2), _part(acts, width, 2, 3)
    _with_bias(_part(gates, width, 0, 2), None if bias is None else _part(bias, width, 0, 2), both)
    hidden.zero_() if bias is None else hidden.copy_(_part(bias, width, 2, 3))
    entered_BTH = _part(gates, width, 2, 3)
    if goes_by_kernel(gates):
        native.recurrence("gru", weight.contiguous(), [h0.contiguous()], [_beside(entered_BTH), acts, h_BTH])
        return h_BTH, acts
    weight_Hp = weight.t().contiguous()
    steps, both = _part(acts, width, 0, 3).unbind(1), both.unbind(1)
    reset, update, hidden, new = (_part(acts, width, i, i + 1).unbind(1) for i in range(4))
    h = h0
    for t, (entered, h_next) in enumerate(zip(entered_BTH.unbind(1), h_BTH.unbind(1), strict=True)):
        steps[t].addmm_(h, weight_Hp)
        both[t].sigmoid_()
        torch.addcmul(entered, reset[t], hidden[t], out=new[t]).tanh_()
        h = torch.lerp(new[t], h, update[t], out=h_next)
    return h_BTH, acts


@_gru.register_fake
def _(gates: Tensor, bias: Tensor | None, weight: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    batch, steps, width = *gates.shape[:2], weight.shape[1]
    return gates.new_empty([batch, steps, width]), gates.new_empty([batch, steps, 4 * width])


@torch.library.custom_op("dpcompile::gru_backward", mutates_args=())
def _gru_backward(grad_h: Tensor, h0: Tensor, h: Tensor, acts: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, of what the state adds to them, and of h0."""
    width = weight.shape[1]
    r, z, hidden, n = acts.chunk(4, -1)
    grad_gates, grad_hidden = (acts.new_empty([*acts.shape[:2], 3 * width]) for _ in range(2))
    of_r, of_z, of_hidden = grad_hidden.chunk(3, -1)
    of_n = _part(grad_gates, width, 2, 3)
    torch.mul(n, n, out=of_n).neg_().add_(1)
    of_n.mul_(torch.rsub(z, 1))
    torch.mul(of_n, r, out=of_hidden)
    torch.mul(of_n, hidden, out=of_r).mul_(_slope(r, of_z))
    _slope(z, of_z)
    of_z[:, :1].mul_(h0.unsqueeze(1) - n[:, :1])
    of_z[:, 1:].mul_(h[:, :-1] - n[:, 1:])
    flow_BTH = torch.empty_like(h)
    grad_h0 = torch.empty_like(h0, memory_format=torch.contiguous_format)
    if goes_by_kernel(h):
        steps = [_beside(grad_h), z, grad_hidden, flow_BTH]
        native.recurrence("gru_backward", weight.contiguous(), [], steps, [grad_h0])
    else:
        _gru_steps_back(grad_h, z, grad_hidden, weight, flow_BTH, grad_h0)
    _part(grad_gates, width, 0, 2).copy_(_part(grad_hidden, width, 0, 2))
    of_n.mul_(flow_BTH)
    return grad_gates, grad_hidden, grad_h0


def _gru_steps_back(
    grad_h: Tensor, z: Tensor, grad_hidden: Tensor, weight: Tensor, flow_BTH: Tensor, grad_h0: Tensor
) -> None:
    carried, update, grads_h = _carrier(grad_hidden, weight), z.unbind(1), grad_h.unbind(1)
    flow, flow_1 = flow_BTH.unbind(1), flow_BTH.unsqueeze(2).unbind(1)
    steps, last = grad_hidden.unflatten(2, (3, weight.shape[1])).unbind(1), len(update) - 1
    for t in range(last, -1, -1):
        if t < last:
            carried(t + 1, grads_h[t], flow[t])
            flow[t].addcmul_(flow[t + 1], update[t + 1])
        else:
            flow[t].copy_(grads_h[t])
        steps[t].mul_(flow_1[t])
    carried(0, flow[0] * update[0], grad_h0)


@_gru_backward.register_fake
def _(grad_h: Tensor, h0: Tensor, h: Tensor, acts: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates = [*acts.shape[:2], weight.shape[0]]
    return acts.new_empty(gates), acts.new_empty(gates), h0.new_empty(h0.shape)


# ---------------------------------------------------------------- rnn


@torch.library.custom_op("dpcompile::rnn", mutates_args=())
def _rnn(gates: Tensor, bias: Tensor | None, weight: Tensor, h0: Tensor, relu: bool) -> Tensor:
    """h after every step, [B, T, H]."""
    h_BTH = _with_bias(gates, bias, gates.new_empty(gates.shape))
    if goes_by_kernel(gates):
        native.recurrence("rnn", weight.contiguous(), [h0.contiguous()], [h_BTH], relu=relu)
        return h_BTH
    weight_Hp = weight.t().contiguous()
    h = h0
    for h_next in h_BTH.unbind(1):
        h_next.addmm_(h, weight_Hp)
        h = h_next.relu_() if relu else h_next.tanh_()
    return h_BTH


@_rnn.register_fake
def _(gates: Tensor, *_: Any) -> Tensor:
    return gates.new_empty(gates.shape)


@torch.library.custom_op("dpcompile::rnn_backward", mutates_args=())
def _rnn_backward(grad_h: Tensor, h: Tensor, weight: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of gates and h0."""
    grad = h.new_empty(h.shape)
    if relu:
        torch.gt(h, 0, out=grad)
    else:
        torch.mul(h, h, out=grad).neg_().add_(1)
    flow = h.new_empty(h.shape[0], h.shape[2])
    if goes_by_kernel(h):
        native.recurrence("rnn_backward", weight.contiguous(), [], [_beside(grad_h), grad], [flow])
        return grad, flow
    carried, steps, grads_h = _carrier(grad, weight), grad.unbind(1), grad_h.unbind(1)
    last = len(steps) - 1
    for t in range(last, -1, -1):
        if t < last:
            carried(t + 1, grads_h[t], flow)
        else:
            flow.copy_(grads_h[t])
        steps[t].mul_(flow)
    carried(0, torch.zeros_like(flow), flow)
    return grad, flow


@_rnn_backward.register_fake
def _(grad_h: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty([h.shape[0], h.shape[2]])


# ---------------------------------------------------------------- gradients of the ops

CONSTANT = (
    "dpcompile: the ops of recurrent layers form no gradient of a weight, nor of a bias that all samples and "
    "steps share. Detach them (dpcompile.rules.sites.recurrence reads what both need off the bias of each step)."
)


def _held_constant(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Say that outputs without a gradient have none, and remember what no gradient can be asked for."""
    ctx.set_materialize_grads(False)
    _, bias, *_ = inputs
    _, of_bias, of_weight, *_ = ctx.needs_input_grad
    ctx.refused = of_weight or (of_bias and bias.dim() == 1)


def _check(ctx: Any) -> None:
    if ctx.refused:
        raise RuntimeError(CONSTANT)


def _asked(ctx: Any, grad_BTp: Tensor) -> Tensor | None:
    """The gradient of the bias, where there is one that needs it."""
    return grad_BTp if ctx.needs_input_grad[1] else None


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _held_constant(ctx, inputs)
    _, _, weight, _, c0 = inputs
    _, c, acts = output
    ctx.save_for_backward(c0, c, acts, weight)


def _lstm_grads(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, _: Tensor | None) -> Any:
    _check(ctx)
    saved = ctx.saved_tensors
    c = saved[1]
    grad_h = torch.zeros_like(c) if grad_h is None else grad_h
    grad, grad_h0, grad_c0 = LSTM_BACKWARD(grad_h, grad_c, *saved)
    return grad, _asked(ctx, grad), None, grad_h0, grad_c0


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _held_constant(ctx, inputs)
    _, _, weight, h0 = inputs
    ctx.save_for_backward(h0, *output, weight)


def _gru_grads(ctx: Any, grad_h: Tensor, _: Tensor | None) -> Any:
    _check(ctx)
    grad_gates, grad_hidden, grad_h0 = GRU_BACKWARD(grad_h, *ctx.saved_tensors)
    return grad_gates, _asked(ctx, grad_hidden), None, grad_h0


def _rnn_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _held_constant(ctx, inputs)
    _, _, weight, _, ctx.relu = inputs
    ctx.save_for_backward(output, weight)


def _rnn_grads(ctx: Any, grad_h: Tensor) -> Any:
    _check(ctx)
    grad, grad_h0 = RNN_BACKWARD(grad_h, *ctx.saved_tensors, ctx.relu)
    return grad, _asked(ctx, grad), None, grad_h0, None


_lstm.register_autograd(_lstm_grads, setup_context=_lstm_setup)
_gru.register_autograd(_gru_grads, setup_context=_gru_setup)
_rnn.register_autograd(_rnn_grads, setup_context=_rnn_setup)

_own = torch.ops.dpcompile
LSTM, GRU, RNN = _own.lstm.default, _own.gru.default, _own.rnn.default
LSTM_BACKWARD, GRU_BACKWARD, RNN_BACKWARD = (
    _own.lstm_backward.default,
    _own.gru_backward.default,
    _own.rnn_backward.default,
)
OPS = (LSTM, GRU, RNN)
