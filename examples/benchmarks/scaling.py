"""Predicted: one training step of one image whose tiles are shared by 1, 2, 8 and 64 GPUs.

    python examples/benchmarks/scaling.py

A simulation from the cost model, which assumes: every rank a GPU of 20 TMAC/s and 1.5 TB/s of memory bandwidth;
200 GB/s between ranks whatever their number, and nothing computed while they exchange; what is not tiled computed
by every rank alike; the slowest rank has ceil(tiles / ranks) tiles of average size. It knows no start-up costs of
collectives, no clock throttling, no reading of images.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.compiler.analysis import analyze
from fxstream.machine.units import bytes_text, parse_bytes
from fxstream.planning.plan import make_plan
from fxstream.tiling.request import Request
from fxstream.tools.zoo import build

RANKS = (1, 2, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["torchvision/resnet50", "torchvision/densenet121"])
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--memory", default="40GiB", help="of each rank")
    given = parser.parse_args()
    console = Console()
    for name in given.networks:
        table = Table("ranks", "segments", "tiles", "MACs", "peak", "seconds", "speed-up", "efficient")
        table.title = f"{name}, {given.size} x {given.size}, {given.memory} on every rank, predicted"
        model = fxstream.freeze_batch_norm(build(name)).train()
        graph = analyze(model, given.size).graph
        alone = None
        for ranks in RANKS:
            request = Request(None, memory=parse_bytes(given.memory))
            plan = make_plan(graph, request, device=torch.device("cuda"), ranks=ranks)
            seconds = plan.prediction.seconds
            alone = alone or seconds
            table.add_row(
                str(ranks),
                str(len(plan.segments)),
                str(max(segment.tile_count for segment in plan.segments)),
                f"{plan.overhead:.2f}x",
                bytes_text(plan.prediction.bytes),
                f"{seconds:.2f}",
                f"{alone / seconds:.1f}x",
                f"{alone / seconds / ranks:.0%}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
