"""Which of many parameters of a test run by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, items: Iterable[Any]) -> list[Any]:
    """Of so many items in turn the first; the rest is slow."""
    found = []
    for i, item in enumerate(items):
        values = item if isinstance(item, tuple) else (item,)
        found.append(pytest.param(*values, marks=pytest.mark.slow if i % step else ()))
    return found
