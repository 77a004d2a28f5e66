"""A report as data: layers, regions, cuts and costs at one image size, ready to be shown in any form.

`summarise` computes, `report`, `page` and `plot` only draw. All sizes are in pixels of the image, bytes are bytes,
and arithmetic is in multiply-accumulates of one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from fxstream.compiler.analysis import Analysis, image_dims
from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.graph.effects import UNSTREAMED
from fxstream.graph.fields import demands, extent_chains, main_image, receptive_fields
from fxstream.graph.shapes import Shape, fold_integers
from fxstream.graph.typed_graph import Locality, Verdict, analyse_locality
from fxstream.planning.cost import macs_of
from fxstream.planning.plan import Plan, SegmentPlan, streamable_share, total_bytes, worthwhile
from fxstream.probe.probe import ProbeReport
from fxstream.report.closed_form import TileForms, extent_form, tile_forms
from fxstream.rules import Evaluation, Kind

BATCH_NORM_TRAINING = 5
"""The place of `training` among the arguments of ``aten::batch_norm``."""

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
    kind: Kind
    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class RegionSummary:
    """A part that can be streamed in one piece.

    `share` is its part of the activations. `field` is that of its last node in the region's largest input and
    `forms` what a tile of the whole region costs, both None where branches leave no closed form. `macs` are those
    of the plain region. `leaf` names that input, `is_image` tells whether it is the model's own image.
    """

    first: str
    last: str
    nodes: int
    share: float
    bytes: int
    macs: int
    worthwhile: bool
    leaf: str
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
    """Everything that a report shows; `reductions` are those over space that are combined from tiles."""

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
    probe: tuple[ProbeReport, ...]
    bound: bool


def summarise(
    analysis: Analysis,
    name: str,
    *,
    training: bool = False,
    plan: Plan | None = None,
    probe: Sequence[ProbeReport] = (),
) -> Summary:
    """The report's data for an analysed network; with a plan also its tiles and predicted memory."""
    locality = analysis.locality
    source = main_image(locality)
    names = list(locality.verdicts)
    fields = receptive_fields(locality, names, source) if source else {}
    chains = extent_chains(locality, names, source) if source else {}
    segments = {name: part for part in (plan.segments if plan else ()) for name in part.segment.nodes}
    layers = tuple(
        _layer(locality, node.name, fields, segments.get(node.name))
        for node in locality.graph.nodes
        if node.name in locality.verdicts and isinstance(locality.metas.get(node.name), (Shape, tuple))
        if locality.depends_on_image(node.name)
    )
    large = {name for part in worthwhile(locality) for name in part}
    total = total_bytes(locality)
    regions = tuple(
        _region(locality, region.nodes, region.nodes[0] in large, total, source, chains)
        for region in locality.regions
    )
    value = locality.values[source] if source else ()
    return Summary(
        name=name,
        image=value.shape if not isinstance(value, tuple) else (),
        training=training,
        layers=layers,
        regions=regions,
        cuts=_cuts(analysis, sum(r.share for r in regions if r.worthwhile)),
        bytes=sum(layer.bytes for layer in layers),
        macs=sum(layer.macs for layer in layers),
        streamed_share=sum(r.share for r in regions if r.worthwhile),
        reductions=len(locality.reductions()),
        plan=plan,
        probe=tuple(probe),
        bound=analysis.captured.bound,
    )


def kept_bytes(locality: Locality, node: str) -> int:
    """Bytes that a node's result adds to memory: none for a view of its input."""
    footprint, meta = locality.verdicts[node].footprint, locality.metas[node]
    is_view = footprint is not None and footprint.evaluation is Evaluation.SHUFFLED
    return meta.bytes if isinstance(meta, Shape) and not is_view else 0


def _layer(
    locality: Locality, node: str, fields: Mapping[str, tuple[ReceptiveField, ...]], segment: SegmentPlan | None
) -> Layer:
    verdict = locality.verdicts[node]
    return Layer(
        node=node,
        module=verdict.module,
        operator=verdict.operator.removeprefix("aten::"),
        window=_window(locality, node),
        field=fields.get(node),
        shape=locality.value(node).shape,
        bytes=kept_bytes(locality, node),
        tile_bytes=kept_bytes(locality, node) if segment is None else round(tile_bytes(locality, segment, node)),
        macs=macs_of(locality, node),
        kind=verdict.kind,
        reason=verdict.reason,
        source=verdict.source,
    )


