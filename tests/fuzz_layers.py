"""What the fuzzer builds models from: functions that write one step of a `forward`, whatever shape comes in.

A step reads and sets `h`, the running value. It raises `Unfit` where it does not fit the shape; so any selection of
steps makes a model, and a failing model shrinks by leaving steps out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

LARGEST = 96  # elements of one sample


class Unfit(Exception):  # noqa: N818
    """The step does not fit the value that it meets."""


@dataclass(frozen=True)
class Input:
    """An argument of `forward`: what one sample of it looks like."""

    name: str
    kind: str  # "float", "bool", or "ids" below `high`
    shape: tuple[int, ...]
    batch_dim: int | None = 0
    high: int = 0


@dataclass
class Builder:
    """The source of a model so far. `h` has shape [N, *shape], or [T, B, *shape] while the sequence is first."""

    rng: random.Random
    shape: tuple[int, ...]
    inputs: list[Input] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    folds: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # how the batch lies, outermost first
    saved: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)  # name, shape, how deep in folds
    table: tuple[str, int, int] | None = None  # an embedding table that a head may share
    count: int = 0

    # ---------------------------------------------------------------- what is there

    @property
    def last(self) -> int:
        self.need(len(self.shape) >= 1)
        return self.shape[-1]

    @property
    def sequence_first(self) -> bool:
        return bool(self.folds) and self.folds[-1][0] == "sequence first"

    @property
    def lead(self) -> int:
        return 2 if self.sequence_first else 1

    def need(self, holds: bool) -> None:
        if not holds:
            raise Unfit

    def need_rank(self, low: int, high: int = 4) -> None:
        """Behind one batch dimension, which may be folded."""
        self.need(self.lead == 1 and low <= len(self.shape) <= high)

    # ---------------------------------------------------------------- what is drawn

    def size(self, low: int = 1, high: int = 5) -> int:
        return self.rng.randint(low, high)

    def flag(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance

    def pick(self, *options: object) -> str:
        return str(self.rng.choice(options))

    def divisor(self, number: int) -> int:
        return self.rng.choice([k for k in range(1, number + 1) if number % k == 0])

    def broadcast(self) -> tuple[int, ...]:
        """A shape that broadcasts against h's own: fewer dimensions, and some of size one."""
        kept = self.shape[self.rng.randint(0, len(self.shape)) :]
        return tuple(1 if self.flag(0.3) else size for size in kept)

    # ---------------------------------------------------------------- what is written

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def module(self, code: str) -> str:
        name = self.name("m")
        self.init.append(f"self.{name} = {code}")
        return f"self.{name}"

    def param(self, *shape: int) -> str:
        name = self.name("p")
        self.init.append(f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, shape)) or '()'}))")
        return f"self.{name}"

    def buffer(self, code: str) -> str:
        name = self.name("b")
        self.init.append(f"self.register_buffer({name!r}, {code})")
        return f"self.{name}"

    def argument(self, kind: str, shape: tuple[int, ...], batch_dim: int | None = 0, high: int = 0) -> str:
        name = self.name("x")
        self.inputs.append(Input(name, kind, shape, batch_dim, high))
        return name

    def then(self, code: str, shape: tuple[int, ...] | None = None) -> None:
        """h = code, which has this shape."""
        shape = self.shape if shape is None else tuple(shape)
        self.need(0 < math.prod(shape) <= LARGEST and len(shape) <= 4)
        self.shape = shape
        dims = ", ".join(map(str, shape))
        lead = {"sequence first": "T, B", "": "B"}.get(self.folds[-1][0] if self.folds else "", "B*")
        self.body.append(f"h = {code}  # [{lead}{', ' if dims else ''}{dims}]")

    def then_last(self, code: str, to: int) -> None:
        """The same, with another last dimension."""
        self.then(code, (*self.shape[:-1], to))


Step = Callable[[Builder], None]
STEPS: dict[str, Step] = {}
WEIGHTS: dict[str, int] = {}


def step(weight: int = 2) -> Callable[[Step], Step]:
    """Registers a step; `weight` says how often it is drawn."""

    def register(function: Step) -> Step:
        STEPS[function.__name__] = function
        WEIGHTS[function.__name__] = weight
        return function

    return register


def listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


# ---------------------------------------------------------------- products over the last dimension


@step(6)
def linear(b: Builder) -> None:
    p = b.size()
    b.then_last(f"{b.module(f'nn.Linear({b.last}, {p}, bias={b.flag()})')}(h)", p)


@step(4)
def product(b: Builder) -> None:
    """A matrix on the right, in the many ways to write that."""
    d, p = b.last, b.size()
    ways = {
        "h @ {w}": (d, p),
        "torch.matmul(h, {w})": (d, p),
        "F.linear(h, {w})": (p, d),
        "h @ {w}.t()": (p, d),
        "torch.inner(h, {w})": (p, d),
        "torch.tensordot(h, {w}, dims=1)": (d, p),
        "torch.einsum('...d,dp->...p', h, {w})": (d, p),
        "torch.einsum('pd,...d->...p', {w}, h)": (p, d),
        "(h.unsqueeze(-2) @ {w}).squeeze(-2)": (d, p),
        "(h.unsqueeze(-1) * {w}).sum(-2)": (d, p),
    }
    way = b.rng.choice(list(ways))
    b.then_last(way.replace("{w}", b.param(*ways[way])), p)


@step()
def product_by_vector(b: Builder) -> None:
    way = b.pick("h @ {w}", "torch.matmul(h, {w})", "torch.einsum('...d,d->...', h, {w})", "(h * {w}).sum(-1)")
    b.then(way.replace("{w}", b.param(b.last)), b.shape[:-1])


