"""Norms by Triton kernels: in Triton's interpreter, which a process chooses for good, and where there are none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dpcompile import dpcompile, kernels
from dpcompile.errors import DPCompileError
from dpcompile.plan import Method

CASES = Path(__file__).with_name("interpreted_kernels.py")
CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
def test_kernels_in_the_interpreter() -> None:
    """Every test of interpreted_kernels.py. Without triton they fail: it is one of the packages for development."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
    root = CASES.parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernels are not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("compiled_kernels")
def test_no_plan_for_a_cpu_has_them() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(6, 5))
    plan = dpcompile(model, torch.randn(3, 2, 8), norm_method="ghost", validate="off").plan
    methods = {method for group in plan.costs.groups for part in group.parts for method in part.options}
    assert not methods & {Method.FLASH, Method.TILED}
    assert not kernels.available(CPU)


def test_there_are_none_without_triton_or_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not kernels.available(torch.device("meta"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not kernels.available(CPU)
    assert not kernels.available(torch.device("cuda"))


@pytest.mark.usefixtures("compiled_kernels")
def test_a_plan_for_another_machine_is_refused_with_a_cure() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(DPCompileError, match="Triton kernels, and these do not run on cpu"):
        kernels.PAIRED(x, x, x[..., 0], x[..., 0], False)
    with pytest.raises(DPCompileError, match="compile the model again on this machine"):
        kernels.SQUARED(x, x, False)
