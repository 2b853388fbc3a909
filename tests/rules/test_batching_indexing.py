"""Indexing, scattering and embeddings: along other dimensions, or each sample its own row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from batching_oracle import Lines, assert_refuses_the_marked_lines, assert_samples_apart
from torch import Tensor

B, T, D = 4, 3, 6


def reads(self: Any, x: Tensor, i: Tensor) -> Any:  # x: [B, T, D], i: [B, T] below 3
    rows = torch.arange(x.shape[0])
    columns = torch.tensor([2, 0])
    return (
        x[:, columns],
        x[:, :, columns][:, columns, 1],
        x[rows, i[:, 0]],
        x[rows[:, None], i],
        x.transpose(0, 1)[i[:, 0], rows],
        x[rows],
        x.index_select(0, rows) + x.index_select(1, torch.tensor([0, 1, 2])),
        self.weight[i] + self.weight.index_select(0, i[:, 0])[:, None],
        x.gather(1, i[..., None]).sum(1) + x.gather(0, rows[:, None, None].expand(-1, T, D))[:, 0],
        x.transpose(0, 1).gather(2, i.t()[..., None]),
        F.one_hot(i, 3).float() @ self.weight[:3],
        F.embedding(i, self.weight, padding_idx=0),
        F.embedding_bag(i, self.weight) + F.embedding_bag(i, self.weight, mode="max"),
        torch.searchsorted(torch.arange(3.0), x) + torch.searchsorted(x.sort(-1).values, x),
    )


def writes(self: Any, x: Tensor, i: Tensor) -> Any:
    rows, zeros = torch.arange(x.shape[0]), torch.zeros_like(x)
    masked, put, block = x.clone(), x.clone(), x.clone()
    masked[i == 1] = self.weight[0]
    put[rows, i[:, 0]] = 0.0
    block[:, 1, 2:] = x[:, 0, 2:]
    return (
        masked,
        put,
        block,
        zeros.scatter(2, i[..., None], 1.0),
        zeros.scatter(1, i[..., None], x[..., :1]),
        zeros.scatter_add(1, i[..., None].expand_as(x), x),
        zeros.scatter_reduce(1, i[..., None].expand_as(x), x, "amax"),
        zeros.index_add(1, torch.tensor([1, 0]), x[:, :2]).index_fill(1, torch.tensor([0]), 2.0),
        x.slice_scatter(x[:, :1], 1, 0, 1).select_scatter(x[:, 0], 1, 2),
    )


def _sample() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, T, D), torch.randint(0, 3, (B, T))


def test_reading_keeps_samples_apart() -> None:
    assert_samples_apart(Lines(reads), _sample())


def test_writing_keeps_samples_apart() -> None:
    assert_samples_apart(Lines(writes), _sample())


def test_reading_and_writing_other_samples_is_refused() -> None:
    def forward(self: Any, x: Tensor, i: Tensor) -> Any:
        rows = torch.arange(x.shape[0])
        return (
            x[torch.randperm(x.shape[0])],  # refused: position of a sample
            x[i[:, 0]],  # refused: other samples' rows
            x[:, i[:, 0]],  # refused: other samples' rows
            x.gather(0, i[..., None]),  # refused: other samples' rows
            torch.zeros_like(x).scatter_add(0, i[..., None], x),  # refused: other samples' rows
            self.weight[rows],  # refused: position of a sample
            F.embedding(rows, self.weight),  # refused: position of a sample
            F.one_hot(rows, 5),
            x[x > 0],  # refused: number of elements
            F.embedding(i, self.weight, scale_grad_by_freq=True),  # refused: how often an index occurs
            x.index_select(0, torch.tensor([0, 1])),  # refused: other samples' rows
        )

    assert_refuses_the_marked_lines(forward, *_sample())


def test_an_op_without_a_rule_is_refused_as_such() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return torch.linalg.householder_product(x.mT, x[:, :, 0])  # refused: has no batching rule

    assert_refuses_the_marked_lines(forward, torch.randn(B, T, D))
