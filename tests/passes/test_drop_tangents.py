"""Outputs that take no part in the loss: the same gradients, for less."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from selection import every
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES

from dpcompile import DPModule, dpcompile
from dpcompile.ir import OutputKind
from dpcompile.passes.drop_tangents import drop_tangents


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        self.second = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x).relu()
        return self.first(h), self.second(h), h


class TwoMaps(nn.Module):
    """The same of convolutions, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 2))
        self.second = nn.Sequential(nn.ConvTranspose2d(4, 2, 3, padding=1), nn.GELU(), nn.Conv2d(2, 2, 2, stride=2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x).relu()
        return self.first(h), self.second(h), h


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


LEFT_OUT = [(TwoHeads, (5, 3, 4), used) for used in ((0,), (1,), (2,), (0, 2), (0, 1, 2))]
LEFT_OUT += [(TwoMaps, (5, 2, 4, 4), used) for used in ((0,), (1,))]


@pytest.mark.parametrize("method", ["ghost", pytest.param("explicit", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "shape", "used"), every(3, LEFT_OUT), ids=str)
def test_gradients_are_those_of_zeros_for_the_outputs_left_out(
    kind: type[nn.Module], shape: tuple[int, ...], used: tuple[int, ...], method: str
) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(shape)
    dp_model = dpcompile(model, x, max_grad_norm=0.5, norm_method=method)

    def step(outputs: tuple[int, ...], weight: float) -> tuple[dict[str, Tensor | None], Tensor]:
        model.zero_grad()
        out = dp_model(x)
        loss = sum((out[i].square().flatten(1).sum(1).mean() for i in used), torch.zeros(()))
        (loss + weight * sum((out[i].sum() for i in outputs), torch.zeros(()))).backward()
        return grads(model), dp_model.per_sample_norms

    wanted, norms = step((0, 1, 2), 0.0)  # every output takes part, with gradients of zero
    found, found_norms = step((), 0.0)

    torch.testing.assert_close(found_norms, norms)
    for name, grad in wanted.items():
        mine = found[name]
        assert grad is not None
        torch.testing.assert_close(torch.zeros_like(grad) if mine is None else mine, grad)
    model.zero_grad()
    sum((model(x)[i].sum() for i in used), torch.zeros(())).backward()
    assert [name for name, g in grads(model).items() if g is None] == [n for n, g in found.items() if g is None]


def cost(dp_model: DPModule, loss: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        loss(dp_model).backward()
    return counter.get_total_flops()


def test_what_the_loss_leaves_out_costs_no_product() -> None:
    both, alone = TwoHeads(), TwoHeads()
    alone.forward = lambda x: alone.first(alone.body(x).relu())  # type: ignore[method-assign]
    x = torch.randn(5, 3, 4)
    forward_of_second = 2 * 5 * 3 * (8 * 6 + 6 * 2)
    spent = cost(dpcompile(both, x, norm_method="ghost"), lambda m: m(x)[0].sum())
    assert spent == cost(dpcompile(alone, x, norm_method="ghost"), lambda m: m(x).sum()) + forward_of_second


@pytest.mark.slow
def test_caches_of_a_language_model_leave_no_trace_in_the_backward() -> None:
    case = CASES["gpt2"]()
    case.model.config.use_cache = True
    dp_model = dpcompile(case.model, case.sample_input)
    program = dp_model._emitted.backward
    assert program is not None
    tangents = [i.target for i in program.inputs if i.kind.value == "tangent"]
    assert len(tangents) == 5  # logits, and keys and values of two layers

    short = drop_tangents(program, tangents[1:])

    assert short is not None
    unread = [n.name for n in short.graph.find_nodes(op="placeholder") if not n.users]
    assert {f"tangent_{i}" for i in range(1, 5)} <= set(unread)
    assert all(o.node is not None for o in short.outputs if o.kind is OutputKind.GRADIENT)
    plain = copy.deepcopy(case)
    plain.model.config.use_cache = False
    without = dpcompile(plain.model, plain.sample_input)._emitted.backward
    assert without is not None
    add = torch.ops.aten.add.Tensor
    sums = [len(p.graph.find_nodes(op="call_function", target=add)) for p in (short, without, program)]
    assert sums[0] == sums[1] < sums[2]


def test_a_stored_module_still_trains_on_part_of_its_outputs() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    x = torch.randn(5, 3, 4)
    dp_model = dpcompile(model, x, max_grad_norm=0.5)
    dp_model(x)[0].sum().backward()
    stored = pickle.loads(pickle.dumps(dp_model))
    stored.zero_grad()
    stored(x)[0].sum().backward()
    for (name, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
        if name.startswith("second"):
            assert p.grad is None
            continue
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad, p.grad)
