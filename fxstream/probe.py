"""The probe: what the algebra claims, held against the real operators.

A part of the graph is run on thin strips, one stream axis at a time, with synthetic weights; its own weights are
neither read nor changed. Nothing that is measured goes through the rules.

NOTE [what is measured]
1. Algorithm 2 of the paper passes a tile of ones through kernels of 1/n and counts, at every node, the values at
   the border that are below the maximum; and the same for gradients on the way back. What the border takes away
   shrinks threefold with every 3-tap layer and is lost in rounding: of 40 layers in float32 the count finds 25.
   Here the surroundings of the tile are NaN instead of zero: what they reach is NaN, at any
   depth, and the count of the remaining valid values is exact.
2. Forward, per node: the first and last valid pixel of two tiles. The first tile ends exactly with the claimed
   box of an output pixel, the second one pixel inside it: NaN just outside the box must not reach the pixel, NaN
   on its edge must (the poison probe).
3. Backward, per node: the gradient of the outputs is NaN in the first half of the strip, and in a second run in
   the other half. What is NaN in a node's gradient is what that half depends on, to the pixel of that node. It is
   held against the boxes that the tile loop uses. Each operator is differentiated on ramps that rise and
   fall along the axis, so that a maximum lies at either edge of its window.
4. Values: every distinct operator is evaluated in tiles as the stream would, with random integers in float64, and
   compared with the plain operator: fill values, divisors and crops.
5. An operator that does not carry NaN (a comparison, a bool), or whose rule says that it claims more than it
   reads, blurs what lies behind it: there the claim may be larger than the measurement, never smaller. The
   report counts such nodes.
6. A tile without valid interior is an error, not an overlap of zero.

Reference: Pinckaers, van Ginneken, Litjens (StreamingCNN), section III-C and Algorithm 2.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxstream.algebra import ExtentChain, Fields, extent_chains, receptive_fields
from fxstream.box import EMPTY, Box, Interval
from fxstream.demand import AxisWalk, Segment, make_segment
from fxstream.errors import FxstreamError, ProbeError, RuleError
from fxstream.excerpt import Excerpt, excerpt
from fxstream.locality import Locality
from fxstream.receptive_field import ReceptiveField
from fxstream.rules import Kind
from fxstream.sizes import Meta, Shape, fold_integers
from fxstream.tile_program import tile_program

__all__ = ["Mismatch", "ProbeReport", "probe"]

Chains = Mapping[str, Mapping[str, tuple[ExtentChain, ...]]]
"""Per leaf and node, the extent formulas along each axis."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Extents across the strip, the first that the part accepts."""
PERIODS = (1, 64)
"""The strip's extents agree with the real ones modulo one of these, for networks that need certain sizes."""
TOLERANCE = 1e-9
"""Relative difference between a tile's values and the plain operator's, in float64."""
DIRECTIONS = ("forward", "values", "backward")
"""The measurements, in the order in which their mismatches are told."""
RAMPS = ((0.5, 1.0), (-1.0, -0.5), (2.0, 4.0), (-4.0, -2.0))
"""Ranges of the ramps that operators are differentiated on; the later ones only where no gradient passed."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One disagreement: where, along which axis, in which of the three measurements, claimed and measured.

    A wrong claim shows forward at its own operator and backward at the operator that it reads.
    """

    node: str
    operator: str
    module: str
    source: str
    axis: int
    direction: str
    what: str
    claimed: str
    measured: str

    def __str__(self) -> str:
        place = f"`{self.module or self.node}` ({self.operator})" + (f" at {self.source}" if self.source else "")
        what = f"axis {self.axis}, {self.direction}, {self.what}"
        return f"{place}, {what}: claimed {self.claimed}, measured {self.measured}"


