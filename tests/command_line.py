"""What tests of the command line share: a file with models, and a command with what it printed."""

from fxstream.__main__ import main

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


def model_file(tmp_path, monkeypatch):
    """The file, in the current folder of a terminal of 80 columns."""
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return "model.py"


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()
