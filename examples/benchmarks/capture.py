"""Seconds for capture and analysis: the first call at a size, and a call at another size."""

import argparse
import itertools
import time

import torch
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.capture.capture import capture
from fxstream.compiler.analysis import analyse
from fxstream.planning.plan import make_plan
from fxstream.runtime.rewrite import rewrite
from fxstream.tiling.request import Request
from fxstream.tools.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50", "densenet121", "densenet201"])
parser.add_argument("--size", type=int, default=4096)
parser.add_argument("--tile", type=int, default=2048)
options = parser.parse_args()

table = Table("network", "capture", "analysis", "plan", "tile programs", "all")
analyse(*capture(torch.nn.Conv2d(3, 3, 3), (torch.ones(1, 3, 9, 9),), {}))
for name in options.networks:
    model = fxstream.freeze_batch_norm(build(f"torchvision/{name}"))
    image = torch.empty(1).expand(1, 3, options.size, options.size)
    times = [time.perf_counter()]
    captured, values = capture(model, (image,), {})
    times.append(time.perf_counter())
    analysis = analyse(captured, values)
    times.append(time.perf_counter())
    plan = make_plan(analysis.graph, Request(options.tile))
    times.append(time.perf_counter())
    rewrite(captured, analysis.graph, plan)
    times.append(time.perf_counter())
    spent = [b - a for a, b in itertools.pairwise(times)]
    table.add_row(name, *(f"{t:.1f} s" for t in (*spent, times[-1] - times[0])))
console = Console()
console.print(table)
console.print(
    f"size {options.size}, tile {options.tile}, torch {torch.__version__}, {torch.get_num_threads()} threads"
)
