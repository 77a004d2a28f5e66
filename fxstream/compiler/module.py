"""`compile`: the pipeline from a model to a module that streams, readable as a table of contents.

    capture  ->  shapes at this size  ->  locality  ->  plan  ->  probe  ->  rewrite  ->  run

Captures are kept per mode (training flags, input structure, types, devices) and probed once; everything else is
per image size.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxstream.compiler.analysis import Analysis, analyse, analyze, lowered
from fxstream.errors import InputError, StreamingWarning
from fxstream.graph.capture import Captured, capture, still_holds
from fxstream.graph.effects import is_random
from fxstream.graph.guards import attributes, mode_key
from fxstream.graph.typed_graph import Verdict
from fxstream.io.inputs import Inputs, inputs_of
from fxstream.machine.device import budget_of
from fxstream.machine.units import parse_bytes
from fxstream.planning.plan import Plan, make_plan
from fxstream.probe.probe import ProbeReport, probe
from fxstream.rules import Kind
from fxstream.runtime.progress import Bar
from fxstream.runtime.ranks import Ranks, digest, fingerprint
from fxstream.runtime.rewrite import read_whole, rewrite
from fxstream.tiling.autograd_saves import Saved, saved_by
from fxstream.tiling.parts import streamable_parts
from fxstream.tiling.request import Request

__all__ = ["GLOBAL_OPS", "StreamedModule", "checked_request", "compile", "plan"]

logger = logging.getLogger("fxstream")
logger.addHandler(logging.NullHandler())

GLOBAL_OPS = ("auto", "stream", "cut")
SMALL_SHARE = 0.5
"""Below this share of streamed activations the user is told what stands in the way."""


def compile(
    model: nn.Module,
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    verify: bool = True,
    compile_tiles: bool = False,
    offload: bool = False,
    mesh: Any = None,
    progress: bool = False,
) -> StreamedModule:
    """The model as a drop-in module that streams its large part tile by tile, with the same results.

    `memory` is what a call may allocate at its peak, with its backward where gradients are recorded: bytes,
    ``"8GiB"``, or a share of the device below one. It counts activations, boundaries and gradients; not the image,
    the parameters and what an optimiser holds. The plan is the fastest that is predicted to fit. By default it is
    what the device has free at the first call of a size.

    `tile` instead is the largest box of the model's input, overlap included, that a tile of the first segment
    reads: pixels, one number for all axes or one per axis. `segments` is the number of segments of each streamed
    region (at most, within a memory), or the names of the modules that each end one; by default the planner
    chooses. `cut` names the module after which nothing is streamed. `global_ops` says what is done about
    operators that need the whole feature map and are reductions over it (normalisations in training, squeeze and
    excitation, global pooling): "stream" them with the rest, "cut" the stream there, or "auto": as the planner
    finds best.

    With `verify` the probe measures once per capture, on the real operators, what the rules claim. `compile_tiles`
    passes what a tile computes through `torch.compile`: the first step of a size takes minutes, the others less
    time. With `offload` boundaries between segments, and their gradients, may lie in host memory: with a tile they
    do, within a memory where that is predicted to be faster. `mesh`, one dimension of a DeviceMesh, shares the
    tiles of each image among its ranks, which all get the same image and have the same results and gradients.
    `progress` shows a bar for each pass on a terminal. The model itself is not changed and its parameters are
    shared.

    Raises `InputError` for a tile that is not a positive integer or tuple of them, for a memory that is no
    positive amount, for both at once, and for `offload` with a `mesh`; at the first call `CaptureError`,
    `PlanError` or `ProbeError`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile needs an nn.Module, found {type(model).__name__}")
    if offload and mesh is not None:
        raise InputError("offload and mesh exclude each other: ranks exchange boundaries on the device")
    request = checked_request(tile, segments, cut, memory, global_ops, offload)
    return StreamedModule(model, request, verify, compile_tiles, mesh, progress)


def plan(
    model: nn.Module,
    size: int | tuple[int, ...],
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    channels: int = 3,
    batch: int = 1,
    training: bool = True,
    offload: bool = False,
    device: torch.device | str | None = None,
) -> Plan:
    """How `compile` would stream the model for an image [batch, channels, *size]; runs nothing.

    `training` plans for a call with its backward. `device` is what to plan for, by default where the model is; it
    need not exist where the memory is given in bytes. Raises what `analyze` and the first call of a compiled
    module raise.
    """
    request = checked_request(tile, segments, cut, memory, global_ops, offload)
    there = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    locality = analyze(model, size, channels=channels, batch=batch, global_ops=global_ops).locality
    return make_plan(locality, request, training=training, device=torch.device(device or there))


