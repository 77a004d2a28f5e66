"""What a release must show on a GPU, in one run of at most six minutes: `gpu.py --lines`.

Every row is a way to run a network beside the plain network, or beside that through torch.compile, in the same
process: the median of three steps (forward and backward under bfloat16 autocast, in channels_last; the paper's
network in float32), the peak of the allocator, what the planner predicted of both, and the most that the ratio may
be. Cases come in the order of what they are worth; what the time does not suffice for is said to be left out.

    python examples/benchmarks/gpu.py --lines
    python examples/benchmarks/gpu.py --lines --device cpu --scale 0.0625 --cases "Table I"  # a rehearsal
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from table1 import table_one_network
from torch import nn
from torch.utils import _pytree as pytree

import fxstream
from fxstream.machine.device import release_cached, synchronize
from fxstream.machine.meter import measure
from fxstream.tools.zoo import build

REPEATS = 3
SLOW = 2.0
"""Seconds of a step from which on it is measured once."""
FIRST_CALL = 45.0
"""Seconds that a case is given at least, for its compilation may take as long."""


@dataclass(frozen=True)
class Way:
    """Arguments of `fxstream.compile`, a `share` of the memory, the most that the ratio or milliseconds may be."""

    label: str
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    milliseconds: float = math.inf


@dataclass(frozen=True)
class Case:
    """A network, its image, and the ways to run it; `compiled` is beside torch.compile, `wide` in float32."""

    name: str
    network: str
    shape: tuple[int, int, int, int]
    ways: tuple[Way, ...]
    frozen: bool = False
    compiled: bool = False
    wide: bool = False


def shares(**limits: float) -> tuple[Way, ...]:
    """Ways within shares of the memory, given as ``at_60=1.5``."""
    return tuple(Way(f"{name[3:]}%", limit, share=int(name[3:]) / 100) for name, limit in limits.items())


def tiles(limits: dict[int, float]) -> tuple[Way, ...]:
    """Ways with tiles of so many pixels in one segment."""
    arguments = {"segments": 1, "cuda_graphs": True}
    return tuple(Way(f"tile {tile}, graphs", limit, {"tile": tile, **arguments}) for tile, limit in limits.items())


def within(share: float, milliseconds: float = 300.0) -> Way:
    """A way within a share of the memory, in so much time."""
    return Way(f"{share:.0%}", math.inf, share=share, milliseconds=milliseconds)


CASES = (
    Case("batch statistics", "resnet50", (1, 3, 4096, 4096), shares(at_60=1.5, at_40=1.6, at_25=2.0)),
    Case("batch statistics", "efficientnet_b0", (1, 3, 4096, 4096), shares(at_40=1.5)),
    Case("batch statistics", "fcn_resnet50", (2, 3, 2048, 2048), shares(at_50=1.6)),
    Case(
        "Table I",
        "table 1",
        (1, 3, 1024, 1024),
        (*tiles({518: 1.2, 350: 1.4, 265: 1.6}), Way("tile 265", math.inf, {"tile": 265, "segments": 1})),
        wide=True,
    ),
    Case("Table I", "table 1", (1, 3, 8192, 8192), (within(0.3), within(0.1)), wide=True),
    Case("layers", "convnext_tiny", (1, 3, 4096, 4096), shares(at_25=1.35)),
    Case(
        "frozen",
        "resnet50",
        (1, 3, 4096, 4096),
        (
            Way("compiled, 20%", 1.35, {"compile_tiles": True}, share=0.2),
            Way("compiled, graphs, 20%", 1.35, {"compile_tiles": True, "cuda_graphs": True}, share=0.2),
        ),
        frozen=True,
        compiled=True,
    ),
)


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a step, bytes at the peak, seconds of the first call."""

    milliseconds: float
    peak: int
    first: float


def made(case: Case, device: torch.device, scale: float) -> tuple[nn.Module, torch.Tensor]:
    """The network in training mode and an image of the scaled size."""
    torch.manual_seed(0)
    is_table_one = case.network == "table 1"
    model = table_one_network() if is_table_one else build(f"torchvision/{case.network}")
    model = fxstream.freeze_batch_norm(model) if case.frozen else model
    batch, channels, *extents = case.shape
    image = torch.randn(batch, channels, *(max(64, round(extent * scale)) for extent in extents), device=device)
    if case.wide:
        return model.to(device).train(), image
    layout = torch.channels_last
    return model.to(device, memory_format=layout).train(), image.contiguous(memory_format=layout)


