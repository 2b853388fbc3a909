"""The truth about batching: run the captured graph twice and look whose data changed, at every node."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dpcompile.calls import bind_sample
from dpcompile.ir import Axis, InputKind, Kind, Program, Tracked, Value
from dpcompile.passes.capture import capture
from dpcompile.passes.track_batch import track_batch

REFUSED = re.compile(r"# refused: (.*)$")
UNINITIALISED = ("empty",)


class Lines(nn.Module):
    """A function of some tensors as a model; `self.weight` is a trainable matrix."""

    def __init__(self, fn: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.randn(6, 6))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(self, *inputs)


def tracked(model: nn.Module, sample: Any, batched: Any = None, loss: bool = False) -> tuple[Program, Tracked]:
    program = capture(model, bind_sample(model, sample, batched)).program
    return program, track_batch(program, loss=loss)


def assert_samples_apart(model: nn.Module, sample: Any, batched: Any = None, position_free: bool = True) -> Tracked:
    """No finding, and every node keeps what its Value says.

    Another value for one sample leaves the slices of all other samples bit-identical, and constants too. Without
    randomness in the graph (`position_free`), leaving the last sample out or exchanging two changes nothing for the
    others either, up to rounding.
    """
    program, found = tracked(model, sample, batched)
    assert not found.findings, "\n".join(map(str, found.findings))
    leaves = [value for value in _leaves(sample) if isinstance(value, Tensor)]
    dims = [item.batch_dim for item in program.inputs_of(InputKind.USER) if item.batch_dim is not None]
    size = leaves[0].shape[dims[0]]
    before = _run(program, model, leaves)
    other = [_with_sample(leaf, dim, size // 2) for leaf, dim in zip(leaves, dims, strict=True)]
    keep = [i for i in range(size) if i != size // 2]
    _compare(program, found, before, _run(program, model, other), keep, keep, exact=True)
    if position_free:
        order = [*range(1, size - 1), 0]
        for leaf_order in (list(range(size - 1)), order):
            chosen = [leaf.index_select(d, torch.tensor(leaf_order)) for leaf, d in zip(leaves, dims, strict=True)]
            after = _run(program, model, chosen)
            _compare(program, found, before, after, leaf_order, list(range(size - 1)), exact=False)
    return found


def assert_refuses_the_marked_lines(
    fn: Callable[..., Any], *sample: Tensor, modules: Mapping[str, nn.Module] | None = None, loss: bool = False
) -> None:
    """The findings are exactly the lines of `fn` marked `# refused: words of the problem`."""
    _, found = tracked(Lines(fn, **(modules or {})), sample, loss=loss)
    expected = [m[1] for line in inspect.getsource(fn).splitlines() if (m := REFUSED.search(line))]
    reported = []
    for finding in found.findings:
        mark = REFUSED.search(finding.line)
        assert mark is not None, f"not expected: {finding}"
        assert mark[1] in str(finding), f"expected {mark[1]!r}: {finding}"
        reported.append(mark[1])
    assert sorted(set(reported)) == sorted(set(expected))
    assert len({f.line for f in found.findings}) == len(expected)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.results[n.name] = super().run_node(n)
        return self.results[n.name]


def _run(program: Program, model: nn.Module, leaves: list[Tensor]) -> dict[str, Any]:
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    given, rest = [], iter(leaves)
    for item in program.inputs:
        if item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            given.append(state[item.target].detach().clone())
        else:
            given.append(program.constants[item.target] if item.kind is InputKind.CONSTANT else next(rest))
    recorder = _Recorder(program.module)
    torch.manual_seed(0)
    with torch.no_grad():
        recorder.run(*given)
    return recorder.results


def _compare(
    program: Program,
    found: Tracked,
    before: dict[str, Any],
    after: dict[str, Any],
    rows_before: list[int],
    rows_after: list[int],
    exact: bool,
) -> None:
    for node in program.graph.nodes:
        if node.op != "call_function" or any(word in node.name for word in UNINITIALISED):
            continue
        values = found.values[node.name]
        pairs = (
            zip(values, before[node.name], after[node.name], strict=True)
            if isinstance(values, tuple)
            else [(values, before[node.name], after[node.name])]
        )
        for value, a, b in pairs:
            if not isinstance(a, Tensor) or value.kind in (Kind.MIXED, Kind.REDUCED):
                continue
            a, b = rows(a, value, rows_before), rows(b, value, rows_after)
            if value.kind is Kind.ROWS:
                a, b = rows(before[node.name], value, rows_after), b
            same = torch.equal(a.nan_to_num(), b.nan_to_num()) if exact else close(a, b)
            assert same, f"{node.name} ({node.target}) is not {value}"


def close(a: Tensor, b: Tensor) -> bool:
    wide = torch.complex128 if a.is_complex() else torch.float64
    return a.shape == b.shape and torch.allclose(a.to(wide), b.to(wide), rtol=1e-3, atol=1e-4, equal_nan=True)


def rows(tensor: Tensor, value: Value, rows: list[int]) -> Tensor:
    """The slices of some samples; all of a tensor that has no batch."""
    if value.axis is None:
        return tensor
    return unfolded(tensor, value.axis).index_select(0, torch.tensor(rows))


def unfolded(tensor: Tensor, axis: Axis) -> Tensor:
    """The tensor with its batch in dimension 0."""
    size = tensor.shape[axis.dim] // (axis.outer * axis.inner)
    shape = (*tensor.shape[: axis.dim], axis.outer, size, axis.inner, *tensor.shape[axis.dim + 1 :])
    return tensor.reshape(shape).movedim(axis.dim + 1, 0)


def _with_sample(leaf: Tensor, dim: int, i: int) -> Tensor:
    """Another value for sample i: another of the leaf's own numbers where it holds integers."""
    changed = leaf.clone()
    row = changed.select(dim, i)
    row.copy_(row.flatten().roll(1).view(row.shape) if not leaf.is_floating_point() else torch.randn_like(row))
    if torch.equal(changed, leaf):
        row.copy_(leaf.select(dim, (i + 1) % leaf.shape[dim]))
    return changed


def _leaves(sample: Any) -> list[Any]:
    if isinstance(sample, dict):
        return list(sample.values())
    return list(sample) if isinstance(sample, (tuple, list)) else [sample]
