"""One training step by several methods, each measured in processes of its own, by turns.

The methods are the plain network, `torch.utils.checkpoint` around every block, torch.compile, with or without a
budget for what its partitioner saves for backward, and fxstream with a tile or a memory. A process builds the
network, runs one step to warm up (fxstream captures and plans in it), one that counts bytes and one that is timed.
Medians over the rounds are reported; running out of memory is a result too.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fxstream.compiler.compile import compile
from fxstream.compiler.module import StreamedModule, inspect
from fxstream.compiler.options import RequestOptions
from fxstream.machine.device import synchronize
from fxstream.machine.meter import measure, resident_bytes, resident_now
from fxstream.tools.freeze import freeze_batch_norm
from fxstream.tools.inputs import drawn_inputs
from fxstream.tools.model_spec import load
from fxstream.tools.values import Input, title_of

__all__ = ["CHECKPOINT", "COMPILED", "FXSTREAM", "PLAIN", "Method", "Row", "Workload", "checkpointed", "compare"]

PLAIN, CHECKPOINT, COMPILED, FXSTREAM = "plain", "checkpoint", "torch.compile", "fxstream"
KILLED = (-9, 137)
"""Exit codes of a process that the system ended for its memory."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What all methods have in common: network, mode, shapes and types of inputs, device, options of `compile`."""

    target: str
    inputs: tuple[Input, ...]
    train: bool = False
    freeze_batch_norm: bool = False
    device: str = "cpu"
    options: RequestOptions = field(default_factory=RequestOptions)

    @property
    def title(self) -> str:
        """Network, inputs and mode in one line."""
        return title_of(self.target, self.inputs, self.train, self.freeze_batch_norm)


@dataclass(frozen=True, slots=True)
class Method:
    """How a step is run: `PLAIN`, `CHECKPOINT`, `COMPILED`, or `FXSTREAM` with a tile or a memory in its options.

    `saved` is the share of the activations that torch.compile is told to save for backward.
    """

    kind: str
    label: str
    options: RequestOptions = field(default_factory=RequestOptions)
    saved: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """What a method was measured to take, in seconds and bytes; `failure` says why where it did not run.

    `resident_bytes` is what the process itself grew by, with what allocators keep for later.
    """

    method: Method
    seconds: float = 0.0
    peak_bytes: int = 0
    resident_bytes: int = 0
    predicted_bytes: int | None = None
    predicted_time: float | None = None
    overhead: float | None = None
    failure: str = ""


def compare(
    workload: Workload,
    methods: Sequence[Method],
    rounds: int,
    announce: Callable[[str], None] = lambda _: None,
    too_large: str = "",
) -> list[Row]:
    """Measure every method in every round, by turns; medians of the seconds, the largest of the bytes.

    `too_large` says why the dense network cannot run: only `FXSTREAM` is measured. `announce` is called with a
    line about each measurement before it starts.
    """
    rows: list[list[Row]] = [
        [Row(method, failure=too_large)] if too_large and method.kind != FXSTREAM else [] for method in methods
    ]
    for number in range(1, rounds + 1):
        for method, measured in zip(methods, rows, strict=True):
            if not any(row.failure for row in measured):
                announce(f"round {number} of {rounds}: {method.label}")
                measured.append(_in_a_process(workload, method))
    return [_median(measured) for measured in rows]


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


def _in_a_process(workload: Workload, method: Method) -> Row:
    task = json.dumps([dataclasses.asdict(workload), dataclasses.asdict(method)])
    done = subprocess.run(
        [sys.executable, "-c", "from fxstream.tools.benchmark import worker; worker()"],
        input=task,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Row(method, **json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode in KILLED or "OutOfMemory" in lines[-1] or "can't allocate memory" in lines[-1]:
        return Row(method, failure="out of memory")
    return Row(method, failure=lines[-1])


def worker() -> None:
    """Run the task on standard input and print what was measured as JSON."""
    workload, method = json.loads(sys.stdin.read())
    inputs = tuple((tuple(shape), dtype) for shape, dtype in workload.pop("inputs"))
    warnings.simplefilter("ignore")
    print(json.dumps(_measured(Workload(inputs=inputs, **workload), Method(**method))))


def _measured(workload: Workload, method: Method) -> dict[str, Any]:
    """The fields of a row that are measured, by name."""
    torch.manual_seed(0)
    device = torch.device(workload.device)
    model = load(workload.target, weights=True).train(workload.train).to(device)
    if workload.freeze_batch_norm:
        freeze_batch_norm(model)
    module = _by_method(model, method, workload.options)
    step = partial(one_step, module, model, drawn_inputs(model, workload.inputs))
    before = resident_now()
    step()
    peak, grown = measure(step, device).peak_bytes, resident_bytes() - before
    if isinstance(module, StreamedModule):
        peak += inspect(module).shared.replayed_bytes
    start = time.perf_counter()
    step()
    synchronize(device)
    row = {"seconds": time.perf_counter() - start, "peak_bytes": peak, "resident_bytes": grown}
    return row | (_predicted(module) if isinstance(module, StreamedModule) else {})


def _by_method(model: nn.Module, method: Method, options: RequestOptions) -> nn.Module:
    if method.kind == FXSTREAM:
        return compile(model, **(options | method.options))
    if method.kind == COMPILED:
        functorch.activation_memory_budget = method.saved
        functorch.activation_memory_budget_solver = "dp"
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]
    return checkpointed(model) if method.kind == CHECKPOINT else model


def _predicted(module: StreamedModule) -> dict[str, Any]:
    plan = module.plan
    return {
        "predicted_bytes": plan.prediction.bytes,
        "predicted_time": plan.prediction.time_ratio,
        "overhead": plan.overhead,
    }


def one_step(module: nn.Module, model: nn.Module, images: Sequence[torch.Tensor]) -> None:
    """Forward and backward of the sum of all outputs; `model` owns the parameters."""
    model.zero_grad(set_to_none=True)
    outputs = [t for t in pytree.tree_leaves(module(*images)) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]


def checkpointed(model: nn.Module) -> nn.Module:
    """The model with `torch.utils.checkpoint` around its blocks, in place.

    Blocks are those children of every `nn.Sequential` that have children themselves, the outermost first; where
    there are none, the direct children of the model.
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
