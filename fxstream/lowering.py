"""Feature-map-wide operators, rewritten as reductions over space and local operators.

A normalisation over space is a reduction (`fxstream::moments`), a little arithmetic on small tensors, and a map
that takes the result as small arguments. The rewritten graph computes what the original one does, at any size;
what of it is streamed is for the planner to decide.

NOTE [the affine map]
1. Every normalisation becomes ``(x - c) * scale + shift`` per channel, torch's own batch norm with `c` as its
   running mean, one as its variance and `scale` and `shift` as its weights: one call forward and one backward.
2. `c` is the mean without its gradient. That of the mean goes through ``shift = bias - (mean - c) * scale``,
   whose value is the bias, and whose derivative by the mean is that of the whole.
3. Running statistics are updated in the ordinary part of the graph, once per call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxstream import operators
from fxstream.capture import Captured
from fxstream.functional import UNSTREAMED
from fxstream.locality import Locality
from fxstream.rules import Kind
from fxstream.sizes import Shape

__all__ = ["is_lowerable", "lower"]

aten = torch.ops.aten
MOMENTS = operators.overload("moments")
KEPT = ("nn_module_stack", "stack_trace")


def is_lowerable(locality: Locality) -> bool:
    """Whether any barrier of the graph is made of reductions over space."""
    return any(_lowering(locality, name) is not None for name in locality.verdicts)


def lower(captured: Captured, locality: Locality) -> Captured:
    """The same model with every feature-map-wide operator that is made of reductions taken apart."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copies))
    for original in captured.graph.nodes:
        if original not in copies:
            continue
        node, lowering = copies[original], _lowering(locality, original.name)
        lowered = lowering(_Writer(graph, node, locality.metas)) if lowering is not None else None
        if lowered is not None:
            node.replace_all_uses_with(lowered)
            graph.erase_node(node)
    graph.lint()
    root = {n.target: getattr(captured.module, n.target) for n in graph.nodes if n.op == "get_attr"}
    return replace(captured, module=fx.GraphModule(root, graph))


def _lowering(locality: Locality, name: str) -> Lowering | None:
    verdict = locality.verdicts.get(name)
    if verdict is None or verdict.kind is not Kind.REDUCE or verdict.reduction is not None:
        return None
    return LOWERINGS.get(verdict.operator)


class _Writer:
    """Writes operators in front of the node that is taken apart; `given` are its arguments by schema name."""

    def __init__(self, graph: fx.Graph, node: fx.Node, metas: Mapping[str, Any]) -> None:
        self._graph, self._node, self._metas = graph, node, metas
        assert isinstance(node.target, torch._ops.OpOverload)
        arguments = node.target._schema.arguments
        names = [argument.name for argument in arguments]
        self.given: dict[str, Any] = {argument.name: argument.default_value for argument in arguments}
        self.given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def __getitem__(self, argument: str) -> Any:
        return self.given[argument]

    def meta(self, node: fx.Node) -> Shape:
        """Shape and type of an argument, at the size at which the graph is taken apart."""
        meta = self._metas[node.name]
        assert isinstance(meta, Shape)
        return meta

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """One more operator."""
        with self._graph.inserting_before(self._node):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {key: self._node.meta[key] for key in KEPT if key in self._node.meta}
        return node

    def size(self, tensor: fx.Node, dim: int) -> fx.Node:
        """An extent of a tensor, at any size."""
        return self.call(aten.sym_size.int, tensor, dim)

    def update(self, buffer: fx.Node, value: fx.Node, momentum: float) -> None:
        """Rule 3: a running statistic moved towards a value."""
        fresh = self.call(aten.mul.Scalar, self.call(aten.detach.default, value), momentum)
        kept = self.call(aten.mul.Scalar, buffer, 1 - momentum)
        effect = self.call(aten.copy_.default, buffer, self.call(aten.add.Tensor, kept, fresh))
        effect.meta[UNSTREAMED] = "changes a tensor in place"

    def affine(self, image: fx.Node, mean: fx.Node, scale: fx.Node, bias: fx.Node | None, cudnn: bool) -> fx.Node:
        """Rules 1 and 2: ``(image - mean) * scale + bias`` per channel; mean, scale and bias are vectors."""
        centre = self.call(aten.detach.default, mean)
        moved = self.call(aten.mul.Tensor, self.call(aten.sub.Tensor, mean, centre), scale)
        shift = self.call(aten.neg.default, moved) if bias is None else self.call(aten.sub.Tensor, bias, moved)
        one = self.call(aten.ones_like.default, centre)
        return self.call(aten.batch_norm.default, image, scale, shift, centre, one, False, 0.0, 0.0, cudnn)

    def scale(self, variance: fx.Node, eps: float, weight: fx.Node | None) -> fx.Node:
        """``weight / sqrt(variance + eps)``."""
        found = self.call(aten.rsqrt.default, self.call(aten.add.Scalar, variance, eps))
        return found if weight is None else self.call(aten.mul.Tensor, found, weight)

    def statistics(self, image: fx.Node, dims: Sequence[int]) -> list[fx.Node]:
        """Mean, variance and sample variance."""
        found = self.call(MOMENTS, image, list(dims))
        return [self.call(aten.select.int, found, 0, i) for i in range(3)]


