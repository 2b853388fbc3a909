"""estimate-costs: the price of every group of uses, by method, as sympy expressions; and of what all methods share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from dpcompile.errors import NoRuleError
from dpcompile.flops import flops_of
from dpcompile.forms import bands, crowded
from dpcompile.ir import Backward, Group, Program, Site, Space
from dpcompile.kernels import native_there
from dpcompile.passes.combine import GroupReader
from dpcompile.patches import by_kernel, together
from dpcompile.plan import Cost, Costs, GroupCost, Method, Part, Product
from dpcompile.rules import costs as rules
from dpcompile.rules.batching.base import shape_of
from dpcompile.shapes import B, C, D, G, P, T, U, at
from dpcompile.torch_internals import fake_mode_of, sample_sizes, trace


def estimate_costs(backward: Backward, readers: Sequence[GroupReader], *, kernels: bool = False) -> Costs:
    """Costs of every group that has a live site. Flops of the backbone are counted on the traced graph.

    `kernels`: those of kernels.py run where the model does, so that they are options too.
    """
    nodes = backward.program.nodes()
    itemsizes = {i.node: nodes[i.node].meta["val"].element_size() for i in backward.program.inputs if i.trainable}
    groups = tuple(
        GroupCost(reader.group.name, tuple(_parts(reader, backward, itemsizes[reader.group.params[0]], kernels)))
        for reader in readers
    )
    return Costs(groups, count_flops(backward.program), max(itemsizes.values(), default=4))


def _parts(reader: GroupReader, backward: Backward, e: int, kernels: bool) -> list[Part]:
    group = reader.group
    kinds: dict[tuple[Any, ...], list[Site]] = {}
    for site in reader.sites:
        work = site.work
        shape = (
            (work.kind, frozenset((work.p, work.d)), work.G) if work.kind == "outer" else (work.kind, work.p, work.d)
        )
        kinds.setdefault(shape, []).append(site)
    merged = [(alike, alike[0].work, sum(site.work.T for site in alike)) for alike in kinds.values()]
    factored = all(work.kind != "explicit" for _, work, _ in merged) and group.space is not Space.PULLBACK
    ghost = factored and len({frozenset((work.p, work.d)) for _, work, _ in merged}) == 1
    dense = [positions for _, work, positions in merged if work.kind == "outer"]
    by_kernels = kernels and ghost and len(dense) == 1 and dense[0] > 1 and not reader.vmapped
    parts = []
    for alike, work, positions in merged:
        sizes = {T: positions, D: work.d, P: work.p, G: work.G}
        booked: sympy.Expr = sympy.Integer(0)
        if work.kind == "outer":
            doubled = e == torch.float32.itemsize and crowded(positions, work.p, work.d)
            plain, options = rules.outer(e, positions, doubled=doubled, bands=_bands(alike, positions, backward))
            booked = e * B * G * T * D
            tiled = rules.tiled(e, doubled=doubled) if by_kernels else {}
            if len(merged) > 1:
                tiled.pop(Method.TILED, None)
            if work.overlap is not None:
                booked = e * B * sympy.Integer(work.overlap.image)
                sizes |= {C: work.overlap.channels, U: work.overlap.pixels}
                options = rules.patched(options, e)
                unwritten = _reads_patches(group, alike, backward)
                tiled = rules.gathered(tiled, e, padded=work.padded) if unwritten else rules.patched(tiled, e)
                if len(group.sites) == 1 and group.space is not Space.PULLBACK and _as_it_is(group):
                    grad = backward.program.node(backward.sites[alike[0].name].grad).meta["val"]
                    few = by_kernel(grad.device, grad.dtype) or together((work.p, work.overlap.channels), 1)
                    options |= rules.overlapping(
                        e, work.overlap.kernel, doubled=doubled, together=few, padded=work.padded
                    )
                    if grad.device.type != "cpu":
                        del options[Method.STREAMED]  # cuDNN may not find the same gradient twice
            options |= tiled
        elif work.kind == "onehot":
            plain, options = rules.onehot(e, alone=len(merged) == 1)
            options |= {Method.FLASH: options[Method.GHOST]} if by_kernels else {}
            booked = 8 * B * T  # an index for each position
        else:
            plain, options = rules.explicit(e)
        if not ghost and work.kind != "explicit":
            options = {m: c for m, c in options.items() if not m.ghost}
        if parts or group.space is Space.PULLBACK:
            made = [kind for kind in (*(part.kind for part in parts), work.kind) if kind != "onehot"]
            options = rules.unkept(options, e, scattered=len(made) < 2)
        if group.space is Space.PULLBACK:  # gradients of the parameters are always kept there
            options = {Method.KEPT: options[Method.KEPT]}
        shareable = ghost or (work.kind == "explicit" and len(merged) == 1 and group.space is not Space.PULLBACK)
        products = _products(group, alike, backward, sizes) if shareable else ()
        part = _part(group, alike, work.kind, sizes, plain, options, products)
        parts.append(replace(part, booked=booked, free=any(_has_length(backward, site) for site in alike)))
    if ghost and len(merged) == 2:
        (left, work, left_T), (_, _, right_T) = sorted(merged, key=lambda item: item[1].kind)
        plain, options = rules.cross(e, left_T, right_T)
        options |= {Method.FLASH: options[Method.GHOST]} if by_kernels else {}
        sizes = {T: left_T * right_T, D: work.d, P: work.p, G: 1}
        parts.append(_part(group, left, "cross", sizes, plain, options))
    if reader.vmapped:
        parts.append(_counted(reader, parts, e, backward.program.batch))
    return parts


def _reads_patches(group: Group, sites: Sequence[Site], backward: Backward) -> bool:
    """Whether kernels find the patches of a convolution by themselves."""
    return len(group.sites) == 1 and _as_it_is(group) and native_there(_device(sites[0], backward))


def _as_it_is(group: Group) -> bool:
    """Whether the group's one value has the dimensions of the parameter in their order."""
    permutation = group.values[0].permutation
    return len(group.values) == 1 and permutation == tuple(range(len(permutation)))


