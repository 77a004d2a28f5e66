"""The pipeline from a traced graph to one that streams, readable as a table of contents.

    capture  ->  lower  ->  type at this size  ->  plan  ->  probe  ->  rewrite  ->  run

A graph is captured and probed once; everything else is per image size. All of it is in bounded caches.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxstream.capture.capture import Retrace, capture_graph, images_and_frames, that_holds
from fxstream.capture.casts import without_autocast
from fxstream.capture.traced_graph import Kind, TracedGraph
from fxstream.capture.tracing import unwatched
from fxstream.compiler.analysis import Analysis, Earlier, analyse, lowered
from fxstream.compiler.cache import Cache
from fxstream.compiler.prepared import CapturedModel, Prepared
from fxstream.compiler.shared import Shared
from fxstream.compiler.stages import Stages
from fxstream.errors import CaptureError
from fxstream.graph.autograd_saves import saves_of
from fxstream.graph.captured import Captured
from fxstream.graph.effects import is_random
from fxstream.io.inputs import whole
from fxstream.io.source import Source
from fxstream.machine.device import budget_of
from fxstream.machine.heap import give_back
from fxstream.planning.plan import Plan, make_plan
from fxstream.probe.probe import MOST_BYTES, ProbeReport, probe
from fxstream.runtime.ranks import digest, fingerprint
from fxstream.runtime.rewrite import rewrite
from fxstream.tiling.parts import streamable_parts
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory

__all__ = ["Pipeline"]

logger = logging.getLogger("fxstream")
logger.addHandler(logging.NullHandler())

MOST_ENTRIES = 64
"""Captures, and image sizes with their plans and tiles, that are kept."""
MOST_CAPTURES = 8
"""Captures of one traced graph, whose constants differ in more ways than a size explains, that are kept."""
MOST_BYTES_OF_SIZES = 2**27
"""What they may take, by the estimate of `Prepared.bytes`."""
LEAST_OF_PROBE = 2**26
"""Bytes that the probe may take however small the budget is."""


class Pipeline:
    """The stages for one traced graph, with what they keep. Threads prepare it one after the other."""

    def __init__(self, traced: TracedGraph, shared: Shared, retrace: Retrace | None = None) -> None:
        self.traced, self.shared = traced, shared
        self._retrace = retrace
        self._cache = Cache(MOST_ENTRIES)
        self._sizes = Cache(MOST_ENTRIES, MOST_BYTES_OF_SIZES, lambda prepared: prepared.bytes)
        self._lock = threading.RLock()

    def run(self, values: Sequence[Any], outside: Mapping[int, torch.Tensor | Source]) -> Sequence[Any]:
        """What the graph returns for these values of its inputs.

        `outside` has the real images of those that only stand in for what is not in the device's memory.
        """
        if not self.traced.indices(Kind.ARGUMENT):
            return self.traced(values)  # type: ignore[no-any-return]
        prepared = self.agreed(values, outside)
        if prepared.streamed is None:
            return self.plain(values, outside)
        return self.traced.with_numbers(prepared.run(values, outside), values)

    def plain(self, values: Sequence[Any], outside: Mapping[int, torch.Tensor | Source]) -> Sequence[Any]:
        """What the graph returns as it is, everything read into the device's memory."""
        read = [whole(outside[i], value.device) if i in outside else value for i, value in enumerate(values)]
        return self.traced(read)  # type: ignore[no-any-return]

    def agreed(
        self,
        values: Sequence[Any],
        outside: Mapping[int, torch.Tensor | Source],
        written: Sequence[int] | None = None,
    ) -> Prepared:
        """What `prepared` is. Ranks that share tiles compare what they must have in common."""
        ranks = self.shared.ranks
        if ranks is None:
            return self.prepared(values, outside, written)
        images = [outside.get(i, values[i]) for i in self.traced.indices(Kind.ARGUMENT)]
        ranks.require_equal({"image": ", ".join(fingerprint(image) for image in images)})
        with ranks.raise_together():
            prepared = self.prepared(values, outside, written)
        ranks.require_equal(_common(prepared))
        return prepared

    def prepared(
        self, values: Sequence[Any], outside: Collection[int], written: Sequence[int] | None = None
    ) -> Prepared:
        """The graph ready for these values; outputs at the indices `written` are written as they come.

        With `written` it is a call without gradients.
        """
        key = self._size_key(values, outside, written)
        with self._lock:
            if key not in self._sizes:
                stages = Stages(self.shared.name, self.shared.watch)
                with unwatched():
                    captured = self._captured(values, stages)
                    with without_autocast(captured.captured):
                        prepared = self._prepare(captured, values, outside, written, stages)
                self._sizes.put(key, prepared)
                give_back(self._tensors(values)[0].device)
            last: Prepared = self._sizes.get(key, lambda: None)  # type: ignore[assignment]
        self.shared.last = last
        return last

    def serves(self, traced: TracedGraph) -> bool:
        """Whether another trace of the same call, at another size, has the graph that is captured here.

        One with numbers of Python has not: each of them is captured from the trace, which has one size.
        """
        if traced.inputs != self.traced.inputs or traced.numbers(traced.examples):
            return False
        with self._lock:
            return self._that_holds(self._captures(()), traced, traced.examples) is not None

    def of(self, traced: TracedGraph, retrace: Retrace | None) -> Pipeline:
        """The same captures and sizes for another trace that they serve, which the plain path runs.

        Both have the same captured graph, but sizes of their own in what the capture leaves out, a slice of all.
        """
        other = copy.copy(self)
        other.traced, other._retrace = traced, retrace
        return other

    def _tensors(self, values: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors of the call."""
        return [values[i] for i in self.traced.indices(Kind.ARGUMENT)]

    def _training(self, values: Sequence[Any], written: Sequence[int] | None) -> bool:
        """Whether to plan for a backward; with a tile the plan is the same in any case."""
        if written is not None:
            return False
        return self.shared.options.request.tile is not None or _records(values)

    def _size_key(self, values: Sequence[Any], outside: Collection[int], written: Sequence[int] | None) -> Any:
        training = self._training(values, written)
        differentiates = training and self.shared.options.request.tile is None
        shapes = tuple((tuple(t.shape), differentiates and t.requires_grad) for t in self._tensors(values))
        places = None if written is None else tuple(written)
        numbers, retained = self.traced.numbers(values), self.shared.retained.bytes
        return numbers, shapes, training, frozenset(outside), places, retained

    def _captured(self, values: Sequence[Any], stages: Stages) -> CapturedModel:
        """The capture; one that is bound to its size is not kept for other sizes."""
        numbers = self.traced.numbers(values)
        kept = self._captures(numbers)
        batch, frames = images_and_frames(self._tensors(values))
        captures = [one for one in kept if one.captured.serves(batch, frames)]
        if captures and not self.traced.computes_sizes:
            return captures[0]
        with stages("capture"):
            made = self._that_holds(captures, self.traced, values)
            if made is not None:
                return made
            captured = self._capture(values)
        with stages("analysis"), without_autocast(captured):
            made = self._made(captured, values)
        if captured.bound:
            self.shared.warn_once(
                "bound",
                f"{self.shared.name} is bound to the size of its input: each new image or batch size is captured"
                " anew",
            )
        else:
            self._cache.put(("captures", numbers), (made, *kept[: MOST_CAPTURES - 1]))
        return made

    def _captures(self, numbers: Any) -> tuple[CapturedModel, ...]:
        """The captures for these numbers that are kept; the newest first."""
        captures: tuple[CapturedModel, ...] = self._cache.get(("captures", numbers), tuple)
        return captures

    def _that_holds(
        self, captures: Sequence[CapturedModel], traced: TracedGraph, values: Sequence[Any]
    ) -> CapturedModel | None:
        """The capture with the path and the constants that a trace has at this size."""
        captured = that_holds([one.captured for one in captures], traced, values) if captures else None
        return next((one for one in captures if one.captured is captured), None)

    def _capture(self, values: Sequence[Any]) -> Captured:
        """The ATen graph. Raises `CaptureError` where an operator that runs cannot be captured."""
        try:
            return capture_graph(self.traced, values, self._retrace)
        except (RuntimeError, TypeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CaptureError(f"{self.shared.name} cannot be captured: {lines[0]}") from error

    def _made(self, captured: Captured, values: Sequence[Any]) -> CapturedModel:
        """What is made once of a capture, at the size of these values."""
        combines = self.shared.options.request.global_ops != "cut"
        simple = lowered(captured, values, combines)
        typed: Earlier = {}
        saves = saves_of(analyse(simple, values, combines, typed).graph)
        return CapturedModel(captured, simple, saves, typed=typed)

    def _prepare(
        self,
        captured: CapturedModel,
        values: Sequence[Any],
        outside: Collection[int],
        written: Sequence[int] | None,
        stages: Stages,
    ) -> Prepared:
        """The stages of one image size."""
        with stages("plan"):
            analysis, plan = self._planned(captured, values, outside, written)
        self.shared.warn_what_stops_the_stream(analysis, plan, self._tensors(values)[0].device)
        self.shared.warn_what_runs_whole(plan)
        self.shared.warn_without_graphs(self._tensors(values)[0].device)
        reports: tuple[ProbeReport, ...] = ()
        streamed = None
        if not plan.is_trivial:
            with stages("probe"):
                reports = self._verified(captured, analysis, plan)
            with stages("tile programs"):
                shared, lowered = self.shared, captured.lowered
                streamed = rewrite(
                    lowered,
                    analysis.graph,
                    plan,
                    shared.tile_compiler,
                    shared.ranks,
                    shared.watch,
                    captured.memo.at(analysis.graph),
                    shared.replays,
                )
        plan = replace(plan, prepared=stages.seconds)
        logger.info("%s", plan)
        return Prepared(analysis, plan, reports, streamed)

    def _planned(
        self,
        captured: CapturedModel,
        values: Sequence[Any],
        outside: Collection[int],
        written: Sequence[int] | None,
    ) -> tuple[Analysis, Plan]:
        simple, ranks = captured.lowered, self.shared.ranks
        combines = self.shared.options.request.global_ops != "cut"
        analysis = analyse(simple, values, combines, captured.typed)
        graph = reuse_memory(analysis.graph.with_saves(captured.saves))
        analysis = replace(analysis, graph=graph)
        inputs = dict(zip(simple.inputs, simple.places[len(simple.tensors) :], strict=True))
        device = self._tensors(values)[0].device
        plan = make_plan(
            graph,
            self._request(device),
            training=self._training(values, written),
            device=device,
            differentiated=frozenset(name for name, i in inputs.items() if values[i].requires_grad),  # type: ignore[index]
            outside=frozenset(name for name, i in inputs.items() if i in outside),
            written=frozenset(name for i, name in enumerate(simple.outputs) if i in (written or ()) and name),
            ranks=1 if ranks is None else ranks.count,
            memo=captured.memo,
            saved=self.shared.options.plan,
        )
        return analysis, plan

    def _request(self, device: torch.device) -> Request:
        """The request; ranks that share tiles plan for the least memory of any."""
        request = self.shared.options.request
        if request.memory is not None and self.shared.retained.bytes:
            request = replace(
                request, memory=max(1, budget_of(request.memory, device) - self.shared.retained.bytes)
            )
        if self.shared.ranks is None:
            return request
        budget = self.shared.ranks.least(budget_of(request.memory, device))
        return replace(request, memory=None if request.tile is not None else budget)

    def _verified(self, captured: CapturedModel, analysis: Analysis, plan: Plan) -> tuple[ProbeReport, ...]:
        """The probe's reports on what the plan streams, once per capture. Raises `ProbeError` on a mismatch."""
        if not self.shared.options.verify:
            return ()
        streamed = {name for segment in plan.segments for name in segment.segment.covers}
        memory = plan.prediction.bytes // 2 if self.shared.options.request.tile is None else MOST_BYTES
        every = captured.memo.at(analysis.graph).get("parts", lambda: streamable_parts(analysis.graph))
        parts = {f"region {i}": part for i, part in enumerate(every)}
        of_part = functools.partial(self._report, captured.probes, analysis, streamed, memory)
        return tuple(of_part(name, part) for name, part in parts.items() if not streamed.isdisjoint(part))

    def _report(
        self,
        reports: Cache,
        analysis: Analysis,
        streamed: Collection[str],
        memory: int,
        name: str,
        part: tuple[str, ...],
    ) -> ProbeReport:
        """The report on a whole part, for another plan streams other nodes; else on what is streamed of it."""
        for nodes in (part, tuple(node for node in part if node in streamed)):
            report = reports.get(nodes, functools.partial(_probed, analysis, name, nodes, memory))
            assert isinstance(report, ProbeReport)
            if not report.unprobed:
                return report
        self.shared.warn_once(report.part, f"{report}; it is streamed by its rules alone")
        return report


def _common(prepared: Prepared) -> dict[str, str]:
    """What ranks that share tiles must have in common, besides the image."""
    draws = any(is_random(node) for node in prepared.analysis.captured.graph.nodes)
    plan = str(replace(prepared.plan, prepared=()))  # ranks do not take the same time
    return {
        "plan": f"{len(prepared.plan.segments)} segments #{digest(plan.encode())}",
        "random state": digest(torch.get_rng_state().numpy().tobytes()) if draws else "",
    }


def _records(values: Sequence[Any]) -> bool:
    """Whether this call will be followed by a backward, as far as one can know."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in values)


def _probed(analysis: Analysis, name: str, nodes: tuple[str, ...], memory: int) -> ProbeReport:
    """What the probe says of these nodes. Raises `ProbeError` on a mismatch."""
    report = probe(analysis.graph, nodes, name, max(LEAST_OF_PROBE, min(memory, MOST_BYTES)))
    logger.info("%s", report)
    report.raise_on_mismatch()
    return report
