"""Views and folds: the batch is followed through every rearrangement, and refused where samples would change places."""

from __future__ import annotations

from typing import Any

import torch
from batching_oracle import Lines, assert_refuses_the_marked_lines, assert_samples_apart, tracked
from torch import Tensor

from dpcompile.ir import Axis, Kind, Value

B, T, D = 4, 3, 6


def moves(self: Any, x: Tensor) -> Any:  # x: [B, T, D]
    y = x.transpose(0, 1)
    return (
        x.permute(2, 0, 1).movedim(1, 0).unsqueeze(0).squeeze(0),
        y[1].unsqueeze(-1).squeeze(),
        y.mT.swapaxes(0, 2).flatten(1),
        torch.stack([x, x + self.weight[:T]], 1).unbind(1)[1],
        y.unbind(0)[0].t(),
        x.select(2, 1),
        x[:, 1:, ::2],
        x.diagonal(dim1=1, dim2=2),
        x.unfold(2, 2, 1),
        x.split([1, 2], 1)[1],
        x.chunk(2, -1)[0],
        torch.view_as_complex(x.unflatten(2, (3, 2))).abs(),
    )


def folds(self: Any, x: Tensor) -> Any:  # x: [B, T, D]
    rows = x.reshape(-1, D)  # inner T
    columns = x.transpose(0, 1).reshape(-1, D)  # outer T
    pairs = x.view(x.shape[0], T, 2, 3).permute(2, 0, 1, 3).reshape(-1, 3)  # 2 x B x T
    twice = torch.cat([columns, columns * 2])
    return (
        rows @ self.weight,
        rows.view(-1, T, D).sum(1),
        columns.relu().view(T, -1, D)[1:],
        pairs.view(2, -1, T * 3)[1],
        pairs.unflatten(0, (2, -1, T)).flatten(1, 2),
        twice[: T * x.shape[0]].reshape(T, -1, D),
        twice.split(columns.shape[0])[1],
        columns.chunk(3)[2],
        rows.repeat(2, 1),
        rows.repeat_interleave(2, 0).view(-1, 2 * T, D),
        x.expand(2, -1, -1, -1).flatten(0, 1),
        x.repeat(1, 2, 1).tile(2, 1, 1),
    )


def copies(self: Any, x: Tensor) -> Any:
    size = x.shape[0]
    table = torch.arange(3.0)
    return (
        self.weight[:1].expand(size, -1) + x[:, 0],
        table.expand(size, 3) + x[:, :, 0],
        table.repeat(size).view(size, 3) + x[:, :, 0],
        table.repeat_interleave(size).view(3, size) + x[:, :, 0].t(),
        torch.broadcast_tensors(x, self.weight[:T])[1] + x,
        x[:, 0].expand(x.shape[1], -1, -1),
    )


def test_moving_dimensions_keeps_samples_apart() -> None:
    assert_samples_apart(Lines(moves), torch.randn(B, T, D))


def test_folding_keeps_samples_apart() -> None:
    assert_samples_apart(Lines(folds), torch.randn(B, T, D))


def test_copies_for_each_sample_keep_samples_apart() -> None:
    assert_samples_apart(Lines(copies), torch.randn(B, T, D))


def test_inputs_with_the_batch_in_another_dimension() -> None:
    assert_samples_apart(Lines(lambda self, x: x.flatten(0, 1) @ self.weight), torch.randn(T, B, D), [1])


def test_folds_are_written_as_outer_and_inner() -> None:
    def both(self: Any, x: Tensor) -> Any:
        return x.reshape(-1, D), x.transpose(0, 1).reshape(-1, D), x.permute(1, 2, 0).reshape(-1)

    program, found = tracked(Lines(both), torch.randn(B, T, D))
    values = [found.values[output.node or ""] for output in program.outputs]
    assert [v.axis for v in values if isinstance(v, Value)] == [Axis(0, 1, T), Axis(0, T, 1), Axis(0, T * D, 1)]


def test_crossings_are_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        size = x.shape[0]
        columns = x.transpose(0, 1).reshape(-1, D)
        return (
            x[0],  # refused: picks one sample
            x[1:],  # refused: by their position
            columns[size // 2 :],  # refused: by their position
            x.reshape(6, size, 3),  # refused: different samples into one row
            torch.cat([x, self.weight[None, :T]]),  # refused: appends rows
            x[:, :1].expand(-1, size, -1),  # refused: no rule tells whose data is where
            x.flip(0),  # refused: order of the samples
            torch.roll(x, 1, 0),  # refused: to the place of another
            x.diagonal(dim1=0, dim2=1),  # refused: diagonal
            x.unfold(0, 2, 1),  # refused: windows along the batch
            x.as_strided((3, 6), (6, 1)),  # refused: strides
        )

    assert_refuses_the_marked_lines(forward, torch.randn(B, T, D))


def test_numbers_of_the_samples_stay_numbers_under_views() -> None:
    def numbers(self: Any, x: Tensor) -> Any:
        return torch.arange(x.shape[0])[:, None, None].expand(-1, 2, 1).permute(1, 0, 2).clone(), x

    program, found = tracked(Lines(numbers), torch.randn(B, T))
    assert found.value(program.node(program.outputs[0].node or "")) == Value(Kind.ROWS, Axis(1))
    assert not found.findings
