"""The resolution example: what its canvases show, that no digit is shared, and that the table tells the runs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare import assert_streams
from rich.console import Console
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import digit_canvases
import resolution
from digit_canvases import Canvases, at_resolution

PLAIN = Canvases(128, density=0.5, majority=0.75, clouds=0.0, noise=0.0)


def as_bytes(images: np.ndarray) -> list[bytes]:
    """Images of 8 x 8 pixels as values that can be in a set."""
    return [image.tobytes() for image in np.ascontiguousarray(images).reshape(-1, 64)]


@pytest.mark.parametrize("number, eights, ones", [(0, 4, 12), (1, 12, 4)])
def test_the_label_is_the_majority_on_the_canvas(number, eights, ones):
    canvas, label = PLAIN.draw(number, train=True)
    assert (canvas.shape, label) == ((1, 128, 128), number)
    windows = as_bytes(canvas[0].unfold(0, 8, 1).unfold(1, 8, 1).numpy())
    pools = [set(as_bytes(pool)) for pool in digit_canvases.pools(True)]
    assert [sum(window in pool for window in windows) for pool in pools] == [ones, eights, 16]


def test_brightness_tells_nothing():
    sums = [PLAIN.draw(number, train=True)[0].sum().item() for number in range(4)]
    assert sums == pytest.approx([32 * digit_canvases.INK] * 4, rel=1e-5)


def test_a_canvas_is_its_seed_part_and_number():
    canvases = Canvases(64, seed=5)
    first, _ = canvases.draw(3, train=True)
    assert torch.equal(first, canvases.draw(3, train=True)[0])
    others = [
        canvases.draw(4, train=True),
        canvases.draw(3, train=False),
        Canvases(64, seed=6).draw(3, train=True),
    ]
    assert all((first - other).abs().max() > 0.1 for other, _ in others)


def test_no_digit_is_in_both_parts():
    train, test = (as_bytes(np.concatenate(digit_canvases.pools(part))) for part in (True, False))
    assert len(train) + len(test) == len(load_digits().images)
    assert not set(train) & set(test)


def test_resolutions_are_means_of_pixels():
    canvas = torch.arange(64.0).reshape(1, 8, 8)
    reduced = at_resolution(canvas, 4)
    means = torch.tensor([[[13.5, 17.5], [45.5, 49.5]]])
    assert torch.allclose(reduced, (means - means.mean()) / means.std())
    assert at_resolution(canvas, 1).std().item() == pytest.approx(1)


def test_a_streamed_step_equals_the_plain_one():
    network = resolution.network(width=3).double().train()
    image = torch.randn(2, 1, 61, 52, dtype=torch.float64, requires_grad=True)
    assert_streams(network, image, tile=30, at_least_tiles=4)


def test_a_run_is_the_plain_one_within_its_memory(monkeypatch):
    options = resolution.options_of(
        ["--size", "128", "--steps", "4", "--tests", "6", "--majority", "0.8", "--memory", "1MiB"]
    )
    streamed = resolution.run(0, 1, options)
    assert streamed["peak"] < 0.5 * streamed["plain"]
    monkeypatch.setattr(resolution.fxstream, "compile", Plain)
    plain = resolution.run(0, 1, options)
    assert streamed["auc"] == plain["auc"]
    assert plain["peak"] == pytest.approx(streamed["plain"], rel=0.3)


class Plain(torch.nn.Module):
    """In place of `compile`: the module as it is, and the name by which a plan says what it needs."""

    def __init__(self, model, memory):
        super().__init__()
        self.model = model
        self.plan = SimpleNamespace(prediction=SimpleNamespace(plain_bytes=0))

    def forward(self, image):
        return self.model(image)


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch):
    calls = []

    def run(seed, factor, options, tell):
        calls.append((seed, factor))
        return {"seed": seed, "factor": factor, "auc": 0.9 / factor, "plain": 2**20, "peak": 2**19, "seconds": 1.0}

    monkeypatch.setattr(resolution, "run", run)
    kept = str(tmp_path / "runs.json")
    resolution.main(["--results", kept])
    picture = tmp_path / "picture.png"
    runs = resolution.main(["--results", kept, "--seeds", "2", "--size", "128", "--plot", str(picture)])
    assert calls == [(seed, factor) for seed in (0, 1) for factor in (1, 2, 4)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=120)
    console.print(resolution.table_of(runs, resolution.options_of([])))
    text = console.export_text()
    assert "│ 256, quarter  │ 2 x 2   │ 0.225 │ 0.225 0.225  │ 512 KiB │ 1.00 MiB │" in text
