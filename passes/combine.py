"""How the gradients of one group are brought together: functions of tensors, which the rewriting passes inline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from dpcompile.errors import Finding, refusal
from dpcompile.forms import Explicit, Form, explicit, explicit_sum, merge, transposed, written_out
from dpcompile.ir import Backward, Chain, Derived, Group, Program, Site, Space, Tracked
from dpcompile.origin import origin
from dpcompile.passes.find_sites import call_of
from dpcompile.rules.batching.base import shape_of
from dpcompile.rules.sites import BY_NAME
from dpcompile.rules.sites.embedding import shared_form, shared_index
from dpcompile.rules.sites.fallback import Fallback
from dpcompile.torch_internals import fake_mode_of, trace


class GroupReader:
    """The live sites of one group, and how to read their forms from a flat list of nodes or tensors."""

    def __init__(self, group: Group, captured: Program, tracked: Tracked, backward: Backward) -> None:
        nodes = captured.nodes()
        joint = backward.program.nodes()
        self.group = group
        self.batch = backward.program.batch
        self.sites: list[Site] = [site for site in group.sites if site.name in backward.sites]
        self._nodes = nodes
        self._tracked = tracked
        self._values = {value.node: value for value in group.values}
        self._forms: list[Callable[..., Form]] = []
        self._counts: list[int] = []
        self._indices: list[fx.Node | None] = []  # of look-ups before the site
        self.inputs: list[fx.Node] = []
        for site in self.sites:
            tensors = backward.sites[site.name]
            call = call_of(nodes[site.node], tracked)
            self._forms.append(BY_NAME[site.rule].form(call, site.slot))
            self._counts.append(len(tensors.saved) + 1)
            self.inputs += [joint[name] for name in (*tensors.saved, tensors.grad)]
            looked_up = group.space is Space.PARAMETER and self._values[site.value].chain is Chain.LOOKUP
            self._indices.append(shared_index(nodes[site.value]) if looked_up else None)
        # behind the sites' own tensors
        self.inputs += [joint[backward.leaves[index.name]] for index in self._indices if index is not None]
        # what derived values are computed from: needed where gradients go back through their chain
        self._sources = list(dict.fromkeys(name for v in group.values for name in (*v.params, *v.leaves)))
        self.sources = [joint[backward.leaves[name]] for name in self._sources]
        self.vmapped = group.space is Space.PULLBACK or any(BY_NAME[s.rule].vmapped for s in self.sites)
        self.key = tuple(self._kind_of(site) for site in self.sites)  # readers of equal keys read alike
        self._simple: dict[str, fx.GraphModule] = {}
        if group.space is Space.PULLBACK:
            self._simple = {v.node: self._in_core_ops(v) for v in group.values if v.chain is Chain.GENERAL}

    def _in_core_ops(self, value: Derived) -> fx.GraphModule:
        """The chain in core aten ops: vmap of the vjp of some larger ops fixes the batch size that it was traced at."""
        values = [node.meta["val"] for node in self.sources]
        mode = fake_mode_of(self.sources[0].graph)
        return trace(lambda *sources: self.chain(value, sources), *values, mode=mode, decompose=True)

    def _kind_of(self, site: Site) -> Hashable:
        node = self._nodes[site.node]
        call = call_of(node, self._tracked)
        arguments = tuple((name, self._described(value)) for name, value in call.arguments.items())
        value = self._values[site.value]
        own = (self.group.space, value.chain, value.permutation)
        if value.chain is Chain.LOOKUP:
            lookup = self._nodes[value.node]
            own = (*own, str(lookup.target), *map(self._described, lookup.all_input_nodes))
        return site.rule, str(node.target), site.slot, call.slots, arguments, self._described(node), own

    def _described(self, item: Any) -> Hashable:
        """An argument without its name: shape and tracking of a tensor, else the value."""
        if isinstance(item, (list, tuple)):
            return tuple(map(self._described, item))
        if not isinstance(item, fx.Node):
            return type(item), repr(item)
        values = pytree.tree_leaves(item.meta["val"])
        shapes = tuple((shape_of(v), v.dtype) if isinstance(v, torch.Tensor) else str(v) for v in values)
        return shapes, self._tracked.values.get(item.name)

    def forms(self, tensors: Sequence[torch.Tensor]) -> list[tuple[Site, Form]]:
        """Each site's form, in the group's own space."""
        found: list[tuple[Site, Form]] = []
        at = 0
        indices = iter(tensors[sum(self._counts) :])
        for site, form, count, index in zip(self.sites, self._forms, self._counts, self._indices, strict=True):
            made = form(*tensors[at : at + count])
            if index is not None:
                made = self._looked_up(site, made, next(indices))
            elif self.group.space is Space.PARAMETER:
                made = transposed(made, self._values[site.value].permutation)
            found.append((site, made))
            at += count
        return found

    def _looked_up(self, site: Site, made: Form, index: torch.Tensor) -> Form:
        value = self._values[site.value]
        shape = tuple(self._nodes[value.params[0]].meta["val"].shape)
        assert isinstance(made, Explicit)
        return shared_form(self._nodes[value.node], made.grad, index, shape)

    def combined(self, tensors: Sequence[torch.Tensor]) -> list[Form]:
        """Forms of equal kind concatenated; for PARAMETER and VALUE space."""
        return merge([form for _, form in self.forms(tensors)])

    def explicit_sum(self, tensors: Sequence[torch.Tensor], *, looped: bool = False) -> torch.Tensor:
        """[B, *shape] per-sample gradients of the group's one parameter or value; of a convolution by its backward."""
        return explicit_sum([form if looped else written_out(form) for form in self.combined(tensors)])

    def chain(self, value: Derived, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """The value computed again from its parameters and what else its chain reads."""
        env = dict(zip(self._sources, sources, strict=True))
        for name in value.body:
            node = self._nodes[name]
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: env[n.name])
            env[name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[value.node]

    def with_params(self, sources: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sources with other tensors in the parameters' places."""
        given = dict(zip(self.group.params, params, strict=True))
        return [given.get(name, tensor) for name, tensor in zip(self._sources, sources, strict=True)]

    def value_nodes(self) -> list[fx.Node]:
        return [self._nodes[value.node] for value in self.group.values]

    def params_nodes(self) -> list[fx.Node]:
        return [self._nodes[name] for name in self.group.params]

    def params(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        env = dict(zip(self._sources, sources, strict=True))
        return [env[name] for name in self.group.params]

    def pulled_back(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """[B, *param] for each parameter of the group: every sample's gradient carried through the derived values.

        Reads the reader's inputs and behind them its sources.
        """
        sources = tensors[len(self.inputs) :]
        params = self.params(sources)
        by_value: dict[str, list[Form]] = {}
        for site, form in self.forms(tensors[: len(self.inputs)]):
            by_value.setdefault(site.value, []).append(form)
        totals: list[torch.Tensor | None] = [None] * len(params)
        for name, forms in by_value.items():
            value = self._values[name]
            parts = merge([Explicit(explicit(written_out(form))) for form in merge(forms)])
            assert isinstance(parts[0], Explicit)
            grads = self._through(value, parts[0].grad, params, sources)
            for param, grad in zip(value.params, grads, strict=True):
                i = self.group.params.index(param)
                so_far = totals[i]
                totals[i] = grad if so_far is None else so_far + grad
        first = next(t for t in totals if t is not None)
        return [
            total if total is not None else first.new_zeros((first.shape[0], *param.shape))
            for total, param in zip(totals, params, strict=True)
        ]

    def plain_sites(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the values at vmapped sites as plain training computes them; for flop counts."""
        found: list[torch.Tensor] = []
        at = 0
        for site, count in zip(self.sites, self._counts, strict=True):
            rule = BY_NAME[site.rule]
            if isinstance(rule, Fallback):
                call = call_of(self._nodes[site.node], self._tracked)
                found.append(rule.plain(call, site.slot)(*tensors[at : at + count]))
            at += count
        return found

    def plain_backward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the parameters from those of the values, as plain training computes them; for flop counts."""
        count = len(self.group.values)
        grads, sources = tensors[:count], tensors[count:]
        with torch.enable_grad():
            params = [param.detach().requires_grad_() for param in self.params(sources)]
            values = [self.chain(value, self.with_params(sources, params)) for value in self.group.values]
        return list(torch.autograd.grad(values, params, grads))

    def _through(
        self, value: Derived, grad: torch.Tensor, params: list[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        own = [params[self.group.params.index(name)] for name in value.params]
        if value.chain is Chain.PERMUTE:
            form = transposed(Explicit(grad), value.permutation)
            assert isinstance(form, Explicit)
            return [form.grad]
        if value.chain in (Chain.SELECT, Chain.LOOKUP):
            numbers = torch.arange(own[0].numel(), device=own[0].device).reshape(own[0].shape)
            index = self.chain(value, self.with_params(sources, self._replaced(params, value, [numbers])))
            flat = grad.new_zeros(grad.shape[0], own[0].numel())
            flat = flat.index_add(1, index.reshape(-1), grad.flatten(1))
            return [flat.reshape(grad.shape[0], *own[0].shape)]

        def h(*given: torch.Tensor) -> torch.Tensor:
            return self._simple[value.node](*self.with_params(sources, self._replaced(params, value, list(given))))

        vjp = torch.func.vjp(h, *own)[1]
        try:
            return list(torch.func.vmap(vjp)(grad))
        except RuntimeError as error:
            if "vmap fallback" in str(error):
                raise refusal([_not_vmapped(self._nodes[value.node], str(error))], "find-sites") from error
            raise

    def _replaced(self, params: list[torch.Tensor], value: Derived, given: list[torch.Tensor]) -> list[torch.Tensor]:
        new = dict(zip(value.params, given, strict=True))
        return [new.get(name, old) for name, old in zip(self.group.params, params, strict=True)]


def _not_vmapped(value: fx.Node, reason: str) -> Finding:
    where = origin(value)
    missing = reason.partition(" ")[0].removeprefix("aten::")
    return Finding(
        where.module,
        where.module_type,
        str(value.target).removeprefix("aten."),
        where.line,
        f"is computed from parameters and has no per-sample gradient: torch.func.vmap has no rule for {missing}",
        "compute it with pointwise ops, products and views",
        mixes=False,
    )
