"""The README's blocks run as printed, on small images; all pages have links, paths and results that are there."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fxstream
from fxstream.rules import unregister_rule

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SECTIONS = [section.split("\n", 1) for section in re.split(r"^###? ", README, flags=re.MULTILINE)]
RECIPES = {
    title: code[1] for title, text in SECTIONS[1:] if (code := re.search(r"```python\n(.*?)```", text, re.DOTALL))
}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")]
SMALL = {
    "resnet50": "resnet18",
    "4096, 4096": "256, 256",
    "16384": "256",
    "8192": "256",
    "1024": "64",
    "range(10)": "range(2)",
    "512, tile=256": "128, tile=96",
    '"16GiB", "8GiB", "4GiB"': '"60MiB", "55MiB"',
    "30GiB": "60MiB",
    "8GiB": "60MiB",
    "2GiB": "3MiB",
}
"""What a recipe says, and what it says in a test: the same at a size of seconds."""


def small(block, **others):
    for old, new in (SMALL | others).items():
        block = block.replace(old, new)
    return block


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a recipe in a folder of its own; returns its names."""
    monkeypatch.chdir(tmp_path)

    def run(title, **others):
        names = {"__name__": "recipe"}
        exec(compile(small(RECIPES[title], **others), f"README.md, {title}", "exec"), names)
        return names

    return run


def test_the_page_is_short_and_has_six_recipes():
    assert len(README.splitlines()) <= 250
    assert len(RECIPES) == 6


def test_first_screen():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    names = {"fxstream": fxstream, "model": model, "criterion": torch.nn.CrossEntropyLoss()}
    exec(block, names | {"image": torch.rand(1, 3, 64, 64), "label": torch.tensor([1])})
    assert model[0].weight.grad is not None


def test_train(run):
    names = run("Train")
    assert not names["model"].plan.is_trivial
    assert names["loss"].item() < 2


def test_fit_a_memory(run, capsys):
    run("Fit a memory")
    assert capsys.readouterr().out.count("predicted for a training step") == 2


def test_a_slide_on_disk(run, tmp_path):
    """A pyramidal, tiled and compressed TIFF; the loss and the gradients are those of the plain network."""
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 270, 3), dtype=np.uint8)
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(pixels, subifds=1, **options)
        file.write(pixels[::2, ::2], subfiletype=1, **options)
    names = run("A slide on disk", **{"optimiser.step()": ""})
    names["file"].close()
    model, network = names["model"], names["network"]
    assert not model.plan.is_trivial
    streamed = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    loss = torch.nn.functional.cross_entropy(network(image.to(names["device"])), names["label"])
    loss.backward()
    assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    scale = max(parameter.grad.abs().max() for parameter in network.parameters())
    for parameter, gradient in zip(network.parameters(), streamed, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4 * float(scale))


def test_predict_into_an_array(run):
    pytest.importorskip("zarr")
    names = run("Predict into an array")
    assert not names["model"].plan.is_trivial
    expected = names["model"].model(torch.from_numpy(names["image"][:]).permute(2, 0, 1)[None].float())
    torch.testing.assert_close(torch.from_numpy(names["out"][:]), expected.detach())
    run("Predict into an array")  # over the finished one


