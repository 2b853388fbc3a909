"""Convolutions and transposed convolutions: every stride, padding, padding mode, dilation and grouping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import FORCED, Apply, check_module, folded_loss
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    size=st.integers(5, 7),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("valid")),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from((1, 2)),
    bias=st.booleans(),
)
def test_conv2d_of_any_window(size: int, **options: Any) -> None:
    module = nn.Conv2d(2, 4, options.pop("kernel"), **options)
    found = check_module(module, torch.randn(3, 2, size, size + 1), batch_sizes=(3, 0), methods=("ghost", "explicit"))
    assert set(found.rules.values()) == {"convolution"}


@pytest.mark.parametrize(
    ("padding_mode", "padding"),
    [("zeros", "same"), ("reflect", 2), ("replicate", 2), ("circular", 2), ("reflect", "same")],
)
def test_conv1d_in_every_padding_mode(padding_mode: str, padding: Any) -> None:
    module = nn.Conv1d(2, 4, 4, padding=padding, padding_mode=padding_mode, groups=2, dilation=1)
    found = check_module(module, torch.randn(3, 2, 9))
    assert set(found.rules.values()) == {"convolution"}


@pytest.mark.parametrize("padding_mode", ["reflect", "circular"])
def test_conv2d_in_a_padding_mode(padding_mode: str) -> None:
    module = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), padding_mode=padding_mode)
    check_module(module, torch.randn(3, 2, 5, 6))


def test_conv3d() -> None:
    module = nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2), groups=2)
    check_module(module, torch.randn(3, 2, 2, 4, 5), methods=FORCED)


def test_depthwise_then_pointwise() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.Tanh(), nn.Conv2d(6, 2, 1, bias=False))
    check_module(module, torch.randn(3, 3, 4, 4))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(2, 3)),
    stride=st.tuples(st.integers(2, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 0), st.integers(0, 1)),
    output_padding=st.tuples(st.integers(0, 1), st.just(0)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from((1, 2)),
    bias=st.booleans(),
)
def test_conv_transpose2d_of_any_window(**options: Any) -> None:
    module = nn.ConvTranspose2d(2, 4, options.pop("kernel"), **options)
    found = check_module(module, torch.randn(3, 2, 3, 4), batch_sizes=(3, 0), methods=("ghost", "explicit"))
    assert set(found.rules.values()) == {"convolution"}


@pytest.mark.parametrize("n", [1, 3])
def test_conv_transpose_of_other_dimensions(n: int) -> None:
    module = TRANSPOSED[n](4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
    check_module(module, torch.randn(3, 4, *(3,) * n))


def test_batch_folded_with_frames() -> None:
    conv = nn.Conv2d(2, 3, 2)
    module = Apply(lambda m, x: m.conv(x.flatten(0, 1)), modules={"conv": conv})
    check_module(module, torch.randn(3, 4, 2, 3, 3), loss=folded_loss(4), methods=FORCED)


def test_frames_before_the_batch() -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        rows = m.conv(x.transpose(0, 1).reshape(-1, 2, 5))  # [frames * B, 2, 5]
        return rows.unflatten(0, (4, -1)).transpose(0, 1)

    check_module(Apply(run, modules={"conv": nn.Conv1d(2, 3, 2)}), torch.randn(3, 4, 2, 5), methods=FORCED)


def test_a_parameter_as_the_image_of_a_learned_prompt() -> None:
    """The bias and a map added to the image reach the output through one convolution."""
    module = Apply(lambda m, x: m.conv(x + m.prompt), modules={"conv": nn.Conv2d(2, 3, 2)}, prompt=(2, 4, 4))
    check_module(module, torch.randn(3, 2, 4, 4))


def test_a_kernel_made_from_the_parameter() -> None:
    """A centred kernel (weight standardisation) is carried back through its formula."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        mean = m.w.mean((1, 2), keepdim=True)
        return nn.functional.conv1d(x, (m.w - mean) / m.w.var((1, 2), keepdim=True).add(1e-5).sqrt())

    found = check_module(Apply(run, w=(3, 2, 2)), torch.randn(3, 2, 5))
    assert found.spaces == {"w": "pullback"}
