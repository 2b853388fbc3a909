"""follow-memory: how long every value of the traced backward lives, and which of them the uses of parameters read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dpcompile.budget import Schedule, Use
from dpcompile.clipping import Clipping
from dpcompile.ir import Backward, OutputKind, ancestors
from dpcompile.memory import Bytes, Life, Root, Storages, lives_of
from dpcompile.passes.combine import GroupReader
from dpcompile.plan import Costs


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
    for root in {root for node in results for root in storages.of(node)}:
        lives[root] = Life(lives[root].size, lives[root].birth, len(order) - 1)
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
                tuple(plain),
                gradient,
                0 if clipping is None else clipping.group_of(targets[reader.group.params[0]]),
            )
        )
    return Schedule(len(order), lives, tuple(uses), costs.itemsize)


def _roots(storages: Storages, nodes: Sequence[fx.Node], lives: dict[Root, Life]) -> frozenset[Root]:
    return frozenset(root for node in nodes for root in storages.of(node) if root in lives)
