"""The examples in tiny settings: what they print is checked by value."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fxstream

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    """The example as a module, whatever else is called by its name."""
    specification = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look up the module of their annotations
    specification.loader.exec_module(module)
    return module


def is_picture(path):
    with Image.open(path) as picture:
        return picture.size > (100, 100)


def test_imagenette_trains_the_same(tmp_path, capsys):
    """In float64 every loss of both networks is the same, on the photographs."""
    plot = tmp_path / "curves.png"
    arguments = ["--per-class", "1", "--epochs", "1", "--batch", "5", "--double", "--plot", str(plot)]
    (row,) = load("imagenette.py").main(arguments)
    assert row["streamed"] == pytest.approx(row["plain"], rel=1e-10)
    assert row["streamed, held out"] == pytest.approx(row["plain, held out"], rel=1e-10)
    assert f"{row['plain']:.6f}" in capsys.readouterr().out
    assert is_picture(plot)


def test_imagenette_streams_the_first_two_blocks_of_table_two():
    network = load("imagenette.py").table_two_network(classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 397_098
    plan = fxstream.plan(network, 320, tile=160, segments=1, cut="block2")
    assert [segment.tile_count for segment in plan.segments] == [9]
    assert plan.segments[0].segment.nodes[-1].startswith("max_pool2d_1")


def test_imagenette_reads_a_folder(tmp_path):
    """Two classes of grey and of bright noise, as files."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, low in (("bright", 128), ("dark", 0)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(low, low + 128, (330, 350, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    example = load("imagenette.py")
    training, held_out = example.load(tmp_path, per_class=2)
    assert [label for _, label in training] == [label for _, label in held_out] == [0, 0, 1, 1]
    assert {tuple(image.shape) for image, _ in held_out} == {(3, 320, 320)}
    assert held_out[0][0].mean() > held_out[2][0].mean()


def test_table_one_has_the_papers_tiles():
    """The paper's tile sizes give its numbers of tiles; nothing is run."""
    example = load("benchmarks/table1.py")
    network = example.table_one_network()
    for setting in example.PAPER[1:]:
        plan = fxstream.plan(network, setting.image, tile=setting.tile, segments=1)
        assert [segment.tile_count for segment in plan.segments] == [setting.tiles]


def test_table_one_compares_with_plain(tmp_path, capsys, monkeypatch):
    """Peaks on 64 and 128 pixels; the larger plain one is scaled, and the paper's ratios are printed."""
    example = load("benchmarks/table1.py")
    paper = [setting.paper for setting in example.PAPER]
    small = ((64, 64, 1, paper[0]), (64, 38, 4, paper[1]), (128, 38, 16, paper[4]))
    monkeypatch.setattr(example, "PAPER", tuple(example.Setting(*given) for given in small))
    monkeypatch.setattr(example, "in_a_process", example.cost_of)  # another process cannot import the example
    plain, tiled, larger = example.main(
        ["--sizes", "128", "--plain-up-to", "64", "--repeats", "1", "--plot", str(tmp_path / "a.png")]
    )
    assert is_picture(tmp_path / "a.png")
    assert (plain.is_scaled, tiled.is_scaled, larger.is_scaled) == (False, False, True)
    assert plain.found == plain.plain == tiled.plain
    maps = 64 * 64 * (3 + 64 + 3) * 4 / example.MEGABYTE
    assert plain.found.megabytes > maps > tiled.found.megabytes
    assert larger.plain.megabytes == 4 * plain.found.megabytes
    assert tiled.found.over(plain.found)[3] == tiled.found.megabytes / plain.found.megabytes
    printed = capsys.readouterr().out
    assert "128 *" in printed
    assert f"{tiled.found.megabytes / plain.found.megabytes:.2f} / 0.26" in printed


def test_saliency_finds_what_was_trained(tmp_path, capsys):
    """Dark lines on a bright ground, a network of a few steps: the gradient is the plain network's."""
    pixels = np.full((192, 200, 3), 200, np.uint8) + np.random.default_rng(0).integers(
        0, 20, (192, 200, 3), np.uint8
    )
    pixels[40::60], pixels[42::60] = 90, 90
    Image.fromarray(pixels).save(tmp_path / "lines.png")
    plot = tmp_path / "map.png"
    arguments = ["--image", str(tmp_path / "lines.png"), "--plot", str(plot)]
    found = load("saliency.py").main([*arguments, "--tile", "80", "--steps", "30", "--smoothgrad", "2"])
    assert found["difference"][0] < 1e-5
    assert 0 < found["any pixel"][0] < 0.2
    assert " x 3 tiles, largest read " in capsys.readouterr().out.replace("\n", " ")
    assert is_picture(plot)


def test_saliency_maps():
    """A map is 1 where the gradient is above its 99th percentile; SmoothGrad of a linear score is its gradient."""
    example = load("saliency.py")
    gradient = torch.zeros(1, 3, 40, 50)
    gradient[0, 1, 10:30, 20:30] = -2.0
    saliency = example.saliency_map(gradient, blur=1.0)
    assert saliency.shape == (40, 50)
    assert saliency.max() == saliency[20, 25] == 1
    assert saliency[0, 0] == 0
    lines = np.zeros((40, 50), bool)
    lines[10:30, 20:25] = True
    left, right = example.hits(saliency, lines)
    assert left == 1
    assert right == 0
    image = torch.randn(1, 3, 12, 12)
    linear = torch.nn.Conv2d(3, 1, 3)
    plain = example.input_gradient(linear, image)
    assert torch.allclose(example.input_gradient(linear, image, copies=3), plain, atol=1e-6)


def test_lines_are_found():
    """The mask of the retina: vessels are a few per cent of it, none in its black surroundings."""
    example = load("saliency.py")
    lines = example.thin_dark_lines(example.data.retina())
    assert 0.02 < lines.mean() < 0.1
    assert not lines[:60, :60].any()
