"""The table of networks of packages, on a list of two modules: one that streams, one that is not one graph."""

import csv
import json
import sys

import pytest
from test_examples import EXAMPLES, load

MODULES = """
import torch
from torch import nn

class Streams(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                                    nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3))

    def forward(self, x):
        return self.layers(x)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3)

    def forward(self, x):
        y = self.layer(x)
        return -y if y.sum() > 1e9 else y
"""
LIST = """
from package_network import Network

NETWORKS = (
    Network("Streams", "modules_of_a_test:Streams", (1, 2, 40, 40), {"width": 8}),
    Network("Branches", "modules_of_a_test:Branches", (1, 2, 24, 24)),
    Network("Elsewhere", "a_package_that_is_not_there:Net", (1, 2, 24, 24)),
)
"""


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    (tmp_path / "modules_of_a_test.py").write_text(MODULES)
    (tmp_path / "list.py").write_text(LIST)
    return load("networks.py")


def test_a_row_for_each_network_of_a_list(example, tmp_path, capsys):
    rows, table = tmp_path / "rows.json", tmp_path / "rows.csv"
    arguments = ["--packages", str(tmp_path / "list.py"), "--json", str(rows), "--csv", str(table)]
    example.main(arguments)
    with table.open() as file:
        streams, branches = csv.DictReader(file)
    assert streams["verdict"] == "exact"
    assert float(streams["streamed_eval"]) > 0.9
    assert float(streams["streamed_training"]) > 0.9
    assert streams["compared_in"] == "training float64"
    assert float(streams["error"]) < 1e-10
    assert float(streams["memory_share"]) < 1.0
    assert branches["verdict"] == "not captured"
    assert "not one graph" in branches["reason"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 networks skipped, a_package_that_is_not_there is not installed: python -m pip install" in printed
    assert "2 networks, 1 captured, 0 wrong, 0 crashed" in printed
    before = rows.read_text()
    example.main(["Streams", *arguments])  # what is there is not asked again
    assert rows.read_text() == before


def test_a_network_that_takes_too_long_is_a_row_too(example, tmp_path):
    rows = tmp_path / "rows.json"
    example.main(["Streams", "--packages", str(tmp_path / "list.py"), "--json", str(rows), "--seconds", "0.1"])
    (row,) = json.loads(rows.read_text())
    assert row == {"network": "Streams", "end": "took more than 0.1 s"}


def test_a_name_that_is_not_in_the_list(example, tmp_path):
    with pytest.raises(SystemExit, match=r"Swims: not in .*list\.py, which has Streams, Branches, Elsewhere"):
        example.main(["Swims", "--packages", str(tmp_path / "list.py")])
