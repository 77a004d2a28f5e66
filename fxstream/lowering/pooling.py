"""Poolings of the whole map."""

from __future__ import annotations

import torch
from torch import fx

from fxstream.lowering.writer import Lowering, Writer

__all__ = ["LOWERINGS"]

aten = torch.ops.aten


def _adaptive_mean(writer: Writer) -> fx.Node | None:
    """A pooling to one pixel is a mean; others stay as they are."""
    image, size = writer["self"], writer["output_size"]
    rank = len(writer.meta(image).shape)
    if set(size) != {1}:
        return None
    return writer.call(aten.mean.dim, image, list(range(rank - len(size), rank)), True)


LOWERINGS: dict[str, Lowering] = {f"aten::adaptive_avg_pool{n}d": _adaptive_mean for n in (1, 2, 3)}
"""Per operator, what it is rewritten to."""
