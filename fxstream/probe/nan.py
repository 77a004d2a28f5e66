"""NaN around a tile, forward, and in half of the gradient, backward: rules 2, 3 and 5 of the NOTE in `probe`."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxstream.geometry.box import EMPTY, Interval
from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.graph.typed_graph import TypedNode
from fxstream.probe.findings import MIXES_IMAGES, Findings, UnprobedError
from fxstream.probe.spread import mixes_images, nodes_with_nan, whole_box
from fxstream.probe.strip import Strip
from fxstream.tiling.axes.bounds import BoundsPass

__all__ = ["poison_backward", "poison_forward"]

LARGEST = 1e3
"""Of a gradient, which through many layers would become infinite, and so NaN where no half sends one."""
RAMPS = ((0.5, 1.0), (-1.0, -0.5), (2.0, 4.0), (-4.0, -2.0))
"""Ranges of the ramps that windows are differentiated on; the later ones only where no gradient passed."""
LEVELS = tuple((level, level) for level in (0.5, -0.5, 0.05, -0.05, 1.5, -1.5, 4.0, -4.0, 10.0, -10.0))
"""The same for pointwise operators: at one level a gate is open or closed everywhere."""


class _Runner(fx.Interpreter):
    """Runs a subgraph and compares the value of every local node with its claim as soon as it is there."""

    def __init__(self, strip: Strip, findings: Findings) -> None:
        super().__init__(strip.part.module)
        self.extra_traceback = False
        self._strip, self._findings = strip, findings
        self._nodes = set(strip.part.segment.nodes)
        self._unclaimed = strip.unclaimed()
        self._separates = strip.part.separates_channels()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._unclaimed:
            self._findings.blurred_forward.add(n.name)
        elif n.name in self._nodes:
            _compare_forward(self._strip, n, value, self._findings)
            return self._spread(n.name, value)
        return value

    def _spread(self, name: str, value: Any) -> Any:
        """The value with NaN in every channel of a pixel that has it in one, where these are taken apart later."""
        is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not self._separates or not is_real or name not in self._strip.batch:
            return value
        dim, batch = self._strip.graph.value(name).dims[self._strip.axis], self._strip.batch[name]
        return whole_box(value, _poisoned(value, batch, dim), batch, dim)


@torch.no_grad()
def poison_forward(strip: Strip, findings: Findings) -> None:
    """Rule 2: the valid interval of every node, for both tiles. Raises `UnprobedError` where they mix."""
    before = len(findings.mismatches)
    _Runner(strip, findings).run(*_inputs(strip, math.nan), *strip.weights.values())
    if suspected := findings.mismatches[before:]:
        ones = _inputs(strip, 1.0)
        nodes = nodes_with_nan(strip, ones)
        findings.mismatches[before:] = [one for one in suspected if one.node not in nodes]
        if len(findings.mismatches) > before and mixes_images(strip, ones, nodes):
            raise UnprobedError(MIXES_IMAGES)


def _inputs(strip: Strip, around: float) -> list[torch.Tensor]:
    """Every spatial input: ones in the tile of each batch entry, and `around` them that number."""
    inputs = []
    for name, dims in strip.part.segment.spatial:
        shape = strip.part.input_shape(name, 2, strip.input_extents[name])
        if (dtype := strip.part.type_of(name)) != strip.part.dtype or name not in strip.batch:
            inputs.append(torch.ones(shape, dtype=dtype))
            continue
        image = torch.full(shape, around, dtype=dtype)
        for entry, tile in enumerate(strip.tiles):
            shown = strip.tile_of(name, tile)
            image[entry].narrow(dims[strip.axis] - 1, shown.start, len(shown)).fill_(1.0)
        inputs.append(image)
    return inputs


def _compare_forward(strip: Strip, node: fx.Node, value: Any, findings: Findings) -> None:
    name, is_map = node.name, isinstance(value, torch.Tensor)
    fields = strip.fields_of(name) if is_map and value.is_floating_point() else {}
    is_blurred = is_map and not (fields and strip.graph.pattern(name).is_tight)
    if is_blurred or any(one.name in findings.blurred_forward for one in node.all_input_nodes):
        findings.blurred_forward.add(name)
    if not fields:
        return
    dim = strip.graph.value(name).dims[strip.axis]
    poisoned = _poisoned(value, strip.batch[name], dim)
    for entry, tile in enumerate(strip.tiles):
        claimed = _claimed_valid(strip, fields, tile, value.shape[dim])
        if not len(claimed):  # inputs of several sizes may leave no pixel that none of them poisons
            findings.blurred_forward.add(name)
            continue
        measured = _valid_around(poisoned[entry], (claimed.start + claimed.stop - 1) // 2)
        if measured == claimed:
            continue
        smaller = measured.start > claimed.start or measured.stop < claimed.stop
        # On a strip this narrow a dilated window may read padding only, though pixels lie between its taps; and
        # crops may leave nothing of the NaN on one side.
        unseen = measured.start in (claimed.start, 0) and measured.stop in (claimed.stop, value.shape[dim])
        if not smaller and (unseen or name in findings.blurred_forward or not _carries_nan(strip, node)):
            findings.blurred_forward.add(name)
            return
        lost = [(v.start, value.shape[dim] - v.stop) if len(v) else "all" for v in (claimed, measured)]
        findings.add(name, strip.axis, "forward", f"pixels invalid at the border of a tile {tile}", *lost)
        findings.blurred_forward.add(name)
        return


def _poisoned(tensor: torch.Tensor, batch: int, dim: int) -> torch.Tensor:
    """For each of the two entries of dim `batch`, which pixels along `dim` hold a NaN; a sum carries it along."""
    entries = tensor.unflatten(batch, (2, -1)).movedim(batch, 0)
    sums: torch.Tensor = entries.sum([d for d in range(1, entries.ndim) if d != dim + 1])
    return sums.isnan()


def _claimed_valid(
    strip: Strip, fields: Mapping[str, tuple[ReceptiveField, ...]], tile: Interval, extent: int
) -> Interval:
    """The pixels whose receptive field lies in the tile, by the algebra."""
    start, stop = 0, extent
    for source, axes in fields.items():
        shown, of = strip.tile_of(source, tile), axes[strip.axis]
        if not of.advance:
            continue
        if shown.start > 0:  # otherwise nothing before the tile is NaN
            first = (shown.start - of.lows[0]) * of.period // of.advance - 2 * of.period
            while of.low(first) < shown.start:
                first += 1
            start = max(start, first)
        if shown.stop < strip.input_extents[source][strip.axis]:
            last = (shown.stop - 1 - of.highs[0]) * of.period // of.advance + 2 * of.period
            while of.high(last) >= shown.stop:
                last -= 1
            stop = min(stop, last + 1)
    return Interval(start, stop) if start < stop else EMPTY


def _valid_around(poisoned: torch.Tensor, middle: int) -> Interval:
    """The run of valid pixels around `middle`; empty where `middle` itself is not valid."""
    bad = poisoned.nonzero().flatten().tolist()
    if middle in bad:
        return EMPTY
    before = [b for b in bad if b < middle]
    after = [b for b in bad if b > middle]
    return Interval(before[-1] + 1 if before else 0, after[0] if after else len(poisoned))


def _carries_nan(strip: Strip, node: fx.Node) -> bool:
    """Whether the operator, or of an item the one that returns it, given nothing but NaN, returns nothing else."""
    if node.target is operator.getitem:
        return _carries_nan(strip, node.args[0])  # type: ignore[arg-type]
    poison = {
        one.name: torch.full(strip.graph.value(one.name).shape, math.nan)
        for one in node.all_input_nodes
        if not strip.graph[one.name].is_tuple and _is_spatial(strip, one.name)
    }
    try:
        with torch.no_grad():
            results = pytree.tree_leaves(_call(strip, node, poison))
    except RuntimeError:
        return False
    return all(bool(r.isnan().all()) for r in results if isinstance(r, torch.Tensor) and r.is_floating_point())


def _call(strip: Strip, node: fx.Node, tensors: Mapping[str, Any]) -> Any:
    """The operator on these tensors, with synthetic weights for the rest."""
    args, kwargs = strip.graph.arguments(node)

    def tensor_of(n: fx.Node) -> Any:
        return tensors[n.name] if n.name in tensors else strip.weights[n.name]

    assert callable(node.target)
    return node.target(*map_arg(args, tensor_of), **map_arg(kwargs, tensor_of))


@torch.enable_grad()
def poison_backward(strip: Strip, findings: Findings) -> None:
    """Rule 3: which pixels of every node the first half of the outputs depends on, and which the second half.

    Entry 0 is NaN in the gradient of the first half and rises along the axis, entry 1 is NaN in that of the second
    half and falls.
    """
    segment, claims, blurred = strip.part.segment, _claimed_of_halves(strip), set[str]()
    separates = strip.part.separates_channels()
    gradients: dict[str, Any] = {o: _half_poisoned(strip, o) for o in segment.outputs if o in strip.batch}
    inputs = {name for name, _ in segment.spatial}
    for node in reversed(strip.part.module.graph.nodes):
        if node.name not in inputs and node.name not in segment.nodes:
            continue
        gradient, typed = gradients.pop(node.name, None), strip.graph[node.name]
        if gradient is None or (not typed.is_tuple and not typed.values[0].dtype.is_floating_point):
            blurred.add(node.name)
        elif not typed.is_tuple:
            dim = typed.values[0].dims[strip.axis]
            claimed, batch = [claim.get(node.name, EMPTY) for claim in claims], strip.batch[node.name]
            poisoned = _poisoned(gradient, batch, dim)
            _compare_backward(strip, node.name, poisoned, claimed, blurred, findings)
            gradient = whole_box(gradient, poisoned, batch, dim) if separates else gradient
        if node.name not in inputs:
            _send(strip, typed, gradient, gradients, blurred)
    findings.blurred_backward |= blurred & set(segment.nodes)


def _claimed_of_halves(strip: Strip) -> list[dict[str, Interval]]:
    """What each half of the outputs reads of every node, by the algebra."""
    extents = [strip.extent(output) for output in strip.part.segment.outputs]
    walk = BoundsPass(strip.segment, strip.axis)
    return [walk.boxes([Interval(0, e // 2) for e in extents]), walk.boxes([Interval(e // 2, e) for e in extents])]


def _half_poisoned(strip: Strip, output: str) -> torch.Tensor:
    """The gradient of an output: NaN in the first half of entry 0 and in the second half of entry 1, else one."""
    value, extent = strip.graph.value(output), strip.extent(output)
    gradient, dim = torch.ones(value.shape, dtype=strip.part.dtype), value.dims[strip.axis]
    first, second = gradient.chunk(2, strip.batch[output])
    first.narrow(dim, 0, extent // 2).fill_(math.nan)
    second.narrow(dim, extent // 2, extent - extent // 2).fill_(math.nan)
    return gradient


def _send(strip: Strip, node: TypedNode, gradient: Any, gradients: dict[str, Any], blurred: set[str]) -> None:
    """Add what a node sends to its inputs to their gradients; `blurred` gets those that it cannot show exactly."""
    sent = _pulled_back(strip, node.node, gradient) if gradient is not None else {}
    # Tiles hold the same box of every result of an operator: more than each of them needs.
    is_loose = node.is_tuple or node.name in blurred or not node.pattern.is_tight
    is_poisoned = not is_loose and _is_poisoned(gradient)
    for name in node.inputs:
        if name in sent:
            gradients[name] = _summed(gradients.get(name), sent[name])
        if is_loose or name not in sent or (is_poisoned and not _is_poisoned(sent[name])):
            blurred.add(name)  # nothing passed, as at a gate that no range of values opens


def _compare_backward(
    strip: Strip,
    name: str,
    poisoned: torch.Tensor,
    claims: Sequence[Interval],
    blurred: set[str],
    findings: Findings,
) -> None:
    extent = poisoned.shape[1]
    reached = [entry.nonzero().flatten().tolist() for entry in poisoned]
    measured = (reached[0][-1] + 1 if reached[0] else 0, reached[1][0] if reached[1] else extent)
    claimed = (claims[0].stop, claims[1].start if len(claims[1]) else extent)
    if (measured[0] == 0 and claimed[0] == 1) or measured[1] == extent == claimed[1] + 1:
        # A half that reads nothing but padding: a tile then holds the nearest real pixel (`Interval.nearest`).
        claimed = (min(claimed[0], measured[0]), max(claimed[1], measured[1]))
    if measured == claimed or name not in strip.part.segment.nodes:
        return
    more = measured[0] > claimed[0] or measured[1] < claimed[1]
    if strip.graph.pattern(name).is_item and not more:
        return  # a tile holds the same box of every result of one operator, the hull of what any is needed for
    if more or name not in blurred:
        halves = f"pixels that the first half of the outputs reads up to, and the second half from, of {extent}"
        findings.add(name, strip.axis, "backward", halves, claimed, measured)
    blurred.add(name)


def _summed(total: Any, sent: Any) -> Any:
    """The sum of two gradients, of one tensor or of several."""
    if total is None:
        return sent
    if not isinstance(total, list):
        return total + sent
    return [b if a is None else a if b is None else a + b for a, b in zip(total, sent, strict=True)]


def _pulled_back(strip: Strip, node: fx.Node, gradient: Any) -> dict[str, Any]:
    """The gradients that the operator sends to its spatial inputs; none where it is not differentiable.

    A gate that is closed on one range of values sends nothing, so that further ranges are tried.
    """
    spatial = [n for n in node.all_input_nodes if _is_spatial(strip, n.name)]
    if node.target is operator.getitem:
        several, index = node.args
        assert isinstance(several, fx.Node)
        assert isinstance(index, int)
        count = len(strip.graph[several.name].values)
        return {several.name: [gradient if k == index else None for k in range(count)]}
    sent: dict[str, Any] = {}
    for low, high in LEVELS if strip.graph.pattern(node.name).joins_pixels else RAMPS:
        ramps = {n.name: _ramp(strip, n.name, low, high) for n in spatial}
        differentiable = {name: ramp for name, ramp in ramps.items() if ramp.requires_grad}
        results = _call(strip, node, ramps)
        pairs = [
            (result, part)
            for result, part in zip(
                pytree.tree_leaves(results), gradient if isinstance(gradient, list) else [gradient], strict=False
            )
            if part is not None and isinstance(result, torch.Tensor) and result.requires_grad
        ]
        if not pairs or not differentiable:
            return sent
        outputs, part = zip(*pairs, strict=True)
        try:
            pulled = torch.autograd.grad(outputs, list(differentiable.values()), part, allow_unused=True)
        except RuntimeError:  # an operator of the user without a gradient
            return sent
        for name, gradient_in in zip(differentiable, pulled, strict=True):
            if gradient_in is not None:
                sent[name] = _summed(sent.get(name), gradient_in.where(~(gradient_in.abs() > LARGEST), LARGEST))
        if all(_is_poisoned(sent.get(name)) for name in differentiable):
            break
    return sent


def _is_poisoned(gradient: Any) -> bool:
    """Whether a gradient, of one tensor or of several, has a NaN."""
    parts = gradient if isinstance(gradient, list) else [gradient]
    return any(bool(part.sum().isnan()) for part in parts if part is not None)


def _is_spatial(strip: Strip, name: str) -> bool:
    return bool(strip.graph[name].values) and bool(strip.graph.value(name).dims)


def _ramp(strip: Strip, name: str, low: float, high: float) -> torch.Tensor:
    """Values that rise along the axis in entry 0 and fall in entry 1; ones where it has no gradient or entries."""
    value = strip.graph.value(name)
    shape, dtype = value.shape, value.dtype
    if not dtype.is_floating_point or name not in strip.batch:
        return torch.ones(shape, dtype=dtype)
    batch, dim = strip.batch[name], value.dims[strip.axis]
    line = torch.linspace(low, high, shape[dim], dtype=dtype)
    lines = torch.stack([line, line.flip(0)], 0 if batch < dim else 1)
    lines = lines.view([2 if d == batch else -1 if d == dim else 1 for d in range(len(shape))])
    return lines.repeat_interleave(shape[batch] // 2, batch).expand(shape).contiguous().requires_grad_()
