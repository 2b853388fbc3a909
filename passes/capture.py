"""capture: an nn.Module and a sample input become a flat functional graph in which the batch size is a free symbol."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument
from torch.export.graph_signature import OutputKind as ExportOutputKind
from torch.utils import _pytree as pytree

from dpcompile.attributes import ModuleRecord, attribute_reads
from dpcompile.calls import CallSpec, LeafSpec, in_program
from dpcompile.cells import CELLS, LAYERS
from dpcompile.choices import choice_by_data, line_of, user_frames
from dpcompile.decomposed import decomposed
from dpcompile.errors import CaptureError, DPCompileError, Finding, refusal
from dpcompile.ir import Input, InputKind, Output, OutputKind, Program
from dpcompile.lengths import CURE, FREE, Length, asked_range
from dpcompile.origin import op_name, origin
from dpcompile.rules.batching import rule_for
from dpcompile.rules.batching.base import NEW_RULE
from dpcompile.shapes import size_of
from dpcompile.torch_internals import (
    ReentrantCheckpointError,
    checkpointed_regions,
    composed_by,
    made_of,
    symbolic_batch,
    users_frames,
)

aten = torch.ops.aten

# Batch sizes at which shapes may be traced: primes, so that a size fixed from one is recognised (verify.py).
HINTS = (1009, 1013, 1019, 1021, 1031, 1033)


@dataclass(frozen=True)
class Captured:
    program: Program
    call: CallSpec  # with the lengths that are free, by name
    out_spec: pytree.TreeSpec  # how the flat user outputs become the model's own return value
    checkpointed: int = 0  # regions of torch.utils.checkpoint
    modules: Mapping[str, ModuleRecord] = field(default_factory=dict)  # what the graph has taken from each module


class _Root(nn.Module):
    """The traced module: the model, and behind it the loss where the caller gave one."""

    def __init__(
        self,
        model: nn.Module,
        call: CallSpec,
        loss_fn: Callable[..., Any] | None,
        loss_reduction: str,
        record: Callable[..., None],
    ) -> None:
        super().__init__()
        self.model = model
        self._call = call
        self._loss_fn = loss_fn
        self._loss_reduction = loss_reduction
        self._record = record  # a callback: export restores the module's attributes, lists included, after tracing

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        sizes = [
            leaf.shape[spec.batch_dim]
            for leaf, spec in zip(leaves, self._call.leaves, strict=True)
            if spec.batch_dim is not None
        ]
        for size in sizes[1:]:
            torch._check(size == sizes[0])  # one symbol for the batch, whichever input it is read from
        args, kwargs, targets = self._call.unflatten(self._call.as_rows(leaves))
        result = self.model(*args, **kwargs)
        if self._loss_fn is not None:
            result = self._reduced(self._loss_fn(result, targets))
        flat, spec = pytree.tree_flatten(result)
        self._record(spec)
        return tuple(flat)

    def _reduced(self, loss: Any) -> torch.Tensor:
        """The loss as a scalar. Per-sample losses are reduced here; a scalar keeps the reduction of its author."""
        if not isinstance(loss, torch.Tensor) or loss.dim() > 1:
            found = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise CaptureError(f"capture: loss_fn must return per-sample losses [B] or a scalar, got {found}.")
        if loss.dim() == 0:
            return loss
        if self._call.views > 1:
            loss = loss.unflatten(0, (-1, self._call.views)).mean(1)
        return loss.mean() if self._loss_reduction == "mean" else loss.sum()


def capture(
    model: nn.Module, call: CallSpec, loss_fn: Callable[..., Any] | None = None, loss_reduction: str = "mean"
) -> Captured:
    """The captured program, in the mode (training flags of every submodule) in which the model stands.

    Raises:
        CaptureError: torch.export cannot follow the model, or the sample input does not fit it.
    """
    _register_known_outputs()
    out_specs: list[pytree.TreeSpec] = []
    root = _Root(model, call, loss_fn, loss_reduction, out_specs.append)
    root.training = model.training
    sample = call.sample_leaves(_hint(model, call))
    dynamic = tuple(_free_dims(leaf, call.views) for leaf in call.leaves)
    try:
        with symbolic_batch(), users_frames(), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # torch.export's own deprecations: nothing a user could act on
            with checkpointed_regions() as regions, attribute_reads(model) as reads, composed_by(LAYERS):
                exported = torch.export.export(root, sample, dynamic_shapes=(dynamic,), strict=False)
            _keep_no_grad_regions(exported.graph_module)
            _inline_empty_literals(exported.graph_module)
            lines = _lines_of_regions(exported.graph_module)
            exported = _written_out(decomposed(exported, {**LAYERS, **CELLS}))
            _restore_lines(exported.graph, lines)
    except DPCompileError:
        raise
    except Exception as error:
        raise CaptureError(_capture_message(model, call, error)) from error
    program, call = _with_lengths(_program_of(exported, model, call), call)
    return Captured(program, call, out_specs[-1], len(regions), reads.records(model))


def _free_dims(leaf: LeafSpec, views: int) -> dict[int, Any] | None:
    """What torch.export is told of one input: which of its sizes are free."""
    if leaf.shape is None:
        return None
    free = {} if leaf.batch_dim is None else {leaf.batch_dim: FREE}
    return free | {in_program(leaf, dim, views): what for dim, what in leaf.free.items()} or None


def _hint(model: nn.Module, call: CallSpec) -> int:
    """A batch size that divides no dimension of the model or the sample."""
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    sizes |= {size for leaf in call.leaves for size in leaf.shape or ()}
    return next((hint for hint in HINTS if not any(size and size % hint == 0 for size in sizes)), HINTS[0])


def _capture_message(model: nn.Module, call: CallSpec, error: Exception) -> str:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:400]
    choice = choice_by_data(error)
    if choice is not None:
        return f"capture: the forward of {type(model).__name__} {choice}"
    length = next((name for name in _fixed_sizes(reason, call) if name), None)
    if length is not None:
        return (
            f"capture: the forward of {type(model).__name__} makes a plain number of {length}, which dynamic= frees.\n"
            "  int(x.shape[1]), a literal, a loop over positions in Python, or an LSTM with proj_size, which is such "
            f"a loop, does so. {CURE}"
        )
    if "specialized it to be a constant" in reason:
        return (
            f"capture: the forward of {type(model).__name__} makes a plain number of the batch size, with "
            f"{call.describe()}.\n  len(x), int(x.shape[0]), a literal, or numpy "
            "given the size (to draw a mask, say) does so: write x.shape[0], and draw with torch. So does "
            "torch.take_along_dim: write torch.gather."
        )
    frames = user_frames(error)
    where = f"\n  at {line_of(*frames[-1])}" if frames else ""
    if isinstance(error, ReentrantCheckpointError):
        return (
            f"capture: the forward of {type(model).__name__} has a region of torch.utils.checkpoint that hides its "
            f"backward.{where}\n  cure: Call checkpoint with use_reentrant=False."
        )
    if "_apply(): Couldn't swap" in reason:
        return (
            f"capture: the forward of {type(model).__name__} converts a module's parameters.{where}\n"
            "  cure: Call module.to(...) once, before compiling, and not in the forward."
        )
    return (
        f"capture: {type(model).__name__} cannot be captured with {call.describe()}.\n"
        f"  {type(error).__name__}: {reason}{where}"
    )


def _fixed_sizes(reason: str, call: CallSpec) -> Iterator[str]:
    """The sizes that torch.export says the model has fixed, by the input that has them; "" for the batch size."""
    for i, dim in re.findall(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]", reason):
        leaf = call.leaves[int(i)]
        own = next((d for d in leaf.free if in_program(leaf, d, call.views) == int(dim)), None)
        yield "" if own is None else f"dimension {own} of `{leaf.name}`"


def _register_known_outputs() -> None:
    """HF caches are returned by models but are a pytree only after this call; without transformers loaded, nothing."""
    if "transformers" not in sys.modules:
        return
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderDecoderCache,
            lambda cache: ([cache.self_attention_cache, cache.cross_attention_cache], None),
            lambda parts, _: EncoderDecoderCache(*parts),
            flatten_with_keys_fn=_caches_with_keys,
            serialized_type_name="transformers.EncoderDecoderCache",
        )


def _caches_with_keys(cache: Any) -> Any:
    names = ("self_attention_cache", "cross_attention_cache")
    return [(pytree.GetAttrKey(name), getattr(cache, name)) for name in names], None


def _keep_no_grad_regions(module: fx.GraphModule) -> None:
    """Detach what leaves a `torch.no_grad()` region: decomposition inlines the region and forgets that it had none."""
    for graph_module in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled
        ):
            if node.args[0]:
                continue
            for item in list(node.users):
                with graph_module.graph.inserting_after(item):
                    detached = graph_module.graph.call_function(aten.detach.default, (item,))
                detached.meta = dict(item.meta)
                item.replace_all_uses_with(detached, delete_user_cb=lambda user, d=detached: user is not d)
        graph_module.recompile()


def _inline_empty_literals(module: fx.GraphModule) -> None:
    """Make `torch.tensor([])` a constructor: torch 2.13 loses such literals of submodules when it decomposes."""
    for node in module.graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default):
        value = node.meta["val"]
        if value.numel() != 0 or any(not isinstance(size, int) for size in value.shape):
            continue
        with module.graph.inserting_before(node):
            empty = module.graph.call_function(
                aten.empty.memory_format, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
            )
        empty.meta = dict(node.meta)
        node.replace_all_uses_with(empty)
        module.graph.erase_node(node)
    module.recompile()


def _written_out(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Composed ops of which no batching rule knows (hstack, quantile, trapezoid), in the ops that they are made of."""
    for _ in range(5):  # what they are made of may be composed too
        unknown = {
            node.target
            for node in exported.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload) and rule_for(node.target) is None and _sees_batch(node)
        }
        table: dict[Any, Any] = {op: made_of(op) for op in unknown if made_of(op) is not None}
        if not table:
            break
        refused = _without_rule(exported.graph, table)
        try:
            exported = decomposed(exported, table)
        except Exception as error:
            raise refused from error
        if all(isinstance(size_of(size), int) for size in _sizes(exported.graph.find_nodes(op="placeholder"))):
            raise refused  # what composes the op has fixed the batch size
    return exported


