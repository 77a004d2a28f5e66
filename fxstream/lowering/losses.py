"""Losses over space: the loss of every pixel, a sum of them, and a little arithmetic.

A mean over classes divides by the weights of the pixels that are not ignored, whatever the smoothing. Its sums
are made in 32 bits at least: those over an image exceed what 16 bits hold.
"""

from __future__ import annotations

from fxstream.lowering.proxy import Lowering, Operator, Proxy
from fxstream.rules.channelwise import CLASS_LOSSES, PIXEL_LOSSES

__all__ = ["LOWERINGS"]

MEAN, SUM = 1, 2


def _pixel_loss(op: Operator) -> Proxy:
    losses = op.again(reduction=0)
    return losses.mean() if op.reduction == MEAN else losses.sum()


def _class_loss(op: Operator) -> Proxy:
    losses = op.again(reduction=0)
    if op.reduction == SUM:
        return losses.sum()
    if op.target.dtype.is_floating_point:
        return losses.mean()
    weights = op.call("fxstream::class_weights", op.target, op.weight, op.ignore_index, dtype=op.wide)
    return op.narrow(losses.sum(dtype=op.wide) / weights.sum(dtype=op.wide))


LOWERINGS: dict[str, Lowering] = {
    **{f"aten::{name}": _pixel_loss for name in PIXEL_LOSSES},
    **{f"aten::{name}": _class_loss for name in CLASS_LOSSES},
}
"""Per operator, what it is rewritten to where it does not keep its pixels."""
