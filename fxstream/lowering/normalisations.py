"""Normalisations over space: statistics, a little arithmetic on small tensors, and an affine map.

NOTE [the affine map]
1. Every normalisation becomes ``(x - c) * scale + shift``. Per channel that is torch's own batch norm with `c`
   as its running mean, one as its variance and `scale` and `shift` as its weights: one call forward and one
   backward. These operands are made of the moments at once (`fxstream::affine`).
2. `c` is the mean without its gradient. That of the mean goes through ``shift = bias - (mean - c) * scale``, whose
   value is the bias, and whose derivative by the mean is that of the whole.
3. Statistics of less than 32 bits are wide (`fxstream::moments`), and so is what is made of them: the result takes
   the type of the operator's at the end.
4. Running statistics are updated in the dense part of the graph, once per call.
5. Where all of it runs whole, the model's operator runs in its place (`whole`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxstream.graph.captured import CUMULATIVE
from fxstream.graph.nodes import bind
from fxstream.lowering.proxy import Lowering, Operator, Proxy
from fxstream.lowering.whole import WHOLE, Name, Whole

__all__ = ["LOWERINGS"]


def _batch_norm(op: Operator) -> Proxy:
    moments = op.input.stacked_moments([0, *range(2, op.input.ndim)])
    result = op.input.batch_norm(*_affine(op, moments), False, 0.0, 0.0, op.cudnn_enabled)
    _keep_whole(op, moments, result)
    if op.running_mean is not None:
        _update(op, moments, _share_of_batch(op) if op.momentum == CUMULATIVE else None)
    return result


def _keep_whole(op: Operator, moments: Proxy, result: Proxy) -> None:
    """Note what runs in the place of all that was written so far, where that runs whole."""
    arguments = {n: map_aggregate(a, _name) for n, a in bind(op.node).items()}
    running = op.arguments.get("running_mean")
    is_wide = running is None or running.dtype == torch.promote_types(op.input.dtype, torch.float32)
    inside = frozenset(node.name for node in op.written)
    assert isinstance(op.node.target, torch._ops.OpOverload)
    has_update = running is not None
    moments.node.meta[WHOLE] = Whole(
        op.node.target, arguments, moments.node.name, result.node.name, inside, has_update, is_wide
    )


def _name(leaf: Any) -> Any:
    return Name(leaf.name) if isinstance(leaf, fx.Node) else leaf


def _share_of_batch(op: Operator) -> Proxy:
    """The share of a batch in the average over all batches so far: one over their number."""
    (path,) = (path for path, node in op.draft.tensors.items() if node is op.running_mean.node)
    tracked = op.draft.tensors[path.removesuffix("running_mean") + "num_batches_tracked"]
    (count,) = tracked.users  # after this batch was added
    return Proxy(count, op).to(op.running_mean.dtype).reciprocal()


def _update(op: Operator, moments: Proxy, share: Proxy | None = None) -> None:
    """Rule 4: running statistics moved towards those of this batch."""
    momentum = 0.0 if share is not None else op.momentum
    op.call("fxstream::update_statistics_", op.running_mean, op.running_var, moments, momentum, share)


def _instance_norm(op: Operator) -> Proxy:
    if not op.use_input_stats:
        statistics = (op.running_mean, op.running_var, False, op.momentum, op.eps, op.cudnn_enabled)
        return op.input.batch_norm(op.weight, op.bias, *statistics)
    moments = op.input.stacked_moments(range(2, op.input.ndim))
    result = _per_sample(op, moments)
    _keep_whole(op, moments, result)
    if op.running_mean is not None:
        _update(op, moments.mean([1]))
    return result


def _group_norm(op: Operator) -> Proxy:
    batch, channels, rank = op.input.size(0), op.input.shape[1], op.input.ndim
    repeats = channels // op.num_groups
    grouped = op.input.reshape([batch, op.num_groups, repeats, *(op.input.size(dim) for dim in range(2, rank))])
    moments = grouped.stacked_moments(range(2, rank + 1))
    result = _per_sample(op, moments, repeats)
    _keep_whole(op, moments, result)
    return result


def _per_sample(op: Operator, moments: Proxy, repeats: int = 1) -> Proxy:
    """The affine map with statistics of each sample and of so many channels each."""
    return op.input.op.call("fxstream::normalise", op.input, *_affine(op, moments, repeats))


def _affine(op: Operator, moments: Proxy, repeats: int = 1) -> list[Proxy]:
    """The operands of the affine map."""
    operands = op.call("fxstream::affine", moments, op.weight, op.bias, op.eps, repeats)
    return [op.call(operator.getitem, operands, k) for k in range(4)]


def _spread(vector: Proxy, axes: int) -> Proxy:
    """A tensor with further dims of size 1 at its end."""
    for _ in range(axes):
        vector = vector.unsqueeze(-1)
    return vector


def _layer_norm(op: Operator) -> Proxy:
    axes = len(op.normalized_shape)
    moments = op.input.stacked_moments(range(op.input.ndim - axes, op.input.ndim))
    mean, scale = moments.select(0, 0), (moments.select(0, 1) + op.eps).rsqrt()
    mean, scale = _spread(mean, axes), _spread(scale, axes)
    result = _weighted(op, (op.input - mean) * scale)
    _keep_whole(op, moments, result)
    return result


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
