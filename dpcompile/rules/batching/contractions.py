"""Products that sum over shared dimensions: each is a formula like "Abk,Akm->Abm"; the batch must survive into it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, batched, shape_of

LEADING = "0123456789"  # stand for leading dimensions that broadcast, aligned from the right; no letter of an einsum

OTHER = str.maketrans("0123456789", "ABCDEFGHIJ")


def leads(n: int) -> str:
    return LEADING[len(LEADING) - n :] if n > 0 else ""


def contract(call: Call, operands: Sequence[tuple[fx.Node | None, str]], out: str) -> Value:
    """The value of a product whose operands' dimensions carry the given letters; letters not in `out` are summed."""
    found: tuple[str, Axis] | None = None
    for operand, letters in operands:
        axis = call.known(operand).axis if isinstance(operand, fx.Node) else None
        if axis is None:
            continue
        letter = letters[axis.dim]
        if found is None:
            found = (letter, axis)
        elif found[0] != letter:
            raise Mixes("multiplies every sample with every other sample")
        elif (found[1].outer, found[1].inner) != (axis.outer, axis.inner):
            raise Mixes("multiplies samples in different orders (the batch is folded differently)")
    if found is None:
        return CONSTANT
    letter, axis = found
    if letter not in out:
        raise Mixes("sums a product over the samples of the batch")
    return batched(Axis(out.index(letter), axis.outer, axis.inner))


def ndim_of(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def mm(call: Call) -> Value:
    return contract(call, [(call.args["self"], "nk"), (call.args["mat2"], "km")], "nm")


def bmm(call: Call) -> Value:
    return contract(call, [(call.args["self"], "bnk"), (call.args["mat2"], "bkm")], "bnm")


def _added(call: Call, name: str, letters: str) -> tuple[fx.Node, str]:
    node = call.args[name]
    n = ndim_of(node)
    return node, letters[len(letters) - n :] if n else ""


def addmm(call: Call) -> Value:
    """The added operand broadcasts to the result."""
    return contract(call, [_added(call, "self", "nm"), (call.args["mat1"], "nk"), (call.args["mat2"], "km")], "nm")


def baddbmm(call: Call) -> Value:
    return contract(
        call, [_added(call, "self", "bnm"), (call.args["batch1"], "bnk"), (call.args["batch2"], "bkm")], "bnm"
    )


def addbmm(call: Call) -> Value:
    return contract(
        call, [_added(call, "self", "nm"), (call.args["batch1"], "bnk"), (call.args["batch2"], "bkm")], "nm"
    )


def mv(call: Call) -> Value:
    return contract(call, [(call.args["self"], "nk"), (call.args["vec"], "k")], "n")


def addmv(call: Call) -> Value:
    return contract(call, [_added(call, "self", "n"), (call.args["mat"], "nk"), (call.args["vec"], "k")], "n")


def dot(call: Call) -> Value:
    other = call.args["tensor"] if "tensor" in call.args else call.args["other"]
    return contract(call, [(call.args["self"], "k"), (other, "k")], "")


def outer(call: Call) -> Value:
    return contract(call, [(call.args["self"], "n"), (call.args["vec2"], "m")], "nm")


def linear(call: Call) -> Value:
    lead = leads(ndim_of(call.args["input"]) - 1)
    weight = "mk" if ndim_of(call.args["weight"]) == 2 else "k"
    out = lead + ("m" if weight == "mk" else "")
    terms = [(call.args["input"], lead + "k"), (call.args["weight"], weight), (call.args.get("bias"), "m")]
    return contract(call, terms, out)


def matmul(call: Call) -> Value:
    first, second = call.args["self"], call.args["other"]
    n, m = ndim_of(first), ndim_of(second)
    left = "k" if n == 1 else leads(n - 2) + "nk"
    right = "k" if m == 1 else leads(m - 2) + "km"
    out = leads(max(n, m) - 2) + ("n" if n > 1 else "") + ("m" if m > 1 else "")
    return contract(call, [(first, left), (second, right)], out)


def einsum(call: Call) -> Value:
    """The equation as the user wrote it; an ellipsis stands for leading dimensions aligned from the right."""
    tensors = call.args["tensors"]
    equation = call.args["equation"].replace(" ", "")
    inputs, _, out = equation.partition("->")
    terms, widest = [], 0
    for term, tensor in zip(inputs.split(","), tensors, strict=True):
        width = ndim_of(tensor) - len(term.replace("...", ""))
        widest = max(widest, width)
        terms.append((tensor, term.replace("...", leads(width))))
    if "->" in equation:
        result = out.replace("...", leads(widest))
    else:
        letters = inputs.replace(",", "").replace(".", "")
        result = leads(widest) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return contract(call, terms, result)


def tensordot(call: Call) -> Value:
    first, second = call.args["self"], call.args["other"]
    n, m = ndim_of(first), ndim_of(second)
    left = [f"{chr(0x100 + i)}" for i in range(n)]
    right = [f"{chr(0x200 + i)}" for i in range(m)]
    for i, j in zip(call.args["dims_self"], call.args["dims_other"], strict=True):
        right[j % m] = left[i % n]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return contract(call, [(first, "".join(left)), (second, "".join(right))], "".join(out))


def bilinear(call: Call) -> Value:
    lead = leads(ndim_of(call.args["input1"]) - 1)
    terms = [(call.args["input1"], lead + "i"), (call.args["input2"], lead + "j"), (call.args["weight"], "oij")]
    return contract(call, [*terms, (call.args.get("bias"), "o")], lead + "o")


def cdist(call: Call) -> Value:
    first, second = call.args["x1"], call.args["x2"]
    n, m = ndim_of(first), ndim_of(second)
    return contract(call, [(first, leads(n - 2) + "nk"), (second, leads(m - 2) + "mk")], leads(max(n, m) - 2) + "nm")


def inner(call: Call) -> Value:
    first, second = call.args["self"], call.args["other"]
    left, right = leads(ndim_of(first) - 1), leads(ndim_of(second) - 1).translate(OTHER)
    return contract(call, [(first, left + "k"), (second, right + "k")], left + right)


def similarity(call: Call) -> Value:
    """cosine_similarity, vecdot and pairwise_distance: two tensors that broadcast, and one dimension that goes."""
    names = ("x", "y") if "x" in call.args else ("x1", "x2")
    first, second = (call.args[name] for name in names)
    n = max(ndim_of(first), ndim_of(second))
    letters = leads(n)
    dim = call.args["dim"] % n if "dim" in call.args else n - 1
    out = letters[:dim] + ("-" if call.args.get("keepdim") else "") + letters[dim + 1 :]
    return contract(call, [(t, letters[n - len(shape_of(t)) :]) for t in (first, second)], out)
