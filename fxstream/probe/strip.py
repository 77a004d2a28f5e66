"""Thin strips: a part of the graph at the smallest size that shows every claim along one stream axis.

A strip is as long as the largest receptive field, a few strides and NaN surroundings need, and as wide as the
part's operators accept. Its length follows from the claims, so a claim that is too small leaves no valid interior,
which is a mismatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from fxstream.errors import FxstreamError
from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import BROADCAST, ReceptiveField
from fxstream.graph.export import fake_tensor_log_silenced
from fxstream.graph.fields import ExtentChain, Fields, extent_chains, receptive_fields
from fxstream.graph.typed_graph import Locality
from fxstream.probe.findings import UnprobedError
from fxstream.probe.subgraph import Excerpt
from fxstream.rules import Evaluation, Kind
from fxstream.tiling.request import leaf_extents

__all__ = [
    "Strip",
    "extents_at",
    "make_strip",
    "synthetic_weight",
    "verdicts_at",
]

Chains = Mapping[str, Mapping[str, tuple[ExtentChain, ...]]]
"""Per leaf and node, the extent formulas along each axis."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Extents across the strip, the first that the part accepts."""
PERIODS = (1, 4, 8, 16, 32, 64)
"""The strip's extents agree with the real ones modulo one of these, for networks that need certain sizes."""
MOST_PIXELS = 2**17
"""Up to this size the real extents are tried where no strip is accepted."""
MOST_REFUSALS = 3
"""After so many refused sizes the next period is tried."""


