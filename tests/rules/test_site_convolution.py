"""Convolutions and transposed convolutions: every stride, padding, padding mode, dilation and grouping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from layers import EVERY_FORM, FORCED, Apply, check_module, folded_loss
from selection import every
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UNWRITTEN = (
    "forced-shifted",
    "forced-looped",
    "forced-streamed",
    "forced-flash",
    "forced-tiled",
)  # patches that are read off the image
EVERY_WAY = (*EVERY_FORM, *UNWRITTEN)
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
    every(3, [("zeros", "same"), ("replicate", 2), ("circular", 2), ("reflect", "same"), ("reflect", 2)]),
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


any_sizes = given(
    data=st.data(),
    n=st.integers(1, 3),
    groups=st.integers(1, 3),
    depth=st.integers(1, 2),
    out=st.sampled_from((1, 2, 9)),  # wider than the patches as well: then these are what is scaled
)
few = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@few
@any_sizes
def test_convolution_with_any_arguments(data: st.DataObject, n: int, groups: int, depth: int, out: int) -> None:
    """Each argument by dimension, padding as numbers or by name, every mode, up to depthwise."""

    def each(low: int, high: int, name: str) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high), label=name) for _ in range(n))

    kernel, dilation, sizes = each(1, 3, "kernel"), each(1, 2, "dilation"), each(3, 5 if n < 3 else 3, "size")
    named = data.draw(st.sampled_from(("same", "valid", "")), label="padding")
    padding = named or each(0, 2, "padding")
    stride = 1 if named == "same" else each(1, 3, "stride")
    mode = data.draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")), label="mode")
    around = [0 if named == "valid" else 2 * 2 for _ in sizes] if named else [2 * p for p in padding]
    assume(all(size + pad > d * (k - 1) for size, pad, d, k in zip(sizes, around, dilation, kernel, strict=True)))
    bias = data.draw(st.booleans(), label="bias")
    module = CONV[n](
        groups * depth, groups * out, kernel, stride, padding, dilation, groups, bias=bias, padding_mode=mode
    )
    if bias and data.draw(st.booleans(), label="bias alone"):
        module.weight.requires_grad_(False)
    found = check_module(module, torch.randn(3, groups * depth, *sizes), batch_sizes=(3, 0), methods=EVERY_WAY)
    assert set(found.rules.values()) <= {"convolution", "broadcast"}


@few
@any_sizes
def test_transposed_convolution_with_any_arguments(
    data: st.DataObject, n: int, groups: int, depth: int, out: int
) -> None:
    def each(low: int, high: int, name: str) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high), label=name) for _ in range(n))

    kernel, stride, dilation = each(1, 3, "kernel"), each(1, 3, "stride"), each(1, 2, "dilation")
    padding, sizes = each(0, 2, "padding"), each(1, 3, "size")
    more = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    results = zip(sizes, stride, padding, dilation, kernel, more, strict=True)
    assume(all((size - 1) * s - 2 * p + d * (k - 1) + o + 1 > 0 for size, s, p, d, k, o in results))
    module = TRANSPOSED[n](
        groups * depth,
        groups * out,
        kernel,
        stride,
        padding,
        more,
        groups,
        data.draw(st.booleans(), label="bias"),
        dilation,
    )
    x = torch.randn(3, groups * depth, *sizes)
    assume(bool(module(x).any()))  # not padding alone
    found = check_module(module, x, batch_sizes=(3, 0), methods=EVERY_WAY)
    assert set(found.rules.values()) == {"convolution"}


def test_a_kernel_of_one_whose_result_is_padded() -> None:
    module = nn.ConvTranspose1d(2, 3, 1, output_padding=1, dilation=2)
    check_module(module, torch.randn(3, 2, 4), batch_sizes=(3,), methods=EVERY_WAY)


@pytest.mark.parametrize("transposed", every(2, [False, True]))
def test_functional_convolution_with_arguments_by_default(transposed: bool) -> None:
    function = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
    module = Apply(lambda m, x: function(x, m.w), w=(2, 3, 2, 1) if transposed else (3, 2, 2, 1))
    check_module(module, torch.randn(3, 2, 3, 3), methods=EVERY_WAY)


@pytest.mark.parametrize("kind", every(2, [nn.ConvTranspose2d, nn.Conv2d]))
def test_kernel_whose_image_and_bias_are_frozen(kind: type[nn.Module]) -> None:
    module = kind(2, 3, 2)
    module.bias.requires_grad_(False)
    check_module(module, torch.randn(3, 2, 3, 3), methods=EVERY_WAY)


def test_windows_that_overlap_are_not_scaled_in_their_place() -> None:
    """One channel in a group and a kernel of one dimension: the patches are a view of the image, with a wide result."""
    for conv in (nn.Conv1d(4, 32, 3, groups=4, padding=1), nn.Conv1d(1, 64, 7, padding=3)):
        check_module(conv, torch.randn(3, conv.in_channels, 9))
