"""Per-sample gradients in factored or explicit form, and everything that follows from the form alone.

For sample i and one use of a parameter value the gradient is

    Outer     G_i = sum_t rows[i,t] (x) cols[i,t]                 linear, convolution, matmul (one block per group)
    OneHot    the same with rows[i,t] = unit vector index[i,t]    embedding
    Patched   Outer whose columns are patches of an image         convolution (patches.py), unless they are written out
    Explicit  G_i itself, [B, *shape]                             biases, norm layers, other small or odd values

Inner products of two forms give norms and cross terms of weights used more than once (certified.py). A form speaks of
the dimensions of the parameter value: `row_dims` and `col_dims` say which of them its two factors span, so that a use
of W and a use of W.T meet in one space.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dpcompile import finite
from dpcompile.patches import Window, kernel_gradient, kernel_gradients, kernel_sum, patches
from dpcompile.shapes import hint

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    rows_BGTp: torch.Tensor
    cols_BGTd: torch.Tensor
    shape: tuple[int, ...]  # of the parameter value
    row_dims: Dims
    col_dims: Dims
    group_dims: Dims = ()  # value dimensions that index the groups (a convolution's groups are part of its row dim)


@dataclass(frozen=True)
class OneHot:
    index_BT: torch.Tensor  # row of the value that position t uses
    cols_BTd: torch.Tensor
    shape: tuple[int, ...]
    row_dims: Dims = (0,)
    col_dims: Dims = (1,)


@dataclass(frozen=True)
class Explicit:
    grad: torch.Tensor  # [B, *shape]


@dataclass(frozen=True)
class Patched:
    rows: torch.Tensor  # [B, G p, *positions]
    image: torch.Tensor  # [B, G d / k, *sizes]
    window: Window
    shape: tuple[int, ...]  # of the parameter value: its first dimension is that of the rows


Form = Outer | OneHot | Explicit | Patched

CROWD = 32
"""Positions up to which rounding in float32 is small against a norm, whatever the data do."""


def crowded(positions: int | torch.SymInt, p: int, d: int) -> bool:
    """Whether one sample uses a weight at more positions than Gram matrices are made for (2 T^2 > p d)."""
    return hint(positions) > CROWD and 2 * hint(positions) ** 2 > hint(p) * hint(d)


BANDS, WIDE = 4, 128
"""Most bands that Gram matrices are cut into on a CPU, and positions that each has at least.

