"""Products that sum over positions or leave them, as `fxstream::contract`; attention (`unflatten`, rules 4, 8)."""

from __future__ import annotations

from fxstream.lowering.proxy import Proxy
from fxstream.lowering.unflatten import FlatOperator, Handler, Result, Unflattened, adapted

__all__ = ["HANDLERS"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
Terms = list[tuple[Proxy, str]]
"""The operands, with a letter per dim of each."""


def _matrices(op: FlatOperator) -> Result:
    """A matrix product, of batches of them where a tensor has more dims."""
    one, other = (a for a in op.arguments.values() if isinstance(a, Proxy))
    if min(one.ndim, other.ndim) < 2:
        return None
    source = op.source(one)
    if source is not None and op.source(other) is None and other.ndim == 2 and source.place < one.ndim - 1:
        return source.at(source.tensor.matmul(other))
    batch = LETTERS[: max(one.ndim, other.ndim) - 2]
    first, second = (batch[len(batch) + 2 - tensor.ndim :] for tensor in (one, other))
    return _contract(op, [(one, f"{first}xy"), (other, f"{second}yz")], f"{batch}xz")


def _einsum(op: FlatOperator) -> Result:
    """An explicit equation of two operands, without repeated letters."""
    inputs, arrow, output = op.equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    is_repeated = any(len(set(term)) < len(term) for term in letters)
    if not arrow or "." in op.equation or len(op.tensors) != 2 or is_repeated:
        return None
    return _contract(op, list(zip(op.tensors, letters, strict=True)), output)


def _contract(op: FlatOperator, terms: Terms, output: str) -> Result:
    sources = [(source, letters) for tensor, letters in terms if (source := op.source(tensor)) is not None]
    if not sources:
        return _contract_maps(op, terms, output)
    first, position = _positions(sources, output)
    is_alike = all(source.fits(first) for source, letters in sources if letters[source.place] == position)
    if not is_alike or (position not in output and not all(position in letters for _, letters in terms)):
        return None
    unused = [c for c in LETTERS if all(c not in letters for _, letters in terms)]
    axes, apart = "".join(unused[: len(first.extents)]), []
    for tensor, letters in terms:
        is_wide = position in letters
        operand = adapted(op, tensor, first, letters.index(position) - len(letters)) if is_wide else tensor
        if operand is None:
            return None
        apart.append((operand, letters.replace(position, axes)))
    product = _product(op, apart, output.replace(position, axes))
    return first.at(product, output.index(position)) if position in output else product


def _positions(sources: list[tuple[Unflattened, str]], output: str) -> tuple[Unflattened, str]:
    """The source whose positions stay apart, and their letter: the first that keeps them; the others are whole."""
    of_each = [(source, letters[source.place]) for source, letters in sources]
    return next(((source, letter) for source, letter in of_each if letter in output), of_each[0])


def _attention(op: FlatOperator) -> Result:
    """Attention, each position's to all keys, or inside windows."""
    query, rank = op.source(op.query), op.query.ndim
    if query is None or op.dropout_p or op.is_causal or op.arguments.get("enable_gqa"):
        return None
    rows, others = len(query.extents), [op.key, op.arguments["value"]]
    if query.place < rank - 2:
        sources = [source for tensor in others if (source := op.source(tensor)) is not None]
        if len(sources) < len(others) or not all(query.fits(one) and query.place == one.place for one in sources):
            return None
        rows, others = 1, [source.tensor for source in sources]
    mask = op.attn_mask
    if mask is not None:
        source = op.source(mask)
        mask = adapted(op, mask, query, query.place - rank) if source is None or query.fits(source) else None
        if mask is None:
            return None
    return query.at(op.call("fxstream::attention", query.tensor, *others, mask, rows, op.scale))


def _contract_maps(op: FlatOperator, terms: Terms, output: str) -> Proxy | None:
    """A product of maps that are not flat, whose stream axes are summed or stay."""
    axes = {"".join(letters[d] for d in tensor.dims) for tensor, letters in terms} - {""}
    space = set("".join(axes))
    is_summed = not space & set(output) and all(space <= set(letters) for _, letters in terms)
    return _product(op, terms, output) if len(axes) == 1 and (is_summed or space <= set(output)) else None


def _product(op: FlatOperator, terms: Terms, output: str) -> Proxy:
    (one, letters), (other, letters_other) = terms
    return op.call("fxstream::contract", f"{letters},{letters_other}->{output}", one, other)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "bmm", "mm"), _matrices),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
"""Per operator, the product that it is of positions."""
