"""Other systems: without `resource`, without all that `os.sysconf` knows here, without the C library of Linux."""

import subprocess
import sys

import pytest

HIDE = """
import ctypes
import json
import os
import pathlib
import sys

import torch
from torch import nn

sys.modules["resource"] = None
library, read = ctypes.CDLL, pathlib.Path.read_text

def cdll(name, *args, **kwargs):
    if name is None:
        raise TypeError("no library without a name")
    return library(name, *args, **kwargs)

def read_text(self, *args, **kwargs):
    if self.parts[:2] in (("/", "proc"), ("/", "sys")):
        raise FileNotFoundError(self)
    return read(self, *args, **kwargs)

ctypes.CDLL, pathlib.Path.read_text = cdll, read_text
"""
WINDOWS = "del os.sysconf\n"
MACOS = """
sysconf = os.sysconf

def some(name):
    if name == "SC_AVPHYS_PAGES":
        raise ValueError("unrecognized configuration name")
    return sysconf(name)

os.sysconf = some
"""
COMMANDS = """
import fxstream
from fxstream.__main__ import main
from fxstream.machine.meter import resident_bytes

pathlib.Path("model.py").write_text(
    "from torch import nn\\n"
    "build = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))\\n"
)
for command in ("report", "plan", "check"):
    for request in (("--tile", "24"), ("--memory", "400kB")):
        assert main([command, "model.py:build", "--size", "60", *request]) == 0, (command, request)
assert main(["report", "model.py:build", "--size", "60"]) == 0
assert resident_bytes() == 0
model, image = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 40, 40)
for options in ({"tile": 20}, {"memory": "1MiB"}):
    assert torch.allclose(fxstream.compile(model, **options)(image), model(image), atol=1e-5)
"""
UNKNOWN = """
for options in ({}, {"memory": 0.5}):
    try:
        fxstream.compile(model, **options)(image)
    except fxstream.InputError as error:
        print(error, file=sys.stderr)
"""
KNOWN = """
for options in ({}, {"memory": 0.5}):
    assert torch.allclose(fxstream.compile(model, **options)(image), model(image), atol=1e-5)
"""


def run(program, folder):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="hides what Linux has")
def test_without_knowing_the_memory_an_amount_in_bytes_is_asked_for(tmp_path):
    lines = run(HIDE + WINDOWS + COMMANDS + UNKNOWN, tmp_path)
    assert (
        lines
        == ["this system does not say how much memory it has: give the memory in bytes, as '8GiB', or a tile"] * 2
    )


@pytest.mark.skipif(sys.platform != "linux", reason="hides what Linux has")
def test_without_knowing_the_free_memory_a_share_of_all_of_it_counts(tmp_path):
    assert run(HIDE + MACOS + COMMANDS + KNOWN, tmp_path) == []
