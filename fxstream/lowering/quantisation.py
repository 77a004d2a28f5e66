"""Fake quantisation with an observer: extremes of the map, the operator on these alone, and a map of each pixel.

The operator moves the range in its buffers towards the extremes of its input, and takes scale and zero point from
that range. Of the extremes alone it makes the same, to the bit: it looks at no other value of its input.
"""

from __future__ import annotations

from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS"]


def _observed(op: Operator) -> Proxy | None:
    """None where each entry of the batch has a range of its own, as rows of weights have."""
    if op.per_row_fake_quant:
        return None
    values = op.self.detach()
    op.again(self=op.call("stack", [values.amin(), values.amax()]))
    scale, zero_point = op.scale.clone(), op.zero_point.clone()  # as they are now
    quantised = op.self.fake_quantize_per_tensor_affine(scale, zero_point, op.quant_min, op.quant_max)
    return op.call("where", op.fake_quant_on.ne(0), quantised, op.self)


LOWERINGS: dict[str, Lowering] = {"aten::fused_moving_avg_obs_fake_quant": _observed}
"""Per operator, what it is rewritten to."""
