"""Pointwise ops and reductions: aligned by broadcasting, along dimensions other than the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from batching_oracle import Lines, assert_refuses_the_marked_lines, assert_samples_apart
from torch import Tensor

B, T, D = 4, 3, 6


def elementwise(self: Any, x: Tensor, m: Tensor) -> Any:  # x: [B, T, D], m: [B, T] bool
    return (
        x + self.weight[:T],
        x.transpose(0, 1) * m.t()[..., None],
        torch.where(m[..., None], x, self.weight[0]),
        x.masked_fill(m[:, :, None], -1.0),
        (m & ~m) | (m ^ m),
        x.clamp(0, 1).lerp(x, 0.3).addcmul(x, x),
        torch.maximum(x, x.floor_divide(2.0)).to(torch.float64).type_as(x),
        F.gelu(x) + F.silu(x) + F.softplus(x) + F.logsigmoid(x) + F.hardswish(x) + F.prelu(x, self.weight[0, :T]),
        torch.max(x, x.neg()),
        torch.bucketize(x, torch.arange(3.0)) + torch.isin(x.long(), torch.arange(2)),
        x.detach().clone().contiguous().real,
        F.glu(x, -1),
        torch.zeros_like(x).copy_(x[:, :1]) + 1,
    )


def noise(self: Any, x: Tensor) -> Any:
    return F.dropout(x, 0.5), F.dropout1d(x, 0.5), F.gumbel_softmax(x, hard=True), x + torch.randn_like(x), F.rrelu(x)


def reduced(self: Any, x: Tensor) -> Any:
    return (
        x.sum(1),
        x.mean((1, 2), keepdim=True),
        x.transpose(0, 1).sum(0),
        x.std(-1) + x.var(2, correction=0) + torch.var_mean(x, 1)[0].sum(1, keepdim=True),
        x.amax((1, 2)),
        x.max(1).indices + x.min(1).indices,
        x.argmax(-1) + x.argsort(1)[..., 0] + x.topk(2, -1).indices[..., 0],
        x.norm(dim=1) + torch.linalg.vector_norm(x, dim=1) + x.logsumexp(1) + x.prod(1),
        (x > 0).any(1) & (x > 0).all(2)[:, :1],
        x.softmax(-1) + x.log_softmax(1) + x.cumsum(1) + x.cumprod(2) + x.logcumsumexp(1),
        x.sort(1).values + x.flip(1, 2).roll(1, 2) + x.tril() + x.triu(),
        x.median(1).values + x.kthvalue(1, dim=1).values + x.mode(1).values,
        x.diff(dim=1, prepend=x[:, :1]),
        x.rot90(1, (1, 2)),
        torch.fft.rfft(x, dim=-1).abs(),
    )


def test_elementwise_ops_keep_samples_apart() -> None:
    assert_samples_apart(Lines(elementwise), (torch.randn(B, T, D), torch.rand(B, T) > 0.5))


def test_random_ops_keep_samples_apart() -> None:
    assert_samples_apart(Lines(noise), torch.randn(B, T, D), position_free=False)


def test_reductions_over_other_dimensions_keep_samples_apart() -> None:
    assert_samples_apart(Lines(reduced), torch.randn(B, T, D))


def test_meetings_of_samples_are_refused() -> None:
    def forward(self: Any, x: Tensor, m: Tensor) -> Any:
        size = x.shape[0]
        columns = x.transpose(0, 1).reshape(-1, D)
        return (
            x - x.mean(0),  # refused: not linear in a sum over the samples
            x[:, 0, :, None] * x[:, 0].t(),  # refused: combines every sample with every other
            columns + x.reshape(-1, D),  # refused: different orders
            torch.isin(x, x[:, 0, 0]) * x,  # refused: differs between samples
            x * torch.arange(size)[:, None, None],  # refused: position of a sample
            x / size,  # refused: number of samples
            x.softmax(0),  # refused: over the samples
            x.cumsum(0),  # refused: over the samples
            x.sort(0).values,  # refused: over the samples
            x / x.amax(),  # refused: over the samples
            x.std(0),  # refused: over the samples
            x[:, 0].tril(),  # refused: dimension of a matrix
            x * x.sum().item(),  # refused: not linear in a sum
            x[m],  # refused: number of elements
        )

    assert_refuses_the_marked_lines(forward, torch.randn(B, T, D), torch.rand(B, T) > 0.5)
