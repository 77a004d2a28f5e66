"""What is known of a model at one image size: verdicts, regions and where the stream ends.

`analyze` runs nothing and allocates nothing of the image's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxstream.capture.capture import capture
from fxstream.capture.casts import without_autocast
from fxstream.errors import InputError
from fxstream.graph.captured import Captured
from fxstream.graph.effects import UNSTREAMED
from fxstream.graph.nodes import bind, copy_graph
from fxstream.graph.shapes import Meta, Shape, Shapes, shapes_at, stream_dims
from fxstream.graph.type_graph import type_graph
from fxstream.graph.typed_graph import Region, TypedGraph, Verdict
from fxstream.lowering import lower, with_positions, with_wraps, wraps_around
from fxstream.rules import NotTileable, Reason
from fxstream.tiling.parts import streamable_share

__all__ = ["Analysis", "analyse", "analyze", "example_inputs", "image_dims", "lowered"]

MOST_SHOWN = 8
ImageDims = Mapping[str, tuple[int, ...]]
"""The tiled dims of every input of the model, by name."""
Earlier = dict[tuple[Any, ...], TypedGraph]
"""Typed graphs of other sizes, by graph and options."""
LARGEST = 2**31
"""No extent of an image is larger."""
MOST_AXES = 3
CROSSING = frozenset({
    Reason.PADS_OPPOSITE, Reason.MIRRORS_TILED_DIM, Reason.ALONG_TILED_DIM, Reason.CONCATENATES_TILED_DIM,
    Reason.OPERAND_ALONG_TILED_DIM, Reason.REPEATS_TILED_DIM,
})  # fmt: skip
"""Reasons whose first detail are the dims that an operator works along."""
LEAST_GAIN = 0.1
"""So much more has to stream where an axis is left whole, which makes the smallest tile larger."""


@dataclass(frozen=True, slots=True, repr=False)
class Analysis:
    """A captured model with the verdict on each of its nodes at one size; prints as a summary."""

    captured: Captured
    graph: TypedGraph

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on every node, in the order of the graph."""
        return tuple(self.graph.verdicts.values())

    @property
    def regions(self) -> tuple[Region, ...]:
        """The parts of the graph that can be streamed in one piece each."""
        return self.graph.regions

    @property
    def barriers(self) -> tuple[Verdict, ...]:
        """The nodes that need the whole feature map, or have no rule."""
        return self.graph.barriers()

    @property
    def cut(self) -> Verdict | None:
        """The node that ends the first region; None where everything is local."""
        return self.barriers[0] if self.barriers else None

    def __str__(self) -> str:
        total = max(1, self.graph.total_bytes())
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.graph.counts().items()))
        lines = [f"{len(self.verdicts)} nodes: {counts}"]
        regions = sorted(self.regions, key=lambda r: -self.graph.activation_bytes(r.nodes))
        for region in regions[:MOST_SHOWN]:
            first, last = (self.graph.verdicts[region.nodes[i]].place for i in (0, -1))
            share = self.graph.activation_bytes(region.nodes) / total
            lines.append(f"region {first} .. {last}: {len(region.nodes)} nodes, {share:.1%} of the activations")
        if len(regions) > MOST_SHOWN:
            lines.append(f"and {len(regions) - MOST_SHOWN} smaller regions")
        if reductions := self.graph.reductions():
            lines.append(f"{len(reductions)} reductions over space, combined from tiles")
        lines += [str(verdict) for verdict in self.barriers[:MOST_SHOWN]]
        if len(self.barriers) > MOST_SHOWN:
            lines.append(f"and {len(self.barriers) - MOST_SHOWN} more barriers")
        return "\n".join(lines)

    __repr__ = __str__


