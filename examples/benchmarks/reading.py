"""How fast tiles are read from a store, beside what its own library reaches; what is hidden, and what blank costs.

- A JPEG pyramid (tifffile, imagecodecs) and a zarr store: all boxes of a pass over tiles that overlap, by so many
  threads, and the library decoding all chunks in order with as many, into an array. The best of the rounds.
- A store that sleeps for every chunk, beside threads that do nothing else than ask for all chunks.
- A network that takes as long for a tile as the store: the part of the reading time that it does not wait for.
- A slide of which 60% are blank, in float64 with small integers: one training step, with all tiles computed and
  with equal ones computed once.

    python examples/benchmarks/reading.py
"""

import argparse
import functools
import itertools
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import tifffile
import torch
import zarr
from rich.console import Console
from rich.table import Table
from torch import nn

import fxstream
from fxstream.machine.heap import heap_kept
from fxstream.runtime.reading.prefetch import Reader
from fxstream.runtime.schedule import TileTask

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--size", type=int, default=32768, help="pixels of a side of the pyramid and the store")
parser.add_argument("--tile", type=int, default=2048)
parser.add_argument("--halo", type=int, default=100)
parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
parser.add_argument("--chunks", type=int, default=32, help="chunks of a side of the image that is computed")
parser.add_argument("--rounds", type=int, default=2)
options = parser.parse_args()
CPU = torch.device("cpu")
CHUNK = 256
SLEEP = 0.01
WHOLE = np.zeros((options.size, options.size, 3), np.uint8)


class Counting:
    """An array that counts how often each of its chunks is asked for."""

    def __init__(self, array, chunks=None, sleep=0.0):
        self.array, self.shape, self.dtype, self.sleep = array, array.shape, array.dtype, sleep
        self.chunks, self.decoded = chunks or array.chunks, Counter()

    def __getitem__(self, index):
        parts = [
            range(part.start // size, -(-part.stop // size)) for part, size in zip(index, self.chunks, strict=True)
        ]
        chunks = list(itertools.product(*parts))
        self.decoded.update(chunks)
        if self.sleep:
            time.sleep(self.sleep * len(chunks))
        return self.array[index]


def tasks(size, tile, halo):
    """What the tiles of an image read."""
    spans = [slice(max(0, at - halo), min(size, at + tile + halo)) for at in range(0, size, tile)]
    return [
        TileTask(0, ((slice(None), slice(None), rows, columns),), (), ()) for rows in spans for columns in spans
    ]


def read(array, readers, tiles):
    """Seconds of a pass over the tiles, in which each chunk is decoded once."""
    counting = Counting(array) if not isinstance(array, Counting) else array
    counting.decoded.clear()
    began = time.perf_counter()
    source = fxstream.source(counting, layout="HWC", readers=readers)
    with Reader([source], tiles, CPU) as reader, heap_kept(CPU, len(tiles)):
        for task in tiles:
            reader.read(task)
    assert set(counting.decoded.values()) == {1}
    return time.perf_counter() - began


def by_tifffile(file, readers):
    """Seconds in which tifffile decodes all tiles in order, into one array."""
    began = time.perf_counter()
    file.series[0].levels[0].asarray(maxworkers=readers, out=WHOLE)
    return time.perf_counter() - began


def by_zarr(array, readers):
    """Seconds in which zarr decodes all chunks in order, a band of the image at a time."""
    began = time.perf_counter()
    with zarr.config.set({"async.concurrency": readers}):
        for at in range(0, array.shape[0], 8 * CHUNK):
            WHOLE[at : at + 8 * CHUNK] = array[at : at + 8 * CHUNK]
    return time.perf_counter() - began


def by_threads(array, readers):
    """Seconds in which threads ask for all chunks in order."""
    began = time.perf_counter()
    rows, columns = (range(0, size, CHUNK) for size in array.shape[:2])
    boxes = [(slice(y, y + CHUNK), slice(x, x + CHUNK), slice(0, 3)) for y in rows for x in columns]
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(array.__getitem__, boxes))
    return time.perf_counter() - began


def scene(row, column):
    """A chunk of a synthetic slide, which repeats itself."""
    return drawn(row % 4, column % 4)


@functools.cache
def drawn(row, column):
    """Smooth structure and a little noise."""
    y, x = np.ogrid[row * CHUNK : (row + 1) * CHUNK, column * CHUNK : (column + 1) * CHUNK]
    noise = np.random.default_rng(row * 4096 + column).integers(0, 16, (CHUNK, CHUNK, 3))
    smooth = np.sin(x / 37)[..., None] * 50 + np.cos(y / 23)[..., None] * 50 + 128
    return (smooth + noise).astype(np.uint8)