@dataclass(frozen=True, slots=True, repr=False)
class ProbeReport:
    """What the probe of one part of the graph found.

    `measured` counts the nodes whose claims were checked for equality, `blurred` those checked one-sidedly;
    `unprobed` says why nothing could be measured, or is empty.
    """

    part: str
    nodes: int
    measured: int
    blurred: int
    mismatches: tuple[Mismatch, ...]
    unprobed: str
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether something was measured and no claim was contradicted."""
        return not self.mismatches and not self.unprobed

    def __str__(self) -> str:
        if self.unprobed:
            return f"{self.part}: not probed, {self.unprobed}"
        verdict = "agree with the algebra" if self.agrees else f"{len(self.mismatches)} MISMATCHES"
        blurred = f", {self.blurred} one-sidedly" if self.blurred else ""
        lines = [f"{self.part}: {self.measured} of {self.nodes} nodes measured{blurred}, {verdict}"]
        return "\n".join([*lines, *(f"  {mismatch}" for mismatch in self.mismatches[:8])])

    __repr__ = __str__

    def raise_on_mismatch(self) -> None:
        """Raises `ProbeError`, naming the first mismatch in the order of the graph, if there is one."""
        if self.mismatches:
            raise ProbeError(
                f"the probe contradicts the rules: {self.mismatches[0]}. Nothing was streamed. If the rule is"
                " your own, correct what it reads; otherwise this is a defect of fxstream: please report it."
            )


def probe(locality: Locality, nodes: Sequence[str], part: str = "") -> ProbeReport:
    """Measure the claims about `nodes` (local, connected, in the order of the graph) on the real operators.

    Runs on the CPU, whose operators do not mix NaN into other pixels, and in a thread of its own, so that modes
    of the caller (autocast, checkpointing, a default device) do not reach it. Never raises for what it finds: see
    `ProbeReport.raise_on_mismatch`.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_probe, locality, nodes, part).result()


def _probe(locality: Locality, nodes: Sequence[str], part: str) -> ProbeReport:
    started = time.perf_counter()
    segment = make_segment(locality, part, tuple(nodes))
    unprobed = ""
    try:
        for whole_windows in (False, True):
            found = _measured(locality, segment, whole_windows)
            if not found.mismatches:
                break
    except (_UnprobedError, RuleError) as reason:
        found, unprobed = _Findings(locality), str(reason)
    blurred = len(found.blurred)
    ordered = sorted(found.mismatches, key=lambda m: (DIRECTIONS.index(m.direction), nodes.index(m.node)))
    seconds = time.perf_counter() - started
    measured = 0 if unprobed else len(nodes) - blurred
    return ProbeReport(part, len(nodes), measured, blurred, tuple(ordered), unprobed, seconds)


def _measured(locality: Locality, segment: Segment, whole_windows: bool) -> _Findings:
    """The findings on strips of the least width.

    On a strip narrower than a dilated window all taps may lie in padding, which looks like a claim that is too
    large. So what is found there counts only if it is found on a strip that holds whole windows too.
    """
    found = _Findings(locality)
    part = excerpt(locality, segment, torch.float32)
    weights = {name: _weight(part, name) for name in segment.smalls}
    for axis in range(len(locality.footprint(segment.nodes[0]).dims)):
        strip = _strip(part, axis, weights, whole_windows)
        _forward(strip, found)
        _backward(strip, found)
    _values_in_tiles(locality, segment, found)
    return found


class _UnprobedError(FxstreamError):
    """Why a part cannot be run on a strip."""


@dataclass
class _Findings:
    locality: Locality
    mismatches: list[Mismatch] = field(default_factory=list)
    blurred: set[str] = field(default_factory=set)

    def add(self, node: str, axis: int, direction: str, what: str, claimed: object, measured: object) -> None:
        verdict = self.locality.verdicts[node]
        place = (verdict.node, verdict.operator, verdict.module, verdict.source)
        self.mismatches.append(Mismatch(*place, axis, direction, what, str(claimed), str(measured)))


