"""Mistakes on the command line: one line on standard error, exit code 2, no file."""

from pathlib import Path

import pytest
import torch
from command_line import model_file, run


@pytest.fixture
def model(tmp_path, monkeypatch):
    return model_file(tmp_path, monkeypatch)


BAD = {
    "unknown network": (
        ["report", "torchvision/resnet51", "--size", "64"],
        "torchvision/resnet51 cannot be built",
    ),
    "no such form": (["report", "resnet50", "--size", "64"], "names no network: give torchvision/NAME"),
    "no such file": (["report", "absent.py:build", "--size", "64"], "there is no file absent.py"),
    "no such module": (
        ["report", "absent_module:build", "--size", "64"],
        "no file absent_module.py and no package",
    ),
    "no such name": (
        ["report", "model.py:bild", "--size", "64"],
        "model.py has no 'bild'; it defines Two, build, ",
    ),
    "error inside the file": (
        ["report", "broken.py:build", "--size", "64"],
        "ZeroDivisionError: division by zero",
    ),
    "needs arguments": (["report", "model.py:needs", "--size", "64"], "needs arguments (width)"),
    "fails": (["report", "model.py:fails", "--size", "64"], "fails with ValueError: no such depth"),
    "no model": (["report", "model.py:no_model", "--size", "64"], "returns a int, not an nn.Module"),
    "not callable": (["report", "model.py:number", "--size", "64"], "name a function that returns the model"),
    "no size": (["report", "model.py:build"], "give the image's --size"),
    "size in words": (["report", "model.py:build", "--size", "large"], "--size 'large' is not a number"),
    "size of zero": (["report", "model.py:build", "--size", "0"], "must be positive"),
    "too small a size": (["report", "model.py:build", "--size", "2"], "cannot run on inputs of these shapes"),
    "too many axes": (["report", "model.py:build", "--size", "9x9x9"], "cannot run on inputs of these shapes"),
    "a literal that is none": (["plan", "model.py:Two(os)", "--size", "64", "--tile", "9"], "no Python literals"),
    "a network with positions": (
        ["plan", "torchvision/resnet18(7)", "--size", "64", "--tile", "9"],
        "arguments of torchvision/resnet18 need their names: torchvision/resnet18(num_classes=2)",
    ),
    "no such argument": (
        ["plan", "torchvision/resnet18(numclasses=2)", "--size", "64", "--tile", "9"],
        "unexpected keyword argument 'numclasses'",
    ),
    "an input of a type that is none": (
        ["plan", "model.py:build", "--input", "1x3x64x64:bytes", "--tile", "9"],
        "--input has the type 'bytes', which torch does not have",
    ),
    "an input in words": (["plan", "model.py:build", "--input", "large", "--tile", "9"], "needs batch, channels"),
    "no unit": (
        ["plan", "model.py:build", "--size", "99", "--memory", "8"],
        "'8' is a number of bytes and needs a unit: 8GiB, or 8MiB",
    ),
    "nearly the name": (["report", "model.py:biuld", "--size", "64"], "; did you mean build?"),
    "nearly the network": (
        ["report", "torchvision/resnet51", "--size", "64"],
        "did you mean torchvision/resnet50",
    ),
    "without the library": (
        ["report", "resnet18", "--size", "64"],
        "did you mean torchvision/resnet18 or timm/resnet18?",
    ),
    "no such package": (
        ["report", "imports.py:build", "--size", "64"],
        "No module named 'skimage.absent' (",
    ),
    "no such mode": (
        ["plan", "model.py:build", "--size", "99", "--tile", "30", "--global-ops", "sream"],
        "global_ops must be one of 'auto', 'stream', 'cut'; found 'sream'",
    ),
    "too short a shape": (["report", "model.py:build", "--input", "3x64"], "needs batch, channels and"),
    "tile too small": (
        ["plan", "model.py:build", "--size", "99", "--tile", "2", "--segments", "1"],
        "The smallest tile that works here is",
    ),
    "tile in words": (["plan", "model.py:build", "--size", "99", "--tile", "big"], "--tile 'big' is not a number"),
    "tile of wrong axes": (["plan", "model.py:build", "--size", "99", "--tile", "9x9x9"], "has 3 axes"),
    "memory in words": (
        ["plan", "model.py:build", "--size", "99", "--memory", "lots"],
        "cannot parse 'lots' as a size: use 8GiB",
    ),
    "segments of zero": (
        ["plan", "model.py:build", "--size", "99", "--tile", "30", "--segments", "0"],
        "segments must be a positive int",
    ),
    "depth of zero": (["report", "model.py:build", "--size", "64", "--depth", "0"], "--depth 0 must be positive"),
    "huge size": (["report", "model.py:build", "--size", "9" * 20], "must be below"),
    "leaves the process": (["report", "model.py:leaves", "--size", "64"], "fails with SystemExit"),
    "too little memory": (
        ["plan", "model.py:build", "--size", "99", "--memory", "1kB"],
        "no plan fits into 1000 B: the least that works is",
    ),
    "tile and memory": (
        ["plan", "model.py:build", "--size", "99", "--memory", "1GB", "--tile", "9"],
        "give --tile or --memory, not both",
    ),
    "neither": (["plan", "model.py:build", "--size", "99"], "plan needs --tile or --memory"),
    "check without tile": (["check", "model.py:build", "--size", "99"], "check needs --tile or --memory"),
    "no such cut": (
        ["plan", "model.py:build", "--size", "99", "--tile", "30", "--cut", "layer9"],
        "no module `layer9`",
    ),
    "no such directory": (
        ["report", "model.py:build", "--size", "64", "--html", "no/a.html"],
        "cannot be written",
    ),
    "a directory": (["report", "model.py:build", "--size", "64", "--html", "."], "cannot be written"),
    "no such picture": (["report", "model.py:build", "--size", "64", "--plot", "a.docx"], "cannot be written"),
    "no such device": (
        ["plan", "model.py:build", "--size", "99", "--memory", "1MB", "--device", "gpu 1"],
        "'gpu 1' is not a device: use cpu, cuda or cuda:1",
    ),
}
if not torch.cuda.is_available():
    BAD["no GPU"] = (
        ["bench", "model.py:build", "--size", "99", "--memory", "1MB", "--device", "cuda"],
        "--device cuda: torch finds no GPU here; plan works without one",
    )


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(case, model, capsys, tmp_path):
    arguments, message = BAD[case]
    Path("broken.py").write_text("x = 1 / 0\n")
    Path("imports.py").write_text("import skimage.absent\n")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("fxstream: ")
    assert message in err
    assert err.count("\n") == 1
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before
