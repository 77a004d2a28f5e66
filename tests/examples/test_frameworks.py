"""The slide examples with Lightning and accelerate: views read what they show, runs resume, ranks share tiles."""

import copy
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_slides import load

pytest.importorskip("zarr")
FOLDER = Path(__file__).parents[2] / "examples" / "slides"
pytestmark = pytest.mark.xdist_group("sharing")


@pytest.fixture(scope="module")
def slides():
    """The modules of the example; without the frameworks the tests are skipped."""
    pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    return load()


@pytest.fixture(scope="module")
def labels(slides, tmp_path_factory):
    return slides.make_slides.make_slides(tmp_path_factory.mktemp("slides"), count=4, size=320)


class Recorded:
    """An array that notes what is read of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        values = self.array[index]
        self.read.append(values.size)
        return values


def test_views_are_what_numpy_makes(slides):
    array = np.random.default_rng(0).integers(0, 256, (13, 9, 3), dtype=np.uint8)
    view, expected, random = slides.views.View(Recorded(array)), array, np.random.default_rng(1)
    for step in range(40):
        if step % 3 == 0:
            view, expected = view.mirrored(), expected[:, ::-1]
        elif step % 3 == 1:
            times = int(random.integers(4))
            view, expected = view.turned(times), np.rot90(expected, times)
        elif min(view.shape[:2]) > 4:
            view, expected = view.cropped(1, 0, view.shape[0] - 1, view.shape[1] - 1), expected[1:, :-1]
        assert view.shape == expected.shape
        box = slice(1, 3), slice(2, 4), slice(0, 3)
        assert np.array_equal(view[box], expected[box])
    assert set(view.array.read) == {12}  # the box and nothing else


def test_chunks_of_a_view_are_those_of_its_array(slides):
    """Each lies in one chunk, and neighbours in two, or some chunks would be decoded twice."""
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array({}, shape=(13, 9, 3), dtype="u1", chunks=(4, 3, 3))
    places = np.stack([*np.divmod(np.arange(117).reshape(13, 9), 9), np.zeros((13, 9), int)], -1)
    array[:] = places // (4, 3, 1)
    view = slides.views.View(array)
    for seen in (view, view.mirrored(), view.turned(1), view.turned(3).cropped(2, 1, 6, 11).mirrored()):
        edges = [np.cumsum([0, *lengths]) for lengths in seen.chunks]
        assert [along[-1] for along in edges] == list(seen.shape)
        pieces = [
            {tuple(pixel) for pixel in seen[top:down, left:right, 0:3].reshape(-1, 3).tolist()}
            for top, down in zip(edges[0], edges[0][1:])
            for left, right in zip(edges[1], edges[1][1:])
        ]
        assert all(len(piece) == 1 for piece in pieces)
        assert len({min(piece) for piece in pieces}) == len(pieces)
    assert view.turned(1).chunks == ((3, 3, 3), (4, 4, 4, 1), (3,))
    assert slides.views.View(np.zeros((4, 4, 3))).chunks is None


def test_sources_have_the_size_of_their_slide_and_repeat(slides, labels):
    rows = slides.data.read_rows(labels)
    images = slides.views.SlideSources(rows, 1.0, train=True)
    sizes = {images[i][0].shape for i in range(len(images))}
    assert len(sizes) == len(rows) == 4
    image = images[1][0]
    first, again = (images[1][0][()].clone() for _ in range(2))
    assert torch.equal(first, again)
    images.epoch = 1
    other = images[1][0]
    assert other.shape != image.shape or not torch.equal(other[()], first)
    whole = slides.views.SlideSources(rows, 1.0, train=False)[1][0]
    assert torch.equal(whole[()], slides.pyramid.open_slide(rows[1].path).read(1.0)[None])


def small(labels, folder, **options):
    settings = {"folder": folder, "spacing": 1, "width": 2, "memory": "4MiB", "accumulate": 2} | options
    return [str(labels), *(f"--{name}={value}" for name, value in settings.items())]


def weights(module):
    return copy.deepcopy(dict(module.state_dict()))


def run_lightning(slides, *arguments):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weights(slides.with_lightning.main(small(*arguments[:2], **arguments[2])))


def run_accelerate(slides, labels, folder, options):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weights(slides.with_accelerate.main(small(labels, folder, **options)))


@pytest.mark.parametrize("run, precision", [(run_lightning, "bf16-mixed"), (run_accelerate, "bf16")])
def test_a_run_that_is_resumed_ends_where_one_in_one_go_does(run, precision, slides, labels, tmp_path):
    whole = run(slides, labels, tmp_path / "whole", {"epochs": 2, "precision": precision})
    begun = run(slides, labels, tmp_path / "parts", {"epochs": 1, "precision": precision})
    resumed = run(slides, labels, tmp_path / "parts", {"epochs": 2, "precision": precision})
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], begun[name]) for name in whole)


@pytest.mark.campaign
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_lightning_on_replicas_of_ranks_that_share_tiles(labels, tmp_path):
    """Two ranks on the tiles of each image end where one process does; two pairs run."""
    paths = os.pathsep.join([str(FOLDER.parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    losses = []
    for devices, tiles in ((1, 1), (2, 2), (4, 2)):
        options = {"epochs": 1, "precision": "32-true", "devices": devices, "tiles": tiles}
        command = [
            sys.executable,
            FOLDER / "with_lightning.py",
            *small(labels, tmp_path / str(devices), **options),
        ]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500
        )
        assert done.returncode == 0, done.stderr
        (loss,) = re.findall(r"epoch 1: loss ([\d.]+)", done.stdout)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
