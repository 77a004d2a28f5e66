"""A frozen BatchNorm behind a convolution as part of that convolution.

NOTE [folding]
1. With fixed statistics BatchNorm is one affine map per channel: with ``s = weight / sqrt(var + eps)`` it gives
   ``(y - mean) * s + bias``. Of a convolution's result that is another convolution, with its weight times `s`. It
   costs no pass over a map, no map is kept for its backward, and the result is the same to rounding.
2. The new weights are computed once per call, in front of the segment, by ordinary operators (`folded_weights`):
   autograd sends their gradients, which the tiles sum up, on to the tensors that they are made of.
3. Only within a segment, where nothing else reads the convolution's result, and for weights of 32 bits or more:
   narrower ones would be rounded once more. What is not streamed runs as the model has it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import fx

from fxstream.graph.shapes import Shape
from fxstream.graph.typed_graph import Locality
from fxstream.rules import Kind
from fxstream.rules.windowed import CONVOLUTIONS
from fxstream.tiling.autograd_saves import Saved
from fxstream.tiling.bounds import Segment

__all__ = [
    "fold_bytes",
    "folded_weights",
    "folds_in",
    "names_of",
    "saved_with_folds",
    "segment_with_folds",
    "write_weights",
]

aten = torch.ops.aten


def folds_in(locality: Locality, nodes: Collection[str]) -> dict[str, str]:
    """The BatchNorms among these nodes that are folded, each with the convolution before it (rule 3)."""
    inside = set(nodes)
    found = {}
    for name in nodes:
        node = locality.nodes[name]
        if node.target is not aten.batch_norm.default or locality.verdicts[name].kind is not Kind.LOCAL:
            continue
        made = node.args[0]
        assert isinstance(made, fx.Node)
        is_convolution = made.name in inside and made.target in CONVOLUTIONS.values()
        if is_convolution and len(made.users) == 1 and _are_wide(locality, _tensors(locality, name)):
            found[name] = made.name
    return found


def _tensors(locality: Locality, name: str) -> list[fx.Node | None]:
    """Weight and bias of the convolution before a BatchNorm; weight, bias, mean and variance of this."""
    node = locality.nodes[name]
    made = node.args[0]
    assert isinstance(made, fx.Node)
    given = [*made.args, None][1:3] + list(node.args[1:5])
    return [tensor if isinstance(tensor, fx.Node) else None for tensor in given]


def _are_wide(locality: Locality, tensors: list[fx.Node | None]) -> bool:
    """Whether these are inputs of the graph, of one type of 32 bits or more."""
    metas = [locality.metas.get(t.name) if t.op == "placeholder" else None for t in tensors if t is not None]
    types = {meta.dtype if isinstance(meta, Shape) else None for meta in metas}
    return len(types) == 1 and types <= {torch.float32, torch.float64}


def names_of(name: str) -> tuple[str, str]:
    """The names of the weight and the bias of a fold among the inputs of its segment."""
    return f"{name}_folded_weight", f"{name}_folded_bias"


def saved_with_folds(locality: Locality, saved: Mapping[str, Saved], nodes: Collection[str]) -> dict[str, Saved]:
    """What autograd keeps where the BatchNorms among these nodes are folded: of those nothing."""
    folds = folds_in(locality, nodes)
    nothing = Saved(frozenset(), False, 0.0, views=0, passes_on=True)
    return {name: replace(nothing, folded=folds[name]) if name in folds else of for name, of in saved.items()}


def fold_bytes(locality: Locality, convolution: str) -> int:
    """Bytes of the weight of the fold into a convolution, which has the type of its result."""
    weight, result = (
        locality.metas[n] for n in (locality.nodes[convolution].all_input_nodes[1].name, convolution)
    )
    assert isinstance(weight, Shape)
    assert isinstance(result, Shape)
    return weight.elements * result.dtype.itemsize


def segment_with_folds(locality: Locality, segment: Segment) -> Segment:
    """The segment with the weights of its folds in the place of what these are made of."""
    folds = folds_in(locality, segment.nodes)
    others = [locality.nodes[name] for name in segment.nodes if name not in {*folds, *folds.values()}]
    read = {given.name for node in others for given in node.all_input_nodes}
    made_of = {tensor.name for name in folds for tensor in _tensors(locality, name) if tensor is not None}
    kept = (small for small in segment.smalls if small not in made_of or small in read)
    return replace(segment, smalls=(*kept, *(name for fold in folds for name in names_of(fold))))


def write_weights(graph: fx.Graph, env: dict[str, fx.Node], locality: Locality, nodes: Collection[str]) -> None:
    """Write what makes the weights of the folds among these nodes; `env` gets them by their names."""
    for fold, made in folds_in(locality, nodes).items():
        given = [env[tensor.name] if tensor is not None else None for tensor in _tensors(locality, fold)]
        result = locality.metas[made]
        assert isinstance(result, Shape)
        both = graph.call_function(folded_weights, (*given, locality.nodes[fold].args[7], result.dtype))
        for place, name in enumerate(names_of(fold)):
            env[name] = graph.call_function(operator.getitem, (both, place), name=name)


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