def _without_rule(graph: fx.Graph, ops: Container[Any]) -> DPCompileError:
    """The refusal of ops that cannot be written out either."""
    found = []
    for node in graph.nodes:
        if node.target in ops and _sees_batch(node):
            where = origin(node)
            problem = "has no batching rule"
            found.append(
                Finding(where.module, where.module_type, op_name(node), where.line, problem, NEW_RULE, mixes=False)
            )
    return refusal(found, "capture")


def _sees_batch(node: fx.Node) -> bool:
    """Whether the op gives a tensor, and one that it takes or gives has a size that is not a plain number."""
    gives = any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(node.meta.get("val")))
    return gives and any(isinstance(size, torch.SymInt) for size in _sizes([node, *node.all_input_nodes]))


def _sizes(nodes: Iterable[fx.Node]) -> Iterator[int | torch.SymInt]:
    for value in pytree.tree_leaves([node.meta.get("val") for node in nodes]):
        if isinstance(value, torch.Tensor):
            yield from value.shape


def _lines_of_regions(module: fx.GraphModule) -> dict[str, str]:
    """Line of generated code -> the user's own stack trace, for regions that torch traces again (autocast, no_grad)."""
    found: dict[str, str] = {}
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule) and inner is not module:
            traces = {node.name: node.meta.get("stack_trace") for node in inner.graph.nodes}
            for line in map(str.strip, inner.code.splitlines()):
                trace = traces.get(line.partition(" = ")[0])
                if trace:
                    found[line] = trace if found.get(line, trace) == trace else ""
    return found


