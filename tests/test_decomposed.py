"""One plain trace against `run_decompositions`, which it stands for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Apply
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dpcompile.cells import CELLS, LAYERS
from dpcompile.decomposed import decomposed
from dpcompile.torch_internals import composed_by, symbolic_batch

TABLE = LAYERS | CELLS


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(4))
        self.scale = torch.arange(4.0)  # neither a parameter nor a buffer
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        y = self.linear(x * self.scale) - self.shift
        return y.flatten(), None, y.unflatten(1, (2, 2)).diff()


class Root(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def functional() -> list[nn.Module]:
    dropped = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.0))
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    attention = Apply(lambda m, x: m.encoder(x.unsqueeze(1)).squeeze(1), modules={"encoder": encoder})
    recurrent = Apply(lambda m, x: m.rnn(x.unsqueeze(2))[0][:, -1], modules={"rnn": nn.LSTM(1, 3, batch_first=True)})
    return [Constant(), dropped, attention, recurrent]


def writing() -> list[nn.Module]:
    def in_place(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        y[:, 0] += 1.0
        return y.relu_()

    def narrow(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.linear(x)

    def stopped(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = m.linear(x).exp()
        return m.linear(x) * weight

    counting = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return [counting, *(Apply(run, modules={"linear": nn.Linear(4, 4)}) for run in (in_place, narrow, stopped))]


def exported(model: nn.Module) -> ExportedProgram:
    with symbolic_batch(), composed_by(LAYERS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(Root(model), (torch.randn(7, 4),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)


def written(program: ExportedProgram) -> list[Any]:
    """Every op with its arguments, shapes and source; sizes, of which traces have more or fewer nodes, as symbols."""
    names: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        value = node.meta.get("val")
        return str(value) if isinstance(value, torch.SymInt) else names[node]

    found: list[Any] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            continue
        names[node] = f"%{len(names)}"
        called = node.name if node.op == "placeholder" else str(node.target)
        args = str(fx.node.map_arg((node.args, dict(node.kwargs)), name)).replace("'", "")
        source = (node.meta.get("stack_trace"), str(node.meta.get("nn_module_stack")))
        shapes = [(x.shape, x.stride(), x.dtype) for x in torch.utils._pytree.tree_leaves(value) if torch.is_tensor(x)]
        found.append((called, args, str(shapes), source if node.op == "call_function" else None))
    return found


def with_signature(program: ExportedProgram) -> tuple[Any, ...]:
    signature = program.graph_signature
    inputs = [(spec.kind, spec.target, str(spec.arg)) for spec in signature.input_specs]
    outputs = [(spec.kind, spec.target, type(spec.arg)) for spec in signature.output_specs]
    return inputs, outputs, list(program.constants)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model", functional())
def test_it_is_what_run_decompositions_gives(model: nn.Module, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        program = exported(model)
        with symbolic_batch():
            made, expected = decomposed(program, TABLE), program.run_decompositions(dict(TABLE))
    assert written(made) == written(expected)
    assert with_signature(made) == with_signature(expected)


@pytest.mark.parametrize(("models", "traces"), [(functional, 0), (writing, 1)])
def test_only_what_writes_or_has_regions_is_traced_twice(
    models: Callable[[], list[nn.Module]], traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    whole = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, table: Any) -> ExportedProgram:
        calls.append(table)
        return whole(self, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    for model in models():
        program = exported(model)
        calls.clear()
        with symbolic_batch():
            decomposed(program, TABLE)
        assert len(calls) == traces
