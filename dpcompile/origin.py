"""Where a node of the graph comes from, in the user's own names: module path, module class, source line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

ROOT = "(root)"

_FRAME = re.compile(r'^\s*File "(?P<file>.+?)", line (?P<line>\d+)(?:, in .*)?$')
_LIBRARY = tuple(
    os.path.join(os.path.dirname(os.path.abspath(path)), "") for path in (torch.__file__, __file__)
)  # frames in here say nothing to the user
_PASSES = os.path.join(os.path.realpath(os.path.join(_LIBRARY[1], "passes")), "")


@dataclass(frozen=True)
class Origin:
    """The user's name for what a node does."""

    module: str  # "encoder.0.attn"; "(root)" for the model itself
    module_type: str  # "Linear"; "" where torch kept none
    line: str  # 'pkg/model.py:12: y = x - x.mean(0)'; "" where torch kept none


def origin(node: fx.Node) -> Origin:
    """The innermost module of the user's model in which a node was traced, and the innermost line of user code."""
    module, module_type = next(reversed((modules_of(node) or {}).values()), (ROOT, ""))
    return Origin(module, module_type, _line(node.meta.get("stack_trace") or ""))


def op_name(node: fx.Node) -> str:
    """The op as a user knows it: `batch_norm` for each of the forms that torch gives it."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", node.name)
    return "batch_norm" if "batch_norm" in name else name.removeprefix("_").removeprefix("native_")


def modules_of(node: fx.Node) -> dict[str, tuple[str, str]] | None:
    """The module calls in which a node was traced, outermost first: call -> path and class of the user's module.

    Empty outside the model: in the wrapper that capture puts around it, or in the loss. None where torch kept none.
    """
    found: dict[str, tuple[str, str]] = {}
    marks = 0
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    for call, (path, module_type) in stack.items():
        name = module_type if isinstance(module_type, str) else module_type.__name__
        short = name.rsplit(".", 1)[-1]
        if short.startswith("_empty_nn_module_stack"):
            marks += 1  # torch leaves it on nodes made by its own passes
        elif path == "model":
            found[call] = (ROOT, short)
        elif path.startswith("model."):
            found[call] = (path.removeprefix("model."), short)
    return None if marks == len(stack) else found


def _line(stack_trace: str) -> str:
    lines = stack_trace.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        frame = _FRAME.match(lines[i])
        if frame is None or _is_library(frame["file"]):
            continue
        source = lines[i + 1].strip() if i + 1 < len(lines) and not _FRAME.match(lines[i + 1]) else ""
        short = "/".join(frame["file"].replace("\\", "/").split("/")[-2:])
        return f"{short}:{frame['line']}: {source}" if source else f"{short}:{frame['line']}"
    return ""


def _is_library(file: str) -> bool:
    if file.startswith("<eval_with_key>"):
        return True  # code that torch.fx wrote
    return os.path.abspath(file).startswith(_LIBRARY) or os.path.realpath(file).startswith(_PASSES)
