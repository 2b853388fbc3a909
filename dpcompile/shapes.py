"""The notation of dpcompile, in one place: paper letters, sizes and the moves of a batch axis.

| letter | meaning                                                            | papers (2205.10683, 2210.00038) |
|--------|--------------------------------------------------------------------|---------------------------------|
| B      | samples in the batch                                               | B                               |
| T      | positions at which one sample uses a weight                        | T, or H_out * W_out             |
| d      | input features of a use (for a convolution C_in / groups * kernel) | d, D                            |
| p      | output features of a use (per group)                               | p                               |
| G      | groups: independent blocks of one weight                           | -                               |
| R      | max_grad_norm, the clipping threshold                              | R                               |
| a, g   | activation (input of a use), gradient of its output                | a, ds/do                        |

Tensors carry their shape in their name: `rows_BGTp`, `sq_norm_B`.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from dpcompile.ir import Axis

B, T, D, P, G = (sympy.Symbol(letter, integer=True, positive=True) for letter in ("B", "T", "d", "p", "G"))


def at(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> sympy.Expr:
    """The expression with sizes put in."""
    return sympy.sympify(expression).subs(list(sizes.items()))


def unfold_batch(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensor with its batch axis as a dimension of its own: [..., outer, B, inner, ...] where it was folded."""
    if not axis.folded:
        return tensor
    size = tensor.shape[axis.dim] // (axis.outer * axis.inner)
    return tensor.unflatten(axis.dim, (axis.outer, size, axis.inner))


def batch_first(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensor with the batch as dimension 0; folded factors stay behind as dimensions of their own."""
    unfolded = unfold_batch(tensor, axis)
    return unfolded.movedim(axis.dim + 1 if axis.folded else axis.dim, 0)
