"""A report as data: layers, regions, cuts and costs at one image size, ready to be shown in any form.

`summarise` computes; `terminal`, `as_json`, `html` and `plot` only draw. All sizes are in pixels of the image,
bytes are bytes, and arithmetic is in multiply-accumulates of one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from fxstream.compiler.analysis import Analysis, with_frozen_batch_norm
from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.graph.fields import demands, extent_chains, main_image, receptive_fields
from fxstream.graph.nodes import bind_to
from fxstream.graph.typed_graph import TypedGraph, Verdict
from fxstream.planning.plan import Plan, SegmentPlan
from fxstream.probe.probe import ProbeReport
from fxstream.report.closed_form import TileForms, extent_form, tile_forms
from fxstream.rules import Reason, Tileability
from fxstream.tiling.parts import streamable_share, worthwhile

__all__ = ["Cut", "Layer", "RegionSummary", "Summary", "summarise"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator: where it is in the user's model, what it reads, how large its result is, what it costs.

    `window` is (kernel, stride, dilation), one number per axis each, for operators that have them. `field` is the
    receptive field in the image per axis, None where it is the whole image; `bytes` is 0 for a view, and
    `tile_bytes` what the largest tile of a plan holds of it (all, where it is not streamed).
    """

    node: str
    module: str
    operator: str
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None
    field: tuple[ReceptiveField, ...] | None
    shape: tuple[int, ...]
    bytes: int
    tile_bytes: int
    macs: int
    kind: Tileability
    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class RegionSummary:
    """A part that can be streamed in one piece.

    `share` is its part of the activations. `field` is that of its last node in the region's largest input and
    `forms` what a tile of the whole region costs, both None where branches leave no closed form. `macs` are those
    of the plain region. `source` names that input, `is_image` says whether it is the model's own image.
    """

    first: str
    last: str
    nodes: int
    share: float
    bytes: int
    macs: int
    worthwhile: bool
    source: str
    is_image: bool
    field: tuple[ReceptiveField, ...] | None
    forms: TileForms | None
    extent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """What ends a region: the operators of one kind and reason, the first of them, and what the user can do."""

    verdict: Verdict
    count: int
    advice: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that a report shows; `reductions` are those over space that are combined from tiles.

    `frozen` is the plan that there would be with frozen BatchNorm, where that is another one.
    """

    name: str
    image: tuple[int, ...]
    training: bool
    layers: tuple[Layer, ...]
    regions: tuple[RegionSummary, ...]
    cuts: tuple[Cut, ...]
    bytes: int
    macs: int
    streamed_share: float
    reductions: int
    plan: Plan | None
    frozen: Plan | None
    probe: tuple[ProbeReport, ...]
    bound: bool


def summarise(
    analysis: Analysis,
    name: str,
    *,
    training: bool = False,
    plan: Plan | None = None,
    frozen: Plan | None = None,
    probe: Sequence[ProbeReport] = (),
) -> Summary:
    """The report's data for an analysed network; with a plan also its tiles and predicted memory."""
    graph = analysis.graph
    image = main_image(graph)
    layers, regions = _layers(graph, image, plan), _regions(graph, image)
    share = sum(region.share for region in regions if region.worthwhile)
    return Summary(
        name=name,
        image=graph.value(image).shape if image else (),
        training=training,
        layers=layers,
        regions=regions,
        cuts=_cuts(analysis, share),
        bytes=sum(layer.bytes for layer in layers),
        macs=sum(layer.macs for layer in layers),
        streamed_share=share,
        reductions=len(graph.reductions()),
        plan=plan,
        frozen=frozen,
        probe=tuple(probe),
        bound=analysis.captured.bound,
    )


def _layers(graph: TypedGraph, image: str | None, plan: Plan | None) -> tuple[Layer, ...]:
    """The operators that depend on an image, in the order of the graph."""
    fields = receptive_fields(graph, list(graph.verdicts), image) if image else {}
    segments = {name: segment for segment in (plan.segments if plan else ()) for name in segment.segment.covers}
    return tuple(
        _layer(graph, name, fields, segments.get(name))
        for name in graph.verdicts
        if graph[name].values and graph[name].depends_on_image
    )


def _regions(graph: TypedGraph, image: str | None) -> tuple[RegionSummary, ...]:
    chains = extent_chains(graph, list(graph.verdicts), image) if image else {}
    large = {name for part in worthwhile(graph) for name in part}
    total = graph.total_bytes()
    return tuple(
        _region(graph, region.nodes, region.nodes[0] in large, total, image, chains) for region in graph.regions
    )


def kept_bytes(graph: TypedGraph, name: str) -> int:
    """Bytes that a node's result adds to memory: none for a view of its input."""
    node = graph[name]
    is_view = node.is_local and node.pattern.is_view
    return 0 if node.is_tuple or is_view else node.bytes


