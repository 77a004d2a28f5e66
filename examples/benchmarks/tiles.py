"""Streamed time over plain time, forward and forward + backward, for 1, 4, 9 and 16 tiles.

The network of the paper's Table I (three convolutions, 3 -> 64 -> 3 channels), ResNet-18 and ResNet-50 with
frozen BatchNorm, one segment each. Plain and streamed runs alternate; printed are medians and their ratio, and
the arithmetic that the overlap adds, so that what the tile loop itself costs can be read off.
"""

import argparse
import statistics
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxstream
from fxstream.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--quick", action="store_true", help="one repeat on smaller images")
options = parser.parse_args()
repeats = 1 if options.quick else options.repeats
scale = 2 if options.quick else 1
warnings.simplefilter("ignore", fxstream.StreamingWarning)
torch.manual_seed(0)


def table_one_network():
    """The paper's Table I: every convolution has a kernel of 3 and padding 1."""
    return nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 3), (3, 64), (64, 3))))


def resnet(name):
    """A ResNet with frozen BatchNorm that ends in its feature map."""
    return fxstream.freeze_batch_norm(build(f"torchvision/{name}"))


def smallest_tile(model, image, grid):
    """The smallest tile that gives `grid` tiles per side, by bisection on the plan."""
    low, high = 1, image.shape[-1]
    while high - low > 1:
        middle = (low + high) // 2
        try:
            module = fxstream.compile(model, tile=middle, segments=1)
            with torch.no_grad():
                analysis = fxstream.analyze(model, image.shape[-1])
            tiles = max(
                len(t) for t in fxstream.planning.make_plan(analysis.locality, module.request).segments[0].axes
            )
        except fxstream.PlanError:
            tiles = grid + 1
        low, high = (low, middle) if tiles <= grid else (middle, high)
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
table = Table("network", "image", "tiles", "tile", "MACs", "forward", "forward + backward")
for name, model, size in (
    ("Table I", table_one_network(), 1024 // scale),
    ("ResNet-18", resnet("resnet18"), 1536 // scale),
    ("ResNet-50", resnet("resnet50"), 1536 // scale),
):
    image = torch.randn(1, 3, size, size)
    for grid in (1, 2, 3, 4):
        tile = size if grid == 1 else smallest_tile(model, image, grid)
        streamed = fxstream.compile(model, tile=tile, segments=1)
        forward(streamed, image)
        ratios = []
        for step in (forward, both):
            times = [(seconds(step, streamed, image), seconds(step, model, image)) for _ in range(repeats)]
            ratios.append(statistics.median(a / b for a, b in times))
        plan = streamed.plan.segments[0]
        console.print(f"{name} {size} {plan.tile_count} {tile} {plan.overhead:.2f} {ratios}", style="dim")
        table.add_row(
            name,
            str(size),
            str(plan.tile_count),
            str(tile),
            f"{plan.overhead:.2f}x",
            *(f"{r:.2f}x" for r in ratios),
        )
console.print(table)
console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {repeats}")