def analyse(
    captured: Captured, values: Sequence[Any], combines: bool = True, earlier: Earlier | None = None
) -> Analysis:
    """The analysis of a captured model for these values of a call (of tensors only their shapes are looked at).

    With `combines` reductions over space may be combined from tiles. `earlier` are typed graphs of other sizes, of
    which what does not depend on the size is taken; that of this size is put there.
    """
    shapes = shapes_at(captured.module, captured.arguments(values))
    dims = image_dims(captured, shapes.metas)
    return Analysis(captured, _typed(captured.graph, shapes, dims, combines, {} if earlier is None else earlier))


def _typed(
    graph: fx.Graph, shapes: Shapes, dims: ImageDims, combines: bool = True, earlier: Earlier | None = None
) -> TypedGraph:
    """The typed graph with the first tiled dims of images left whole where more can be tiled then.

    That is so where windows slide along the others alone, as over frames [N, T, C, H, W] as a batch or along rows,
    and where the bands of a volume become channels. Axes from one end of which operators read the other are left
    whole where clearly more streams then, as the width of a panorama that is padded circularly; of a video or
    volume also where more streams without a cut, as where a decoder puts frames before those that are there.
    """
    earlier = {} if earlier is None else earlier
    key = (graph, tuple(dims.items()), combines)
    typed = earlier[key] = type_graph(graph, shapes, dims, combines, earlier.get(key))
    most = max(map(len, dims.values()), default=0)
    if 0 < len(crossed := _crossed_axes(typed, most)) < most:
        fewer = {name: _without(of, crossed) if len(of) == most else of for name, of in dims.items()}
        whole = _typed(graph, shapes, fewer, combines, earlier)
        gain = streamable_share(whole) - streamable_share(typed)
        unites = most > 2 and _largest_share(whole) > _largest_share(typed) + LEAST_GAIN
        if gain > LEAST_GAIN or (unites and gain >= 0):
            return whole
    reasons = [Reason.SLIDES_ALONG_OTHER_DIMS] * (most > 1) + [Reason.JOINS_TILED_DIM] * (most > 2)
    if not any(verdict.not_tileable_for(reason) for verdict in typed.barriers() for reason in reasons):
        return typed
    fewer = {name: of[1:] if len(of) == most else of for name, of in dims.items()}
    return max(typed, _typed(graph, shapes, fewer, combines, earlier), key=_tileable_bytes)


def _crossed_axes(graph: TypedGraph, most: int) -> set[int]:
    """The axes along which some operator needs pixels from far away, or all of them, of maps of that many axes."""
    answers = (barrier.answer for barrier in graph.barriers())
    crossing = (one for one in answers if isinstance(one, NotTileable) and one.reason in CROSSING)
    return {
        one.dims.index(dim)
        for one in crossing
        if len(one.dims) == most
        for touched in one.details
        if isinstance(touched, list)
        for dim in touched
        if dim in one.dims
    }


def _without(dims: tuple[int, ...], axes: set[int]) -> tuple[int, ...]:
    return tuple(dim for axis, dim in enumerate(dims) if axis not in axes)


def _largest_share(graph: TypedGraph) -> float:
    """The share of the activations that are in the largest region."""
    sizes = [graph.activation_bytes(region.nodes) for region in graph.regions]
    return max(sizes, default=0) / max(1, graph.total_bytes())


def _tileable_bytes(graph: TypedGraph) -> int:
    return sum(graph.activation_bytes(region.nodes) for region in graph.regions)


def lowered(captured: Captured, values: Sequence[Any], combines: bool = True) -> Captured:
    """The captured model with its feature-map-wide operators decomposed, where any can be (`lowering`).

    Reductions over space only where they may be combined from tiles.
    """
    graph = analyse(captured, values, combines).graph
    while combines and (unflattened := with_positions(captured, graph)) is not captured:
        captured, graph = unflattened, analyse(unflattened, values).graph
    rewritten = lower(captured, graph, combines)
    if not wraps_around(rewritten.graph):
        return rewritten
    return with_wraps(rewritten, analyse(rewritten, values, combines).graph)


