"""track-batch: where each value of the graph carries the batch, and every place where samples meet.

Abstract interpretation: one `Value` for each node, from the values of its inputs, by the rules of
`dpcompile.rules.batching`. What has no rule is mixed. After each rule its answer is held against the shape of the
result: a batched tensor has the batch in the dimension it claims and in no other, anything else has it in none.

Behind a place where samples meet the walk goes on as if that place were repaired, so that one message can name all
of them; the values that depend on it are mixed all the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dpcompile.errors import Finding
from dpcompile.ir import Axis, InputKind, Kind, Output, OutputKind, Program, Size, Tracked, Value
from dpcompile.origin import op_name, origin
from dpcompile.rules.batching import READS_GRAPH, SHAPE_ONLY, TAKES_ROWS, TAKES_SIZES, rule_for
from dpcompile.rules.batching.base import (
    CONSTANT,
    MIXED,
    NEW_RULE,
    PARAMETER,
    BatchSymbol,
    Call,
    Mixes,
    Result,
    batched,
    product,
    shape_of,
)
from dpcompile.rules.batching.reduced import of_reduced

aten = torch.ops.aten

READS_SIZE = {aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset}
LEAK = "Remove the buffer update, or keep it from the data of the batch (for BatchNorm: nn.GroupNorm)."
LOSS_OUTSIDE = "Return per-sample values, or compute the loss outside the model."
WRONG_LOSS = "Return one loss for each sample, or their sum or mean, from loss_fn."

LOOP = "Write a loop in Python with a fixed number of steps."
REGIONS = {  # higher-order ops, and what to write instead
    "cond": "Compute both branches and choose with torch.where.",
    "map_impl": "Use torch.vmap, or a loop in Python over dimensions other than the batch.",
    "scan": LOOP,
    "associative_scan": "Use cumsum, cumprod or logcumsumexp, or a loop in Python.",
    "while_loop": LOOP,
    "flex_attention": "Use F.scaled_dot_product_attention with a mask.",
}


def track_batch(program: Program, loss: bool = False) -> Tracked:
    """A Value for each node, and a Finding for each place where samples meet on the way to an output.

    With `loss`, the single user output is a loss: one value per sample, or their sum or mean.
    """
    tracker = _Tracker(program)
    for node in program.graph.nodes:
        tracker.visit(node)
    return Tracked(tracker.verdict(), tuple(_findings(program, tracker, loss)))


class _Tracker:
    """One walk over a graph. `values` are as if every problem were repaired; `mixed` names what depends on one."""

    def __init__(self, program: Program) -> None:
        self.batch = BatchSymbol(program.batch)
        self.inputs = {item.node: item for item in program.inputs}
        self.values: dict[str, Result] = {}
        self.problems: dict[str, Mixes] = {}  # by node: where samples meet
        self.mixed: set[str] = set()

    def known(self, node: fx.Node) -> Value:
        value = self.values[node.name]
        return value if isinstance(value, Value) else MIXED

    def verdict(self) -> dict[str, Result]:
        found = dict(self.values)
        for name in self.mixed:
            value = found[name]
            several = tuple(replace(MIXED, trains=v.trains) for v in (value if isinstance(value, tuple) else (value,)))
            found[name] = several if isinstance(value, tuple) else several[0]
        return found

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        if node.op == "placeholder":
            self.values[node.name] = self._input(node)
            return
        try:
            found = self._call(node) if node.op == "call_function" else CONSTANT
        except Mixes as problem:
            self.problems[node.name] = problem
            self.mixed.add(node.name)
            found = self._repaired(node)
        if any(arg.name in self.mixed for arg in self._data_of(node)):
            self.mixed.add(node.name)
        self.values[node.name] = self._with_trains(node, found)

    def _input(self, node: fx.Node) -> Value:
        item = self.inputs[node.name]
        if item.kind is InputKind.PARAMETER and item.trainable:
            return replace(PARAMETER, trains=True)
        return CONSTANT if item.batch_dim is None else batched(Axis(item.batch_dim))

    def _data_of(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose data the result depends on, not only whose sizes."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet in SHAPE_ONLY or packet in READS_SIZE:
            return []
        if packet in READS_GRAPH:
            args = Call.of(node, self.known, self.batch).args
            return [arg for name, arg in args.items() if isinstance(arg, fx.Node) and name not in READS_GRAPH[packet]]
        return node.all_input_nodes

    def _call(self, node: fx.Node) -> Result:
        if node.target is operator.getitem:
            return self._item(node)
        kinds = {self.known(arg).kind for arg in self._data_of(node)}
        if not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            return _number(kinds)
        if Kind.MIXED in kinds:
            return MIXED
        if not isinstance(node.target, torch._ops.OpOverload):
            if kinds <= {Kind.CONSTANT, Kind.PARAMETER} and not any(self.batch.dims(s) for s in _shapes(node)):
                return PARAMETER if Kind.PARAMETER in kinds else CONSTANT
            name = getattr(node.target, "__name__", "")
            if name in REGIONS:
                raise Mixes("runs a part of the model by itself, into which no rule looks", REGIONS[name], never=False)
            raise Mixes("has no batching rule", NEW_RULE, never=False)
        found = self._by_rule(Call.of(node, self.known, self.batch), kinds)
        self._check(node, found)
        return found

    def _item(self, node: fx.Node) -> Value:
        container, index = node.args
        if not isinstance(container, fx.Node) or not isinstance(index, int):
            return MIXED
        value = self.values[container.name]
        return value if isinstance(value, Value) else value[index]

    def _by_rule(self, call: Call, kinds: set[Kind]) -> Result:
        packet = call.op.overloadpacket
        rule = rule_for(call.op)
        if packet not in SHAPE_ONLY:
            if kinds <= {Kind.CONSTANT, Kind.PARAMETER} and not any(self.batch.dims(s) for s in _shapes(call.node)):
                call.require_no_batch_size()
                return PARAMETER if Kind.PARAMETER in kinds and packet is not aten.detach else CONSTANT
            if Kind.REDUCED in kinds:
                return of_reduced(call)
            if Kind.ROWS in kinds and packet not in TAKES_ROWS:
                raise Mixes("depends on the position of a sample in the batch", "Use no running number of the samples.")
        if rule is None:
            raise Mixes("has no batching rule", NEW_RULE, never=False)
        if packet not in TAKES_SIZES and packet not in READS_GRAPH:
            call.require_no_batch_size()
        return rule(call)

    def _check(self, node: fx.Node, found: Result) -> None:
        """The answer of a rule against the shape of the result: a rule that is wrong must not prove anything."""
        values = found if isinstance(found, tuple) else (found,) * len(_tensors(node))
        for value, tensor in zip(values, _tensors(node), strict=True):
            if value.kind is Kind.MIXED or not isinstance(tensor, torch.Tensor):
                continue
            shape, axis = shape_of(tensor), value.axis
            fits = self.batch.dims(shape) == ([axis.dim] if axis is not None else [])
            if axis is not None and fits:
                fits = self.batch.multiple(shape[axis.dim]) == product((axis.outer, axis.inner))
            if not fits and 0 not in shape:
                problem = f"gives a result of shape {list(tensor.shape)} where no rule tells whose data is where"
                raise Mixes(problem, NEW_RULE, never=False)

    def _repaired(self, node: fx.Node) -> Result:
        """The result if the problem were repaired: per-sample where it has the shape of a batched input."""
        axes: dict[tuple[Size, ...], Axis] = {}
        for arg in node.all_input_nodes:
            axis = self.known(arg).axis
            if axis is not None:
                axes.setdefault(shape_of(arg), axis)
        guessed = []
        for tensor, shape in zip(_tensors(node), _shapes(node), strict=True):
            if isinstance(tensor, torch.Tensor) and shape in axes:
                guessed.append(batched(axes[shape]))
            else:
                guessed.append(CONSTANT if guessed and not self.batch.dims(shape) else MIXED)
        return tuple(guessed) if isinstance(node.meta.get("val"), (list, tuple)) else guessed[0]

    def _with_trains(self, node: fx.Node, found: Result) -> Result:
        """Whether a gradient can flow to a trainable parameter: integers and detached values have none."""
        packet = getattr(node.target, "overloadpacket", None)
        trains = packet is not aten.detach and any(self._trains(arg) for arg in self._data_of(node))
        values = found if isinstance(found, tuple) else (found,) * len(_tensors(node))
        marked = []
        for value, tensor in zip(values, _tensors(node), strict=True):
            floats = isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())
            value = CONSTANT if value.kind is Kind.PARAMETER and not floats else value
            marked.append(value if value.trains == (trains and floats) else replace(value, trains=trains and floats))
        return tuple(marked) if isinstance(node.meta.get("val"), (list, tuple)) else marked[0]

    def _trains(self, node: fx.Node) -> bool:
        value = self.values[node.name]
        return value.trains if isinstance(value, Value) else any(v.trains for v in value)


def _tensors(node: fx.Node) -> list[Any]:
    result = node.meta.get("val")
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _shapes(node: fx.Node) -> list[tuple[Size, ...]]:
    return [shape_of(tensor) if isinstance(tensor, torch.Tensor) else () for tensor in _tensors(node)]


def _number(kinds: set[Kind]) -> Value:
    """Sizes and assertions are constant; a number read from data is constant only if the data is."""
    if Kind.MIXED in kinds:
        return MIXED
    if kinds <= {Kind.CONSTANT, Kind.PARAMETER}:
        return CONSTANT
    raise Mixes("reads one number from the data of the whole batch")


# ---------------------------------------------------------------- findings


def _findings(program: Program, tracker: _Tracker, loss: bool) -> list[Finding]:
    """What stands between the outputs and the claim that each is per-sample, in the order of the graph."""
    nodes = program.nodes()
    found: dict[tuple[str, str], Finding] = {}
    for output in program.outputs:
        if output.node is None or not isinstance(nodes[output.node].meta.get("val"), torch.Tensor):
            continue
        for node, problem in _problems(tracker, output, nodes[output.node], loss):
            found.setdefault((node.name, problem.problem), _finding(node, problem))
    order = {name: i for i, name in enumerate(nodes)}
    return [found[key] for key in sorted(found, key=lambda key: order[key[0]])]


def _problems(tracker: _Tracker, output: Output, node: fx.Node, loss: bool) -> Iterator[tuple[fx.Node, Mixes]]:
    value, tensor = tracker.known(node), node.meta["val"]
    if output.kind is OutputKind.USER and not (tensor.is_floating_point() or tensor.is_complex()):
        return  # no gradient comes from it
    if node.name in tracker.mixed:
        yield from _meetings(tracker, node)
    elif output.kind is OutputKind.BUFFER:
        if value.kind not in (Kind.CONSTANT, Kind.PARAMETER):
            problem = f"writes data of the batch to the buffer `{output.target}`: such statistics leak un-noised data"
            yield node, Mixes(problem, LEAK)
    elif loss:
        per_sample = value.kind is Kind.BATCHED and value.axis == Axis(0) and tensor.dim() == 1
        if not per_sample and not (value.kind is Kind.REDUCED and tensor.dim() == 0):
            yield node, Mixes(f"gives a loss of shape {list(tensor.shape)} ({value})", WRONG_LOSS)
    elif value.kind is Kind.REDUCED:
        yield node, Mixes(f"makes an output that is a {'mean' if value.mean else 'sum'} over samples", LOSS_OUTSIDE)
    elif value.kind is Kind.PARAMETER:
        yield node, Mixes("makes an output that depends on parameters alone", LOSS_OUTSIDE, never=False)


def _meetings(tracker: _Tracker, node: fx.Node) -> Iterator[tuple[fx.Node, Mixes]]:
    """The places where the samples met that a mixed value comes from."""
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if current.name in tracker.problems:
            yield current, tracker.problems[current.name]
        for arg in tracker._data_of(current):
            if arg not in seen and arg.name in tracker.mixed:
                seen.add(arg)
                todo.append(arg)


def _finding(node: fx.Node, problem: Mixes) -> Finding:
    where = origin(node)
    return Finding(
        where.module,
        where.module_type,
        op_name(node),
        where.line,
        problem.problem,
        problem.cure,
        problem.never,
        node.name,
    )
