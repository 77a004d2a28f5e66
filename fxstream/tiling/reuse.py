"""Passes from segment to segment: less memory and less work, from what autograd saves of each operator.

NOTE [what is saved]
1. An operator that has an in-place variant, whose backward does not need its input, takes over the memory of that
   input where nothing else reads it and the operator that made it does not save it. So it was in the model, before
   the graph was made functional.
2. A tile is recomputed for its backward only. A convolution whose result no backward needs (the last of
   a segment, or one that only additions follow) is then not computed: its place is taken by a function with the
   same backward and a result of zeros without memory.
3. A convolution of a small volume is done in halves where torch has a slow kernel for it (`machine.kernels`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch

from fxstream.graph.autograd_saves import may_reuse
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.machine.operators import untraced
from fxstream.rules.windowed import CONVOLUTIONS, per_axis
from fxstream.tiling.segment import Segment, with_nodes

__all__ = ["halve_volumes", "reuse_memory", "skip_convolutions", "uncomputed_convolution"]

aten = torch.ops.aten
G = TypeVar("G", Segment, TypedGraph)


def reuse_memory(of: G) -> G:
    """Rule 1: mark the operators that may take over their input's memory, of a segment or a whole graph."""
    graph = of.graph if isinstance(of, Segment) else of
    marked = {name: replace(graph[name], reuses=True) for name in graph.costed if may_reuse(graph, name)}
    if isinstance(of, Segment):
        return with_nodes(of, list(marked.values()))
    return replace(of, nodes={**of.nodes, **marked})


def skip_convolutions(segment: Segment) -> Segment:
    """Rule 2: mark the convolutions that a recomputation need not compute."""
    graph, inside = segment.graph, set(segment.nodes)
    needed: dict[str, bool] = {}
    skipped = []
    for name in reversed(segment.nodes):
        node = graph[name]
        users = [graph[user.name] for user in node.node.users if user.name in inside]
        is_saved = node.saves is None or node.saves.result
        needed[name] = is_saved or any(needed[user.name] or _saves(user, node) for user in users)
        changed = any(user.reuses for user in users)
        if node.is_local and node.node.target in CONVOLUTIONS.values() and not needed[name] and not changed:
            skipped.append(replace(node, skips=True))
    return with_nodes(segment, skipped)


def _saves(user: TypedNode, node: TypedNode) -> bool:
    """Whether the backward of a user needs a value, as it is or as something made of it on the way."""
    saves = user.saves
    return saves is None or user.inputs.index(node.name) in saves.inputs or saves.extra > 0


def halve_volumes(segment: Segment) -> Segment:
    """Rule 3: mark the local convolutions of volumes of float32; how small they are follows from the tile."""
    volumes = [node for node in map(segment.graph.__getitem__, segment.nodes) if _is_of_volumes(node)]
    return with_nodes(segment, [replace(node, halves=True) for node in volumes])


def _is_of_volumes(node: TypedNode) -> bool:
    is_convolution = node.is_local and node.node.target is aten.conv3d.default
    return is_convolution and node.values[0].dtype == torch.float32


def uncomputed_convolution(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Zeros in place of the result of a convolution, with its gradients, in the types that autocast gives both."""
    if image.ndim < weight.ndim:  # without its batch
        return uncomputed_convolution(image[None], weight, bias, stride, padding, dilation, groups)[0]
    image, weight = _as_autocast(image), _as_autocast(weight)
    bias = _as_autocast(bias) if bias is not None else None
    numbers = (list(per_axis(number, weight.ndim - 2)) for number in (stride, padding, dilation))
    return _Uncomputed.apply(image, weight, bias, *numbers, groups)  # type: ignore[no-untyped-call, no-any-return]


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What a convolution computes with in the place of a tensor; float64 is left as it is."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


class _Uncomputed(torch.autograd.Function):
    """A convolution of which only the gradients are computed."""

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(image, weight)
        ctx.arguments = ([weight.shape[0]] if bias is not None else None, stride, padding, dilation, groups)
        sizes = zip(image.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        extents = [(e + 2 * p - d * (k - 1) - 1) // s + 1 for e, k, s, p, d in sizes]
        return image.new_zeros(()).expand(image.shape[0], weight.shape[0], *extents)

    @staticmethod
    @untraced
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        bias, stride, padding, dilation, groups = ctx.arguments
        gradients = aten.convolution_backward(
            gradient,
            image,
            weight,
            bias,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            ctx.needs_input_grad[:3],
        )
        return (*gradients, None, None, None, None)
