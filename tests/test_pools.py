"""Max pooling by rows against torch's: the same numbers in the same places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import check_module
from torch import nn

from dpcompile import dpcompile, native, pools

PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    planes=st.sampled_from([(0, 2), (1, 1), (3, 2), (3, 11)]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=PAIR,
    stride=st.one_of(st.just(()), PAIR),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    values=st.sampled_from(["all different", "many alike", "some NaN", "some infinite"]),
)
def test_it_is_what_torch_finds(
    planes: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, ...],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    dtype: torch.dtype,
    values: str,
) -> None:
    assert native.library() is not None
    assume(all(2 * pad <= k for pad, k in zip(padding, kernel, strict=True)))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    torch.manual_seed(0)
    image = torch.randn(*planes, *size, dtype=dtype)
    if values == "many alike":
        image = image.sign().relu()
    elif values != "all different":
        image[torch.rand_like(image) < 0.3] = torch.nan if values == "some NaN" else -torch.inf
    arguments = (image, kernel, stride, padding, dilation, ceil_mode)
    expected, found = pools.OP(*arguments), pools.max_pool(*arguments)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_arguments_may_be_left_out_or_hold_one_number() -> None:
    image = torch.randn(2, 3, 9, 8)
    for arguments in (([2],), ([2, 3],), ([3], [2], [1]), ([2], [], [0], [2], True)):
        for a, b in zip(pools.OP(image, *arguments), pools.max_pool(image, *arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("image", [torch.randn(3, 6, 6), torch.randn(2, 6, 6, 3).permute(0, 3, 1, 2)])
def test_other_layouts_go_to_torch(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "max_pool", lambda *_: pytest.fail("not by rows"))
    assert torch.equal(pools.max_pool(image, [2])[0], pools.OP(image, [2])[0])


def test_a_model_with_max_pooling() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(27, 2))
    check_module(net, torch.randn(3, 2, 7, 7))
    called: list[int] = []
    dp_model = dpcompile(net.double(), torch.randn(3, 2, 7, 7).double())
    by_rows = native.max_pool
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "max_pool", lambda *a: (called.append(1), by_rows(*a))[1])
        dp_model(torch.randn(4, 2, 7, 7).double()).sum().backward()
    assert called == [1]
