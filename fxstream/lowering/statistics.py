"""Variances, standard deviations, norms and softmax over space; observers of quantisation."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import reduce

from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS", "softmax"]

ORDERS = (1, 2, math.inf)
"""Norms of which a tile's norm is a partial result."""


def _dims(op: Operator) -> list[int]:
    """The dims that the operator works along, in rising order."""
    rank, dim = op.self.ndim, op.arguments.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))


def _variance(op: Operator) -> Proxy | tuple[Proxy, ...] | None:
    """A variance or standard deviation over stream axes, also with the mean.

    None where the count is corrected by more than one.
    """
    correction, dims = op.arguments.get("correction", op.arguments.get("unbiased")), _dims(op)
    if correction not in (None, 0, 1):
        return None
    is_all = set(op.self.dims) <= set(dims)
    mean, spread = (_moments if is_all else _moments_of_rows)(op, dims, correction == 0)
    spread = op.narrow(_root(spread) if op.name.startswith("std") else spread)
    return (spread, op.narrow(mean)) if op.name.endswith("_mean") else spread


def _moments(op: Operator, dims: list[int], is_whole: bool) -> tuple[Proxy, Proxy]:
    """Mean and variance over all stream axes, that of a sample unless they are of the whole population."""
    mean, variance, sample = op.self.moments(dims)
    spread = variance if is_whole else sample
    for dim in dims if op.arguments.get("keepdim") else ():
        mean, spread = mean.unsqueeze(dim), spread.unsqueeze(dim)
    return mean, spread


def _moments_of_rows(op: Operator, dims: list[int], is_whole: bool) -> tuple[Proxy, Proxy]:
    """The same over some of the axes: of the differences from the mean."""
    tensor = op.self.to(op.wide)
    mean = tensor.mean(dims, True)
    difference = tensor - mean
    spread = (difference * difference).sum(dims, True)
    count = reduce(operator.mul, map(op.self.size, dims))
    spread = spread / (count if is_whole else count - 1)
    for dim in reversed(dims) if not op.arguments.get("keepdim") else ():
        mean, spread = mean.squeeze(dim), spread.squeeze(dim)
    return mean, spread


def _root(variance: Proxy) -> Proxy:
    """The square root, with gradient 0 where it is 0, as that of torch's standard deviation."""
    constant = variance.eq(0)
    return variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)


def _norm(op: Operator) -> Proxy | None:
    order, dims = 2 if op.p is None else op.p, _dims(op)
    if order not in ORDERS:
        return None
    keepdim, dtype = op.arguments.get("keepdim", False), op.arguments.get("dtype")
    return op.self.linalg_vector_norm(order, dims, keepdim, dtype=dtype)


def softmax(op: Operator, tensor: Proxy, dims: Sequence[int]) -> Proxy:
    """The operator, a softmax or its logarithm, of a tensor over some dims, in at least 32 bits."""
    if op.self.dtype != op.wide:
        tensor = tensor.to(op.wide)
    logarithm = tensor - tensor.logsumexp(list(dims), True)
    return op.narrow(logarithm if op.name == "log_softmax" else logarithm.exp())


def _softmax(op: Operator) -> Proxy:
    return softmax(op, op.self, [op.dim])


def _observed(op: Operator) -> Proxy | None:
    """Fake quantisation with an observer: extremes of the map, the operator on these, and a map of each pixel.

    The operator moves the range in its buffers towards the extremes of its input, and takes scale and zero point
    from that range. Of the extremes alone it makes the same, to the bit. None where each entry of the batch has a
    range of its own, as rows of weights have.
    """
    if op.per_row_fake_quant:
        return None
    values = op.self.detach()
    op.again(self=op.call("stack", [values.amin(), values.amax()]))
    scale, zero_point = op.scale.clone(), op.zero_point.clone()  # as they are now
    quantised = op.self.fake_quantize_per_tensor_affine(scale, zero_point, op.quant_min, op.quant_max)
    return op.call("where", op.fake_quant_on.ne(0), quantised, op.self)


LOWERINGS: dict[str, Lowering] = {
    **{f"aten::{name}": _variance for name in ("var", "std", "var_mean", "std_mean")},
    "aten::norm": _norm,
    "aten::softmax": _softmax,
    "aten::log_softmax": _softmax,
    "aten::fused_moving_avg_obs_fake_quant": _observed,
}
"""Per operator, what it is rewritten to."""
