"""Symbolic cost of one use of a parameter, by form and method, in B, T, d, p and G; e is the element size in bytes.

Flops are those of the matrix products in forms.py and equal what torch's FlopCounterMode counts on the emitted graph.

    form      ghost norm          explicit norm   clipped sum                       source
    outer     2 B G T^2 (p + d)*  2 B G T p d     2 B G T p d, kept: 2 B G p d      2210.00038 table 3
    onehot    2 B T^2 d           0 (sums)        0 (index_add), kept: 2 B p d      2205.10683 section 3
    explicit  -                   0               2 B p
    cross     2 B T_1 T_2 d       0               0                                 ours: tied look-up and head
    shifted   2 B G (U^2 C + T^2 p)               2 B G T p d                       ours: convolutions (patches.py)
    streamed                      2 B G T p d     2 B G T p d                       ours: convolutions (patches.py)
    flash     B G T (T + 1) (p + d)               2 B G T p d                       ours: outer by kernels (kernels.py)
    tiled                         2 B G T p d     2 B G T p d                       ours: the same

* Cut into bands (forms.bands), the matrices need only the blocks on and above the diagonal: 5/8 for four of them.
Of the symmetric Gram matrices `flash` counts pairs t <= s alone, although its tiles on the diagonal are formed whole.
A single use at one position (T = 1) needs no Gram: its norm is the product of two norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from dpcompile.patches import CHUNK
from dpcompile.plan import Cost, Method
from dpcompile.shapes import B, C, D, G, P, T, U

ZERO = sympy.Integer(0)
Bands = Sequence[tuple[int, int]]


def outer(e: int, positions: int, *, doubled: bool, bands: Bands) -> tuple[Cost, dict[Method, Cost]]:
    """`doubled`: products of the positions are added up in float64 (forms.doubled); `bands`: of Gram matrices."""
    contraction, read = 2 * B * G * T * P * D, B * G * T * (P + D)
    weights, kept = G * P * D, B * G * P * D
    plain = Cost(contraction, e * (read + weights), ZERO, ZERO)
    formed = blocks(bands, positions)
    pairs = B * G * T**2 if positions > 1 else ZERO
    gram = 2 * pairs * sum(formed) * (P + D)
    squares = (2 if doubled else 1) * pairs
    copies, made = (2 * read, 2 * kept) if doubled else (ZERO, kept)
    booked = e * B * G * T * P  # the output gradient waits for the clip factors
    rescale = 2 * B * G * T * sympy.Min(P, D)
    options = {
        Method.GHOST: Cost(
            gram + contraction,
            e * (2 * read + 4 * copies + 6 * squares * sum(formed) + rescale + weights),
            e * (3 * squares * max(formed) + copies),
            booked,
        ),
        Method.EXPLICIT: Cost(
            2 * contraction, e * (2 * read + 4 * copies + 4 * made + rescale + weights), e * (made + copies), booked
        ),
        Method.KEPT: Cost(contraction + 2 * kept, e * (read + 5 * kept + weights), e * kept, e * kept),
    }
    return plain, options


def blocks(bands: Bands, positions: int) -> list[sympy.Expr]:
    """Parts of a Gram matrix that are formed, one after the other: on the diagonal, and behind each band of it."""
    if len(bands) == 1:
        return [sympy.Integer(1)]
    areas = [(stop - start) * size for start, stop in bands for size in (stop - start, positions - stop) if size]
    return [sympy.Rational(area, positions**2) for area in areas]


def overlapping(e: int, kernel: tuple[int, ...], *, doubled: bool, together: bool, padded: bool) -> dict[Method, Cost]:
    """Of a convolution whose patches are not written out: options beside those of `outer`.

    `together`: kernels' gradients of all samples are one call (patches.by_kernel, patches.together); `padded`: of an
    image that is copied first.
    """
    contraction, read = 2 * B * G * T * P * D, B * G * (T * P + U * C)
    weights, kept = G * P * D, B * G * P * D
    gram = 2 * B * G * (U**2 * C + T**2 * P)
    wide = 2 if doubled else 1
    squares = wide * B * G * ((5 + 2 * sum(kernel)) * T**2 + 2 * U**2)
    copies = 2 * read if doubled else sympy.Integer(0)
    booked = e * B * G * T * P
    copied = B * G * U * C if padded else ZERO
    return {
        Method.SHIFTED: Cost(
            gram + contraction,
            e * (2 * read + 4 * copies + squares + weights),
            e * (wide * B * G * (2 * T**2 + 2 * U**2) + copies),
            booked,
        ),
        Method.LOOPED: Cost(
            contraction + 2 * kept,
            e * (read + (4 if together else 8) * kept + weights),
            e * (kept + copied),
            e * kept,
            sympy.Integer(1) if together else B,
        ),
        Method.STREAMED: Cost(
            2 * contraction,
            e * (2 * read + (4 if together else 8) * kept + weights),
            e * sympy.Max(sympy.Integer(CHUNK), G * P * D),
            booked,
            sympy.Integer(2) if together else 2 * B,
        ),
    }


def tiled(e: int, *, doubled: bool) -> dict[Method, Cost]:
    """By kernels, of several positions: options beside those of `outer`. Partial sums are too few to count."""
    contraction, read = 2 * B * G * T * P * D, B * G * T * (P + D)
    gram = B * G * T * (T + 1) * (P + D)
    copies = 2 * read if doubled else ZERO  # for the clipped sum alone
    rescale = 2 * B * G * T * sympy.Min(P, D)
    moved = e * (3 * read + 2 * copies + rescale + G * P * D)  # read for norms of positions, by the kernel, for the sum
    norms, booked = 2 * e * B * G * T, e * B * G * T * P
    return {
        Method.FLASH: Cost(gram + contraction, moved, norms, booked),
        Method.TILED: Cost(2 * contraction, moved, norms, booked),
    }


def gathered(options: dict[Method, Cost], e: int, *, padded: bool) -> dict[Method, Cost]:
    """Those of `tiled` whose columns are found in an image: it is read, and each column is put into cache once."""
    columns, pixels = e * B * G * T * D, e * B * G * U * C
    copied = pixels if padded else ZERO
    return {
        m: replace(c, bytes=c.bytes - 2 * columns + pixels + 2 * copied, transient=c.transient + copied)
        for m, c in options.items()
    }


def patched(options: dict[Method, Cost], e: int) -> dict[Method, Cost]:
    """Options of `outer` for which patches are written out: strided copies, at about a third of the bandwidth."""
    size = e * B * G * T * D
    return {m: replace(c, bytes=c.bytes + 6 * size, transient=c.transient + size) for m, c in options.items()}


def onehot(e: int, *, alone: bool) -> tuple[Cost, dict[Method, Cost]]:
    """`alone`: no dense gradient is added, so that explicit norms are those of segment sums (forms.segment_sums)."""
    read, table, kept = B * T * D, P * D, B * P * D
    sums, places = (read, 8 * 16 * B * T) if alone else (kept, ZERO)  # written twice and read twice; sorted places
    plain = Cost(ZERO, e * (read + table), ZERO, ZERO)
    options = {
        Method.GHOST: Cost(2 * B * T**2 * D, e * (4 * read + 4 * B * T**2 + table), e * 3 * B * T**2, e * read),
        Method.EXPLICIT: Cost(ZERO, e * (4 * read + 4 * sums + table) + places, e * 2 * sums + places / 4, e * read),
        Method.KEPT: Cost(2 * kept, e * (2 * read + 5 * kept + table), e * kept, e * kept),
    }
    return plain, options


def explicit(e: int) -> tuple[Cost, dict[Method, Cost]]:
    size = B * G * P * D
    plain = Cost(ZERO, e * B * G * T * P * D, ZERO, ZERO)
    cost = Cost(2 * size, e * (B * G * T * P * D + 4 * size), e * size, e * size)
    return plain, {Method.GHOST: cost, Method.EXPLICIT: cost, Method.KEPT: cost}


def pulled(e: int, norm: sympy.Expr, plain: sympy.Expr, numel: int) -> tuple[Cost, dict[Method, Cost]]:
    """Carrying per-sample gradients through what computes a value: flops counted on the traced functions, in B."""
    cost = Cost(norm + 2 * B * numel, e * 5 * B * numel, e * B * numel, e * B * numel)
    return Cost(plain, e * numel * sympy.Integer(1), ZERO, ZERO), {Method.KEPT: cost}


def unkept(options: dict[Method, Cost], e: int, *, scattered: bool) -> dict[Method, Cost]:
    """Options of a further part of a group: kept gradients of all parts are one tensor, summed once.

    `scattered`: of this part and those before, all but one are scattered into it; others are made and then added.
    """
    kept = B * G * P * D
    return {
        m: replace(
            c,
            flops=c.flops - 2 * kept,
            bytes=c.bytes - e * 3 * kept,
            transient=ZERO if scattered else c.transient,
            held=ZERO,
        )
        if m.keeps
        else c
        for m, c in options.items()
    }


def cross(e: int, T_left: int, T_right: int) -> tuple[Cost, dict[Method, Cost]]:
    """Look-up at T_left positions with a product at T_right positions, both on one table."""
    pairs = B * T_left * T_right
    nothing = Cost(ZERO, ZERO, ZERO, ZERO)
    ghost = Cost(2 * pairs * D, e * (B * (T_left + T_right) * D + 5 * pairs), e * 3 * pairs, ZERO)
    return nothing, {Method.GHOST: ghost, Method.EXPLICIT: nothing, Method.KEPT: nothing}