def _restore_lines(graph: fx.Graph, lines: dict[str, str]) -> None:
    for node in graph.nodes:
        trace = node.meta.get("stack_trace") or ""
        if "<eval_with_key>" in trace:
            node.meta["stack_trace"] = lines.get(trace.rstrip().splitlines()[-1].strip()) or trace


def _program_of(exported: torch.export.ExportedProgram, model: nn.Module, call: CallSpec) -> Program:
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    named = dict(model.named_parameters(remove_duplicate=False))
    leaves = iter(call.leaves)
    inputs: list[Input] = []
    constants: dict[str, torch.Tensor] = {}
    placeholders = exported.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        kind = spec.kind.name
        target = (spec.target or "").removeprefix("model.")
        if kind == "PARAMETER":
            inputs.append(Input(node.name, InputKind.PARAMETER, target, id(named[target]) in trainable))
        elif kind == "BUFFER":
            inputs.append(Input(node.name, InputKind.BUFFER, target))
        elif kind == "CONSTANT_TENSOR":
            inputs.append(Input(node.name, InputKind.CONSTANT, spec.target or ""))
            constant = exported.constants[spec.target or ""]
            assert isinstance(constant, torch.Tensor)
            constants[spec.target or ""] = constant
        else:
            leaf = next(leaves)
            inputs.append(Input(node.name, InputKind.USER, leaf.name, batch_dim=leaf.batch_dim))
    outputs: list[Output] = []
    for spec in exported.graph_signature.output_specs:
        literal = spec.arg.value if isinstance(spec.arg, ConstantArgument) else None
        node_name = None if isinstance(spec.arg, ConstantArgument) else spec.arg.name
        if spec.kind is ExportOutputKind.BUFFER_MUTATION:
            outputs.append(Output(node_name, OutputKind.BUFFER, (spec.target or "").removeprefix("model.")))
        elif spec.kind is ExportOutputKind.USER_OUTPUT:
            outputs.append(Output(node_name, OutputKind.USER, literal=literal))
        else:
            raise CaptureError(
                _renormalised(exported.graph)
                or f"capture: {type(model).__name__} writes to {spec.target!r} ({spec.kind.name.lower()}) in its "
                "forward. Return the value instead of writing it in place."
            )
    inputs = _merge_aliases(exported.graph, inputs, {name: id(p) for name, p in named.items()}, model)
    return Program(exported.graph_module, tuple(inputs), tuple(outputs), _batch_symbol(exported, inputs), constants)


