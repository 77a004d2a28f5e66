"""What each economy of a step is worth alone: time and peak memory without it, over those with all.

A training step with frozen BatchNorm within one budget. Each economy is taken away in turn, with the same
segments and tiles: BatchNorm folded into convolutions, graphs of tiles kept from forward to backward, convolutions
that are not recomputed where no backward needs their result, operators in place, and the gradient of the image,
which nobody asks for. Runs alternate.

    python examples/benchmarks/economies.py
"""

import argparse
import statistics
import time
import warnings
from dataclasses import replace

import torch
from budget import budget_of_share
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.meter import measure
from fxstream.planning.plan import make_plan
from fxstream.runtime import tile_program
from fxstream.runtime.rewrite import rewrite
from fxstream.tiling import fold as folding
from fxstream.tiling.autograd_saves import saved_by
from fxstream.tiling.request import Request
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


def streamed(model, image, memory, without=""):
    """A streamed graph of the model, as a function of the image, without one of the economies."""
    analysis = fxstream.analyze(model, image.shape[-1])
    locality, captured = analysis.locality, analysis.captured
    plan = make_plan(locality, Request(None, memory=memory))
    if without == "kept graphs":
        plan = replace(plan, segments=tuple(replace(segment, kept=0) for segment in plan.segments))
    before = tile_program.without_unneeded, tile_program.reuse_inputs, folding.folds_in
    if without == "skipped convolutions":
        tile_program.without_unneeded = lambda program, *_: program
    if without == "operators in place":
        tile_program.reuse_inputs = lambda *_: None
    if without == "folded BatchNorm":
        folding.folds_in = lambda *_: {}
    graph = rewrite(captured, locality, plan, saved_by(locality))
    tile_program.without_unneeded, tile_program.reuse_inputs, folding.folds_in = before
    return plan, lambda x: graph(*captured.model_tensors(model), x)[0]


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
