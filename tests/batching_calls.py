"""One op call as a program: where it carries the batch, what tracking says of it, and whether that is the truth.

A call is written with tensors in words: "f:B34" is a float tensor of shape [B, 3, 4], "i:(2B3)" integers with the batch
between two folds, "r:B" the numbers of the samples. `SIZE` as an argument is the batch size itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from batching_oracle import close, rows
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dpcompile.ir import Axis, Input, InputKind, Kind, Output, OutputKind, Program, Value
from dpcompile.passes.track_batch import track_batch
from dpcompile.rules.batching import TABLE
from dpcompile.torch_internals import symbolic_batch

aten = torch.ops.aten

HINT, SMALL, ELSE = 31, 7, 5  # batch size while tracking, while running; size of a dimension the batch has left
WORD = re.compile(r"^[fdpibcstnro]:[B()0-9]*$")


def _positive(*s: int) -> Tensor:
    """Symmetric matrices without zero or negative eigenvalues, where the shape has matrices."""
    x = torch.randn(s)
    return x @ x.mT + torch.eye(s[-1]) if s[-2:-1] == s[-1:] else x


MAKE: dict[str, Callable[..., Tensor]] = {
    "f": lambda *s: torch.randn(s),
    "d": lambda *s: torch.randn(s, dtype=torch.float64),
    "p": lambda *s: 0.1 + 0.8 * torch.rand(s),
    "i": lambda *s: torch.randint(0, 3, s),
    "b": lambda *s: torch.rand(s) > 0.5,
    "c": lambda *s: torch.randn(s, dtype=torch.complex64),
    "s": lambda *s: _positive(*s),
    "n": lambda *s: torch.ones(s, dtype=torch.int32),
    "t": lambda *s: torch.ones(s, dtype=torch.bool),
}
NUMBERS = {"r": 1, "o": 3}  # arange(B), and where bags of three begin


class _Size:
    """The batch size, or a multiple of it, as an argument."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __repr__(self) -> str:
        return "B" if self.times == 1 else f"{self.times} B"

    def __mul__(self, times: int) -> _Size:
        return _Size(self.times * times)

    __rmul__ = __mul__


SIZE = _Size()

# Kernels that read whatever memory the sizes of their operands let them; what calls them checks.
UNCHECKED = {
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten.binary_cross_entropy),
    *(aten._fft_c2c, aten._fft_r2c, aten._fft_c2r, aten.native_layer_norm, aten.native_group_norm),
    *(aten._fused_rms_norm, aten.native_batch_norm, aten._native_batch_norm_legit, aten._batch_norm_no_update),
    *(aten._native_batch_norm_legit_functional, aten._native_batch_norm_legit_no_training),
    *(aten._batch_norm_with_update, aten._batch_norm_with_update_functional),
}
# How many random numbers these draw depends on the data: only the samples behind the changed one notice.
DRAWS_AS_NEEDED = {aten.poisson, aten.rrelu_with_noise_functional, aten._standard_gamma, aten.multinomial}


@dataclass(frozen=True, repr=False)
class Word:
    """A tensor argument: sizes, and the axis of its batch if it has one."""

    kind: str
    sizes: tuple[int, ...]
    axis: Axis | None

    @classmethod
    def read(cls, text: str) -> Word:
        kind, _, rest = text.partition(":")
        sizes, axis = [], None
        for outer, inner, plain in re.findall(r"\((\d?)B(\d?)\)|([B\d])", rest):
            if plain in ("B", ""):
                axis = Axis(len(sizes), int(outer or 1), int(inner or 1))
            sizes.append(1 if plain in ("B", "") else int(plain))
        return cls(kind, tuple(sizes), axis)

    def __str__(self) -> str:
        sizes = list(map(str, self.sizes))
        if self.axis is not None:
            sizes[self.axis.dim] = f"({self.axis.outer}B{self.axis.inner})" if self.axis.folded else "B"
        return f"{self.kind}:{''.join(sizes)}"

    __repr__ = __str__

    def shape(self, batch: Any) -> list[Any]:
        shape: list[Any] = list(self.sizes)
        if self.axis is not None:
            shape[self.axis.dim] = batch * (self.axis.outer * self.axis.inner)
        return shape

    def moved(self, dim: int | None) -> Word:
        """The batch in another dimension; with None in none, and a size of one where it was."""
        sizes = list(self.sizes)
        if self.axis is not None:
            sizes[self.axis.dim] = 1 if dim is None else ELSE
        return replace(self, sizes=tuple(sizes), axis=None if dim is None else Axis(dim))


