"""Who may import whom: errors and records below, rules above them, then passes, then the one file that runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
PASSES = ROOT / "passes"
BASE = {"errors", "device", "ir", "shapes", "forms", "finite", "bounds", "certified", "gram", "plan", "origin", "cells"}
BASE |= {
    "flops",
    "joined",
    "kernel_norms",
    "kernels",
    "layouts",
    "native",
    "opaque",
    "patches",
    "recurrent",
    "recurrent_costs",
    "rounding",
    "stored",
    "tiles",
    "torch_internals",
}


def sources() -> dict[str, Path]:
    """Module name to file; the passes stand under the name by which they are imported."""
    package = ROOT / "dpcompile"
    found = {
        path: "dpcompile." + ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if "passes" not in path.parts[len(package.parts) :]
    }
    found |= {path: f"dpcompile.passes.{path.stem}" for path in PASSES.glob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in found.items()}


def import_graph() -> nx.DiGraph:
    """Edges importer -> imported, of imports that run when a module is loaded."""
    files = sources()
    graph = nx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        for statement in ast.parse(path.read_text()).body:
            for target in _targets(statement, files):
                if target != name:
                    graph.add_edge(name, target)
    return graph


def _targets(statement: ast.stmt, files: dict[str, Path]) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names if alias.name in files]
    if not isinstance(statement, ast.ImportFrom) or statement.module not in files:
        return []
    inside = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return [name if name in files else statement.module for name in inside]


GRAPH = import_graph()


def room(name: str) -> str:
    """The first part of a module's name behind the package's: "rules", "passes", "forms"."""
    return name.split(".")[1] if "." in name else name


def edges_from(rooms: set[str]) -> set[tuple[str, str]]:
    return {(a, b) for a, b in GRAPH.edges if room(a) in rooms}


def test_the_import_graph_has_no_cycle() -> None:
    assert not list(nx.simple_cycles(GRAPH))


def test_errors_and_devices_import_nothing_of_ours() -> None:
    assert not edges_from({"errors", "device", "specs"})


def test_the_base_imports_only_itself() -> None:
    outside = {(a, b) for a, b in edges_from(BASE) if room(b) not in BASE}
    assert not outside


def test_rules_import_only_the_base_and_each_other() -> None:
    outside = {(a, b) for a, b in edges_from({"rules"}) if room(b) not in BASE | {"rules"}}
    assert not outside


def test_only_the_api_imports_passes() -> None:
    importers = {a for a, b in GRAPH.edges if room(b) == "passes" and room(a) != "passes"}
    assert importers == {"dpcompile.api"}


def test_passes_import_neither_runtime_nor_api_nor_command_line() -> None:
    above = {"runtime", "api", "cli", "cli_common", "cli_machine", "largest", "report", "dpcompile"}
    assert not {(a, b) for a, b in edges_from({"passes"}) if room(b) in above}


def test_the_runtime_knows_no_pass_and_no_rule() -> None:
    assert not {(a, b) for a, b in edges_from({"runtime"}) if room(b) in {"passes", "rules", "api"}}


def test_only_the_command_line_and_the_package_import_the_api() -> None:
    command_line = {"cli", "cli_common", "cli_machine", "largest", "measurement"}
    assert {room(a) for a, b in GRAPH.edges if b == "dpcompile.api"} <= {"dpcompile"} | command_line


@pytest.mark.parametrize("name", sorted(sources()))
def test_every_file_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse(sources()[name].read_text()))