def _has_length(backward: Backward, site: Site) -> bool:
    """Whether a length that calls may choose is in the shape of a site's gradient."""
    lengths = {length.node.expr for length in backward.program.lengths}
    shape = shape_of(backward.program.node(backward.sites[site.name].grad)) if lengths else ()
    return any(not isinstance(size, int) and lengths & size.free_symbols for size in shape)


def _bands(sites: Sequence[Site], positions: int, backward: Backward) -> tuple[tuple[int, int], ...]:
    """How Gram matrices of these uses, taken together, are cut."""
    if any(_has_length(backward, site) for site in sites):
        return ((0, -1),)
    return bands(positions, _device(sites[0], backward))


def _device(site: Site, backward: Backward) -> torch.device:
    return backward.program.node(backward.sites[site.name].grad).meta["val"].device


def _products(
    group: Group, sites: Sequence[Site], backward: Backward, sizes: dict[sympy.Symbol, int]
) -> tuple[Product, ...]:
    """Products named by the tensors that they are made from: Gram matrices of both factors, sums of small gradients."""
    work = sites[0].work
    grads = tuple(backward.sites[site.name].grad for site in sites)
    saved = tuple(name for site in sites for name in backward.sites[site.name].saved)
    if work.kind == "explicit":
        size = sizes[P] * sizes[D] * sizes[G]
        return (Product(Method.KEPT, (*saved, *grads, str(size)), 2 * B * size),)
    if work.kind == "onehot":
        return (Product(Method.GHOST, (*grads, *(saved if work.marker else ())), 2 * B * sizes[T] ** 2 * work.d),)
    if sizes[T] == 1:
        return ()
    square = 2 * B * sizes[G] * sizes[T] ** 2
    formed = square * sum(rules.blocks(_bands(sites, sizes[T], backward), sizes[T]))
    products = [Product(Method.GHOST, grads, formed * work.p), Product(Method.GHOST, saved, formed * work.d)]
    patched = work.overlap is not None and _reads_patches(group, sites, backward)
    if native_there(_device(sites[0], backward)) and not patched:
        upper = B * sizes[G] * sizes[T] * (sizes[T] + 1)
        read = (*saved, *(() if work.overlap is None else (work.overlap.view,)))
        products += [Product(Method.FLASH, grads, upper * work.p), Product(Method.FLASH, read, upper * work.d)]
    if work.overlap is None:
        return tuple(products)
    pixels = 2 * B * sizes[G] * work.overlap.pixels**2 * work.overlap.channels
    return (
        *products,
        Product(Method.SHIFTED, grads, square * work.p),
        Product(Method.SHIFTED, (*saved, work.overlap.view), pixels),
    )