def _window(locality: Locality, node: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Kernel, stride and dilation as the operator was given them."""
    original = locality.nodes[node]
    if not hasattr(original.target, "_schema"):
        return None
    args, kwargs = fold_integers(original, locality.metas)
    names = [argument.name for argument in original.target._schema.arguments]
    given = {a.name: a.default_value for a in original.target._schema.arguments}
    given |= dict(zip(names, args, strict=False)) | kwargs
    if "weight" in given and "stride" in given:
        weight = locality.values[given["weight"].name]
        kernel = () if isinstance(weight, tuple) else weight.shape[2:]
    elif "kernel_size" in given:
        kernel = _numbers(given["kernel_size"])
    else:
        return None
    stride = _numbers(given.get("stride") or kernel)
    return tuple(kernel), stride, _numbers(given.get("dilation") or 1)


def _numbers(given: Any) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)


def _region(
    locality: Locality,
    nodes: tuple[str, ...],
    large: bool,
    total: int,
    image: str | None,
    chains: Mapping[str, Any],
) -> RegionSummary:
    held = locality.activation_bytes(nodes)
    first, last = (locality.verdicts[nodes[i]] for i in (0, -1))
    inside = set(nodes)
    leaves = {
        read.value.name: math.prod(read.extents)
        for name in nodes
        for read in locality.footprint(name).reads
        if read.value.name not in inside
    }
    leaf = max(leaves, key=leaves.__getitem__)
    fields = receptive_fields(locality, nodes, leaf)
    return RegionSummary(
        first=first.module or first.node,
        last=last.module or last.node,
        nodes=len(nodes),
        share=held / max(1, total),
        bytes=held,
        macs=sum(macs_of(locality, name) for name in nodes),
        worthwhile=large,
        leaf=leaf,
        is_image=leaf == image,
        field=fields.get(nodes[-1]),
        forms=region_forms(locality, nodes, leaf, fields),
        extent=tuple(str(extent_form(chain)) for chain in chains.get(nodes[-1], ())),
    )


def region_forms(
    locality: Locality, nodes: Sequence[str], leaf: str, fields: Mapping[str, tuple[ReceptiveField, ...]]
) -> TileForms | None:
    """What a tile of these nodes costs, in one segment that ends in the last of them."""
    output = nodes[-1]
    needed = demands(locality, nodes, output)
    if output not in fields or leaf not in needed:
        return None
    macs, kept = {}, {}
    for name in nodes:
        pixels = math.prod(locality.value(name).extents)
        macs[name] = Fraction(macs_of(locality, name), pixels)
        kept[name] = Fraction(kept_bytes(locality, name), pixels)
    return tile_forms(needed, fields[output], [leaf], macs, kept)


def _cuts(analysis: Analysis, share: float) -> tuple[Cut, ...]:
    """The barriers grouped by operator and reason, in the order of the graph."""
    groups: dict[tuple[str, str, Kind], list[Verdict]] = {}
    for verdict in analysis.barriers:
        groups.setdefault((verdict.operator, verdict.reason, verdict.kind), []).append(verdict)
    return tuple(Cut(group[0], len(group), _advice(analysis, group[0], share)) for group in groups.values())


def _advice(analysis: Analysis, verdict: Verdict, share: float) -> str:
    """What the user can do about a barrier."""
    if verdict.operator == "aten::batch_norm":
        frozen = f"{_share_with_frozen_batch_norm(analysis):.0%} instead of {share:.0%}"
        return f"fxstream.freeze_batch_norm(model) streams {frozen} of the activations"
    if verdict.kind is Kind.NO_RULE:
        return "fxstream.register_rule teaches fxstream an operator; until then it runs plainly"
    if "random" in verdict.reason:
        return "in eval mode, or with p = 0, it is local"
    if verdict.kind is Kind.REDUCE:
        return "it runs plainly on the whole map; streaming goes on behind it where that pays"
    return "it runs plainly on the whole map"


def _share_with_frozen_batch_norm(analysis: Analysis) -> float:
    """The share of the activations that would be streamed if every BatchNorm used its running statistics."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in analysis.captured.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].name = node.name
        if node.target is torch.ops.aten.batch_norm.default:
            env[node].update_arg(BATCH_NORM_TRAINING, False)
            for statistics in env[node].all_input_nodes[1:]:
                statistics.meta.pop(UNSTREAMED, None)  # they are no longer updated
    metas = analysis.locality.metas
    return streamable_share(analyse_locality(graph, metas, image_dims(analysis.captured, metas)))


def tile_bytes(locality: Locality, plan: SegmentPlan, node: str) -> float:
    """Bytes of a node's result in the largest tile of its segment."""
    if not plan.axes or locality.verdicts[node].footprint is None:
        return kept_bytes(locality, node)
    extents = locality.value(node).extents
    shares = (held / extent for held, extent in zip(plan.largest(node), extents, strict=True))
    return kept_bytes(locality, node) * math.prod(shares)
