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
7. Every distinct reduction over space is combined from tiles of random integers, and compared with the operator on
   the whole: its result, and the gradient that it sends to the map.
8. Where a strip would need more memory than there is, each half of its operators gets strips of its own, which are
   shorter, and so on down to single operators.

Reference: Pinckaers, van Ginneken, Litjens (StreamingCNN), section III-C and Algorithm 2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fxstream.errors import ProbeError, RuleError
from fxstream.graph.typed_graph import TypedGraph
from fxstream.probe.findings import DIRECTIONS, Findings, Mismatch, TooLargeError, UnprobedError
from fxstream.probe.nan import poison_backward, poison_forward
from fxstream.probe.strip import make_strip, synthetic_weight
from fxstream.probe.subgraph import subgraph
from fxstream.probe.tiles import compare_reductions, compare_values
from fxstream.tiling.segment import Segment, make_segment

__all__ = ["MOST_BYTES", "Mismatch", "ProbeReport", "probe"]


@dataclass(frozen=True, slots=True, repr=False)
class ProbeReport:
    """What the probe of one part of the graph found.

    `measured` counts the nodes whose claims were checked for equality, `blurred` those checked one-sidedly;
    `unprobed` says why something could not be measured, or is empty.
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
        if self.unprobed and not self.measured:
            return f"{self.part}: not probed, {self.unprobed}"
        verdict = f"{len(self.mismatches)} MISMATCHES" if self.mismatches else "agree with the algebra"
        verdict += f"; the rest is not probed, {self.unprobed}" if self.unprobed else ""
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


MOST_BYTES = 2**30
"""What strips may take where nothing is said."""


def probe(graph: TypedGraph, nodes: Sequence[str], part: str = "", memory: int = MOST_BYTES) -> ProbeReport:
    """Measure the claims about `nodes` (local ones and reductions, in their order) on the real operators.

    Strips take about `memory` bytes at most; those of a single operator may take more.
    Runs on the CPU, whose operators do not mix NaN into other pixels, and in a thread of its own, so that modes
    of the caller (autocast, checkpointing, a default device) do not reach it. Never raises for what it finds: see
    `ProbeReport.raise_on_mismatch`.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_probe, graph, nodes, part, memory).result()


def _probe(graph: TypedGraph, nodes: Sequence[str], part: str, memory: int) -> ProbeReport:
    """The report on a part: on its regions one by one, and on its reductions (rule 7)."""
    started, findings = time.perf_counter(), Findings(graph)
    measured, unprobed = _measured_regions(graph, nodes, memory, findings)
    reductions = [name for name in nodes if graph[name].reduces]
    compare_reductions(graph, reductions, findings)
    order = {name: i for i, name in enumerate(nodes)}
    ordered = sorted(findings.mismatches, key=lambda m: (DIRECTIONS.index(m.direction), order[m.node]))
    return ProbeReport(
        part,
        len(nodes),
        measured + len(reductions),
        len(findings.blurred_forward),
        tuple(ordered),
        unprobed[0] if unprobed else "",
        time.perf_counter() - started,
    )


def _measured_regions(
    graph: TypedGraph, nodes: Sequence[str], memory: int, findings: Findings
) -> tuple[int, list[str]]:
    """How many nodes of the regions of a part were measured, and why others were not; halves by rule 8."""
    chosen, measured, unprobed = set(nodes), 0, list[str]()
    pieces = [tuple(name for name in region.nodes if name in chosen) for region in graph.regions]
    waiting = [piece for piece in reversed(pieces) if piece]
    while waiting:
        piece = waiting.pop()
        try:
            of_piece, reason = _probed(make_segment(graph, "", piece), memory if len(piece) > 1 else None)
        except TooLargeError:
            waiting += [piece[len(piece) // 2 :], piece[: len(piece) // 2]]
            continue
        measured += 0 if reason else len(piece) - len(of_piece.blurred)
        unprobed += [reason] if reason else []
        findings.mismatches += of_piece.mismatches
        findings.blurred_forward |= of_piece.blurred
    return measured, unprobed


def _probed(segment: Segment, memory: int | None) -> tuple[Findings, str]:
    """The findings on one region, and why it was not probed, if so. Raises `TooLargeError`."""
    try:
        for whole_windows in (False, True):
            findings = _measured(segment, whole_windows, memory)
            if not findings.mismatches:
                break
    except TooLargeError:
        raise
    except (UnprobedError, RuleError) as reason:
        return Findings(segment.graph), str(reason)
    except Exception as error:  # an operator that cannot be run on a strip must not keep the model from running
        first = str(error).splitlines()[0] if str(error) else ""
        return Findings(segment.graph), f"it fails on a strip with {type(error).__name__}: {first}"
    return findings, ""


def _measured(segment: Segment, whole_windows: bool, memory: int | None) -> Findings:
    """The findings on strips of the least width.

    On a strip narrower than a dilated window all taps may lie in padding, which looks like a claim that is too
    large. So what is found there counts only if it is found on a strip that holds whole windows too.
    """
    findings = Findings(segment.graph)
    part = subgraph(segment, torch.float32)
    weights = {name: synthetic_weight(part, name) for name in segment.whole}
    for axis in range(len(segment.graph.pattern(segment.nodes[0]).dims)):
        strip = make_strip(part, axis, weights, whole_windows)
        if memory is not None and strip.bytes > memory:
            raise TooLargeError(segment.name)
        poison_forward(strip, findings)
        poison_backward(strip, findings)
    compare_values(segment, findings)
    return findings
