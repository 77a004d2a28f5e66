"""A frozen BatchNorm after a convolution as part of that convolution: a pass from segment to segment.

NOTE [conv-BN fusion]
1. With fixed statistics BatchNorm is one affine map per channel: with ``s = weight / sqrt(var + eps)`` it gives
   ``(y - mean) * s + bias``. Of a convolution's result that is another convolution, with its weight times `s`. It
   costs no pass over a map, no map is saved for its backward, and the result is the same to rounding.
2. The new weights are computed once per call, before the segment, by ordinary operators (`folded_weights`):
   autograd sends their gradients, which the tiles sum up, on to the tensors that they are made of.
3. Only within a segment, where nothing else reads the convolution's result, and for weights of 32 bits or more:
   narrower ones would be rounded once more. What is not streamed runs as the model has it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from fxstream.graph.nodes import bind
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.rules import Value
from fxstream.rules.windowed import CONVOLUTIONS
from fxstream.tiling.segment import Fusion, Segment

__all__ = ["folded_weights", "fuse_batch_norms"]

aten = torch.ops.aten
CONVOLUTION = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def fuse_batch_norms(segment: Segment) -> Segment:
    """The segment, which has a graph of its own, with its frozen BatchNorms in the convolutions before them.

    The convolution takes the BatchNorm's name, so that all that reads it stays as it is.
    """
    graph, fusions = segment.graph.graph, []
    nodes = dict(segment.graph.nodes)
    for name in segment.nodes:
        convolution = _convolution_before(segment, name)
        if convolution is None:
            continue
        fusion = _fusion(segment.graph, name, convolution)
        if fusion is not None:
            fusions.append(fusion)
            _fuse(graph, nodes, fusion, convolution)
    if not fusions:
        return segment
    graph.lint()
    read = {one for name, node in nodes.items() if node.node.op != "placeholder" for one in node.inputs}
    left = tuple(name for name in segment.nodes if name in nodes)
    whole = [name for name in segment.whole if name in read]
    whole += [name for fusion in fusions for name in (fusion.weight, fusion.bias)]
    for name in segment.whole:
        if name not in read and name not in dict(segment.spatial):
            graph.erase_node(nodes.pop(name).node)
    typed = replace(
        segment.graph, nodes={node.name: nodes[node.name] for node in graph.nodes if node.op != "output"}
    )
    return replace(segment, graph=typed, nodes=left, whole=tuple(whole), fusions=tuple(fusions))


def _convolution_before(segment: Segment, name: str) -> str | None:
    """The convolution that a frozen BatchNorm of the segment may be fused into."""
    node = segment.graph[name]
    if node.node.target is not aten.batch_norm.default or not node.is_local:
        return None
    producer = segment.graph[node.inputs[0]]
    is_convolution = producer.is_local and producer.node.target in CONVOLUTIONS.values()
    return producer.name if is_convolution and len(producer.node.users) == 1 else None


def _fusion(graph: TypedGraph, name: str, convolution: str) -> Fusion | None:
    """The fusion (rule 3); None where the weights are computed, or narrow."""
    args, norm = bind(graph[convolution].node), bind(graph[name].node)
    tensors = [*(args[argument] for argument in CONVOLUTION), *(norm[argument] for argument in BATCH_NORM)]
    names = tuple(tensor.name if isinstance(tensor, fx.Node) else None for tensor in tensors)
    inputs = [graph[one] for one in names if one is not None]
    types = {value.dtype for one in inputs for value in one.values}
    if (
        not all(one.is_parameter for one in inputs)
        or len(types) != 1
        or not types <= {torch.float32, torch.float64}
    ):
        return None
    weight, dtype = graph.value(args["weight"].name), graph.value(convolution).dtype
    return Fusion(name, convolution, names, norm["eps"], dtype, weight.elements * dtype.itemsize)


def _fuse(graph: fx.Graph, nodes: dict[str, TypedNode], fusion: Fusion, convolution: str) -> None:
    """Put the convolution with the new weights in the place of the BatchNorm, in the graph and in `nodes`."""
    norm, old = nodes[fusion.node], nodes[convolution]
    weight = nodes[bind(old.node)["weight"].name]
    first = next(iter(graph.nodes))
    placeholders = []
    for name, shape in ((fusion.weight, weight.values[0].shape), (fusion.bias, weight.values[0].shape[:1])):
        with graph.inserting_before(first):
            placeholder = graph.placeholder(name)
        placeholder.name = name
        placeholders.append(placeholder)
        value = Value(name, shape, fusion.dtype)
        nodes[name] = TypedNode(placeholder, -1, (value,), is_parameter=True)
    with graph.inserting_before(norm.node):
        arguments = (old.node.args[0], *placeholders, *old.node.args[3:])
        new = graph.call_function(old.node.target, arguments, dict(old.node.kwargs))  # type: ignore[arg-type]
    new.meta = dict(norm.node.meta)
    norm.node.replace_all_uses_with(new)
    graph.erase_node(norm.node)
    graph.erase_node(old.node)
    new.name = fusion.node
    assert old.verdict is not None
    assert norm.verdict is not None
    verdict = replace(norm.verdict, operator=old.verdict.operator, answer=old.verdict.answer)
    nodes[fusion.node] = replace(norm, node=new, verdict=verdict, macs=old.macs, saves=old.saves)
    del nodes[convolution]


def folded_weights(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [out, ...] and bias [out] of a convolution and a BatchNorm (`scale`, `shift`, ...) in one.

    `dtype` is that of the convolution's result, in which it computes; under autocast its weight has another.

    >>> one = torch.ones(1)
    >>> folded_weights(torch.ones(1, 1, 1), None, 3 * one, one, 2 * one, one, 0.0, torch.float32)
    (tensor([[[3.]]]), tensor([-5.]))
    """
    factor = (variance + eps).rsqrt()
    factor = factor if scale is None else factor * scale
    moved = (-mean if bias is None else bias - mean) * factor
    both = weight * factor.view(-1, *[1] * (weight.ndim - 1)), moved if shift is None else moved + shift
    return both[0].to(dtype), both[1].to(dtype)
