"""The table of measurements: what was predicted stands beside what was measured."""

import io

from rich.console import Console

from fxstream.report.terminal import show_bench
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
