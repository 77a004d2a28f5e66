"""Normalisations over space: statistics, a little arithmetic on small tensors, and an affine map.

NOTE [the affine map]
1. Every normalisation becomes ``(x - c) * scale + shift``. Per channel that is torch's own batch norm with `c`
   as its running mean, one as its variance and `scale` and `shift` as its weights: one call forward and one
   backward.
2. `c` is the mean without its gradient. That of the mean goes through ``shift = bias - (mean - c) * scale``, whose
   value is the bias, and whose derivative by the mean is that of the whole.
3. Statistics of less than 32 bits are wide (`fxstream::moments`), and so is what is made of them: the result takes
   the type of the operator's at the end.
4. Running statistics are updated in the ordinary part of the graph, once per call.
"""

from __future__ import annotations

import torch
from torch import fx

from fxstream.graph.effects import UNSTREAMED
from fxstream.graph.export import CUMULATIVE
from fxstream.lowering.writer import Lowering, Writer

__all__ = ["LOWERINGS"]

aten = torch.ops.aten


def _batch_norm(writer: Writer) -> fx.Node:
    image = writer["input"]
    rank = len(writer.meta(image).shape)
    mean, variance, sample = writer.statistics(image, [0, *range(2, rank)])
    if writer["running_mean"] is not None:
        momentum = _momentum(writer)
        _update(writer, writer["running_mean"], mean, momentum)
        _update(writer, writer["running_var"], sample, momentum)
    scale = _scale(writer, variance, writer["eps"], writer["weight"])
    return _affine(writer, image, mean, scale, writer["bias"], writer["cudnn_enabled"])


def _instance_norm(writer: Writer) -> fx.Node:
    image = writer["input"]
    rank = len(writer.meta(image).shape)
    if not writer["use_input_stats"]:
        arguments = [writer[name] for name in ("weight", "bias", "running_mean", "running_var")]
        numbers = [writer[name] for name in ("momentum", "eps", "cudnn_enabled")]
        return writer.call(aten.batch_norm.default, image, *arguments, False, *numbers)
    mean, variance, sample = writer.statistics(image, range(2, rank))
    if writer["running_mean"] is not None:
        for buffer, value in (("running_mean", mean), ("running_var", sample)):
            _update(writer, writer[buffer], writer.call(aten.mean.dim, value, [0]), writer["momentum"])
    return _per_sample(writer, image, mean, variance, writer["eps"])


