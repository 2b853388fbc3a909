"""A forward that chooses its way by data is refused with the line, and the setting that leaves nothing to choose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dpcompile import dpcompile
from dpcompile.errors import CaptureError


class Dropping(nn.Module):
    """Leaves its layer out at random."""

    def __init__(self, **config: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config, layers=3)
        self.layer, self.layerdrop, self.depth = nn.Linear(4, 4), 0.25, 3

    def forward(self, x: Tensor) -> Tensor:
        chance = torch.rand([])
        skip = self.training and chance * self.depth < self.layerdrop
        if not skip:
            x = self.layer(x)
        return x


class Passing(Dropping):
    """Hands the setting to a helper by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.kept(x, rate=self.config.rate)] @ self.layer.weight[:2]

    def kept(self, x: Tensor, rate: float) -> int:
        return int(rate * x.sum() + 2)


class Branching(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Converting(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer.to(x.dtype)(x)


def refusal(model: nn.Module) -> str:
    with pytest.raises(CaptureError) as caught:
        dpcompile(model, torch.randn(2, 4))
    return str(caught.value)


def test_the_field_of_the_config_that_holds_the_setting_is_named() -> None:
    assert "Set config.encoder_layerdrop=0 (it is 0.25) if" in refusal(Dropping(encoder_layerdrop=0.25, other=0.25))
    assert "Set config.layerdrop=0 (it is 0.25) if" in refusal(Dropping(layerdrop=0.25))


def test_a_setting_of_the_module_alone_is_named_after_it() -> None:
    said = refusal(Dropping(layerdrop=0.5))  # another value: that field is not the one
    assert "chooses its way by the data" in said
    assert "if not skip:" in said
    assert "Set self.layerdrop=0 (it is 0.25) if" in said
    assert "self.depth" not in said  # a count cannot be switched off


def test_a_setting_that_a_caller_hands_over_is_found() -> None:
    said = refusal(Passing(rate=0.5))
    assert "return int(rate * x.sum() + 2)" in said
    assert "Set config.rate=0 (it is 0.5) if" in said


def test_without_a_setting_the_cure_is_to_compute_both_ways() -> None:
    said = refusal(Branching())
    assert "x.sum() > 0" in said
    assert "Set " not in said
    assert "torch.where" in said


def test_a_module_that_is_converted_in_the_forward_is_named() -> None:
    said = refusal(Converting())
    assert "return self.layer.to(x.dtype)(x)" in said
    assert "before compiling" in said
