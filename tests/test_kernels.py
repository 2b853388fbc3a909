"""Kernels in Triton's interpreter, which a process chooses for good, for other devices, and where there are none."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dpcompile import dpcompile, kernels, native
from dpcompile.errors import DPCompileError
from dpcompile.plan import Method

CASES = Path(__file__).with_name("test_tiles.py")
CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["sums or square or told", ""])
def test_kernels_in_the_interpreter(chosen: str) -> None:
    """Tests of test_tiles.py, of the ops alone or all. Without triton, which development needs, they fail."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
    command += ["-k", chosen]
    root = CASES.parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another processor")
def test_sums_of_bfloat16_without_tiles_are_those_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that has AMX; on others both are the same."""
    torch.manual_seed(0)
    rows, cols = torch.randn(2, 37, 300).bfloat16(), torch.randn(2, 37, 21).bfloat16()
    found = kernels.PAIRED(rows, cols, False)
    monkeypatch.setenv("DPCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-amx-bf16"))
    try:
        forget_kernels()
        torch.testing.assert_close(kernels.PAIRED(rows, cols, False), found, rtol=1e-5, atol=0)
    finally:
        monkeypatch.undo()
        forget_kernels()


def forget_kernels() -> None:
    native.library.cache_clear()
    native._kernel.cache_clear()


PLAIN, CONSTANT = "i32", "constexpr"
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}


@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton was told to interpret")
@pytest.mark.parametrize("name", ["paired", "squared"])
@pytest.mark.parametrize(
    ("dtype", "product"),
    [pytest.param(torch.float32, "fma.rn.f32", marks=pytest.mark.slow), (torch.bfloat16, ".f32.bf16.bf16")],
)
def test_they_compile_for_devices_that_are_not_there(
    name: str, dtype: torch.dtype, product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For Ampere and Hopper, with products of whole float32 numbers and bfloat16 on tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpcompile import tiles

    kernel = getattr(tiles, name)
    given = dict.fromkeys(kernel.arg_names, PLAIN)
    given |= {"rows": POINTERS[dtype], "cols": POINTERS[dtype], "partial": POINTERS[torch.float64]}
    given |= {norms: POINTERS[torch.float32] for norms in given if norms.endswith("_norms")}
    constants = {"FACTOR": tiles.TYPES[dtype], "TOTAL": tiles.TYPES[torch.float32]}
    constants |= {"SIDE": kernels.SIDE, "DEPTH": kernels.DEPTH, "SPAN": kernels.SPAN}
    constants |= {stride: 1 for stride in given if stride.endswith("_stride_k")}
    source = ASTSource(kernel, given | dict.fromkeys(constants, CONSTANT), constants)
    for capability in (80, 90):
        made = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
        assert product in made.asm["ptx"]
        assert "tf32" not in made.asm["ptx"]


def methods_of(model: nn.Module) -> set[Method]:
    plan = dpcompile(model, torch.randn(3, 2, 8), norm_method="ghost", validate="off").plan
    return {method for group in plan.costs.groups for part in group.parts for method in part.options}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_plans_for_a_cpu_have_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(6, 5))
    assert not methods_of(model) & {Method.FLASH, Method.TILED}
    assert not kernels.available(CPU)
    assert "no g++" in caplog.text


def test_a_compiler_that_fails_is_as_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DPCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    native.library.cache_clear()
    assert not kernels.available(CPU)
    assert "returned non-zero" in caplog.text
    assert not list(tmp_path.iterdir())
    native.library.cache_clear()


def test_plans_for_a_cpu_have_them() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(6, 5))
    assert {Method.FLASH, Method.TILED} <= methods_of(model)


def test_there_are_none_without_triton_or_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not kernels.available(torch.device("meta"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not kernels.available(CPU)
    assert not kernels.available(torch.device("cuda"))


@pytest.mark.usefixtures("no_compiler")
def test_a_plan_for_another_machine_is_refused_with_a_cure() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(DPCompileError, match=r"kernels that need g\+\+ on cpu"):
        kernels.PAIRED(x, x, False)
    with pytest.raises(DPCompileError, match="compile the model again on this machine"):
        kernels.SQUARED(x, x, False)