def stores(folder):
    """A JPEG pyramid of two levels and a zarr store of the same pixels."""
    size, places = options.size, range(options.size // CHUNK)
    arguments = {"tile": (CHUNK, CHUNK), "photometric": "rgb", "compression": "jpeg", "dtype": "u1"}
    with tifffile.TiffWriter(folder / "slide.tif", bigtiff=True) as file:
        whole = (scene(row, column) for row in places for column in places)
        file.write(whole, shape=(size, size, 3), subifds=1, **arguments)
        halves = (scene(row, column) for row in places[::2] for column in places[::2])
        file.write(halves, shape=(size // 2, size // 2, 3), subfiletype=1, **arguments)
    array = zarr.create_array(folder / "slide.zarr", shape=(size, size, 3), dtype="u1", chunks=(CHUNK, CHUNK, 3))
    for row in places:
        array[row * CHUNK : (row + 1) * CHUNK] = np.hstack([scene(row, column) for column in places])
    return tifffile.TiffFile(folder / "slide.tif"), zarr.open(folder / "slide.zarr", mode="r")


def compare(table, name, pixels, library, ours):
    """A row per number of readers: megapixels per second by the library, and by fxstream."""
    for readers in options.readers if name != "sleeping" else [1, 2, 4, 8, 16]:
        pairs = [(library(readers), ours(readers)) for _ in range(options.rounds)]
        theirs, mine = (pixels / min(seconds) / 1e6 for seconds in zip(*pairs, strict=True))
        table.add_row(name, str(readers), f"{theirs:.0f}", f"{mine:.0f}", f"{mine / theirs:.0%}")


def hidden():
    """The part of the time of reading that a computation as slow as the store does not wait for."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3))
    chunk, chunks = CHUNK // 2, options.chunks
    module = fxstream.compile(network, tile=chunk, segments=1, verify=False)
    array = np.random.default_rng(0).random((chunks * chunk, chunks * chunk, 3), dtype=np.float32)

    def seconds(source):
        began = time.perf_counter()
        with torch.no_grad():
            module(source)
        return time.perf_counter() - began

    seconds(fxstream.source(array, layout="HWC"))
    computing = min(seconds(fxstream.source(array, layout="HWC")) for _ in range(options.rounds))
    slow = Counting(array, (chunk, chunk, 3), computing / chunks**2)
    both = min(seconds(fxstream.source(slow, layout="HWC")) for _ in range(options.rounds))
    return computing, both, 1 - max(0.0, both - computing) / computing


def blank():
    """Seconds of a step on a slide that is blank to 60%, with all tiles computed and with equal ones once."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 2, 3)]
    network = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    slide = np.full((3072, 3072, 3), 3, np.uint8)
    slide[:1229] = np.random.default_rng(0).integers(0, 9, (1229, 3072, 3))
    source = fxstream.source(slide, layout="HWC", dtype=torch.float64)
    module = fxstream.compile(network, tile=130, segments=1, verify=False)

    def step():
        network.zero_grad()
        began = time.perf_counter()
        output = module(source)
        output.backward((torch.arange(output.numel()) % 7 - 3).view(output.shape).double())
        seconds = time.perf_counter() - began
        return seconds, [output.detach(), *(parameter.grad for parameter in network.parameters())]

    step()
    runs = []
    for _ in range(options.rounds):
        with mock.patch("fxstream.runtime.reading.box_readers.constant_values", return_value=None):
            runs.append([*step()])
        runs.append([*step()])
    assert all(torch.equal(one, two) for one, two in zip(runs[0][1], runs[1][1], strict=True))
    every, once = (min(seconds for seconds, _ in runs[k::2]) for k in (0, 1))
    return every, once, module.plan.repeated[0]


table = Table("store", "threads", "library", "fxstream", "share", box=None)
with torch.no_grad(), tempfile.TemporaryDirectory() as path:
    file, array = stores(Path(path))
    tiles = tasks(options.size, options.tile, options.halo)
    level, pixels = fxstream.tiff_array(file), options.size**2
    compare(table, "JPEG TIFF", pixels, lambda n: by_tifffile(file, n), lambda n: read(level, n, tiles))
    compare(table, "zarr", pixels, lambda n: by_zarr(array, n), lambda n: read(array, n, tiles))
    file.close()
    side = 16 * CHUNK
    slow = Counting(np.zeros((side, side, 3), np.uint8), (CHUNK, CHUNK, 3), SLEEP)
    tiles = tasks(side, 2 * CHUNK, 16)
    compare(table, "sleeping", side**2, lambda n: by_threads(slow, n), lambda n: read(slow, n, tiles))
    computing, both, share = hidden()
every, once, repeated = blank()
print(f"{options.size} x {options.size} pixels, chunks of {CHUNK}, tiles of {options.tile}, {options.halo} around")
print("megapixels per second; every chunk is decoded once")
Console().print(table)
print(f"computing {computing:.2f} s, reading as long, both {both:.2f} s: {share:.0%} of reading hidden")
print(f"60% blank: {every:.2f} s, equal tiles once {once:.2f} s: {every / once:.2f}x; equal bit by bit")
print(repeated)
