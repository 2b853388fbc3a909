"""Whether a criterion reduces over samples as the module was told: the gradient of one sample, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpcompile.errors import DPCompileError
from dpcompile.runtime import DPModule

TOLERANCE = 1e-3


def check_loss(dp_model: DPModule, criterion: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> None:
    """Raise where `criterion(outputs, targets)` does not reduce as `loss_reduction` says.

    In a mean over B samples each counts 1/B of what it counts alone, in a sum the same; a loss that is divided by B
    twice counts 1/B^2. A wrong factor never breaks the bound on a sample's contribution, but it moves every norm.

    Args:
        inputs: as the module is called: a tensor, a tuple or a dict, of at least two samples.
        targets: of these samples, dim 0 the batch.

    Raises:
        DPCompileError: the criterion reduces otherwise; says by which factor.
    """
    call = dp_model._emitted.call
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    leaves = call.flatten(tuple(args), inputs if isinstance(inputs, dict) else {})
    size = call.batch_size_of(leaves)
    if size < 2:
        raise ValueError(f"Expected at least two samples to compare the loss of one with that of all, got {size}.")
    one = [
        leaf if spec.batch_dim is None else leaf.narrow(spec.batch_dim, 0, call.views)
        for spec, leaf in zip(call.leaves, leaves, strict=True)
    ]
    alone = _gradient(dp_model, criterion, one, pytree.tree_map(lambda t: t[: call.views], targets), one)
    together = _gradient(dp_model, criterion, leaves, targets, one)
    found = (torch.dot(alone, together) / torch.dot(alone, alone)).item()
    wanted = 1.0 / size if dp_model._emitted.mean else 1.0
    if abs(found / wanted - 1) <= TOLERANCE:
        return
    said = "mean" if dp_model._emitted.mean else "sum"
    named = {1.0: "a sum", 1.0 / size: "a mean", 1.0 / size**2: "a mean that is divided by the batch size again"}
    what = next(
        (text for factor, text in named.items() if abs(found / factor - 1) <= TOLERANCE), "neither mean nor sum"
    )
    raise DPCompileError(
        f"check-loss: the module was compiled for loss_reduction={said!r}, but in a batch of {size} a sample counts "
        f"{found:.4g} of what it counts alone: the criterion is {what} over samples. Change one of the two."
    )


def _gradient(
    dp_model: DPModule, criterion: Callable[[Any, Any], Tensor], leaves: list[Any], targets: Any, one: list[Any]
) -> Tensor:
    """Gradient of the loss in the first sample's outputs, as one row."""
    model = dp_model.module
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            args, kwargs, _ = dp_model._emitted.call.unflatten(leaves)
            flat, spec = pytree.tree_flatten(model(*args, **kwargs))
            args, kwargs, _ = dp_model._emitted.call.unflatten(one)
            shapes = [getattr(value, "shape", ()) for value in pytree.tree_flatten(model(*args, **kwargs))[0]]
    finally:
        for module, flag in training.items():
            module.training = flag
    wanted = [isinstance(value, Tensor) and value.is_floating_point() for value in flat]
    with torch.enable_grad():
        flat = [value.detach().requires_grad_() if want else value for value, want in zip(flat, wanted, strict=True)]
        loss = criterion(pytree.tree_unflatten(flat, spec), targets)
        inputs = [value for value, want in zip(flat, wanted, strict=True) if want]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    own = [shape for shape, want in zip(shapes, wanted, strict=True) if want]
    return torch.cat([g[tuple(map(slice, shape))].flatten().double() for g, shape in zip(grads, own, strict=True)])
