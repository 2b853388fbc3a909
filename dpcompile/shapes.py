"""The notation of dpcompile, in one place: paper letters, sizes and the moves of a batch axis.

| letter | meaning                                                            | papers (2205.10683, 2210.00038) |
|--------|--------------------------------------------------------------------|---------------------------------|
| B      | samples in the batch                                               | B                               |
| T      | positions at which one sample uses a weight                        | T, or H_out * W_out             |
| d      | input features of a use (for a convolution C_in / groups * kernel) | d, D                            |
| p      | output features of a use (per group)                               | p                               |
| G      | groups: independent blocks of one weight                           | -                               |
| C, U   | of a convolution: channels of a group, positions of the padded image | -                             |
| R      | max_grad_norm, the clipping threshold                              | R                               |
| a, g   | activation (input of a use), gradient of its output                | a, ds/do                        |

Tensors carry their shape in their name: `rows_BGTp`, `sq_norm_B`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from dpcompile.ir import Axis, Size
from dpcompile.torch_internals import symbolic_size

B, T, D, P, G, C, U = (sympy.Symbol(letter, integer=True, positive=True) for letter in "BTdpGCU")


def at(expression: sympy.Expr, sizes: Mapping[sympy.Symbol, int]) -> sympy.Expr:
    """The expression with sizes put in."""
    return sympy.sympify(expression).subs(list(sizes.items()))


def hint(size: Any) -> Any:
    """The number that a size is for the sample: what choices look at. Comparing the size itself would fix it."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat)) else size


def size_of(size: int | torch.SymInt) -> Size:
    """A size as an int or a sympy expression; comparing SymInts themselves would add guards to the graph."""
    return size if isinstance(size, int) else plain_size(size.node.expr)


def number(size: torch.SymInt | torch.SymFloat, batch: torch.SymInt, batch_size: int) -> int | float:
    """What a size is at a batch size; of a graph without other free sizes."""
    expr = sympy.sympify(size.node.expr).subs(batch.node.expr, batch_size)
    return int(expr) if isinstance(size, torch.SymInt) else float(expr)


def plain_size(expr: sympy.Expr) -> Size:
    return int(expr) if expr.is_Integer else expr


def is_one(size: int | torch.SymInt) -> bool:
    """Of a size that is written as 1; a free length is not, whatever it is for a sample."""
    return isinstance(size, int) and size == 1


def count(size: Size, shown: int | torch.SymInt) -> int | torch.SymInt:
    """A size as the number that it is in a trace, of which another size is shown."""
    if isinstance(size, int):
        return size
    assert isinstance(shown, torch.SymInt)
    return symbolic_size(size, shown)


def unfolded(axis: Axis, tensor: torch.Tensor) -> tuple[int | torch.SymInt, ...]:
    """The sizes (outer, B, inner) that dimension `axis.dim` of a batched tensor is folded from."""
    return unfolded_size(axis, tensor.shape[axis.dim])


def unfolded_size(axis: Axis, size: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
    """The same for the size itself."""
    outer, inner = count(axis.outer, size), count(axis.inner, size)
    return outer, size // (outer * inner), inner


def unfold_batch(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensor with its batch axis as a dimension of its own: [..., outer, B, inner, ...] where it was folded."""
    return tensor.unflatten(axis.dim, unfolded(axis, tensor)) if axis.folded else tensor


def batch_first(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensor with the batch as dimension 0; folded factors stay behind as dimensions of their own."""
    unfolded = unfold_batch(tensor, axis)
    return unfolded.movedim(axis.dim + 1 if axis.folded else axis.dim, 0)