@step()
def outer_product(b: Builder) -> None:
    p = b.size(1, 3)
    way = b.pick("torch.einsum('...d,p->...dp', h, {w})", "h.unsqueeze(-1) * {w}", "h.unsqueeze(-1) @ {w}.unsqueeze(0)")
    b.then(way.replace("{w}", b.param(p)), (*b.shape, p))


@step()
def product_from_the_left(b: Builder) -> None:
    b.need_rank(2)
    t, q = b.shape[-2], b.size()
    way = b.pick("{w} @ h", "torch.einsum('qt,...td->...qd', {w}, h)", "({w} @ h)", "(h.mT @ {w}.t()).mT")
    b.then(way.replace("{w}", b.param(q, t)), (*b.shape[:-2], q, b.shape[-1]))


@step()
def product_by_head(b: Builder) -> None:
    """One matrix for each position of a dimension."""
    b.need_rank(2, 3)
    heads, d, p = b.shape[0], b.last, b.size()
    ways = {
        2: ["torch.einsum('bhd,hdp->bhp', h, {w})", "h.transpose(0, 1).bmm({w}).transpose(0, 1)"],
        3: ["torch.einsum('bhtd,hdp->bhtp', h, {w})", "h @ {w}", "torch.matmul(h, {w})"],
    }
    b.then_last(b.rng.choice(ways[len(b.shape)]).replace("{w}", b.param(heads, d, p)), p)


@step()
def product_of_two_dimensions(b: Builder) -> None:
    """Two dimensions contracted, or two made."""
    b.need_rank(2, 2)
    t, d = b.shape
    if b.flag():
        p = b.size()
        way = b.pick("torch.einsum('btd,tdp->bp', h, {w})", "torch.tensordot(h, {w}, dims=2)")
        b.then(way.replace("{w}", b.param(t, d, p)), (p,))
    else:
        q, p = b.size(1, 3), b.size(1, 3)
        b.then(f"torch.einsum('btd,qdp->bqtp', h, {b.param(q, d, p)})", (q, t, p))


@step()
def added_product(b: Builder) -> None:
    """addmm, baddbmm and their factors."""
    p = b.size()
    d = b.last
    factors = b.pick("", ", alpha=0.5", ", beta=-2.0", ", alpha=2, beta=0.5")
    if len(b.shape) == 1:
        b.need_rank(1, 1)
        b.then(f"torch.addmm({b.param(p)}, h, {b.param(d, p)}{factors})", (p,))
    else:
        b.need_rank(2, 2)
        t = b.shape[0]
        w, add = b.param(t, d, p), b.param(t, 1, p)
        b.then(f"torch.baddbmm({add}, h.transpose(0, 1), {w}{factors}).transpose(0, 1)", (t, p))


@step()
def batched_product(b: Builder) -> None:
    """bmm with the parameter spread over the batch, on either side."""
    b.need_rank(2, 2)
    t, d = b.shape
    if b.flag():
        p = b.size()
        b.then(f"h.bmm({b.param(d, p)}.unsqueeze(0).expand(h.shape[0], -1, -1))", (t, p))
    else:
        q = b.size()
        b.then(f"{b.param(q, t)}.expand(h.shape[0], -1, -1).bmm(h)", (q, d))


@step()
def bilinear(b: Builder) -> None:
    p, d = b.size(1, 3), b.last
    if b.flag():
        b.then_last(f"{b.module(f'nn.Bilinear({d}, {d}, {p}, bias={b.flag()})')}(h, h.tanh())", p)
    else:
        b.need_rank(1, 1)
        b.then(f"torch.einsum('bi,ijk,bk->bj', h, {b.param(d, p, d)}, h.sin())", (p,))


@step()
def prototypes(b: Builder) -> None:
    """Distances to learned points."""
    b.need_rank(2, 2)
    k = b.size(2, 4)
    if b.flag():
        b.then_last(f"torch.cdist(h, {b.param(k, b.last)})", k)
    else:
        b.then_last(f"(h.unsqueeze(-2) - {b.param(k, b.last)}).square().sum(-1)", k)


# ---------------------------------------------------------------- shared and derived weights


@step()
def layer_called_often(b: Builder) -> None:
    d = b.last
    code = b.pick(f"nn.Linear({d}, {d})", f"nn.Sequential(nn.Linear({d}, {d}), nn.Tanh())", f"nn.RMSNorm({d}, eps=0.1)")
    f = b.module(code)
    for _ in range(b.size(2, 3)):
        b.then(f"{f}(h).sin()" if b.flag() else f"h + {f}(h)")


@step()
def transposed_reuse(b: Builder) -> None:
    p = b.size()
    w = b.param(p, b.last)
    act = b.pick(".tanh()", ".sin()", "")
    b.then(b.pick(f"F.linear(F.linear(h, {w}){act}, {w}.t())", f"(h @ {w}.t()){act} @ {w}"))


@step()
def tied_head(b: Builder) -> None:
    b.need(b.table is not None)
    assert b.table is not None
    table, rows, width = b.table
    b.need(b.last == width)
    b.then_last(b.pick(f"F.linear(h, {table})", f"h @ {table}.t()", f"h @ ({table} * 0.5).t()"), rows)


@step()
def tied_bias_and_scale(b: Builder) -> None:
    p = b.param(b.last)
    b.then(b.pick(f"(h + {p}).tanh() + {p}", f"h * {p} + {p}", f"torch.addcmul({p}, h, {p})"))