@dataclass(frozen=True)
class OpCall:
    """An op with its arguments, tensors as words."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def line(self) -> Any:
        """The key of the table that answers for the op; the op itself where torch's tag does."""
        return self.op if self.op in TABLE or self.op.overloadpacket not in TABLE else self.op.overloadpacket

    def words(self) -> list[Word]:
        found: list[Word] = []
        self.mapped(found.append)
        return found

    def mapped(self, word: Callable[[Word], Any], size: Callable[[int], Any] = _Size) -> tuple[tuple[Any, ...], Any]:
        """The arguments with each tensor's word and each batch size replaced."""

        def each(item: Any) -> Any:
            if isinstance(item, Word):
                return word(item)
            if isinstance(item, _Size):
                return size(item.times)
            return [each(i) for i in item] if isinstance(item, (list, tuple)) else item

        return tuple(each(arg) for arg in self.args), {name: each(arg) for name, arg in self.kwargs.items()}

    def with_words(self, words: Sequence[Word]) -> OpCall:
        rest = iter(words)
        args, kwargs = self.mapped(lambda _: next(rest))
        return replace(self, args=args, kwargs=kwargs)

    def moved(self) -> Iterator[OpCall]:
        """The same call with the batch elsewhere: in any dimension of any of its tensors."""
        if self.op.overloadpacket in UNCHECKED | DRAWS_AS_NEEDED:
            return
        words = self.words()
        places = [[None, *range(len(word.sizes))] if word.kind not in NUMBERS else [0] for word in words]
        own = tuple(word.axis.dim if word.axis else None for word in words)
        for chosen in itertools.islice(itertools.product(*places), 100):
            if chosen != own and any(dim is not None for dim in chosen):
                pairs = zip(words, chosen, own, strict=True)
                yield self.with_words([w if dim == before else w.moved(dim) for w, dim, before in pairs])

    def folded(self) -> Iterator[OpCall]:
        """The same call with two and three rows of each sample where one was, before and behind each other."""
        words = self.words()
        if self.op.overloadpacket in DRAWS_AS_NEEDED:
            return
        if any(word.axis is not None and (word.axis.folded or word.kind in NUMBERS) for word in words):
            return
        for outer, inner in ((2, 1), (1, 3), (2, 3)):
            yield self.with_words(
                [replace(w, axis=w.axis and Axis(w.axis.dim, outer, inner)) for w in words]  # the sizes follow
            )

    def __str__(self) -> str:
        parts = [*map(str, self.args), *(f"{name}={arg}" for name, arg in self.kwargs.items())]
        return f"{self.op}({', '.join(parts)})"


def call(op: str, *args: Any, **kwargs: Any) -> OpCall:
    """A call of an aten op ("sum.dim_IntList"; the first overload where none is named)."""
    name, _, overload = op.partition(".")
    packet = getattr(torch.ops.aten, name)
    overloads = packet.overloads()
    chosen = getattr(packet, overload or ("default" if "default" in overloads else overloads[0]))
    return read(OpCall(chosen, args, kwargs))


def read(written: OpCall) -> OpCall:
    def each(item: Any) -> Any:
        if isinstance(item, str) and WORD.match(item):
            return Word.read(item)
        return [each(i) for i in item] if isinstance(item, (list, tuple)) else item

    return replace(
        written, args=tuple(map(each, written.args)), kwargs={n: each(arg) for n, arg in written.kwargs.items()}
    )


# ---------------------------------------------------------------- tracking


