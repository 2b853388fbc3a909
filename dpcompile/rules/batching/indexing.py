"""Reading and writing by index: along dimensions other than the batch, or each sample its own row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from dpcompile.ir import Axis, Kind, Value
from dpcompile.rules.batching.base import CONSTANT, MIXED, Call, Mixes, batched, shape_of
from dpcompile.rules.batching.pointwise import align

OWN_ROW = "Index along other dimensions, or let each sample select its own row: x[torch.arange(len(x)), index]."
DATA_SIZED = "selects a number of elements that depends on the data of all samples"
KEEP_SHAPE = "Keep the shape: use masked_fill, torch.where, or multiply by the mask."
COUNT_WITHIN = "Count within each sample, and leave out a loss that balances the load of experts over the batch."
OTHERS = "lets a sample read or write other samples' rows"


def _is_rows(call: Call, arg: object) -> bool:
    return isinstance(arg, fx.Node) and call.known(arg).kind is Kind.ROWS


def _same_place(call: Call, *names: str) -> Axis | None:
    """The common axis of tensors of equal rank, of which none, or all that have the batch, agree."""
    found: Axis | None = None
    for name in names:
        axis = call.axis(name)
        if axis is None:
            continue
        if found is not None and axis != found:
            raise Mixes("combines samples in different places", OWN_ROW)
        found = axis
    return found


def gather(call: Call) -> Value:
    """Along a dimension other than the batch, index and tensor alike; or along it by the sample's own number."""
    own, index = call.axis("self"), call.value("index")
    dim = call.dim("dim", len(call.shape("self")))
    if own is None:  # each place of the index reads the same place of the table, but along `dim`
        if index.kind is Kind.ROWS or index.axis is None or index.axis.dim != dim:
            raise Mixes("depends on the position of a sample in the batch")
        return batched(index.axis)
    if index.axis != own:
        raise Mixes(OTHERS, OWN_ROW)
    if (dim == own.dim) != (index.kind is Kind.ROWS):
        raise Mixes(OTHERS if dim == own.dim else "depends on the position of a sample in the batch", OWN_ROW)
    if dim == own.dim and own.folded:
        raise Mixes(OTHERS, OWN_ROW)
    return batched(own)


def scatter(call: Call) -> Value:
    """Target, index and source have the batch in the same place, and it is not the one scattered along."""
    names = ("self", "index", "src")
    axis = _same_place(call, *names)
    tensors = [name for name in names if isinstance(call.args.get(name), fx.Node)]
    if axis is None or any(call.axis(name) is None for name in tensors):
        raise Mixes(OTHERS, OWN_ROW)
    if call.dim("dim", len(call.shape("self"))) == axis.dim:
        raise Mixes(OTHERS, OWN_ROW)
    return batched(axis)


def index_select(call: Call) -> Value:
    """A constant index along another dimension; or each sample its own row; or a table for all samples."""
    own, index = call.axis("self"), call.value("index")
    dim = call.dim("dim", len(call.shape("self")))
    if own is None:
        if index.kind is Kind.ROWS or index.axis is None:
            raise Mixes("depends on the position of a sample in the batch")
        return batched(Axis(dim, index.axis.outer, index.axis.inner))
    if dim == own.dim:
        if index.kind is Kind.ROWS and not own.folded and index.axis == Axis(0):
            return batched(own)
        raise Mixes(OTHERS, OWN_ROW)
    if index.kind is not Kind.CONSTANT:
        raise Mixes(OTHERS, OWN_ROW)
    return batched(own)


def index_write(call: Call) -> Value:
    """A constant index along a dimension other than the batch; the source has it in the same place or none."""
    source = "source" if "source" in call.args else "value"
    own = call.axis("self")
    given = call.axis(source)
    if own is None or call.value("index").kind is not Kind.CONSTANT:
        raise Mixes(OTHERS, OWN_ROW)
    if call.dim("dim", len(call.shape("self"))) == own.dim or given not in (None, own):
        raise Mixes(OTHERS, OWN_ROW)
    return batched(own)


def index(call: Call) -> Value:
    """x[i, :, j]: constant indices of other dimensions, each sample its own row, or a table for all samples."""
    axis, dim, _ = _selected(call)
    if axis is None:
        return CONSTANT
    return batched(Axis(dim, axis.outer, axis.inner))


def _selected(call: Call) -> tuple[Axis | None, int, int]:
    """Fold and dimension of the batch in x[indices], and the rank of x[indices]."""
    own, shape = call.axis("self"), call.shape("self")
    indices = list(call.args["indices"]) + [None] * (len(shape) - len(call.args["indices"]))
    given = [i for i, item in enumerate(indices) if item is not None]
    tensors: list[fx.Node] = [indices[i] for i in given]
    if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
        raise Mixes(DATA_SIZED, KEEP_SHAPE)
    ndim = max(len(shape_of(t)) for t in tensors)
    adjacent = given == list(range(given[0], given[-1] + 1))
    place = given[0] if adjacent else 0  # where the dimensions of the index stand in the result
    total = len(shape) - len(given) + ndim
    common = align(call, tensors, ndim)  # ROWS and BATCHED indices must lie in one place
    rows = [i for i in given if _is_rows(call, indices[i])]
    if own is None or own.dim not in given:
        if rows:
            raise Mixes("depends on the position of a sample in the batch", OWN_ROW)
        if own is None:
            return common, place + common.dim if common else 0, total
        if common is not None:
            raise Mixes(OTHERS, OWN_ROW)
        before = sum(1 for i in range(own.dim) if indices[i] is None)
        inserted = ndim if (not adjacent or own.dim > given[0]) else 0
        return own, before + inserted, total
    if rows != [own.dim] or own.folded or common is None:
        raise Mixes(OTHERS, OWN_ROW)
    return common, place + common.dim, total


