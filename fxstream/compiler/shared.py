"""What the graphs of one model have in common: what it is compiled with, and what its user was warned of."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxstream.compiler.analysis import Analysis
from fxstream.compiler.compiled_tiles import TileCompiler
from fxstream.compiler.prepared import Prepared
from fxstream.errors import StreamingWarning
from fxstream.machine.device import budget_of
from fxstream.machine.progress import Bar
from fxstream.machine.replay import can_replay
from fxstream.planning.decision import Decision
from fxstream.planning.plan import Plan
from fxstream.rules import Reason
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.replays.replays import Replays
from fxstream.tiling.parts import streamable_share
from fxstream.tiling.request import Request

__all__ = ["Options", "Shared"]

SMALL_SHARE = 0.5
"""Below this share of streamed activations a warning says what stands in the way."""
MOST_NAMED = 3
"""Stretches that a warning names."""


@dataclass(frozen=True, slots=True)
class Options:
    """All that `compile` is asked for."""

    request: Request
    verify: bool = True
    compile_tiles: bool | Mapping[str, Any] = False
    mesh: Any = None
    progress: bool = False
    plan: Decision | None = None


class Retained(threading.local):
    """The bytes that the parts of a model which have run keep for their backward, in this call of this thread."""

    bytes = 0


class Shared:
    """What the graphs of one model have in common: its options, what was warned of, and what ran last."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.last: Prepared | None = None
        self.warned: set[str] = set()
        """The topics that the user was warned about, or that are not worth a warning."""
        self.retained = Retained()
        self.ranks = None if options.mesh is None else Ranks(options.mesh)
        self.watch = Bar() if options.progress else None
        self.replays = Replays() if options.request.cuda_graphs else None
        compiled = options.compile_tiles
        self.tile_compiler = None if compiled is False else TileCompiler({} if compiled is True else compiled)

    @property
    def replayed_bytes(self) -> int:
        """What replays of tiles have between calls."""
        return 0 if self.replays is None else self.replays.bytes

    def warn_once(self, topic: str, message: str) -> None:
        """A warning, the first time that something is to be said about a topic."""
        if topic not in self.warned:
            self.warned.add(topic)
            warnings.warn(message, StreamingWarning, stacklevel=2)

    def warn_what_stops_the_stream(self, analysis: Analysis, plan: Plan, device: torch.device) -> None:
        barriers, request = analysis.barriers, self.options.request
        fits = request.tile is None and plan.prediction.plain_bytes <= budget_of(request.memory, device)
        # Within a memory no more is streamed than has to be.
        share = plan.streamed_share if request.tile is not None else streamable_share(analysis.graph)
        if max(share, plan.streamed_share) >= SMALL_SHARE or request.cut is not None or fits or not barriers:
            return
        first, advice = f": {barriers[0]}", ""
        statistics = [v for v in barriers if v.not_tileable_for(Reason.BATCH_STATISTICS)]
        if statistics:
            first += f" ({len(statistics)} BatchNorm layers use batch statistics)"
            advice = ". fxstream.freeze_batch_norm(model) makes them local"
        name = self.name
        self.warn_once(
            "share", f"{plan.streamed_share:.0%} of the activations of {name} are streamed{first}{advice}"
        )

    def warn_without_graphs(self, device: torch.device) -> None:
        if self.replays is not None and not can_replay(device):
            self.warn_once("graphs", f"cuda_graphs changes nothing on {device}, which has none")

    def warn_what_runs_whole(self, plan: Plan) -> None:
        if plan.untiled:
            more = len(plan.untiled) - MOST_NAMED
            listed = ", ".join(plan.untiled[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            self.warn_once(
                "untiled",
                f"tile={self.options.request.tile} is too small for {listed}: these run whole. A larger"
                " tile, or a memory, bounds them too",
            )
