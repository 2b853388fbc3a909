"""The rates of a device, measured on it: what `dpcompile calibrate-device` prints and keeps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dpcompile import kernels
from dpcompile.device import FEW, FORK, LONG, NARROW, DeviceSpec, device_name
from dpcompile.pools import max_pool


def calibrated(device: torch.device, *, rounds: int = 7) -> DeviceSpec:
    """The rates of a device that is here: medians of products 2048^3, copies of 256 MB, small ops and so on."""
    n = 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    small, kernel = torch.randn(1, 8, 8, 8, device=device), torch.randn(8, 8, 1, 1, device=device)
    product = _median(lambda: a @ b, device, rounds)
    copy = _median(lambda: target.copy_(source), device, rounds)
    looped = (small, small, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    call = _median(lambda: [torch.ops.aten.convolution_backward(*looped) for _ in range(100)], device, rounds) / 100
    op = _median(lambda: [torch.ops.aten.add.Tensor(small, small) for _ in range(1000)], device, rounds) / 1000
    wide = torch.randn(2 * FORK, device=device)
    shared = _median(lambda: [torch.ops.aten.add.Tensor(wide, wide) for _ in range(100)], device, rounds) / 100
    query = torch.randn(16, 4, 128, 64, device=device)
    heads = _median(lambda: F.scaled_dot_product_attention(query, query, query), device, rounds)
    rows, table = torch.randn(NARROW, 256, device=device), torch.randn(256, 1024, device=device)
    narrow = _median(lambda: [rows @ table for _ in range(20)], device, rounds) / 20
    norms = _of_kernels(device, rounds)
    tanh = _median(lambda: torch.tanh(a), device, rounds) / a.numel()
    maximum = _median(lambda: max_pool(a.view(-1, 16, 32, 32), [2]), device, rounds) / (a.numel() / 4)
    return DeviceSpec(
        device_name(device),
        flops_per_s=2 * n**3 / product,
        bytes_per_s=2 * source.numel() * source.element_size() / copy,
        s_per_call=call,
        s_per_op=op,
        s_per_fork=max(shared - op, 0.0) if device.type == "cpu" and torch.get_num_threads() > 1 else 0.0,
        attention_flops_per_s=4 * query.numel() * query.shape[2] / heads,
        narrow_flops_per_s=2 * rows.numel() * table.shape[1] / narrow,
        kernel_flops_per_s=norms,
        s_per_tanh=tanh,
        s_per_maximum=maximum,
        convolution_flops_per_s=_of_convolutions(16, 128, LONG, device, rounds),
        few_flops_per_s=_of_convolutions(32, 512, FEW, device, rounds),
        strided_flops_per_s=_of_convolutions(16, 128, LONG // 2, device, rounds, stride=2),
    )


def _of_kernels(device: torch.device, rounds: int) -> float:
    """Of ghost norms of 16 samples with 128 positions; 0 where no kernel of ours runs."""
    if not kernels.available(device):
        return 0.0
    rows, cols = torch.randn(16, 128, 256, device=device), torch.randn(16, 128, 1024, device=device)
    taken = _median(lambda: [kernels.PAIRED(rows, cols, False) for _ in range(4)], device, rounds) / 4
    return len(rows) * 128 * 129 * (rows.shape[2] + cols.shape[2]) / taken


def _of_convolutions(
    samples: int, channels: int, side: int, device: torch.device, rounds: int, *, stride: int = 1
) -> float:
    """Forward and backward of kernels of 3 x 3, whose results have that side."""
    images = torch.randn(samples, channels, stride * side, stride * side, device=device)
    grad = torch.randn(samples, channels, side, side, device=device)
    kernel = torch.randn(channels, channels, 3, 3, device=device)
    how = ([stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)

    def step() -> None:
        torch.ops.aten.convolution(images, kernel, None, *how)
        torch.ops.aten.convolution_backward(grad, images, kernel, None, *how, [True, True, False])

    return 3 * 2 * samples * side**2 * kernel.numel() / _median(step, device, rounds)


def _median(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 2):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
