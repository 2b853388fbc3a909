"""What a site rule sees and gives: one op with parameter-derived arguments, run so that its gradient can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from dpcompile.forms import Form
from dpcompile.ir import Axis, Kind, Value
from dpcompile.shapes import hint, unfolded


@dataclass(frozen=True)
class Call:
    """One node of the captured graph whose result is batched and some of whose arguments derive from parameters."""

    node: fx.Node
    arguments: Mapping[str, Any]  # by schema name; tensors are fx.Nodes
    values: Mapping[str, Value | tuple[Value, ...]]  # batch tracking, by node name
    slots: tuple[str, ...]  # arguments that derive from trainable parameters: "weight", "tensors[1]"

    def meta(self, slot: str) -> torch.Tensor:
        """The fake tensor at an argument."""
        return self.operand(slot).meta["val"]

    def operand(self, slot: str) -> fx.Node:
        found = pick(self.arguments, slot)
        assert isinstance(found, fx.Node)
        return found

    def axis(self, slot: str) -> Axis | None:
        """Where the batch lies in an argument; None if the argument carries none."""
        node = pick(self.arguments, slot)
        if not isinstance(node, fx.Node):
            return None
        value = self.values.get(node.name)
        return value.axis if isinstance(value, Value) and value.kind is Kind.BATCHED else None

    @property
    def out_axis(self) -> Axis:
        value = self.values[self.node.name]
        value = value[0] if isinstance(value, tuple) else value
        assert value.axis is not None
        return value.axis

    @property
    def out(self) -> torch.Tensor:
        result = self.node.meta["val"]
        return result[0] if isinstance(result, (tuple, list)) else result

    def shape(self, slot: str) -> tuple[int, ...]:
        """As a trace takes it: where lengths are free, a value derived from a parameter may have one in its shape."""
        return tuple(self.meta(slot).shape)

    def sizes(self, slot: str) -> tuple[int, ...]:
        """The numbers that the shape is for the sample."""
        return tuple(map(hint, self.meta(slot).shape))


@dataclass(frozen=True)
class Tap:
    """Where the backward is read: the gradient of `tensor`, and what else the form needs."""

    tensor: torch.Tensor
    saved: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Overlap:
    """Of a convolution whose patches need not be written out."""

    channels: int  # of a group
    pixels: int  # positions of the padded image
    image: int  # numbers of a sample's image
    kernel: tuple[int, ...]
    view: str  # images that are padded alike have equal ones


@dataclass(frozen=True)
class Work:
    """The size of one use, per sample. `kind` names the form: outer, onehot or explicit."""

    kind: str
    T: int  # positions
    d: int  # columns
    p: int  # rows
    G: int = 1
    marker: str = ""  # for a look-up: which row gets no gradient
    overlap: Overlap | None = None

    @property
    def padded(self) -> bool:
        """Whether the image has zeros put around it, or is cut to what patches reach."""
        return self.overlap is not None and self.overlap.image != self.G * self.overlap.channels * self.overlap.pixels


class SiteRule(Protocol):
    """One family of ops. Rules are plain functions of tensors; passes trace and inline them."""

    name: str
    vmapped: bool  # whether its form uses torch.func.vmap

    def accepts(self, call: Call) -> bool: ...

    def run(self, call: Call, arguments: dict[str, Any]) -> tuple[Any, dict[str, Tap]]:
        """The op's own result, computed with parameter-derived arguments held constant, and a tap for each slot."""
        ...

    def form(self, call: Call, slot: str) -> Callable[..., Form]:
        """A function of (*saved, gradient) that gives the per-sample gradient at `slot` as a form."""
        ...

    def work(self, call: Call, slot: str) -> Work: ...


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten node by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    return bind_values(schema, node.args, node.kwargs)


def bind_values(schema: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def call_bound(target: Any, arguments: Mapping[str, Any]) -> Any:
    """Call an aten op with arguments bound by schema name."""
    args = [arguments[a.name] for a in target._schema.arguments if not a.kwarg_only]
    kwargs = {a.name: arguments[a.name] for a in target._schema.arguments if a.kwarg_only}
    return target(*args, **kwargs)


def pick(arguments: Mapping[str, Any], slot: str) -> Any:
    name, _, index = slot.partition("[")
    return arguments[name][int(index[:-1])] if index else arguments.get(name)


def put(arguments: Mapping[str, Any], slot: str, value: Any) -> dict[str, Any]:
    name, _, index = slot.partition("[")
    changed = dict(arguments)
    if index:
        items = list(changed[name])
        items[int(index[:-1])] = value
        changed[name] = items
    else:
        changed[name] = value
    return changed


def slots_of(arguments: Mapping[str, Any]) -> dict[str, fx.Node]:
    """Every tensor argument of a node, by slot."""
    found: dict[str, fx.Node] = {}
    for name, value in arguments.items():
        if is_tensor(value):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found.update({f"{name}[{i}]": item for i, item in enumerate(value) if is_tensor(item)})
    return found


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def tapped(result: torch.Tensor) -> torch.Tensor:
    """The result as a tensor that autograd can be asked about, also where nothing before it needs a gradient."""
    return result if result.requires_grad else result.requires_grad_()


def per_sample_size(tensor: torch.Tensor, axis: Axis) -> int:
    """Elements of one sample's slice; in a graph of free lengths, of the sample that was compiled with."""
    rest = math.prod(hint(size) for i, size in enumerate(tensor.shape) if i != axis.dim)
    outer, _, inner = unfolded(axis, tensor)
    return rest * hint(outer) * hint(inner)
