"""Why a forward cannot be one graph where it chooses its way by data: the line, what it reads, and what settles it."""

from __future__ import annotations

import ast
import linecache
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

OTHERWISE = "Let it depend on constants and shapes, or compute both ways for every sample and choose with torch.where."


def choice_by_data(error: BaseException) -> str | None:
    """What is wrong with the line that made a number or a condition of data, and the cure; None if no line did.

    Settings (flags and rates among the attributes of the user's modules) that the condition is computed from are named,
    with the fields of `self.config` that hold them: layer-drop, say, leaves nothing to choose where it is 0.
    """
    if not any(isinstance(e, GuardOnDataDependentSymNode) for e in _chain(error)):
        return None
    frames = user_frames(error)
    if not frames:
        return None
    text = line_of(*frames[-1])
    found = " or ".join(dict.fromkeys(_settings(frames)))
    cure = f"Set {found} if that leaves nothing to choose. {OTHERWISE}" if found else OTHERWISE
    return f"chooses its way by the data, so that it is not one graph.\n  at {text}\n  cure: {cure}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def user_frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Frames and line numbers in the user's code that the error came through, the innermost last."""
    found = [pair for e in reversed(list(_chain(error))) for pair in traceback.walk_tb(e.__traceback__)]
    return [(frame, line) for frame, line in found if not _of_library(frame.f_code.co_filename)]


def line_of(frame: FrameType, line: int) -> str:
    """'pkg/model.py:12: y = len(x)'."""
    file = frame.f_code.co_filename
    short = "/".join(file.replace("\\", "/").split("/")[-2:])
    return f"{short}:{line}: {linecache.getline(file, line).strip()}"


def _of_library(file: str) -> bool:
    return "/torch/" in file.replace("\\", "/") or file.endswith(("capture.py", "torch_internals.py"))


def _settings(frames: list[tuple[FrameType, int]]) -> Iterator[str]:
    """What the last frame's condition is computed from, followed through names, and keywords into the callers."""
    wanted: set[str] = set()
    for depth, (frame, line) in enumerate(reversed(frames)):
        place = _place(frame.f_code.co_filename, line)
        if place is None:
            continue
        function, statement = place
        if depth == 0:
            todo = [_condition(statement)]
        else:
            calls = [node for node in ast.walk(_condition(statement)) if isinstance(node, ast.Call)]
            todo = [k.value for call in calls for k in call.keywords if k.arg in wanted]
        while todo:
            for node in ast.walk(todo.pop()):
                if isinstance(node, ast.Name) and node.id not in wanted and node.id != "self":
                    wanted.add(node.id)
                    todo += _assigned(function, node.id, statement.lineno)
                elif isinstance(node, ast.Attribute):
                    yield from _setting(node, frame.f_locals)


def _place(filename: str, line: int) -> tuple[ast.AST, ast.stmt] | None:
    """The innermost function and statement at a line of a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return None
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or line)]
    functions = [n for n in around if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return (functions[-1], around[-1]) if functions and around[-1] is not functions[-1] else None


def _condition(statement: ast.stmt) -> ast.AST:
    """What decides at a statement: the test of an if, the iterable of a for, else all of it."""
    if isinstance(statement, ast.If | ast.While | ast.Assert):
        return statement.test
    return statement.iter if isinstance(statement, ast.For) else statement


def _assigned(function: ast.AST, name: str, before: int) -> list[ast.AST]:
    """The right sides of the assignments to a local name above a line."""
    found: list[ast.AST] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and node.lineno < before:
            names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            found += [node.value] if name in names else []
    return found


def _setting(node: ast.Attribute, names: Mapping[str, Any]) -> Iterator[str]:
    """`self.layerdrop` where it is a flag or a rate that could be switched off, by the names of its config."""
    path: list[str] = []
    at: ast.AST = node
    while isinstance(at, ast.Attribute):
        path.append(at.attr)
        at = at.value
    if not isinstance(at, ast.Name) or at.id != "self" or "self" not in names:
        return
    value = names["self"]
    for name in reversed(path):
        value = getattr(value, name, None)
    if not isinstance(value, bool | float) or not value or path[0] == "training":  # counts cannot be switched off
        return
    off = "False" if isinstance(value, bool) else "0"
    config = getattr(names["self"], "config", None)
    fields = (
        [
            field
            for field, held in vars(config).items()
            if (field == path[0] or field.endswith(f"_{path[0]}")) and held == value
        ]
        if config is not None
        else []
    )
    yield f"{' or '.join(f'config.{field}={off}' for field in fields) or f'self.{path[0]}={off}'} (it is {value})"