def checked_request(
    tile: object,
    segments: object,
    cut: str | None,
    memory: object = None,
    global_ops: str = "auto",
    offload: bool = False,
) -> Request:
    """The user's request. Raises `InputError` for a tile, a memory or segments that make no sense."""
    if global_ops not in GLOBAL_OPS:
        raise InputError(f"global_ops must be one of {', '.join(map(repr, GLOBAL_OPS))}; found {global_ops!r}")
    if tile is not None and memory is not None:
        raise InputError("give a tile or a memory, not both: within a memory the planner chooses the tiles")
    bounds = _checked_tile(tile), _checked_segments(segments), cut, _checked_memory(memory)
    return Request(*bounds, global_ops, offload)


def _checked_memory(memory: object) -> float | None:
    if isinstance(memory, str):
        return parse_bytes(memory)
    if memory is None or (
        isinstance(memory, (int, float)) and not isinstance(memory, bool) and 0 < memory < 2**63
    ):
        return memory
    raise InputError(f"memory must be bytes, text such as '8GiB', or a share below one; found {memory!r}")


def _checked_tile(tile: object) -> int | tuple[int, ...] | None:
    if tile is None:
        return None
    numbers = tile if isinstance(tile, (tuple, list)) else (tile,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise InputError(f"tile must be a positive int, or one per image axis, in pixels; found {tile!r}")
    return tuple(numbers) if isinstance(tile, (tuple, list)) else numbers[0]


def _checked_segments(segments: object) -> int | tuple[str, ...] | None:
    if segments is None or (isinstance(segments, int) and not isinstance(segments, bool) and segments > 0):
        return segments
    if isinstance(segments, (tuple, list)) and segments and all(isinstance(s, str) for s in segments):
        return tuple(segments)
    raise InputError(f"segments must be a positive int or module names; found {segments!r}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model made ready for one image size; `streamed` is None where the plain path does the same."""

    analysis: Analysis
    plan: Plan
    probe: tuple[ProbeReport, ...]
    streamed: fx.GraphModule | None

    def run(self, model: nn.Module, inputs: Inputs) -> Any:
        """What the streamed graph returns; images from outside are read whole where it needs them whole."""
        assert self.streamed is not None
        captured = self.analysis.captured
        names, whole = captured.inputs, read_whole(self.streamed)
        held = inputs.held([i for i in inputs.outside if names[i] in whole])
        flat = self.streamed(*captured.model_tensors(model), *held)
        return pytree.tree_unflatten(flat, captured.out_spec)


MOST_SIZES = 64
"""Image sizes whose plans and tile programs are kept."""


class StreamedModule(nn.Module):
    """A model that streams; made by `compile`.

    It shares the model's parameters, buffers and submodules (the same dictionaries), so `state_dict`,
    optimisers, `.to()` and `.train()` act on both.
    """

    model: nn.Module
    request: Request
    verify: bool
    compile_tiles: bool
    mesh: Any
    progress: bool
    _captures: dict[Any, Captured]
    _lowered: dict[fx.Graph, Captured]
    _saved: dict[fx.Graph, dict[str, Saved]]
    _probed: dict[Any, tuple[ProbeReport, ...]]
    _prepared: dict[Any, Prepared]
    _last: Prepared | None
    _told: set[str]
    _volatile: set[str]

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        verify: bool = True,
        compile_tiles: bool = False,
        mesh: Any = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        # Not registered as a submodule: the model's parts are ours under their own names.
        self.__dict__ |= {parts: model.__dict__[parts] for parts in shared} | {"model": model}
        self.request, self.verify, self.compile_tiles, self.mesh = request, verify, compile_tiles, mesh
        self.progress, self._watch = progress, Bar() if progress else None
        self._ranks = None if mesh is None else Ranks(mesh)
        self.training = model.training
        self._captures, self._lowered, self._saved, self._probed, self._prepared = {}, {}, {}, {}, {}
        self._last = None
        self._told, self._volatile = set(), set()
        self._untraced_run = _untraced_run()

    def _options(self) -> tuple[Any, ...]:
        return self.request, self.verify, self.compile_tiles, self.mesh, self.progress

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamedModule, (self.model, *self._options())

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedModule:
        return StreamedModule(copy.deepcopy(self.model, memo), *self._options())

    def _replicate_for_data_parallel(self) -> StreamedModule:
        raise InputError(
            "nn.DataParallel copies a module in every call, and the plan is the original's: use"
            " DistributedDataParallel around the compiled module"
        )

    def train(self, mode: bool = True) -> StreamedModule:
        """Training mode of the model and of this module."""
        self.training = mode
        self.model.train(mode)
        return self

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on every node, for the last input."""
        return self._latest().analysis.verdicts

    @property
    def plan(self) -> Plan:
        """Segments and tiles for the last input."""
        return self._latest().plan

    @property
    def probe(self) -> tuple[ProbeReport, ...]:
        """What the probe measured on each streamed region, for the last input; empty where it was not run."""
        return self._latest().probe

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph for the last input; the captured one where the plain path was taken."""
        latest = self._latest()
        return latest.analysis.captured.graph if latest.streamed is None else latest.streamed.graph

    def _latest(self) -> Prepared:
        if self._last is None:
            raise InputError("nothing is known before the first call: call the module on an image")
        return self._last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments, of which images may be arrays (`fxstream.source`).

        A `torch.compile` around it does not look inside.
        """
        return self._untraced_run(self, args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inputs = inputs_of(self.model, args, kwargs)
        if self._ranks is None:
            prepared = self._at_size(inputs)
        else:
            self._ranks.agree({"image": ", ".join(fingerprint(given) for given in inputs.given)})
            with self._ranks.settled():
                prepared = self._at_size(inputs)
            self._ranks.agree(_common(prepared))
        self._last = prepared
        if prepared.streamed is None:
            args, kwargs = inputs.plain()
            return self.model(*args, **kwargs)
        return prepared.run(self.model, inputs)

    def _at_size(self, inputs: Inputs) -> Prepared:
        args, kwargs, tensors = inputs.args, inputs.kwargs, inputs.tensors
        mode = mode_key(self.model, args, kwargs, self._volatile)
        training = self.request.tile is not None or _records(self.model, tensors)
        wanted = training and self.request.tile is None
        shapes = tuple((tuple(tensor.shape), wanted and tensor.requires_grad) for tensor in tensors)
        size = (shapes, training, inputs.outside)
        if (mode, size) not in self._prepared:
            captured = self._captured(mode, args, kwargs, tensors)
            mode = mode_key(self.model, args, kwargs, self._volatile)
            if len(self._prepared) >= MOST_SIZES:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[mode, size] = self._prepare(captured, inputs, training)
        return self._prepared[mode, size]

    def prepared(self, inputs: Inputs, written: Sequence[int]) -> Prepared:
        """What a call without gradients would run, whose results at these places are written as they come."""
        mode = mode_key(self.model, inputs.args, inputs.kwargs, self._volatile)
        captured = self._captured(mode, inputs.args, inputs.kwargs, inputs.tensors)
        self._last = self._prepare(captured, inputs, False, written)
        return self._last

    def _captured(
        self, mode: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[torch.Tensor]
    ) -> Captured:
        """The capture for this mode; one that is bound to its size is not kept for other sizes."""
        known = self._captures.get(mode)
        if known is not None and known.reads_sizes and not still_holds(known, self.model, args, kwargs, tensors):
            known = None
        if known is None:
            before = attributes(self.model)
            known = capture(self.model, args, kwargs)
            self._volatile |= {name for name, value in attributes(self.model).items() if before.get(name) != value}
            bound = known.bound or mode in self._captures
            if not bound:
                self._captures[mode_key(self.model, args, kwargs, self._volatile)] = known
            else:
                self._tell_once(
                    "bound",
                    f"{type(self.model).__name__} is bound to the size of its input: each new image or batch size"
                    " is captured anew",
                )
        return known

    def _prepare(
        self, captured: Captured, inputs: Inputs, training: bool, written: Sequence[int] = ()
    ) -> Prepared:
        tensors = inputs.tensors
        analysis = self._analysed(captured, tensors)
        captured = analysis.captured
        if captured.graph not in self._saved:
            self._saved[captured.graph] = saved_by(analysis.locality)
        names = list(zip(captured.inputs, tensors, strict=True))
        request, ranks = self.request, 1
        if self._ranks is not None:
            ranks = self._ranks.count
            budget = budget_of(request.memory, tensors[0].device)
            memory = None if request.tile is not None else self._ranks.least(budget)
            request = replace(request, memory=memory)
        plan = make_plan(
            analysis.locality,
            request,
            training=training,
            device=tensors[0].device,
            saved=self._saved[captured.graph],
            wanted=frozenset(name for name, tensor in names if tensor.requires_grad),
            outside=frozenset(names[i][0] for i in inputs.outside),
            written=frozenset(name for i, name in enumerate(captured.results) if i in written),
            ranks=ranks,
        )
        logger.info("%s", plan)
        self._tell_what_stops_the_stream(analysis, plan, tensors[0].device)
        if plan.is_trivial:
            return Prepared(analysis, plan, (), None)
        reports = self._verified(analysis, plan)
        known = self._saved[captured.graph]
        streamed = rewrite(captured, analysis.locality, plan, known, self.compile_tiles, self._ranks, self._watch)
        return Prepared(analysis, plan, reports, streamed)

    def _analysed(self, captured: Captured, tensors: list[torch.Tensor]) -> Analysis:
        """The analysis of the captured graph, its feature-map-wide operators taken apart if these may stream."""
        combines = self.request.global_ops != "cut"
        if captured.graph not in self._lowered:
            self._lowered[captured.graph] = lowered(captured, self.model, tensors, combines)
        return analyse(self._lowered[captured.graph], self.model, tensors, combines)

    def _verified(self, analysis: Analysis, plan: Plan) -> tuple[ProbeReport, ...]:
        """The probe's reports on what the plan streams, once per capture. Raises `ProbeError` on a mismatch."""
        if not self.verify:
            return ()
        streamed = {name for segment in plan.segments for name in segment.segment.nodes}
        parts = [[n for n in part if n in streamed] for part in streamable_parts(analysis.locality)]
        key = (analysis.captured.graph, frozenset(streamed))
        if key not in self._probed:
            reports = tuple(probe(analysis.locality, part, f"region {i}") for i, part in enumerate(parts) if part)
            for report in reports:
                logger.info("%s", report)
                report.raise_on_mismatch()
                if report.unprobed:
                    self._tell_once(report.part, f"{report}; it is streamed by its rules alone")
            self._probed[key] = reports
        return self._probed[key]

    def _tell_what_stops_the_stream(self, analysis: Analysis, plan: Plan, device: torch.device) -> None:
        barriers, request = analysis.barriers, self.request
        fits = request.tile is None and plan.prediction.plain_bytes <= budget_of(request.memory, device)
        if plan.streamed_share >= SMALL_SHARE or request.cut is not None or fits or not barriers:
            return
        first = f": {barriers[0]}"
        statistics = [v for v in barriers if v.operator == "aten::batch_norm" and v.kind is Kind.REDUCE]
        advice = ". fxstream.freeze_batch_norm(model) makes them local" if statistics else ""
        if statistics:
            first += f" ({len(statistics)} BatchNorm layers use batch statistics)"
        name = type(self.model).__name__
        self._tell_once(
            "share", f"{plan.streamed_share:.0%} of the activations of {name} are streamed{first}{advice}"
        )

    def _tell_once(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(message, StreamingWarning, stacklevel=2)

    def extra_repr(self) -> str:
        return f"memory={self.request.memory}" if self.request.tile is None else f"tile={self.request.tile}"


def _common(prepared: Prepared) -> dict[str, str]:
    """What ranks that share tiles must have in common, besides the image."""
    draws = any(is_random(node) for node in prepared.analysis.captured.graph.nodes)
    plan = str(prepared.plan)
    return {
        "plan": f"{len(prepared.plan.segments)} segments #{digest(plan.encode())}",
        "random state": digest(torch.get_rng_state().numpy().tobytes()) if draws else "",
    }


@functools.cache
def _untraced_run() -> Callable[..., Any]:
    """`StreamedModule._run`, which no `torch.compile` around it looks into. Loads dynamo, as the capture does."""
    reason = (
        "fxstream compiles this module by itself: without fullgraph=True, it is one call in the graph around it"
    )
    return torch.compiler.disable(StreamedModule._run, reason=reason)  # type: ignore[no-any-return]


def _records(model: nn.Module, tensors: list[torch.Tensor]) -> bool:
    """Whether this call will be followed by a backward, as far as one can know."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*model.parameters(), *tensors))
