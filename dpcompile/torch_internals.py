"""Every private torch API that dpcompile touches, each with the reason why no public one serves."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._decomp import decomposition_table  # the public tables hold core ops alone
from torch._dispatch.python import enable_python_dispatcher  # symbolic shapes need it inside make_fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.backends import opt_einsum
from torch.export.exported_program import (  # how run_decompositions keeps composed ops whole
    _override_composite_implicit_decomp,
    _split_decomp_table_to_cia_and_python_decomp,
)
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import _BoxedCodeGen  # no public code generator frees its inputs
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer, TracerBase
from torch.utils import checkpoint
from torch.utils._pytree import tree_map_only
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from dpcompile.errors import NoRuleError

aten = torch.ops.aten


def made_of(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """The op as a function of simpler ops: the kernel that composes it, or torch's own table; None for a basic op."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if op.has_kernel_for_dispatch_key(key):
        return functools.partial(op._op_dk, key)  # `op.decompose` would call what export has put in its place
    return decomposition_table.get(op)


@contextlib.contextmanager
def composed_by(table: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Ops whose shapes tracing finds by the functions of the table, and not by those in Python that torch has for them.

    torch's own, for recurrent layers, go through the steps one by one and thereby fix their number.
    """
    before = {op: dict(op.py_kernels) for op in table}
    try:
        for op, fn in table.items():
            op.py_kernels.update(dict.fromkeys(op.py_kernels, fn))
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernels in before.items():
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


@contextlib.contextmanager
def users_frames() -> Iterator[None]:
    """Stack traces with the frames of all the user's code: export keeps those of functions named `forward` alone.

    A message then names the line in a helper or in the loss. Code of installed packages is kept as export keeps it.
    """
    before = TracerBase._filter_traceback_frames

    def kept(self: TracerBase, user_stack_summary: traceback.StackSummary) -> traceback.StackSummary:
        inside = itertools.dropwhile(lambda frame: frame.name != "forward", user_stack_summary)
        return traceback.StackSummary.from_list(
            [frame for frame in inside if frame.name == "forward" or "-packages" not in frame.filename]
        )

    TracerBase._filter_traceback_frames = kept
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = before


@contextlib.contextmanager
def symbolic_batch() -> Iterator[None]:
    """How export and make_fx treat the batch size while dpcompile looks at a model.

    - A size with a hint is treated as if it could be 0 or 1: the batch range is [0, inf) instead of [2, inf).
    - torch's table decomposes nll_loss by a function of another signature (pytorch issue 106375), which reads
      reduction="none" as a mean where sizes are symbolic; without the entry the op's own shape rule is used.
    - opt_einsum, where it is installed, plans an einsum of three operands for the batch size that it sees.
    """
    broken = decomposition_table.pop(aten.nll_loss.default, None)
    try:
        with (
            fx_config.patch(backed_size_oblivious=True),  # pyright: ignore[reportAttributeAccessIssue]
            opt_einsum.flags(enabled=False, strategy=None),
        ):
            yield
    finally:
        if broken is not None:
            decomposition_table[aten.nll_loss.default] = broken


def fake_mode_of(graph: torch.fx.Graph) -> FakeTensorMode:
    """The fake tensor mode, with its ShapeEnv, in which a captured graph lives."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise AssertionError("a captured graph has at least one tensor")


@contextlib.contextmanager
def uncached(mode: FakeTensorMode) -> Iterator[None]:
    """The mode remembers no results. Where few ops are alike and the batch size is free, to build a value from its
    remembered shape takes longer than to compute it (torch 2.13).
    """
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = before


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Ops as they are written: autocast would put norms into narrow types. Casts of the model are ops of its graph."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@functools.cache
def _core_decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's table looks through every op that is registered before it is read: once is enough."""
    return dict(torch.export.default_decompositions())


def trace(
    fn: Callable[..., Any], *values: Any, mode: FakeTensorMode, decompose: bool = False, vmapped: bool = False
) -> torch.fx.GraphModule:
    """The aten graph of `fn` on fake values, with the batch size kept symbolic; in core aten ops with `decompose`.

    make_fx in "real" mode on fake inputs keeps their ShapeEnv: the same symbol stands for the batch everywhere.
    `vmapped` says that `fn` uses torch.func.vmap over the batch: see `_trace_vmapped`.
    """
    table = _core_decompositions() if decompose else {}
    with symbolic_batch(), enable_python_dispatcher(), without_autocast():
        free = _symbols(values)
        if vmapped and len(free) < 2:  # one number for each of several sizes could not be told apart in a trace
            fn = _trace_vmapped(fn, values)
        with mode:
            module = make_fx(fn, decomposition_table=table, tracing_mode="real")(*values)
            if any(mutates(node) for node in module.graph.nodes):
                # some ops (circular padding) are copies into an empty tensor: a second trace makes them pure, and
                # gives results other strides, for which a view need not exist
                _reshape_views(module)
                module = make_fx(torch.func.functionalize(module), tracing_mode="real")(*values)
    if vmapped and len(free) > 1 and _symbols(values) != free:
        raise NoRuleError(
            "find-sites: lengths are free (dynamic=), and torch.func.vmap of a value that is computed from parameters, "
            "or of an op with one, fixes them. Compute it with views, pointwise ops and products, or fix the length."
        )
    return module


def trace_by(table: Mapping[Any, Callable[..., Any]], fn: Callable[..., Any], *values: Any) -> torch.fx.GraphModule:
    """The graph of `fn` on fake values in the ops that `run_decompositions(table)` leaves: composed ones stay whole."""
    basic: dict[Any, Callable[..., Any]]
    composed, basic = _split_decomp_table_to_cia_and_python_decomp(dict(table))
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    kept_whole = _override_composite_implicit_decomp(composed)
    with mode, kept_whole, torch.no_grad(), enable_python_dispatcher():  # autocast's casts are ops of the model
        return make_fx(fn, decomposition_table=basic, tracing_mode="real")(*values)


def _reshape_views(module: torch.fx.GraphModule) -> None:
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    module.recompile()


class ReentrantCheckpointError(RuntimeError):
    """A region of torch.utils.checkpoint whose backward no graph can follow."""


@contextlib.contextmanager
def checkpointed_regions() -> Iterator[list[str]]:
    """One entry for each region of torch.utils.checkpoint that runs inside. Tracing leaves no other mark of them."""
    found: list[str] = []
    whole, reentrant = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(getattr(function, "__qualname__", type(function).__name__))
        return whole(function, *args, **kwargs)

    class Refused:
        @staticmethod
        def apply(*_: Any) -> Any:
            raise ReentrantCheckpointError("torch.utils.checkpoint(use_reentrant=True)")

    checkpoint._checkpoint_without_reentrant_generator = counted
    checkpoint.CheckpointFunction = Refused  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        checkpoint._checkpoint_without_reentrant_generator = whole
        checkpoint.CheckpointFunction = reentrant


def fake_value(node: torch.fx.Node) -> Any:
    """What a node gives, from the fake values of its arguments."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with symbolic_batch(), enable_python_dispatcher(), fake_mode_of(node.graph), without_autocast():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _trace_vmapped(fn: Callable[..., Any], values: Sequence[Any]) -> torch.fx.GraphModule:
    """`fn` traced at one batch size, with that size then replaced by the batch symbol.

    Some batching rules of functorch (slice_backward) write the sizes that they see into the graph, which would fix
    the batch symbol. So the trace is made with plain numbers, in a fake mode of its own; the batch size there is a
    prime that no dimension of the model shares (passes/capture.py), and its multiples are the batch.
    """
    alone = FakeTensorMode()
    with alone:
        concrete = [
            torch.empty([_number(s) for s in v.shape], dtype=v.dtype, device=v.device)
            if isinstance(v, torch.Tensor)
            else v
            for v in values
        ]
        with without_vmap_loops():
            module = make_fx(fn, tracing_mode="real")(*concrete)
    source, dim, fold, hint = _batch_of(values)
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    made: dict[int, torch.fx.Node] = {}

    def freed(size: Any) -> Any:
        if type(size) is not int or size == 0 or abs(size) >= 2**40 or size % hint:
            return size
        if size not in made:
            with graph.inserting_after(placeholders[-1]):
                batch = graph.call_function(aten.sym_size.int, (placeholders[source], dim))
            if fold > 1:
                with graph.inserting_after(batch):
                    batch = graph.call_function(operator.floordiv, (batch, fold))
            with graph.inserting_after(batch):
                made[size] = graph.call_function(operator.mul, (batch, size // hint))
        return made[size]

    _reshape_views(module)  # the strides of the trace were those of plain tensors
    for node in list(graph.nodes):
        if node.op == "call_function":
            node.args = tuple(
                [freed(item) for item in arg] if isinstance(arg, (list, tuple)) else freed(arg) for arg in node.args
            )
    module.recompile()
    return module


@contextlib.contextmanager
def without_vmap_loops() -> Iterator[None]:
    """An op that vmap has no rule for is an error, not a loop over the samples, which would fix the batch size."""
    internals = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    before = internals._is_vmap_fallback_enabled()
    internals._set_vmap_fallback_enabled(False)
    try:
        yield
    except RuntimeError as error:
        name = str(error).partition(" hit the vmap fallback")
        if not name[1]:
            raise
        raise NoRuleError(
            f"find-sites: a per-sample gradient needs torch.func.vmap, which has no rule for `{name[0]}`. Write the "
            "model with linear, conv, embedding or pointwise ops there, or add a rule in dpcompile/rules/sites/."
        ) from error
    finally:
        internals._set_vmap_fallback_enabled(before)


def symbolic_size(expr: sympy.Expr, shown: torch.SymInt) -> torch.SymInt:
    """An expression in sizes as a size of the ShapeEnv that another size is shown of.

    make_fx finds the ops that compute it where the tensors of the trace show the symbols in it.
    """
    made = shown.node.shape_env.create_symintnode(expr, hint=int(expr.subs(list(sample_sizes(shown).items()))))
    assert isinstance(made, torch.SymInt)
    return made


def computed_size(expr: sympy.Expr, free: Mapping[Any, torch.fx.Node], graph: torch.fx.Graph) -> torch.fx.Node:
    """An expression in free sizes as nodes of a graph, where nodes are inserted now; torch knows every operator."""
    tracer = GraphAppendingTracer(graph)
    result = sympy_interp(PythonReferenceAnalysis, {s: torch.fx.Proxy(n, tracer) for s, n in free.items()}, expr).node
    todo = [result]
    while todo:
        node = todo[-1]
        missing = [arg for arg in node.all_input_nodes if "val" not in arg.meta]
        if not missing:
            args = map_arg(node.args, lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args)  # type: ignore[operator]
            todo.pop()
        todo += missing
    return result


def sample_sizes(size: torch.SymInt) -> dict[sympy.Symbol, int]:
    """What the free symbols of a size's ShapeEnv are for the sample (torch 2.13 renamed the attribute)."""
    env = size.node.shape_env
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return {symbol: int(value) for symbol, value in known.items()}


def bounds_of(size: torch.SymInt) -> tuple[int, int | None]:
    """The least and the greatest value of a free size that traces have left; None: any."""
    env, symbol = size.node.shape_env, size.node.expr
    least, greatest = 0, None
    for own, values in env.var_to_range.items():  # those of sizes that were found to be equal count for it
        if env.simplify(own) != symbol:
            continue
        least = max(least, int(values.lower))
        if values.upper.is_Integer:
            greatest = int(values.upper) if greatest is None else min(greatest, int(values.upper))
    return least, greatest


def decisions_on(size: torch.SymInt) -> list[sympy.Basic]:
    """What traces have found to be true of a free size, beyond its bounds: other values may lead to other graphs."""
    env = size.node.shape_env
    found = [env.simplify(guard.expr) for guard in env.guards]
    return list(dict.fromkeys(expr for expr in found if size.node.expr in expr.free_symbols))


def _number(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _symbols(values: Sequence[Any]) -> set[sympy.Symbol]:
    """The sizes that are free in the tensors of a trace: the batch size, and lengths."""
    return {
        symbol
        for value in values
        if isinstance(value, torch.Tensor)
        for size in value.shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }


def _batch_of(values: Sequence[Any]) -> tuple[int, int, int, int]:
    """(input, dimension, rows of each sample in it, traced batch size) of the input that shows the batch best."""
    found = []
    for i, value in enumerate(values):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                (symbol,) = size.node.expr.free_symbols
                fold = int(size.node.expr / symbol)
                found.append((fold, i, dim, size.node.hint // fold))
    if not found:
        raise NoRuleError(
            "find-sites: an op with a parameter fixes the batch size while its backward is traced, so torch.func.vmap "
            "cannot take a per-sample gradient. Keep the batch in a dimension of its own there (no flatten), or write "
            "the op as a linear, embedding or pointwise one."
        )
    fold, i, dim, hint = min(found)
    return i, dim, fold, hint


def take_one_list(graph: torch.fx.Graph) -> None:
    """Make the inputs of a graph one list, which it empties: a caller's argument tuple would keep all alive."""
    graph.set_codegen(_BoxedCodeGen())


def without_memory() -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives the CPU tensor or parameter of the same size that holds no memory (a fake tensor)."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made

    return fake


def dry_run(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception | None:
    """The error that a model without memory meets when it is called; None if it meets none or asks for real values."""
    mode = next(p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))
    with mode, torch.no_grad():
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.size(), dtype=t.dtype), (tuple(args), dict(kwargs))
        )
        try:
            model(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
            return None
        except Exception as error:
            return error
    return None
