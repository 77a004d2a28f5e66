"""What compiled tiles cost at the first call of a size and after it, beside torch.compile on the plain network.

Each way runs in a process of its own, with an empty cache of Inductor and one thread that compiles. A second size
comes when the first is compiled. Programs are those that were compiled, each with and without recording.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from budget import budget_of_share
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.device import synchronize
from fxstream.tools.zoo import build

PLAIN, STREAMED, DYNAMIC = WAYS = "torch.compile", "compiled tiles", "of any size"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--network", default="torchvision/resnet50")
parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1008])
parser.add_argument("--share", type=float, default=0.2, help="of the plain network's memory, for the tiles")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--device", default="cpu")
parser.add_argument("--way", choices=WAYS, help="this one, in this process")
options = parser.parse_args()


def measure_way() -> None:
    """Prints seconds of the first call and of the fastest later one, at each size, and the number of programs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = fxstream.freeze_batch_norm(build(options.network)).to(options.device)
    module, compiled = torch.compile(model), None
    if options.way != PLAIN:
        budget, _ = budget_of_share(model, options.sizes[0], options.share, options.device)
        module = fxstream.compile(
            model, memory=budget, compile_tiles={"dynamic": options.way == DYNAMIC}, verify=False
        )
        compiled = fxstream.inspect(module).shared.tile_compiler
    for size in options.sizes:
        image, seconds = torch.randn(1, 3, size, size, device=options.device), []
        for _ in range(1 + options.steps):
            start = time.perf_counter()
            model.zero_grad(set_to_none=True)
            module(image).sum().backward()
            synchronize(image.device)
            seconds.append(time.perf_counter() - start)
        print(seconds[0], min(seconds[1:]), "" if compiled is None else compiled.count)


def measured(way: str) -> list[list[str]]:
    """What a process of its own measures of a way."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, *sys.argv, "--way", way]
        done = subprocess.run(command, env=os.environ | fresh, stdout=subprocess.PIPE, text=True, check=True)
    return [line.split(" ") for line in done.stdout.strip("\n").splitlines()]


def main() -> None:
    table = Table("size", "way", "first call", "over", "a step", "over", "programs")
    lines = {way: measured(way) for way in WAYS}
    for i, size in enumerate(options.sizes):
        plain = [float(seconds) for seconds in lines[PLAIN][i][:2]]
        for way, of_sizes in lines.items():
            first, step, programs = of_sizes[i]
            pairs = zip((float(first), float(step)), plain, strict=True)
            figures = (text for seconds, over in pairs for text in (f"{seconds:.3g} s", f"{seconds / over:.2f}x"))
            table.add_row(str(size) if way == PLAIN else "", way, *figures, programs)
    console = Console()
    console.print(table)
    console.print(
        f"torch {torch.__version__}, {options.network} with frozen BatchNorm, tiles within {options.share:.0%}"
    )


if __name__ == "__main__":
    measure_way() if options.way else main()