def _group_norm(writer: Writer) -> fx.Node:
    image, groups = writer["input"], writer["num_groups"]
    shape = writer.meta(image).shape
    sizes = [writer.size(image, 0), groups, shape[1] // groups]
    extents = [writer.size(image, d) for d in range(2, len(shape))]
    grouped = writer.call(aten.reshape.default, image, [*sizes, *extents])
    mean, variance = (
        writer.call(
            aten.reshape.default,
            writer.call(aten.expand.default, writer.call(aten.unsqueeze.default, found, 2), sizes),
            [sizes[0], shape[1]],
        )
        for found in writer.statistics(grouped, range(2, len(shape) + 1))[:2]
    )
    return _per_sample(writer, image, mean, variance, writer["eps"])


def _per_sample(writer: Writer, image: fx.Node, mean: fx.Node, variance: fx.Node, eps: float) -> fx.Node:
    """The affine map with statistics [N, C] of every sample: rule 2 with ordinary arithmetic."""
    axes = len(writer.meta(image).shape) - 2
    mean, scale = (_before_space(writer, found, axes) for found in (mean, _scale(writer, variance, eps, None)))
    if writer["weight"] is not None:
        scale = writer.call(aten.mul.Tensor, scale, _before_space(writer, writer["weight"], axes))
    centre = writer.call(aten.detach.default, mean)
    shift = writer.call(aten.mul.Tensor, writer.call(aten.sub.Tensor, centre, mean), scale)
    if writer["bias"] is not None:
        shift = writer.call(aten.add.Tensor, shift, _before_space(writer, writer["bias"], axes))
    centred = writer.call(aten.sub.Tensor, image, centre)
    return writer.narrowed(writer.call(aten.addcmul.default, shift, centred, scale))


def _before_space(writer: Writer, vector: fx.Node, axes: int) -> fx.Node:
    for _ in range(axes):
        vector = writer.call(aten.unsqueeze.default, vector, -1)
    return vector


def _layer_norm(writer: Writer) -> fx.Node:
    image, dims = writer["input"], len(writer["normalized_shape"])
    rank = len(writer.meta(image).shape)
    mean, variance, _ = writer.statistics(image, range(rank - dims, rank))
    scale = _scale(writer, variance, writer["eps"], None)
    mean, scale = (_before_space(writer, found, dims) for found in (mean, scale))
    result = writer.call(aten.mul.Tensor, writer.call(aten.sub.Tensor, image, mean), scale)
    return _weighted(writer, result)


def _weighted(writer: Writer, result: fx.Node) -> fx.Node:
    if writer["weight"] is not None:
        result = writer.call(aten.mul.Tensor, result, writer["weight"])
    if writer.given.get("bias") is not None:
        result = writer.call(aten.add.Tensor, result, writer["bias"])
    return writer.narrowed(result)


def _rms_norm(writer: Writer) -> fx.Node:
    image, dims = writer["input"], len(writer["normalized_shape"])
    meta = writer.meta(image)
    wide, rank = torch.promote_types(meta.dtype, torch.float32), len(meta.shape)
    image = image if meta.dtype == wide else writer.call(aten.to.dtype, image, wide)
    squares = writer.call(aten.mul.Tensor, image, image)
    mean = writer.call(aten.mean.dim, squares, list(range(rank - dims, rank)), True)
    eps = writer["eps"] if writer["eps"] is not None else torch.finfo(wide).eps
    return _weighted(writer, writer.call(aten.mul.Tensor, image, _scale(writer, mean, eps, None)))


def _momentum(writer: Writer) -> fx.Node | float:
    """The share of this batch in the running statistics; one over their number in an average over all batches."""
    momentum: float = writer["momentum"]
    if momentum != CUMULATIVE:
        return momentum
    buffer: fx.Node = writer["running_mean"]
    tracked = buffer.name.replace("running_mean", "num_batches_tracked")
    (count,) = (n for p in buffer.graph.nodes if p.name == tracked for n in p.users)  # after this batch was added
    wide = writer.call(aten.to.dtype, count, writer.meta(buffer).dtype)
    return writer.call(aten.reciprocal.default, wide)


def _update(writer: Writer, buffer: fx.Node, value: fx.Node, momentum: fx.Node | float) -> None:
    """Rule 4: a running statistic moved towards a value."""
    fresh = writer.call(aten.mul.Tensor, writer.call(aten.detach.default, value), momentum)
    rest = writer.call(aten.rsub.Scalar, momentum, 1) if isinstance(momentum, fx.Node) else 1 - momentum
    kept = writer.call(aten.mul.Tensor, buffer, rest)
    effect = writer.call(aten.copy_.default, buffer, writer.call(aten.add.Tensor, kept, fresh))
    effect.meta[UNSTREAMED] = "changes a tensor in place"


def _affine(
    writer: Writer, image: fx.Node, mean: fx.Node, scale: fx.Node, bias: fx.Node | None, cudnn: bool
) -> fx.Node:
    """Rules 1 and 2: ``(image - mean) * scale + bias`` per channel; mean, scale and bias are vectors."""
    centre = writer.call(aten.detach.default, mean)
    moved = writer.call(aten.mul.Tensor, writer.call(aten.sub.Tensor, mean, centre), scale)
    shift = writer.call(aten.neg.default, moved) if bias is None else writer.call(aten.sub.Tensor, bias, moved)
    one = writer.call(aten.ones_like.default, centre)
    return writer.call(aten.batch_norm.default, image, scale, shift, centre, one, False, 0.0, 0.0, cudnn)


def _scale(writer: Writer, variance: fx.Node, eps: float, weight: fx.Node | None) -> fx.Node:
    """``weight / sqrt(variance + eps)``."""
    found = writer.call(aten.rsqrt.default, writer.call(aten.add.Scalar, variance, eps))
    return found if weight is None else writer.call(aten.mul.Tensor, found, weight)


LOWERINGS: dict[str, Lowering] = {
    "aten::batch_norm": _batch_norm,
    "aten::instance_norm": _instance_norm,
    "aten::group_norm": _group_norm,
    "aten::layer_norm": _layer_norm,
    "aten::rms_norm": _rms_norm,
}
"""Per operator, what it is rewritten to."""