def _counted(reader: GroupReader, parts: Sequence[Part], e: int, batch: torch.SymInt) -> Part:
    """What vmap adds to a group: the traced norm's flops beyond those of the parts, and the plain chain's."""
    group, mode = reader.group, fake_mode_of(reader.inputs[0].graph)
    pullback = group.space is Space.PULLBACK
    inputs = [*reader.inputs, *reader.sources] if pullback else reader.inputs
    fn = reader.pulled_back if pullback else lambda *tensors: [reader.explicit_sum(tensors)]
    try:
        traced = trace(fn, *(node.meta["val"] for node in inputs), mode=mode, vmapped=True).graph
    except NoRuleError as error:
        names = ", ".join(dict.fromkeys(site.module for site in reader.sites))
        raise NoRuleError(f"{error} It is about {group.name}, used in {names}.", error.findings) from error
    traced.eliminate_dead_code()  # as inlining does
    own = sum(
        (at(part.plain.flops, part.sizes) for part in parts if part.kind == "outer"),
        sympy.Integer(0),
    )
    norm = flops_behind(traced, len(reader.inputs), batch) - own
    plain: sympy.Expr = sympy.Integer(0)
    numel = 0
    if pullback:
        values = [node.meta["val"] for node in (*reader.value_nodes(), *reader.sources)]
        chain = trace(reader.plain_backward, *values, mode=mode).graph
        plain = flops_behind(chain, len(reader.value_nodes()), batch)
        numel = sum(node.meta["val"].numel() for node in reader.params_nodes())
    plain += _plain_flops(reader, batch)
    cost, options = rules.pulled(e, norm, plain, numel)
    sizes = {T: 1, D: 1, P: max(numel, 1), G: 1}
    return _part(group, reader.sites, "pullback" if pullback else "vmap", sizes, cost, options)


def _plain_flops(reader: GroupReader, batch: torch.SymInt) -> sympy.Expr:
    """Flops of plain parameter gradients at the sites that vmap handles."""
    graph = trace(
        reader.plain_sites, *(node.meta["val"] for node in reader.inputs), mode=fake_mode_of(reader.inputs[0].graph)
    ).graph
    graph.eliminate_dead_code()
    return flops_behind(graph, len(reader.inputs), batch)


def flops_behind(graph: fx.Graph, count: int, batch: torch.SymInt) -> sympy.Expr:
    """Flops of what depends on the first `count` inputs; the rest is forward work that stands elsewhere already."""
    late = set(graph.find_nodes(op="placeholder")[:count])
    total: sympy.Expr = sympy.Integer(0)
    for node in graph.nodes:
        if late.intersection(node.all_input_nodes):
            late.add(node)
            total += flops_of(node)
    return _in_batch_size(total, batch)


def _in_batch_size(flops: sympy.Expr, batch: torch.SymInt) -> sympy.Expr:
    """Flops as an expression in B; free lengths are those of the sample."""
    symbol = batch.node.expr
    lengths = [(length, size) for length, size in sample_sizes(batch).items() if length != symbol]
    return sympy.expand(flops.subs(lengths).subs(symbol, B))


def _part(
    group: Group,
    sites: Sequence[Site],
    kind: str,
    sizes: Any,
    plain: Cost,
    options: Any,
    products: tuple[Product, ...] = (),
) -> Part:
    modules = list(dict.fromkeys(site.module for site in sites))
    label = modules[0] if len(modules) == 1 else f"{modules[0]} (+{len(modules) - 1})"
    return Part(group.name, label, sites[0].op, kind, len(sites), sizes, plain, options, products)


def count_flops(program: Program, among: Collection[str] | None = None) -> sympy.Expr:
    """Matmul flops of a program, in B, by torch's own formulas (torch.utils.flop_counter) on symbolic shapes.

    Of all its ops, or of those named.
    """
    nodes = [node for node in program.graph.nodes if among is None or node.name in among]
    return _in_batch_size(sum((flops_of(node) for node in nodes), sympy.Integer(0)), program.batch)
