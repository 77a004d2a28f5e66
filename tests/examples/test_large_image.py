"""The example's two passes against the plain network on the same bytes."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fxstream

zarr = pytest.importorskip("zarr", minversion="3")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import large_image  # noqa: E402


def test_values_and_resumption(tmp_path, capsys):
    arguments = ["--size", "301", "--memory", "3MiB", "--folder", str(tmp_path), "--plot", str(tmp_path / "a.png")]
    found = large_image.main(arguments)
    told = capsys.readouterr().out
    assert "tiles, largest read" in told
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size > (100, 100)
    torch.manual_seed(0)
    image = torch.from_numpy(zarr.open_array(str(tmp_path / "image.zarr"), mode="r")[:]).permute(2, 0, 1)[None]
    stages = fxstream.freeze_batch_norm(large_image.Stages(0))
    loss = (stages(image).mean() - 1).square()
    loss.backward()
    torch.optim.SGD(stages.parameters(), lr=1e-3).step()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    scores = zarr.open_array(str(tmp_path / "scores.zarr"), mode="r")[:]
    torch.testing.assert_close(torch.from_numpy(scores), stages(image).detach(), rtol=1e-4, atol=1e-5)
    lines = (tmp_path / "journal").read_text().count("\n")
    assert large_image.main(arguments) == found
    assert (tmp_path / "journal").read_text().count("\n") == lines + 1