Products of narrower ones are so much slower that what symmetry saves is lost (ViT, T = 197: 1.34 of plain training
with four bands, 1.25 with one).
"""


def bands(positions: int | torch.SymInt, device: torch.device) -> tuple[tuple[int, int], ...]:
    """Where each band of positions begins and ends. A Gram matrix is symmetric: a band needs itself and what follows.

    One band where the length is free, or where kernels.py forms the matrices.
    """
    if not isinstance(positions, int) or positions < 2 * WIDE or device.type != "cpu":
        return ((0, -1),)
    count = min(positions // WIDE, BANDS)
    edges = [i * positions // count for i in range(count + 1)]
    return tuple(itertools.pairwise(edges))


def doubled(form: Outer | OneHot | Patched) -> bool:
    """Of float32 factors whose products are added up in float64: positions of a crowd cancel, their errors add up."""
    if isinstance(form, OneHot) or dtype_of(form) is not torch.float32:
        return False
    if isinstance(form, Patched):
        return crowded(length_of(form), form.shape[0] // form.window.groups, math.prod(form.shape[1:]))
    return crowded(length_of(form), form.rows_BGTp.shape[3], form.cols_BGTd.shape[3])


def dtype_of(form: Outer | OneHot | Patched) -> torch.dtype:
    if isinstance(form, Patched):
        return form.rows.dtype
    return form.cols_BTd.dtype if isinstance(form, OneHot) else form.rows_BGTp.dtype


def length_of(form: Outer | OneHot | Patched) -> int | torch.SymInt:
    """T: positions at which one sample uses the weight."""
    if isinstance(form, Patched):
        return math.prod(form.rows.shape[2:])
    return form.cols_BTd.shape[1] if isinstance(form, OneHot) else form.rows_BGTp.shape[2]


def written_out(form: Form) -> Outer | OneHot | Explicit:
    """The same with patches as columns in memory: prod(kernel) times the image."""
    if not isinstance(form, Patched):
        return form
    positions, columns = tuple(form.rows.shape[2:]), tuple(range(1, len(form.shape)))
    groups = form.window.groups
    rows = form.rows.reshape(form.rows.shape[0], groups, form.shape[0] // groups, math.prod(positions))
    cols = patches(form.image, form.window, positions)
    return Outer(rows.transpose(2, 3), cols.transpose(2, 3), form.shape, (0,), columns)


def in_float64(form: Outer | OneHot | Patched) -> Outer | OneHot | Patched:
    if isinstance(form, OneHot):
        return replace(form, cols_BTd=form.cols_BTd.double())
    if isinstance(form, Patched):
        return replace(form, rows=form.rows.double(), image=form.image.double())
    return replace(form, rows_BGTp=form.rows_BGTp.double(), cols_BGTd=form.cols_BGTd.double())


def transposed(form: Form, permutation: Dims) -> Form:
    """The form seen from a value v = w.permute(permutation), carried back to w."""
    if permutation == tuple(range(len(permutation))):
        return form
    inverse = tuple(sorted(range(len(permutation)), key=permutation.__getitem__))
    form = written_out(form)
    if isinstance(form, Explicit):
        return Explicit(form.grad.permute(0, *(1 + i for i in inverse)))
    moved = replace(
        form,
        shape=tuple(form.shape[i] for i in inverse),
        row_dims=tuple(permutation[i] for i in form.row_dims),
        col_dims=tuple(permutation[i] for i in form.col_dims),
    )
    if isinstance(moved, Outer):
        moved = replace(moved, group_dims=tuple(permutation[i] for i in moved.group_dims))
    return moved


def spans(form: Outer | OneHot | Explicit) -> tuple[int, Dims, frozenset[Dims]] | None:
    """What two factored forms must share to have an inner product without being made explicit."""
    if isinstance(form, Explicit):
        return None
    groups, count = (form.group_dims, form.rows_BGTp.shape[1]) if isinstance(form, Outer) else ((), 1)
    return count, groups, frozenset({form.row_dims, form.col_dims})


# ------------------------------------------------------------------ explicit


def explicit(form: Form) -> torch.Tensor:
    """[B, *shape]: the per-sample gradients themselves. 2 B T p d flops for Outer."""
    if isinstance(form, Explicit):
        return form.grad
    if isinstance(form, Patched):
        return kernel_gradients(form.rows, form.image, form.window, form.shape)
    if isinstance(form, OneHot):
        return _scattered(form, form.cols_BTd.new_zeros(form.cols_BTd.shape[0], *form.shape))
    form = _in_order(form)
    blocks = form.rows_BGTp.flatten(0, 1).transpose(1, 2) @ form.cols_BGTd.flatten(0, 1)
    return _to_shape(blocks.unflatten(0, form.rows_BGTp.shape[:2]), form, batched=True)


def explicit_sum(forms: Sequence[Form]) -> torch.Tensor:
    """[B, *shape]: the gradients of several uses, added up. Look-ups are scattered into those of the others."""
    dense = added([explicit(form) for form in forms if not isinstance(form, OneHot)] or [explicit(forms[0])])
    look_ups = [form for form in forms if isinstance(form, OneHot)]
    for form in look_ups if len(look_ups) < len(forms) else look_ups[1:]:
        same = form.cols_BTd.dtype is dense.dtype
        dense = _scattered(form, dense) if same else dense + explicit(form)
    return dense


def _scattered(form: OneHot, grad: torch.Tensor) -> torch.Tensor:
    """[B, *shape]: a gradient to which those of a look-up are added.

    From the last position to the first: in the order in which they are made, inductor would make them in the same loop,
    and hold what they are made of beside the gradient until then, which of a tied table is the peak.
    """
    order = (*form.row_dims, *form.col_dims)
    table_BVd = grad.permute(0, *(1 + dim for dim in order)).flatten(2)
    batch, rows = table_BVd.shape[:2]
    first_B1 = torch.arange(batch, device=grad.device).unsqueeze(1) * rows
    index, cols = (form.index_BT + first_B1).flip(1), form.cols_BTd.flip(1)
    added_to = table_BVd.flatten(0, 1).index_add(0, index.flatten(), cols.flatten(0, 1))
    return _to_shape(added_to.unflatten(0, (batch, rows)), form, batched=True)


def _in_order(form: Outer) -> Outer:
    """The same with rows that span the value's earlier dimensions: products of both lie in memory as it does."""
    return swapped(form) if form.row_dims > form.col_dims else form


