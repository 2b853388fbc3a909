"""What a device can do, as the time model needs it. Figures are sustained rates, decimal units."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceSpec:
    name: str
    flops_per_s: float  # sustained float32 matmul rate
    bytes_per_s: float  # sustained memory bandwidth
    s_per_call: float = 0.0  # of an op in a loop over samples, whatever its size

    def time_s(self, flops: float, bytes_moved: float, calls: float = 0) -> float:
        """Arithmetic, memory traffic and calls one after the other: an upper bound, the same for every candidate."""
        return flops / self.flops_per_s + bytes_moved / self.bytes_per_s + calls * self.s_per_call


# Sustained on two cores of a server CPU with AVX-512: sgemm 4096^3, and a copy of 1 GB.
CPU = DeviceSpec("cpu", 1.5e11, 1.2e10, 2e-5)
# NVIDIA H100 SXM data sheet (TF32 dense 494e12, HBM3 3.35e12 B/s), at 60 % of the peaks.
CUDA = DeviceSpec("cuda", 3.0e14, 2.0e12, 1e-5)


def spec_for(device: torch.device) -> DeviceSpec:
    return CUDA if device.type == "cuda" else CPU
