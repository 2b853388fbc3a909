"""compute-again: parts of the backward run a second time behind the clip factors, in place of booking their results.

As ghost clipping's second backward (Li et al. 2022, arXiv:2110.05679), but for those parts alone for which the plan
asks, and on the same values: in an eager step a clipped sum reads bit for bit what its norm was taken of, as far as
the backend's kernels are deterministic. Nothing is scaled on the way.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import torch
from torch import fx

from dpcompile.inline import PHASE
from dpcompile.ir import Draft, InputKind, OutputKind, Program, ancestors
from dpcompile.passes.combine import GroupReader
from dpcompile.passes.estimate_costs import count_flops
from dpcompile.passes.rewrite import Order
from dpcompile.plan import Plan
from dpcompile.seed import OP as SEED
from dpcompile.twice import twice


def compute_again(draft: Draft, order: Order) -> Draft:
    """The program with `plan.again` copied in among the clipped sums, each of which follows what it reads.

    Copies that no sum reads go with tidy.
    """
    program, graph = draft.program, draft.program.graph
    nodes = program.nodes()
    again = set(order.plan.again)
    if not again:
        return draft
    factors, *others = {tuple(names) for names in draft.factors.values()}
    assert not others, "several clip groups have their factors at several times"
    factor = nodes[factors[0]]
    position = _positions(graph, [nodes[name] for name in factors])
    flowing = backward_of(program)
    sums = [node for node in graph.nodes if node.meta.get(PHASE) == "sum"]
    line = sorted(
        [(position[node], False, i, node) for i, node in enumerate(graph.nodes) if node.name in again]
        + [(position[node], True, i, node) for i, node in enumerate(sums)]
    )
    copies: dict[fx.Node, fx.Node] = {}
    marked: dict[fx.Node, fx.Node] = {}
    end = next(iter(graph.find_nodes(op="output")))

    def second(source: fx.Node) -> fx.Node:
        if source in copies or source not in flowing:
            return copies.get(source, source)
        if source not in marked:
            with graph.inserting_before(end):
                marked[source] = graph.call_function(twice, (source, factor))
            marked[source].meta = {**source.meta, PHASE: "sum"}
        return marked[source]

    for _, is_sum, _, node in line:
        if is_sum:
            end.prepend(node)
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))  # type: ignore[assignment]
        else:
            with graph.inserting_before(end):
                copies[node] = graph.node_copy(node, second)
            copies[node].meta[PHASE] = "sum"
    return replace(draft, program=program)


def with_again(plan: Plan, readers: Sequence[GroupReader], program: Program) -> Plan:
    """The plan with those of `plan.again` alone that some clipped sum needs, and what they cost."""
    again = set(plan.again)
    choices = dict(plan.choices)
    needed: set[fx.Node] = set()
    for reader in readers:
        name = reader.group.name
        if plan.method(name).keeps:
            continue
        own = _again_behind(reader.inputs, again)
        needed |= own
        if own:
            choices[name] = replace(choices[name], reason=f"{choices[name].reason}; gradient computed twice")
    names = tuple(node.name for node in program.graph.nodes if node in needed)
    return replace(plan, choices=choices, again=names, again_flops=count_flops(program, names))


def _again_behind(nodes: Sequence[fx.Node], again: Set[str]) -> set[fx.Node]:
    """What has to run again for these to be there again."""
    stack, found = list(nodes), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node.name in again and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _positions(graph: fx.Graph, factors: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Where in the backbone the last of what a node depends on stands; the clip factors do not count.

    Part of a sum goes where the rest of it can be.
    """
    found: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.nodes):
        if not node.meta.get(PHASE):
            found[node] = i
        else:
            found[node] = max((found[source] for source in node.all_input_nodes if source not in factors), default=0)
    for node in reversed(graph.nodes):
        if node.meta.get(PHASE) == "sum":
            found[node] = min((found[user] for user in node.users if user.op != "output"), default=found[node])
    return found


def backward_of(program: Program) -> set[fx.Node]:
    """What depends on a gradient of an output, or of the loss, these gradients among them."""
    nodes = program.nodes()
    flowing = {nodes[i.node] for i in program.inputs_of(InputKind.TANGENT)}
    for node in program.graph.nodes:
        if node.target is SEED or any(source in flowing for source in node.all_input_nodes):
            flowing.add(node)
    own = [nodes[o.node] for o in program.outputs if o.kind in (OutputKind.USER, OutputKind.BUFFER) and o.node]
    return flowing - ancestors(own)


def may_run_twice(node: fx.Node) -> bool:
    """Not what draws random numbers or writes in place, nor where the gradient of a loss begins."""
    if node.op != "call_function" or node.target is SEED:
        return False
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and not (schema and schema.is_mutable)