def segment_sums(form: OneHot) -> torch.Tensor:
    """[B, T, d]: the rows of each sample's gradient that are not zero, in some order, behind them zeros.

    Positions are sorted by the row that they look up, so that no table is written.
    """
    order_BT = form.index_BT.argsort(1)
    sorted_BT = form.index_BT.gather(1, order_BT)
    starts_BT = F.pad(sorted_BT[:, 1:] != sorted_BT[:, :-1], (1, 0))
    place_BT = torch.zeros_like(order_BT).scatter(1, order_BT, starts_BT.cumsum(1))
    into_BTd = place_BT.unsqueeze(-1).expand(form.cols_BTd.shape)
    return form.cols_BTd.new_zeros(form.cols_BTd.shape).scatter_add(1, into_BTd, form.cols_BTd)


def _to_shape(blocks: torch.Tensor, form: Outer | OneHot, *, batched: bool) -> torch.Tensor:
    """Blocks [(B,) (G,) rows, cols] as a tensor of the value's shape."""
    order = (form.group_dims if isinstance(form, Outer) else ()) + form.row_dims + form.col_dims
    lead = [blocks.shape[0]] if batched else []
    inverse = sorted(range(len(order)), key=order.__getitem__)
    shaped = blocks.reshape(lead + [form.shape[i] for i in order])
    skip = len(lead)
    return shaped.permute(*range(skip), *(skip + i for i in inverse))


# ------------------------------------------------------------------ several uses


def merge(forms: Sequence[Form]) -> list[Form]:
    """Forms of equal kind concatenated along T: a weight used k times is one use with k times the positions.

    Patches of several uses are written out; those of one use stay as they are.
    """
    if len(forms) == 1:
        return list(forms)
    out: list[Form] = []
    for group in _alike(list(map(written_out, forms))):
        first = group[0]
        if len(group) == 1:
            out.append(first)
        elif isinstance(first, Outer):
            same = [form if form.row_dims == first.row_dims else swapped(form) for form in group]
            out.append(
                replace(
                    first,
                    rows_BGTp=torch.cat([form.rows_BGTp for form in same], dim=2),
                    cols_BGTd=torch.cat([form.cols_BGTd for form in same], dim=2),
                )
            )
        elif isinstance(first, OneHot):
            out.append(
                replace(
                    first,
                    index_BT=torch.cat([form.index_BT for form in group], dim=1),
                    cols_BTd=torch.cat([form.cols_BTd for form in group], dim=1),
                )
            )
        else:
            out.append(Explicit(added([form.grad for form in group])))
    return out


def added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(operator.add, parts)


def _alike(forms: Sequence[Outer | OneHot | Explicit]) -> list[list]:
    kinds: dict[object, list] = {}
    for form in forms:
        kinds.setdefault((type(form), spans(form)), []).append(form)
    return list(kinds.values())


def swapped(form: Outer) -> Outer:
    """The same with rows and columns exchanged."""
    return replace(
        form, rows_BGTp=form.cols_BGTd, cols_BGTd=form.rows_BGTp, row_dims=form.col_dims, col_dims=form.row_dims
    )


# ------------------------------------------------------------------ clipped sums


def weighted_sum(
    form: Form, weight_B: torch.Tensor, finite_B: torch.Tensor | None = None, *, streamed: bool = False
) -> torch.Tensor:
    """sum_i weight_i G_i, of the value's shape, as one GEMM: (weight * rows)^T cols. Nothing of samples not finite.

    `streamed`: of patches, by the gradients of single samples as `kernel_squares` has them.
    """
    if streamed and isinstance(form, Patched):
        rows, image = _finite(form.rows, finite_B), _finite(form.image, finite_B)
        return kernel_sum(rows, image, weight_B.to(_wide(rows.dtype)), form.window, form.shape)
    if isinstance(form, Explicit):
        return weighted_sum_kept(form.grad, weight_B, finite_B)
    if isinstance(form, OneHot):
        wide = _wide(form.cols_BTd.dtype)  # equal places are added up before anything is rounded to a narrow type
        zeros = form.cols_BTd.new_zeros(form.shape, dtype=wide)
        return _looked_up(form, zeros, weight_B, finite_B).to(form.cols_BTd.dtype)
    if doubled(form):
        return weighted_sum(in_float64(form), weight_B, finite_B).to(dtype_of(form))
    if isinstance(form, Patched):
        if not direct(form):
            return weighted_sum(written_out(form), weight_B, finite_B)
        rows, image = _finite(form.rows, finite_B), _finite(form.image, finite_B)
        return kernel_gradient(_scaled(rows, weight_B), image, form.window, form.shape)
    form = _in_order(form)
    rows, cols = _finite(form.rows_BGTp, finite_B), _finite(form.cols_BGTd, finite_B)
    if hint(rows.shape[-1]) <= IN_PLACE * hint(cols.shape[-1]):
        rows = _scaled(rows, weight_B)
    else:
        cols = _scaled(cols, weight_B)
    if rows.shape[1] == 1:
        total = rows.flatten(0, 2).transpose(0, 1) @ cols.flatten(0, 2)
    else:
        total = rows.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ cols.transpose(0, 1).flatten(1, 2)
    return _to_shape(total, form, batched=False)