def cost_of(module: nn.Module, model: nn.Module, image: torch.Tensor, wide: bool) -> Cost:
    """The cost of a step: the first, one whose memory is counted, and the median of more."""
    device = image.device

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=not wide):
            results = pytree.tree_leaves(module(image))
        sum(result.float().sum() for result in results).backward()

    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start
    measured = measure(step, device)
    seconds = [measured.seconds]
    while len(seconds) < REPEATS and measured.seconds < SLOW:
        seconds.append(measure(step, device).seconds if device.type != "cpu" else timed(step))
    model.zero_grad(set_to_none=True)
    release_cached()
    peak = measured.peak_bytes
    if isinstance(module, fxstream.StreamedModule):
        peak += fxstream.inspect(module).shared.replayed_bytes
    return Cost(1000 * statistics.median(seconds), peak, first)


def timed(step: Callable[[], None]) -> float:
    """Seconds of a step, without counting its memory."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def rows(case: Case, device: torch.device, scale: float) -> Iterator[tuple[str, ...]]:
    """What a case shows: its reference, and each of its ways."""
    model, image = made(case, device, scale)
    name = f"{case.name}: {case.network} {image.shape[-1]}"
    plain = cost_of(model, model, image, case.wide)
    yield (name, "plain", f"{plain.milliseconds:.1f}", "", "", "", f"{plain.peak / 2**30:.2f} GiB", "", "")
    reference = plain
    if case.compiled:
        reference = cost_of(torch.compile(model), model, image, case.wide)
        ratio = f"{reference.milliseconds / plain.milliseconds:.2f}x plain"
        peak = f"{reference.peak / 2**30:.2f} GiB"
        yield (
            name,
            "torch.compile",
            f"{reference.milliseconds:.1f}",
            ratio,
            "",
            "",
            peak,
            "",
            f"{reference.first:.0f} s",
        )
    for way in case.ways:
        arguments = dict(way.arguments)
        if way.share is not None:
            # At the sizes of a rehearsal gradients of weights are most of the memory: they come on top.
            weights = sum(weight.nbytes for weight in model.parameters()) if scale < 1 else 0
            arguments["memory"] = int(way.share * reference.peak) + 2 * weights
        if "tile" in arguments:
            arguments["tile"] = max(24, round(arguments["tile"] * scale))
        try:
            module = fxstream.compile(model, verify=False, **arguments)
            cost = cost_of(module, model, image, case.wide)
        except fxstream.FxstreamError as error:
            yield (name, way.label, f"{type(error).__name__}: {str(error)[:60]}", "", "", "", "", "", "")
            continue
        yield row_of(name, way, cost, plain, reference, module.plan.prediction)


def row_of(name: str, way: Way, cost: Cost, plain: Cost, reference: Cost, predicted: Any) -> tuple[str, ...]:
    """The cells of one way."""
    ratio = cost.milliseconds / reference.milliseconds
    verdict = "yes" if ratio <= way.limit and cost.milliseconds <= way.milliseconds else "no"
    limit = f"{way.limit:.2f}x" if way.limit < math.inf else f"{way.milliseconds:.0f} ms"
    told = predicted.time_ratio * plain.milliseconds / cost.milliseconds
    bytes_told = predicted.bytes / max(1, cost.peak)
    return (
        name,
        way.label,
        f"{cost.milliseconds:.1f}",
        f"{ratio:.2f}x",
        f"{limit}: {verdict}",
        f"{told:.2f}",
        f"{cost.peak / reference.peak:.0%}",
        f"{bytes_told:.2f}",
        f"{cost.first:.0f} s",
    )


def main(device: torch.device, scale: float, seconds: float, names: Sequence[str]) -> None:
    """Run the cases of these names, all without any, until so many seconds have passed."""
    table = Table(
        "case", "way", "ms", "time", "at most", "predicted / measured", "memory", "predicted", "first call"
    )
    start = time.perf_counter()
    for case in CASES:
        if names and case.name not in names:
            continue
        left = seconds - (time.perf_counter() - start)
        if left < FIRST_CALL * (1 + case.compiled) * min(1.0, scale):
            table.add_row(f"{case.name}: {case.network}", "left out: no time")
            continue
        for row in rows(case, device, scale):
            table.add_row(*row)
        release_cached()
    console = Console(width=150)
    console.print(table)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, at {scale:g} of the sizes"
    spent = time.perf_counter() - start
    console.print(f"{where}, torch {torch.__version__}, medians of {REPEATS}, {spent:.0f} s in all")
