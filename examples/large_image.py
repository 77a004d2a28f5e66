"""One training step and a prediction on an image that is larger than memory, stored as a zarr array of bytes.

    python examples/large_image.py
    python examples/large_image.py --size 65536 --limit 6GB --memory 3GiB

The first reads 12 MiB in half a minute; the second 12.9 GB in minutes to an hour.

The network is the first stages of torchvision's ResNet-18 with frozen BatchNorm. Its tiles are read from disk
while the tile before computes; the prediction is written into a zarr array tile by tile, and goes on where it was
if the script is killed and started again with the same folder. `--limit` is what the process may allocate at all,
and `--plot` draws the tiles of the training step and what is predicted where four of them meet.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import fxstream
from fxstream.machine.units import bytes_text, parse_bytes
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tools.zoo import build

BLOCK = 1024
"""Pixels of a chunk along each axis."""


class Stages(nn.Module):
    """Bytes to features by the stem of a ResNet-18 and its first stages, then one number per position."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        network = build("torchvision/resnet18")
        layers = [network.layer1, network.layer2, network.layer3, network.layer4][:stages]
        self.features = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, *layers)
        self.score = nn.Conv2d((64, 64, 128, 256, 512)[stages], 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores [N, 1, height / stride, width / stride] of an image of bytes [N, 3, height, width]."""
        return self.score(self.features(image.float() / 255 - 0.5))


class Diagnosis(nn.Module):
    """One number per image: the mean score."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[N, 1] of an image of bytes."""
        return self.stages(image).mean((2, 3))


def make_image(path: Path, size: int) -> zarr.Array:
    """A zarr array [size, size, 3] of seeded texture, written chunk by chunk; the array itself if it is there."""
    if path.exists():
        return zarr.open_array(str(path), mode="r")
    image = zarr.create_array(str(path), shape=(size, size, 3), chunks=(BLOCK, BLOCK, 3), dtype="uint8")
    random = np.random.default_rng(0)
    for top in range(0, size, BLOCK):
        for left in range(0, size, BLOCK):
            height, width = min(BLOCK, size - top), min(BLOCK, size - left)
            coarse = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
            image[top : top + height, left : left + width] = coarse.repeat(16, 0).repeat(16, 1)[:height, :width]
    return image


def peak() -> str:
    """The most memory that this process has held so far."""
    return bytes_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def draw(path: Path, image: zarr.Array, scores: zarr.Array, part: SegmentPlan) -> None:
    """What the tiles of the training step read, and the corner of four tiles: image and predicted scores there."""
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    grid, corner, result = figure.subplots(1, 3)
    stride, leaf = round(image.shape[0] / scores.shape[2]), part.segment.spatial[0][0]
    y, x = (min(tile.boxes[leaf].stop for tile in tiles) // stride for tiles in part.axes)
    half = min(20, y, x)
    near = (x - half) * stride, (x + half) * stride, (y + half) * stride, (y - half) * stride
    corner.imshow(image[near[3] : near[2], near[0] : near[1]], extent=near)
    result.imshow(scores[0, 0, y - half : y + half, x - half : x + half], extent=near)
    grid.set_xlim(0, image.shape[1])
    grid.set_ylim(image.shape[0], 0)
    draw_tiles(grid, part, 0.7)
    draw_tiles(corner, part, 2.0)
    grid.set_title(f"{image.shape[0]} x {image.shape[1]} pixels:\n{part.tile_count} tiles", fontsize=10)
    corner.set_title("where four of them meet:\nthey overlap", fontsize=10)
    result.set_title("the scores there,\nfrom the array on disk", fontsize=10)
    for axes in (grid, corner, result):
        axes.set(xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=90)


def draw_tiles(axes: Axes, part: SegmentPlan, linewidth: float) -> None:
    """The box of the image that every tile reads, the first one filled."""
    leaf = part.segment.spatial[0][0]
    for k, (rows, columns) in enumerate(part.tiles()):
        y, x = rows.boxes[leaf], columns.boxes[leaf]
        box = (x.start, y.start), len(x), len(y)
        axes.add_patch(Rectangle(*box, fill=False, edgecolor="black", linewidth=linewidth))
        if k == 0:
            axes.add_patch(Rectangle(*box, color="#d9622b", alpha=0.4, linewidth=0))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train one step and predict; prints times and peaks, returns the loss and the mean of the prediction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--stages", type=int, default=0, choices=range(5))
    parser.add_argument("--memory", default="256MiB", help="what fxstream may allocate")
    parser.add_argument("--limit", help="what the process may allocate, such as 6GB")
    parser.add_argument("--folder", type=Path, help="where image and prediction lie; a temporary one by default")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--plot", type=Path, help="where the picture is written")
    given = parser.parse_args(arguments)
    if given.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (parse_bytes(given.limit),) * 2)
    with tempfile.TemporaryDirectory() as temporary:
        return run(given, given.folder or Path(temporary))


def run(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The two passes over the image in a folder."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    array = make_image(folder / "image.zarr", given.size)
    print(f"image {array.shape}, {bytes_text(array.nbytes)} of {array.dtype}; process so far {peak()}")
    image = fxstream.source(array, layout="HWC")
    stages = fxstream.freeze_batch_norm(Stages(given.stages))

    diagnosis = fxstream.compile(Diagnosis(stages), memory=given.memory, progress=given.progress)
    start = time.perf_counter()
    loss = (diagnosis(image) - 1).square().sum()
    loss.backward()
    torch.optim.SGD(stages.parameters(), lr=1e-3).step()
    print(diagnosis.plan)
    print(
        f"trained one step in {time.perf_counter() - start:.0f} s, loss {loss:.6f}, peak of the process {peak()}"
    )

    scores = fxstream.compile(stages.eval(), memory=given.memory, progress=given.progress)
    extent = -(-given.size // (4 * 2 ** max(0, given.stages - 1)))
    chunks = (1, 1, min(extent, BLOCK), min(extent, BLOCK))
    out = zarr.open_array(
        str(folder / "scores.zarr"), mode="a", shape=(1, 1, extent, extent), chunks=chunks, dtype="float32"
    )
    start = time.perf_counter()
    fxstream.infer(scores, image, out=out, journal=folder / "journal")
    print(scores.plan)
    mean = float(np.mean([out[:, :, row].mean() for row in range(extent)]))
    print(f"predicted in {time.perf_counter() - start:.0f} s, mean {mean:.6f}, peak of the process {peak()}")
    tiled = [part for part in diagnosis.plan.segments if part.axes]
    if given.plot and tiled:
        draw(given.plot, array, out, tiled[0])
    return {"loss": loss.item(), "mean": mean}


if __name__ == "__main__":
    main()
