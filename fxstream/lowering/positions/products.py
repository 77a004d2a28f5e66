"""Products that sum over positions or leave them, as `fxstream::contract`; attention (`unflatten`, rules 4, 8)."""

from __future__ import annotations

from fxstream.lowering.positions.unflatten import FlatOperator, Handler, Result, Unflattened, adapted
from fxstream.lowering.proxy import Proxy

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
    """An explicit equation of two operands, without repeated letters; of one it is a permutation."""
    inputs, arrow, output = op.equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    is_repeated = any(len(set(term)) < len(term) for term in letters)
    if not arrow or "." in op.equation or is_repeated:
        return None
    if len(op.tensors) == 1 and sorted(inputs) == sorted(output) and op.source(op.tensors[0]) is None:
        return op.call("permute", op.tensors[0], [inputs.index(letter) for letter in output])
    if len(op.tensors) != 2:
        return None
    return _contract(op, list(zip(op.tensors, letters, strict=True)), output)


def _contract(op: FlatOperator, terms: Terms, output: str) -> Result:
    if all(op.source(tensor) is None for tensor, _ in terms) and (maps := _contract_maps(op, terms, output)):
        return maps
    sources = [(source, letters) for tensor, letters in terms if (source := op.positions(tensor)) is not None]
    if not sources:
        return None
    first, position = _positions(sources, output)
    is_alike = all(source.fits(first) for source, letters in sources if letters[source.place] == position)
    if not is_alike or (position not in output and not all(position in letters for _, letters in terms)):
        return None
    unused = [c for c in LETTERS if all(c not in letters for _, letters in terms)]
    axes, apart = "".join(unused[: len(first.extents)]), []
    for tensor, letters in terms:
        is_wide = position in letters
        place = letters.index(position) - len(letters) if is_wide else 0
        operand = adapted(op, tensor, first, place) if is_wide else op.whole(tensor)
        if operand is None:
            return None
        apart.append((operand, letters.replace(position, axes)))
    product = _product(op, apart, output.replace(position, axes))
    return first.at(product, output.index(position)) if position in output else product


def _contraction(op: FlatOperator) -> Result:
    """A product that sums positions that were taken apart before those that stay: they are whole (rule 8)."""
    inputs, output = op.equation.split("->")
    terms = list(zip((op.self, op.other), inputs.split(","), strict=True))
    flat = [letters[source.place] for tensor, letters in terms if (source := op.source(tensor)) is not None]
    maps = [(tensor, letters) for tensor, letters in terms if tensor.dims and op.source(tensor) is None]
    if len(flat) != 1 or flat[0] not in output:
        return None
    if not maps:
        return _contract(op, terms, output)
    first, letters_of_first = maps[0]
    axes = "".join(letters_of_first[d] for d in first.dims)
    if set(axes) & set(output) or not all(axes in letters for _, letters in terms):
        return None
    ends = [(letters.index(axes), letters.index(axes) + len(axes) - 1) for _, letters in terms]
    joined = [
        op.call("fxstream::whole", tensor, *of) if (tensor, letters) in maps else tensor.flatten(*of)
        for (tensor, letters), of in zip(terms, ends, strict=True)
    ]
    short = [letters.replace(axes, axes[0]) for _, letters in terms]
    return _product(op, list(zip(joined, short, strict=True)), output)


def _positions(sources: list[tuple[Unflattened, str]], output: str) -> tuple[Unflattened, str]:
    """The source whose positions stay apart, and their letter: the first that keeps them; the others are whole."""
    of_each = [(source, letters[source.place]) for source, letters in sources]
    return next(((source, letter) for source, letter in of_each if letter in output), of_each[0])