def several_processes():
    """The block of the guide, with the imports and the step that the README has; one replica of two ranks."""
    page = (ROOT / "examples" / "several_processes.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("(2, 4)", "(1, 2)")
    before, after = re.split(r"^mesh = .*?^(?=network)", RECIPES["Several GPUs"], flags=re.MULTILINE | re.DOTALL)
    network, after = after.split("model = ", 1)
    imports = "from torch.nn.parallel import DistributedDataParallel\n"
    return imports + before + network + block + after.split("\n", 1)[1]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.xdist_group("sharing")
@pytest.mark.parametrize("recipe", ["README.md", "several_processes.md"])
def test_several_gpus(recipe, tmp_path):
    """Two processes on the CPU; every rank has the gradient."""
    recipe = small(
        RECIPES["Several GPUs"] if recipe == "README.md" else several_processes(), **{'"cuda"': '"cpu"'}
    )
    report = (
        "norm = next(network.parameters()).grad.norm().item()\n"
        "open(f'norm_{torch.distributed.get_rank()}', 'w').write(str(norm))\n"
    )
    leave = "\nimport os\nos._exit(0)  # gloo's threads abort now and then while the interpreter is torn down\n"
    (tmp_path / "train.py").write_text(
        recipe.replace("torch.distributed.destroy", f"{report}torch.distributed.destroy") + leave
    )
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*launcher, "train.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (float((tmp_path / f"norm_{rank}").read_text()) for rank in range(2))
    assert first == second > 0


def test_what_can_my_network_do(run, capsys):
    run("What can my network do?")
    assert "region" in capsys.readouterr().out


GUIDES = ("options", "images_on_disk", "exactness", "other_tools", "predicting")


@pytest.mark.parametrize("guide", GUIDES)
def test_blocks_of_the_guides(guide, tmp_path, monkeypatch):
    """In order, in one namespace that has what the text speaks of."""
    zarr, tifffile = pytest.importorskip("zarr"), pytest.importorskip("tifffile")
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, (500, 450, 3), dtype=np.uint8)
    tifffile.imwrite("slide.tif", array, tile=(64, 64), photometric="rgb")
    zarr.save_array("image.zarr", array)
    np.save("a.npy", array)
    np.save("b.npy", array)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1)
    ).eval()
    names = {"fxstream": fxstream, "torch": torch, "zarr": zarr, "tifffile": tifffile, "network": network}
    names |= {
        "image": torch.rand(1, 3, 256, 256),
        "criterion": torch.nn.MSELoss(),
        "label": torch.zeros(1, 1, 500, 450),
        "tissue": np.arange(50 * 45).reshape(50, 45) % 7 > 2,
    }
    names |= {
        "model": fxstream.compile(network, memory="9MiB"),
        "predict": fxstream.compile(network, memory="9MiB"),
    }
    page = (ROOT / "examples" / f"{guide}.md").read_text()
    try:
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, names)
    finally:
        if "file" in names:
            names["file"].close()
        with contextlib.suppress(KeyError):
            unregister_rule("mylib::soft_threshold")


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths(page):
    """Every link leads somewhere, and every file that a page names is there."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:fxstream|tests|examples)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path


def benchmarks():
    path = ROOT / "examples" / "benchmarks" / "all.py"
    specification = importlib.util.spec_from_file_location("benchmarks_all", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_results_have_the_command_that_makes_them():
    """Every result is a block that `all.py` would write, and the page of benchmarks has no other output."""
    module = benchmarks()
    for page in module.PAGES:
        for name, text in module.BLOCK.findall(page.read_text()):
            output = text.split("```\n```\n", 1)[1].removesuffix("\n```")
            assert module.block(name, output) == f"<!-- result: {name} -->\n{text}\n<!-- end -->"
    rest = module.BLOCK.sub("", (ROOT / "examples" / "benchmarks" / "README.md").read_text())
    assert "```" not in rest
    assert "<!-- result" not in rest


def test_all_writes_what_a_command_prints(tmp_path, monkeypatch, capsys):
    module, page = benchmarks(), tmp_path / "page.md"
    monkeypatch.setattr(module, "PAGES", (page,))
    page.write_text(
        f"before\n\n{module.block('networks_table', 'stale')}\n\n{module.block('planner', 'kept')}\n\nafter\n"
    )
    assert module.main(["networks_table"]) == 0
    text = page.read_text()
    assert "   178  networks\n" in text
    assert "stale" not in text
    assert module.block("planner", "kept") in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert module.wrapped("  " + "word " * 30).count("\n    word") == 1


def test_the_reference_is_of_these_docstrings():
    path = ROOT / "examples" / "make_reference.py"
    specification = importlib.util.spec_from_file_location("make_reference", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    page = module.page()
    assert page == module.PAGE.read_text(), "run: python examples/make_reference.py"
    missing = [name for name in fxstream.__all__ if f"### {name}\n" not in page]
    assert [name for name in missing if not isinstance(getattr(fxstream, name), str)] == []


def test_ci_and_pre_commit_check_with_the_same_versions():
    pinned = set(re.findall(r"^(?:ruff|mypy)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert len(pinned) == 2
    assert {f'"{pin}"' for pin in pinned} <= set(re.findall(r'"[^"]+"', (ROOT / "pyproject.toml").read_text()))
    hooks = set(re.findall(r"(?:ruff|mypy)==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks
    assert hooks <= pinned
