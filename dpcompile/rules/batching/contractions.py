"""Products that sum over shared dimensions: each is a formula like "Abk,Akm->Abm"; the batch must survive into it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dpcompile.ir import Axis, Value
from dpcompile.rules.batching.base import CONSTANT, Call, Mixes, batched, shape_of

LEADING = "0123456789"  # stand for leading dimensions that broadcast, aligned from the right; no letter of an einsum

PAIRS = (
    "Compare within each sample: with its own views, or with negatives that are the same for all. A loss over pairs of "
    "samples has no per-sample gradient."
)

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
            raise Mixes("multiplies every sample with every other sample", PAIRS)
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
    """[n, k] [k, m]: the batch is n or m; in k it would be summed, in both it would pair samples."""
    return contract(call, [(call.args["self"], "nk"), (call.args["mat2"], "km")], "nm")


def bmm(call: Call) -> Value:
    """[b, n, k] [b, k, m]: the batch is b of both, or n or m."""
    return contract(call, [(call.args["self"], "bnk"), (call.args["mat2"], "bkm")], "bnm")


def _added(call: Call, name: str, letters: str) -> tuple[fx.Node, str]:
    node = call.args[name]
    n = ndim_of(node)
    return node, letters[len(letters) - n :] if n else ""


def addmm(call: Call) -> Value:
    """As mm, and the added operand has the batch in the same place or none."""
    return contract(call, [_added(call, "self", "nm"), (call.args["mat1"], "nk"), (call.args["mat2"], "km")], "nm")


def baddbmm(call: Call) -> Value:
    """As bmm, and the added operand has the batch in the same place or none."""
    return contract(
        call, [_added(call, "self", "bnm"), (call.args["batch1"], "bnk"), (call.args["batch2"], "bkm")], "bnm"
    )


def addbmm(call: Call) -> Value:
    """As bmm, but b is summed: the batch is n or m."""
    return contract(
        call, [_added(call, "self", "nm"), (call.args["batch1"], "bnk"), (call.args["batch2"], "bkm")], "nm"
    )


def mv(call: Call) -> Value:
    """[n, k] [k]: the batch is n."""
    return contract(call, [(call.args["self"], "nk"), (call.args["vec"], "k")], "n")


def addmv(call: Call) -> Value:
    """As mv, and the added operand has the batch in the same place or none."""
    return contract(call, [_added(call, "self", "n"), (call.args["mat"], "nk"), (call.args["vec"], "k")], "n")


def dot(call: Call) -> Value:
    """Nothing helps: two vectors over the samples are summed."""
    other = call.args["tensor"] if "tensor" in call.args else call.args["other"]
    return contract(call, [(call.args["self"], "k"), (other, "k")], "")


def outer(call: Call) -> Value:
    """The batch is in one of the two vectors."""
    return contract(call, [(call.args["self"], "n"), (call.args["vec2"], "m")], "nm")


def linear(call: Call) -> Value:
    """The batch is in the input, before its last dimension; weight and bias are the same for all samples."""
    lead = leads(ndim_of(call.args["input"]) - 1)
    weight = "mk" if ndim_of(call.args["weight"]) == 2 else "k"
    out = lead + ("m" if weight == "mk" else "")
    terms = [(call.args["input"], lead + "k"), (call.args["weight"], weight), (call.args.get("bias"), "m")]
    return contract(call, terms, out)


def matmul(call: Call) -> Value:
    """As mm and bmm, with leading dimensions that broadcast: there the batch may be in both."""
    first, second = call.args["self"], call.args["other"]
    n, m = ndim_of(first), ndim_of(second)
    left = "k" if n == 1 else leads(n - 2) + "nk"
    right = "k" if m == 1 else leads(m - 2) + "km"
    out = leads(max(n, m) - 2) + ("n" if n > 1 else "") + ("m" if m > 1 else "")
    return contract(call, [(first, left), (second, right)], out)


def einsum(call: Call) -> Value:
    """One letter, not summed, stands for the batch in every operand that has it."""
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
    """The batch is in one of the two, and is not summed."""
    first, second = call.args["self"], call.args["other"]
    n, m = ndim_of(first), ndim_of(second)
    left = [f"{chr(0x100 + i)}" for i in range(n)]
    right = [f"{chr(0x200 + i)}" for i in range(m)]
    for i, j in zip(call.args["dims_self"], call.args["dims_other"], strict=True):
        right[j % m] = left[i % n]
    out = [c for c in left if c not in right] + [c for c in right if c not in left]
    return contract(call, [(first, "".join(left)), (second, "".join(right))], "".join(out))


def bilinear(call: Call) -> Value:
    """The batch is in leading dimensions of the inputs; weight and bias are the same for all samples."""
    lead = leads(ndim_of(call.args["input1"]) - 1)
    terms = [(call.args["input1"], lead + "i"), (call.args["input2"], lead + "j"), (call.args["weight"], "oij")]
    return contract(call, [*terms, (call.args.get("bias"), "o")], lead + "o")


MATRICES = {"linalg_solve": ("A", "B"), "linalg_solve_triangular": ("self", "B"), "cholesky_solve": ("input2", "self")}


def solve(call: Call) -> Value:
    """Systems A X = B (X A = B with left=False): the batch in leading dimensions, or in X's own columns."""
    matrix, given = (call.args[name] for name in MATRICES.get(call.op.overloadpacket.__name__, ("LU", "B")))
    n, m = ndim_of(matrix), ndim_of(given)
    vector = m == 1 or len(call.out_shape) < max(n, m)
    last, out = ("z", "_") if vector else ("zk", "_k") if call.args.get("left", True) else ("kz", "k_")
    terms = [(matrix, leads(n - 2) + "xy"), (given, leads(m - len(last)) + last)]
    if call.args.get("pivots") is not None:
        terms.append((call.args["pivots"], leads(n - 2) + "y"))
    return contract(call, terms, leads(len(call.out_shape) - len(out)) + out)


def cdist(call: Call) -> Value:
    """Rows of one tensor against rows of another: the batch in leading dimensions, or the rows of one of them."""
    first, second = call.args["x1"], call.args["x2"]
    n, m = ndim_of(first), ndim_of(second)
    return contract(call, [(first, leads(n - 2) + "nk"), (second, leads(m - 2) + "mk")], leads(max(n, m) - 2) + "nm")


def inner(call: Call) -> Value:
    """The last dimensions are summed: the batch is another one, of one of the two."""
    first, second = call.args["self"], call.args["other"]
    left, right = leads(ndim_of(first) - 1), leads(ndim_of(second) - 1).translate(OTHER)
    return contract(call, [(first, left + "k"), (second, right + "k")], left + right)


def similarity(call: Call) -> Value:
    """Two tensors that broadcast, the batch of both in the same dimension, other than the one compared along."""
    names = ("x", "y") if "x" in call.args else ("x1", "x2")
    first, second = (call.args[name] for name in names)
    n = max(ndim_of(first), ndim_of(second))
    letters = leads(n)
    dim = call.args["dim"] % n if "dim" in call.args else n - 1
    out = letters[:dim] + ("-" if call.args.get("keepdim") else "") + letters[dim + 1 :]
    return contract(call, [(t, letters[n - len(shape_of(t)) :]) for t in (first, second)], out)
