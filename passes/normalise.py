"""normalise: ops that hide a parameter's use are written as the ops that the site rules know."""

from __future__ import annotations

import operator
import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dpcompile.inline import carry_origin, inline
from dpcompile.ir import Program
from dpcompile.passes.marked_rows import gather_marked_rows
from dpcompile.passes.open_masks import drop_open_masks
from dpcompile.rules.sites.base import bind, is_tensor
from dpcompile.torch_internals import fake_value

aten = torch.ops.aten


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, *, a: dict[str, Any]) -> torch.Tensor:
    return F.rms_norm(x, a["normalized_shape"], None, a["eps"]) * weight


def _batch_norm_eval(x: torch.Tensor, *affine: torch.Tensor, a: dict[str, Any]) -> torch.Tensor:
    given = dict(zip([k for k in ("weight", "bias", *_STATS) if is_tensor(a.get(k))], affine, strict=True))
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = (given[k].reshape(shape) for k in _STATS)
    normal = (x - mean) * (var + a["eps"]).rsqrt()
    if "weight" in given:
        normal = normal * given["weight"].reshape(shape)
    return normal + given["bias"].reshape(shape) if "bias" in given else normal


def _instance_norm(x: torch.Tensor, *affine: torch.Tensor, a: dict[str, Any]) -> torch.Tensor:
    given = dict(zip([k for k in ("weight", "bias") if is_tensor(a.get(k))], affine, strict=True))
    size = list(range(2, x.dim()))
    var, mean = torch.var_mean(x, size, correction=0, keepdim=True)
    normal = (x - mean) * (var + a["eps"]).rsqrt()
    shape = [1, -1] + [1] * (x.dim() - 2)
    if "weight" in given:
        normal = normal * given["weight"].reshape(shape)
    return normal + given["bias"].reshape(shape) if "bias" in given else normal


def _prelu(x: torch.Tensor, weight: torch.Tensor, *, a: dict[str, Any]) -> torch.Tensor:
    slope = weight.reshape([1, -1] + [1] * (x.dim() - 2)) if weight.numel() > 1 and x.dim() > 1 else weight
    return torch.where(x > 0, x, x * slope)


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: torch.Tensor, *, a: dict[str, Any]) -> torch.Tensor:
    return torch.where(mask, value.to(x.dtype), x)


def _copy(target: torch.Tensor, source: torch.Tensor, *, a: dict[str, Any]) -> torch.Tensor:
    return source.to(target.dtype).expand(target.shape)


def _index_select(table: torch.Tensor, index: torch.Tensor, *, a: dict[str, Any]) -> torch.Tensor:
    """A look-up along another dimension as one along the first, whose backward does not fix the batch size."""
    return table.movedim(a["dim"], 0).index_select(0, index).movedim(0, a["dim"])


def _bilinear(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor, a: dict[str, Any]
) -> torch.Tensor:
    products = (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)
    return F.linear(products, weight.flatten(1), *bias)


def _embedding_bag(
    weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, *weights: torch.Tensor, a: dict[str, Any]
) -> torch.Tensor:
    """Bags of equal size as a look-up and a masked sum, mean or largest; a bag of padding alone gives zero."""
    mode, padding = a.get("mode", 0), a.get("padding_idx")
    sizes = [offsets.shape[0], _bag_size(a)]
    index_Bn = indices.reshape(sizes)
    rows_Bnd = F.embedding(index_Bn, weight)
    if weights:
        rows_Bnd = rows_Bnd * weights[0].reshape(sizes).unsqueeze(-1)
    kept_Bn1 = torch.ones_like(index_Bn, dtype=torch.bool).unsqueeze(-1)
    if padding is not None and padding >= 0:
        kept_Bn1 = (index_Bn != padding).unsqueeze(-1)
    if mode == 2:
        largest_Bd = torch.where(kept_Bn1, rows_Bnd, float("-inf")).max(1).values
        return torch.where(kept_Bn1.any(1), largest_Bd, 0.0)
    sum_Bd = torch.where(kept_Bn1, rows_Bnd, 0.0).sum(1)
    return sum_Bd / kept_Bn1.sum(1).clamp(min=1).to(sum_Bd.dtype) if mode == 1 else sum_Bd


def _bag_size(a: dict[str, Any]) -> int | None:
    """How many indices each bag has, where all have equally many: F.embedding_bag of a matrix of indices."""
    offsets, indices = a["offsets"], a["indices"].meta["val"]
    if offsets.target is not aten.arange.start_step or offsets.args[0] != 0 or a.get("include_last_offset"):
        return None
    step = (*offsets.args, 1)[2]
    regular = isinstance(step, int) and indices.dim() == 1 and not a.get("scale_grad_by_freq")
    return step if regular and str(indices.shape[0]) == str(offsets.meta["val"].shape[0] * step) else None


