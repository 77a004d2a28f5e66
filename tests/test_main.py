"""The command line as a user meets it: output, exit codes, one-line errors, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxstream
from fxstream.__main__ import main
from fxstream.machine.units import bytes_text
from fxstream.report.as_json import SCHEMA
from fxstream.tools.model_spec import load

MODEL = """
import torch
from torch import nn

def build():
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*stem, nn.Conv2d(4, 4, 3), nn.MaxPool2d(2))

def one_channel():
    return nn.Conv2d(1, 2, 5)

def volume():
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 2, 3))

def needs(width, depth=2):
    return nn.Conv2d(3, width, depth)

def fails():
    raise ValueError("no such depth")

def leaves():
    raise SystemExit(3)

def no_model():
    return 7

class Two(nn.Module):
    def __init__(self, width, *, bias=True):
        super().__init__()
        self.image, self.mask = nn.Conv2d(3, width, 3, bias=bias), nn.Conv2d(1, width, 3)
        self.last = nn.Conv2d(width, 2, 3)

    def forward(self, image, mask):
        return self.last(torch.relu(self.image(image) * self.mask(mask.to(image))))

number = 3
"""
TWO = ("--input", "1x3x70x64", "--input", "1x1x70x64:uint8")


@pytest.fixture
def model(tmp_path, monkeypatch):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return "model.py"


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_report(model, capsys):
    code, out, err = run(capsys, "report", f"{model}:build", "--size", "200x160", "--tile", 64, "--eval")
    assert code == 0
    assert "image 1x3x200x160, eval mode" in out
    assert "output pixel o reads 4*o - 1 .. 4*o + 7 of the image: field 9, stride 4, halo 1+4" in out
    assert "output extent for image extent n: floor((n - 3)/4)" in out
    assert "probe, region 0: 5 of 5 nodes measured, agree with the algebra" in out
    assert "predicted for a training step: " in out
    table = out.split("\n\n")[1]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert err == ""


def test_report_of_batch_statistics_says_what_helps(model, capsys):
    _, out, _ = run(capsys, "report", f"{model}:build", "--size", 64, "--train", "--all", "--global-ops", "cut")
    assert "cut: `1` (aten::batch_norm) uses batch statistics" in out
    assert "fxstream.freeze_batch_norm(model) streams 100% instead of 51% of the activations" in out
    _, out, _ = run(capsys, "report", f"{model}:build", "--size", 64, "--train", "--freeze-batch-norm")
    assert "no cut: every operator is local" in out


def test_json_is_documented_data(model, capsys):
    code, out, _ = run(capsys, "report", f"{model}:build", "--size", 200, "--tile", 64, "--eval", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["schema"] == SCHEMA
    assert data["image"] == [1, 3, 200, 200]
    assert [layer["operator"] for layer in data["layers"]] == [
        "conv2d",
        "batch_norm",
        "relu",
        "conv2d",
        "max_pool2d",
    ]
    first = data["layers"][0]
    assert (first["kernel"], first["stride"], first["shape"]) == ([3, 3], [2, 2], [1, 4, 100, 100])
    assert first["macs"] == 4 * 100 * 100 * 27
    assert first["bytes"] == 4 * 100 * 100 * 4
    assert first["field"][0]["size"] == 3
    assert data["regions"][0]["forms"]["owned"] == ["floor((T - 9)/4) + 1"] * 2
    assert data["plan"]["segments"][0]["tiles"] > 1
    assert data["plan"]["predicted"]["plain_bytes"] > data["plan"]["predicted"]["bytes"] > 0
    assert data["probe"][0]["agrees"] is True
    assert set(data) == {
        "schema",
        "network",
        "image",
        "training",
        "bound_to_size",
        "operators",
        "macs",
        "activation_bytes",
        "streamed_share",
        "reductions",
        "layers",
        "regions",
        "cuts",
        "plan",
        "probe",
    }


def test_page_and_picture(model, capsys, tmp_path):
    code, out, err = run(
        capsys,
        "report",
        f"{model}:build",
        "--size",
        200,
        "--eval",
        "--tile",
        64,
        "--html",
        "a.html",
        "--plot",
        "a.png",
    )
    assert (code, out) == (0, "")
    assert err == "wrote a.html\nwrote a.png\n"
    page = Path("a.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "field 9 at stride 4" in page
    assert "http" not in page
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["a.html", "a.png", "model.py"]


def test_plan(model, capsys):
    code, out, _ = run(capsys, "plan", f"{model}:build", "--size", 400, "--tile", 100)
    assert code == 0
    assert "MACs" in out
    code, out, _ = run(capsys, "plan", f"{model}:build", "--size", 400, "--memory", "1.5MiB", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["segments"][0]["tiles"] > 1
    assert found["predicted"]["bytes"] <= 1.5 * 2**20 < found["predicted"]["plain_bytes"]
    arguments = ("plan", f"{model}:build", "--size", 400, "--tile", 100, "--json")
    step, call = (json.loads(run(capsys, *arguments, *more)[1])["predicted"] for more in ((), ("--no-grad",)))
    assert call["bytes"] < step["bytes"]
    assert call["plain_bytes"] < step["plain_bytes"]


def test_plan_for_a_device_that_is_elsewhere(model, capsys):
    arguments = ["plan", f"{model}:build", "--size", 400, "--memory", "1.5MiB", "--json", "--device", "cuda"]
    found = [json.loads(run(capsys, *arguments, *more)[1])["predicted"] for more in ([], ["--offload"])]
    assert found[0]["offloaded"] == 0
    assert all(plan["bytes"] <= 1.5 * 2**20 < plan["plain_bytes"] for plan in found)
    assert found[0]["time_ratio"] != json.loads(run(capsys, *arguments[:-2])[1])["predicted"]["time_ratio"]


def test_check(model, capsys):
    code, out, _ = run(capsys, "check", f"{model}:build", "--size", "61x50", "--tile", 24, "--batch", 2)
    assert code == 0
    assert out.startswith("model.py:build, image 2x3x61x50, train mode\n")
    assert "all agree" in out
    assert "grad of input 0" in out
    code, out, _ = run(capsys, "check", f"{model}:build", "--size", 60, "--tile", 24, "--native", "--json")
    assert code == 0
    assert json.loads(out)["dtype"] == "float32"


def test_check_finds_a_difference(model, capsys, monkeypatch):
    monkeypatch.setattr("fxstream.tools.check.TOLERANCE", -1.0)
    code, out, _ = run(capsys, "check", f"{model}:build", "--size", 60, "--tile", 24)
    assert code == 1
    assert "DIFFER" in out


def test_other_shapes(model, capsys):
    code, out, _ = run(capsys, "report", f"{model}:one_channel", "--size", 40, "--channels", 1)
    assert code == 0
    assert "1 regions are too small to be worth a tile loop" in out
    code, out, _ = run(capsys, "report", f"{model}:volume", "--input", "1x1x20x24x28", "--tile", "12x12x12")
    assert code == 0
    assert "image 1x1x20x24x28" in out


def test_bench_and_rules(model, capsys):
    code, out, _ = run(
        capsys,
        "bench",
        f"{model}:build",
        "--size",
        100,
        "--memory",
        "40%",
        "--rounds",
        1,
        "--json",
        "--plot",
        "p.png",
    )
    assert code == 0
    found = {row["way"]: row for row in json.loads(out)["rows"]}
    assert list(found) == ["plain", "checkpoint", "memory 40%"]
    assert all(row["failure"] is None and row["seconds"] > 0 for row in found.values())
    assert found["memory 40%"]["peak_bytes"] < found["plain"]["peak_bytes"]
    assert Path("p.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = run(capsys, "rules")
    assert code == 0
    assert "conv2d" in out


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


def test_debug_shows_the_traceback(model):
    with pytest.raises(fxstream.InputError):
        main(["report", "model.py:bild", "--size", "64", "--debug"])


def test_usage_mistakes_exit_with_2(capsys):
    for arguments in ([], ["report"], ["reprt", "x"], ["report", "x", "--size", "9", "--train", "--eval"]):
        with pytest.raises(SystemExit) as exit_of:
            main(arguments)
        assert exit_of.value.code == 2
    with pytest.raises(SystemExit) as exit_of:
        main(["--help"])
    assert exit_of.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_in_a_pipe_without_colour(model):
    command = [sys.executable, "-m", "fxstream", "report", f"{model}:build", "--size", "64", "--no-probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    head = subprocess.run(f"{' '.join(command)} | head -1", shell=True, capture_output=True, text=True, check=True)
    assert head.stdout.startswith("model.py:build")
    assert head.stderr == ""


def test_what_the_user_prints_stays_out_of_the_data(model, capsys, tmp_path):
    (tmp_path / "loud.py").write_text("print('hello')\n" + MODEL)
    code, out, err = run(capsys, "report", "loud.py:build", "--size", 64, "--json", "--no-probe")
    assert code == 0
    assert json.loads(out)["schema"] == SCHEMA
    assert "hello" in err


def test_a_check_of_nothing_says_so(model, capsys):
    code, out, _ = run(capsys, "check", f"{model}:build", "--size", 60, "--tile", 400)
    assert code == 0
    assert "nothing was cut into tiles" in " ".join(out.split())


@pytest.mark.parametrize(
    ("command", "flag"),
    [("check", "--offload"), ("check", "--device=cuda"), ("check", "--no-grad"), ("bench", "--no-grad")],
)
def test_a_command_refuses_what_it_would_ignore(command, flag, model, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, f"{model}:build", "--size", "61", "--tile", "24", flag])
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["plan", "--help"], 0),
        (["--version"], 0),
        (["reprt"], 2),
        (["plan", "model.py:build", "--size", "large"], 2),
        (["plan", "model.py:build", "--size", "64", "--memory", "8"], 2),
        (["plan", "model.py:build", "--size", "64"], 2),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments, code):
    script = "import sys; from fxstream.__main__ import main; import atexit\n"
    script += (
        "atexit.register(lambda: print('loaded:', [m for m in ('torch', 'rich', 'sympy') if m in sys.modules]))\n"
    )
    script += f"sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.endswith("loaded: []\n")


def test_all_that_is_exported_is_there():
    script = "import fxstream, sys; assert 'torch' not in sys.modules\n"
    script += "assert set(fxstream.__all__) <= set(dir(fxstream))\n"
    script += "for name in fxstream.__all__: getattr(fxstream, name)\n"
    script += "from fxstream import *; import torch; print(compile(torch.nn.Conv2d(3, 4, 3), tile=8))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("StreamedModule("), done.stderr
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        fxstream.complie  # noqa: B018


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_of:
        main(["--version"])
    assert exit_of.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"fxstream {fxstream.__version__} (torch {torch.__version__.split('+')[0]}")


def test_several_inputs_and_arguments(model, capsys):
    spec = f"{model}:Two(4, bias=False)"
    code, out, _ = run(capsys, "plan", spec, *TWO, "--tile", 24)
    assert code == 0
    assert "image 1x3x70x64, train mode" in out
    assert "largest read 19x23 of `image` and 1 more" in out
    code, out, _ = run(capsys, "check", spec, *TWO, "--tile", 24, "--json")
    names = {row["name"] for row in json.loads(out)["differences"]}
    assert code == 0
    assert {"grad of input 0", "grad of image.weight"} <= names
    assert "grad of image.bias" not in names
    code, out, _ = run(capsys, "bench", spec, *TWO, "--tile", 24, "--rounds", 1, "--json")
    data = json.loads(out)
    assert data["inputs"] == [[[1, 3, 70, 64], ""], [[1, 1, 70, 64], "uint8"]]
    assert [row["failure"] for row in data["rows"]] == [None] * 3


def test_several_inputs_of_the_functions(model):
    two = load(f"{model}:Two(4)")
    shapes = [(2, 3, 70, 64), (2, 1, 70, 64)]
    assert fxstream.analyze(two, inputs=shapes).graph.value("image").shape == shapes[0]
    assert fxstream.plan(two, inputs=shapes, tile=24).segments[0].tile_count == 12
    mask = torch.randint(0, 2, shapes[1])
    report = fxstream.check(two, inputs=[shapes[0], mask], tile=24)
    assert report.ok
    assert report.dtype == torch.float64
    for size, inputs in ((None, None), (70, shapes)):
        with pytest.raises(fxstream.InputError, match="give the size of one image, or the shapes of all inputs"):
            fxstream.plan(two, size, inputs=inputs, tile=24)


def test_networks_of_libraries_take_arguments(capsys):
    code, out, _ = run(
        capsys, "report", "torchvision/resnet18(num_classes=7)", "--size", 64, "--no-probe", "--json"
    )
    assert code == 0
    assert json.loads(out)["layers"][-1]["shape"] == [1, 7]


def test_models(capsys):
    code, out, _ = run(capsys, "models", "ResNet50")
    assert code == 0
    assert "torchvision/resnet50" in out.splitlines()
    assert "timm/resnet50" in out.splitlines()
    assert all("resnet50" in line for line in out.splitlines())
    assert run(capsys, "models", "no such network")[0] == 2


def test_a_missing_package_says_how_it_is_installed(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # which makes its import fail
    code, _, err = run(capsys, "report", "timm/resnet18", "--size", 64)
    assert code == 2
    assert "timm is not installed: python -m pip install timm" in err
    code, out, err = run(capsys, "models", "resnet18")
    assert code == 0
    assert out.splitlines() == ["torchvision/quantized_resnet18", "torchvision/resnet18"]
    assert "python -m pip install timm" in err
    Path("needy.py").write_text("import cv2.absent_of_all\n")
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, _, err = run(capsys, "report", "needy.py:build", "--size", 64)
    assert code == 2
    assert "python -m pip install opencv-python" in err


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_permissions_of_the_user(umask, mode, model, capsys):
    arguments = ["report", f"{model}:build", "--size", 64, "--no-probe", "--html", "a.html"]
    before = os.umask(umask)
    try:
        run(capsys, *arguments)
        assert Path("a.html").stat().st_mode & 0o777 == mode
        Path("a.html").chmod(0o600)
        run(capsys, *arguments)
        assert Path("a.html").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_warning_of_torch_about_numpy_is_not_shown(model, tmp_path):
    """torch warns where numpy is missing; the command line has no use for either."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("raise ModuleNotFoundError('No module named numpy')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "fxstream", "plan", f"{model}:build", "--size", "64", "--tile", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_step_is_predicted_in_training_mode(model, capsys):
    """Of a BatchNorm with batch statistics, with what frozen ones would take; other modes by a flag."""
    arguments = ("plan", f"{model}:build", "--size", 400, "--memory", "1.5MiB")
    out = run(capsys, *arguments)[1]
    assert "image 1x3x400x400, train mode" in out
    assert "with --freeze-batch-norm (fxstream.freeze_batch_norm) it is " in out
    frozen = json.loads(run(capsys, *arguments, "--freeze-batch-norm", "--json")[1])
    ratio = frozen["predicted"]["time_ratio"]
    assert f"it is {ratio:.2f}x the plain time in {bytes_text(frozen['predicted']['bytes'])}" in out
    assert json.loads(run(capsys, *arguments, "--json")[1])["training"] is True
    for flags in (["--eval"], ["--no-grad"], ["--train", "--freeze-batch-norm"]):
        out = run(capsys, *arguments, *flags)[1]
        assert ("train mode" in out) == ("--train" in flags)
        assert "with --freeze-batch-norm" not in out


def test_a_memory_that_only_frozen_statistics_fit_into(model, capsys):
    arguments = ("plan", f"{model}:build", "--size", 400, "--segments", 1, "--memory")
    least = []
    for flags in ((), ("--freeze-batch-norm",)):
        with pytest.raises(fxstream.PlanError) as error:
            main([*map(str, arguments), "1kB", *flags, "--debug"])
        least.append(error.value.least_bytes)
    between = (least[0] + least[1]) // 2
    assert least[1] < between < least[0]
    code, _, err = run(capsys, *arguments, between)
    assert code == 2
    assert "the least that works is" in err
    assert "With --freeze-batch-norm a plan fits: " in err
