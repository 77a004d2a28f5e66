"""One training step in several ways, each measured in processes of its own, by turns.

The ways are the plain network, `torch.utils.checkpoint` around every block, and fxstream with a tile or a memory.
A process builds the network, runs one step to warm up (fxstream captures and plans in it), one that counts bytes
and one that is timed. Medians over the rounds are given; a way that runs out of memory is a result too.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxstream.compiler.compile import compile
from fxstream.compiler.module import StreamedModule
from fxstream.machine.meter import measure
from fxstream.tools.freeze import freeze_batch_norm
from fxstream.tools.model_spec import load

__all__ = ["Row", "Setting", "Way", "checkpointed", "compare"]

KILLED = (-9, 137)
"""Exit codes of a process that the system ended for its memory."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all ways have in common: the network, its mode, the image's shape, the device."""

    target: str
    shape: tuple[int, ...]
    train: bool = False
    freeze_batch_norm: bool = False
    device: str = "cpu"
    segments: int | None = None
    cut: str | None = None
    global_ops: str = "auto"
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a step: "plain", "checkpoint", or "fxstream" with a tile or a memory in bytes."""

    kind: str
    tile: int | tuple[int, ...] | None = None
    memory: int | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """What a way was measured to take; `failure` says why where it did not run.

    `resident_bytes` is what the process itself grew by, which includes what allocators hold back.
    """

    way: Way
    seconds: float = 0.0
    peak_bytes: int = 0
    resident_bytes: int = 0
    predicted_bytes: int | None = None
    predicted_time: float | None = None
    overhead: float | None = None
    failure: str = ""


def compare(
    setting: Setting, ways: Sequence[Way], rounds: int, told: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Measure every way in every round, by turns; medians of the seconds, the largest of the bytes."""
    found: dict[int, list[Row]] = {i: [] for i in range(len(ways))}
    for turn in range(rounds):
        for i, way in enumerate(ways):
            told(f"round {turn + 1} of {rounds}: {way.label}")
            if not any(row.failure for row in found[i]):
                found[i].append(_in_a_process(setting, way))
    return [_median(rows) for rows in found.values()]


def _median(rows: Sequence[Row]) -> Row:
    failed = [row for row in rows if row.failure]
    if failed:
        return failed[0]
    return dataclasses.replace(
        rows[0],
        seconds=statistics.median(row.seconds for row in rows),
        peak_bytes=max(row.peak_bytes for row in rows),
        resident_bytes=max(row.resident_bytes for row in rows),
    )


def _in_a_process(setting: Setting, way: Way) -> Row:
    task = json.dumps({"setting": dataclasses.asdict(setting), "way": dataclasses.asdict(way)})
    done = subprocess.run(
        [sys.executable, "-c", "from fxstream.tools.benchmark import worker; worker()"],
        input=task,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Row(way, **json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode in KILLED or "OutOfMemory" in lines[-1] or "can't allocate memory" in lines[-1]:
        return Row(way, failure="out of memory")
    return Row(way, failure=lines[-1])


def worker() -> None:
    """Run the task on standard input and print what was measured as JSON."""
    task = json.loads(sys.stdin.read())
    shape, tile = tuple(task["setting"].pop("shape")), task["way"].pop("tile")
    setting = Setting(shape=shape, **task["setting"])
    way = Way(tile=tuple(tile) if isinstance(tile, list) else tile, **task["way"])
    warnings.simplefilter("ignore")
    print(json.dumps(_measured(setting, way)))


def _measured(setting: Setting, way: Way) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(setting.device)
    model = load(setting.target, weights=True).train(setting.train).to(device)
    if setting.freeze_batch_norm:
        freeze_batch_norm(model)
    image = torch.randn(setting.shape, device=device)
    module: nn.Module = model
    if way.kind == "checkpoint":
        module = checkpointed(model)
    if way.kind == "fxstream":
        names = ("segments", "cut", "global_ops", "offload")
        options = {name: getattr(setting, name) for name in names}
        module = compile(model, tile=way.tile, memory=way.memory, **options)
    step = partial(one_step, module, model, image)
    before = _resident()
    step()
    counted = measure(step, device)
    grown = _resident() - before
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": counted.peak_bytes,
        "resident_bytes": grown,
    }
    if isinstance(module, StreamedModule):
        plan = module.plan
        found |= {"predicted_bytes": plan.prediction.bytes, "predicted_time": plan.prediction.time_ratio}
        found |= {"overhead": plan.overhead}
    return found


def _resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_step(module: nn.Module, model: nn.Module, image: torch.Tensor) -> None:
    """Forward and backward of the sum of all outputs; `model` owns the parameters."""
    model.zero_grad(set_to_none=True)
    outputs = [t for t in pytree.tree_leaves(module(image)) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with `torch.utils.checkpoint` around its blocks, in place.

    Blocks are the children with children of their own of every `nn.Sequential`, the outermost first; where there
    are none, all of the model's own children.
    """
    blocks = list(_blocks(model)) or [m for m in model.children() if any(True for _ in m.parameters())]
    for block in blocks:
        forward = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        inner = [m for m in child.children() if any(True for _ in m.children())]
        if isinstance(child, nn.Sequential) and inner:
            yield from inner
        else:
            yield from _blocks(child)
