"""Raw parameters that meet samples by broadcasting: scales, shifts, tokens, tables, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import EVERY, Apply, check_module, folded_loss
from selection import every
from torch import Tensor, nn

T, D = 3, 4
BOOLS = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])


def class_token(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1)


def relative_position_bias(m: Any, x: Tensor) -> Tensor:
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :] + T - 1
    scores = x @ x.transpose(1, 2)
    return (scores + m.table[distance]).softmax(-1) @ x


def relative_position_bias_of_heads(m: Any, x: Tensor) -> Tensor:
    """As in Swin and BEiT: a table [distances, heads] looked up and permuted."""
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :] + T - 1
    bias = m.table[distance.view(-1)].view(T, T, 2).permute(2, 0, 1).contiguous()
    scores = (x @ x.transpose(1, 2)).unsqueeze(1) + bias.unsqueeze(0)
    return scores.softmax(-1).sum(1) @ x


def scaled_in_folded_rows(m: Any, x: Tensor) -> Tensor:
    return (x.view(-1, D) * m.scale).view(-1, T, D)


def shifted_behind_positions(m: Any, x: Tensor) -> Tensor:
    """Sequence first, folded: rows of [T * B, D]."""
    rows = x.transpose(0, 1).reshape(-1, D) + m.shift
    return rows.tanh().unflatten(0, (T, -1)).transpose(0, 1)


def position_table_sequence_first(m: Any, x: Tensor) -> Tensor:
    return (x.transpose(0, 1) + m.table.unsqueeze(1)).tanh().transpose(0, 1)


SHAPES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "scale": (lambda m, x: x * m.w, {"w": (D,)}),
    "scalar": (lambda m, x: x * m.w, {"w": ()}),
    "scalar of one element": (lambda m, x: x / m.w.exp(), {"w": (1,)}),
    "shift and scale": (lambda m, x: torch.addcmul(m.shift, x, m.scale), {"shift": (D,), "scale": (T, 1)}),
    "subtracted from": (lambda m, x: m.w - 2 * x, {"w": (T, D)}),
    "power": (lambda m, x: x.abs().pow(m.w), {"w": (D,)}),
    "maximum": (lambda m, x: torch.maximum(x, m.w), {"w": (D,)}),
    "lerp": (lambda m, x: torch.lerp(x, m.w, 0.3), {"w": (T, D)}),
    "lerp by a learned weight": (lambda m, x: torch.lerp(x, x.flip(1), m.w), {"w": (D,)}),
    "same parameter twice in one op": (lambda m, x: torch.addcmul(m.w, m.w, x), {"w": (D,)}),
    "clamped at learned bounds": (lambda m, x: torch.clamp(x, m.low, m.low + m.w.abs()), {"low": (D,), "w": (1, 1)}),
    "class token": (class_token, {"token": (1, 1, D)}),
    "class token by repeat": (lambda m, x: torch.cat([m.token.repeat(x.shape[0], 1, 1), x], 1), {"token": (1, 1, D)}),
    "class token by expand_as": (lambda m, x: torch.cat([m.token.expand_as(x), x], 1), {"token": (1, 1, D)}),
    "position table": (lambda m, x: x + m.table[:T], {"table": (T + 2, D)}),
    "position table by embedding": (lambda m, x: x + F.embedding(torch.arange(T), m.table), {"table": (T + 2, D)}),
    "position table by batched embedding": (
        lambda m, x: x + F.embedding(torch.arange(T).unsqueeze(0).expand(x.shape[0], -1), m.table),
        {"table": (T + 2, D)},
    ),
    "position table read twice": (lambda m, x: x * m.table[:T] + m.table[1 : T + 1], {"table": (T + 2, D)}),
    "position table, sequence first": (position_table_sequence_first, {"table": (T, D)}),
    "relative position bias": (relative_position_bias, {"table": (2 * T - 1,)}),
    "relative position bias of heads": (relative_position_bias_of_heads, {"table": (2 * T - 1, 2)}),
    "layer scale": (lambda m, x: x + m.gamma * x.tanh(), {"gamma": (D,)}),
    "layer scale of a linear": (
        lambda m, x: x + m.gamma.unsqueeze(0) * F.linear(x, m.w),
        {"gamma": (D,), "w": (D, D)},
    ),
    "folded rows": (scaled_in_folded_rows, {"scale": (D,)}),
    "folded rows, positions outside": (shifted_behind_positions, {"shift": (D,)}),
    "filled into a mask": (lambda m, x: torch.where(x > 0, x, m.token), {"token": (D,)}),
    "stacked": (lambda m, x: torch.stack([x, m.w.expand(x.shape[0], T, D)], 1), {"w": (T, D)}),
    "one parameter for every row of zeros": (lambda m, x: torch.zeros_like(x) + m.w, {"w": (D,)}),
    "a sum of parameters": (lambda m, x: x * (m.a + m.b) + m.a, {"a": (D,), "b": (1,)}),
    "gelu of a sum": (lambda m, x: F.gelu(x + m.w), {"w": (T, 1)}),
    "snake with a learned frequency": (lambda m, x: x + torch.sin(m.a * x).square() / (m.a + 1e-9), {"a": (T, 1)}),
    "prelu": (lambda m, x: F.prelu(x, m.w), {"w": (1,)}),
    "prelu by channel": (lambda m, x: F.prelu(x, m.w), {"w": (T,)}),
}


@pytest.mark.parametrize("name", every(3, SHAPES))
def test_broadcast_parameter(name: str) -> None:
    function, parameters = SHAPES[name]
    found = check_module(Apply(function, **parameters), torch.randn(3, T, D))
    assert "fallback" not in found.rules.values()


def test_position_table_by_buffer_index() -> None:
    module = Apply(lambda m, x: x + m.table(m.ids[:, :T]), modules={"table": nn.Embedding(T + 2, D)})
    module.register_buffer("ids", torch.arange(T + 2).unsqueeze(0))
    check_module(module, torch.randn(3, T, D))


def test_mask_token_put_where_a_batched_mask_says() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), m.token, x).tanh()

    check_module(Apply(run, token=(D,)), (torch.randn(3, T, D), BOOLS))


def test_mask_token_blended_as_in_beit() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        w = mask.unsqueeze(-1).type_as(m.token)
        return x * (1 - w) + m.token.expand(x.shape[0], T, -1) * w

    check_module(Apply(run, token=(1, 1, D)), (torch.randn(3, T, D), BOOLS))


def test_masked_fill_with_a_parameter() -> None:
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask.unsqueeze(-1), m.value).sin()

    check_module(Apply(run, value=()), (torch.randn(3, T, D), BOOLS))


@pytest.mark.parametrize("op", every(2, [torch.gt, torch.fmod, torch.ne, torch.le, torch.remainder]))
@pytest.mark.parametrize("shape", [(), (1,)])
def test_ops_that_count_numbers_without_dimensions_otherwise(op: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    """What a comparison gives is a truth value, and not the type in which it compares."""
    module = Apply(lambda m, x: x * m.scale * op(x, m.edge), scale=(D,), edge=shape)
    check_module(module, torch.randn(3, T, D), batch_sizes=(3,))


def test_folded_output() -> None:
    check_module(Apply(lambda m, x: x.view(-1, D) * m.w, w=(D,)), torch.randn(3, T, D), loss=folded_loss(T))


def test_attention_with_a_learned_mask() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=m.mask)

    found = check_module(Apply(run, mask=(T, T)), torch.randn(3, 2, T, D))
    assert found.rules == {"scaled_dot_product_attention:attn_mask": "broadcast"}


def test_attention_with_learned_keys() -> None:
    """Keys and values that are parameters, spread over the batch: prefix tuning."""

    def run(m: Any, x: Tensor) -> Tensor:
        keys = torch.cat([m.prefix.expand(x.shape[0], -1, -1, -1), x], 2)
        return F.scaled_dot_product_attention(x, keys, keys)

    check_module(Apply(run, prefix=(1, 2, 2, D)), torch.randn(3, 2, T, D))


def test_attention_with_a_learned_query() -> None:
    """One learned query for every sample, as in attention pooling."""

    def run(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.query.expand(x.shape[0], -1, -1, -1), x, x)

    check_module(Apply(run, query=(1, 2, 1, D)), torch.randn(3, 2, T, D))


MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": torch.mul,
    "sub with a factor": lambda x, w: torch.sub(w, x, alpha=0.5),
    "where": lambda x, w: torch.where(x > 0, x * w, w),
    "where on the parameter": lambda x, w: torch.where(w > 0, w * x, w.exp() * x),
    "minimum": lambda x, w: torch.minimum(x, w) * w,
    "addcmul": lambda x, w: torch.addcmul(x, w, w, value=0.5),
    "addcdiv": lambda x, w: torch.addcdiv(w, x, w.exp(), value=2.0),
    "hypot": torch.hypot,
    "logaddexp": torch.logaddexp,
    "expand_as": lambda x, w: w.expand_as(x) * x,
    "broadcast_tensors": lambda x, w: torch.broadcast_tensors(x, w)[1] * x.sin(),
    "cat": lambda x, w: torch.cat([x, w.expand_as(x)], -1),
    "stack": lambda x, w: torch.stack([w.expand_as(x), x], 1),
}


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data(), way=st.sampled_from(sorted(MEETINGS)), fold=st.sampled_from(("", "inner", "outer", "first")))
def test_any_shape_that_broadcasts(data: st.DataObject, way: str, fold: str) -> None:
    """Fewer dimensions than the sample, any of them of size one; rows folded behind or before the batch."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1 if not fold else 2, max_size=3), label="shape")
    inside = shape[1:] if fold else shape
    kept = inside[data.draw(st.integers(0, len(inside)), label="kept") :]
    own = tuple(data.draw(st.sampled_from((1, size)), label="size") for size in kept)

    def run(m: Any, x: Tensor) -> Tensor:
        if fold == "inner":
            return MEETINGS[way](x.flatten(0, 1), m.w).unflatten(0, (-1, shape[0]))
        if fold == "outer":
            rows = x.transpose(0, 1).reshape(-1, *inside)
            return MEETINGS[way](rows, m.w).unflatten(0, (shape[0], -1)).transpose(0, 1)
        if fold == "first":
            return MEETINGS[way](x.transpose(0, 1), m.w).transpose(0, 1)
        return MEETINGS[way](x, m.w)

    if fold == "first" and way == "stack":
        return
    check_module(Apply(run, w=own), torch.randn(3, *shape), batch_sizes=(3, 0), methods=EVERY)