@step(4)
def derived_weight(b: Builder) -> None:
    """A matrix that is computed from parameters."""
    d, p, r = b.last, b.size(), b.size(1, 2)
    w = {
        "low rank": lambda: f"{b.param(p, r)} @ {b.param(r, d)}",
        "masked": lambda: f"{b.param(p, d)} * {b.buffer(f'(torch.rand({p}, {d}) > 0.3).float()')}",
        "softmax": lambda: f"{b.param(p, d)}.softmax({b.pick(0, 1, -1)})",
        "cat": lambda: f"torch.cat([{b.param(p, d)}, {b.param(1, d)}])[:{p}]",
        "cat of all": lambda: f"torch.cat([{b.param(p, 1)}, {b.param(p, d)}], 1)[:, 1:]",
        "stack": lambda: f"torch.stack([{', '.join(b.param(d) for _ in range(p))}])",
        "merge": lambda: f"{b.param(p, d)} + 0.5 * {b.param(p, r)} @ {b.param(r, d)}",
        "normalised": lambda: f"F.normalize({b.param(p, d)}, dim={b.pick(0, 1)})",
        "weight norm": lambda: "{v} * ({g} / {v}.norm(dim=1, keepdim=True))".format(v=b.param(p, d), g=b.param(p, 1)),
        "old weight norm": lambda: f"torch._weight_norm({b.param(p, d)}, {b.param(p, 1)}, 0)",
        "view": lambda: f"{b.param(p * d)}.view({p}, {d})",
        "slice": lambda: f"{b.param(p + 1, d + 1)}[1:, :{d}]",
        "strided": lambda: f"{b.param(2 * p, d)}[::2]",
        "flip": lambda: f"{b.param(p, d)}.flip({b.pick(0, 1)})",
        "tanh": lambda: f"{b.param(p, d)}.{b.pick('tanh', 'sigmoid', 'exp', 'sin')}()",
        "triangle": lambda: f"{b.param(p, d)}.{b.pick('tril', 'triu')}()",
        "centred": lambda: "{w} - {w}.mean(1, keepdim=True)".format(w=b.param(p, d)),
        "scaled by another": lambda: f"{b.param(p, d)} * {b.param(d)}",
        "half frozen": lambda: "torch.where({m}, {w}, {w}.detach())".format(
            m=b.buffer(f"torch.rand({p}, {d}) > 0.5"), w=b.param(p, d)
        ),
        "diagonal": lambda: f"torch.diag({b.param(d)})[[i % {d} for i in range({p})]]",
        "kronecker": lambda: f"torch.kron({b.param(p, 1)}, {b.param(1, d)})",
        "circulant": lambda: f"{b.param(d)}[(torch.arange({p})[:, None] + torch.arange({d})) % {d}]",
        "matrix power": lambda: f"torch.matrix_power({b.param(d, d)} * 0.4, 2)[[i % {d} for i in range({p})]]",
    }
    b.then_last(f"F.linear(h, {w[b.rng.choice(list(w))]()})", p)


@step()
def parametrized(b: Builder) -> None:
    p = b.size(2, 4)
    kind = b.pick("weight_norm", "orthogonal") if b.flag(0.1) else "weight_norm"
    b.then_last(f"{b.module(f'nn.utils.parametrizations.{kind}(nn.Linear({b.last}, {p}))')}(h)", p)


@step()
def lora(b: Builder) -> None:
    d, p = b.last, b.size()
    base = b.module(f"nn.Linear({d}, {p}).requires_grad_(False)")
    b.then_last(f"{base}(h) + 2 * F.linear(h @ {b.param(d, 1)}, {b.param(p, 1)})", p)


@step()
def frozen(b: Builder) -> None:
    p = b.size()
    m = b.module(f"nn.Linear({b.last}, {p})")
    b.init.append(f"{m}{b.pick('', '.weight', '.bias')}.requires_grad_(False)")
    b.then_last(f"{m}(h)", p)


@step()
def mixture_of_experts(b: Builder) -> None:
    d, p, e = b.last, b.size(1, 3), 2
    gate, w = b.module(f"nn.Linear({d}, {e})"), b.param(e, d, p)
    b.then_last(
        f"torch.einsum('...e,...ep->...p', {gate}(h).softmax(-1), torch.einsum('...d,edp->...ep', h, {w}))",
        p,
    )


# ---------------------------------------------------------------- raw parameters that meet samples


@step(5)
def broadcast_parameter(b: Builder) -> None:
    w = b.param(*b.broadcast())
    v = b.param(*b.broadcast())
    code = b.pick(
        "h * {w}",
        "h + {w}",
        "{w} - 2 * h",
        "h / ({w}.abs() + 1)",
        "torch.addcmul({w}, h, {v})",
        "torch.addcmul(h, {w}, {v}, value=0.5)",
        "torch.addcdiv(h, {w}, {v}.exp(), value=2)",
        "torch.lerp(h, {w}, 0.3)",
        "torch.lerp(h, h.sin(), {w})",
        "torch.maximum(h, {w})",
        "torch.fmin(h, {w})",
        "torch.where(h > 0, h, {w})",
        "torch.where(h.detach() > {v}, h, {w} * h)",
        "torch.clamp(h, {w}, {w} + {v}.abs())",
        "(h.abs() + 0.5).pow({w})",
        "torch.atan2(h, {w}.exp())",
        "torch.hypot(h, {w})",
        "torch.logaddexp(h, {w})",
        "torch.xlogy({w}, h.abs() + 0.5)",
        "torch.sub(h, {w}, alpha=0.5)",
        "torch.rsub(h, {w})",
        "torch.add({w}, h, alpha=3)",
        "h * torch.sigmoid({w}) + (1 - torch.sigmoid({w})) * h.tanh()",
        "h + {w} * {v} + {v}",
        "h * {w}.softmax(0)",
        "h + torch.zeros_like(h) * {v} + {w}",
        "h * {w}.detach() + {w}.exp()",
        "torch.copysign(h, {w})",
        "F.softplus(h * {w}) / (1 + {w}.square())",
        "torch.heaviside(h.detach(), {w}.detach()) + h * {w}",
        "torch.broadcast_tensors(h, {w})[1] * h.sin()",
        "h.sub({w}).square().neg().mul(0.1).exp()",
        "torch.special.xlog1py(h, {w}.abs())",
        "F.huber_loss(h, {w}.expand_as(h), reduction='none')",
    )
    b.then(code.replace("{w}", w).replace("{v}", v))


