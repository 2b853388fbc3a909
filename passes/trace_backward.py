"""trace-backward: forward and backward as one graph, in which no parameter gradient is ever formed.

The captured graph runs under make_fx with detached parameters. At every site the rule runs the op and names the
tensor whose gradient its form needs; one call of autograd.grad asks for those, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx import traceback as fx_traceback

from dpcompile.errors import DPCompileError, InvalidGraphError
from dpcompile.ir import (
    Backward,
    Input,
    InputKind,
    Kind,
    Output,
    OutputKind,
    Program,
    SiteGradient,
    Tracked,
    Uses,
    Value,
)
from dpcompile.passes.find_sites import call_of
from dpcompile.rules.sites import BY_NAME
from dpcompile.rules.sites.base import Call, Tap, bind_values
from dpcompile.seed import OP
from dpcompile.torch_internals import fake_mode_of, trace

aten = torch.ops.aten


class _Recorder(fx.Interpreter):
    """Runs the captured graph, rule by rule where parameters are used, and collects taps."""

    def __init__(self, program: Program, calls: Mapping[str, tuple[Call, str]], wanted: set[str]) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self._calls = calls
        self._wanted = wanted
        self.taps: dict[str, Tap] = {}
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self._calls:
            call, rule = self._calls[n.name]
            with fx_traceback.set_current_meta(n), self._set_current_node(n):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                bound = bind_values(n.target._schema, args, kwargs)  # type: ignore[union-attr]
                result, taps = BY_NAME[rule].run(call, bound)
            self.taps.update({f"{n.name}:{slot}": tap for slot, tap in taps.items()})
        else:
            result = super().run_node(n)
        if n.name in self._wanted:
            self.seen[n.name] = result
        return result


def trace_backward(program: Program, tracked: Tracked, uses: Uses, *, loss: bool = False) -> Backward:
    """The joint program. Placeholders: the captured ones, then one gradient for each output that a loss may use.

    With `loss` the single output is the loss itself and its gradient is known: one for each sample.

    Raises:
        DPCompileError: no output depends on a parameter.
    """
    nodes = program.nodes()
    calls = {site.node: (call_of(nodes[site.node], tracked), site.rule) for site in uses.sites}
    wanted = {leaf for value in uses.values for leaf in (*value.leaves, *value.params)}
    primals = [nodes[i.node].meta["val"] for i in program.inputs]
    results = [nodes[o.node].meta["val"] if o.node else None for o in program.outputs]
    mode = fake_mode_of(program.graph)
    tangents: dict[int, torch.Tensor] = {}
    scale = loss_scale(program, tracked) if loss else None
    if not loss:
        with mode:
            tangents = {
                i: torch.empty(
                    result.shape, dtype=result.dtype, device=result.device
                )  # the runtime makes them contiguous
                for i, (o, result) in enumerate(zip(program.outputs, results, strict=True))
                if o.kind is OutputKind.USER and isinstance(result, torch.Tensor) and result.is_floating_point()
            }
    order = [site.name for site in uses.sites]
    layout: dict[str, Any] = {}

    def joint(*flat: Any) -> list[Any]:
        given = [v.detach() if isinstance(v, torch.Tensor) else v for v in flat[: len(primals)]]
        recorder = _Recorder(program, calls, wanted)
        with torch.enable_grad(), fx_traceback.preserve_node_meta():
            outs = recorder.run(*given, enable_io_processing=False)
        taps = recorder.taps
        seeds = dict(zip(tangents, flat[len(primals) :], strict=True))
        if loss:
            at = next(i for i, o in enumerate(program.outputs) if o.kind is OutputKind.USER)
            seeds = {at: _seed(outs[at], scale, program.batch)}
        differentiable = [i for i in seeds if isinstance(outs[i], torch.Tensor) and outs[i].requires_grad]
        grads: Sequence[torch.Tensor | None] = [None] * len(order)
        if differentiable and order:
            grads = torch.autograd.grad(
                [outs[i] for i in differentiable],
                [taps[name].tensor for name in order],
                [seeds[i] for i in differentiable],
                allow_unused=True,
            )
        layout["wants"] = set(differentiable)
        layout["sites"] = [
            (name, len(taps[name].saved)) for name, grad in zip(order, grads, strict=True) if grad is not None
        ]
        flat_out = list(outs)
        for name, grad in zip(order, grads, strict=True):
            if grad is not None:
                flat_out += [*taps[name].saved, grad]
        layout["leaves"] = list(recorder.seen)
        return flat_out + [recorder.seen[name] for name in layout["leaves"]]

    module = trace(joint, *primals, *tangents.values(), mode=mode)
    if not layout["sites"]:
        names = ", ".join(i.target for i in program.inputs if i.trainable)
        raise DPCompileError(
            f"trace-backward: no output depends on a trainable parameter ({names[:200]}), so there is no gradient to "
            "clip. Look for a no_grad region, a detach or .data between them."
        )
    return _assemble(module, program, tuple(tangents), layout)


def loss_scale(program: Program, tracked: Tracked) -> str:
    """Whether the loss of the fused form is a "mean" or a "sum" over samples."""
    output = next(o for o in program.outputs if o.kind is OutputKind.USER)
    assert output.node is not None
    value = tracked.values[output.node]
    assert isinstance(value, Value)
    assert value.kind is Kind.REDUCED
    return "mean" if value.mean else "sum"


def _seed(loss: torch.Tensor, scale: str | None, batch: Any) -> torch.Tensor:
    """The gradient of the loss that makes every sample count once: a mean is multiplied back by the batch size."""
    one = OP(loss.detach())
    return one * batch if scale == "mean" else one


def _assemble(module: fx.GraphModule, program: Program, tangents: tuple[int, ...], layout: dict[str, Any]) -> Backward:
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    names = [i.node for i in program.inputs] + [f"tangent_{k}" for k in range(len(tangents))]
    for node, name in zip(placeholders, names, strict=True):
        node.target = name
        node._rename(name)
    inputs = program.inputs + tuple(
        Input(node.name, InputKind.TANGENT, str(i))
        for node, i in zip(placeholders[len(program.inputs) :], tangents, strict=True)
    )
    inputs = tuple(
        Input(node.name, i.kind, i.target, i.trainable, i.batch_dim)
        for node, i in zip(placeholders, inputs, strict=True)
    )
    result = next(iter(graph.find_nodes(op="output")))
    flat = list(result.args[0])  # type: ignore[arg-type]
    count = len(program.outputs)
    outputs = tuple(
        Output(
            node.name if isinstance(node, fx.Node) else None,
            o.kind,
            o.target,
            node if not isinstance(node, fx.Node) else None,
            i in layout["wants"],
        )
        for i, (o, node) in enumerate(zip(program.outputs, flat[:count], strict=True))
    )
    sites: dict[str, SiteGradient] = {}
    at = count
    for name, saved in layout["sites"]:
        parts = [node.name for node in flat[at : at + saved + 1]]
        sites[name] = SiteGradient(tuple(parts[:-1]), parts[-1])
        at += saved + 1
    leaves = dict(zip(layout["leaves"], (node.name for node in flat[at:]), strict=True))
    # everything of interest stays alive until the rewrites have read it; `tidy` drops the rest
    if len(flat) != at + len(leaves):
        raise InvalidGraphError("trace-backward: results do not match what was asked for")
    return Backward(replace(program, module=module, inputs=inputs, outputs=outputs), sites, leaves)
