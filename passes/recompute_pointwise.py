"""recompute-pointwise: fused and under a compiler, what is made element by element is made again for the backward.

torch's partitioner does so where forward and backward are two graphs. A value is made again where that reads at most
`READS` times its size, of what the backward holds as well, so that no moment of the step has more memory for it; but
not what clipped sums read, which is there to the end anyway, and of whose very numbers norms are. In an eager step
every op is a pass through memory: there values are held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from dpcompile import pools, settled
from dpcompile.inline import PHASE, inline
from dpcompile.ir import Program
from dpcompile.memory import Root, Storages, is_view
from dpcompile.passes.compute_again import may_run_twice
from dpcompile.passes.follow_memory import SAMPLES
from dpcompile.passes.scale_in_place import copied
from dpcompile.seed import OP as SEED
from dpcompile.torch_internals import made_of
from dpcompile.twice import ZERO_BEHIND
from dpcompile.verify import verify

aten = torch.ops.aten

READS = 2


def recompute_pointwise(program: Program) -> Program:
    """A program with the same results, for compilers alone."""
    made = program.copy()
    copied(made)  # a compiler arranges memory itself, and a backward may run twice
    for op in (aten.native_layer_norm.default, aten.native_group_norm.default):
        for norm in made.graph.find_nodes(op="call_function", target=op):
            _write_out(made.graph, norm)
    late = _behind_seed(made.graph)
    for pool in made.graph.find_nodes(op="call_function", target=pools.max_pool):
        _hold_places(made.graph, pool, late)
    _make_again(made.graph, _Values(made, late))
    made.graph.eliminate_dead_code()
    made.module.recompile()
    return verify(made, "recompute-pointwise")


def _behind_seed(graph: fx.Graph) -> set[fx.Node]:
    """The backward."""
    order = list(graph.nodes)
    (seed,) = (i for i, node in enumerate(order) if node.target is SEED)
    return {node for node in order[seed + 1 :] if node.op != "output"}


def _write_out(graph: fx.Graph, norm: fx.Node) -> None:
    """A norm layer of the forward as statistics and a value that is made of them, as a compiler would write it."""
    compose = made_of(norm.target)  # pyright: ignore[reportArgumentType]
    is_result = any(user.op == "output" for result in norm.users for user in result.users)
    if norm.meta.get(PHASE) or compose is None or is_result:
        return
    inputs = norm.all_input_nodes

    def composed(*given: Any) -> Any:
        values = dict(zip(inputs, given, strict=True))
        return compose(*fx.map_arg(norm.args, values.__getitem__), **fx.map_arg(norm.kwargs, values.__getitem__))

    made = inline(graph, composed, inputs)
    for result in list(norm.users):
        result.replace_all_uses_with(made[result.args[1]])  # pyright: ignore[reportArgumentType, reportCallIssue]


def _hold_places(graph: fx.Graph, pool: fx.Node, late: set[fx.Node]) -> None:
    """Places of maxima are written down, in half the bytes: a compiler would hold the image, to look for them again."""
    sizes = pool.args[0].meta["val"].shape[-2:]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    if not all(isinstance(size, int) for size in sizes) or sizes.numel() >= 2**31:
        return
    for places in [node for node in pool.users if node.args[1] == 1]:
        readers = [node for node in graph.nodes if node in places.users and node in late]
        if readers:
            (held,) = inline(graph, lambda x: [settled.OP(x.to(torch.int32))], [places])
            with graph.inserting_before(readers[0]):
                wide = graph.call_function(aten._to_copy.default, (held,), {"dtype": torch.int64})
            wide.meta = dict(places.meta)
            for reader in readers:
                reader.replace_input_with(places, wide)


class _Values:
    """Values of the forward: held, or made again from those that are held."""

    def __init__(self, program: Program, late: set[fx.Node]) -> None:
        self.late = late
        self.storages = Storages(program)
        self.again: set[fx.Node] = set()
        self._last: dict[Root, int] = {}  # where the backward reads them for the last time
        self._held: set[Root] = set()  # results, and what clipped sums read, behind all the rest
        self._written: set[Root] = set()  # over with something else
        for i, node in enumerate(program.graph.nodes):
            if node in late:
                self._last.update(dict.fromkeys(self._roots(node.all_input_nodes), i))
            if node.op == "output" or node.meta.get(PHASE) == "sum":
                self._held.update(self._roots(node.all_input_nodes))
            if _is_mutable(node):
                self._written.update(self._roots(node.all_input_nodes[:1]))
        for node in program.graph.nodes:
            if node.op == "call_function" and node not in late and _is_cheap(node):
                self._decide(node)

    def _roots(self, nodes: Iterable[fx.Node]) -> list[Root]:
        return [root for node in nodes for root in self.storages.of(node)]

    def _decide(self, node: fx.Node) -> None:
        (root,) = self.storages.of(node)
        if root not in self._last or root in self._held:
            return
        read = self._read_for(node)
        if ({root} | read) & self._written:
            return
        end, size = self._last[root], self._size([root])
        longer = [source for source in read if self._last.get(source, -1) < end]
        new = [source for source in read if source not in self._last]
        if self._size(read) <= READS * size and self._size(longer) <= size and self._size(new) < size:
            self.again.add(node)
            self._last.update(dict.fromkeys(longer, end))

    def _size(self, roots: Iterable[Root]) -> float:
        return sum(self.storages.sizes[root].at(SAMPLES) for root in roots)

    def _read_for(self, node: fx.Node) -> set[Root]:
        found: set[Root] = set()
        seen = set(node.all_input_nodes)
        stack = list(seen)
        while stack:
            source = stack.pop()
            if self.is_made(source):
                new = set(source.all_input_nodes) - seen
                seen |= new
                stack.extend(new)
            else:
                found.update(self._roots([source]))
        return found

    def is_made(self, node: fx.Node) -> bool:
        """Whether what needs a value makes it too, as it is not held."""
        if is_view(node):
            return self.is_made(node.all_input_nodes[0])
        return node in self.again or (_is_cheap(node) and not any(r in self._last for r in self._roots([node])))


def _is_cheap(node: fx.Node) -> bool:
    """Whether it is made number by number, in memory of its own."""
    one = isinstance(node.meta.get("val"), torch.Tensor) and not is_view(node)
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and one and may_run_twice(node)


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _make_again(graph: fx.Graph, values: _Values) -> None:
    """Ops a second time, in front of what first reads them in the backward.

    What they read has a zero added to it, which is there when the backward has come so far: compilers merge equal ops.
    """
    made: dict[fx.Node, fx.Node] = {}
    zeros: dict[fx.Node, fx.Node] = {}

    def again(node: fx.Node, before: fx.Node) -> fx.Node:
        if node not in made:
            if values.is_made(node):
                copy = graph.node_copy(node, lambda source: again(source, before))
            elif values.storages.of(node) and _is_real(node):
                copy = graph.call_function(aten.add.Tensor, (node, zero_behind(before)))
                copy.meta = dict(node.meta)
            else:
                copy = node
            made[node] = copy
        return made[node]

    def zero_behind(before: fx.Node) -> fx.Node:
        if before not in zeros:
            zeros[before] = graph.call_function(ZERO_BEHIND, (before,))
            zeros[before].meta["val"] = before.meta["val"].new_empty((), dtype=torch.float32)
        return zeros[before]

    seed = next(iter(graph.find_nodes(op="call_function", target=SEED)))
    for node in list(graph.nodes):
        beside = [source for source in node.all_input_nodes if source in values.late and _is_real(source)]
        for source in node.all_input_nodes if node in values.late else ():
            if source not in values.late and values.is_made(source):
                with graph.inserting_before(node):
                    copy = again(source, (beside or [seed])[-1])
                node.replace_input_with(source, copy)


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
