"""The paper's Table I: time of forward and backward and peak memory of three convolutions, over image and tile.

The network (3, 64 and 3 output channels, kernels of 3), the images and the tiles are the paper's. Milliseconds
of another device say little, so every figure is also given as a ratio to the plain network of the same run, here
and in the paper. Where plain has not run at a size (`*`; in the paper at all sizes above 1024), it is taken to
cost as much per pixel as at 1024. Every row is measured in a process of its own, so that none has the memory that
another has freed.

A step is a forward that records gradients and a backward from a tensor of ones, whose bytes are counted; those
of the image and the parameters are not. On CUDA the peak is the allocator's and times are synchronised; on the CPU
it is the sum of all tensors, without workspaces.

    python examples/benchmarks/table1.py                                            # 1024 alone: a minute
    python examples/benchmarks/table1.py --sizes 2048 4096
    python examples/benchmarks/table1.py --device cuda --sizes 2048 4096 8192 --repeats 20
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import fxstream
from fxstream.machine.meter import measure

MEGABYTE = 10**6


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a forward and of a backward, and the megabytes at the peak of both."""

    forward: float
    backward: float
    megabytes: float

    def per_pixel_of(self, size: int, other: int) -> Cost:
        """What this cost of an image of `other` pixels per side is at `size`, if it goes with the pixels."""
        factor = (size / other) ** 2
        return Cost(factor * self.forward, factor * self.backward, factor * self.megabytes)

    def over(self, plain: Cost) -> tuple[float, float, float, float]:
        """Ratios of the forward, the backward, both together, and the memory."""
        both = (self.forward + self.backward) / (plain.forward + plain.backward)
        return (
            self.forward / plain.forward,
            self.backward / plain.backward,
            both,
            self.megabytes / plain.megabytes,
        )


@dataclass(frozen=True)
class Setting:
    """A row of the paper's table: pixels per side of image and tile, number of tiles, cost on an RTX 2080 Ti."""

    image: int
    tile: int
    tiles: int
    paper: Cost


@dataclass(frozen=True)
class Row:
    """What a setting costs here, and the plain network at its size, measured or scaled from the smallest size."""

    setting: Setting
    found: Cost
    plain: Cost
    is_scaled: bool


PAPER = (
    Setting(1024, 1024, 1, Cost(0.5, 45, 1957)),
    Setting(1024, 527, 4, Cost(16, 89, 513)),
    Setting(1024, 358, 9, Cost(22, 111, 331)),
    Setting(1024, 273, 16, Cost(27, 147, 202)),
    Setting(2048, 1039, 4, Cost(47, 308, 1994)),
    Setting(4096, 1039, 16, Cost(187, 1373, 2283)),
    Setting(8192, 1039, 64, Cost(753, 5127, 3435)),
)
"""The first is the plain network."""


def table_one_network() -> nn.Sequential:
    """Three convolutions, 3 -> 3 -> 64 -> 3 channels, with kernels of 3 and padding 1."""
    return nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 3), (3, 64), (64, 3))))


def clock(device: torch.device) -> float:
    """Milliseconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def cost_of(size: int, tile: int | None, repeats: int, device: torch.device) -> Cost:
    """Medians over the repeats, after a step that captures, plans and warms up and one that counts the memory.

    Without a tile the network runs plainly.
    """
    torch.manual_seed(0)
    model: nn.Module = table_one_network().to(device)
    if tile is not None:
        model = fxstream.compile(model, tile=tile, segments=1)
    image = torch.randn(1, 3, size, size, device=device)

    def step() -> tuple[float, float]:
        model.zero_grad()
        start = clock(device)
        output = model(image)
        middle = clock(device)
        output.backward(torch.ones_like(output))
        return middle - start, clock(device) - middle

    step()
    peak = measure(step, device).peak_bytes
    forward, backward = zip(*(step() for _ in range(repeats)))
    return Cost(statistics.median(forward), statistics.median(backward), peak / MEGABYTE)


def in_a_process(size: int, tile: int | None, repeats: int, device: torch.device) -> Cost:
    """The cost, measured in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(cost_of, size, tile, repeats, device).result()


def run(settings: list[Setting], plain_up_to: int, repeats: int, device: torch.device) -> list[Row]:
    """Measures every setting, and the plain network at the first's size and at sizes of `plain_up_to` and less."""
    plain: dict[int, Cost] = {}
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for setting in progress.track(settings, description="Table I"):
            size, smallest = setting.image, settings[0].image
            if size not in plain and size <= max(plain_up_to, smallest):
                plain[size] = in_a_process(size, None, repeats, device)
            found = in_a_process(size, setting.tile, repeats, device) if setting.tiles > 1 else plain[size]
            reference = plain.get(size) or plain[smallest].per_pixel_of(size, smallest)
            rows.append(Row(setting, found, reference, is_scaled=size not in plain))
    return rows


def table_of(rows: list[Row]) -> Table:
    table = Table("image", "tile (n)", "ms", "MB", "forward", "backward", "both", "memory")
    first = PAPER[0]
    for row in rows:
        image, found = row.setting.image, row.found
        ratios = zip(found.over(row.plain), row.setting.paper.over(first.paper.per_pixel_of(image, first.image)))
        table.add_row(
            f"{image}{' *' if row.is_scaled else ''}",
            f"{row.setting.tile} ({row.setting.tiles})",
            f"{found.forward:.0f} + {found.backward:.0f}",
            f"{found.megabytes:.0f}",
            *(f"{here:.2f} / {paper:.2g}" for here, paper in ratios),
        )
    return table


def draw(rows: list[Row], path: str) -> None:
    """Time and memory over the plain network's by the number of tiles, at the smallest size."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    same = [row for row in rows if row.setting.image == PAPER[0].image]
    tiles = [row.setting.tiles for row in same]
    for axes, name, place in zip(figure.subplots(1, 2), ("forward and backward", "memory"), (2, 3), strict=True):
        axes.plot(tiles, [row.found.over(row.plain)[place] for row in same], "o-", label="fxstream, here")
        paper = [row.setting.paper.over(PAPER[0].paper)[place] for row in same]
        axes.plot(tiles, paper, "s--", label="the paper, RTX 2080 Ti")
        axes.set(xticks=tiles, xlabel="tiles", ylim=(0, None), title=f"{name}, over plain")
        axes.axhline(1, color="black", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="1024 is always run")
    parser.add_argument(
        "--plain-up-to", type=int, default=2048, help="largest size at which the plain network runs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--plot", metavar="FILE", help="where the picture is written")
    options = parser.parse_args(arguments)
    settings = [setting for setting in PAPER if setting.image in (PAPER[0].image, *options.sizes)]
    rows = run(settings, options.plain_up_to, options.repeats, options.device)
    console = Console(width=110)
    console.print(table_of(rows))
    is_cuda = options.device.type == "cuda"
    where = torch.cuda.get_device_name(options.device) if is_cuda else f"{torch.get_num_threads()} threads"
    console.print(
        f"ratios to plain: here / paper. torch {torch.__version__}, {where}, medians of {options.repeats}"
    )
    if options.plot:
        draw(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