def _layer(
    graph: TypedGraph, node: str, fields: Mapping[str, tuple[ReceptiveField, ...]], segment: SegmentPlan | None
) -> Layer:
    verdict, bytes_kept = graph.verdicts[node], kept_bytes(graph, node)
    return Layer(
        node=node,
        module=verdict.module,
        operator=verdict.operator.removeprefix("aten::"),
        window=_window(graph, node),
        field=fields.get(node),
        shape=graph.value(node).shape,
        bytes=bytes_kept,
        tile_bytes=bytes_kept if segment is None else round(tile_bytes(graph, segment, node)),
        macs=graph[node].macs,
        kind=verdict.kind,
        reason=verdict.reason,
        source=verdict.source,
    )


def _window(graph: TypedGraph, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Kernel, stride and dilation of an operator that has them."""
    node = graph[name].node
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = bind_to(node.target, *graph.arguments(node))
    if "weight" in arguments and "stride" in arguments:
        kernel = graph.value(arguments["weight"].name).shape[2:]
    elif "kernel_size" in arguments:
        kernel = _numbers(arguments["kernel_size"])
    else:
        return None
    stride = _numbers(arguments.get("stride") or kernel)
    return tuple(kernel), stride, _numbers(arguments.get("dilation") or 1)


def _numbers(argument: Any) -> tuple[int, ...]:
    return (argument,) if isinstance(argument, int) else tuple(argument)


def _region(
    graph: TypedGraph,
    nodes: tuple[str, ...],
    large: bool,
    total: int,
    image: str | None,
    chains: Mapping[str, Any],
) -> RegionSummary:
    size = graph.activation_bytes(nodes)
    first, last = (graph.verdicts[nodes[i]].place for i in (0, -1))
    inside = set(nodes)
    inputs = {
        read.value.name: math.prod(read.extents)
        for name in nodes
        for read in graph.pattern(name).reads
        if read.value.name not in inside
    }
    source = max(inputs, key=lambda name: (graph.value(name).image, inputs[name]))
    fields = receptive_fields(graph, nodes, source)
    return RegionSummary(
        first=first,
        last=last,
        nodes=len(nodes),
        share=size / max(1, total),
        bytes=size,
        macs=sum(graph[name].macs for name in nodes),
        worthwhile=large,
        source=source,
        is_image=source == image,
        field=fields.get(nodes[-1]),
        forms=region_forms(graph, nodes, source, fields),
        extent=tuple(str(extent_form(chain)) for chain in chains.get(nodes[-1], ())),
    )


def region_forms(
    graph: TypedGraph, nodes: Sequence[str], source: str, fields: Mapping[str, tuple[ReceptiveField, ...]]
) -> TileForms | None:
    """What a tile of these nodes costs, in one segment that ends in the last of them."""
    output = nodes[-1]
    needed = demands(graph, nodes, output)
    if output not in fields or source not in needed:
        return None
    macs, kept = {}, {}
    for name in nodes:
        pixels = math.prod(graph.value(name).extents)
        macs[name] = Fraction(graph[name].macs, pixels)
        kept[name] = Fraction(kept_bytes(graph, name), pixels)
    return tile_forms(needed, fields[output], [source], macs, kept)


def _cuts(analysis: Analysis, share: float) -> tuple[Cut, ...]:
    """The barriers grouped by operator and reason, in the order of the graph."""
    groups: dict[tuple[str, str, Tileability], list[Verdict]] = {}
    for verdict in analysis.barriers:
        groups.setdefault((verdict.operator, verdict.reason, verdict.kind), []).append(verdict)
    return tuple(Cut(group[0], len(group), _advice(analysis, group[0], share)) for group in groups.values())


def _advice(analysis: Analysis, verdict: Verdict, share: float) -> str:
    """What the user can do about a barrier."""
    if verdict.operator == "aten::batch_norm":
        frozen = f"{_share_with_frozen_batch_norm(analysis):.0%} instead of {share:.0%}"
        return f"fxstream.freeze_batch_norm(model) streams {frozen} of the activations"
    if verdict.not_tileable_for(Reason.CODE_OF_ITS_OWN):
        return "as an operator (torch.library.custom_op) it can have a rule; until then it runs plainly"
    if verdict.kind is Tileability.NO_RULE:
        return "fxstream.register_rule teaches fxstream an operator; until then it runs plainly"
    if verdict.not_tileable_for(Reason.RANDOM_DRAW):
        return "in eval mode, or with p = 0, it is local"
    if verdict.kind is Tileability.REDUCTION:
        return "it runs plainly on the whole map; streaming goes on after it where that pays"
    return "it runs plainly on the whole map"


def _share_with_frozen_batch_norm(analysis: Analysis) -> float:
    """The share of the activations that would be streamed if every BatchNorm used its running statistics."""
    return streamable_share(with_frozen_batch_norm(analysis))


def tile_bytes(graph: TypedGraph, plan: SegmentPlan, name: str) -> float:
    """Bytes of a node's result in the largest tile of its segment."""
    if not plan.axes or not graph[name].is_local or name not in plan.segment.nodes:
        return kept_bytes(graph, name)
    extents = graph.value(name).extents
    shares = (length / extent for length, extent in zip(plan.largest(name), extents, strict=True))
    return kept_bytes(graph, name) * math.prod(shares)
