"""Variances, standard deviations and norms over space."""

from __future__ import annotations

import math

import torch
from torch import fx

from fxstream.lowering.writer import Lowering, Writer

__all__ = ["LOWERINGS"]

aten = torch.ops.aten


def _variance_and_mean(writer: Writer) -> tuple[fx.Node, fx.Node] | None:
    """Both over all stream axes; None where some axis is kept, or the count is corrected by more than one."""
    image, dims = writer["self"], _dims(writer)
    correction = writer.given.get("correction", writer.given.get("unbiased"))
    if correction not in (None, 0, 1) or not set(writer.dims) <= set(dims):
        return None
    mean, variance, sample = writer.statistics(image, dims)
    found = variance if correction == 0 else sample
    if writer.given.get("keepdim"):
        for dim in dims:
            mean, found = (writer.call(aten.unsqueeze.default, tensor, dim) for tensor in (mean, found))
    return found, mean


def _dims(writer: Writer) -> list[int]:
    """The dims that the operator works along, in rising order."""
    rank = len(writer.meta(writer["self"]).shape)
    given = writer.given.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return sorted(dim % rank for dim in ([given] if isinstance(given, int) else given))


def _var(writer: Writer) -> fx.Node | None:
    found = _variance_and_mean(writer)
    return None if found is None else writer.like(found[0], writer["self"])


def _std(writer: Writer) -> fx.Node | None:
    found = _variance_and_mean(writer)
    return None if found is None else writer.like(_root(writer, found[0]), writer["self"])


def _var_mean(writer: Writer) -> tuple[fx.Node, ...] | None:
    found = _variance_and_mean(writer)
    return None if found is None else tuple(writer.like(tensor, writer["self"]) for tensor in found)


def _std_mean(writer: Writer) -> tuple[fx.Node, ...] | None:
    found = _variance_and_mean(writer)
    if found is None:
        return None
    return tuple(writer.like(tensor, writer["self"]) for tensor in (_root(writer, found[0]), found[1]))


def _root(writer: Writer, variance: fx.Node) -> fx.Node:
    """The square root, with gradient 0 where it is 0, as that of torch's standard deviation."""
    constant = writer.call(aten.eq.Scalar, variance, 0)
    root = writer.call(aten.sqrt.default, writer.call(aten.masked_fill.Scalar, variance, constant, 1))
    return writer.call(aten.masked_fill.Scalar, root, constant, 0)


ORDERS = (1, 2, math.inf)
"""Norms of which a tile's norm is a partial result."""


def _norm(writer: Writer) -> fx.Node | None:
    order = 2 if writer["p"] is None else writer["p"]
    if order not in ORDERS or not set(writer.dims) <= set(_dims(writer)):
        return None
    arguments = (_dims(writer), writer.given.get("keepdim", False))
    return writer.call(
        aten.linalg_vector_norm.default, writer["self"], order, *arguments, dtype=writer.given.get("dtype")
    )


LOWERINGS: dict[str, Lowering] = {
    "aten::var": _var,
    "aten::std": _std,
    "aten::var_mean": _var_mean,
    "aten::std_mean": _std_mean,
    "aten::norm": _norm,
}
"""Per operator, what it is rewritten to."""
