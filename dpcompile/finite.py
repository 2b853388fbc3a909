"""Samples whose gradient is not finite: their part of a clipped sum is zero, whatever NaN or infinity stands in it.

A clip factor of zero is not enough, since 0 * NaN is NaN and a matrix product adds samples up. While a graph is built
the op below stands where rows have to be cleared; passes/spare_masks.py then puts `finite_rows` in its place, which in
an eager call copies nothing as long as all samples are finite.
"""

from __future__ import annotations

import torch

from dpcompile.opaque import opaque


@torch.library.custom_op("dpcompile::finite_rows", mutates_args=())
def _finite_rows(tensor: torch.Tensor, finite_B: torch.Tensor) -> torch.Tensor:
    return cleared(tensor, finite_B)


@_finite_rows.register_fake
def _(tensor: torch.Tensor, finite_B: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


OP = torch.ops.dpcompile.finite_rows.default


def cleared(tensor: torch.Tensor, finite_B: torch.Tensor) -> torch.Tensor:
    """The tensor [B, ...] with zeros for the samples that are not finite."""
    return torch.where(finite_B.reshape(-1, *(1 for _ in tensor.shape[1:])), tensor, 0)


def unless_all(finite_B: torch.Tensor) -> torch.Tensor | None:
    """The mask; None if all samples are finite, which an eager call can look at."""
    if torch.compiler.is_compiling():
        return finite_B
    return None if bool(finite_B.all()) else finite_B


def finite_rows(tensor: torch.Tensor, mask_B: torch.Tensor | None) -> torch.Tensor:
    """The tensor itself where there is nothing to clear."""
    return tensor if mask_B is None else cleared(tensor, mask_B)


def product(left_pn: torch.Tensor, right_nd: torch.Tensor, mask_B: torch.Tensor | None) -> torch.Tensor:
    """[p, d] left @ right over the positions n = B T of all samples but those to be cleared; on a CPU without copies.

    Under a compiler too, which cannot look whether there are any, but has an op that does.
    """
    if mask_B is None:
        return torch.mm(left_pn, right_nd)
    if torch.compiler.is_compiling():
        return PRODUCT(left_pn, right_nd, mask_B)
    mask_n = mask_B.unsqueeze(1).expand(-1, right_nd.shape[0] // mask_B.shape[0]).reshape(-1)
    return torch.mm(torch.where(mask_n, left_pn, 0), cleared(right_nd, mask_n))


def _product(left_pn: torch.Tensor, right_nd: torch.Tensor, finite_B: torch.Tensor) -> torch.Tensor:
    return product(left_pn, right_nd, None if bool(finite_B.all()) else finite_B)


PRODUCT = opaque(
    "finite_product(Tensor left_pn, Tensor right_nd, Tensor finite_B) -> Tensor",
    _product,
    lambda left_pn, right_nd, finite_B: torch.mm(left_pn, right_nd),
)


def weighted_rows(weight_1B: torch.Tensor, values_Bn: torch.Tensor, mask_B: torch.Tensor | None) -> torch.Tensor:
    """[1, n] weight @ values without the rows to be cleared; a compiler goes through them once and copies nothing."""
    if mask_B is None:
        return torch.mm(weight_1B, values_Bn)
    if not torch.compiler.is_compiling():
        return torch.mm(weight_1B, cleared(values_Bn, mask_B))
    return torch.where(mask_B.unsqueeze(1), weight_1B.mT * values_Bn, 0).sum(0, keepdim=True)
