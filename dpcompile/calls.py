"""How a model is called: the sample input as a flat list of leaves, and later calls checked against it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dpcompile.errors import CaptureError
from dpcompile.lengths import Length, asked_for, check_lengths, of_leaf

TARGETS = "targets"  # name of the extra argument of the fused form


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the sample input: a tensor (shape without its batch size) or a plain value that is baked in."""

    name: str  # "input_ids", "x", "pixels[0]"
    batch_dim: int | None  # None: carries no batch
    shape: tuple[int, ...] | None = None  # the sample's; None for a plain value
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    literal: Any = None
    value: torch.Tensor | None = None  # the sample itself, only where it carries no batch
    free: Mapping[int, Any] = field(default_factory=dict)
    """Dimension whose size a call may choose -> a torch.export.Dim; once captured, the name of its Length."""


@dataclass(frozen=True)
class CallSpec:
    """The one calling pattern that was compiled."""

    parameters: tuple[str, ...]  # names of the forward's positional parameters, in order
    names: tuple[str, ...]  # arguments that the sample gave, in order; TARGETS last in the fused form
    positional: tuple[str, ...]  # which of them are passed by position when the model is traced
    spec: pytree.TreeSpec  # of the list of their values
    leaves: tuple[LeafSpec, ...]
    batch_size: int  # of the sample
    device: torch.device
    views: int = 1  # rows of the batch that are one sample: the program sees them as a dimension of their own
    lengths: tuple[Length, ...] = ()  # once captured
    fixed: bool = False  # the batch size is that of the sample in every call

    @property
    def least(self) -> int:
        """Samples of the smallest batch that a graph is run on."""
        return self.batch_size if self.fixed else 1

    def describe(self) -> str:
        parts = [
            f"{leaf.name}: {str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
            if leaf.shape is not None
            else f"{leaf.name}={leaf.literal!r}"
            for leaf in self.leaves
        ]
        return ", ".join(parts)

    def sample_leaves(self, batch_size: int) -> tuple[Any, ...]:
        """Leaves of the sample's form with another batch size. Values do not matter: capture looks at shapes only."""
        out = []
        for leaf in self.leaves:
            if leaf.shape is None:
                out.append(leaf.literal)
            elif leaf.batch_dim is None:
                out.append(leaf.value)
            else:
                shape = list(leaf.shape)
                shape[leaf.batch_dim : leaf.batch_dim + 1] = (
                    [batch_size] if self.views == 1 else [batch_size, self.views]
                )
                out.append(torch.empty(shape, dtype=leaf.dtype, device=leaf.device))  # pages are never touched
        return tuple(out)

    def unflatten(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """(args, kwargs, targets) for the model from flat leaves."""
        values = dict(zip(self.names, pytree.tree_unflatten(list(leaves), self.spec), strict=True))
        targets = values.pop(TARGETS, None)
        args = tuple(values.pop(name) for name in self.positional)
        return args, values, targets

    def as_rows(self, leaves: Sequence[Any]) -> list[Any]:
        """Leaves of the program as the model takes them: views as rows of the batch."""
        if self.views == 1:
            return list(leaves)
        return [
            value if leaf.batch_dim is None else value.flatten(leaf.batch_dim, leaf.batch_dim + 1)
            for leaf, value in zip(self.leaves, leaves, strict=True)
        ]

    def as_samples(self, leaves: Sequence[Any]) -> list[Any]:
        """Leaves of a call as the program takes them: the inverse of `as_rows`."""
        if self.views == 1:
            return list(leaves)
        return [
            value if leaf.batch_dim is None else value.unflatten(leaf.batch_dim, (-1, self.views))
            for leaf, value in zip(self.leaves, leaves, strict=True)
        ]

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flat leaves of a later call, in the order of `leaves`.

        Raises:
            CaptureError: the call has other arguments, ranks, sizes or plain values than the sample had.
        """
        given = dict(kwargs)
        for i, value in enumerate(args):
            name = self.parameters[i] if i < len(self.parameters) else f"*{i}"
            if name in given:
                raise TypeError(f"got two values for argument {name!r}")
            given[name] = value
        for name in list(given):
            if given[name] is None and name not in self.names:
                del given[name]
        if set(given) != set(self.names):
            raise CaptureError(
                f"call: compiled for the arguments ({', '.join(self.names)}) but called with "
                f"({', '.join(given)}). Compile again with a sample input that has the arguments you train with."
            )
        flat, spec = pytree.tree_flatten([given[name] for name in self.names])
        if spec != self.spec:
            raise CaptureError(f"call: the arguments are nested otherwise than in the sample ({self.describe()}).")
        for leaf, value in zip(self.leaves, flat, strict=True):
            _check_leaf(leaf, value)
        check_lengths(self.lengths, self.leaves, flat)
        return flat

    def batch_size_of(self, leaves: Sequence[Any]) -> int:
        for leaf, value in zip(self.leaves, leaves, strict=True):
            if leaf.batch_dim is not None:
                rows = value.shape[leaf.batch_dim]
                if self.views > 1 and rows % self.views:
                    raise CaptureError(
                        f"call: `{leaf.name}` has {rows} rows; compiled for views={self.views} rows of each sample."
                    )
                return rows // self.views
        raise AssertionError("a call has at least one batched leaf")

    def check_size(self, size: int) -> None:
        """Refuse a batch size that the graphs are not for.

        Raises:
            CaptureError: it is neither that of the sample nor 0, and the batch size is fixed.
        """
        if self.fixed and size not in (0, self.batch_size):
            raise CaptureError(
                f"call: {size} samples; compiled with dynamic=False for batches of {self.batch_size}. Pad to that "
                "size, with sample_weight 0 for what is padded (make_private(..., pad=True) does), or compile without "
                "dynamic=False."
            )


def in_program(leaf: LeafSpec, dim: int, views: int) -> int:
    """Where a dimension of a call's tensor is in the program's: views have one of their own behind the batch."""
    return dim + 1 if views > 1 and leaf.batch_dim is not None and dim > leaf.batch_dim else dim


def _check_leaf(leaf: LeafSpec, value: Any) -> None:
    if leaf.shape is None:
        if value != leaf.literal:
            raise CaptureError(
                f"call: `{leaf.name}` was {leaf.literal!r} when the model was compiled and is {value!r} now. "
                "Plain values are part of the graph: compile again for the new one."
            )
        return
    if not isinstance(value, torch.Tensor):
        raise CaptureError(f"call: `{leaf.name}` must be a tensor, got {type(value).__name__}.")
    fits = value.dim() == len(leaf.shape) and all(
        have == want
        for i, (have, want) in enumerate(zip(value.shape, leaf.shape, strict=False))
        if i != leaf.batch_dim and i not in leaf.free
    )
    if not fits:
        names = {leaf.batch_dim: "B", **leaf.free}
        want = [names.get(i, str(size)) for i, size in enumerate(leaf.shape)]
        raise CaptureError(
            f"call: `{leaf.name}` has shape {list(value.shape)}; compiled for [{', '.join(want)}]. "
            "The other sizes are those of the sample: pad to this shape, compile again, or compile with dynamic=."
        )


def bind_sample(
    model: nn.Module, sample_input: Any, batched: Any, targets: Any = None, views: int = 1, dynamic: Any = None
) -> CallSpec:
    """The calling pattern of a sample input.

    `batched` says where the batch lies when dim 0 of every tensor is not the answer: a dict of argument name to
    dimension (or True for 0, None or False for "no batch"), a collection of the names that carry one, or a sequence
    in the order of the arguments.

    Raises:
        CaptureError: the sample does not fit the model's forward, or its tensors disagree on the batch size.
    """
    parameters, values = _arguments(model, sample_input)
    positional = () if isinstance(sample_input, Mapping) else tuple(values)
    if targets is not None:
        values = {**values, TARGETS: targets}
    dims = _batch_dims(batched, tuple(values))
    free = asked_for(dynamic, tuple(values))
    flat_with_paths, spec = pytree.tree_flatten_with_path(list(values.values()))
    names = tuple(values)
    leaves = [_leaf(names, path, value, dims, free) for path, value in flat_with_paths]
    sizes = {
        leaf.name: leaf.shape[leaf.batch_dim]
        for leaf in leaves
        if leaf.batch_dim is not None and leaf.shape is not None
    }
    if not sizes:
        raise CaptureError("sample: no tensor of the sample input carries a batch axis. Name one with batched=.")
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise CaptureError(
            f"sample: the batch sizes of the sample tensors differ: {found}. Dim 0 of every tensor is taken as the "
            "batch; say otherwise with batched=, for example batched={'mask': None}."
        )
    rows = next(iter(sizes.values()))
    if rows % views:
        raise CaptureError(f"sample: {rows} rows are not a multiple of views={views}.")
    tensors = [value for _, value in flat_with_paths if isinstance(value, torch.Tensor)]
    return CallSpec(parameters, names, positional, spec, tuple(leaves), rows // views, tensors[0].device, views)


def sample_values(sample_input: Any, targets: Any = None) -> list[Any]:
    """The leaves of the sample itself, in the order of `CallSpec.leaves`."""
    if isinstance(sample_input, Mapping):
        values = list(sample_input.values())
    else:
        values = list(sample_input) if isinstance(sample_input, (tuple, list)) else [sample_input]
    return pytree.tree_leaves([*values, *([] if targets is None else [targets])])


def _arguments(model: nn.Module, sample_input: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    signature = inspect.signature(model.forward)
    parameters = tuple(
        p.name
        for p in signature.parameters.values()
        if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )
    try:
        if isinstance(sample_input, Mapping):
            signature.bind(**sample_input)
            return parameters, dict(sample_input)
        args = tuple(sample_input) if isinstance(sample_input, (tuple, list)) else (sample_input,)
        signature.bind(*args)
    except TypeError as error:
        raise CaptureError(
            f"sample: the sample input does not fit {type(model).__name__}.forward{signature}: {error}."
        ) from error
    return parameters, {parameters[i] if i < len(parameters) else f"*{i}": value for i, value in enumerate(args)}


def _batch_dims(batched: Any, names: tuple[str, ...]) -> dict[str, int | None]:
    if batched is None:
        return dict.fromkeys(names, 0)
    if isinstance(batched, Mapping):
        chosen = {name: batched.get(name, 0) for name in names}
        unknown = set(batched) - set(names)
    elif isinstance(batched, str) or (
        isinstance(batched, (set, frozenset, list, tuple)) and batched and all(isinstance(b, str) for b in batched)
    ):
        listed = {batched} if isinstance(batched, str) else set(batched)
        chosen = {name: 0 if name in listed or name == TARGETS else None for name in names}
        unknown = listed - set(names)
    elif isinstance(batched, Sequence):
        arguments = [name for name in names if name != TARGETS]
        if len(batched) != len(arguments):
            raise CaptureError(f"sample: batched= has {len(batched)} entries for {len(arguments)} arguments.")
        chosen = {**dict.fromkeys(names, 0), **dict(zip(arguments, batched, strict=True))}
        unknown = set()
    else:
        raise CaptureError(f"sample: batched= must be a dict, names or a sequence, got {type(batched).__name__}.")
    if unknown:
        raise CaptureError(f"sample: batched= names {sorted(unknown)}, but the arguments are {list(names)}.")
    return {name: 0 if dim is True else None if dim is False else dim for name, dim in chosen.items()}


def _leaf(
    names: tuple[str, ...],
    path: Any,
    value: Any,
    dims: Mapping[str, int | None],
    free: Mapping[str, Mapping[int, Any]],
) -> LeafSpec:
    argument = names[path[0].idx]
    name = argument + pytree.keystr(path[1:])
    if not isinstance(value, torch.Tensor):
        return LeafSpec(name, None, literal=value)
    dim = dims[argument]
    if dim is not None and value.dim() == 0:
        if dim != 0:
            raise CaptureError(f"sample: `{name}` has no dimension {dim}.")
        dim = None  # a 0-dim tensor cannot carry a batch
    if dim is not None and not -value.dim() <= dim < value.dim():
        raise CaptureError(f"sample: `{name}` of shape {list(value.shape)} has no dimension {dim} for the batch.")
    dim = dim % value.dim() if dim is not None else None
    own = of_leaf(name, value.shape, dim, free.get(argument, {}))
    kept = value if dim is None else None
    return LeafSpec(name, dim, tuple(value.shape), value.dtype, value.device, value=kept, free=own)