def _with_lengths(program: Program, call: CallSpec) -> tuple[Program, CallSpec]:
    """The program with its free lengths, and the call with their names: those of the caller's Dims, else T, T2, ..."""
    nodes = program.nodes()
    sizes: dict[Any, torch.SymInt] = {}
    lengths: dict[Any, Length] = {}
    leaves = []
    for leaf, item in zip(call.leaves, program.inputs_of(InputKind.USER), strict=True):
        free = {}
        for dim, what in leaf.free.items():
            size = nodes[item.node].meta["val"].shape[in_program(leaf, dim, call.views)]
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            if expr is None or not expr.free_symbols:
                continue  # Dim.AUTO leaves it to the model to fix a size
            if not expr.is_Symbol or expr == program.batch.node.expr:
                what_it_is = "the batch size" if expr == program.batch.node.expr else f"computed from others ({expr})"
                raise CaptureError(
                    f"capture: dimension {dim} of `{leaf.name}` is no length of its own but {what_it_is}. {CURE}"
                )
            sizes.setdefault(expr, size)
            if expr not in lengths:
                own = asked_range(what, f"T{len(lengths) + 1 if lengths else ''}")
                taken = own.name in {length.name for length in lengths.values()}
                lengths[expr] = replace(own, name=f"{own.name}_{len(lengths) + 1}") if taken else own
            free[dim] = lengths[expr].name
        leaves.append(replace(leaf, free=free))
    return replace(program, lengths=tuple(sizes.values())), replace(
        call, leaves=tuple(leaves), lengths=tuple(lengths.values())
    )


def _renormalised(graph: fx.Graph) -> str | None:
    """An embedding with max_norm writes to its table."""
    for node in graph.find_nodes(op="call_function", target=aten.embedding_renorm.default):
        return (
            f"capture: `{origin(node).module}` has max_norm={node.args[2]}: its forward changes the rows of its table "
            "that the batch reads. Set max_norm=None."
        )
    return None


def _merge_aliases(graph: fx.Graph, inputs: list[Input], identity: dict[str, int], model: nn.Module) -> list[Input]:
    """One placeholder for each parameter object, under its first name, however many names a tied weight has."""
    first_name = {id(p): name for name, p in model.named_parameters()}
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    kept: list[Input] = []
    by_object: dict[int, fx.Node] = {}
    for item in inputs:
        if item.kind is not InputKind.PARAMETER:
            kept.append(item)
            continue
        key = identity[item.target]
        if key in by_object:
            nodes[item.node].replace_all_uses_with(by_object[key])
            graph.erase_node(nodes[item.node])
        else:
            by_object[key] = nodes[item.node]
            kept.append(replace(item, target=first_name[key]))
    return kept


def _batch_symbol(exported: torch.export.ExportedProgram, inputs: list[Input]) -> torch.SymInt:
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    for item in inputs:
        if item.batch_dim is not None:
            size = nodes[item.node].meta["val"].shape[item.batch_dim]
            if not isinstance(size, torch.SymInt):
                raise CaptureError(
                    f"capture: the model fixes its batch size: input `{item.target}` was captured with a batch of "
                    f"{size} only. Remove the literal batch size from the model's forward."
                )
            return size
    raise CaptureError("capture: no input carries a batch axis. Give one with batched=.")