class Impossible(Exception):  # noqa: N818
    """The op cannot be called with these shapes, or fixes the batch size."""


@dataclass(frozen=True)
class Verdict:
    """What tracking says of each result of a call; `problem` is why not."""

    values: tuple[Value, ...]
    problem: str = ""

    @property
    def accepts(self) -> bool:
        return self.values[0].kind is not Kind.MIXED


def track(made: OpCall) -> Verdict:
    """What batch tracking says of one call.

    Raises:
        Impossible: the op takes no such shapes, or only at one batch size.
    """
    with _possible():
        _run(made, [_samples(word) for word in made.words()], range(SMALL))
    batch, shape_env = _batch()
    before = shape_env.var_to_range.copy()
    with symbolic_batch(), batch.fake_mode, enable_python_dispatcher():
        graph = _Graph(batch)
        args, kwargs = made.mapped(graph.tensor, graph.size)
        with _possible():
            result = graph.call(made.op, *args, **kwargs)
    if shape_env.var_to_range != before:
        _batch.cache_clear()  # the next call starts with a batch size that is free again
    if shape_env.replacements:
        raise Impossible("fixes the batch size")
    found = track_batch(graph.program(result))
    values = found.values[result.name]
    problems = [finding.problem for finding in found.findings]
    return Verdict(values if isinstance(values, tuple) else (values,), problems[0] if problems else "")


