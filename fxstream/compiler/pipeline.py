"""The pipeline from a model to a graph that streams, readable as a table of contents.

    capture  ->  lower  ->  type at this size  ->  plan  ->  probe  ->  rewrite  ->  run

Captures are made per mode (training flags, input structure, types, devices) and probed once; everything else is
per image size. All of it is in one bounded cache.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxstream.compiler.analysis import Analysis, analyse, lowered
from fxstream.compiler.cache import Cache
from fxstream.compiler.stages import Stages
from fxstream.errors import StreamingWarning
from fxstream.graph.autograd_saves import saves_of
from fxstream.graph.capture import Captured, capture, still_holds
from fxstream.graph.effects import is_random
from fxstream.graph.guards import attributes, mode_key
from fxstream.graph.typed_graph import Saves, TypedGraph
from fxstream.io.inputs import Inputs, inputs_of
from fxstream.machine.device import budget_of
from fxstream.planning.decision import Decision
from fxstream.planning.plan import Plan, make_plan
from fxstream.probe.probe import MOST_BYTES, ProbeReport, probe
from fxstream.rules import Reason
from fxstream.runtime.progress import Bar
from fxstream.runtime.ranks import Ranks, digest, fingerprint
from fxstream.runtime.rewrite import read_whole, rewrite
from fxstream.tiling.parts import streamable_parts
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory
from fxstream.tiling.templates import Memo

__all__ = ["CapturedModel", "Options", "Pipeline", "Prepared"]

logger = logging.getLogger("fxstream")
logger.addHandler(logging.NullHandler())

SMALL_SHARE = 0.5
"""Below this share of streamed activations a warning says what stands in the way."""
MOST_NAMED = 3
"""Stretches that a warning names."""
MOST_ENTRIES = 64
"""Captures, and image sizes with their plans and tiles, that are kept."""
MOST_BYTES_OF_SIZES = 2**27
"""What they may take, by the estimate of `Prepared.bytes`."""
BYTES_OF_NODE, BYTES_OF_TILE = 2**11, 2**10
"""About what a node of a graph takes at one size, with programs of this size alone, and what a tile does."""
LEAST_OF_PROBE = 2**26
"""Bytes that the probe may take however small the budget is."""
MOST_PROBES = 256
"""Parts of one capture whose reports are kept."""


@dataclass(frozen=True, slots=True)
class Options:
    """All that `compile` is asked for."""

    request: Request
    verify: bool = True
    compile_tiles: bool = False
    mesh: Any = None
    progress: bool = False
    plan: Decision | None = None


@dataclass(frozen=True, slots=True)
class CapturedModel:
    """Everything that is made once per capture: its graph, lowered, what autograd saves, the probe's reports."""

    captured: Captured
    lowered: Captured
    saves: dict[str, Saves]
    probes: Cache = field(default_factory=lambda: Cache(MOST_PROBES))
    memo: Memo = field(default_factory=Memo)
    typed: dict[tuple[Any, ...], TypedGraph] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model made ready for one image size; `streamed` is None where the plain path does the same."""

    analysis: Analysis
    plan: Plan
    probe: tuple[ProbeReport, ...]
    streamed: fx.GraphModule | None

    @property
    def bytes(self) -> int:
        """About what it takes in memory."""
        segments = self.plan.segments
        nodes = len(self.analysis.graph.nodes) + sum(len(part.segment.nodes) for part in segments)
        return BYTES_OF_NODE * nodes + BYTES_OF_TILE * sum(part.tile_count for part in segments)

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph; the captured one where the plain path is taken."""
        return self.analysis.captured.graph if self.streamed is None else self.streamed.graph

    def run(self, model: nn.Module, inputs: Inputs) -> Any:
        """What the streamed graph returns; images from outside are read whole where it needs them whole."""
        assert self.streamed is not None
        captured = self.analysis.captured
        names, whole = captured.inputs, read_whole(self.streamed)
        tensors = inputs.read_whole([i for i in inputs.outside if names[i] in whole])
        flat = self.streamed(*captured.model_tensors(model), *tensors)
        return pytree.tree_unflatten(flat, captured.out_spec)


