"""Losses: per sample, or their sum or mean over samples, and nothing that divides by other samples' targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batching_oracle import Lines, assert_samples_apart, tracked
from selection import every
from torch import Tensor

from dpcompile.ir import Axis, Kind, Value

B, T, D = 4, 3, 6
Loss = Callable[[Any, Tensor, Tensor], Tensor]


def per_sample(self: Any, x: Tensor, i: Tensor) -> Any:  # x: [B, T, D], i: [B, T] below 6
    y = x @ self.weight
    return (
        F.cross_entropy(y.mT, i, reduction="none"),
        F.cross_entropy(y.mT, i, reduction="none", ignore_index=0).mean(1),
        F.cross_entropy(y[:, 0], i[:, 0], reduction="none", label_smoothing=0.1),
        F.cross_entropy(y[:, 0], y[:, 1].softmax(-1), reduction="none"),
        F.mse_loss(y, x, reduction="none") + F.l1_loss(y, x, reduction="none") + F.huber_loss(y, x, reduction="none"),
        F.binary_cross_entropy_with_logits(y, x.sigmoid(), pos_weight=torch.arange(6.0), reduction="none"),
        F.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="none").sum((1, 2)),
        F.triplet_margin_loss(y[:, 0], y[:, 1], y[:, 2], reduction="none"),
    )


def target(i: Tensor) -> Tensor:
    return i[:, 0]


SUM, MEAN, EACH = Value(Kind.REDUCED), Value(Kind.REDUCED, mean=True), Value(Kind.BATCHED, Axis(0))
ACCEPTED: dict[str, tuple[Value, Loss]] = {
    "per-sample": (EACH, lambda s, y, i: F.cross_entropy(y.mT, i, reduction="none").mean(1)),
    "mean of one target": (MEAN, lambda s, y, i: F.cross_entropy(y[:, 0], target(i))),
    "sum of tokens": (SUM, lambda s, y, i: F.cross_entropy(y.mT, i, reduction="sum")),
    "log-likelihood": (SUM, lambda s, y, i: F.nll_loss(y[:, 0].log_softmax(-1), target(i), reduction="sum")),
    "mean of probabilities": (MEAN, lambda s, y, i: F.cross_entropy(y[:, 0], y[:, 1].softmax(-1))),
    "mean of squares": (MEAN, lambda s, y, i: F.mse_loss(y, torch.zeros_like(y))),
    "means twice": (MEAN, lambda s, y, i: y.square().mean((0, 1)).mean()),
    "two terms": (MEAN, lambda s, y, i: F.cross_entropy(y[:, 0], target(i)) + 0.1 * y.square().mean()),
    "scaled sum": (SUM, lambda s, y, i: 2 * y.square().sum() - y.sum() / 3),
    "sum by B": (MEAN, lambda s, y, i: y.square().sum() / y.shape[0]),
    "sum by elements": (MEAN, lambda s, y, i: y.square().sum() / y.numel()),
    "batchmean": (MEAN, lambda s, y, i: F.kl_div(y, y.softmax(-1), reduction="batchmean")),
}
REFUSED: dict[str, tuple[str, Loss]] = {
    "mean of tokens": ("number of valid targets", lambda s, y, i: F.cross_entropy(y.mT, i)),
    "mean of folded tokens": ("number of valid targets", lambda s, y, i: F.cross_entropy(y.flatten(0, 1), i.flatten())),
    "class weights": ("class weights", lambda s, y, i: F.cross_entropy(y[:, 0], target(i), weight=torch.arange(6.0))),
    "ignored class": ("not ignore_index", lambda s, y, i: F.cross_entropy(y[:, 0], target(i), ignore_index=0)),
    "masked mean": ("not linear", lambda s, y, i: (y[..., 0] * i).sum() / i.sum()),
    "square of a mean": ("not linear", lambda s, y, i: y.mean().square()),
    "mean by B": ("number of samples", lambda s, y, i: y.mean() / y.shape[0]),
    "sum and mean": ("not linear", lambda s, y, i: y.sum() + y.mean()),
    "penalty by B": (
        "divides a penalty",
        lambda s, y, i: (y.square().sum() + s.weight.square().sum()) / y.shape[0],
    ),
    "penalty times it": ("not linear", lambda s, y, i: y.mean() * s.weight.square().sum()),
    "tokens": ("loss of shape", lambda s, y, i: F.cross_entropy(y.mT, i, reduction="none")),
    "one row": ("for one row", lambda s, y, i: F.triplet_margin_loss(y[:, 0, 0], y[:, 0, 1], y[:, 0, 2])),
    "largest": ("over the samples", lambda s, y, i: y.amax()),
}


def contrastive(s: Any, y: Tensor, i: Tensor) -> Tensor:
    logits = F.normalize(y[:, 0], dim=-1) @ F.normalize(y[:, 1], dim=-1).T
    return F.cross_entropy(logits, torch.arange(y.shape[0]))


def negatives_by_roll(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return F.triplet_margin_loss(y[:, 0], y[:, 1], y[:, 0].roll(1, 0))


def spread(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return torch.cdist(y[:, 0], y[:, 0]).mean()


def load_balance(s: Any, y: Tensor, i: Tensor) -> Tensor:
    gates = y.softmax(-1)
    load = F.one_hot(gates.argmax(-1), D).float().mean((0, 1))
    return y.square().mean() + (load * gates.mean((0, 1))).sum()


def counted_load(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return y.square().mean() + torch.bincount(y.argmax(-1).flatten(), minlength=D).float().var()


def entropy_of_the_mean(s: Any, y: Tensor, i: Tensor) -> Tensor:
    mean = y.softmax(-1).mean((0, 1))
    return (mean * mean.log()).sum()


def variance(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return y.square().mean() - y[:, 0].var(0).mean()


def tokens(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, 1), i.flatten(), ignore_index=0)


def sum_by_count(s: Any, y: Tensor, i: Tensor) -> Tensor:
    losses = F.cross_entropy(y.mT, i, reduction="none")
    return (losses * (i != 0)).sum() / (i != 0).sum()


def dice(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return 1 - 2 * (y[..., 0].sigmoid() * i).sum() / (y[..., 0].sigmoid().sum() + i.sum())


def hardest(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(y[:, 0], target(i), reduction="none").topk(2).values.mean()


def root(s: Any, y: Tensor, i: Tensor) -> Tensor:
    return y.square().mean().sqrt()


# loss -> op, the words of its line, and of the cure
COUPLED: list[tuple[Loss, str, str, str]] = [
    (contrastive, "matmul", "logits =", "a loss over pairs of samples has no per-sample gradient"),
    (negatives_by_roll, "roll", "y[:, 0].roll(1, 0)", "for each sample by itself"),
    (spread, "cdist", "torch.cdist", "a loss over pairs of samples"),
    (load_balance, "mul", "load * gates", "within each sample"),
    (counted_load, "bincount", "torch.bincount", "within each sample"),
    (entropy_of_the_mean, "log", "mean.log()", "per-sample losses"),
    (variance, "var", ".var(0)", "for each sample by itself"),
    (tokens, "cross_entropy_loss", "ignore_index=0", "normalise per sample"),
    (sum_by_count, "div", "(i != 0).sum()", "normalise per sample"),
    (dice, "div", "1 - 2", "normalise per sample"),
    (hardest, "topk", ".topk(2)", "for each sample by itself"),
    (root, "sqrt", ".sqrt()", "per-sample losses"),
]
PROVEN: list[Loss] = [
    lambda s, y, i: ((F.cross_entropy(y.mT, i, reduction="none") * (i != 0)).sum(1) / (i != 0).sum(1)).mean(),
    lambda s, y, i: F.cross_entropy(y.flatten(0, 1), i.flatten(), ignore_index=0, reduction="sum") / i.numel(),
    lambda s, y, i: y.square().mean() + 1e-3 * y.logsumexp(-1).square().mean(),
    lambda s, y, i: (torch.einsum("bd,bkd->bk", y[:, 0], y[:, 1:]).logsumexp(1)).mean(),
    lambda s, y, i: F.multi_margin_loss(y[:, 0], target(i)) + F.multilabel_soft_margin_loss(y[:, 0], y[:, 1].sigmoid()),
]


def _sample() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, D), torch.randint(0, 6, (B, T))


def test_losses_without_reduction_keep_samples_apart() -> None:
    assert_samples_apart(Lines(per_sample), _sample())


@pytest.mark.parametrize("name", every(2, ACCEPTED))
def test_loss_is_accepted(name: str) -> None:
    expected, loss = ACCEPTED[name]
    program, found = tracked(Lines(lambda s, x, i: loss(s, x @ s.weight, i)), _sample(), loss=True)
    assert not found.findings
    value = found.value(program.node(program.outputs[0].node or ""))
    assert (value.kind, value.axis, value.mean, value.trains) == (expected.kind, expected.axis, expected.mean, True)


@pytest.mark.parametrize("name", every(2, REFUSED))
def test_loss_is_refused(name: str) -> None:
    expected, loss = REFUSED[name]
    _, found = tracked(Lines(lambda s, x, i: loss(s, x @ s.weight, i)), _sample(), loss=True)
    assert [expected in str(finding) for finding in found.findings] == [True]


@pytest.mark.parametrize("case", COUPLED, ids=lambda case: case[0].__name__)
def test_a_loss_that_couples_samples_is_refused_by_op_line_and_cure(case: tuple[Loss, str, str, str]) -> None:
    loss, op, line, cure = case
    _, found = tracked(Lines(lambda s, x, i: loss(s, x @ s.weight, i)), _sample(), loss=True)
    assert [f.op for f in found.findings] == [op]
    assert line in found.findings[0].line
    assert cure in found.findings[0].cure.lower()
    assert found.findings[0].mixes


@pytest.mark.parametrize("loss", PROVEN)
def test_what_the_cures_ask_for_is_accepted(loss: Loss) -> None:
    _, found = tracked(Lines(lambda s, x, i: loss(s, x @ s.weight, i)), _sample(), loss=True)
    assert not found.findings
