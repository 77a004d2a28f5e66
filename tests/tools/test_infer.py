"""Prediction into arrays: the same values, never held, resumed after a kill at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import integer_image, make_integer
from torch import nn

import fxstream
from fxstream.runtime import forward
from fxstream.tools import infer as inference


def decoder():
    return make_integer(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3, padding=1)
        )
    )


class Twice(nn.Module):
    """Two maps of different resolutions and their pooled result."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 2, 3, 2), nn.Conv2d(2, 2, 3)

    def forward(self, image):
        half = self.first(image)
        return {"map": self.last(half), "half": half * 2}


@pytest.mark.parametrize("request_", [{"tile": 15, "segments": 1}, {"memory": "80KiB"}, {"memory": "1GiB"}])
def test_written_is_what_the_model_returns(request_):
    model, image = decoder(), integer_image(1, 3, 38, 46, requires_grad=False)
    out = np.full((1, 2, 38, 46), np.nan)
    module = fxstream.compile(model, **request_)
    assert fxstream.infer(module, image, out=out) is out
    assert torch.equal(torch.from_numpy(out), model(image))


def test_the_result_is_never_held(monkeypatch):
    allocated = []
    allocate = forward._allocate
    monkeypatch.setattr(
        forward, "_allocate", lambda tile, shape, place: allocated.append(shape) or allocate(tile, shape, place)
    )
    model, image = decoder(), integer_image(1, 3, 38, 46, requires_grad=False)
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    fxstream.infer(module, image, out=np.zeros((1, 2, 38, 46)))
    assert allocated == []
    module.eval()(image)
    assert allocated == [(1, 2, 38, 46)]


def test_a_large_result_within_a_small_memory():
    model = nn.Conv2d(1, 64, 3, padding=1)
    image = torch.randn(1, 1, 300, 300)
    out = np.zeros((1, 64, 300, 300), np.float32)  # 22 MiB
    module = fxstream.compile(model, memory="1MiB", verify=False)
    fxstream.infer(module, image, out=out)
    assert module.plan.prediction.bytes < 2**20
    torch.testing.assert_close(torch.from_numpy(out), model(image).detach())


def test_several_results():
    model, image = make_integer(Twice()), integer_image(1, 3, 37, 41, requires_grad=False)
    wanted = model(image)
    out = {"map": np.zeros(wanted["map"].shape), "half": None}
    found = fxstream.infer(fxstream.compile(model, tile=15, segments=1, verify=False), image, out=out)
    assert found["map"] is out["map"]
    assert torch.equal(torch.from_numpy(out["map"]), wanted["map"])
    assert torch.equal(found["half"], wanted["half"])


def test_types():
    model, image = nn.Conv2d(3, 2, 3), torch.randn(1, 3, 25, 31)
    module = fxstream.compile(model, tile=11, segments=1, verify=False)
    out = np.zeros((1, 2, 23, 29), np.float16)
    fxstream.infer(module, image, out=out)
    torch.testing.assert_close(torch.from_numpy(out), model(image).half(), rtol=2e-3, atol=2e-3)
    with pytest.raises(fxstream.InputError, match="convert in the model"):
        fxstream.infer(module, image, out=np.zeros((1, 2, 23, 29), np.uint8))


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


def test_a_journal_of_another_prediction_is_refused(tmp_path):
    model, image = decoder(), integer_image(1, 3, 38, 46, requires_grad=False)
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    out, journal = np.zeros((1, 2, 38, 46)), tmp_path / "journal"
    fxstream.infer(module, image, out=out, journal=journal)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(fxstream.InputError, match=r"of another prediction .its weights differ"):
        fxstream.infer(module, image, out=out, journal=journal)
    journal.write_text("nonsense\n")
    with pytest.raises(fxstream.InputError, match="another prediction"):
        fxstream.infer(module, image, out=out, journal=journal)


@pytest.mark.parametrize(
    "out, match",
    [
        (np.zeros((1, 2, 38, 45)), r"shape \[1, 2, 38, 45\], the result has \[1, 2, 38, 46\]"),
        ("result.zarr", "needs shape, dtype and assignment; found str|found str"),
        ([np.zeros((1, 2, 38, 46))] * 2, "2 arrays and the model returns 1"),
    ],
)
def test_bad_out(out, match):
    module = fxstream.compile(decoder(), tile=15, segments=1, verify=False)
    with pytest.raises(fxstream.InputError, match=match):
        fxstream.infer(module, integer_image(1, 3, 38, 46, requires_grad=False), out=out)


def test_infer_needs_a_compiled_module():
    with pytest.raises(fxstream.InputError, match=r"made by fxstream.compile, found Conv2d"):
        inference.infer(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 9, 9), out=np.zeros((1, 1, 9, 9)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()


RUN = """
    import sys, torch, zarr, fxstream
    sys.path += sys.argv[4:]
    from test_infer import network
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
    lines = 2 * module.plan.segments[0].tile_count
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
    ticked = [str(line["box"]) for line in lines if line.get("done")]
    again = len(ticked) - len(set(ticked))
    assert again < len(set(ticked))  # not all of it was done again
    found = zarr.open(str(tmp_path / "killed" / "out"), mode="r")[:]
    assert np.array_equal(found, wanted)
