"""The records that flow from stage to stage. Frozen; nodes are referred to by name, which survives a graph copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import sympy
import torch
from torch import fx

from dpcompile.stored import StoredGraph

Size = int | sympy.Expr
"""A size, or a factor of one: a number, or an expression in the lengths that a call may choose."""


class InputKind(Enum):
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # a tensor written as a literal in the model's code
    USER = "user"
    TANGENT = "tangent"  # gradient of a user output; split form only
    BOUND = "bound"  # [G] float64: max_grad_norm of every clip group
    WEIGHT = "weight"  # [B]: how often each sample's clipped gradient counts
    HANDLE = "handle"  # where the backward records its norms; split form only


@dataclass(frozen=True)
class Input:
    """One placeholder of a program."""

    node: str
    kind: InputKind
    target: str = ""  # qualified name of a parameter, buffer or constant; a readable name of a user input
    trainable: bool = False
    batch_dim: int | None = None  # which dimension of a user input carries the batch


class OutputKind(Enum):
    USER = "user"
    BUFFER = "buffer"  # new value of a buffer, to be written back after the forward
    GRADIENT = "gradient"  # clipped gradient of a parameter
    NORMS = "norms"  # [G, B] per-sample gradient norms of every clip group


@dataclass(frozen=True)
class Output:
    """One result of a program, in order. `node` is None where a model returns a plain constant."""

    node: str | None
    kind: OutputKind
    target: str = ""  # qualified name of the buffer or parameter
    literal: Any = None
    wants_gradient: bool = False  # user output that a loss may be computed from


@dataclass(frozen=True)
class Program:
    """A flat graph and the meaning of its inputs and outputs.

    Placeholders stand in the order of `inputs`, results in the order of `outputs`. Every node carries
    `meta["val"]`, a fake tensor whose batch size is the free symbol `batch`.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    batch: torch.SymInt  # the batch size as a free symbol of the graph's ShapeEnv
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lengths: tuple[torch.SymInt, ...] = ()  # other sizes of user inputs that a call may choose, as free symbols

    def __reduce__(self) -> Any:
        """A stored program runs; it has no fake tensors any more, so it cannot be compiled further."""
        return _read, (StoredGraph.of(self.module), self.inputs, self.outputs, dict(self.constants))

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> Program:
        """The same program on a graph of its own; nodes keep their names and meta."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, module=fx.GraphModule(self.module, graph))

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.name == name)

    def nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def inputs_of(self, kind: InputKind) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.kind is kind)


def _read(graph: StoredGraph, *others: Any) -> Program:
    inputs, outputs, constants = others
    return Program(graph.module(), inputs, outputs, None, constants)  # pyright: ignore[reportArgumentType]


def ancestors(roots: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that some of these depend on, themselves included."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


# ---------------------------------------------------------------- batch tracking


@dataclass(frozen=True)
class Axis:
    """Where the batch lies: dimension `dim` has size outer * B * inner, sample i at [:, i, :] of its unfolding."""

    dim: int
    outer: Size = 1
    inner: Size = 1

    @property
    def folded(self) -> bool:
        return self.outer != 1 or self.inner != 1


class Kind(Enum):
    CONSTANT = "constant"  # depends on no parameter and no sample
    PARAMETER = "parameter"  # depends on parameters and constants only
    BATCHED = "batched"  # sample i's data lies only in slice i of `axis`
    ROWS = "rows"  # the sample numbers 0..B-1 along `axis`: may only select each sample's own row
    REDUCED = "reduced"  # sum (or mean) over samples of a per-sample value, up to an added constant
    MIXED = "mixed"  # anything else


@dataclass(frozen=True)
class Value:
    """What batch tracking knows about one tensor."""

    kind: Kind
    axis: Axis | None = None  # for BATCHED and ROWS
    mean: bool = False  # for REDUCED: divided by the number of samples
    penalised: bool = False  # for REDUCED: a term of the parameters alone was added
    trains: bool = False  # depends on a trainable parameter (set for every kind)

    def __str__(self) -> str:
        if self.axis is None:
            return self.kind.value
        fold = f", {self.axis.outer} x B x {self.axis.inner}" if self.axis.folded else ""
        return f"{self.kind.value}(dim {self.axis.dim}{fold})"


@dataclass(frozen=True)
class Tracked:
    """The verdict of batch tracking: a Value for each node (a tuple of them for a node with several results)."""

    values: Mapping[str, Value | tuple[Value, ...]]
    findings: tuple[Any, ...] = ()  # of errors.Finding; empty when every output is per-sample

    def value(self, node: fx.Node) -> Value:
        found = self.values[node.name]
        assert isinstance(found, Value), f"{node.name} has several results"
        return found


Forward = Callable[..., Any]


# ---------------------------------------------------------------- sites


class Chain(Enum):
    """How a value derives from its parameters, by what is known of the map from parameter to value."""

    PERMUTE = "permute"  # the parameter itself, or its dimensions in another order
    LOOKUP = "lookup"  # rows of one parameter, by an index that is the same for every sample
    SELECT = "select"  # each element is one element of one parameter: views, slices, indices
    GENERAL = "general"  # anything differentiable


@dataclass(frozen=True)
class Derived:
    """A parameter-derived value that meets a sample: the parameter itself, or something computed from parameters."""

    node: str  # in the captured graph
    params: tuple[str, ...]  # placeholders it is computed from, in graph order
    chain: Chain
    permutation: tuple[int, ...] = ()  # for PERMUTE: value = parameter.permute(permutation)
    body: tuple[str, ...] = ()  # nodes between the parameters and the value, the value included, in order
    leaves: tuple[str, ...] = ()  # other nodes that the body reads


@dataclass(frozen=True)
class Site:
    """One use of one parameter value: an edge into an op whose result is batched."""

    name: str  # unique: "<op node>:<slot>"
    node: str  # the op, in the captured graph
    slot: str  # which argument
    value: str  # node of the Derived value
    rule: str
    op: str  # "linear", for reports
    module: str  # the user's module, "transformer.h.0.attn"
    work: Any  # rules.sites.base.Work


class Space(Enum):
    """Where the per-sample gradients of a group meet before their norm is taken."""

    PARAMETER = "parameter"  # in the parameter itself: forms combine, ghost norms possible
    VALUE = "value"  # in the value: its elements are distinct elements of the parameter, so norms agree
    PULLBACK = "pullback"  # each sample's gradient is carried back to the parameters first


@dataclass(frozen=True)
class Group:
    """Sites whose gradients must be added before the norm is taken: one unit of choice."""

    name: str
    space: Space
    values: tuple[Derived, ...]
    params: tuple[str, ...]  # placeholders
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Uses:
    """Every use of every trainable parameter."""

    groups: tuple[Group, ...]
    unused: tuple[str, ...]  # placeholders of trainable parameters that no sample's output depends on
    values: tuple[Derived, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)


# ---------------------------------------------------------------- backward


@dataclass(frozen=True)
class SiteGradient:
    """What the backward graph holds for one site: nodes of the joint program."""

    saved: tuple[str, ...]  # what the form needs beside the gradient
    grad: str


@dataclass(frozen=True)
class Backward:
    """A program with forward and backward for output gradients only, and where each site's tensors are in it."""

    program: Program
    sites: Mapping[str, SiteGradient]  # by site name; a site whose gradient is always zero is absent
    leaves: Mapping[str, str]  # node of the captured graph -> node here, for what derived values are computed from


@dataclass(frozen=True)
class Draft:
    """A program on its way through the rewrites, with what each leaves for those behind it."""

    program: Program
    norms: str = ""  # [G, B] norms of the unscaled per-sample gradients
    factors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Placeholder of a parameter -> its clip factors [B], and which samples are finite [B]."""
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Group -> per-sample gradients that are kept, in the order of its parameters."""