@functools.cache
def _batch() -> tuple[FakeTensor, ShapeEnv]:
    """A tensor [B] of a free batch size."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    batch = mode.from_tensor(torch.empty(HINT), symbolic_context=context, source=ConstantSource("batch"))
    return batch, shape_env


@contextlib.contextmanager
def _possible() -> Iterator[None]:
    log = logging.getLogger("torch._subclasses.fake_tensor")  # tells of each shape that an op refuses
    before, log.disabled = log.disabled, True
    try:
        yield
    except Exception as error:
        raise Impossible(str(error)) from error
    finally:
        log.disabled = before


class _Graph:
    """A graph under construction, with the fake value of every node."""

    def __init__(self, batch: Tensor) -> None:
        self.graph = fx.Graph()
        self.inputs: list[Input] = []
        self.batch = batch.shape[0]
        self.rows = self.placeholder(batch, 0)

    def placeholder(self, value: Tensor, dim: int | None) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = value
        self.inputs.append(Input(node.name, InputKind.USER, node.name, batch_dim=dim))
        return node

    def tensor(self, word: Word) -> fx.Node:
        if word.kind == "r":
            return self.call(aten.arange.default, self.size(1))
        if word.kind == "o":
            return self.call(aten.arange.start_step, 0, self.size(3), 3)
        dtype, axis = MAKE[word.kind](*[1] * len(word.sizes)).dtype, word.axis
        if axis is None or not axis.folded:
            made = torch.empty(word.shape(self.batch), dtype=dtype)
            return self.placeholder(made, axis and axis.dim)
        before, after = list(word.sizes[: axis.dim]), list(word.sizes[axis.dim + 1 :])
        made = torch.empty([*before, axis.outer, self.batch, axis.inner, *after], dtype=dtype)
        rows = self.size(axis.outer * axis.inner)
        return self.call(aten.reshape.default, self.placeholder(made, axis.dim + 1), [*before, rows, *after])

    def size(self, times: int) -> fx.Node:
        size = self.call(aten.sym_size.int, self.rows, 0)
        return size if times == 1 else self.call(operator.mul, size, times)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        node.meta["val"] = target(*given[0], **given[1])
        return node

    def program(self, result: fx.Node) -> Program:
        self.graph.output((result,))
        module = fx.GraphModule({}, self.graph)
        return Program(module, tuple(self.inputs), (Output(result.name, OutputKind.USER),), self.batch)


# ---------------------------------------------------------------- truth


def assert_true(made: OpCall, verdict: Verdict) -> None:
    """What tracking says of a call, held against the op itself.

    Another value for one sample leaves the others' results bit-identical; without randomness, leaving out the last
    sample or exchanging samples changes nothing for the others, and what is called a sum or mean over samples is one.
    """
    torch.manual_seed(0)
    samples = [_samples(word) for word in made.words()]
    before = _run(made, samples, range(SMALL))
    other = [
        _samples(word) if word.axis is not None else given for word, given in zip(made.words(), samples, strict=True)
    ]
    changed = SMALL - 1 if made.op.overloadpacket in DRAWS_AS_NEEDED else SMALL // 2
    mixed = [
        given if word.axis is None else [*given[:changed], new[changed], *given[changed + 1 :]]
        for word, given, new in zip(made.words(), samples, other, strict=True)
    ]
    kept = [i for i in range(SMALL) if i != changed]
    _compare(made, verdict, before, _run(made, mixed, range(SMALL)), kept, kept, exact=True)
    if torch.Tag.nondeterministic_seeded in made.op.tags or made.op.overloadpacket in DRAWS_AS_NEEDED:
        return
    for order in (list(range(SMALL - 1)), [*range(1, SMALL - 1), 0]):
        _compare(made, verdict, before, _run(made, samples, order), order, list(range(SMALL - 1)), exact=False)
    _compare_sums(made, verdict, samples, before)


def _samples(word: Word) -> list[Tensor]:
    """A tensor as what each sample holds of it: [outer, inner, *others], or the one tensor that all share."""
    if word.kind in NUMBERS:
        return [torch.empty(0)] * SMALL
    if word.axis is None:
        return [MAKE[word.kind](*word.sizes)]
    if word.kind == "s" and word.axis.dim == 0:  # matrices of each sample, which are symmetric
        return [MAKE["s"](word.axis.outer, word.axis.inner, *word.sizes[1:]) for _ in range(SMALL)]
    others = [size for dim, size in enumerate(word.sizes) if dim != word.axis.dim]
    return [MAKE[word.kind](word.axis.outer, word.axis.inner, *others) for _ in range(SMALL)]


def _run(made: OpCall, samples: list[list[Tensor]], order: Sequence[int]) -> list[Any]:
    rest = iter(samples)

    def tensor(word: Word) -> Tensor:
        given = next(rest)
        if word.kind in NUMBERS:
            step = NUMBERS[word.kind]
            return torch.arange(0, len(order) * step, step)
        if word.axis is None:
            return given[0].clone()
        stacked = torch.stack([given[i] for i in order], 1)  # [outer, B, inner, *others]
        return stacked.flatten(0, 2).movedim(0, word.axis.dim).contiguous()

    args, kwargs = made.mapped(tensor, lambda times: times * len(order))
    torch.manual_seed(1)
    result = made.op(*args, **kwargs)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _compare(
    made: OpCall,
    verdict: Verdict,
    before: list[Any],
    after: list[Any],
    rows_before: list[int],
    rows_after: list[int],
    exact: bool,
) -> None:
    if "empty" in made.op.name():
        return  # memory as it was found
    for value, a, b in zip(verdict.values, before, after, strict=True):
        if not isinstance(a, Tensor) or a.numel() == 0 or value.kind in (Kind.MIXED, Kind.REDUCED):
            continue
        if value.kind is Kind.ROWS:
            a, b = rows(a, value, rows_after), rows(b, value, rows_after)
        else:
            a, b = rows(a, value, rows_before), rows(b, value, rows_after)
        same = torch.equal(a.nan_to_num(), b.nan_to_num()) if exact else close(a, b)
        assert same, f"{made} is not {value}"


def _compare_sums(made: OpCall, verdict: Verdict, samples: list[list[Tensor]], before: list[Any]) -> None:
    """A sum over samples is the sum of what each gives by itself, a mean their mean."""
    if not any(value.kind is Kind.REDUCED for value in verdict.values):
        return
    alone = [_run(made, samples, [i]) for i in range(SMALL)]
    for k, value in enumerate(verdict.values):
        if value.kind is Kind.REDUCED:
            total = torch.stack([results[k] for results in alone]).sum(0)
            assert close(before[k], total / SMALL if value.mean else total), f"{made} is not {value}"
