"""Predictions with a journal: resumed after a kill at any moment, never for another image, model or array."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import integer_image, make_integer
from torch import nn

import fxstream


def decoder():
    return make_integer(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3, padding=1)
        )
    )


class Recording:
    """An array that notes every box written, and fails when asked to."""

    def __init__(self, shape, fails_at=None):
        self.array, self.shape, self.dtype = np.zeros(shape), shape, np.dtype(float)
        self.written, self.fails_at, self.chunks = [], fails_at, None

    def __getitem__(self, index):
        return self.array[index]

    def __setitem__(self, index, values):
        if len(self.written) == self.fails_at:
            raise OSError("no space left")
        self.written.append(index)
        self.array[index] = values


def test_resumes_behind_what_is_written(tmp_path):
    model, image = decoder(), integer_image(1, 3, 38, 46, requires_grad=False)
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    out, journal = Recording((1, 2, 38, 46), fails_at=7), tmp_path / "journal"
    with pytest.raises(fxstream.StreamError, match=r"writing \[0:1, 0:2, .*\] of .*Recording.* failed: OSError"):
        fxstream.infer(module, image, out=out, journal=journal)
    out.fails_at = None
    fxstream.infer(module, image, out=out, journal=journal)
    tiles = module.plan.segments[0].tile_count
    assert len(out.written) == tiles > 10
    assert torch.equal(torch.from_numpy(out.array), model(image))
    fxstream.infer(fxstream.compile(model, tile=19, segments=1, verify=False), image, out=out, journal=journal)
    assert len(out.written) == tiles  # other tiles, all of them covered
    with journal.open("a") as file:
        file.write('{"output": 0, "box": [[0, 1], [0')  # a line that was cut off
    fxstream.infer(module, image, out=out, journal=journal)
    assert len(out.written) == tiles


class Scaled(nn.Module):
    """A convolution with an argument that is no tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, image, scale=1.0):
        return self.conv(image) * scale


class Case:
    """A prediction into a memory map with a journal."""

    def __init__(self, folder):
        self.model, self.journal = make_integer(Scaled()), folder / "journal"
        self.module = fxstream.compile(self.model, tile=15, segments=1, verify=False)
        self.out = np.memmap(folder / "out", mode="w+", shape=(1, 2, 38, 46), dtype=float)
        self.image = integer_image(1, 3, 38, 46, requires_grad=False)

    def infer(self, image=None, **arguments):
        image = self.image if image is None else image
        fxstream.infer(self.module, image, out=self.out, journal=self.journal, **arguments)

    def is_right(self):
        return torch.equal(torch.from_numpy(np.array(self.out)), self.model(self.image))


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_another_image_is_refused(case):
    case.infer()
    case.infer(fxstream.source(case.image.numpy().copy()))  # the same, by its values
    other = case.image.clone()
    other[0, 2, 37, 45] += 1
    for image in (other, fxstream.source(other.numpy())):
        with pytest.raises(fxstream.InputError, match=r"of another prediction .its pixels differ.*restart=True"):
            case.infer(image)
    with pytest.raises(fxstream.InputError, match=r"its arguments differ"):
        case.infer(scale=2.0)
    assert case.is_right()
    case.image = other
    case.infer(restart=True)
    assert case.is_right()


def test_a_validation_in_a_training_loop_begins_anew(case):
    for _ in range(3):
        case.infer(restart=True)
        assert case.is_right()
        with torch.no_grad():
            next(case.model.parameters()).add_(1)
    with pytest.raises(fxstream.InputError, match=r"of another prediction .its weights differ"):
        case.infer()
    case.journal.write_text("nonsense\n")
    with pytest.raises(fxstream.InputError, match="is no journal"):
        case.infer(restart=True)


def test_an_array_that_was_made_anew_is_written_anew(case, tmp_path):
    case.infer()
    case.out = np.memmap(tmp_path / "out", mode="w+", shape=(1, 2, 38, 46), dtype=float)
    with pytest.warns(
        fxstream.StreamingWarning, match=r"memmap .*out \[1, 2, 38, 46\] does not hold what was written"
    ):
        case.infer()
    assert case.is_right()
    case.infer()  # and is recognised


def test_a_store_that_was_made_anew_is_written_anew(case, tmp_path):
    zarr = pytest.importorskip("zarr")
    for _ in range(2):
        case.out = zarr.create_array(
            str(tmp_path / "z"), shape=(1, 2, 38, 46), chunks=(1, 2, 16, 16), dtype="f8", overwrite=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fxstream.StreamingWarning)
            case.infer()
        assert case.is_right()


