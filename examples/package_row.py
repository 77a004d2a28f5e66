"""One network of a list, measured: what of it streams, and whether a step within less memory has plain's numbers.

    python examples/package_row.py LIST.py NAME [BYTES]

Prints a JSON object per line as it goes, so that a process that is stopped has said what it knew. `networks.py
--packages` runs it, a process per network; BYTES bounds what the process may allocate.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import json
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from package_network import Network, build
from torch import nn

import fxstream
from fxstream.machine.meter import PeakMemory
from fxstream.tiling.parts import streamable_share
from fxstream.tools.check import Step, least_norms, relative_error, step

SHARE = 0.3
"""Of plain's memory, within which a step has to be exact."""
ROOM = 1.1
"""Of the least memory that a plan names, where it is more than that."""
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
FACTOR = 2
"""Of the change of plain's own step by rounding, where that is more: a bias before a normalisation has none."""
FOLDERS = re.compile(r"[^\s`(]*/(?=site-packages/|fxstream/)")
MOST_BARRIERS = 3
MOST_BYTES = 2**34
SAID: dict[str, Any] = {}
"""What this process has said so far."""


def networks_of(path: Path) -> dict[str, Network]:
    """The networks of a Python file that has them as `NETWORKS`, by name; it may import what lies beside it."""
    sys.path.insert(0, str(path.resolve().parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return {network.name: network for network in module.NETWORKS}


def say(**cells: Any) -> None:
    SAID.update(cells)
    print(json.dumps(cells), flush=True)


def words(error: BaseException) -> str:
    """An exception in one line, without the folders of this machine."""
    text = FOLDERS.sub("", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:400]


def is_refusal(error: BaseException) -> bool:
    """Whether an exception says what cannot be done, rather than that something broke."""
    return isinstance(error, (fxstream.CaptureError, fxstream.InputError, fxstream.PlanError))


def analysed(analysis: fxstream.Analysis, mode: str) -> None:
    """Say what streams in a mode, and the barriers that most often stand in the way."""
    barriers = [f"{barrier.operator}: {barrier.reason}" for barrier in analysis.barriers]
    counts = [f"{text} ({count})" for text, count in Counter(barriers).most_common(MOST_BARRIERS)]
    say(
        **{
            f"streamed_{mode}": round(streamable_share(analysis.graph), 4),
            "bound_to_size": analysis.captured.bound,
        }
    )
    say(**{f"first_barrier_{mode}": barriers[0] if barriers else "", f"barriers_{mode}": "; ".join(counts)})


def trains_alike(model: nn.Module, image: torch.Tensor) -> bool:
    """Whether a call in training mode draws nothing: a stream draws other numbers than a plain call.

    No where there is no such call, as of a BatchNorm over one value.
    """
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(image)
    except (RuntimeError, ValueError):
        return False
    return torch.equal(torch.get_rng_state(), before)


def in_float64(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    """A copy in float64 with an image; in float32 where the network's own code asks for that."""
    torch.manual_seed(0)
    wide, image = copy.deepcopy(model).double(), torch.randn(shape, dtype=torch.float64)
    try:
        with torch.no_grad():
            copy.deepcopy(wide)(image)
    except RuntimeError:
        wide, image = model, image.float()
    try:
        copy.deepcopy(wide)(image.requires_grad_())
    except RuntimeError:  # it writes into its input, which must not be a leaf then
        image.requires_grad_(False)
    return wide, image


def within(model: nn.Module, image: torch.Tensor, memory: int) -> tuple[int, Any, Step]:
    """A step within so many bytes, or within the least that works where that is more; and how many these are."""
    streamed = copy.deepcopy(model)
    compiled = fxstream.compile(streamed, memory=memory)
    try:
        return memory, compiled, step(compiled, streamed, [image])
    except fxstream.PlanError as error:
        if error.least_bytes is None or memory >= MOST_BYTES:
            raise
        say(least_memory=words(error))
        return within(model, image, int(ROOM * error.least_bytes))  # again for each part of a broken graph


def types_inside(graph: Any) -> set[torch.dtype]:
    """The types that the network computes maps in: its own code may cast them, as to normalise in float32."""
    values = (value for node in graph.nodes.values() for value in node.values)
    return {value.dtype for value in values if value.image and value.dtype in TOLERANCES}


def distance(results: Step, expected: Step) -> float:
    """The largest relative error of a tensor of a step."""
    least = least_norms(expected)
    return max(relative_error(results[name], expected[name], least[name]) for name in expected)


def rounding(model: nn.Module, image: torch.Tensor, expected: Step) -> float:
    """How far plain's own step moves when each number of its image is the next one that there is."""
    neighbour = torch.nextafter(image.detach(), torch.full_like(image, torch.inf))
    moved = copy.deepcopy(model)
    return distance(step(moved, moved, [neighbour.requires_grad_(image.requires_grad)]), expected)


def compared(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Say how far a step within a share of plain's memory is from plain's, and how much memory that was."""
    model, image = in_float64(model, shape)
    model.train(trains_alike(model, image))
    mode = "training" if model.training else "eval"
    say(compared_in=f"{mode} {str(image.dtype).removeprefix('torch.')}")
    original = copy.deepcopy(model)
    with PeakMemory() as plain:
        expected = step(original, original, [image])
    memory, compiled, results = within(model, image, int(SHARE * plain.peak))
    error = distance(results, expected)
    say(memory_share=round(memory / plain.peak, 3), segments=len(compiled.plan.segments), error=error)
    streaming = fxstream.inspect(compiled)
    types = {image.dtype, *types_inside(streaming.last.analysis.graph)}
    tolerance = max(TOLERANCES[dtype] for dtype in types)
    if error > tolerance:
        of_plain = rounding(model, image, expected)
        say(rounding=of_plain)
        tolerance = FACTOR * of_plain
    say(exact=error <= tolerance)
    if len(streaming.calls) == 1:  # else it is not one graph, as the analysis says
        analysed(streaming.last.analysis, mode)


def measure(network: Network) -> None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        say(version=f"{network.package} {importlib.metadata.version(network.package)}")
    say(torch=torch.__version__.partition("+")[0], shape="x".join(map(str, network.shape)))
    torch.manual_seed(0)
    model = build(network).eval()
    with torch.no_grad():
        model(torch.randn(network.shape))  # what a network makes at its first call, and whether it runs at all
    for what, ask in (
        ("compared", lambda: compared(model, network.shape)),
        ("eval", lambda: analysed(fxstream.analyze(model.eval(), inputs=[network.shape]), "eval")),
        ("training", lambda: analysed(fxstream.analyze(model.train(), inputs=[network.shape]), "training")),
    ):
        if f"streamed_{what}" in SAID:
            continue
        started = time.process_time()
        try:
            ask()
        except Exception as error:
            say(**{f"failure_{what}": words(error)}, **({} if is_refusal(error) else {"crashed": True}))
        say(**{f"seconds_{what}": round(time.process_time() - started, 1)})


def main() -> None:
    path, name, *limit = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if limit and sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(limit[0]),) * 2)
    measure(networks_of(Path(path))[name])


if __name__ == "__main__":
    main()
