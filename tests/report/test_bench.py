"""The table of measurements: what was predicted stands beside what was measured."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

import fxstream
from fxstream.report.terminal import show_bench
from fxstream.tools import roofline
from fxstream.tools.benchmark import FXSTREAM, PLAIN, Method, Row, Workload


def test_predictions_beside_measurements():
    plain = Row(Method(PLAIN, "plain"), seconds=2.0, peak_bytes=4 * 2**20)
    streamed = Row(
        Method(FXSTREAM, "memory 50%"),
        seconds=3.0,
        peak_bytes=2**21,
        predicted_bytes=2**20,
        predicted_time=1.25,
        overhead=1.1,
    )
    console = Console(record=True, width=110, file=io.StringIO())
    show_bench(Workload("network", (((1, 3, 8, 8), "float32"),)), [plain, streamed], console)
    _, head, first, second, *_ = console.export_text().splitlines()
    assert head.split() == ["seconds", "time", "predicted", "peak", "memory", "predicted", "MACs"]
    assert first.split() == ["plain", "2.00", "1.00x", "4.00", "MiB", "1.00x"]
    expected = ["memory", "50%", "3.00", "1.50x", "1.25x", "2.00", "MiB", "0.50x", "1.00", "MiB", "1.10x"]
    assert second.split() == expected
    console = Console(record=True, width=80, file=io.StringIO())
    show_bench(Workload("network", (((1, 3, 8, 8), "float32"),)), [plain, streamed], console, roofline=0.5)
    _, head, first, second, *_ = console.export_text().splitlines()
    assert head.split()[-1] == "roofline"
    assert [line.split()[-1] for line in (first, second)] == ["25%", "17%"]


def test_the_roofline_is_the_larger_of_arithmetic_and_bytes(monkeypatch):
    """Three times the forward arithmetic; image and weights twice, and results, in 32 bits."""
    graph = fxstream.analyze(nn.Conv2d(3, 4, 3, padding=1), 16).graph
    side = roofline.SIDES["cpu"]
    monkeypatch.setattr(roofline, "best_seconds", lambda run, device: side**3 / 1e3)
    bytes_moved = 4 * (2 * (3 * 16 * 16 + 4 * 3 * 9 + 4) + 4 * 16 * 16)
    bandwidth = 3 * 4 * side**2 * 1e3 / side**3
    by_bytes = bytes_moved / bandwidth
    by_arithmetic = 3 * (16 * 16 * 4 * 3 * 9) / 1e3
    assert by_bytes != by_arithmetic
    least = roofline.roofline_seconds(graph, torch.device("cpu"))
    assert least == pytest.approx(max(by_bytes, by_arithmetic))
