"""Convolutions of a compiled graph on a CPU, in the layout that their images have.

Inductor puts every tensor of a graph that has `aten.convolution` on a CPU into channels-last layout. Samples of a
private step are read one by one, as rows of patches or as images of their own, and each such reading would copy. The
op below is the same convolution under a name of its own, which leaves the layout alone; passes/keep_layouts.py puts
`convolution` in the place of the ATen op.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


@torch.library.custom_op("dpcompile::convolution", mutates_args=())
def _convolution(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> torch.Tensor:
    return aten.convolution(image, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@_convolution.register_fake
def _(*arguments: Any) -> torch.Tensor:
    return aten.convolution(*arguments)


def convolution(image: torch.Tensor, *others: Any) -> torch.Tensor:
    """`aten.convolution`; under torch.compile on a CPU the op of this file."""
    if torch.compiler.is_compiling() and image.device.type == "cpu":
        return _convolution(image, *others)
    return aten.convolution(image, *others)
