"""Kernels for a CPU: compiled by g++ for this machine when they are first asked for, and kept in the cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpcompile.device import cache_directory
from dpcompile.rounding import norm_slack

HERE = Path(__file__).parent
SOURCES = ("tiles.cpp", "recurrent.cpp", "sums.cpp", "pools.cpp", "chains.cpp")
HEADERS = ("blocks.h", "amx.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
SPAN = 128
"""Products that are added up one after the other; the sums of longer ones are added in turn. As tiles.cpp has it."""
PANELS, LINES = 3, 4
"""Registers beside one another, and lines of them, that are added up before float64 takes over. As tiles.cpp has it."""
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors whose numbers are where they say: not those of subclasses, nor of a trace."""
LANES = 64
"""Roundings that adding up lanes and parts of the work takes at most, in float64."""

WIDTHS = {
    "lstm": (4, 4, 4, 1, 1),
    "lstm_backward": (1, 1, 1, 4, 4),
    "gru": (1, 4, 1),
    "gru_backward": (1, 1, 3, 1),
    "rnn": (1,),
    "rnn_backward": (1, 1),
}
"""Features of what recurrent.cpp goes through step by step, as multiples of a state's."""
GATES = {"lstm": 4, "gru": 3, "rnn": 1}

_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where there is no g++ (CXX names another one), or where it fails: the log says why."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        _log.info("no g++: norms and recurrent layers are computed without kernels of our own")
        return None
    texts = [(HERE / name).read_text() for name in (*SOURCES, *HEADERS)]
    key = "\n".join((*texts, compiler, *FLAGS, _machine()))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    path = cache_directory() / name
    try:
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.info("kernels: %s\n%s", error, getattr(error, "stderr", ""))
        return None


def _compile(compiler: str, path: Path) -> None:
    """Processes that do so at the same time put the same file there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(made, path)


def _machine() -> str:
    """What instructions there are: the cache may be that of several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()


Tables = tuple[torch.Tensor, torch.Tensor]