def _attention(op: FlatOperator) -> Result:
    """Attention, each position's to all keys, inside windows, or of a few queries to all positions."""
    query, rank = op.positions(op.query), op.query.ndim
    if op.dropout_p or op.is_causal or op.arguments.get("enable_gqa"):
        return None
    if query is None:
        return _at_each_position(op) or _pooled(op)
    rows, others = len(query.extents), [op.key, op.arguments["value"]]
    if query.place < rank - 2:
        sources = _keys_and_values(op)
        if not sources or not query.fits(sources[0]) or query.place != sources[0].place:
            return None
        rows, others = 1, [source.tensor for source in sources]
    else:
        others = [op.whole(tensor) for tensor in others]
    mask = op.attn_mask
    if mask is not None:
        source = op.source(mask)
        mask = adapted(op, mask, query, query.place - rank) if source is None or query.fits(source) else None
        if mask is None:
            return None
    return query.at(op.call("fxstream::attention", query.tensor, *others, mask, rows, op.scale))


def _at_each_position(op: FlatOperator) -> Proxy | None:
    """Attention among dims that are no stream axes, as over the frames of each pixel."""
    tensors = [op.query, op.key, op.arguments["value"]]
    is_alike = {tensor.dims for tensor in tensors} == {op.query.dims}
    is_batch = is_alike and -1 < max(op.query.dims, default=-1) < op.query.ndim - 2
    return op.call("fxstream::attention", *tensors, op.attn_mask, 1, op.scale) if is_batch else None


def _keys_and_values(op: FlatOperator) -> tuple[Unflattened, Unflattened] | None:
    """The sources of both, where they have the same positions."""
    key, value = op.positions(op.key), op.positions(op.arguments["value"])
    if key is None or value is None or not key.fits(value) or key.place != value.place:
        return None
    return key, value


def _pooled(op: FlatOperator) -> Result:
    """Attention of a few queries, whose weights are no more than the keys: sums over positions (rule 4)."""
    queries, channels = op.query.shape[-2:]
    key, value = _keys_and_values(op) or (None, None)
    if key is None or value is None or key.place != op.query.ndim - 2:
        return None
    if op.attn_mask is not None or op.query.dims or queries > channels:
        return None
    batch, axes = LETTERS[: key.place], LETTERS[key.place : key.place + len(key.extents)]
    query = op.query * (channels**-0.5 if op.scale is None else op.scale)
    scores = _product(op, [(query, f"{batch}xy"), (key.tensor, f"{batch}{axes}y")], f"{batch}x{axes}")
    if op.value.dtype != op.wide:
        scores = scores.to(op.wide)
    weights = (scores - scores.logsumexp([dim + 1 for dim in key.joined], True)).exp()
    return _product(op, [(op.narrow(weights), f"{batch}x{axes}"), (value.tensor, f"{batch}{axes}z")], f"{batch}xz")


def _contract_maps(op: FlatOperator, terms: Terms, output: str) -> Proxy | None:
    """A product of maps that are not flat, whose stream axes are summed or stay."""
    axes = {"".join(letters[d] for d in tensor.dims) for tensor, letters in terms} - {""}
    space = set("".join(axes))
    terms = [_with_axes(tensor, letters, space) for tensor, letters in terms]
    is_summed = not space & set(output) and all(space <= set(letters) for _, letters in terms)
    return _product(op, terms, output) if len(axes) == 1 and (is_summed or space <= set(output)) else None


def _with_axes(tensor: Proxy, letters: str, space: set[str]) -> tuple[Proxy, str]:
    """An operand that varies along some axes of a map, with a dim of one for each of the others."""
    missing = sorted(space - set(letters)) if space & set(letters) else []
    for _ in missing:
        tensor = tensor.unsqueeze(0)
    return tensor, "".join(missing) + letters


def _product(op: FlatOperator, terms: Terms, output: str) -> Proxy:
    (one, letters), (other, letters_other) = terms
    return op.call("fxstream::contract", f"{letters},{letters_other}->{output}", one, other)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "bmm", "mm"), _matrices),
    "einsum": _einsum,
    "contract": _contraction,
    "scaled_dot_product_attention": _attention,
}
"""Per operator, the product that it is of positions."""
