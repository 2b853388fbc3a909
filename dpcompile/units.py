"""Numbers for people: 1.23M, 45.6ms, 24GB; and back."""

from __future__ import annotations

import math
import re

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("u", 1e-6), ("n", 1e-9))


def human(value: float, unit: str = "", *, up: bool = False) -> str:
    """Three digits and a decimal prefix: 1.23M, 45.6ms, 789B. Seconds have no prefix above one.

    `up`: never less than the value, so that it may be asked for as a budget.
    """
    if value == 0:
        return f"0{unit}"
    fitting = [(prefix, scale) for prefix, scale in _PREFIXES if unit != "s" or scale <= 1]
    prefix, scale = next(((p, s) for p, s in fitting if value >= 0.9995 * s), fitting[-1])
    number = value / scale
    whole = number >= 99.95 or (unit != "s" and not prefix)
    digits = 0 if whole else 1 if number >= 9.995 else 2
    return f"{rounded_up(number, digits) if up else number:.{digits}f}{prefix}{unit}"


def rounded_up(number: float, digits: int) -> float:
    """The least number of so many decimals that is no smaller."""
    return math.ceil(number * 10**digits) / 10**digits


_BYTES = re.compile(r"\s*([0-9.]+)\s*([kMGT]?)(i?)B\s*", re.IGNORECASE)


def bytes_of(text: str) -> float:
    """The number of bytes in "24GB" or "512MiB".

    Raises:
        ValueError: the text is none.
    """
    found = _BYTES.fullmatch(text)
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"Expected {text!r} to be a number of bytes such as 24GB or 512MiB.")
    number, prefix, binary = found.groups()
    return float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