@step()
def layer_scale(b: Builder) -> None:
    f = b.module(f"nn.Linear({b.last}, {b.last})")
    b.then(f"h + {b.param(b.last)} * {f}(h).tanh()")


@step(3)
def token(b: Builder) -> None:
    """A class token in front."""
    b.need_rank(2, 2)
    t, d = b.shape
    p = b.param(1, 1, d)
    spread = b.pick(
        f"{p}.expand(h.shape[0], -1, -1)",
        f"{p}.repeat(h.shape[0], 1, 1)",
        f"{p}.expand_as(h[:, :1])",
        f"{p}.expand(h.size(0), 1, {d})",
        f"h.new_zeros(h.shape[0], 1, {d}) + {p}",
        f"{p}[0].unsqueeze(0).expand(h.shape[0], -1, -1)",
        f"torch.tile({p}, (h.shape[0], 1, 1))",
        f"torch.broadcast_to({p}, (h.shape[0], 1, {d}))",
    )
    order = b.pick("{s}, h", "h, {s}")
    b.then(f"torch.cat([{order.replace('{s}', spread)}], 1)", (t + 1, d))
    if b.flag(0.3):
        b.then("h[:, 0]", (d,))


@step(3)
def position_table(b: Builder) -> None:
    b.need_rank(2, 2)
    t, d = b.shape
    table = b.param(t + 2, d)
    read = b.pick(
        f"{table}[:{t}]",
        f"F.embedding(torch.arange({t}), {table})",
        f"F.embedding(torch.arange({t}).unsqueeze(0).expand(h.shape[0], -1), {table})",
        f"{table}[torch.arange({t})]",
        f"{table}.index_select(0, {b.buffer(f'torch.arange({t})')})",
        f"{table}[1:-1].unsqueeze(0)",
        f"({table}[:{t}] + {table}[2:])",
        f"{table}.gather(0, torch.arange({t}).unsqueeze(1).expand(-1, {d}))",
        f"{table}[[{listed(tuple(reversed(range(t))))}]]",
        f"{table}.narrow(0, 1, {t})",
        f"F.pad({table}[2:], (0, 0, 0, 0))",
    )
    b.then(b.pick(f"h + {read}", f"h * {read}"))


@step()
def position_table_sequence_first(b: Builder) -> None:
    """A table [T, 1, D] before the batch, or a scale of features."""
    b.need(b.sequence_first and len(b.shape) == 1)
    t = b.folds[-1][1][0]
    b.then(b.pick(f"h + {b.param(t, 1, b.last)}", f"h * {b.param(t, b.last)}.unsqueeze(1)", f"h - {b.param(t, 1, 1)}"))


@step()
def relative_position_bias(b: Builder) -> None:
    b.need_rank(2, 2)
    t, _ = b.shape
    table = b.param(2 * t - 1, 2)
    index = b.buffer(f"torch.arange({t})[:, None] - torch.arange({t})[None, :] + {t - 1}")
    bias = b.pick(
        f"{table}[{index}.view(-1)].view({t}, {t}, 2).permute(2, 0, 1).contiguous()",
        f"{table}[{index}].permute(2, 0, 1)",
        f"F.embedding({index}, {table}).movedim(-1, 0)",
    )
    b.then(f"((h @ h.mT).unsqueeze(1) + {bias}).softmax(-1).mean(1) @ h")


@step()
def mask_token(b: Builder) -> None:
    """A learned token where a second input says."""
    b.need_rank(2, 2)
    b.need(not b.folds)
    t, d = b.shape
    mask = b.argument("bool", (t,))
    p = b.param(d)
    code = b.pick(
        f"torch.where({mask}.unsqueeze(-1), {p}, h)",
        f"h * ~{mask}.unsqueeze(-1) + {p} * {mask}.unsqueeze(-1)",
        f"torch.lerp(h, {p}.expand_as(h), {mask}.unsqueeze(-1).to(h.dtype))",
        f"h.masked_fill({mask}.unsqueeze(-1), 0.5) + {p}",
        f"h.masked_fill({mask}.unsqueeze(-1), {b.param()})",
    )
    b.then(code)


@step()
def stacked_parameter(b: Builder) -> None:
    b.need_rank(1, 2)
    p = b.param(*b.shape)
    b.then(f"torch.stack([h, {p}.expand_as(h)], 1)", (2, *b.shape))


@step()
def concatenated_features(b: Builder) -> None:
    b.need_rank(1, 3)
    k = b.size(1, 2)
    sizes = listed((*b.shape[:-1], -1))
    spread = f"{b.param(*([1] * len(b.shape)), k)}.expand(h.shape[0], {sizes})"
    b.then_last(f"torch.cat([h, {spread}], -1)", b.last + k)


# ---------------------------------------------------------------- normalisation and activation


