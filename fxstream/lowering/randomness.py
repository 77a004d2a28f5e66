"""Random draws for the whole map, as draws of small tensors and maps of them.

NOTE [one mask per image]
1. What is drawn once per sample or channel is drawn in the ordinary part of the graph, by the call that torch
   makes: it is what the plain model draws from the same state of the generator.
2. A mask of elements is not drawn but computed: of one random key per call, of the entry (sample, channel) and of
   the position in the whole map. So it is the same for every tiling, in forward and in the recomputation, and it
   needs no memory. It is another mask than the plain model's, from the same distribution.
3. Draws keep their order (`functional.ordered_nodes`), so that a seed gives the same result each time.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxstream.lowering.writer import Lowering, Writer
from fxstream.rules.ops import overload

__all__ = ["LOWERINGS"]

aten = torch.ops.aten

SATURATION = 1.7580993408473766
"""The negated limit of SELU, by the value that torch uses."""


def _dropout(writer: Writer) -> fx.Node | None:
    return _elements(writer, 1 / (1 - writer["p"]), 0.0, 0.0) if _draws(writer) else _nothing_left(writer)


def _alpha_dropout(writer: Writer) -> fx.Node | None:
    if not _draws(writer):
        return _nothing_left(writer)
    scale, kept, dropped = _affine(writer["p"])
    return _elements(writer, scale, kept, dropped)


def _feature_dropout(writer: Writer) -> fx.Node | None:
    if not _draws(writer):
        return _nothing_left(writer)
    noise = writer.call(aten.div.Scalar, _features(writer), 1 - writer["p"])
    return writer.call(aten.mul.Tensor, writer["input"], noise)


def _feature_alpha_dropout(writer: Writer) -> fx.Node | None:
    if not _draws(writer):
        return _nothing_left(writer)
    kept, (scale, _, _) = _features(writer), _affine(writer["p"])
    below = writer.call(aten.sub.Scalar, kept, 1)
    slope = SATURATION * scale
    shift = writer.call(aten.add.Scalar, writer.call(aten.mul.Scalar, below, slope), slope * writer["p"])
    scaled = writer.call(aten.mul.Tensor, writer["input"], writer.call(aten.mul.Scalar, kept, scale))
    return writer.call(aten.add.Tensor, scaled, shift)


def _draws(writer: Writer) -> bool:
    return bool(writer["train"]) and 0 < writer["p"] < 1


def _nothing_left(writer: Writer) -> fx.Node | None:
    """Zeros where everything is dropped; torch draws nothing for them. None where nothing is."""
    return writer.call(aten.mul.Scalar, writer["input"], 0.0) if writer["train"] and writer["p"] == 1 else None


def _affine(p: float) -> tuple[float, float, float]:
    """What alpha dropout multiplies and adds to what it keeps, and the value of what it drops."""
    scale = 1 / math.sqrt((SATURATION**2 * p + 1) * (1 - p))
    return scale, SATURATION * scale * p, SATURATION * scale * (p - 1)


def _features(writer: Writer) -> fx.Node:
    """Rule 1: ones and zeros per sample and channel, as torch draws them."""
    image = writer["input"]
    meta = writer.meta(image)
    shape = [*(writer.size(image, dim) for dim in range(2)), *[1] * (len(meta.shape) - 2)]
    empty = writer.call(aten.empty.memory_format, shape, dtype=meta.dtype, device=writer.device)
    return writer.call(aten.bernoulli.p, empty, 1 - writer["p"])


def _elements(writer: Writer, scale: float, shift: float, dropped: float) -> fx.Node:
    """Rule 2: a mask of elements."""
    image = writer["input"]
    dims = range(len(writer.meta(image).shape))
    sizes = {dim: writer.size(image, dim) for dim in dims}
    key = writer.call(aten.randint.low, -(2**63), 2**63 - 1, [1], dtype=torch.int64, device=writer.device)
    keys = writer.call(overload("entry_keys"), key, [1 if dim in writer.dims else sizes[dim] for dim in dims])
    factor, summand = (writer.call(aten.select.int, keys, 0, i) for i in range(2))
    shape = [sizes[dim] if dim in writer.dims else 1 for dim in dims]
    places = [writer.call(overload("positions"), shape, dim, device=writer.device) for dim in sorted(writer.dims)]
    arguments = (factor, summand, places, writer["p"], scale, shift, dropped)
    return writer.call(overload("dropout"), image, *arguments)


LOWERINGS: dict[str, Lowering] = {
    "aten::dropout": _dropout,
    "aten::alpha_dropout": _alpha_dropout,
    "aten::feature_dropout": _feature_dropout,
    "aten::feature_alpha_dropout": _feature_alpha_dropout,
}
"""Per operator, what it is rewritten to."""
