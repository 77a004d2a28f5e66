"""Streamed time over plain time, forward and forward + backward, for 1, 4, 9 and 16 tiles.

The network of the paper's Table I (`table1.py` has the paper's tiles and figures), ResNet-18 and ResNet-50 with
frozen BatchNorm (the planner's segments). Plain and streamed runs alternate; printed are medians of their ratio,
and the arithmetic that the overlap adds, so that what the tile loop itself costs can be read off. One tile takes
the plain path.
"""

import argparse
import statistics
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from table1 import table_one_network

import fxstream
from fxstream.planning.plan import make_plan
from fxstream.tiling.request import Request
from fxstream.tools.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--quick", action="store_true", help="one repeat on smaller images")
parser.add_argument("--networks", nargs="+", default=["Table I", "ResNet-18", "ResNet-50"])
options = parser.parse_args()
repeats = 1 if options.quick else options.repeats
scale = 2 if options.quick else 1
warnings.simplefilter("ignore", fxstream.StreamingWarning)
torch.manual_seed(0)


def resnet(name):
    """A ResNet with frozen BatchNorm that ends in its feature map."""
    return fxstream.freeze_batch_norm(build(f"torchvision/{name}"))


def smallest_tile(graph, size, grid, segments):
    """The smallest tile that gives the first segment `grid` tiles per side, by bisection on the plan."""
    low, high = 1, size
    while high - low > 1:
        middle = (low + high) // 2
        try:
            first = make_plan(graph, Request(middle, segments)).segments[0]
            fits = max(len(tiles) for tiles in first.axes) <= grid
        except fxstream.PlanError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


def seconds(step, model, image):
    start = time.perf_counter()
    step(model, image)
    return time.perf_counter() - start


def forward(model, image):
    with torch.no_grad():
        model(image)


def both(model, image):
    model(image).sum().backward()


console = Console()
table = Table("network", "image", "segments", "tiles", "tile", "MACs", "forward", "forward + backward")
for name, model, size, segments in (
    ("Table I", table_one_network(), 1024 // scale, 1),
    ("ResNet-18", resnet("resnet18"), 1024 // scale, None),
    ("ResNet-50", resnet("resnet50"), 1024 // scale, None),
):
    if name not in options.networks:
        continue
    image = torch.randn(1, 3, size, size)
    graph = fxstream.analyze(model, size).graph
    for grid in (1, 2, 3, 4):
        tile = size if grid == 1 else smallest_tile(graph, size, grid, segments)
        streamed = fxstream.compile(model, tile=tile, segments=segments)
        forward(streamed, image)
        ratios = []
        for step in (forward, both):
            times = [(seconds(step, streamed, image), seconds(step, model, image)) for _ in range(repeats)]
            ratios.append(f"{statistics.median(a / b for a, b in times):.2f}x")
        plans = streamed.plan.segments
        overhead = streamed.plan.overhead
        row = (name, size, len(plans), plans[0].tile_count, tile, f"{overhead:.2f}x", *ratios)
        table.add_row(*map(str, row))
console.print(table)
console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {repeats}")
