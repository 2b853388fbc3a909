"""Compiling makes millions of objects that stay: Python's collector need not look through them again and again.

Every test draws from a seed of its own, so that it does the same alone as in any company.
"""

import gc
import zlib

import pytest
import torch

gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
