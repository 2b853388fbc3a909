"""One private step of other libraries on the same model: Opacus with hooks and with ghost norms, vmap(grad) compiled.

Each takes a copy of the model, since hooks stay on it. A peer that cannot take a model raises; the table says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Workload

PEERS = ("opacus-hooks", "opacus-ghost", "vmap-compiled")

Step = Callable[[], Tensor]


def peer_step(
    workload: Workload, model: nn.Module, batch: tuple[Any, Tensor], peer: str, bound: float
) -> tuple[Step, nn.Module]:
    """A function that runs one step of the peer, and the copy of the model in whose `p.grad` it leaves its result."""
    model = copy.deepcopy(model)
    make = {"opacus-hooks": _opacus_hooks, "opacus-ghost": _opacus_ghost, "vmap-compiled": _vmap_compiled}[peer]
    return make(workload, model, batch, bound), model


def _opacus_hooks(workload: Workload, model: nn.Module, batch: tuple[Any, Tensor], bound: float) -> Step:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    inputs, targets = batch
    module = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=len(targets),
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = workload.loss(module(inputs), targets).mean()
        loss.backward()
        optimizer.pre_step()
        return loss

    return step


def _opacus_ghost(workload: Workload, model: nn.Module, batch: tuple[Any, Tensor], bound: float) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    inputs, targets = batch
    module = GradSampleModuleFastGradientClipping(model, max_grad_norm=bound)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=len(targets),
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = DPTensorFastGradientClipping(module, optimizer, workload.loss(module(inputs), targets))
        loss.backward()
        optimizer.pre_step()
        return loss.detach()

    return step


def _vmap_compiled(workload: Workload, model: nn.Module, batch: tuple[Any, Tensor], bound: float) -> Step:
    inputs, targets = batch
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
        return workload.loss(outputs, y.unsqueeze(0)).sum()

    @torch.compile(fullgraph=True)
    def clipped(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grads, losses = torch.func.vmap(torch.func.grad_and_value(loss_of_one), (None, 0, 0))(
            parameters, inputs, targets
        )
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
        factors = (bound / norms).clamp(max=1.0) / len(targets)
        return {name: torch.tensordot(factors, grad, 1) for name, grad in grads.items()}, losses.mean()

    def step() -> Tensor:
        grads, loss = clipped(parameters, inputs, targets)
        for name, parameter in model.named_parameters():
            if name in grads:
                parameter.grad = grads[name]
        return loss

    return step
