"""Per-sample gradients in factored or explicit form, and everything that follows from the form alone.

For sample i and one use of a parameter value the gradient is

    Outer     G_i = sum_t rows[i,t] (x) cols[i,t]                 linear, convolution, matmul (one block per group)
    OneHot    the same with rows[i,t] = unit vector index[i,t]    embedding
    Explicit  G_i itself, [B, *shape]                             biases, norm layers, other small or odd values

Inner products of two forms give norms and cross terms of weights used more than once (Book-Keeping, arXiv:2210.00038,
eq. 3; the tied case adds 2 <G_embedding, G_head>). A form speaks of the dimensions of the parameter value: `row_dims`
and `col_dims` say which of them its two factors span, so that a use of W and a use of W.T meet in one space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

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


Form = Outer | OneHot | Explicit


def transposed(form: Form, permutation: Dims) -> Form:
    """The form seen from a value v = w.permute(permutation), carried back to w."""
    if permutation == tuple(range(len(permutation))):
        return form
    inverse = tuple(sorted(range(len(permutation)), key=permutation.__getitem__))
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


def spans(form: Form) -> tuple[int, Dims, frozenset[Dims]] | None:
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
    if isinstance(form, OneHot):
        batch, length, width = form.cols_BTd.shape
        rows = form.shape[form.row_dims[0]]
        index_BTd = form.index_BT.unsqueeze(-1).expand(batch, length, width)
        grad = form.cols_BTd.new_zeros(batch, rows, width).scatter_add(1, index_BTd, form.cols_BTd)
        return _to_shape(grad, form, batched=True)
    blocks = form.rows_BGTp.flatten(0, 1).transpose(1, 2) @ form.cols_BGTd.flatten(0, 1)
    return _to_shape(blocks.unflatten(0, form.rows_BGTp.shape[:2]), form, batched=True)


def _to_shape(blocks: torch.Tensor, form: Outer | OneHot, *, batched: bool) -> torch.Tensor:
    """Blocks [(B,) (G,) rows, cols] as a tensor of the value's shape."""
    order = (form.group_dims if isinstance(form, Outer) else ()) + form.row_dims + form.col_dims
    lead = [blocks.shape[0]] if batched else []
    inverse = sorted(range(len(order)), key=order.__getitem__)
    shaped = blocks.reshape(lead + [form.shape[i] for i in order])
    skip = len(lead)
    return shaped.permute(*range(skip), *(skip + i for i in inverse))


def sq_norm(grad: torch.Tensor) -> torch.Tensor:
    """[B] squared norms of explicit gradients. `square().sum()`: vector_norm is too small on large CPU tensors."""
    squares = _accurate(grad).square()
    return squares.flatten(1).sum(1) if grad.dim() > 1 else squares


def _accurate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


# ------------------------------------------------------------------ ghost


def ghost_sq_norm(forms: Sequence[Outer | OneHot]) -> torch.Tensor:
    """[B] squared norm of the sum of all forms, none of them made explicit: sum_kl <G_k, G_l>."""
    factored: list[Outer | OneHot] = []
    for form in merge(forms):
        assert not isinstance(form, Explicit), "explicit gradients have no ghost norm"
        factored.append(form)
    total = inner(factored[0], factored[0])
    for k, left in enumerate(factored):
        if k:
            total = total + inner(left, left)
        for right in factored[k + 1 :]:
            total = total + 2 * inner(left, right)
    return total.clamp(min=0)  # a sum of squares; rounding of cancelling positions can leave it below zero


def merge(forms: Sequence[Form]) -> list[Form]:
    """Forms of equal kind concatenated along T: a weight used k times is one use with k times the positions."""
    out: list[Form] = []
    for group in _alike(forms):
        first = group[0]
        if len(group) == 1:
            out.append(first)
        elif isinstance(first, Outer):
            same = [form if form.row_dims == first.row_dims else _swapped(form) for form in group]
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
            total = first.grad
            for form in group[1:]:
                total = total + form.grad
            out.append(Explicit(total))
    return out