def _is_table(a: dict[str, Any]) -> bool:
    """Whether index_select reads something that has no batch, along another dimension than the first."""
    table = a["self"].meta["val"]
    return table.dim() > 1 and a["dim"] % table.dim() != 0 and all(isinstance(size, int) for size in table.shape)


_STATS = ("running_mean", "running_var")

# op -> (arguments that are tensors, the same computation in other ops)
REWRITES: dict[Any, tuple[tuple[str, ...], Callable[..., torch.Tensor]]] = {
    aten.rms_norm.default: (("input", "weight"), _rms_norm),
    aten.batch_norm.default: (("input", "weight", "bias", *_STATS), _batch_norm_eval),
    aten._native_batch_norm_legit_no_training.default: (("input", "weight", "bias", *_STATS), _batch_norm_eval),
    aten.instance_norm.default: (("input", "weight", "bias"), _instance_norm),
    aten.prelu.default: (("self", "weight"), _prelu),
    aten.masked_fill.Tensor: (("self", "mask", "value"), _masked_fill),
    aten.copy.default: (("self", "src"), _copy),  # what x[:, i] = y leaves; it has no derivative
    aten.index_select.default: (("self", "index"), _index_select),
    aten.bilinear.default: (("input1", "input2", "weight", "bias"), _bilinear),
    aten.embedding_bag.default: (("weight", "indices", "offsets", "per_sample_weights"), _embedding_bag),
    aten.embedding_bag.padding_idx: (("weight", "indices", "offsets", "per_sample_weights"), _embedding_bag),
}