@dataclass(frozen=True, slots=True)
class _Strip:
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
        shape = _shape_of(self.locality, name)
        return shape[_dims(self.locality, name)[self.axis]]

    def tile_of(self, leaf: str, tile: Interval) -> Interval:
        """The interval of another leaf that shows the same part of the image as `tile` of the main leaf."""
        own, main = self.leaf_extents[leaf][self.axis], self.leaf_extents[self.main][self.axis]
        return Interval(tile.start * own // main, tile.stop * own // main)


def _dims(locality: Locality, name: str) -> tuple[int, ...]:
    value = locality.values[name]
    return (value[0] if isinstance(value, tuple) else value).dims


def _shape_of(locality: Locality, name: str) -> tuple[int, ...]:
    value = locality.values[name]
    return (value[0] if isinstance(value, tuple) else value).shape


def _strip(part: Excerpt, axis: int, weights: Mapping[str, torch.Tensor], whole_windows: bool) -> _Strip:
    """The smallest strip along `axis` that shows every claim, and the tiles on it."""
    nodes = part.segment.nodes
    real = {leaf: _leaf_extents(part.locality, leaf, dims) for leaf, dims in part.segment.leaves}
    main = max(real, key=lambda leaf: math.prod(real[leaf]))
    axes = len(real[main])
    if any(0 in dims for _, dims in part.segment.leaves):
        raise _UnprobedError("its images have no batch dim in front")
    claims = {leaf: receptive_fields(part.locality, nodes, leaf) for leaf in real}
    known = [fields[axis] for node, fields in claims[main].items() if node in nodes]
    if not known:
        raise _UnprobedError("no node has a receptive field in its largest input")
    chains = {leaf: extent_chains(part.locality, nodes, leaf) for leaf in real}
    deepest = max(known, key=lambda f: (f.stride, f.size))
    margin = _margin(part, claims[main], axis)
    stride = max(math.ceil(f.stride) for f in known)
    start = margin + (deepest.lows[0] - margin) % stride
    inside = max(f.size for f in known) + 3 * stride + 2
    stop = start + inside
    stop += (deepest.highs[-1] + 1 - stop) % stride
    tiles = Interval(start, stop), Interval(start + 1, stop - 1)
    least = stop + margin
    for period in PERIODS:
        for width in WIDTHS:
            wanted = [least if k == axis else width for k in range(axes)]
            extents = _extents_at(real, [w + (e - w) % period for w, e in zip(wanted, real[main], strict=True)])
            expected = _extents_of_nodes(chains, extents)
            if not _all_nodes_read(part.locality, nodes, claims, expected, whole_windows):
                continue
            shapes = {leaf: part.leaf_shape(leaf, 2, extents[leaf]) for leaf in real}
            try:
                with _quiet():
                    at_strip = part.at(shapes)
            except FxstreamError:
                continue
            if any(_shape_of(at_strip, name)[0] % 2 for name in nodes):
                raise _UnprobedError("it mixes the images of a batch")
            if any(at_strip.verdicts[name].kind is not Kind.LOCAL for name in nodes):
                continue
            fields = {leaf: receptive_fields(at_strip, nodes, leaf) for leaf in real}
            found = extents | {name: _leaf_extents(at_strip, name, _dims(at_strip, name)) for name in nodes}
            if _all_nodes_read(at_strip, nodes, fields, found, whole_windows):
                return _Strip(part, axis, at_strip, extents, fields, tiles, main, weights)
    raise _UnprobedError("its operators refuse images of the size of a strip")


def _leaf_extents(locality: Locality, leaf: str, dims: tuple[int, ...]) -> tuple[int, ...]:
    shape = _shape_of(locality, leaf)
    return tuple(shape[d] for d in dims)


def _extents_at(real: Mapping[str, tuple[int, ...]], extents: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Extents of all leaves where the largest has `extents`, rounded up; a broadcast axis stays one."""
    full = [max(sizes) for sizes in zip(*real.values(), strict=True)]
    return {
        leaf: tuple(
            1 if own == 1 < most else -(-extent * own // most)
            for own, most, extent in zip(sizes, full, extents, strict=True)
        )
        for leaf, sizes in real.items()
    }


def _extents_of_nodes(chains: Chains, extents: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What the formulas of the rules expect of every node at these extents of the leaves."""
    found = dict(extents)
    for leaf, of_node in chains.items():
        for name, per_axis in of_node.items():
            found[name] = tuple(_applied(chain, e) for chain, e in zip(per_axis, extents[leaf], strict=True))
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
        extents[read.value.name][k] > axis_map.last - axis_map.first
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


def _margin(part: Excerpt, fields: Fields, axis: int) -> int:
    """How wide the NaN surroundings must be for no window to straddle them, nor to step over them."""
    widest = 1
    for name in part.segment.nodes:
        for read in part.locality.footprint(name).reads:
            if read.value.name in fields:
                span = read.maps[axis].last - read.maps[axis].first + 1 + read.maps[axis].num
                widest = max(widest, math.ceil(span * fields[read.value.name][axis].stride))
    return widest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's own log of operators that refuse fake tensors, off: a refused size is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _weight(part: Excerpt, name: str) -> torch.Tensor:
    """A synthetic weight: every element is 1/n of its kernel, so that averages stay averages."""
    shape, dtype = _shape_of(part.locality, name), part.type_of(name)
    fan = math.prod(shape[1:]) if len(shape) > 1 else 1
    return torch.full(shape, 1.0 / fan if dtype.is_floating_point else 0, dtype=dtype)


class _Runner(fx.Interpreter):
    """Runs an excerpt node by node and hands every local node's value to `seen`."""

    def __init__(self, strip: _Strip, found: _Findings) -> None:
        super().__init__(strip.part.module)
        self.extra_traceback = False
        self._strip, self._found = strip, found
        self._nodes = set(strip.part.segment.nodes)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._nodes:
            _compare_forward(self._strip, n, value, self._found)
        return value


@torch.no_grad()
def _forward(strip: _Strip, found: _Findings) -> None:
    """Rule 2: the valid interval of every node, for every phase."""
    inputs = []
    for leaf, dims in strip.part.segment.leaves:
        shape = strip.part.leaf_shape(leaf, 2, strip.leaf_extents[leaf])
        image = torch.full(shape, math.nan, dtype=strip.part.type_of(leaf))
        if not image.is_floating_point():
            raise _UnprobedError(f"its input `{leaf}` is not floating")
        for entry, tile in enumerate(strip.tiles):
            own = strip.tile_of(leaf, tile)
            image[entry].narrow(dims[strip.axis] - 1, own.start, len(own)).fill_(1.0)
        inputs.append(image)
    _Runner(strip, found).run(*inputs, *strip.weights.values())


def _compare_forward(strip: _Strip, node: fx.Node, value: Any, found: _Findings) -> None:
    name = node.name
    fields = {leaf: fields[name] for leaf, fields in strip.fields.items() if name in fields}
    if not isinstance(value, torch.Tensor):
        return
    known = [name for name in (given.name for given in node.all_input_nodes) if name in found.blurred]
    if known or not value.is_floating_point() or not fields or not strip.locality.footprint(name).tight:
        found.blurred.add(name)
    if not value.is_floating_point() or not fields:
        return
    dim = _dims(strip.locality, name)[strip.axis]
    poisoned = _poisoned(value, dim)
    for entry, tile in enumerate(strip.tiles):
        claimed = _claimed_valid(strip, fields, tile, value.shape[dim])
        if not len(claimed):
            continue
        measured = _valid_around(poisoned[entry], (claimed.start + claimed.stop - 1) // 2)
        if measured == claimed:
            continue
        smaller = measured.start > claimed.start or measured.stop < claimed.stop
        if not smaller and (name in found.blurred or not _carries_nan(strip, node)):
            found.blurred.add(name)
            return
        lost = [(v.start, value.shape[dim] - v.stop) if len(v) else "all" for v in (claimed, measured)]
        found.add(name, strip.axis, "forward", f"pixels invalid at the border of a tile {tile}", *lost)
        found.blurred.add(name)
        return


def _poisoned(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """For each of the two batch entries, which pixels along `dim` hold a NaN anywhere; a sum carries it along."""
    entries = tensor.unflatten(0, (2, -1))
    sums: torch.Tensor = entries.sum([d for d in range(1, entries.ndim) if d != dim + 1])
    return sums.isnan()


def _claimed_valid(
    strip: _Strip, fields: Mapping[str, tuple[ReceptiveField, ...]], tile: Interval, extent: int
) -> Interval:
    """The pixels whose receptive field lies in the tile, by the algebra."""
    start, stop = 0, extent
    for leaf, axes in fields.items():
        own, of = strip.tile_of(leaf, tile), axes[strip.axis]
        if not of.advance:
            continue
        first = (own.start - of.lows[0]) * of.period // of.advance - 2 * of.period
        while of.low(first) < own.start:
            first += 1
        last = (own.stop - 1 - of.highs[0]) * of.period // of.advance + 2 * of.period
        while of.high(last) >= own.stop:
            last -= 1
        start, stop = max(start, first), min(stop, last + 1)
    return Interval(start, stop) if start < stop else EMPTY


def _valid_around(poisoned: torch.Tensor, middle: int) -> Interval:
    """The run of valid pixels around `middle`; empty where `middle` itself is not valid."""
    bad = poisoned.nonzero().flatten().tolist()
    if middle in bad:
        return EMPTY
    before = [b for b in bad if b < middle]
    after = [b for b in bad if b > middle]
    return Interval(before[-1] + 1 if before else 0, after[0] if after else len(poisoned))


def _carries_nan(strip: _Strip, node: fx.Node) -> bool:
    """Whether the operator, given nothing but NaN, returns nothing but NaN."""
    poison = {
        given.name: torch.full(_shape_of(strip.locality, given.name), math.nan)
        for given in node.all_input_nodes
        if isinstance(strip.locality.metas[given.name], Shape) and _dims(strip.locality, given.name)
    }
    try:
        with torch.no_grad():
            results = pytree.tree_leaves(_call(strip, node, poison))
    except RuntimeError:
        return False
    return all(bool(r.isnan().all()) for r in results if isinstance(r, torch.Tensor) and r.is_floating_point())


def _call(strip: _Strip, node: fx.Node, given: Mapping[str, Any]) -> Any:
    """The operator on these tensors, with synthetic weights for the rest."""
    args, kwargs = fold_integers(node, strip.locality.metas)

    def tensor_of(n: fx.Node) -> Any:
        return given[n.name] if n.name in given else strip.weights[n.name]

    assert callable(node.target)
    return node.target(*map_arg(args, tensor_of), **map_arg(kwargs, tensor_of))


@torch.enable_grad()
def _backward(strip: _Strip, found: _Findings) -> None:
    """Rule 3: which pixels of every node the first half of the outputs depends on, and which the second half.

    Entry 0 is NaN in the gradient of the first half and rises along the axis, entry 1 is NaN in that of the second
    half and falls.
    """
    part, metas = strip.part, strip.locality.metas
    segment = part.segment
    extents = {output: strip.extent(output) for output in segment.outputs}
    halves = [Interval(0, e // 2) for e in extents.values()], [Interval(e // 2, e) for e in extents.values()]
    walk = AxisWalk(strip.locality, segment, strip.axis)
    claims = [walk.boxes(half) for half in halves]
    gradients: dict[str, Any] = {}
    for output, extent in extents.items():
        gradient = torch.ones(_shape(metas, output), dtype=part.dtype)
        dim = _dims(strip.locality, output)[strip.axis]
        first, second = gradient.chunk(2)
        first.narrow(dim, 0, extent // 2).fill_(math.nan)
        second.narrow(dim, extent // 2, extent - extent // 2).fill_(math.nan)
        gradients[output] = gradient
    leaves = {leaf for leaf, _ in segment.leaves}
    blurred: set[str] = set()
    for node in reversed(part.module.graph.nodes):
        if node.name not in leaves and node.name not in segment.nodes:
            continue
        gradient = gradients.pop(node.name, None)
        meta = metas[node.name]
        if gradient is None or (isinstance(meta, Shape) and not meta.dtype.is_floating_point):
            blurred.add(node.name)
        elif isinstance(meta, Shape):
            claimed = [claim.get(node.name, EMPTY) for claim in claims]
            _compare_backward(strip, node.name, gradient, claimed, blurred, found)
        if node.name in leaves:
            continue
        sent = _pulled_back(strip, node, gradient, metas) if gradient is not None else {}
        for given in node.all_input_nodes:
            if given.name in sent:
                known = gradients.get(given.name)
                gradients[given.name] = _summed(known, sent[given.name])
            loose = node.name in blurred or not strip.locality.footprint(node.name).tight
            if loose or given.name not in sent or _is_closed(gradient, sent[given.name]):
                blurred.add(given.name)
    found.blurred |= blurred & set(segment.nodes)


def _shape(metas: Mapping[str, Meta], name: str) -> tuple[int, ...]:
    meta = metas[name]
    assert isinstance(meta, Shape)
    return meta.shape


def _dtype(metas: Mapping[str, Meta], name: str) -> torch.dtype:
    meta = metas[name]
    assert isinstance(meta, Shape)
    return meta.dtype


def _compare_backward(
    strip: _Strip,
    name: str,
    gradient: torch.Tensor,
    claims: Sequence[Interval],
    blurred: set[str],
    found: _Findings,
) -> None:
    dim = _dims(strip.locality, name)[strip.axis]
    poisoned = _poisoned(gradient, dim)
    extent = gradient.shape[dim]
    reached = [entry.nonzero().flatten().tolist() for entry in poisoned]
    measured = (reached[0][-1] + 1 if reached[0] else 0, reached[1][0] if reached[1] else extent)
    claimed = (claims[0].stop, claims[1].start if len(claims[1]) else extent)
    if (measured[0] == 0 and claimed[0] == 1) or measured[1] == extent == claimed[1] + 1:
        # A half that reads nothing but padding: a tile then holds the nearest real pixel (`Interval.nearest`).
        claimed = (min(claimed[0], measured[0]), max(claimed[1], measured[1]))
    if measured == claimed or name not in strip.part.segment.nodes:
        return
    more = measured[0] > claimed[0] or measured[1] < claimed[1]
    if _is_item(strip.part, name) and not more:
        return  # a tile holds the same box of every result of one operator, the hull of what any is needed for
    if more or name not in blurred:
        halves = f"pixels that the first half of the outputs reads up to, and the second half from, of {extent}"
        found.add(name, strip.axis, "backward", halves, claimed, measured)
    blurred.add(name)


def _is_item(part: Excerpt, name: str) -> bool:
    return part.locality.footprint(name).target is operator.getitem


def _summed(known: Any, sent: Any) -> Any:
    """The sum of two gradients, of one tensor or of several."""
    if known is None:
        return sent
    if not isinstance(known, list):
        return known + sent
    return [b if a is None else a if b is None else a + b for a, b in zip(known, sent, strict=True)]


def _pulled_back(strip: _Strip, node: fx.Node, gradient: Any, metas: Mapping[str, Meta]) -> dict[str, Any]:
    """The gradients that the operator sends to its spatial inputs; none where it is not differentiable.

    A gate that is closed on one range of values sends nothing, so that further ranges are tried.
    """
    spatial = [n for n in node.all_input_nodes if _is_spatial(strip, n.name)]
    if node.target is operator.getitem:
        several, index = node.args
        assert isinstance(several, fx.Node)
        assert isinstance(index, int)
        meta = metas[several.name]
        return {several.name: [gradient if k == index else None for k in range(len(_several(meta)))]}
    sent: dict[str, Any] = {}
    for low, high in RAMPS:
        ramps = {n.name: _ramp(strip, n.name, metas, low, high) for n in spatial}
        wanted = {name: ramp for name, ramp in ramps.items() if ramp.requires_grad}
        results = _call(strip, node, ramps)
        pairs = [
            (result, given)
            for result, given in zip(
                pytree.tree_leaves(results), gradient if isinstance(gradient, list) else [gradient], strict=False
            )
            if given is not None and isinstance(result, torch.Tensor) and result.requires_grad
        ]
        if not pairs or not wanted:
            return sent
        outputs, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True)
        for name, gradient_in in zip(wanted, found, strict=True):
            if gradient_in is not None:
                sent[name] = _summed(sent.get(name), gradient_in)
        if all(name in sent and bool(sent[name].sum().isnan()) for name in wanted):
            break
    return sent


def _is_closed(gradient: Any, sent: Any) -> bool:
    """Whether nothing of a NaN gradient passed to an input, as at a gate that no range of values opens."""
    given, passed = ([t for t in (g if isinstance(g, list) else [g]) if t is not None] for g in (gradient, sent))
    return any(bool(t.sum().isnan()) for t in given) and not any(bool(t.sum().isnan()) for t in passed)


def _several(meta: Meta) -> tuple[Any, ...]:
    return meta if isinstance(meta, tuple) else (meta,)


def _is_spatial(strip: _Strip, name: str) -> bool:
    return bool(strip.locality.values.get(name)) and bool(_dims(strip.locality, name))


def _ramp(strip: _Strip, name: str, metas: Mapping[str, Meta], low: float, high: float) -> torch.Tensor:
    """Values that rise along the axis in entry 0 and fall in entry 1; ones for a type without gradient."""
    shape, dtype = _shape(metas, name), _dtype(metas, name)
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    dim = _dims(strip.locality, name)[strip.axis]
    line = torch.linspace(low, high, shape[dim], dtype=dtype)
    lines = torch.stack([line, line.flip(0)])
    lines = lines.view([2 if d == 0 else -1 if d == dim else 1 for d in range(len(shape))])
    return lines.repeat_interleave(shape[0] // 2, 0).expand(shape).contiguous().requires_grad_()


def _values_in_tiles(locality: Locality, segment: Segment, found: _Findings) -> None:
    """Rule 4: every distinct operator in three tiles, at both borders and between, against itself on the whole."""
    known: set[object] = set()
    originals = {node.name: node for node in locality.graph.nodes}
    for name in segment.nodes:
        node = originals[name]
        signature = _signature(node, locality)
        if node.target is not operator.getitem and signature not in known:
            known.add(signature)
            items = tuple(user.name for user in node.users if user.name in segment.nodes)
            several = isinstance(locality.metas[name], tuple)
            _compare_tiles(locality, (name, *items) if several else (name,), found)


def _signature(node: fx.Node, locality: Locality) -> object:
    """What the evaluation on a box can depend on: the operator, its numbers, and the shapes of its kernels."""
    args, kwargs = fold_integers(node, locality.metas)
    numbers = [
        repr(leaf)
        for leaf in pytree.tree_leaves((args, kwargs), is_leaf=lambda x: x is None)
        if not isinstance(leaf, fx.Node)
    ]
    ranks = [
        (len(_shape_of(locality, n.name)), _dims(locality, n.name), _shape_of(locality, n.name)[2:])
        if not _dims(locality, n.name)
        else (len(_shape_of(locality, n.name)), _dims(locality, n.name), ())
        for n in node.all_input_nodes
        if isinstance(locality.metas.get(n.name), (Shape, tuple))
    ]
    return node.target, tuple(numbers), tuple(ranks)


def _compare_tiles(locality: Locality, names: tuple[str, ...], found: _Findings) -> None:
    """One operator (with the items of its result) on the whole and in tiles, in float64."""
    name = names[0]
    part = excerpt(locality, make_segment(locality, name, names), torch.float64)
    at_size = _at_small_size(part)
    if at_size is None or any(at_size.verdicts[n].kind is not Kind.LOCAL for n in names):
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        return _integers(_shape_of(at_size, name), part.type_of(name), generator)

    inputs = [drawn(leaf) for leaf, _ in part.segment.leaves]
    smalls = [drawn(small).abs() + 1 for small in part.segment.smalls]
    with torch.no_grad():
        plain = part.module(*inputs, *smalls)
    axes = range(len(_dims(at_size, part.segment.outputs[0])))
    walks = [AxisWalk(at_size, part.segment, axis) for axis in axes]
    for place in range(3):
        owned = [[_third(at_size, output, axis, place) for output in part.segment.outputs] for axis in axes]
        tiles = [walk.tile(tuple(own)) for walk, own in zip(walks, owned, strict=True)]
        program = tile_program(at_size, part.segment, tiles)
        cuts = []
        for (leaf, dims), image in zip(part.segment.leaves, inputs, strict=True):
            box = Box(tuple(tile.boxes.get(leaf, EMPTY) for tile in tiles))
            cuts.append(image[box.index(dims, image.ndim)])
        try:
            with torch.no_grad():
                results = program(*cuts, *smalls)
        except RuntimeError as error:
            found.add(name, 0, "values", "a tile of it", "can be evaluated", str(error).splitlines()[0])
            return
        for k, output in enumerate(part.segment.outputs):
            dims = _dims(at_size, output)
            box = Box(tuple(owned[axis][k] for axis in axes))
            if results[k] is None:
                continue
            wanted = plain[k][box.index(dims, plain[k].ndim)]
            if not _same_values(results[k], wanted):
                found.add(name, 0, "values", f"the tile {box}", _preview(results[k]), _preview(wanted))
                return


def _at_small_size(part: Excerpt) -> Locality | None:
    """The verdicts at a small size at which the operator yields a few pixels; None if it refuses all."""
    for extent in (9, 12, 16, 33, 64, 128):
        real = {leaf: _leaf_extents(part.locality, leaf, dims) for leaf, dims in part.segment.leaves}
        extents = _extents_at(real, [extent] * len(next(iter(real.values()))))
        shapes = {leaf: part.leaf_shape(leaf, 2, sizes) for leaf, sizes in extents.items()}
        try:
            with _quiet():
                at_size = part.at(shapes)
        except FxstreamError:
            continue
        outputs = [_leaf_extents(at_size, o, _dims(at_size, o)) for o in part.segment.outputs]
        if all(min(sizes, default=0) > 2 for sizes in outputs):
            return at_size
    return None


def _integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Small random integers; in the first half of dim 0 all negative, so that a fill value shows."""
    drawn = torch.randint(-4, 5, shape, generator=generator)
    half = max(1, shape[0] // 2) if shape else 0
    if shape:
        drawn[:half] = -drawn[:half].abs() - 1
    return drawn.to(dtype)


def _third(locality: Locality, output: str, axis: int, place: int) -> Interval:
    """The first pixel, all between, or the last pixel of an output along an axis."""
    extent = _leaf_extents(locality, output, _dims(locality, output))[axis]
    return (Interval(0, 1), Interval(1, extent - 1), Interval(extent - 1, extent))[place]


def _same_values(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _preview(tensor: torch.Tensor) -> str:
    numbers = [f"{x:g}" for x in tensor.flatten()[:4].tolist()]
    return f"{list(tensor.shape)} [{', '.join(numbers)}{', ...' if tensor.numel() > 4 else ''}]"
