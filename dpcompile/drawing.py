"""Graphs drawn in layers: the flow of an emitted graph, and which parameter reaches which uses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import fx

from dpcompile.ir import InputKind, OutputKind, Program, Uses
from dpcompile.specs import TargetError

COLOURS = {
    "op": "#eef2f7",
    InputKind.PARAMETER.value: "#f6d9a8",
    InputKind.USER.value: "#cfe8cf",
    InputKind.TANGENT.value: "#f3c6c6",
    "input": "#e3e3e3",
    OutputKind.GRADIENT.value: "#f0a868",
    OutputKind.NORMS.value: "#c9b3e6",
    "output": "#b5d6f2",
    "value": "#fbeccf",
}
# Only other ways to look at a tensor: left out of a drawing, which they would fill.
_SAME_SIZE = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "clone", "detach", "alias"}
VIEWS = _SAME_SIZE | {"unsqueeze", "squeeze", "expand", "slice", "select"}
_ROW, _PER_CHARACTER = 0.42, 0.075  # inches


def flow_of(program: Program) -> nx.DiGraph:
    """Nodes of an emitted graph with their shapes. Views, sizes and unread inputs are left out."""
    graph = nx.DiGraph()
    inputs = {item.node: item.kind.value for item in program.inputs}
    outputs = {output.node: output.kind.value for output in program.outputs if output.node is not None}
    gradients = {o.node: f"{o.target}.grad" for o in program.outputs if o.kind is OutputKind.GRADIENT}
    for node in program.graph.nodes:
        if node.name in outputs or (_is_drawn(node) and node.users):
            kind = outputs.get(node.name) or inputs.get(node.name) or ("input" if node.op == "placeholder" else "op")
            name = gradients.get(node.name, _short(node.name))
            graph.add_node(node.name, label=f"{name} {_shape(node)}", kind=kind)
    for node in program.graph.nodes:
        if node.name in graph:
            graph.add_edges_from((source, node.name) for source in _sources(node, graph))
    return graph


def uses_of(uses: Uses) -> nx.DiGraph:
    """The parameter-use graph: parameter, derived value, site. Weights with several uses are its larger components."""
    graph = nx.DiGraph()
    for group in uses.groups:
        for value in group.values:
            for param in value.params:
                graph.add_node(param, label=_short(param), kind=InputKind.PARAMETER.value)
                if param != value.node:
                    graph.add_node(value.node, label=_short(value.node), kind="value")
                    graph.add_edge(param, value.node)
        for site in group.sites:
            graph.add_node(site.name, label=f"{site.op} in {site.module}", kind="op")
            graph.add_edge(site.value, site.name)
    return graph


def write_svg(graph: nx.DiGraph, file: Path, title: str) -> None:
    """The graph as an SVG: one row for each topological generation, inputs on top.

    Raises:
        TargetError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise TargetError("--svg needs matplotlib: pip install matplotlib") from None
    small = all(len(part) <= 8 for part in nx.weakly_connected_components(graph))
    places, width, height = (layout_list if small else layout)(graph)
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.1, 0.2, title, fontsize=9, va="center")
    from matplotlib.collections import LineCollection

    lines = [[places[a], places[b]] for a, b in graph.edges]
    axes.add_collection(LineCollection(lines, colors="#8a94a3", linewidths=0.5, zorder=1))
    for name, data in graph.nodes(data=True):
        box = {"boxstyle": "round,pad=0.25", "facecolor": COLOURS.get(data["kind"], COLOURS["input"]), "linewidth": 0.4}
        axes.text(*places[name], data["label"], fontsize=7, ha="center", va="center", bbox=box, zorder=2)
    try:
        figure.savefig(file, format="svg", metadata={"Date": None})
    except OSError as error:
        raise TargetError(f"cannot write {str(file)!r}: {error.strerror}") from error


def layout(graph: nx.DiGraph) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Places in inches, width and height. A node stands near the middle of those that it reads."""
    places: dict[str, tuple[float, float]] = {}
    y, widest = 0.6, 4.0
    for generation in _layers(graph):
        wanted = {n: _mean([places[p][0] for p in graph.predecessors(n) if p in places]) for n in generation}
        x = 0.1
        for name in sorted(generation, key=lambda n: wanted[n]):
            half = _PER_CHARACTER * (len(graph.nodes[name]["label"]) + 4) / 2
            x = max(x + half, wanted[name])
            places[name] = (x, y)
            x += half
        widest = max(widest, x)
        y += _ROW
    return places, widest + 0.1, y


def layout_list(graph: nx.DiGraph) -> tuple[dict[str, tuple[float, float]], float, float]:
    """The same for many small components: one below the other, each from left to right."""
    wide = _PER_CHARACTER * (max(len(label) for _, label in graph.nodes(data="label")) + 8)
    places: dict[str, tuple[float, float]] = {}
    y = 0.6
    for part in sorted(nx.weakly_connected_components(graph), key=lambda part: min(map(list(graph).index, part))):
        generations = list(nx.topological_generations(graph.subgraph(part)))
        for i, generation in enumerate(generations):
            places.update({name: ((i + 0.5) * wide, y + j * _ROW) for j, name in enumerate(generation)})
        y += _ROW * max(map(len, generations))
    return places, max(x for x, _ in places.values()) + wide / 2, y


def _layers(graph: nx.DiGraph) -> list[list[str]]:
    """Topological generations, with inputs moved down to just above their first reader and rows of at most 12."""
    level = {n: i for i, generation in enumerate(nx.topological_generations(graph)) for n in generation}
    for name in [n for n in graph if graph.in_degree(n) == 0]:
        level[name] = min((level[reader] for reader in graph.successors(name)), default=1) - 1
    rows: dict[int, list[str]] = {}
    for name, at in level.items():
        rows.setdefault(at, []).append(name)
    ordered = [rows[at] for at in sorted(rows)]
    return [row[i : i + 12] for row in ordered for i in range(0, len(row), 12)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _is_drawn(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    drawn = node.op == "placeholder" or (packet is not None and packet.__name__ not in VIEWS)
    return drawn and isinstance(node.meta.get("val"), torch.Tensor)


def _sources(node: fx.Node, graph: nx.DiGraph) -> set[str]:
    """The drawn nodes that a node reads, through those that are not drawn."""
    found: set[str] = set()
    for source in node.all_input_nodes:
        if not isinstance(source.meta.get("val"), torch.SymInt):
            found |= {source.name} if source.name in graph else _sources(source, graph)
    return found


def _shape(node: fx.Node) -> str:
    value: Any = node.meta["val"]
    return "[" + ", ".join(re.sub(r"\bs\d+\b", "B", str(size)) for size in value.shape) + "]"


def _short(name: str) -> str:
    return name.removeprefix("p_model_").removeprefix("b_model_")
