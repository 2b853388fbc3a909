"""Where a decision turns over, solved for T: the paper's rule, and equal times under a device's rates."""

from __future__ import annotations

import sympy

from dpcompile.device import DeviceSpec
from dpcompile.plan import Method, Part
from dpcompile.shapes import B, D, G, P, T

PAPER = (2 * T**2, P * D)
"""Mixed ghost clipping, arXiv:2205.10683 eq. 4.2: ghost where the first is below the second."""


def paper_flip() -> sympy.Expr:
    """The T below which the paper's rule takes ghost norms: an expression in p and d."""
    return sympy.solve(sympy.Eq(*PAPER), T)[-1]


RATES = sympy.symbols("F W", positive=True)
"""Flops and bytes per second of a device."""


def time_gap(part: Part, device: DeviceSpec) -> sympy.Expr:
    """Seconds by which ghost norms are slower than kept gradients, in B, T, d, p and G: below 0 ghost is faster."""
    ghost, kept = (part.options[method] for method in (Method.GHOST, Method.KEPT))
    return sympy.sympify(device.time_s(ghost.flops, ghost.bytes) - device.time_s(kept.flops, kept.bytes))  # type: ignore[arg-type]


def turns(part: Part) -> bool:
    """Whether T decides between ghost and kept: both exist, and there are Gram matrices to pay for."""
    both = {Method.GHOST, Method.KEPT} <= part.options.keys()
    return both and part.kind in ("outer", "onehot") and part.size(T) > 1


def time_flip(part: Part, device: DeviceSpec, batch_size: int) -> float | None:
    """The T at which ghost and kept take the same time with this part's d and p. None if there is no such T."""
    if not turns(part):
        return None
    gap = time_gap(part, device).subs({D: part.size(D), P: part.size(P), G: part.size(G), B: batch_size})
    roots = (sympy.re(root) for root in sympy.Poly(gap, T).nroots() if abs(sympy.im(root)) < 1e-9)
    return max((float(root) for root in roots if root > 0), default=None)


def symbolic_time_flip(part: Part) -> sympy.Expr:
    """The same T as an expression in d, p and the device's rates F (flops/s) and W (bytes/s)."""
    gap = time_gap(part, DeviceSpec("any", *RATES))  # type: ignore[arg-type]
    return sympy.solve(sympy.expand(gap * RATES[0] * RATES[1] / (B * G)), T)[-1]
