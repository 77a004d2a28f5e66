"""The command line as a user meets it: output, exit codes, one-line errors, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxstream
from fxstream.__main__ import main
from fxstream.report.as_json import SCHEMA

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

number = 3
"""


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
    code, out, err = run(capsys, "report", f"{model}:build", "--size", "200x160", "--tile", 64)
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
    code, out, _ = run(capsys, "report", f"{model}:build", "--size", 200, "--tile", 64, "--json")
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
        capsys, "report", f"{model}:build", "--size", 200, "--tile", 64, "--html", "a.html", "--plot", "a.png"
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
    code, out, _ = run(capsys, "report", f"{model}:volume", "--input-shape", "1,1,20,24,28", "--tile", "12x12x12")
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
    "no such module": (["report", "absent_module:build", "--size", "64"], "importing absent_module fails"),
    "no such name": (["report", "model.py:bild", "--size", "64"], "model.py has no 'bild'; it defines build"),
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
    "too short a shape": (["report", "model.py:build", "--input-shape", "3,64"], "needs batch, channels and"),
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
        "--device 'gpu 1' is not a device: use cpu, cuda or cuda:1",
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