@step(3)
def layer_norm(b: Builder) -> None:
    k = b.rng.randint(1, min(2, len(b.shape))) if b.shape else 1
    dims = listed((b.last,) if k == 1 else b.shape[-k:])
    affine = b.pick("", ", bias=False", ", elementwise_affine=False")
    code = b.pick(f"nn.LayerNorm([{dims}], eps=0.1{affine})", f"nn.RMSNorm([{dims}], eps=0.1)")
    b.then(f"{b.module(code)}(h)")


@step(3)
def channel_norm(b: Builder) -> None:
    b.need_rank(1, 4)
    c = b.shape[0]
    if len(b.shape) == 1 or b.flag():
        groups = b.divisor(c)
        b.need(math.prod(b.shape) > groups)
        code = f"nn.GroupNorm({groups}, {c}, eps=0.1)"
    else:
        b.need(math.prod(b.shape[1:]) > 1)
        code = f"nn.InstanceNorm{len(b.shape) - 1}d({c}, eps=0.1, affine=True)"
    b.then(f"{b.module(code)}(h)")


@step()
def batch_norm_by_statistics(b: Builder) -> None:
    b.need_rank(1, 4)
    c = b.shape[0]
    mean, var = b.buffer(f"torch.randn({c})"), b.buffer(f"torch.rand({c}) + 0.5")
    weight, bias = (b.param(c) if b.flag(0.8) else "None" for _ in range(2))
    b.then(f"F.batch_norm(h, {mean}, {var}, {weight}, {bias}, False)")


@step(6)
def activation(b: Builder) -> None:
    code = b.pick(
        "h.tanh()",
        "h.sin()",
        "F.gelu(h)",
        "F.gelu(h, approximate='tanh')",
        "F.silu(h)",
        "F.relu(h)",
        "F.elu(h)",
        "F.softplus(h)",
        "F.leaky_relu(h, 0.1)",
        "h.sigmoid()",
        "F.mish(h)",
        "F.hardswish(h)",
        "F.relu6(h + 1)",
        "h.square() * 0.3",
        "h.abs()",
        "h.clamp(-1, 1)",
        "F.selu(h, inplace=False)",
        "h.clone().relu_()",
        "F.logsigmoid(h)",
        "F.tanhshrink(h)",
        "F.softsign(h)",
        "h + (h.round() - h).detach()",
        "h.erf()",
        "(h * h.sigmoid().detach())",
    )
    b.then(code)


@step(3)
def prelu(b: Builder) -> None:
    if b.flag() or not b.shape or b.lead > 1:
        b.then(f"{b.module('nn.PReLU()')}(h)")
    else:
        b.then(f"{b.module(f'nn.PReLU({b.shape[0]})')}(h)")


@step(3)
def along_a_dimension(b: Builder) -> None:
    """Ops over dimensions of a sample, without parameters."""
    k = -b.rng.randint(1, len(b.shape)) if b.shape else b.last
    code = b.pick(
        "h.softmax({k})",
        "h.log_softmax({k})",
        "h.cumsum({k})",
        "h.flip({k})",
        "h.roll(1, {k})",
        "h - h.mean({k}, keepdim=True)",
        "h / (1 + h.norm(dim={k}, keepdim=True))",
        "h.sort({k}).values",
        "h * h.amax({k}, keepdim=True)",
        "h + h.logsumexp({k}, keepdim=True)",
        "F.normalize(h + 2, dim={k})",
        "torch.cat([h.narrow({k}, 0, 1), h], {k}).narrow({k}, 0, h.shape[{k}])",
        "torch.cat(h.split(1, {k}), {k})",
        "torch.stack(h.unbind({k}), {k})",
        "h.gather({k}, h.argsort({k}))",
        "h * h.std({k}, keepdim=True, correction=0)",
        "h.cumprod({k})",
        "h.diff(dim={k}, prepend=h.narrow({k}, 0, 1))",
    )
    b.then(code.replace("{k}", str(k)))


# ---------------------------------------------------------------- shapes of a sample


