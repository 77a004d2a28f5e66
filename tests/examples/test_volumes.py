"""The examples `segmentation.py` and `volume.py` in tiny settings: streamed equals plain, and the loss falls."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
segmentation = pytest.importorskip("segmentation")
volume = pytest.importorskip("volume")


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_a_streamed_step_of_the_unet_is_the_plain_one():
    torch.manual_seed(0)
    photograph = np.random.default_rng(0).integers(0, 256, (96, 88, 3), np.uint8)
    pair = segmentation.tensors(photograph, photograph[..., 1] > 150)
    model = segmentation.Segmenter(segmentation.UNet(width=4))
    assert segmentation.difference_to_plain(model, "2MiB", *pair) < 1e-10


def test_a_streamed_step_of_the_volume_is_the_plain_one():
    torch.manual_seed(0)
    assert volume.difference_to_plain(volume.UNet3d(4), "2MiB", *volume.volume_of(20, 0)) < 1e-10


def test_vessels_are_dark_ridges():
    photograph = np.full((160, 160, 3), 200, np.uint8)
    photograph[:, 78:82] = 60
    found = segmentation.vessels_of(photograph)
    assert found[40:120, 80].all()
    assert not found[:, :70].any()
    assert not found[:, 90:].any()


def test_mirrored_images_continue_the_image():
    array = np.arange(12).reshape(3, 4)
    found = segmentation.mirrored(array, 7)
    assert found.shape == (7, 7)
    assert np.array_equal(found[:3, :4], array)
    assert np.array_equal(found[3:6, :4], array[::-1])
    assert np.array_equal(found[:3, 4:], array[:, :0:-1])
    assert segmentation.mirrored(array, 2).tolist() == [[0, 1], [4, 5]]


def test_dice():
    found, target = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    assert segmentation.dice(found, target) == volume.dice(found, target) == pytest.approx(2 / 5)


@pytest.mark.filterwarnings("ignore")
def test_segmentation_learns_within_its_memory(capsys, monkeypatch, tmp_path):
    photograph = segmentation.data.retina()[300:700, 200:500]
    monkeypatch.setattr(segmentation.data, "retina", lambda: photograph)
    picture = tmp_path / "segmentation.png"
    arguments = "--size 256 --memory 12MiB --steps 16 --crop 96 --large-steps 2 --picture"
    segmentation.main([*arguments.split(), str(picture)])
    text = capsys.readouterr().out
    ((before, after),) = re.findall(r"loss ([\d.]+) -> ([\d.]+)", text)
    assert float(after) < float(before)
    assert max(numbers(r"plain by (\S+)", text)) < 1e-10
    large = numbers(r"256 x 256: loss ([\d.]+)", text)
    assert large[1] < large[0]
    assert max(numbers(r"peak ([\d.]+) MiB, predicted", text)) < 12.5
    assert picture.stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore")
def test_a_volume_is_learned_within_its_memory(capsys, tmp_path):
    picture = tmp_path / "volume.png"
    volume.main(["--size", "32", "--memory", "8MiB", "--steps", "4", "--width", "4", "--plot", str(picture)])
    assert picture.stat().st_size > 5_000
    text = capsys.readouterr().out
    losses = numbers(r"loss ([\d.]+)", text)
    assert len(losses) == 4
    assert losses[-1] < 0.85 * losses[0]
    assert max(numbers(r"plain by (\S+)", text)) < 1e-10
    assert numbers(r"Dice ([\d.]+)", text)[0] > 0.3