@dataclass(frozen=True, slots=True)
class Strip:
    """An excerpt at the size of a strip along one axis, with the claims that are to be measured.

    `tiles` are the intervals of the main leaf that hold numbers, one per batch entry; outside them it is NaN.
    Fields are per leaf. `locality` is the one at the strip's size.
    """

    part: Excerpt
    axis: int
    locality: Locality
    leaf_extents: Mapping[str, tuple[int, ...]]
    fields: Mapping[str, Fields]
    tiles: tuple[Interval, Interval]
    main: str
    weights: Mapping[str, torch.Tensor]

    def extent(self, name: str) -> int:
        """Pixels of a node or leaf along the axis."""
        return self.locality.value(name).extents[self.axis]

    def tile_of(self, leaf: str, tile: Interval) -> Interval:
        """The interval of another leaf that shows the same part of the image as `tile` of the main leaf.

        All of one with a single pixel, which every tile reads.
        """
        own, main = self.leaf_extents[leaf][self.axis], self.leaf_extents[self.main][self.axis]
        if own == 1:
            return Interval(0, 1)
        return Interval(tile.start * own // main, tile.stop * own // main)


def make_strip(part: Excerpt, axis: int, weights: Mapping[str, torch.Tensor], whole_windows: bool) -> Strip:
    """The smallest strip along `axis` that shows every claim, and the tiles on it."""
    nodes = part.segment.nodes
    real = {leaf: leaf_extents(part.locality, leaf, dims) for leaf, dims in part.segment.leaves}
    main = max(real, key=lambda leaf: math.prod(real[leaf]))
    axes = len(real[main])
    if any(0 in dims for _, dims in part.segment.leaves):
        raise UnprobedError("its images have no batch dim in front")
    claims = {leaf: receptive_fields(part.locality, nodes, leaf) for leaf in real}
    known = [fields[axis] for node, fields in claims[main].items() if node in nodes]
    if not known:
        raise UnprobedError("no node has a receptive field in its largest input")
    chains = {leaf: extent_chains(part.locality, nodes, leaf) for leaf in real}
    deepest = max(known, key=lambda f: (f.stride, f.size))
    stride = max(math.ceil(f.stride) for f in known)
    margin, inside = _margin(part.locality, nodes, claims[main], axis), max(f.size for f in known) + 3 * stride + 2
    for leaf, claimed in claims.items():
        ratio = -(-real[main][axis] // real[leaf][axis])
        own = [of[axis] for node, of in claimed.items() if node in nodes]
        if leaf != main and real[leaf][axis] > 1 and own:
            margin = max(margin, ratio * _margin(part.locality, nodes, claimed, axis))
            inside = max(inside, ratio * (max(f.size for f in own) + 3))
    start = margin + (deepest.lows[0] - margin) % stride
    stop = start + inside
    stop += (deepest.highs[-1] + 1 - stop) % stride
    tiles = Interval(start, stop), Interval(start + 1, stop - 1)
    least = stop + margin
    wanted = [[least if k == axis else width for k in range(axes)] for width in WIDTHS]
    groups = [
        [
            _followed(
                part,
                chains[main],
                extents_at(real, [w + (e - w) % period for w, e in zip(extents, real[main], strict=True)]),
                main,
            )
            for extents in wanted
        ]
        for period in PERIODS
    ]
    if real[main][axis] >= least and math.prod(real[main]) <= MOST_PIXELS:
        groups.append([dict(real)])
    for group in groups:
        refused = 0
        for extents in group:
            expected = _extents_of_nodes(chains, extents)
            if not _all_nodes_read(part.locality, nodes, claims, expected, whole_windows):
                continue
            at_strip = verdicts_at(part, extents)
            if at_strip is None:
                refused += 1
                if refused == MOST_REFUSALS:
                    break
                continue
            if any(at_strip.value(name).shape[0] % 2 or _moves_batch(at_strip, name) for name in nodes):
                raise UnprobedError("it mixes the images of a batch")
            if any(at_strip.verdicts[name].kind is not Kind.LOCAL for name in nodes):
                continue
            poisoned = [leaf for leaf in real if part.type_of(leaf) == part.dtype]  # a mask carries no NaN
            fields = {leaf: receptive_fields(at_strip, nodes, leaf) for leaf in poisoned}
            if main in fields and _margin(at_strip, nodes, fields[main], axis) > margin:
                continue  # an operator whose result has a fixed size has another stride here
            found = extents | {name: at_strip.value(name).extents for name in nodes}
            if _all_nodes_read(at_strip, nodes, fields, found, whole_windows):
                return Strip(part, axis, at_strip, extents, fields, tiles, main, weights)
    raise UnprobedError("its operators refuse images of the size of a strip")


def _moves_batch(locality: Locality, name: str) -> bool:
    """Whether a permutation puts another dim in front."""
    rank = len(locality.value(name).shape)
    leaves = pytree.tree_leaves(locality.nodes[name].args[1:])
    dims = [dim % rank for dim in leaves if isinstance(dim, int)]
    is_permuted = locality.verdicts[name].operator == "aten::permute" and dims[:1] != [0]
    return is_permuted or (locality.verdicts[name].operator == "aten::transpose" and 0 in dims)


def verdicts_at(part: Excerpt, extents: Mapping[str, tuple[int, ...]]) -> Locality | None:
    """The verdicts at these extents of the leaves with two batch entries; None where an operator refuses them."""
    shapes = {leaf: part.leaf_shape(leaf, 2, sizes) for leaf, sizes in extents.items()}
    try:
        with fake_tensor_log_silenced():
            return part.at(shapes)
    except FxstreamError:
        return None


def extents_at(real: Mapping[str, tuple[int, ...]], extents: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Extents of all leaves where the largest has `extents`, rounded up; a broadcast axis stays one."""
    full = [max(sizes) for sizes in zip(*real.values(), strict=True)]
    return {
        leaf: tuple(
            1 if own == 1 < most else -(-extent * own // most)
            for own, most, extent in zip(sizes, full, extents, strict=True)
        )
        for leaf, sizes in real.items()
    }


def _followed(
    part: Excerpt,
    chains: Mapping[str, tuple[ExtentChain, ...]],
    extents: Mapping[str, tuple[int, ...]],
    main: str,
) -> dict[str, tuple[int, ...]]:
    """The extents with those of a leaf that joins a map pixel by pixel exactly as many as the map has."""
    found = dict(extents)
    for name in part.segment.nodes:
        footprint = part.locality.footprint(name)
        if footprint.evaluation is not Evaluation.POINTWISE or name not in chains:
            continue
        result = tuple(_applied(chain, e) for chain, e in zip(chains[name], extents[main], strict=True))
        for read in footprint.reads:
            if read.value.name in found and read.value.name != main:
                pairs = zip(read.maps, result, strict=True)
                found[read.value.name] = tuple(1 if axis_map == BROADCAST else e for axis_map, e in pairs)
    return found


def _extents_of_nodes(chains: Chains, extents: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the formulas of the rules expect of every node at these extents of the leaves.

    The most that follows from any leaf: one with a broadcast axis says nothing of that axis.
    """
    found = dict(extents)
    for leaf, of_node in chains.items():
        for name, per_axis in of_node.items():
            own = tuple(_applied(chain, e) for chain, e in zip(per_axis, extents[leaf], strict=True))
            found[name] = tuple(map(max, own, found.get(name, own)))
    return found


def _all_nodes_read(
    locality: Locality,
    nodes: Sequence[str],
    claims: Mapping[str, Fields],
    extents: Mapping[str, tuple[int, ...]],
    whole_windows: bool,
) -> bool:
    """Whether every node has pixels at these extents of nodes and leaves, and reads pixels that are not padding.

    A max pooling must find a whole window: torch's gradient of one without a real pixel writes out of bounds.
    """
    if any(min(extents[name], default=1) < 1 for name in nodes if name in extents):
        return False
    for leaf, fields in claims.items():
        for name in nodes:
            if name in fields and not all(map(_reads_real, fields[name], extents[name], extents[leaf])):
                return False
    return all(
        extents[read.value.name][k] > (axis_map.last - axis_map.first) // axis_map.den
        for window in map(locality.footprint, nodes)
        if whole_windows or window.fill == -math.inf
        for read in window.reads
        for k, axis_map in enumerate(read.maps)
    )


def _reads_real(field: ReceptiveField, extent: int, extent_in: int) -> bool:
    """Whether some pixel has a receptive field that is not all padding."""
    return any(len(field.read(Interval(o, o + 1)).clip(extent_in)) for o in range(extent))


def _applied(chain: ExtentChain, extent: int) -> int:
    for step in chain:
        extent = step.of(extent)
    return extent


def _margin(locality: Locality, nodes: Sequence[str], fields: Fields, axis: int) -> int:
    """How wide the NaN surroundings must be for no window to straddle them, nor to step over them."""
    widest = 1
    for name in nodes:
        for read in locality.footprint(name).reads:
            if read.value.name in fields:
                own = read.maps[axis]
                span = (own.last - own.first) // own.den + 1 + math.ceil(own.num / own.den)
                widest = max(widest, math.ceil(span * fields[read.value.name][axis].stride))
    return widest


def synthetic_weight(part: Excerpt, name: str) -> torch.Tensor:
    """A synthetic weight: every element is 1/n of its kernel, so that averages stay averages."""
    shape, dtype = part.small_shape(name, 2), part.type_of(name)
    fan = math.prod(shape[1:]) if len(shape) > 1 else 1
    return torch.full(shape, 1.0 / fan if dtype.is_floating_point else 0, dtype=dtype)