def index_put(call: Call) -> Value:
    """x[i] = v, or +=: places of one sample only, by its own number, and values of that sample."""
    own = call.axis("self")
    indices: Sequence[fx.Node | None] = call.args["indices"]
    mask = indices[0]
    if mask is not None and mask.meta["val"].dtype == torch.bool and all(i is None for i in indices[1:]):
        return _masked_put(call, own, mask)
    axis, dim, ndim = _selected(call)
    if own is None:
        raise Mixes("writes samples into one shared value")
    values = align(call, [call.args["values"]], ndim)
    if axis is None or values not in (None, Axis(dim, axis.outer, axis.inner)):
        raise Mixes(OTHERS, OWN_ROW)
    return batched(own)


def _masked_put(call: Call, own: Axis | None, mask: fx.Node) -> Value:
    """x[mask] = v with one v for all places of the mask is a masked fill."""
    mask_ndim = len(shape_of(mask))
    v_shape = call.shape("values")
    free = len(call.shape("self")) - mask_ndim
    one_for_all = call.axis("values") is None and (len(v_shape) <= free or v_shape[: len(v_shape) - free] == (1,))
    masked = call.known(mask).axis
    if own is None or not one_for_all or masked not in (None, own):
        raise Mixes(
            "writes values to places that depend on the data of all samples", "Use torch.where with the mask instead."
        )
    return batched(own)


def one_hot(call: Call) -> Value:
    """Nothing: the classes come as a new last dimension."""
    return call.value("self")


def counts(call: Call) -> Value:
    """bincount, histc: how often each number occurs among all samples, as the load-balance loss of experts asks."""
    raise Mixes("counts over the data of all samples", COUNT_WITHIN)


def compacts(call: Call) -> Value:
    """Nothing helps: how many elements there are depends on the data of all samples."""
    raise Mixes(DATA_SIZED, KEEP_SHAPE)


def marked_places(call: Call) -> Value:
    """The batch in dimension 0: each row of the mask by itself."""
    if call.batch_of("mask") != Axis(0):
        raise Mixes(OTHERS, OWN_ROW)
    return batched(Axis(0))


def slice_scatter(call: Call) -> Value:
    """Along another dimension, target and source with the batch in the same place."""
    own, source = call.axis("self"), call.axis("src")
    if own is None or own != source:
        raise Mixes("combines samples in different places", OWN_ROW)
    if call.dim("dim", len(call.out_shape)) == own.dim and call.shape("src") != call.out_shape:
        raise Mixes(OTHERS, OWN_ROW)
    call.require_no_batch_size("start")
    return batched(own)


def select_scatter(call: Call) -> Value:
    """Along another dimension, target and source with the batch in the same place."""
    own, source = call.axis("self"), call.axis("src")
    dim = call.dim("dim", len(call.out_shape))
    if own is None or source is None or dim == own.dim:
        raise Mixes(OTHERS, OWN_ROW)
    if Axis(source.dim + (dim <= source.dim), source.outer, source.inner) != own:
        raise Mixes("combines samples in different places", OWN_ROW)
    call.require_no_batch_size("index")
    return batched(own)


def diagonal_scatter(call: Call) -> Value:
    """Target and source have the batch in the same place, and it is none of the two diagonal dimensions."""
    own, source = call.axis("self"), call.axis("src")
    ndim = len(call.out_shape)
    dims = (call.dim("dim1", ndim), call.dim("dim2", ndim))
    if own is None or own.dim in dims:
        raise Mixes(OTHERS, OWN_ROW)
    if source != Axis(own.dim - sum(d < own.dim for d in dims), own.outer, own.inner):
        raise Mixes("combines samples in different places", OWN_ROW)
    return batched(own)


def take(call: Call) -> Value:
    """One flat table for all samples, and an index of each sample."""
    index = call.value("index")
    if call.axis("self") is not None:
        raise Mixes(OTHERS, OWN_ROW)
    if index.kind is Kind.ROWS or index.axis is None:
        raise Mixes("depends on the position of a sample in the batch")
    return batched(index.axis)


def embedding_bag(call: Call) -> tuple[Value, ...]:
    """Bags of equal size, one after another (two-dimensional indices), and a table for all samples."""
    call.require_unbatched("weight")
    axis, offsets = call.axis("indices"), call.args["offsets"]
    if call.args.get("scale_grad_by_freq"):
        raise Mixes("scales gradients by how often an index occurs in the batch", "Set scale_grad_by_freq=False.")
    regular = (
        axis is not None
        and axis.outer == 1
        and getattr(offsets.target, "overloadpacket", None) is torch.ops.aten.arange
        and call.batch.multiple(shape_of(offsets)[0]) == 1
        and offsets.args[0] == 0
        and (*offsets.args, 1)[2] == axis.inner
        and call.axis("per_sample_weights") in (None, axis)
    )
    if not regular:
        raise Mixes("reads bags of free length", "Give embedding_bag two-dimensional indices.", never=False)
    return (batched(Axis(0)), *(MIXED for _ in call.node.meta["val"][1:]))