def normalise(program: Program) -> Program:
    """The captured program, rewritten where REWRITES says so, with the dead bookkeeping of export removed."""
    program = program.copy()
    graph = program.graph
    gather_marked_rows(graph)
    drop_open_masks(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
        elif node.target in REWRITES:
            _rewrite(graph, node)
        elif node.target is aten.einsum.default:
            _einsum(graph, node)
        elif node.target is aten.broadcast_tensors.default:
            _broadcast_tensors(graph, node)
        elif node.target is aten.type_as.default:  # reads the other tensor's type alone
            node.target, node.args = aten._to_copy.default, node.args[:1]
            node.kwargs = {"dtype": node.meta["val"].dtype}
        elif node.target in (aten.repeat.default, aten.tile.default):
            _repeat(graph, node)
        elif node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            _reshape(node)
        elif node.target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
            _squeeze(node)
        elif node.target is aten.index.Tensor:
            _in_order(graph, node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    program.module.recompile()
    results = graph.find_nodes(op="output")[0].args[0]
    assert isinstance(results, (list, tuple))
    outputs = tuple(
        replace(o, node=node.name) if isinstance(node, fx.Node) else o
        for o, node in zip(program.outputs, results, strict=True)
    )
    return replace(program, outputs=outputs)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    names, fn = REWRITES[node.target]
    arguments = bind(node)
    affine = [arguments[name] for name in ("weight", "bias") if name in arguments]
    if (affine and not any(map(is_tensor, affine))) or arguments.get("training"):
        return
    if node.target is aten.instance_norm.default and (
        not arguments["use_input_stats"] or is_tensor(arguments["running_mean"])
    ):
        return  # statistics of its own: track-batch tells whether they may be
    if fn is _index_select and not _is_table(arguments):
        return
    if fn is _embedding_bag and _bag_size(arguments) is None:
        return
    inputs = [arguments[name] for name in names if is_tensor(arguments.get(name))]
    (result,) = inline(graph, lambda *values: [fn(*values, a=arguments)], inputs)
    if isinstance(node.meta["val"], (tuple, list)):
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(result)
                graph.erase_node(user)
        if node.users:
            return
    else:
        node.replace_all_uses_with(result)
    _erase(graph, node)


def _broadcast_tensors(graph: fx.Graph, node: fx.Node) -> None:
    """Each of the values expanded on its own."""
    (values,) = node.args
    results = inline(graph, lambda *tensors: list(torch.broadcast_tensors(*tensors)), values)  # type: ignore[arg-type]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take the node away; what was written in its place keeps its name and line."""
    start = next(n for n in graph.nodes if n is node)
    new = [n for n in graph.nodes if "nn_module_stack" not in n.meta and n.op == "call_function"]
    carry_origin(start, new)
    graph.erase_node(node)


def _einsum(graph: fx.Graph, node: fx.Node) -> None:
    """A product of three or more as products of two, from the first operand with a batch on: letters go when done."""
    equation, tensors = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    sizes = [tensor.meta["val"].shape for tensor in tensors]
    first = next((i for i, shape in enumerate(sizes) if any(isinstance(size, torch.SymInt) for size in shape)), None)
    terms, result = _letters(equation, [len(shape) for shape in sizes])
    if len(tensors) < 3 or first is None or any(len(set(term)) < len(term) for term in terms):
        return
    rest = [(tensor, term) for i, (tensor, term) in enumerate(zip(tensors, terms, strict=True)) if i != first]
    made, have, new = tensors[first], terms[first], []
    with graph.inserting_before(node):
        while rest:
            tensor, term = rest.pop(0)
            needed = {*result, *(letter for _, other in rest for letter in other)}
            kept = "".join(letter for letter in dict.fromkeys(have + term) if letter in needed) if rest else result
            made = _call(graph, aten.einsum.default, f"{have},{term}->{kept}", [made, tensor])
            have = kept
            new.append(made)
    carry_origin(node, new)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with letters for an ellipsis, aligned from the right."""
    inputs, arrow, result = equation.partition("->")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    terms = inputs.split(",")
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    leading = "".join(free[: max(widths)])
    if not arrow:
        once = sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1)
        result = "..." * ("..." in inputs) + "".join(once)
    spelled = [term.replace("...", leading[len(leading) - width :]) for term, width in zip(terms, widths, strict=True)]
    return spelled, result.replace("...", leading)


def _repeat(graph: fx.Graph, node: fx.Node) -> None:
    """A repetition whose count depends on the batch size: new dimensions are expanded, then folded with the old."""
    source, counts = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    if not any(isinstance(count, fx.Node) for count in counts):
        return
    value = source.meta["val"]
    old = [1] * (len(counts) - value.dim()) + list(value.shape)
    counts = [1] * (len(old) - len(counts)) + counts
    if any(not isinstance(size, int) for size in old):
        return  # a sample's own tensor
    apart, spread, folded = [], [], []
    with graph.inserting_before(node):
        for count, size in zip(counts, old, strict=True):
            plain = size == 1 or count == 1
            apart += [size] if plain else [1, size]
            spread += [count if size == 1 else size] if plain else [count, size]
            folded.append(count if size == 1 else size if count == 1 else _times(graph, count, size))
        result = _call(graph, aten.reshape.default, source, apart)
        result = _call(graph, aten.expand.default, result, spread)
        result = _call(graph, aten.reshape.default, result, folded) if len(spread) > len(folded) else result
    carry_origin(node, [*list(result.all_input_nodes), result])
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _times(graph: fx.Graph, count: Any, size: int) -> Any:
    return _call(graph, operator.mul, count, size) if isinstance(count, fx.Node) else count * size


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = fake_value(node)
    return node


def _reshape(node: fx.Node) -> None:
    """A view that does not rely on the strides seen by export, which another kernel need not give, nor on -1.

    A size of -1 cannot be inferred for an empty batch; where the captured size is a plain number, it is written.
    """
    node.target = aten.reshape.default
    sizes = list(node.args[1])  # type: ignore[arg-type]
    known = node.meta["val"].shape
    node.args = (
        node.args[0],
        [
            have if isinstance(want, int) and want == -1 and isinstance(have, int) else want
            for want, have in zip(sizes, known, strict=True)
        ],
    )


def _in_order(graph: fx.Graph, node: fx.Node) -> None:
    """Indices laid out in their own order: by those of another, kernels lay out what torch's tracing does not know."""
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    with graph.inserting_before(node):
        for at, index in enumerate(indices):
            if isinstance(index, fx.Node) and not index.meta["val"].is_contiguous():
                copied = graph.call_function(aten.clone.default, (index,), {"memory_format": torch.contiguous_format})
                copied.meta["val"] = fake_value(copied)
                carry_origin(node, [copied])
                indices[at] = copied
    node.args = (node.args[0], indices)


def _squeeze(node: fx.Node) -> None:
    """Squeeze what has size one whatever the batch size is: a batch of one sample keeps its dimension."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    asked = range(len(shape)) if node.target is aten.squeeze.default else node.args[1]
    dims = [asked] if isinstance(asked, int) else list(asked)  # type: ignore[arg-type]
    fixed = [dim for dim in dims if isinstance(shape[dim], int) and shape[dim] == 1]
    node.target, node.args = aten.squeeze.dims, (source, fixed)