def with_frozen_batch_norm(analysis: Analysis) -> TypedGraph:
    """The typed graph as it would be if every BatchNorm used its running statistics."""
    graph, nodes = copy_graph(analysis.captured.graph)
    for node in nodes.values():
        if node.target is torch.ops.aten.batch_norm.default:
            arguments = bind(node) | {"training": False}
            node.args, node.kwargs = tuple(arguments.values()), {}
            for statistics in node.all_input_nodes[1:]:
                statistics.meta.pop(UNSTREAMED, None)  # they are no longer updated
    metas = analysis.graph.metas
    shapes = Shapes(metas, {name: node.macs for name, node in analysis.graph.nodes.items()})
    return _typed(graph, shapes, image_dims(analysis.captured, metas))


def image_dims(captured: Captured, metas: Mapping[str, Meta]) -> ImageDims:
    """The tiled dims of every input of the model."""
    shapes = {name: meta.shape for name in captured.inputs if isinstance(meta := metas.get(name), Shape)}
    return dict(zip(shapes, stream_dims(list(shapes.values())), strict=True))


def example_inputs(
    model: nn.Module,
    size: int | tuple[int, ...] | None,
    channels: int,
    batch: int,
    inputs: Sequence[torch.Tensor | tuple[int, ...]] | None,
) -> list[torch.Tensor]:
    """The positional inputs of the model: one image [batch, channels, *size], or those that `inputs` has.

    A shape stands for a tensor of the model's type on its device (of its buffers, where it has no parameters),
    without memory of its own. Raises `InputError` for both or neither of the two, for more than three extents, and
    for anything but positive ints.
    """
    if (size is None) == (inputs is None):
        raise InputError(
            "give the size of one image, or the shapes of all inputs: inputs=[(1, 3, 512, 512), (1, 1, 512, 512)]"
        )
    if inputs is not None:
        return [i if isinstance(i, torch.Tensor) else _example(model, "an input", tuple(i)) for i in inputs]
    extents = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(extents) > MOST_AXES:
        raise InputError(
            f"size has {len(extents)} extents, an image one to {MOST_AXES}: batch and channels are arguments of"
            " their own, or give whole shapes as inputs=[...]"
        )
    return [_example(model, "size, channels and batch", (batch, channels, *extents))]


def _example(model: nn.Module, what: str, shape: tuple[Any, ...]) -> torch.Tensor:
    ints = [n for n in shape if isinstance(n, int) and not isinstance(n, bool)]
    if any(n >= LARGEST for n in ints):
        raise InputError(f"{what} must be below {LARGEST}, found {shape}")
    if len(shape) < 3 or len(ints) < len(shape) or min(ints) < 1:
        raise InputError(f"{what} must be positive ints, batch and channels before the extents; found {shape}")
    tensors = itertools.chain(model.parameters(), model.buffers())
    floating = (weight for weight in tensors if weight.is_floating_point())
    weight = next(floating, torch.empty(0))
    return torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(shape)


def analyze(
    model: nn.Module,
    size: int | tuple[int, ...] | None = None,
    *,
    channels: int = 3,
    batch: int = 1,
    inputs: Sequence[torch.Tensor | tuple[int, ...]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    global_ops: str = "auto",
) -> Analysis:
    """The verdict on every operator of `model` for an image [batch, channels, *size], without running the model.

    `size` is in pixels, one number for a square 2-D image or one per axis. A model of several inputs gets `inputs`
    instead, with the shape of each, or a tensor where it is not of the model's type; only shapes and types are
    looked at. `kwargs` are further arguments of the model, `global_ops` is that of `compile`. Raises
    `CaptureError` where the model cannot be captured and `InputError` where it does not accept the size.

    >>> print(analyze(torch.nn.Conv2d(3, 8, 3), 64))
    1 nodes: 1 local
    region conv2d .. conv2d: 1 nodes, 100.0% of the activations
    """
    examples = example_inputs(model, size, channels, batch, inputs)
    captured, values = capture(model, tuple(examples), kwargs or {})
    combines = global_ops != "cut"
    with without_autocast(captured):
        return analyse(lowered(captured, values, combines), values, combines)