class Pipeline:
    """The stages for one model, with what they keep; `last` is what the last call ran."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.last: Prepared | None = None
        self.warned: set[str] = set()
        """The topics that the user was warned about, or that are not worth a warning."""
        self._cache = Cache(MOST_ENTRIES)
        self._sizes = Cache(MOST_ENTRIES, MOST_BYTES_OF_SIZES, lambda prepared: prepared.bytes)
        self._ranks = None if options.mesh is None else Ranks(options.mesh)
        self._watch = Bar() if options.progress else None
        self._volatile: set[str] = set()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns for these arguments."""
        inputs = inputs_of(self.model, args, kwargs)
        if self._ranks is None:
            prepared = self.prepared(inputs)
        else:
            self._ranks.require_equal({"image": ", ".join(fingerprint(image) for image in inputs.real)})
            with self._ranks.raise_together():
                prepared = self.prepared(inputs)
            self._ranks.require_equal(_common(prepared))
        if prepared.streamed is None:
            args, kwargs = inputs.plain()
            return self.model(*args, **kwargs)
        return prepared.run(self.model, inputs)

    def prepared(self, inputs: Inputs, written: Sequence[int] | None = None) -> Prepared:
        """The model ready for these inputs; results at the indices `written` are written as they come.

        With `written` it is a call without gradients.
        """
        mode = mode_key(self.model, inputs.args, inputs.kwargs, self._volatile)
        size = self._size_key(inputs, written)
        if (mode, size) not in self._sizes:
            stages = Stages(type(self.model).__name__, self._watch)
            captured = self._captured(mode, inputs, stages)
            mode = mode_key(self.model, inputs.args, inputs.kwargs, self._volatile)
            self._sizes.put((mode, size), self._prepare(captured, inputs, written, stages))
        self.last = self._sizes.get((mode, size), lambda: self.last)
        assert self.last is not None
        return self.last

    def _training(self, inputs: Inputs, written: Sequence[int] | None) -> bool:
        """Whether to plan for a backward; with a tile the plan is the same in any case."""
        if written is not None:
            return False
        return self.options.request.tile is not None or _records(self.model, inputs.tensors)

    def _size_key(self, inputs: Inputs, written: Sequence[int] | None) -> Any:
        training = self._training(inputs, written)
        differentiates = training and self.options.request.tile is None
        shapes = tuple((tuple(t.shape), differentiates and t.requires_grad) for t in inputs.tensors)
        return shapes, training, inputs.outside, None if written is None else tuple(written)

    def _captured(self, mode: Any, inputs: Inputs, stages: Stages) -> CapturedModel:
        """The capture for this mode; one that is bound to its size is not kept for other sizes."""
        model, args, kwargs, key = self.model, inputs.args, inputs.kwargs, ("capture", mode)
        previous = key in self._cache
        if previous:
            cached = self._cache.get(key, lambda: None)
            assert isinstance(cached, CapturedModel)
            if not cached.captured.reads_sizes:
                return cached
            with stages("check of the capture"):
                holds = still_holds(cached.captured, model, args, kwargs, inputs.tensors)
            if holds:
                return cached
        before = attributes(model)
        with stages("capture"):
            captured = capture(model, args, kwargs)
        self._volatile |= {name for name, value in attributes(model).items() if before.get(name) != value}
        with stages("analysis"):
            made = self._made(captured, inputs)
        if captured.bound or previous:
            self.warn_once(
                "bound",
                f"{type(model).__name__} is bound to the size of its input: each new image or batch size is"
                " captured anew",
            )
        else:
            self._cache.put(("capture", mode_key(model, args, kwargs, self._volatile)), made)
        return made

    def _made(self, captured: Captured, inputs: Inputs) -> CapturedModel:
        """What is made once of a capture, at the size of these inputs."""
        combines = self.options.request.global_ops != "cut"
        simple = lowered(captured, self.model, inputs.tensors, combines)
        return CapturedModel(
            captured, simple, saves_of(analyse(simple, self.model, inputs.tensors, combines).graph)
        )

    def _prepare(
        self, captured: CapturedModel, inputs: Inputs, written: Sequence[int] | None, stages: Stages
    ) -> Prepared:
        """The stages of one image size."""
        with stages("plan"):
            analysis, plan = self._planned(captured, inputs, written)
        self._warn_what_stops_the_stream(analysis, plan, inputs.tensors[0].device)
        self._warn_what_runs_whole(plan)
        reports: tuple[ProbeReport, ...] = ()
        streamed = None
        if not plan.is_trivial:
            with stages("probe"):
                reports = self._verified(captured, analysis, plan)
            with stages("tile programs"):
                options, lowered = self.options, captured.lowered
                memo = captured.memo.at(analysis.graph)
                streamed = rewrite(
                    lowered, analysis.graph, plan, options.compile_tiles, self._ranks, self._watch, memo
                )
        plan = replace(plan, prepared=stages.seconds)
        logger.info("%s", plan)
        return Prepared(analysis, plan, reports, streamed)

    def _planned(
        self, captured: CapturedModel, inputs: Inputs, written: Sequence[int] | None
    ) -> tuple[Analysis, Plan]:
        tensors, options = inputs.tensors, self.options
        combines = options.request.global_ops != "cut"
        analysis = analyse(captured.lowered, self.model, tensors, combines, captured.typed)
        graph = reuse_memory(analysis.graph.with_saves(captured.saves))
        analysis, names = replace(analysis, graph=graph), captured.lowered.inputs
        plan = make_plan(
            graph,
            self._request(tensors[0].device),
            training=self._training(inputs, written),
            device=tensors[0].device,
            differentiated=frozenset(n for n, t in zip(names, tensors, strict=True) if t.requires_grad),
            outside=frozenset(names[i] for i in inputs.outside),
            written=frozenset(name for i, name in enumerate(captured.lowered.results) if i in (written or ())),
            ranks=1 if self._ranks is None else self._ranks.count,
            memo=captured.memo,
            saved=options.plan,
        )
        return analysis, plan

    def _request(self, device: torch.device) -> Request:
        """The request; ranks that share tiles plan for the least memory of any."""
        request = self.options.request
        if self._ranks is None:
            return request
        budget = self._ranks.least(budget_of(request.memory, device))
        return replace(request, memory=None if request.tile is not None else budget)

    def _verified(self, captured: CapturedModel, analysis: Analysis, plan: Plan) -> tuple[ProbeReport, ...]:
        """The probe's reports on what the plan streams, once per capture. Raises `ProbeError` on a mismatch."""
        if not self.options.verify:
            return ()
        streamed = {name for segment in plan.segments for name in segment.segment.covers}
        memory = plan.prediction.bytes // 2 if self.options.request.tile is None else MOST_BYTES
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
        self.warn_once(report.part, f"{report}; it is streamed by its rules alone")
        return report

    def _warn_what_stops_the_stream(self, analysis: Analysis, plan: Plan, device: torch.device) -> None:
        barriers, request = analysis.barriers, self.options.request
        fits = request.tile is None and plan.prediction.plain_bytes <= budget_of(request.memory, device)
        if plan.streamed_share >= SMALL_SHARE or request.cut is not None or fits or not barriers:
            return
        first, advice = f": {barriers[0]}", ""
        statistics = [v for v in barriers if v.not_tileable_for(Reason.BATCH_STATISTICS)]
        if statistics:
            first += f" ({len(statistics)} BatchNorm layers use batch statistics)"
            advice = ". fxstream.freeze_batch_norm(model) makes them local"
        name = type(self.model).__name__
        self.warn_once(
            "share", f"{plan.streamed_share:.0%} of the activations of {name} are streamed{first}{advice}"
        )

    def _warn_what_runs_whole(self, plan: Plan) -> None:
        if plan.untiled:
            more = len(plan.untiled) - MOST_NAMED
            listed = ", ".join(plan.untiled[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            self.warn_once(
                "untiled",
                f"tile={self.options.request.tile} is too small for {listed}: these run whole. A larger tile,"
                " or a memory, bounds them too",
            )

    def warn_once(self, topic: str, message: str) -> None:
        """A warning, the first time that something is to be said about a topic."""
        if topic not in self.warned:
            self.warned.add(topic)
            warnings.warn(message, StreamingWarning, stacklevel=2)


def _common(prepared: Prepared) -> dict[str, str]:
    """What ranks that share tiles must have in common, besides the image."""
    draws = any(is_random(node) for node in prepared.analysis.captured.graph.nodes)
    plan = str(replace(prepared.plan, prepared=()))  # ranks do not take the same time
    return {
        "plan": f"{len(prepared.plan.segments)} segments #{digest(plan.encode())}",
        "random state": digest(torch.get_rng_state().numpy().tobytes()) if draws else "",
    }


def _records(model: nn.Module, tensors: list[torch.Tensor]) -> bool:
    """Whether this call will be followed by a backward, as far as one can know."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*model.parameters(), *tensors))


def _probed(analysis: Analysis, name: str, nodes: tuple[str, ...], memory: int) -> ProbeReport:
    """What the probe says of these nodes. Raises `ProbeError` on a mismatch."""
    report = probe(analysis.graph, nodes, name, max(LEAST_OF_PROBE, min(memory, MOST_BYTES)))
    logger.info("%s", report)
    report.raise_on_mismatch()
    return report
