"""Every site rule in one model, compiled by inductor: what it makes of the emitted graphs is what they say."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from layers import EVERY_FORM, check_module
from torch import Tensor, nn

from dpcompile import dpcompile
from dpcompile.rules.sites import RULES

T, D, V = 3, 4, 6
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler on a CPU"
)


class Everything(nn.Module):
    """Every rule: plain, with groups and paddings, shared, derived, folded with other dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.derived = nn.utils.parametrizations.weight_norm(nn.Linear(D, 2))
        self.heads = nn.Parameter(torch.randn(2, 2, 3))
        self.low, self.rank = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, D))
        self.table = nn.Embedding(V, D, padding_idx=1)
        self.conv = nn.Conv2d(2, 4, (2, 3), stride=(2, 1), padding=1, groups=2, padding_mode="reflect")
        self.wide = nn.Conv1d(D, 2, 2, dilation=2, padding="same")
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.layer_norm, self.group_norm = nn.LayerNorm(D), nn.GroupNorm(2, 4)
        self.scale, self.place = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(T, D))
        self.prelu, self.bilinear = nn.PReLU(T), nn.Bilinear(D, D, 2)
        self.prototypes = nn.Parameter(torch.randn(2, D))
        self.recurrent = nn.GRU(D, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor, image: Tensor, ids: Tensor) -> Tensor:
        looked_up = self.table(ids) + self.place
        hidden = self.layer_norm(x + looked_up) * self.scale
        folded = self.linear(hidden.reshape(-1, D)).reshape(-1, T, D)
        pictures = self.group_norm(self.conv(image)).tanh()
        found = [
            F.linear(folded.tanh(), self.table.weight),
            self.derived(self.linear(hidden)),
            torch.einsum("bthd,hdp->bthp", hidden.unflatten(-1, (2, 2)), self.heads),
            hidden @ (self.low @ self.rank),
            self.wide(hidden.transpose(1, 2)),
            self.up(pictures),
            self.prelu(hidden),
            self.bilinear(hidden, x),
            torch.cdist(hidden, self.prototypes),
            self.recurrent(hidden)[0],
            self.attention(hidden, x, x, need_weights=False)[0],
        ]
        return torch.cat([part.flatten(1) for part in found], 1)


def sample() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (3, T), generator=generator)
    return torch.randn(3, T, D, generator=generator), torch.randn(3, 2, 4, 4, generator=generator), ids


@pytest.mark.slow
def test_every_rule_is_in_the_model() -> None:
    torch.manual_seed(0)
    found = check_module(Everything(), sample(), batch_sizes=(3,), methods=("ghost",))
    assert set(found.rules.values()) == {rule.name for rule in RULES}


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("method", EVERY_FORM)
def test_every_rule_under_inductor(method: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    check_module(Everything(), sample(), batch_sizes=(3,), methods=(method,), backend="inductor")


class OfOneChannel(nn.Module):
    """A bias of one number, used twice, beside other small gradients: with one sample all their sizes are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm((2, 4), eps=0.1)
        self.up = nn.ConvTranspose2d(1, 2, (2, 1), (1, 2), (1, 1), (1, 0), bias=False, dilation=(2, 2))
        self.twice = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up(self.norm(image)), self.twice(self.twice(x).tanh())


@pytest.mark.slow
@NEEDS_COMPILER
def test_no_gradient_takes_the_memory_of_another() -> None:
    """Inductor lets the inputs of a concatenation share memory with its result (dpcompile/joined.py)."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = OfOneChannel()
    dp_model = dpcompile(module, (torch.randn(3, 1, 2, 4), torch.randn(3, 1, 3)), clip_groups=("[nu]*", "twice.*"))
    compiled = torch.compile(dp_model, fullgraph=True)
    for batch_size in (3, 1):
        inputs = torch.randn(batch_size, 1, 2, 4), torch.randn(batch_size, 1, 3)
        found = []
        for run in (dp_model, compiled):
            module.zero_grad()
            sum(out.square().flatten(1).sum(1).mean() for out in run(*inputs)).backward()
            found.append([p.grad.clone() for p in module.parameters()])
        torch.testing.assert_close(*found)
