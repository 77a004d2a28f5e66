"""Seconds per megapixel and peak memory of a training step over the image size, streamed within like budgets.

ResNet-18 with frozen BatchNorm. A budget is a share of what the plain network's activations are predicted to need,
which grows with the image, and twice the gradients of the weights, which do not: a tile's and their sum.
"""

import argparse
import statistics
import time
import warnings

import torch
from budget import budget_of_share
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.tools.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--network", default="torchvision/resnet18")
parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
parser.add_argument("--share", type=float, default=0.15, help="the budget, of the plain network's activations")
parser.add_argument("--repeats", type=int, default=3)
options = parser.parse_args()
warnings.simplefilter("ignore", fxstream.StreamingWarning)
torch.manual_seed(0)

model = fxstream.freeze_batch_norm(build(options.network)).train()
table = Table("image", "seconds per megapixel", "peak", "predicted", "plain, predicted", "MACs")
for size in options.sizes:
    image = torch.randn(1, 3, size, size)
    memory, plain = budget_of_share(model, size, options.share)
    streamed = fxstream.compile(model, memory=memory)

    def step(streamed=streamed, image=image):
        model.zero_grad()
        streamed(image).sum().backward()

    step()  # captures, plans and probes
    peak = measure(step).peak_bytes
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    table.add_row(
        str(size),
        f"{statistics.median(times) / (size / 1000) ** 2:.2f}",
        bytes_text(peak),
        bytes_text(streamed.plan.prediction.bytes),
        bytes_text(plain),
        f"{streamed.plan.overhead:.2f}x",
    )
console = Console(width=100)
console.print(table)
threads = torch.get_num_threads()
console.print(f"{options.network}, torch {torch.__version__}, {threads} threads, medians of {options.repeats}")
