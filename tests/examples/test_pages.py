"""The pages beside the examples: their links lead somewhere, their blocks for fxstream run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxstream
from fxstream.tools.zoo import define_missing_torchvision_schemas

zarr = pytest.importorskip("zarr")
define_missing_torchvision_schemas()
from torchvision.models import resnet18  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = sorted(EXAMPLES.glob("*.md"))


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_blocks_for_fxstream(tmp_path, monkeypatch):
    """In order, within a memory that makes small images stream; a step's loss is the plain network's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = (EXAMPLES / "coming_from.md").read_text()
    blocks = re.findall(r"```python\n(# with fxstream.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    array = np.random.default_rng(0).integers(0, 256, (250, 230, 3), dtype=np.uint8)
    names = {"fxstream": fxstream, "torch": torch, "nn": nn, "resnet18": resnet18, "network": network}
    names |= {"criterion": nn.CrossEntropyLoss(), "labels": torch.tensor([1]), "array": array}
    scores = np.memmap("scores", mode="w+", shape=(1, 1, 250, 230), dtype=np.float32)
    names |= {"image": torch.randn(1, 3, 257, 300), "scores": scores}

    exec(blocks[0].replace("8GiB", "60MiB"), names)
    assert not names["model"].plan.is_trivial
    exec(blocks[1].replace("8GiB", "2MiB"), names)
    assert not names["network"].plan.is_trivial
    torch.testing.assert_close(names["logits"], network(names["image"]), rtol=1e-4, atol=1e-5)
    names["network"] = network
    exec(blocks[2].replace("8GiB", "2MiB"), names)
    assert not names["predict"].plan.is_trivial
    wanted = network(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)
    torch.testing.assert_close(torch.from_numpy(names["scores"]), wanted.detach(), rtol=1e-4, atol=1e-5)
    names["model"] = plain = fxstream.freeze_batch_norm(resnet18(num_classes=2))
    exec(blocks[3].replace("8GiB", "60MiB"), names)
    assert names["loss"].item() == pytest.approx(names["criterion"](plain(names["image"]), names["labels"]).item())


def test_batch_norm_counts_a_step_once():
    """What the page says of checkpoints: there a block, and its BatchNorm, runs twice in a step."""
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    image = torch.randn(1, 3, 256, 256)
    checkpoint(block, image, use_reentrant=False).sum().backward()
    assert block[1].num_batches_tracked == 2
    block[1].reset_running_stats()
    streamed = fxstream.compile(block, memory="9MiB")
    streamed(image).sum().backward()
    assert not streamed.plan.is_trivial
    assert block[1].num_batches_tracked == 1


def make_images(folder, sizes):
    """Images of noise; a pixel's class is whether it is bright."""
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / str(number)).mkdir(parents=True)
        zarr.save_array(folder / str(number) / "image.zarr", pixels)
        zarr.save_array(folder / str(number) / "mask.zarr", (pixels.mean(2) > 128).astype(np.uint8))


def test_your_own_training(tmp_path, monkeypatch, capsys):
    """Six epochs and six more after a restart are twelve in one go; the network learns; its maps are on disk."""
    (block,) = re.findall(r"```python\n(.*?)```", (EXAMPLES / "own_training.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line and not line.startswith(("import", "from"))]) <= 45
    losses = []
    for epochs in ([12], [6, 12]):
        folder = tmp_path / str(len(epochs))
        make_images(folder / "train", [(90, 80), (80, 90), (90, 80), (80, 90)])
        make_images(folder / "validation", [(70, 100)])
        monkeypatch.chdir(folder)
        for last in epochs:
            torch.manual_seed(0)
            names = {"__name__": "page"}
            exec(block.replace("8GiB", "700KiB").replace("20 + 1", f"{last} + 1").replace("1e-2", "3e-2"), names)
        assert names["epoch"] == 12
        assert not names["model"].plan.is_trivial
        assert torch.load("state.pt")["epoch"] == 12
        losses.append(names["loss"].item())
        image = torch.from_numpy(zarr.open("validation/0/image.zarr")[:]).permute(2, 0, 1)[None]
        plain = names["FromBytes"](*names["layers"])(image)
        torch.testing.assert_close(torch.from_numpy(names["scores"][:]), plain.detach(), rtol=1e-4, atol=1e-4)
        assert names["accuracy"] > 0.8
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "epoch 12, 0: accuracy 0." in capsys.readouterr().out
