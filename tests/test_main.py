"""The command line as a user meets it: output, exit codes, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import MODEL, model_file, run

import fxstream
from fxstream.__main__ import main
from fxstream.report.as_json import SCHEMA


@pytest.fixture
def model(tmp_path, monkeypatch):
    return model_file(tmp_path, monkeypatch)


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


@pytest.mark.parametrize("command", ["report", "plan", "check", "bench", "predict", "models", "rules"])
def test_help_has_examples_of_its_command(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  fxstream ")]
    assert {words[1] for words in examples} == {command}


PIPED = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 1), os.close(writer), os.close(reader)
from fxstream.__main__ import main
sys.exit(main(["rules"]))
"""


def test_a_reader_that_has_seen_enough():
    found = subprocess.run([sys.executable, "-c", PIPED], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


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