def _batch_norm(writer: _Writer) -> fx.Node:
    image = writer["input"]
    rank = len(writer.meta(image).shape)
    mean, variance, sample = writer.statistics(image, [0, *range(2, rank)])
    if writer["running_mean"] is not None:
        writer.update(writer["running_mean"], mean, writer["momentum"])
        writer.update(writer["running_var"], sample, writer["momentum"])
    scale = writer.scale(variance, writer["eps"], writer["weight"])
    return writer.affine(image, mean, scale, writer["bias"], writer["cudnn_enabled"])


def _instance_norm(writer: _Writer) -> fx.Node:
    image = writer["input"]
    rank = len(writer.meta(image).shape)
    if not writer["use_input_stats"]:
        arguments = [writer[name] for name in ("weight", "bias", "running_mean", "running_var")]
        numbers = [writer[name] for name in ("momentum", "eps", "cudnn_enabled")]
        return writer.call(aten.batch_norm.default, image, *arguments, False, *numbers)
    mean, variance, sample = writer.statistics(image, range(2, rank))
    if writer["running_mean"] is not None:
        for buffer, value in (("running_mean", mean), ("running_var", sample)):
            writer.update(writer[buffer], writer.call(aten.mean.dim, value, [0]), writer["momentum"])
    return _per_sample(writer, image, mean, variance, writer["eps"])


def _group_norm(writer: _Writer) -> fx.Node:
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


def _per_sample(writer: _Writer, image: fx.Node, mean: fx.Node, variance: fx.Node, eps: float) -> fx.Node:
    """The affine map with statistics [N, C] per sample, as that of one image of N * C channels."""
    shape = writer.meta(image).shape
    batch = writer.size(image, 0)
    extents = [writer.size(image, d) for d in range(2, len(shape))]
    channels = writer.call(operator.mul, batch, shape[1])
    scale = writer.scale(variance, eps, writer["weight"])
    mean, scale = (writer.call(aten.reshape.default, found, [channels]) for found in (mean, scale))
    bias = writer["bias"]
    if bias is not None:
        spread = writer.call(aten.expand.default, writer.call(aten.unsqueeze.default, bias, 0), [batch, shape[1]])
        bias = writer.call(aten.reshape.default, spread, [channels])
    joined = writer.call(aten.reshape.default, image, [1, channels, *extents])
    result = writer.affine(joined, mean, scale, bias, writer["cudnn_enabled"])
    return writer.call(aten.reshape.default, result, [batch, shape[1], *extents])


def _layer_norm(writer: _Writer) -> fx.Node:
    image, dims = writer["input"], len(writer["normalized_shape"])
    rank = len(writer.meta(image).shape)
    mean, variance, _ = writer.statistics(image, range(rank - dims, rank))
    scale = writer.scale(variance, writer["eps"], None)
    for _ in range(dims):
        mean, scale = (writer.call(aten.unsqueeze.default, found, -1) for found in (mean, scale))
    result = writer.call(aten.mul.Tensor, writer.call(aten.sub.Tensor, image, mean), scale)
    return _weighted(writer, result)


def _weighted(writer: _Writer, result: fx.Node) -> fx.Node:
    if writer["weight"] is not None:
        result = writer.call(aten.mul.Tensor, result, writer["weight"])
    if writer.given.get("bias") is not None:
        result = writer.call(aten.add.Tensor, result, writer["bias"])
    return result


def _rms_norm(writer: _Writer) -> fx.Node:
    image, dims = writer["input"], len(writer["normalized_shape"])
    meta = writer.meta(image)
    rank = len(meta.shape)
    squares = writer.call(aten.mul.Tensor, image, image)
    mean = writer.call(aten.mean.dim, squares, list(range(rank - dims, rank)), True)
    eps = writer["eps"] if writer["eps"] is not None else torch.finfo(meta.dtype).eps
    return _weighted(writer, writer.call(aten.mul.Tensor, image, writer.scale(mean, eps, None)))


def _adaptive_mean(writer: _Writer) -> fx.Node | None:
    """A pooling to one pixel is a mean; others stay as they are."""
    image, size = writer["self"], writer["output_size"]
    rank = len(writer.meta(image).shape)
    if set(size) != {1}:
        return None
    return writer.call(aten.mean.dim, image, list(range(rank - len(size), rank)), True)


Lowering = Callable[[_Writer], fx.Node | None]
LOWERINGS: dict[str, Lowering] = {
    "aten::batch_norm": _batch_norm,
    "aten::instance_norm": _instance_norm,
    "aten::group_norm": _group_norm,
    "aten::layer_norm": _layer_norm,
    "aten::rms_norm": _rms_norm,
    "aten::adaptive_avg_pool1d": _adaptive_mean,
    "aten::adaptive_avg_pool2d": _adaptive_mean,
    "aten::adaptive_avg_pool3d": _adaptive_mean,
}
"""Per operator, what it is rewritten to."""
