"""Plain attributes that a model's code reads when it is captured: flags, rates and sizes are part of the graph.

A layer left out by a flag, or another dropout rate, would change nothing in a graph that is made already. What was read
is written down here, so that a later change is noticed and not ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}  # hooks and containers


@dataclass(frozen=True)
class ModuleRecord:
    """One module as it was captured."""

    kind: type[nn.Module]
    values: Mapping[str, Any]  # what was read, by attribute


@dataclass
class Reads:
    """Attributes that were read, and those that were written, by the id of their module."""

    read: dict[int, set[str]] = field(default_factory=dict)
    written: dict[int, set[str]] = field(default_factory=dict)

    def records(self, model: nn.Module) -> dict[str, ModuleRecord]:
        """By the path of the module. What the code itself writes (a counter of calls) is left out."""
        found = {}
        for path, module in model.named_modules():
            names = self.read.get(id(module), set()) - self.written.get(id(module), set()) - OF_EVERY_MODULE
            own = module.__dict__
            values = {name: own[name] for name in sorted(names) if name in own and _is_plain(own[name])}
            found[path] = ModuleRecord(type(module), values)
        return found


@contextmanager
def attribute_reads(model: nn.Module) -> Iterator[Reads]:
    """Watches which attributes of the model's modules are read and written meanwhile."""
    reads = Reads({id(module): set() for module in model.modules()}, {id(module): set() for module in model.modules()})
    plain_set = nn.Module.__setattr__

    def get(self: nn.Module, name: str) -> Any:
        names = reads.read.get(id(self))
        if names is not None:
            names.add(name)
        return object.__getattribute__(self, name)

    def put(self: nn.Module, name: str, value: Any) -> None:
        names = reads.written.get(id(self))
        if names is not None:
            names.add(name)
        plain_set(self, name, value)

    nn.Module.__getattribute__, nn.Module.__setattr__ = get, put
    try:
        yield reads
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain_set


def changes(model: nn.Module, records: Mapping[str, ModuleRecord]) -> Iterator[str]:
    """What is no longer as it was written down, in the words of an error."""
    modules = dict(model.named_modules())
    for path, record in records.items():
        module = modules.get(path)
        if module is None or type(module) is not record.kind:
            now = "is gone" if module is None else f"is a {type(module).__name__} now"
            yield f"`{path}` was a {record.kind.__name__} and {now}"
            continue
        own = module.__dict__
        for name, value in record.values.items():
            if own.get(name) != value:
                yield f"`{f'{path}.{name}'.lstrip('.')}` was {value!r} and is {own.get(name)!r} now"


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
