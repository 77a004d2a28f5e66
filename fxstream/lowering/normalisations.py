"""Normalisations over space: statistics, a little arithmetic on small tensors, and an affine map.

NOTE [the affine map]
1. Every normalisation becomes ``(x - c) * scale + shift``. Per channel that is torch's own batch norm with `c`
   as its running mean, one as its variance and `scale` and `shift` as its weights: one call forward and one
   backward.
2. `c` is the mean without its gradient. That of the mean goes through ``shift = bias - (mean - c) * scale``, whose
   value is the bias, and whose derivative by the mean is that of the whole.
3. Statistics of less than 32 bits are wide (`fxstream::moments`), and so is what is made of them: the result takes
   the type of the operator's at the end.
4. Running statistics are updated in the dense part of the graph, once per call.
"""

from __future__ import annotations

import torch

from fxstream.graph.captured import CUMULATIVE
from fxstream.lowering.proxy import Lowering, Operator, Proxy

__all__ = ["LOWERINGS"]


def _batch_norm(op: Operator) -> Proxy:
    mean, variance, sample = op.input.moments([0, *range(2, op.input.ndim)])
    if op.running_mean is not None:
        share = _share_of_batch(op) if op.momentum == CUMULATIVE else op.momentum
        _update(op.running_mean, mean, share)
        _update(op.running_var, sample, share)
    scale = (variance + op.eps).rsqrt()
    if op.weight is not None:
        scale = scale * op.weight
    centre = mean.detach()
    moved = (mean - centre) * scale
    shift = -moved if op.bias is None else op.bias - moved
    ones = centre.ones_like()
    return op.input.batch_norm(scale, shift, centre, ones, False, 0.0, 0.0, op.cudnn_enabled)


def _share_of_batch(op: Operator) -> Proxy:
    """The share of a batch in the average over all batches so far: one over their number."""
    (path,) = (path for path, node in op.draft.tensors.items() if node is op.running_mean.node)
    tracked = op.draft.tensors[path.removesuffix("running_mean") + "num_batches_tracked"]
    (count,) = tracked.users  # after this batch was added
    return Proxy(count, op).to(op.running_mean.dtype).reciprocal()


def _update(running: Proxy, statistic: Proxy, share: Proxy | float) -> None:
    """Rule 4: a running statistic moved towards that of this batch."""
    of_batch = statistic.detach() * share
    running.copy_(running * (1 - share) + of_batch)


def _instance_norm(op: Operator) -> Proxy:
    if not op.use_input_stats:
        statistics = (op.running_mean, op.running_var, False, op.momentum, op.eps, op.cudnn_enabled)
        return op.input.batch_norm(op.weight, op.bias, *statistics)
    mean, variance, sample = op.input.moments(range(2, op.input.ndim))
    if op.running_mean is not None:
        _update(op.running_mean, mean.mean([0]), op.momentum)
        _update(op.running_var, sample.mean([0]), op.momentum)
    return _per_sample(op, mean, variance)


def _group_norm(op: Operator) -> Proxy:
    batch, channels, rank = op.input.size(0), op.input.shape[1], op.input.ndim
    groups = [batch, op.num_groups, channels // op.num_groups]
    grouped = op.input.reshape([*groups, *(op.input.size(dim) for dim in range(2, rank))])
    mean, variance, _ = grouped.moments(range(2, rank + 1))
    mean, variance = (s.unsqueeze(2).expand(groups).reshape([batch, channels]) for s in (mean, variance))
    return _per_sample(op, mean, variance)


def _per_sample(op: Operator, mean: Proxy, variance: Proxy) -> Proxy:
    """The affine map with statistics [N, C]: rule 2 with ordinary arithmetic."""
    axes = op.input.ndim - 2
    scale = (variance + op.eps).rsqrt()
    mean, scale = _spread(mean, axes), _spread(scale, axes)
    if op.weight is not None:
        scale = scale * _spread(op.weight, axes)
    centre = mean.detach()
    shift = (centre - mean) * scale
    if op.bias is not None:
        shift = shift + _spread(op.bias, axes)
    return op.narrow(shift.addcmul(op.input - centre, scale))


def _spread(vector: Proxy, axes: int) -> Proxy:
    """A tensor with further dims of size 1 at its end."""
    for _ in range(axes):
        vector = vector.unsqueeze(-1)
    return vector


def _layer_norm(op: Operator) -> Proxy:
    axes = len(op.normalized_shape)
    mean, variance, _ = op.input.moments(range(op.input.ndim - axes, op.input.ndim))
    scale = (variance + op.eps).rsqrt()
    mean, scale = _spread(mean, axes), _spread(scale, axes)
    return _weighted(op, (op.input - mean) * scale)


def _rms_norm(op: Operator) -> Proxy:
    wide = torch.promote_types(op.input.dtype, torch.float32)
    image, eps = op.input.to(wide), torch.finfo(wide).eps if op.eps is None else op.eps
    dims = list(range(op.input.ndim - len(op.normalized_shape), op.input.ndim))
    scale = ((image * image).mean(dims, True) + eps).rsqrt()
    return _weighted(op, image * scale)


def _weighted(op: Operator, normal: Proxy) -> Proxy:
    weight, bias = op.weight, op.arguments.get("bias")
    weighted = normal if weight is None else normal * weight
    return op.narrow(weighted if bias is None else weighted + bias)


LOWERINGS: dict[str, Lowering] = {
    "aten::batch_norm": _batch_norm,
    "aten::instance_norm": _instance_norm,
    "aten::group_norm": _group_norm,
    "aten::layer_norm": _layer_norm,
    "aten::rms_norm": _rms_norm,
}
"""Per operator, what it is rewritten to."""
