"""fix-batch: graphs for one batch size, in which every size is a number."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from dpcompile.emitted import Emitted
from dpcompile.errors import CaptureError
from dpcompile.ir import Program
from dpcompile.shapes import number


def fix_batch(emitted: Emitted) -> Emitted:
    """The same for batches of the sample's size alone: nothing is left for a compiler to guard or to recompile.

    Raises:
        CaptureError: that size is 0.
    """
    size = emitted.call.batch_size
    if size == 0:
        raise CaptureError("sample: the sample is empty, and dynamic=False takes the batch size from it.")
    forward = _fixed(emitted.forward, size)
    return replace(
        emitted,
        forward=forward,
        backward=emitted.backward and _fixed(emitted.backward, size),
        compiled=forward if emitted.compiled is emitted.forward else _fixed(emitted.compiled, size),
        sums=emitted.sums and _fixed(emitted.sums, size),
        call=replace(emitted.call, fixed=True),
    )


def _fixed(program: Program, batch_size: int) -> Program:
    program = program.copy()
    for node in list(program.graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, (torch.SymInt, torch.SymFloat)):
            _put_in(node, number(value, program.batch, batch_size))
    program.graph.lint()
    program.module.recompile()
    return program


def _put_in(node: fx.Node, number: int | float) -> None:
    """A number in place of a node."""

    def read(other: fx.Node) -> fx.Node | int | float:
        return number if other is node else other

    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(user.args, read), fx.map_arg(user.kwargs, read)
    node.graph.erase_node(node)
