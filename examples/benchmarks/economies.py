"""What each economy of a step is worth alone: time and peak memory without it, over those with all.

A training step with frozen BatchNorm within one budget. Each economy is taken away in turn, with the same
segments and tiles: BatchNorm folded into convolutions, graphs of tiles kept from forward to backward, convolutions
that are not recomputed where no backward needs their result, operators in place, and the gradient of the image,
which nobody asks for. Runs alternate.

    python examples/benchmarks/economies.py
"""

import argparse
import operator
import statistics
import time
import warnings
from dataclasses import replace

import torch
from budget import budget_of_share
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.graph.autograd_saves import saves_of
from fxstream.machine.meter import measure
from fxstream.planning.plan import make_plan
from fxstream.runtime.rewrite import rewrite
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory, skip_convolutions
from fxstream.tiling.segment import isolated, make_segment, with_nodes
from fxstream.tiling.segment_plan import plan_segment, plan_whole
from fxstream.tools.model_spec import load

NETWORKS = ["torchvision/resnet50", "torchvision/densenet121", "torchvision/vgg11"]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--networks", nargs="+", default=NETWORKS)
parser.add_argument("--size", type=int, default=1536)
parser.add_argument("--share", type=float, default=0.2, help="the budget, of the plain network's activations")
parser.add_argument("--repeats", type=int, default=3)
options = parser.parse_args()
warnings.simplefilter("ignore", fxstream.StreamingWarning)
torch.manual_seed(0)


def unmarked(segment, **marks):
    """The segment with marks taken away from all of its nodes: `reuses` or `skips`."""
    return with_nodes(segment, [replace(segment.graph[name], **marks) for name in segment.nodes])


def unfused(part, graph):
    """The same tiles of the segment with its BatchNorms as nodes of their own."""
    segment = make_segment(graph, part.segment.name, part.segment.covers, part.segment.outputs)
    segment = skip_convolutions(reuse_memory(isolated(segment)))
    if not part.axes:
        return replace(plan_whole(segment), kept=part.kept)
    tiled = plan_segment(segment, Request(None), [len(tiles) for tiles in part.axes])
    return replace(tiled, kept=part.kept)


def part_without(economy, part, graph):
    """A segment and its tiles without one of the economies."""
    if economy == "kept graphs":
        return replace(part, kept=0)
    if economy == "skipped convolutions":
        return replace(part, segment=unmarked(part.segment, skips=False))
    if economy == "operators in place":
        return replace(part, segment=unmarked(part.segment, reuses=False))
    return unfused(part, graph) if economy == "folded BatchNorm" else part


def streamed(model, image, memory, without=""):
    """A streamed graph of the model, as a function of the image, without one of the economies."""
    analysis = fxstream.analyze(model, image.shape[-1])
    captured, graph = analysis.captured, analysis.graph.with_saves(saves_of(analysis.graph))
    marked = reuse_memory(graph)
    plan = make_plan(marked, Request(None, memory=memory))
    plan = replace(plan, segments=tuple(part_without(without, part, graph) for part in plan.segments))
    module = rewrite(captured, graph if without == "operators in place" else marked, plan)
    weights = [operator.attrgetter(path)(model) for path in captured.tensors]
    return plan, lambda x: module(*weights, x)[0]


ECONOMIES = (
    "folded BatchNorm",
    "kept graphs",
    "skipped convolutions",
    "operators in place",
    "no gradient of the image",
)
table = Table("network", "without", "time", "memory")
for name in options.networks:
    model, image = load(name, weights=True), torch.randn(1, 3, options.size, options.size)
    fxstream.freeze_batch_norm(model).eval()  # no dropout
    memory, _ = budget_of_share(model, options.size, options.share)
    steps = {}
    for without in ("", *ECONOMIES):
        plan, run = streamed(model, image, memory, without)
        if not plan.segments:
            parser.error(f"{name} streams nothing within --share {options.share}: give a larger --size or less")
        given = image.clone().requires_grad_(without == "no gradient of the image")

        def step(run=run, model=model, given=given):
            model.zero_grad()
            given.grad = None
            run(given).sum().backward()

        steps[without] = step
    peaks = {without: (step(), measure(step).peak_bytes)[1] for without, step in steps.items()}
    times = {without: [] for without in steps}
    for _ in range(options.repeats):
        for without, step in steps.items():
            start = time.perf_counter()
            step()
            times[without].append(time.perf_counter() - start)
    for without in list(steps)[1:]:
        ratio = statistics.median(a / b for a, b in zip(times[without], times[""], strict=True))
        table.add_row(name, without, f"{ratio:.2f}x", f"{peaks[without] / peaks['']:.2f}x")
    kept = sum(segment.kept for segment in plan.segments)
    tiles = sum(segment.tile_count for segment in plan.segments)
    print(f"{name}: {len(plan.segments)} segments, {tiles} tiles, {kept} of them kept", flush=True)
console = Console()
console.print(table)
threads = torch.get_num_threads()
console.print(f"{options.size} pixels, torch {torch.__version__}, {threads} threads, medians of {options.repeats}")