def test_an_array_in_memory_only_has_no_use_for_a_journal(case, tmp_path):
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(str(tmp_path / "z"), shape=(4, 2, 38, 46), chunks=(1, 2, 16, 16), dtype="f8")
    case.out = stored[1:2]
    with pytest.warns(fxstream.StreamingWarning, match=r"in memory only.*is a copy, fxstream.target.array, index"):
        case.infer()
    assert not stored[:].any()


class Units:
    """Values in units of 16 x 16 that are written as one; at a kill, one is left empty."""

    def __init__(self, sharded):
        self.values, self.shape, self.dtype, self.writes = (
            np.zeros((1, 2, 38, 46)),
            (1, 2, 38, 46),
            np.dtype("f8"),
            0,
        )
        self.chunks, self.shards = ((1, 2, 4, 4), (1, 2, 16, 16)) if sharded else ((1, 2, 16, 16), None)

    def __getitem__(self, index):
        return self.values[index]

    def __setitem__(self, index, values):
        self.writes += 1
        if self.writes == 9:
            units = (slice(part.start // 16 * 16, -(-part.stop // 16) * 16) for part in index[2:])
            self.values[(0, slice(None), *units)] = 0
            raise KeyboardInterrupt
        self.values[index] = values


@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_kill_took_with_it_is_written_again(case, sharded):
    case.out = Units(sharded)
    with pytest.raises(KeyboardInterrupt):
        case.infer()
    with pytest.warns(fxstream.StreamingWarning, match="of 8 boxes"):
        case.infer()
    assert torch.equal(torch.from_numpy(case.out.values), case.model(case.image))
    tiles = case.module.plan.segments[0].tile_count
    assert tiles < case.out.writes < 2 * tiles


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()


RUN = """
    import sys, torch, zarr, fxstream
    sys.path += sys.argv[4:]
    from test_journaled import network
    torch.set_num_threads(1)
    folder, size, tile = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    image = zarr.open(f"{folder}/image", mode="r")
    out = zarr.open(f"{folder}/out", mode="r+")
    module = fxstream.compile(network(), tile=tile, segments=1, verify=False)
    print("ready", flush=True)
    source = fxstream.source(image, layout="HWC", dtype=torch.float64)
    fxstream.infer(module, source, out=out, journal=f"{folder}/journal")
    print("done", flush=True)
"""


def lines_of(folder):
    journal = folder / "journal"
    return journal.read_text().splitlines() if journal.exists() else []


def run(folder, size, tile, kill_at=None, wait=0.0):
    """One process of the prediction, killed once the journal has `kill_at` lines; whether it ended by itself."""
    arguments = [sys.executable, "-c", textwrap.dedent(RUN), str(folder), str(size), str(tile)]
    arguments += map(str, Path(__file__).parents[:2])
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        if kill_at is not None:
            while len(lines_of(folder)) < kill_at and process.poll() is None:
                time.sleep(0.001)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    return "done" in rest


def prepare(folder, size):
    zarr = pytest.importorskip("zarr")
    folder.mkdir()
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    zarr.create_array(str(folder / "image"), data=image, chunks=(64, 64, 3))
    zarr.create_array(
        str(folder / "out"), shape=(1, 4, size, size), chunks=(1, 4, 48, 48), dtype="f8", fill_value=np.nan
    )
    return zarr


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.campaign)])
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_and_resumed(tmp_path, kills):
    size, tile = (330, 50) if kills > 2 else (200, 50)
    zarr, model = prepare(tmp_path / "killed", size), network()
    image = zarr.open(str(tmp_path / "killed" / "image"), mode="r")
    module = fxstream.compile(model, tile=tile, segments=1, verify=False)
    wanted = np.zeros((1, 4, size, size))
    fxstream.infer(module, fxstream.source(image, layout="HWC", dtype=torch.float64), out=wanted)
    lines = module.plan.segments[0].tile_count
    moments = random.Random(0)
    for kill in range(kills):
        at = moments.randint(1 + kill * (lines - 8) // kills, (kill + 1) * (lines - 8) // kills)
        assert not run(tmp_path / "killed", size, tile, kill_at=at, wait=moments.uniform(0, 0.004))
    assert run(tmp_path / "killed", size, tile)
    lines = [
        json.loads(line)
        for line in (tmp_path / "killed" / "journal").read_text().splitlines()
        if line[:1] == "{" and line[-1] == "}"
    ]
    ticked = [str(line["box"]) for line in lines if "sum" in line]
    again = len(ticked) - len(set(ticked))
    assert again < len(set(ticked))  # not all of it was done again
    found = zarr.open(str(tmp_path / "killed" / "out"), mode="r")[:]
    assert np.array_equal(found, wanted)
