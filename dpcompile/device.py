"""What a device can do, as the time model needs it. Figures are sustained rates, decimal units."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

NARROW = 32
"""The smallest side of a product at which its rate is measured, beside that of a wide one."""
LONG, FEW = 32, 4
"""Positions in a row of the images at which the rate of convolutions is measured."""
FORK = 2**15
"""Elements from which a CPU shares an op among threads (at::internal::GRAIN_SIZE)."""


@dataclass(frozen=True)
class DeviceSpec:
    name: str
    flops_per_s: float  # sustained float32 matmul rate, full precision
    bytes_per_s: float  # sustained memory bandwidth
    s_per_call: float = 0.0  # of a convolution in a loop over samples, whatever its size
    s_per_op: float = 0.0  # of any op of a graph, whatever its size
    s_per_fork: float = 0.0  # more of an op that several threads share
    attention_flops_per_s: float = 0.0  # sustained rate of fused attention; 0: that of products
    narrow_flops_per_s: float = 0.0  # sustained rate of products with a side of NARROW; 0: that of wide ones
    kernel_flops_per_s: float = 0.0  # sustained rate of our own kernels for norms; 0: that of products
    s_per_tanh: float = 0.0  # of an element, where that takes longer than to write it
    s_per_maximum: float = 0.0  # of an element of pooling's result
    convolution_flops_per_s: float = 0.0  # sustained rate of convolutions with rows of LONG positions; 0: of products
    few_flops_per_s: float = 0.0  # the same with rows of FEW
    strided_flops_per_s: float = 0.0  # the same with strides and rows of LONG / 2; 0: as without strides

    def time_s(self, flops: float, bytes_moved: float, calls: float = 0) -> float:
        """Arithmetic, memory traffic and calls one after the other: an upper bound, the same for every candidate."""
        return flops / self.flops_per_s + bytes_moved / self.bytes_per_s + calls * self.s_per_call

    def product_rate(self, side: float) -> float:
        """Flops per second of a product by its smallest side.

        What it takes beside its arithmetic, to bring the larger factor into place, is shared by as many rows: 1 / side
        of it for each flop, between the two rates that are known. Below NARROW it is taken for constant.
        """
        if not self.narrow_flops_per_s:
            return self.flops_per_s
        share = NARROW / max(side, NARROW)
        return 1 / ((1 - share) / self.flops_per_s + share / self.narrow_flops_per_s)

    def convolution_rate(self, row: float, *, strided: bool = False) -> float:
        """Flops per second of a convolution by the positions of a row.

        These share what it takes to load and store sums: by 1 / row between the two rates that are known. Shorter and
        longer rows are taken for the nearer of the two. With strides, memory is not read in order: of the rate without
        them, the same part at every length.
        """
        if strided and self.strided_flops_per_s:
            half = LONG // 2
            return self.convolution_rate(row) * self.strided_flops_per_s / self.convolution_rate(half)
        if not (self.convolution_flops_per_s and self.few_flops_per_s):
            return self.flops_per_s
        share = (1 / min(max(row, FEW), LONG) - 1 / LONG) / (1 / FEW - 1 / LONG)
        return 1 / ((1 - share) / self.convolution_flops_per_s + share / self.few_flops_per_s)


# Sustained on two cores of a server CPU with AVX-512: sgemm 4096^3, a copy of 1 GB, a small convolution's backward, a
# sum of small tensors and one that two threads share, attention of 64 heads over 128 positions, sgemm 32 x 256 x 1024,
# ghost norms by a kernel, tanh and max-pooling of millions of elements. The rates of convolutions are not measured:
# they are that of products with what short rows of positions and strides were seen to cost in whole steps.
CPU = DeviceSpec("cpu", 1.5e11, 1.2e10, 1.5e-4, 3e-6, 5e-5, 4.5e10, 7e10, 9e10, 2e-9, 3e-9, 1.4e11, 9.5e10, 6.5e10)
# Data sheets at 60 % of the peaks, float32 without TF32: H100 SXM 67e12 and HBM3 3.35e12 B/s, A100 19.5e12 and 2.0e12.
CUDA = DeviceSpec("cuda", 4.0e13, 2.0e12, 1e-5, 5e-6)
NAMED = {
    "cpu": CPU,
    "cuda": CUDA,
    "h100": replace(CUDA, name="h100"),
    "a100": DeviceSpec("a100", 1.2e13, 1.2e12, 1e-5, 5e-6),
}


def spec_for(device: torch.device) -> DeviceSpec:
    """As calibrated on this machine, else the one that stands for all of its kind."""
    return _saved().get(device_name(device)) or (CUDA if device.type == "cuda" else CPU)


def spec_named(text: str) -> DeviceSpec:
    """Of a device that need not be here: a name, or a file that `dpcompile calibrate-device --json` wrote.

    Raises:
        ValueError: neither.
    """
    if text == "cpu" or (text == "cuda" and torch.cuda.is_available()):
        return spec_for(torch.device(text))
    if text in NAMED:
        return NAMED[text]
    try:
        return DeviceSpec(**json.loads(Path(text).read_text()))
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{text!r} is none of {', '.join(NAMED)}, nor a file of calibrate-device") from None


# ---------------------------------------------------------------- this machine


def cache_directory() -> Path:
    """DPCOMPILE_CACHE, or `dpcompile` in XDG_CACHE_HOME or ~/.cache."""
    if "DPCOMPILE_CACHE" in os.environ:
        return Path(os.environ["DPCOMPILE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpcompile"


def device_name(device: torch.device) -> str:
    """What times depend on: the model of the GPU, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def save(spec: DeviceSpec) -> Path:
    """Keep the spec for plans on this machine."""
    path = cache_directory() / "devices.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {name: asdict(own) for name, own in _saved().items()} | {spec.name: asdict(spec)}
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path


def _saved() -> dict[str, DeviceSpec]:
    try:
        found = json.loads((cache_directory() / "devices.json").read_text())
        return {name: DeviceSpec(**own) for name, own in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