def _alike(forms: Sequence[Form]) -> list[list]:
    kinds: dict[object, list] = {}
    for form in forms:
        kinds.setdefault((type(form), spans(form)), []).append(form)
    return list(kinds.values())


def _swapped(form: Outer) -> Outer:
    return replace(
        form, rows_BGTp=form.cols_BGTd, cols_BGTd=form.rows_BGTp, row_dims=form.col_dims, col_dims=form.row_dims
    )


def inner(left: Outer | OneHot, right: Outer | OneHot) -> torch.Tensor:
    """[B] inner product of two factored gradients: sum_ts <rows_t, rows'_s> <cols_t, cols'_s>."""
    if spans(left) != spans(right):  # one weight read in two ways that share no factor
        return (_accurate(explicit(left)) * _accurate(explicit(right))).flatten(1).sum(1)
    if isinstance(left, Outer) and isinstance(right, Outer):
        if left is right and left.rows_BGTp.shape[2] == 1:
            return (
                (sq_norm(left.rows_BGTp.flatten(0, 1)) * sq_norm(left.cols_BGTd.flatten(0, 1)))
                .unflatten(0, left.rows_BGTp.shape[:2])
                .sum(1)
            )
        other = right if right.row_dims == left.row_dims else _swapped(right)
        rows = _gram(left.rows_BGTp.flatten(0, 1), other.rows_BGTp.flatten(0, 1))
        cols = _gram(left.cols_BGTd.flatten(0, 1), other.cols_BGTd.flatten(0, 1))
        return (rows * cols).sum((1, 2)).unflatten(0, left.rows_BGTp.shape[:2]).sum(1)
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        same = left.index_BT.unsqueeze(2) == right.index_BT.unsqueeze(1)
        return (_gram(left.cols_BTd, right.cols_BTd) * same).sum((1, 2))
    if isinstance(left, Outer):
        return inner(right, left)
    assert isinstance(right, Outer)
    dense = right if right.row_dims == left.row_dims else _swapped(right)
    rows_BSV, cols_BSd = dense.rows_BGTp.squeeze(1), dense.cols_BGTd.squeeze(1)
    index_BST = left.index_BT.unsqueeze(1).expand(-1, rows_BSV.shape[1], -1)
    picked_BST = _accurate(rows_BSV.gather(2, index_BST))
    return (picked_BST * _gram(cols_BSd, left.cols_BTd)).sum((1, 2))


def _gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return _accurate(left) @ _accurate(right).transpose(1, 2)


# ------------------------------------------------------------------ clipped sums


def weighted_sum(form: Form, weight_B: torch.Tensor) -> torch.Tensor:
    """sum_i weight_i G_i, of the value's shape, as one GEMM: (weight * rows)^T cols."""
    if isinstance(form, Explicit):
        return weighted_sum_kept(form.grad, weight_B)
    if isinstance(form, OneHot):
        scaled = form.cols_BTd * weight_B.to(form.cols_BTd.dtype)[:, None, None]
        rows = form.shape[form.row_dims[0]]
        total = scaled.new_zeros(rows, scaled.shape[-1]).index_add(0, form.index_BT.flatten(), scaled.flatten(0, 1))
        return _to_shape(total, form, batched=False)
    rows, cols = form.rows_BGTp, form.cols_BGTd
    weight = weight_B.to(rows.dtype)[:, None, None, None]
    if rows.shape[-1] <= cols.shape[-1]:
        rows = rows * weight
    else:
        cols = cols * weight
    if rows.shape[1] == 1:
        total = rows.flatten(0, 2).transpose(0, 1) @ cols.flatten(0, 2)
    else:
        total = rows.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ cols.transpose(0, 1).flatten(1, 2)
    return _to_shape(total, form, batched=False)


def weighted_sum_kept(grad: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
    """sum_i weight_i G_i from per-sample gradients that were kept: 2 B p d flops."""
    flat = grad.flatten(1) if grad.dim() > 1 else grad.unsqueeze(1)
    total = weight_B.to(grad.dtype).unsqueeze(0) @ flat
    return total.reshape(grad.shape[1:])