def paired(factors: Sequence[tuple[torch.Tensor, Tables | None]], pairs: list[int], total: torch.dtype) -> torch.Tensor:
    """[pairs, 4, N] float64: sums of kernels.py for pairs of factors [N, T, k], given by their numbers.

    Products are added up in type `total`. With tables a factor is found in images [N, ...]: element k of position t at
    positions[t] + elements[k].
    """
    given = [_Factor.of(*factor) for factor in factors]
    samples, length = factors[0][0].shape[:2]
    out = torch.zeros((len(pairs) // 2, 4, samples), dtype=torch.float64)
    if out.numel() and length:
        sizes = [samples, length, len(given), len(pairs) // 2]
        for factor in given:
            sizes += (factor.width, *factor.layout)
        slack = [number for factor in given for number in norm_slack(factor.width, total)]
        _kernel("paired", given[0].tensor.dtype, total)(
            (ctypes.c_void_p * len(given))(*(factor.tensor.data_ptr() for factor in given)),
            (ctypes.c_int64 * (len(sizes) + len(pairs)))(*sizes, *pairs),
            (ctypes.c_double * len(slack))(*slack),
            torch.get_num_threads(),
            ctypes.c_void_p(out.data_ptr()),
        )
    return out


def squared(rows_NTp: torch.Tensor, cols: torch.Tensor, tables: Tables | None, total: torch.dtype) -> torch.Tensor:
    """[2, N] float64: sums of kernels.py, whose products are added up in type `total`."""
    out = torch.zeros((2, rows_NTp.shape[0]), dtype=torch.float64)
    _run("squared", rows_NTp, cols, tables, total, out)
    return out


def gradients(rows_NTp: torch.Tensor, cols: torch.Tensor, tables: Tables) -> torch.Tensor:
    """[N, p, d]: rows^T cols of every sample, of columns that tables find in images."""
    shape = (rows_NTp.shape[0], rows_NTp.shape[2], len(tables[1]))
    out = rows_NTp.new_empty(shape) if rows_NTp.numel() else rows_NTp.new_zeros(shape)
    _run("gradients", rows_NTp, cols, tables, rows_NTp.dtype, out)
    return out


class _Factor(NamedTuple):
    """[N, T, width]: where its numbers are."""

    tensor: torch.Tensor
    width: int
    layout: tuple[int, ...]  # strides; with tables that of samples, and where the tables are

    @classmethod
    def of(cls, tensor: torch.Tensor, tables: Tables | None) -> _Factor:
        tensor = tensor.float() if tensor.dtype is torch.float16 else tensor
        if tables is None:
            return cls(tensor, tensor.shape[2], (*tensor.stride(), 0, 0))
        tensor, (positions, elements) = tensor.contiguous(), tables
        return cls(tensor, len(elements), (tensor[:1].numel(), 0, 0, positions.data_ptr(), elements.data_ptr()))


def _run(
    name: str, rows: torch.Tensor, cols: torch.Tensor, tables: Tables | None, total: torch.dtype, out: torch.Tensor
) -> None:
    """A kernel of tiles.cpp that adds to `out` or writes there."""
    left, right = _Factor.of(rows, None), _Factor.of(cols, tables)
    if rows.numel() and right.width:
        sizes = (*rows.shape, right.width, *left.layout, *right.layout)
        slack = (*norm_slack(left.width, total), *norm_slack(right.width, total))
        _kernel(name, left.tensor.dtype, total)(
            ctypes.c_void_p(left.tensor.data_ptr()),
            ctypes.c_void_p(right.tensor.data_ptr()),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_double * len(slack))(*slack),
            torch.get_num_threads(),
            ctypes.c_void_p(out.data_ptr()),
        )


@functools.cache
def _kernel(name: str, factor: torch.dtype, total: torch.dtype) -> Any:
    found = library()
    assert found is not None
    return getattr(found, f"{name}_{_short(factor)}_{_short(total)}")


def products(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    grad: torch.Tensor,
    parts: Sequence[int],
) -> torch.Tensor:
    """Sums over the second and fourth of `parts` of (x - shift) scale grad, all of them contiguous.

    Shift and scale have numbers for the first two alone.

    Raises:
        RuntimeError: numbers do not fit.
    """
    found = library()
    assert found is not None
    front, before, kept, _ = parts
    counts = ((x, math.prod(parts)), (grad, math.prod(parts)), (shift, front * before), (scale, front * before))
    given = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor, _ in counts]
    for tensor, count in counts:
        if tensor is not None and (tensor.numel() != count or tensor.dtype is not x.dtype):
            raise RuntimeError(f"products: {tensor.dtype}{list(tensor.shape)} is not {x.dtype} of {list(parts)}")
    out = x.new_zeros(front * kept)
    if x.numel():
        kernel = getattr(found, f"products_{_short(x.dtype)}")
        kernel((ctypes.c_int64 * 4)(*parts), *given, torch.get_num_threads(), ctypes.c_void_p(out.data_ptr()))
    return out


def group_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The input's gradient, and for every channel of a sample [N, C] the sums of x grad and of grad.

    `sizes`: N, C, numbers of a channel, groups; images of N C numbers of a channel, what the forward kept of N groups.

    Raises:
        RuntimeError: numbers do not fit.
    """
    found = library()
    assert found is not None
    samples, channels, size, groups = sizes
    images, kept = samples * channels * size, samples * groups
    counts = ((grad, images), (x, images), (mean, kept), (rstd, kept), (weight, channels))
    for tensor, count in counts:
        if tensor is not None and (tensor.numel() != count or tensor.dtype is not x.dtype):
            raise RuntimeError(f"group norm: {tensor.dtype}{list(tensor.shape)} is not {x.dtype} of {count} numbers")
    out, (products, sums) = torch.empty_like(x), x.new_empty((2, samples, channels))
    if kept:
        kernel = getattr(found, f"group_norm_backward_{_short(x.dtype)}")
        given = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor, _ in counts]
        results = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (out, products, sums)]
        kernel((ctypes.c_int64 * 4)(*sizes), *given, torch.get_num_threads(), *results)
    return out, products, sums


def max_pool(
    images: torch.Tensor, windows: Sequence[int], geometry: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number under each of [rows, columns] windows of contiguous images [N, C, H, W], and int64 its place.

    `geometry`: kernel, stride, padding and dilation of height and width.
    """
    found = library()
    assert found is not None
    *planes, high, wide = images.shape
    out = images.new_empty((*planes, *windows))
    at = torch.empty(out.shape, dtype=torch.int64)
    sizes = (math.prod(planes), high, wide, *windows, *geometry)
    kernel = getattr(found, f"max_pool_{_short(images.dtype)}")
    given = (ctypes.c_void_p(images.data_ptr()), (ctypes.c_int64 * len(sizes))(*sizes), torch.get_num_threads())
    kernel(*given, ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(at.data_ptr()))
    return out, at


@dataclass(frozen=True)
class Steps:
    """What chains.cpp goes through for every sample, as it reads it: arrays of numbers."""

    sizes: Any
    constants: Any
    read: Any
    code: Any
    write: Any
    written: Any

    @classmethod
    def of(
        cls,
        constants: Sequence[float],
        read: Sequence[tuple[int, int, int]],
        code: Sequence[int],
        write: Sequence[tuple[int, int, int]],
        written: Sequence[int],
    ) -> Steps:
        """`read` and `write`: of each tensor its type, how many lines it has, and whether a line has all samples."""
        sizes = (len(constants), len(read), sum(lines for _, lines, _ in read), len(code) // 4, len(write))
        each = [[number for tensor in tensors for number in tensor] for tensors in (read, write)]
        return cls(
            _array(ctypes.c_int64, sizes),
            _array(ctypes.c_double, constants),
            _array(ctypes.c_int64, each[0]),
            _array(ctypes.c_int32, code),
            _array(ctypes.c_int64, each[1]),
            _array(ctypes.c_int64, written),
        )


def chain(steps: Steps, samples: int, given: Sequence[int], out: Sequence[int]) -> None:
    """Go through them: from tensors at these addresses, without gaps, to others."""
    found = library()
    assert found is not None
    arrays = (steps.sizes, steps.constants, steps.read, steps.code, steps.write, steps.written)
    found.chain(*arrays, ctypes.c_int64(samples), _array(ctypes.c_int64, given), _array(ctypes.c_int64, out))


def _array(kind: Any, numbers: Sequence[Any]) -> Any:
    return (kind * len(numbers))(*numbers)


def recurrence(
    name: str,
    weight_pH: torch.Tensor,
    states_BH: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor | None],
    last_BH: Sequence[torch.Tensor] = (),
    *,
    relu: bool = False,
) -> None:
    """Go through the steps of recurrent.cpp, with its tensors in their order.

    Those called steps are [B, T, features], or [features] where they are the same for all.

    Raises:
        RuntimeError: shapes do not fit.
    """
    found = library()
    assert found is not None
    batch, length, width = *next(x for x in steps if x is not None and x.dim() == 3).shape[:2], weight_pH.shape[1]
    expected: list[tuple[torch.Tensor | None, list[int]]] = [
        (weight_pH, [GATES[name.removesuffix("_backward")] * width, width])
    ]
    expected += [(state, [batch, width]) for state in states_BH]
    for tensor, wide in zip(steps, WIDTHS[name], strict=True):
        shared = tensor is not None and tensor.dim() == 1
        expected.append((tensor, [wide * width] if shared else [batch, length, wide * width]))
    expected += [(state, [batch, width]) for state in last_BH]
    numbers = [batch, length, width]
    for tensor, shape in expected:
        if tensor is None:
            numbers += [0, 0, 0]
            continue
        if list(tensor.shape) != shape or tensor.dtype is not weight_pH.dtype:
            raise RuntimeError(f"{name}: {tensor.dtype}{list(tensor.shape)} is not {weight_pH.dtype}{shape}")
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        sample, step, *_ = (*tensor.stride()[:-1], 0, 0)
        numbers += [tensor.data_ptr(), sample, step]
    if batch and width:
        kernel = getattr(found, f"{name}_{_short(weight_pH.dtype)}")
        kernel((ctypes.c_int64 * len(numbers))(*numbers), int(relu), torch.get_num_threads())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
