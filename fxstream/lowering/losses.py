"""Losses over space: the loss of every pixel, a sum of them, and a little arithmetic.

A mean over classes divides by the weights of the pixels that are not ignored, whatever the smoothing. Its sums
are made in 32 bits at least: those over an image exceed what 16 bits hold.
"""

from __future__ import annotations

import torch
from torch import fx

from fxstream.lowering.writer import Lowering, Writer
from fxstream.rules.channelwise import CLASS_LOSSES, PIXEL_LOSSES
from fxstream.rules.ops import overload

__all__ = ["LOWERINGS"]

aten = torch.ops.aten
MEAN, SUM = 1, 2


def _pixel_loss(writer: Writer) -> fx.Node:
    """A loss of every element: their mean or sum."""
    losses = writer.again(reduction=0)
    target = aten.mean.default if writer["reduction"] == MEAN else aten.sum.default
    return writer.call(target, losses)


def _class_loss(writer: Writer) -> fx.Node:
    """A loss of every pixel: their sum, over the weights of the pixels that count for a mean."""
    losses, target = writer.again(reduction=0), writer["target"]
    if writer["reduction"] == SUM:
        return writer.call(aten.sum.default, losses)
    if writer.meta(target).dtype.is_floating_point:
        return writer.call(aten.mean.default, losses)
    own = writer.result.dtype
    wide = torch.promote_types(own, torch.float32)
    weights = writer.call(overload("class_weights"), target, writer["weight"], writer["ignore_index"], dtype=wide)
    sums = [writer.call(aten.sum.default, each, dtype=wide) for each in (losses, weights)]
    mean = writer.call(aten.div.Tensor, *sums)
    return mean if wide == own else writer.call(aten.to.dtype, mean, own)


LOWERINGS: dict[str, Lowering] = {
    **{f"aten::{name}": _pixel_loss for name in PIXEL_LOSSES},
    **{f"aten::{name}": _class_loss for name in CLASS_LOSSES},
}
"""Per operator, what it is rewritten to where it does not keep its pixels."""
