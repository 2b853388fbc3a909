"""Patches that are read off an image against patches that are written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpcompile.certified import ghost_norm, streamed_norm
from dpcompile.forms import Explicit, Patched, explicit, in_float64, merge, transposed, weighted_sum, written_out
from dpcompile.patches import Window, overlapped, padded, patches

check = settings(max_examples=40, deadline=None, derandomize=True)
few = st.integers(1, 3)


@st.composite
def patched(draw: Any) -> Patched:
    """Any window over an image of 1 to 3 dimensions, of which the last rows may be read by no patch."""
    n, groups = draw(few), draw(st.integers(1, 2))
    kernel, stride, dilation, spare = (tuple(draw(few) for _ in range(n)) for _ in range(4))
    before, after = (tuple(draw(st.integers(0, 2)) for _ in range(n)) for _ in range(2))
    positions = tuple(draw(few) for _ in range(n))
    window = Window(kernel, stride, tuple(zip(before, after, strict=True)), dilation, groups)
    sizes = tuple(
        max(extent - sum(pad), 0) + more - 1
        for extent, pad, more in zip(window.extent(positions), window.padding, spare, strict=True)
    )
    assume(min(sizes) > 0)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    p, channels, batch = draw(few), draw(few), draw(st.integers(0, 3))
    rows = torch.randn(batch, groups * p, *positions, dtype=torch.double)
    image = torch.randn(batch, groups * channels, *sizes, dtype=torch.double)
    return Patched(rows, image, window, (groups * p, channels, *kernel))


@check
@given(patched())
def test_gradients_of_kernels_are_those_of_patches(form: Patched) -> None:
    each = explicit(written_out(form))
    torch.testing.assert_close(explicit(form), each)
    weights = torch.linspace(0.1, 1.0, len(each), dtype=torch.double)
    torch.testing.assert_close(weighted_sum(form, weights), torch.tensordot(weights, each, 1))


@check
@given(patched(), st.sampled_from([0, 64]))
def test_samples_are_groups_of_one_convolution_or_come_one_after_the_other(form: Patched, channels: int) -> None:
    single = replace(form, rows=form.rows.float(), image=form.image.float())
    with mock.patch("dpcompile.patches.FEW", channels), mock.patch("dpcompile.patches.by_kernel", return_value=False):
        each = explicit(single)
    torch.testing.assert_close(each.double(), explicit(written_out(form)), atol=1e-4, rtol=1e-4)


@check
@given(patched())
def test_norms_are_those_of_patches(form: Patched) -> None:
    square, _ = ghost_norm([form])
    torch.testing.assert_close(square, explicit(written_out(form)).flatten(1).square().sum(1), atol=1e-20, rtol=1e-9)


@check
@given(patched())
def test_the_gram_of_patches_is_that_of_the_image_shifted(form: Patched) -> None:
    positions = tuple(form.rows.shape[2:])
    image = padded(form.image, form.window, positions)
    pixels = image.flatten(2).unflatten(1, (form.window.groups, -1)).flatten(0, 1)
    written = patches(form.image, form.window, positions).flatten(0, 1)
    gram = overlapped(pixels.transpose(1, 2) @ pixels, form.window, positions)
    torch.testing.assert_close(gram, written.transpose(1, 2) @ written)


@check
@given(patched(), patched())
def test_patches_of_several_uses_are_written_out(left: Patched, right: Patched) -> None:
    right = Patched(left.rows * 2, left.image.flip(0), left.window, left.shape)
    (both,) = merge([left, right])
    assert not isinstance(both, Patched)
    torch.testing.assert_close(explicit(both), explicit(left) + explicit(right))


def test_a_kernel_seen_in_another_order() -> None:
    form = Patched(torch.randn(2, 3, 4), torch.randn(2, 5, 5), Window((2,), (1,), ((0, 0),), (1,), 1), (3, 5, 2))
    seen = transposed(form, (2, 0, 1))  # of a value that is the kernel with its places first
    torch.testing.assert_close(explicit(seen), explicit(transposed(Explicit(explicit(form)), (2, 0, 1))))


def test_a_crowd_of_positions_is_added_up_in_float64() -> None:
    """64 positions of a kernel of 9 numbers that cancel: float32 would leave the rounding of large numbers."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, 8, 8)
    rows = torch.ones(1, 1, 8, 8)
    rows[:, :, 1::2] = -1
    form = Patched(rows, image.repeat_interleave(1, 0), Window((3, 3), (1, 1), ((1, 1),) * 2, (1, 1), 1), (1, 1, 3, 3))
    exact = explicit(in_float64(form)).flatten(1).norm(dim=1)
    square, error = ghost_norm([form])
    torch.testing.assert_close(square.sqrt() + error.sqrt(), exact, rtol=1e-9, atol=0)
    assert math.isfinite(weighted_sum(form, torch.ones(1)).sum())


@check
@given(patched(), st.sampled_from([1, 2**20]), st.booleans())
def test_gradients_that_come_a_few_at_a_time_are_the_same(form: Patched, chunk: int, double: bool) -> None:
    """What is squared is bit for bit what is added up."""
    form = form if double else replace(form, rows=form.rows.float(), image=form.image.float())
    with mock.patch("dpcompile.patches.CHUNK", chunk):
        square, error = streamed_norm(form)
        alone = [weighted_sum(form, row, streamed=True) for row in torch.eye(len(form.rows), dtype=form.rows.dtype)]
        weights = torch.linspace(0.1, 1.0, len(form.rows), dtype=form.rows.dtype)
        total = weighted_sum(form, weights, streamed=True)
    each = explicit(written_out(form))
    tolerance = {} if double else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(total, torch.tensordot(weights, each, 1), **tolerance)
    for own, norm in zip(alone, square, strict=True):
        exact = own.double().square().sum()
        assert exact <= norm
        torch.testing.assert_close(norm, exact, rtol=1e-12, atol=0)
    assert not error.any()
