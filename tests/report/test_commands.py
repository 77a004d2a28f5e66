"""What the commands take and say: inputs, arguments, modes, missing packages; and when torch is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import TWO, model_file, run

import fxstream
from fxstream.__main__ import main
from fxstream.machine.units import bytes_text
from fxstream.tools.model_spec import load


@pytest.fixture
def model(tmp_path, monkeypatch):
    return model_file(tmp_path, monkeypatch)


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
    assert "image 1x3x70x64 and 1x1x70x64, train mode" in out
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
