"""Where the microseconds of a tile go that is too small to compute for long: the paper's network in 16 tiles.

A training step of tiny tiles costs what asking for operators costs, and what is done between tiles. The table has
the step per tile, and what a profiler counts in code of this package, in Python of torch, and in functions in C.
Under the profiler Python is slower than without.
"""

import argparse
import collections
import cProfile
import pstats
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from table1 import table_one_network

import fxstream
from fxstream.machine.device import synchronize

PACKAGE, TORCH = (str(Path(module.__file__).parent) for module in (fxstream, torch))
BUILT_IN = "~"
"""The file of functions that are not of Python."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--tile", type=int, default=14)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--device", default="cpu")
parser.add_argument("--cuda-graphs", action="store_true", help="with tiles that are replayed")
parser.add_argument("--most", type=int, default=0, help="also the functions of this package that take the most")
options = parser.parse_args()


def part_of(file: str) -> str:
    """Where a function is."""
    if file == BUILT_IN:
        return "operators, and other functions in C"
    return next(
        (name for name, path in (("fxstream", PACKAGE), ("torch", TORCH)) if file.startswith(path)), "Python"
    )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = table_one_network().train().to(options.device)
    image = torch.randn(1, 3, options.size, options.size, device=options.device)
    module = fxstream.compile(model, tile=options.tile, segments=1, verify=False, cuda_graphs=options.cuda_graphs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        module(image).sum().backward()
        synchronize(image.device)

    for _ in range(5):
        step()
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    with cProfile.Profile() as profile:
        for _ in range(options.steps):
            step()
    count = module.plan.segments[0].tile_count
    parts, functions = collections.Counter(), collections.Counter()
    for (file, line, name), (_, _, spent, *_) in pstats.Stats(profile).stats.items():
        parts[part_of(file)] += spent
        functions[f"{Path(file).name}:{line} {name}"] += spent if file.startswith(PACKAGE) else 0.0
    table = Table("per tile", "microseconds")
    table.add_row("a step", f"{1e6 * statistics.median(seconds) / count:.0f}")
    for name, spent in parts.most_common():
        table.add_row(f"profiled: {name}", f"{1e6 * spent / options.steps / count:.0f}")
    for name, spent in functions.most_common(options.most):
        table.add_row(name, f"{1e6 * spent / options.steps / count:.1f}")
    console = Console()
    console.print(table)
    console.print(f"{count} tiles of a {options.size} pixel image, torch {torch.__version__}, 1 thread")


main()