def weighted_sums(
    forms: Sequence[Form], weight_B: torch.Tensor, finite_B: torch.Tensor | None = None, *, streamed: bool = False
) -> torch.Tensor:
    """The same of several uses. Look-ups are added to the sum of the others where that is in memory, and not first to
    zeros: a table is as large as a model's other parameters together.
    """
    apart = [form for form in forms if not added_onto(form, forms)]
    total = added([weighted_sum(form, weight_B, finite_B, streamed=streamed) for form in apart])
    for form in forms:
        if isinstance(form, OneHot) and added_onto(form, forms):
            total = _looked_up(form, total, weight_B, finite_B)
    return total


def added_onto(form: Form, forms: Sequence[Form]) -> bool:
    """Whether a use is a look-up that is added to the sum of dense ones: in their type, neither narrow nor doubled."""
    dense = [other for other in forms if not isinstance(other, OneHot)]
    if not isinstance(form, OneHot) or not dense or _wide(form.cols_BTd.dtype) is not form.cols_BTd.dtype:
        return False
    return all(isinstance(o, Outer) and dtype_of(o) is form.cols_BTd.dtype and not doubled(o) for o in dense)


def _looked_up(
    form: OneHot, total: torch.Tensor, weight_B: torch.Tensor, finite_B: torch.Tensor | None
) -> torch.Tensor:
    """A sum of the value's shape, to which that of a look-up is added."""
    scaled = _scaled(_finite(form.cols_BTd, finite_B), weight_B).to(total.dtype)
    table_Vd = total.permute(*form.row_dims, *form.col_dims).reshape(form.shape[form.row_dims[0]], -1)
    table_Vd = table_Vd.index_add(0, form.index_BT.flatten(), scaled.flatten(0, 1))
    return _to_shape(table_Vd, form, batched=False)


IN_PLACE = 1.5
"""Times as wide as columns, which are activations, rows may be and are scaled still: most often in their own place."""


def direct(form: Patched) -> bool:
    """Whether convolution's own backward forms the clipped sum.

    The bound on its rounding is that of a sum of products, in any order: true of the direct algorithms that torch takes
    on a CPU, but not of those (Winograd, FFT, TF32) that cuDNN may choose. Groups are exact too, but torch's own count
    of flops takes them for dense ones.
    """
    return (
        form.rows.device.type == "cpu" and form.window.groups == 1 and dtype_of(form) in (torch.float32, torch.float64)
    )


def weighted_sum_kept(grad: torch.Tensor, weight_B: torch.Tensor, finite_B: torch.Tensor | None = None) -> torch.Tensor:
    """sum_i weight_i G_i from per-sample gradients that were kept, float32 at least: 2 B p d flops."""
    wide = _wide(grad.dtype)
    total = weight_B.to(wide).unsqueeze(0) @ flat(_finite(grad, finite_B)).to(wide)
    return total.reshape(grad.shape[1:])


def flat(grad: torch.Tensor) -> torch.Tensor:
    """[B, n] of a gradient [B, ...], that of a scalar too."""
    return grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)


def _finite(tensor: torch.Tensor, finite_B: torch.Tensor | None) -> torch.Tensor:
    return tensor if finite_B is None else finite.OP(tensor, finite_B)


def _scaled(factor: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """The factor with each sample's weight, rounded once to its own type."""
    weight = weight_B.to(_wide(factor.dtype)).reshape(-1, *(1 for _ in factor.shape[1:]))
    return (factor * weight).to(factor.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A weight as large as 1 / norm does not fit into float16, and is off by a half percent in bfloat16."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
