"""Ratios of times that were taken in turns, as their median and quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"median": middle, "quartiles": [low, high]}


def ratio_of(record: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Of the seconds of one method over those of another, round by round."""
    return spread([own / other for own, other in zip(record["seconds"], base["seconds"], strict=True)])


def spread_text(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"