@step(3)
def reshaped(b: Builder) -> None:
    """Permute, flatten, unflatten, add and take dimensions, reduce, cut."""
    rank, lead = len(b.shape), b.lead
    way = b.rng.choice(["permute", "flatten", "unflatten", "new", "reduce", "cut", "repeat", "squeeze", "pad", "tril"])
    dims = list(range(rank))
    if way == "permute":
        b.need(rank >= 2)
        b.rng.shuffle(dims)
        order = listed((*range(lead), *(lead + i for i in dims)))
        b.then(f"h.permute({order}){b.pick('', '.contiguous()')}", tuple(b.shape[i] for i in dims))
    elif way == "flatten":
        b.need(rank >= 2)
        i = b.rng.randrange(rank - 1)
        merged = b.shape[i] * b.shape[i + 1]
        b.then(f"h.flatten({lead + i}, {lead + i + 1})", (*b.shape[:i], merged, *b.shape[i + 2 :]))
    elif way == "unflatten":
        i = b.rng.randrange(max(rank, 1))
        b.need(rank >= 1)
        k = b.divisor(b.shape[i])
        parts = (k, b.shape[i] // k)
        new = (*b.shape[:i], *parts, *b.shape[i + 1 :])
        if lead == 1 and b.flag():
            b.then(b.pick(f"h.reshape(-1, {listed(new)})", f"h.contiguous().view(h.shape[0], {listed(new)})"), new)
        else:
            b.then(f"h.unflatten({lead + i}, {parts})", new)
    elif way == "new":
        i = b.rng.randint(0, rank)
        b.then(f"h.unsqueeze({lead + i})", (*b.shape[:i], 1, *b.shape[i:]))
    elif way == "squeeze":
        b.need(1 in b.shape)
        i = b.shape.index(1)
        b.then(f"h.squeeze({lead + i})", (*b.shape[:i], *b.shape[i + 1 :]))
    elif way == "reduce":
        b.need(rank >= 2)
        i = b.rng.randrange(rank)
        op = b.pick("mean", "sum", "amax", "logsumexp")
        b.then(f"h.{op}({lead + i})", (*b.shape[:i], *b.shape[i + 1 :]))
    elif way == "cut":
        b.need(rank >= 1)
        i = b.rng.randrange(rank)
        b.need(b.shape[i] >= 2)
        start = f"{', '.join([':'] * (lead + i))}, "
        if b.flag():
            b.then(f"h[{start}1:]", (*b.shape[:i], b.shape[i] - 1, *b.shape[i + 1 :]))
        else:
            b.then(f"h[{start}-1]", (*b.shape[:i], *b.shape[i + 1 :]))
    elif way == "repeat":
        b.need(rank >= 1)
        i = b.rng.randrange(rank)
        b.then(f"h.repeat_interleave(2, {lead + i})", (*b.shape[:i], 2 * b.shape[i], *b.shape[i + 1 :]))
    elif way == "pad":
        more = b.size(0, 1)
        b.then_last(f"F.pad(h, (1, {more}), value=0.5)", b.last + 1 + more)
    else:
        b.need(rank >= 2)
        b.then("h.tril()")


@step()
def gated(b: Builder) -> None:
    p = b.size(1, 3)
    f = b.module(f"nn.Linear({b.last}, {2 * p})")
    if b.flag():
        b.then_last(f"F.glu({f}(h))", p)
    else:
        b.body.append(f"u, v = {f}(h).chunk(2, -1)")
        b.then_last("F.silu(u) * v", p)


@step()
def saved_value(b: Builder) -> None:
    name = b.name("s")
    b.body.append(f"{name} = h")
    b.saved.append((name, b.shape, len(b.folds)))
    if not b.folds and b.flag(0.2):
        b.outputs.append(name)


@step(4)
def residual(b: Builder) -> None:
    fits = [name for name, shape, depth in b.saved if shape == b.shape and depth == len(b.folds)]
    b.need(bool(fits))
    b.then(b.pick(f"h + {b.rng.choice(fits)}", f"h * {b.rng.choice(fits)}"))


@step(3)
def residual_block(b: Builder) -> None:
    d = b.last
    norm, up, down = (
        b.module(f"nn.LayerNorm({d}, eps=0.1)"),
        b.module(f"nn.Linear({d}, 3)"),
        b.module(f"nn.Linear(3, {d})"),
    )
    b.then(f"h + {down}(F.gelu({up}({norm}(h))))")


# ---------------------------------------------------------------- convolution and pooling


def _windows(b: Builder, n: int, transposed: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Options of a convolution by dimension, and the sizes that come out."""
    kernel, stride, padding, dilation, more, out = [], [], [], [], [], []
    for size in b.shape[1:]:
        k, s, p, d = b.size(1, 3), b.size(1, 2), b.size(0, 1), b.size(1, 2)
        o = b.size(0, max(s, d) - 1) if transposed else 0
        new = (size - 1) * s - 2 * p + d * (k - 1) + o + 1 if transposed else (size + 2 * p - d * (k - 1) - 1) // s + 1
        b.need(0 < new <= 7)
        for values, value in ((kernel, k), (stride, s), (padding, p), (dilation, d), (more, o), (out, new)):
            values.append(value)
    return tuple(str(tuple(v)) for v in (kernel, stride, padding, dilation, more)), tuple(out)


@step(8)
def convolution(b: Builder) -> None:
    b.need_rank(2, 4)
    n, c = len(b.shape) - 1, b.shape[0]
    groups = b.divisor(c)
    p = groups * b.size(1, 3 if groups < 3 else 1)
    (kernel, stride, padding, dilation, _), out = _windows(b, n, False)
    mode = "zeros"
    if b.flag(0.2):
        padding, stride = b.pick("'same'", "'valid'"), "1"
        out = b.shape[1:]
        if padding == "'valid'":
            kernel, dilation = "1", "1"
    elif b.flag(0.25):
        mode = b.pick("reflect", "replicate", "circular")
        b.need(min(b.shape[1:]) >= 2)
    code = (
        f"nn.Conv{n}d({c}, {p}, {kernel}, stride={stride}, padding={padding}, dilation={dilation}, "
        f"groups={groups}, bias={b.flag()}, padding_mode={mode!r})"
    )
    b.then(f"{b.module(code)}(h)", (p, *out))


@step(3)
def convolution_transposed(b: Builder) -> None:
    b.need_rank(2, 4)
    n, c = len(b.shape) - 1, b.shape[0]
    groups = b.divisor(c)
    p = groups * b.size(1, 2)
    (kernel, stride, padding, dilation, more), out = _windows(b, n, True)
    code = (
        f"nn.ConvTranspose{n}d({c}, {p}, {kernel}, stride={stride}, padding={padding}, output_padding={more}, "
        f"dilation={dilation}, groups={groups}, bias={b.flag()})"
    )
    b.then(f"{b.module(code)}(h)", (p, *out))


@step()
def convolution_by_a_derived_kernel(b: Builder) -> None:
    b.need_rank(2, 2)
    c, size = b.shape
    w = b.param(2, c, 2)
    b.need(size >= 2)
    kernel = b.pick(
        f"{w} - {w}.mean((1, 2), keepdim=True)", f"{w}.flip(-1)", f"{w} * {b.param(2, 1, 1)}", f"{w}.tanh()"
    )
    b.then(f"F.conv1d(h, {kernel})", (2, size - 1))


@step()
def convolution_called_twice(b: Builder) -> None:
    b.need_rank(2, 3)
    n, c = len(b.shape) - 1, b.shape[0]
    f = b.module(f"nn.Conv{n}d({c}, {c}, 3, padding=1, groups={b.divisor(c)})")
    b.then(f"{f}({f}(h).tanh())")


@step(3)
def pooling(b: Builder) -> None:
    b.need_rank(2, 4)
    n, c = len(b.shape) - 1, b.shape[0]
    space = b.shape[1:]
    way = b.pick("max", "avg", "adaptive_avg", "adaptive_max", "interpolate", "max padded", "lp", "pixels", "unfold")
    if way in ("max", "avg"):
        b.need(min(space) >= 2)
        s = b.size(1, 2)
        b.then(f"F.{way}_pool{n}d(h, 2, stride={s})", (c, *((x - 2) // s + 1 for x in space)))
    elif way == "max padded":
        b.then(f"F.max_pool{n}d(h, 3, stride=1, padding=1)")
    elif way == "lp":
        b.need(n < 3 and min(space) >= 2)
        b.then(f"F.lp_pool{n}d(h.abs() + 0.1, 2, 2, stride=1)", (c, *(x - 1 for x in space)))
    elif way == "pixels":
        b.need(n == 2 and c % 4 == 0)
        b.then("F.pixel_shuffle(h, 2)", (c // 4, *(2 * x for x in space)))
    elif way == "unfold":
        b.need(n == 2 and min(space) >= 2)
        b.then("F.unfold(h, 2)", (4 * c, (space[0] - 1) * (space[1] - 1)))
    elif way == "interpolate":
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[n] if b.flag() else "nearest"
        b.then(f"F.interpolate(h, scale_factor=2, mode={mode!r})", (c, *(2 * x for x in space)))
    else:
        k = b.size(1, 2)
        b.then(f"F.{way}_pool{n}d(h, {k})", (c, *([k] * n)))


# ---------------------------------------------------------------- recurrence and attention


@step(3)
def recurrent(b: Builder) -> None:
    b.need(len(b.shape) == (1 if b.sequence_first else 2))
    d, k = b.last, b.size(1, 3)
    kind = b.pick("RNN", "LSTM", "GRU")
    both = b.flag(0.25)
    options = ["" if b.sequence_first else ", batch_first=True", ", bidirectional=True" if both else ""]
    options += [b.pick("", "", ", num_layers=2"), b.pick("", "", ", bias=False")]
    width = k
    if kind == "LSTM" and k > 1 and b.flag(0.3):
        width = k - 1
        options.append(f", proj_size={width}")
    if kind == "RNN" and b.flag(0.3):
        options.append(", nonlinearity='relu'")
    m = b.module(f"nn.{kind}({d}, {k}{''.join(options)})")
    start = ""
    if kind == "GRU" and "num_layers" not in "".join(options) and not both and b.flag(0.3):
        batch = "h.shape[1]" if b.sequence_first else "h.shape[0]"
        start = f", {b.param(1, 1, k)}.expand(1, {batch}, -1).contiguous()"
    b.then_last(f"{m}(h{start})[0]", width * (2 if both else 1))


@step()
def recurrent_cell(b: Builder) -> None:
    b.need_rank(2, 2)
    t, d = b.shape
    k = b.size(1, 3)
    cell = b.module(f"nn.{b.pick('GRUCell', 'RNNCell')}({d}, {k})")
    b.body.append(f"z = h.new_zeros(h.shape[0], {k})")
    b.body.append(f"for t in range({t}):")
    b.body.append(f"    z = {cell}(h[:, t], z)")
    b.then("z", (k,))


@step(3)
def attention(b: Builder) -> None:
    b.need(len(b.shape) == (1 if b.sequence_first else 2))
    d = b.last
    heads = b.divisor(d)
    first = "" if b.sequence_first else ", batch_first=True"
    if b.flag(0.3):
        norm = b.pick("True", "False")
        code = f"nn.TransformerEncoderLayer({d}, {heads}, 3, 0.0, norm_first={norm}, layer_norm_eps=0.1{first})"
        b.then(f"{b.module(code)}(h)")
        return
    more = b.pick("", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True")
    m = b.module(f"nn.MultiheadAttention({d}, {heads}{more}{first})")
    call = b.pick("h, h, h", "h, h, h, need_weights=False", "h, h, h.tanh(), average_attn_weights=False")
    b.then(f"{m}({call})[0]")


@step(3)
def attention_by_hand(b: Builder) -> None:
    b.need_rank(2, 2)
    t, d = b.shape
    q, k, v = (b.module(f"nn.Linear({d}, 4)") for _ in range(3))
    split = "({m}(h).unflatten(-1, (2, 2)).transpose(1, 2))"
    more = b.pick(
        "", ", is_causal=True", f", attn_mask={b.param(t, t)}", ", scale=0.5", f", attn_mask={b.param(2, 1, t)}"
    )
    q, k, v = (split.replace("{m}", m) for m in (q, k, v))
    if b.flag(0.3):
        prefix = b.param(1, 2, 1, 2)
        spread = f"{prefix}.expand(h.shape[0], -1, -1, -1)"
        k, v = f"torch.cat([{spread}, {k}], 2)", f"torch.cat([{spread}, {v}], 2)"
        more = b.pick("", ", scale=0.5")
    b.then(f"F.scaled_dot_product_attention({q}, {k}, {v}{more}).transpose(1, 2).flatten(2)", (t, 4))


@step()
def attention_pooling(b: Builder) -> None:
    """One learned query for every sample."""
    b.need_rank(2, 2)
    _, d = b.shape
    query = b.param(d)
    code = b.pick(
        f"((h @ {query}).softmax(-1).unsqueeze(-2) @ h).squeeze(-2)",
        f"F.scaled_dot_product_attention({query}.expand(h.shape[0], 1, -1), h, h).squeeze(1)",
        f"torch.einsum('bt,btd->bd', torch.einsum('btd,d->bt', h, {query}).softmax(-1), h)",
    )
    b.then(code, (d,))


# ---------------------------------------------------------------- other inputs


@step(3)
def second_input(b: Builder) -> None:
    b.need_rank(1, 2)
    b.need(not b.folds)
    d, k = b.last, b.size(1, 3)
    way = b.pick("features", "sequence", "rows", "ids", "constant", "sequence first")
    if way == "features":
        x = b.argument("float", (k,))
        spread = ".unsqueeze(1)" if len(b.shape) == 2 else ""
        b.then(f"h + {b.module(f'nn.Linear({k}, {d})')}({x}){spread}")
    elif way == "rows":
        x = b.argument("float", b.shape)
        b.then(b.pick(f"h * {x}", f"torch.cat([h, {x}], 1)[:, :{b.shape[0]}]", f"torch.maximum(h, {x} + {b.param(d)})"))
    elif way == "ids":
        x = b.argument("ids", (), high=4)
        spread = ".unsqueeze(1)" if len(b.shape) == 2 else ""
        padding = b.pick("", f", padding_idx={b.rng.randrange(-4, 4)}")
        b.then(f"h + {b.module(f'nn.Embedding(4, {d}{padding})')}({x}){spread}")
    elif way == "constant":
        x = b.argument("float", b.shape, None)
        b.then(b.pick(f"h * {x}", f"h + {x} * {b.param(d)}", f"F.linear(h, {b.param(d, d)}) * {x}"))
    else:
        b.need(len(b.shape) == 2)
        first = way == "sequence first"
        x = b.argument("float", (2, d), 1 if first else 0)
        m = b.module(f"nn.MultiheadAttention({d}, {b.divisor(d)}, batch_first={not first})")
        if first:
            b.then(f"{m}(h.transpose(0, 1), {x}, {x})[0].transpose(0, 1)")
        else:
            b.then(b.pick(f"{m}(h, {x}, {x})[0]", f"(h @ {x}.mT).softmax(-1) @ {x} * {b.param(d)}"))


@step()
def looked_up_by_value(b: Builder) -> None:
    """Ids made of the features: a codebook."""
    k = b.size(2, 4)
    table = b.param(k, 3)
    ids = b.pick("(h.detach() > 0).long()", f"h.detach().abs().long() % {k}")
    b.then(
        b.pick(f"{table}[{ids}]", f"F.embedding({ids}, {table})", f"F.one_hot({ids}, {k}).to(h.dtype) @ {table}"),
        (*b.shape, 3),
    )


# ---------------------------------------------------------------- where the batch lies


@step(5)
def fold(b: Builder) -> None:
    """Positions become rows beside the batch: behind it, before it, on both sides; or the sequence comes first."""
    b.need(len(b.folds) < 2 and not b.sequence_first and len(b.shape) >= 2)
    t, *rest = b.shape
    dims = f"(-1, {listed(tuple(rest))})"
    way = b.pick("inner", "inner", "outer", "sequence first", "both", "two")
    if way == "sequence first" and b.folds:
        raise Unfit
    if way == "both" or way == "two":
        b.need(len(b.shape) >= 3)
        rest = rest[1:]
        dims = f"(-1, {listed(tuple(rest))})"
        code = f"h.transpose(0, 1).reshape{dims}" if way == "both" else b.pick("h.flatten(0, 2)", f"h.reshape{dims}")
        sizes = b.shape[:2]
    else:
        sizes = (t,)
        code = {
            "inner": b.pick("h.flatten(0, 1)", f"h.reshape{dims}", f"h.contiguous().view{dims}"),
            "outer": b.pick("h.transpose(0, 1).flatten(0, 1)", f"h.transpose(0, 1).reshape{dims}"),
            "sequence first": b.pick("h.transpose(0, 1)", "h.movedim(1, 0)", "h.transpose(0, 1).contiguous()"),
        }[way]
    b.folds.append((way, sizes))
    b.then(code, tuple(rest))


@step(3)
def unfold(b: Builder) -> None:
    b.need(bool(b.folds))
    way, sizes = b.folds.pop()
    shape = (*sizes, *b.shape)
    rest = "".join(f", {size}" for size in b.shape)
    code = {
        "inner": b.pick(f"h.unflatten(0, (-1, {sizes[0]}))", f"h.reshape(-1, {sizes[0]}{rest})"),
        "two": b.pick(f"h.unflatten(0, (-1, {listed(sizes)}))", f"h.reshape(-1, {listed(sizes)}{rest})"),
        "outer": b.pick(
            f"h.unflatten(0, ({sizes[0]}, -1)).transpose(0, 1)", f"h.reshape({sizes[0]}, -1{rest}).transpose(0, 1)"
        ),
        "both": f"h.reshape({sizes[0]}, -1, {sizes[-1]}{rest}).transpose(0, 1)",
        "sequence first": b.pick("h.transpose(0, 1)", "h.movedim(0, 1)"),
    }[way]
    b.saved = [entry for entry in b.saved if entry[2] <= len(b.folds)]
    b.then(code, shape)
