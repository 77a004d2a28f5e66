"""Less memory and less work for a tile program, from what autograd keeps of each operator.

NOTE [what is saved]
1. An operator that has a twin in place, whose backward does not need its input, takes over the memory of that
   input where nothing else reads it and the operator that made it does not keep it. So it was in the model, before
   the graph was made functional.
2. A tile is recomputed for its backward only. A convolution whose result no backward needs (the last of
   a segment, or one that only additions follow) is then not computed: its place is taken by a function with the
   same backward and a result of zeros without memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxstream.graph.typed_graph import Locality
from fxstream.rules.windowed import CONVOLUTIONS, per_axis
from fxstream.tiling.autograd_saves import Saved, in_place_twin, takes_over

__all__ = ["reuse_inputs", "without_unneeded"]

aten = torch.ops.aten


def reuse_inputs(
    graph: fx.Graph, origin: Mapping[fx.Node, str], locality: Locality, saved: Mapping[str, Saved]
) -> None:
    """Rule 1, in place; `origin` names the operator of the model that each call of the graph evaluates."""
    for node, name in origin.items():
        given = node.args[0] if node.args else None
        read = [n.name for n in locality.nodes[name].all_input_nodes]  # a pad or crop may be nothing on this tile
        if isinstance(given, fx.Node) and origin.get(given) in read and len(given.users) == 1:
            twin = in_place_twin(node.target)
            if twin is not None and name in saved and takes_over(locality, saved, name):
                node.target = twin


def without_unneeded(
    program: fx.GraphModule,
    origin: Mapping[fx.Node, str],
    nodes: Sequence[str],
    locality: Locality,
    saved: Mapping[str, Saved],
) -> fx.GraphModule:
    """Rule 2: the program for a recomputation, the same object where it computes nothing in vain.

    `nodes` are those of the segment, in order.
    """
    inside = set(nodes)
    needed: dict[str, bool] = {}
    for name in reversed(nodes):
        needed[name] = saved[name].result
        for user in locality.nodes[name].users:
            if user.name in inside:
                needed[name] |= needed[user.name] or _keeps(user, locality.nodes[name], saved)
    skipped = {
        node.name
        for node, name in origin.items()
        if node.target in CONVOLUTIONS.values()
        and not needed[name]
        and not any(map(_changes_its_input, node.users))
    }
    if not skipped:
        return program
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.nodes:
        if node.name in skipped:
            node.target = uncomputed_convolution
    return fx.GraphModule({}, graph, program._get_name())


def _keeps(user: fx.Node, given: fx.Node, saved: Mapping[str, Saved]) -> bool:
    """Whether the backward of a user needs a value, as it is or as something made of it on the way."""
    kept = saved[user.name]
    return user.all_input_nodes.index(given) in kept.inputs or kept.extra > 0


def _changes_its_input(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


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
    image, weight = _as_autocast(image), _as_autocast(weight)
    bias = _as_autocast(bias) if bias is not None else None
    numbers = (list(per_axis(given, weight.ndim - 2)) for given in (stride, padding, dilation))
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
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        bias, stride, padding, dilation, groups = ctx.arguments
        found = aten.convolution_backward(
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
        return (*found, None, None, None, None)
