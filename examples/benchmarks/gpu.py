"""On a CUDA device: the paper's Table I network, and ResNet-50 and DenseNet-121 with bfloat16 autocast.

Plain where it fits, streamed within budgets, eager and with compiled tiles. Time is over the plain network's where
that fits; memory is the peak of the allocator.
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
from fxstream.bench import measure
from fxstream.units import bytes_text
from fxstream.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384])
parser.add_argument("--budgets", nargs="+", default=["8GiB", "16GiB", "32GiB"])
parser.add_argument("--compiled", action="store_true", help="also with compile_tiles=True")
parser.add_argument("--repeats", type=int, default=5)
options = parser.parse_args()
warnings.simplefilter("ignore", fxstream.StreamingWarning)
device = torch.device("cuda")
torch.manual_seed(0)


def run(module, model, image, autocast):
    """Median seconds and peak bytes of a step; None where memory is not enough."""

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = module(image).float().sum()
        loss.backward()

    try:
        step()
        peak = measure(step, device).peak_bytes
        times = []
        for _ in range(options.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return statistics.median(times), peak


table = Table("network", "image", "way", "seconds", "time", "peak", "predicted")


def compare(name, model, size, ways, autocast):
    image = torch.randn(1, 3, size, size, device=device)
    plain = run(model, model, image, autocast)
    for label, arguments in [("plain", None), *ways]:
        module = model if arguments is None else fxstream.compile(model, **arguments)
        try:
            found = plain if arguments is None else run(module, model, image, autocast)
        except fxstream.PlanError as error:
            table.add_row(name, str(size), label, str(error)[:60], "", "", "")
            continue
        if found is None:
            table.add_row(name, str(size), label, "out of memory", "", "", "")
            continue
        ratio = f"{found[0] / plain[0]:.2f}x" if plain else ""
        predicted = bytes_text(module.plan.prediction.bytes) if arguments else ""
        table.add_row(name, str(size), label, f"{found[0]:.3f}", ratio, bytes_text(found[1]), predicted)


network = table_one_network().to(device)
for size, tiles in ((1024, (518, 350, 265)), (2048, (1039,)), (4096, (1039,)), (8192, (1039,))):
    compare("Table I", network, size, [(f"tile {t}", {"tile": t, "segments": 1}) for t in tiles], autocast=False)
for name in ("resnet50", "densenet121"):
    model = fxstream.freeze_batch_norm(build(f"torchvision/{name}")).train().to(device)
    for size in options.sizes:
        ways = [(f"memory {budget}", {"memory": budget}) for budget in options.budgets]
        if options.compiled:
            ways += [(f"{label}, compiled", {**given, "compile_tiles": True}) for label, given in ways]
        compare(name, model, size, ways, autocast=True)
console = Console()
console.print(table)
console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {options.repeats}")
