"""follow-memory: how long every value of the traced backward lives, and which of them the uses of parameters read."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from dpcompile.budget import Schedule, Segment, Use
from dpcompile.clipping import Clipping
from dpcompile.inline import PHASE
from dpcompile.ir import Backward, InputKind, OutputKind, Program, ancestors
from dpcompile.memory import Bytes, Life, Root, Storages, Timeline, lives_of
from dpcompile.passes.combine import GroupReader
from dpcompile.passes.compute_again import backward_of, may_run_twice
from dpcompile.passes.mark_overwrites import overwriting
from dpcompile.plan import Costs

aten = torch.ops.aten

SAMPLES = 8  # at which sizes are compared


def follow_memory(
    backward: Backward, readers: Sequence[GroupReader], costs: Costs, clipping: Clipping | None
) -> Schedule:
    """The schedule of one private step, before any method is chosen."""
    program = backward.program
    nodes = program.nodes()
    results = [nodes[o.node] for o in program.outputs if o.node is not None and o.kind is not OutputKind.GRADIENT]
    read = [node for reader in readers for node in reader.inputs]
    live = ancestors([*results, *read])
    order = [node for node in program.graph.nodes if node in live and node.op not in ("placeholder", "output")]
    position = {node: i for i, node in enumerate(order)}
    storages = Storages(program)
    lives = lives_of(storages, order, {node.name: i for node, i in position.items()})
    handed_out = {root: lives[root] for node in results for root in storages.of(node)}
    for root in handed_out:
        lives[root] = Life(lives[root].size, lives[root].birth, len(order) - 1)
    loss = _loss_outside(program, lives)
    position |= {nodes[name]: life.birth for (name, _), life in lives.items() if nodes[name].op == "placeholder"}
    targets = {i.node: i.target for i in program.inputs}
    uses = []
    for reader, cost in zip(readers, costs.groups, strict=True):
        gradient = Bytes()
        for param in reader.group.params:
            gradient += storages.size_of(nodes[param].meta["val"])
        plain: list[tuple[int, frozenset[Root]]] = []
        for site in reader.sites:
            tensors = backward.sites[site.name]
            own = [nodes[name] for name in (*tensors.saved, tensors.grad)]
            plain.append((position.get(nodes[tensors.grad], 0), _roots(storages, own, lives)))
        uses.append(
            Use(
                cost,
                max((position.get(node, 0) for node in reader.inputs), default=0),
                _roots(storages, reader.inputs, lives),
                tuple(sorted(plain, key=lambda use: use[0])),
                gradient,
                0 if clipping is None else clipping.group_of(targets[reader.group.params[0]]),
            )
        )
    read_by_uses = frozenset().union(*(use.reads for use in uses), *(own for use in uses for _, own in use.plain))
    clip_groups = {use.clip_group for use in uses}
    segments = _segments(program, order, storages, lives, read) if len(clip_groups) == 1 else ()
    fusible = (_fusible(order, storages) - read_by_uses).union(loss)
    return Schedule(
        len(order),
        lives | loss,
        tuple(uses),
        costs.itemsize,
        segments,
        fusible,
        _masks_of_plain(order, storages),
        handed_out,
        _overwritten(order, program, storages),
    )


def _overwritten(order: Sequence[fx.Node], program: Program, storages: Storages) -> frozenset[Root]:
    """Values that the last of the ops to read them writes over, as calls of the emitted graph are."""
    (output,) = program.graph.find_nodes(op="output")
    found: set[Root] = set()
    for node, position in overwriting([*order, output], storages):
        operand = node.args[position]
        assert isinstance(operand, fx.Node)
        found.update(root for root in storages.of(operand) if storages.sizes[root] == storages.sizes[node.name, 0])
    return frozenset(found)


def _loss_outside(program: Program, lives: Mapping[Root, Life]) -> dict[Root, Life]:
    """What a loss outside of the graph holds as it hands back the gradient of an output, beside that and the output.

    As much again: of cross-entropy there are log-probabilities, their gradient and that of the logits, whose own memory
    is free by then unless the caller holds it.
    """
    tangents = {i.node for i in program.inputs_of(InputKind.TANGENT)}
    given = {(name, result): life for (name, result), life in lives.items() if name in tangents}
    return {(name, result + 1): Life(life.size, life.birth, life.birth) for (name, result), life in given.items()}


def _masks_of_plain(order: Sequence[fx.Node], storages: Storages) -> dict[Root, Bytes]:
    """Masks of dropout as plain training has them: where no kernel does it in one, as numbers (ATen, Dropout.cpp)."""
    found = {}
    for node in order:
        if node.target is aten.native_dropout.default:
            (source, *_) = node.all_input_nodes
            if source.meta["val"].device.type == "cpu":
                found[node.name, 1] = storages.size_of(source.meta["val"])
    return found


_LOOPS = {
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.mean.dim,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten.nll_loss_backward.default,
    aten.nll_loss_forward.default,
    aten.sum.dim_IntList,
}
"""What a compiler writes as loops of its own, beside what is tagged pointwise."""


def _fusible(order: Sequence[fx.Node], storages: Storages) -> frozenset[Root]:
    """Values that are made and read by such loops alone."""
    made: set[Root] = set()
    called: set[Root] = set()
    for node in order:
        own = {root for root in storages.of(node) if root[0] == node.name}
        loop = node.target in _LOOPS or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if loop:
            made |= own
        elif own:  # a view reads nothing
            called |= {root for source in node.all_input_nodes for root in storages.of(source)}
    return frozenset(made - called)


def peak_when_compiled(forward: Program, sums: Program | None, batch_size: int) -> float:
    """Bytes that a fused step takes at most as graphs for a compiler, about: each op as soon as what it reads is there,
    what is fusible nowhere. `sums` reads what `forward` has left for it.
    """
    peaks = [_peak(_norms_early(forward), (), batch_size)]
    if sums is not None:
        between = {i.node for i in sums.inputs} - {i.node for i in forward.inputs}
        peaks.append(_peak(sums, between, batch_size))
    return max(peaks)


def _peak(program: Program, between: Collection[str], batch_size: int) -> float:
    inputs = tuple(i for i in program.inputs if i.node not in between)
    storages = Storages(replace(program, inputs=inputs))  # those between are memory like any other
    order = [node for node in program.graph.nodes if node.op != "placeholder" or node.name in between]
    fusible = _fusible(order, storages)
    lives = lives_of(storages, order, {node.name: i for i, node in enumerate(order)})
    return Timeline.of((life for root, life in lives.items() if root not in fusible), len(order)).peak(batch_size)


def _norms_early(program: Program) -> Program:
    """Norms, and gradients that are kept, right behind what they are taken of: of a tied weight use by use."""
    program = program.copy()
    for node in list(program.graph.nodes):
        if node.meta.get(PHASE) == "norm" and node.all_input_nodes:
            last = max(node.all_input_nodes, key=lambda source: source._sort_key)
            if last.op != "placeholder":
                last.append(node)
    return program


SEGMENTS = 8
"""Into how many parts of about the same amount of memory a backward is cut."""


def _segments(
    program: Program,
    order: Sequence[fx.Node],
    storages: Storages,
    lives: Mapping[Root, Life],
    read: Sequence[fx.Node],
) -> tuple[Segment, ...]:
    """The backward in parts, cut where the least is alive of what it made."""
    needed = ancestors(read)
    flowing = backward_of(program)
    again = [(i, node) for i, node in enumerate(order) if node in flowing and node in needed and may_run_twice(node)]
    if not again:
        return ()
    names = {node.name for _, node in again}
    made = {root: life for root, life in lives.items() if root[0] in names}
    alive = Timeline.of(made.values(), len(order)).at(SAMPLES)
    grown = np.zeros(len(order))
    for life in made.values():
        grown[life.birth] += life.size.at(SAMPLES)
    grown = grown.cumsum()
    bounds = [again[0][0]]
    for k in range(1, SEGMENTS):
        (window,) = np.nonzero(np.abs(grown * SEGMENTS - k * grown[-1]) < 0.5 * grown[-1])
        window = window[window > bounds[-1]]
        if len(window):
            bounds.append(int(window[alive[window].argmin()]))
    bounds.append(len(order))
    segments = []
    for first, end in itertools.pairwise(bounds):
        own = [(i, node) for i, node in again if first <= i < end]
        makes = {root: i for i, node in own for root in storages.of(node) if root[0] == node.name}
        reads = {root: i for i, node in own for source in node.all_input_nodes for root in storages.of(source)}
        segments.append(Segment(tuple((i, node.name) for i, node in own), makes, reads))
    return tuple(segments)


def _roots(storages: Storages, nodes: Sequence[fx.Node], lives: dict[Root, Life]) -> frozenset[Root]:
    return frozenset(root for node in nodes for root in storages.of(node) if root in lives)
