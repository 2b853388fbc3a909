"""What must be true of every program between two passes. If a check fires, the pass before it has a bug."""

from __future__ import annotations

import torch

from dpcompile.errors import InvalidGraphError
from dpcompile.ir import Program


def verify(program: Program, after: str) -> Program:
    """The program itself, checked.

    Raises:
        InvalidGraphError: an invariant is broken; names the pass and the node.
    """
    for check in (_well_formed, _inputs_match, _outputs_exist, _batch_free):
        problem = check(program)
        if problem:
            raise InvalidGraphError(f"{after}: {problem}. This is a bug of dpcompile: please report the model.")
    return program


def _well_formed(program: Program) -> str | None:
    """Every node is defined before it is used and belongs to the graph."""
    try:
        program.graph.lint()
    except Exception as error:  # lint raises plain RuntimeErrors
        return f"the graph is not well formed ({error})"
    return None


def _inputs_match(program: Program) -> str | None:
    """Placeholders stand in the order of `inputs`."""
    have = [node.name for node in program.graph.find_nodes(op="placeholder")]
    want = [item.node for item in program.inputs]
    return None if have == want else f"placeholders {have} do not match inputs {want}"


def _outputs_exist(program: Program) -> str | None:
    """Every declared result is a node of the graph."""
    names = {node.name for node in program.graph.nodes}
    missing = [o.node for o in program.outputs if o.node is not None and o.node not in names]
    return f"results {missing} are not in the graph" if missing else None


def _batch_free(program: Program) -> str | None:
    """The batch size was not fixed to the one that shapes were traced at.

    Some batching rules of functorch write the traced size into the graph. The traced size is a prime, so that it is
    recognised wherever it stands as a constant or a factor.
    """
    if not program.batch.node.expr.free_symbols:
        return f"the batch size was fixed to {program.batch}"
    for length in program.lengths:
        if not length.node.expr.free_symbols:
            return f"a length that calls may choose was fixed to {length}"
    hint = program.batch.node.hint
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if any(_has_hint(value, hint) for value in (*node.args, *node.kwargs.values())):
            return f"`{node.format_node()}` has the traced batch size {hint} written into it"
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        if any(isinstance(size, int) and size and size % hint == 0 for size in shape):
            return f"`{node.name}` has the traced batch size {hint} in its shape {list(shape)}"
    return None


def _has_hint(value: object, hint: int) -> bool:
    """Whether a list of sizes contains the traced batch size."""
    return isinstance(value, (list, tuple)) and any(type(item) is int and item and item % hint == 0 for item in value)
