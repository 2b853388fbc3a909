"""rewrite: runs the rewriting passes in their order, with the verifier between any two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpcompile.clipping import Clipping
from dpcompile.inline import Memo
from dpcompile.ir import Draft
from dpcompile.passes.combine import GroupReader
from dpcompile.plan import Plan
from dpcompile.verify import verify


@dataclass(frozen=True)
class Order:
    """What the rewrites are to write."""

    readers: tuple[GroupReader, ...]
    plan: Plan
    clipping: Clipping
    mean: bool  # the loss is a mean over samples
    fused: bool  # the loss is in the graph
    views: int  # rows of the batch that are one sample
    memo: Memo


Rewrite = Callable[[Draft, Order], Draft]


def rewrite(passes: Sequence[Rewrite], draft: Draft, order: Order) -> Draft:
    """The draft behind the last pass.

    Raises:
        InvalidGraphError: a pass broke an invariant; names the pass and the node.
    """
    for step in passes:
        draft = step(draft, order)
        verify(draft.program, step.__name__.replace("_", "-"))
    draft.program.module.recompile()  # once: writing the code of a graph takes as long as a pass
    return draft
