"""Worst-case bounds on rounding: a sum of n products, in any order, is off by at most gamma_n of the sum of the
absolute products (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from dpcompile.shapes import hint

_bounds: ContextVar[bool] = ContextVar("bounds", default=True)


@contextmanager
def without_bounds() -> Iterator[None]:
    """Norms that are traced here are as computed, with next to nothing added for rounding: for comparisons."""
    token = _bounds.set(False)
    try:
        yield
    finally:
        _bounds.reset(token)


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff u: half the distance from 1 to the next number."""
    return _finfo(dtype).eps / 2 if _bounds.get() else 1e-30


_finfo = functools.cache(torch.finfo)  # making one takes longer than a small op


def gamma(terms: int | torch.SymInt, dtype: torch.dtype) -> float:
    """Relative error of a sum of that many products, in the worst case; of a free length, a number of the graph."""
    nu = terms * unit(dtype)
    return nu / (1 - nu) if hint(terms) * unit(dtype) < 0.5 else float("inf")


def tiny(dtype: torch.dtype) -> float:
    """What a product that underflows may lose, also where subnormal numbers count as zero."""
    return _finfo(dtype).tiny


def storage_unit(dtype: torch.dtype) -> float:
    """Unit roundoff of a type that is narrower than what sums are computed in; else 0, as it is counted there."""
    return unit(dtype) if dtype in (torch.bfloat16, torch.float16) else 0.0


def norm_slack(count: int, dtype: torch.dtype) -> tuple[float, float]:
    """(a, b) such that n a + b is at least the norm of a vector of so many numbers whose computed norm is n."""
    return 1 + gamma(count + 8, dtype), (count * 4 * tiny(dtype) / unit(dtype)) ** 0.5


def row_norms(values: torch.Tensor) -> torch.Tensor:
    """Norms over the last dimension that are not too small, in one pass that writes nothing."""
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    relative, least = norm_slack(values.shape[-1], dtype)
    return torch.linalg.vector_norm(values, dim=-1, dtype=dtype) * relative + least


def accurate(tensor: torch.Tensor) -> torch.Tensor:
    """float32 at least."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
