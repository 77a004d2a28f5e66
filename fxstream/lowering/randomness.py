"""Random draws for the whole map, as draws of small tensors and maps of them.

NOTE [one mask per image]
1. What is drawn once per sample or channel is drawn in the dense part of the graph, by the call that torch
   makes: it is what the plain model draws from the same state of the generator.
2. A mask of elements is not drawn but computed: of one random key per call, of the entry (sample, channel) and of
   the position in the whole map. So it is the same for every tiling, in forward and in the recomputation, and it
   needs no memory. It is another mask than the plain model's, from the same distribution.
3. Draws keep their order (`functionalize.ordered_nodes`), so that a seed gives the same result each time.
"""

from __future__ import annotations

import math

import torch

from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS"]

SATURATION = 1.7580993408473766
"""The negated limit of SELU, by the value that torch uses."""


def _draws(lowering: Lowering) -> Lowering:
    """A lowering of a draw, which torch makes neither where everything is dropped nor where nothing is."""

    def lower(op: Operator) -> Proxy | tuple[Proxy, ...] | None:
        if op.train and 0 < op.p < 1:
            return lowering(op)
        return op.input * 0.0 if op.train and op.p == 1 else None

    return lower


def _dropout(op: Operator) -> Proxy:
    return _elements(op, 1 / (1 - op.p), 0.0, 0.0)


def _alpha_dropout(op: Operator) -> Proxy:
    return _elements(op, *_affine(op.p))


def _feature_dropout(op: Operator) -> Proxy:
    noise: Proxy = _features(op) / (1 - op.p)
    return op.input * noise


def _feature_alpha_dropout(op: Operator) -> Proxy:
    kept, (scale, summand, _) = _features(op), _affine(op.p)
    shift = (kept - 1) * (SATURATION * scale) + summand
    return op.input * (kept * scale) + shift


def _affine(p: float) -> tuple[float, float, float]:
    """What alpha dropout multiplies and adds to what it keeps, and the value of what it drops."""
    scale = 1 / math.sqrt((SATURATION**2 * p + 1) * (1 - p))
    return scale, SATURATION * scale * p, SATURATION * scale * (p - 1)


def _features(op: Operator) -> Proxy:
    """Rule 1: ones and zeros per sample and channel, as torch draws them."""
    shape = [op.input.size(0), op.input.size(1), *[1] * (op.input.ndim - 2)]
    return op.call("empty", shape, dtype=op.input.dtype, device=op.device).bernoulli(1 - op.p)


def _elements(op: Operator, scale: float, shift: float, dropped: float) -> Proxy:
    """Rule 2: a mask of elements."""
    dims, stream = range(op.input.ndim), op.input.dims
    sizes = [op.input.size(dim) for dim in dims]
    key = op.call("randint", -(2**63), 2**63 - 1, [1], dtype=torch.int64, device=op.device)
    keys = op.call("fxstream::entry_keys", key, [1 if dim in stream else sizes[dim] for dim in dims])
    factor, summand = keys.select(0, 0), keys.select(0, 1)
    shape = [sizes[dim] if dim in stream else 1 for dim in dims]
    places = [op.call("fxstream::positions", shape, dim, device=op.device) for dim in sorted(stream)]
    return op.call("fxstream::dropout", op.input, factor, summand, places, op.p, scale, shift, dropped)


LOWERINGS: dict[str, Lowering] = {
    "aten::dropout": _draws(_dropout),
    "aten::alpha_dropout": _draws(_alpha_dropout),
    "aten::feature_dropout": _draws(_feature_dropout),
    "aten::feature_alpha_dropout": _draws(_feature_alpha_dropout),
}
"""Per operator, what it is rewritten to."""
