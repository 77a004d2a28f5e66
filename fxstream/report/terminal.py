"""A summary on the terminal. The home of rich. The tables fit into 80 columns and a pipe."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.machine.units import bytes_text, macs_text
from fxstream.planning.estimate import Prediction
from fxstream.report.closed_form import FieldForm
from fxstream.report.summary import Layer, Summary
from fxstream.rules import OpRule, Tileability
from fxstream.tools.benchmark import PLAIN, Row, Workload
from fxstream.tools.check import CheckReport

__all__ = [
    "cut_lines",
    "field_text",
    "grouped",
    "probe_lines",
    "progress",
    "region_lines",
    "show",
    "show_bench",
    "show_check",
    "show_plan",
    "show_rules",
    "tile_lines",
    "window_text",
]

BETTER = 0.9
"""Frozen BatchNorm is worth a line where it takes less than this part of the time or memory."""


def per_axis(texts: Sequence[str]) -> str:
    """One text if all axes agree, else all of them.

    >>> per_axis(["3", "3"]), per_axis(["3", "5"])
    ('3', '3x5')
    """
    separator = "x" if all(text.isdigit() for text in texts) else ", "
    return texts[0] if len(set(texts)) == 1 else separator.join(texts)


def field_text(fields: Sequence[ReceptiveField] | None) -> tuple[str, str, str]:
    """Receptive field, stride and halo; a field that depends on the phase as its smallest and largest size."""
    if fields is None:
        return "all", "", ""
    sizes = [f"{f.sizes[0]}-{f.sizes[1]}" if f.sizes[0] != f.sizes[1] else str(f.size) for f in fields]
    return (
        per_axis(sizes),
        per_axis([str(f.stride) for f in fields]),
        per_axis(["{}+{}".format(*f.halo) for f in fields]),
    )


def grouped(layers: Sequence[Layer], depth: int | None) -> Iterator[tuple[str, list[Layer]]]:
    """Runs of layers whose module paths agree in their first `depth` parts; every layer alone without a depth."""
    if depth is None:
        yield from ((layer.module or layer.node, [layer]) for layer in layers)
        return

    def path(layer: Layer) -> str:
        return ".".join(layer.module.split(".")[:depth]) or layer.node

    for name, run in itertools.groupby(layers, key=path):
        yield name, list(run)


def window_text(layer: Layer) -> str:
    """Kernel, stride and dilation as in ``7x7/2``, ``3x3 d2``."""
    if layer.window is None:
        return ""
    kernel, stride, dilation = layer.window
    text = "x".join(map(str, kernel))
    if any(s != 1 for s in stride):
        text += f"/{per_axis([str(s) for s in stride])}"
    if any(d != 1 for d in dilation):
        text += f" d{per_axis([str(d) for d in dilation])}"
    return text


def _layer_table(summary: Summary, depth: int | None, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    spare = max(0, width - 80) // 2
    table.add_column("module", overflow="fold", width=min(8 + spare, 30))
    table.add_column("operator", overflow="fold", width=min(12 + spare, 24))
    for name in ("field", "stride", "halo", "output", "memory", "MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, run in grouped(summary.layers, depth):
        last = run[-1]
        kinds = list(dict.fromkeys(layer.kind.value for layer in run if layer.kind is not Tileability.LOCAL))
        table.add_row(
            name,
            f"{last.operator} {window_text(last)}".strip() if len(run) == 1 else f"{len(run)} operators",
            *field_text(last.field),
            "x".join(map(str, last.shape[1:])),
            bytes_text(sum(layer.bytes for layer in run)).replace(" ", ""),
            macs_text(sum(layer.macs for layer in run)).replace(" ", ""),
            " ".join(kinds) or "local",
            style=None if not kinds else "yellow",
        )
    return table


def show(summary: Summary, console: Console, title: str, depth: int | None = 1) -> None:
    """The whole report: layers grouped to a depth of the module path, regions, cuts, tiles, memory, probe."""
    console.print(Text(title, style="bold"))
    console.print(
        f"{len(summary.layers)} operators, {macs_text(summary.macs)}MACs, activations"
        f" {bytes_text(summary.bytes)}, {summary.streamed_share:.1%} of them can be streamed",
        highlight=False,
    )
    console.print()
    console.print(_layer_table(summary, depth, console.width))
    for paragraph in (region_lines(summary), cut_lines(summary), tile_lines(summary), probe_lines(summary)):
        console.print()
        for line in paragraph:
            console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def region_lines(summary: Summary) -> list[str]:
    """Where regions begin and end, their fields and the closed forms of their tiles."""
    lines = []
    large = [region for region in summary.regions if region.worthwhile]
    for i, region in enumerate(large[:6]):
        size, stride, halo = field_text(region.field)
        lines.append(f"region {i}: {region.first} .. {region.last}, {region.share:.1%} of the activations")
        where = "the image" if region.is_image else f"its input `{region.source}`"
        if region.field is not None:
            form = FieldForm.of(region.field[0])
            lines.append(f"  output pixel o reads {form} of {where}: field {size}, stride {stride}, halo {halo}")
        if region.extent:
            lines.append(f"  output extent for image extent n: {per_axis(region.extent)}")
        if region.forms is not None and region.field is not None:
            lines.append(
                f"  in one segment a tile of T pixels owns t = {per_axis([str(f) for f in region.forms.owned])}"
                f" output pixels, shares {per_axis([str(f) for f in region.forms.overlap])} of itself with each"
                f" neighbour, costs {region.forms.overhead} x the MACs; the smallest T is"
                f" {max(f.size for f in region.field)}"
            )
    if len(large) > 6:
        lines.append(f"and {len(large) - 6} more regions")
    small = len(summary.regions) - len(large)
    if small:
        lines.append(f"{small} regions are too small to be worth a tile loop")
    return lines or ["nothing can be streamed"]


def cut_lines(summary: Summary) -> list[str]:
    """What ends the regions, why, and what the user can do."""
    lines = []
    for cut in summary.cuts[:8]:
        verdict = cut.verdict
        others = f" and {cut.count - 1} more" if cut.count > 1 else ""
        where = f" at {verdict.source}" if verdict.source else ""
        lines.append(
            f"cut: `{verdict.module or verdict.node}` ({verdict.operator}){others} {verdict.reason}{where}"
        )
        lines.append(f"  {cut.advice}")
    if len(summary.cuts) > 8:
        lines.append(f"and {len(summary.cuts) - 8} more kinds of cuts")
    if summary.bound:
        lines.append("the model is bound to this image size: every new size is captured anew")
    combined = (
        f"reduces over space and is combined from tiles ({summary.reductions})" if summary.reductions else ""
    )
    if not lines:
        return [f"no cut: every operator is local{f', or {combined}' if combined else ''}"]
    return [*lines, f"what {combined} ends no stream"] if combined else lines


def tile_lines(summary: Summary) -> list[str]:
    """Segments, tiles and predicted memory."""
    if summary.plan is None:
        return ["give --tile or --memory for tiles and predicted memory"]
    lines = str(summary.plan).splitlines()
    if summary.frozen is not None and _is_better(summary.frozen.prediction, summary.plan.prediction):
        predicted = summary.frozen.prediction
        lines.append(
            "batch statistics take more passes over the tiles, or more memory: with --freeze-batch-norm"
            f" (fxstream.freeze_batch_norm) it is {predicted.time_ratio:.2f}x the plain time in"
            f" {bytes_text(predicted.bytes)}"
        )
    return lines


def _is_better(prediction: Prediction, other: Prediction) -> bool:
    """Whether one plan is predicted to take much less time or memory than another."""
    return prediction.seconds < BETTER * other.seconds or prediction.bytes < BETTER * other.bytes


def probe_lines(summary: Summary) -> list[str]:
    """What the probe measured."""
    return [f"probe, {line}" for report in summary.probe for line in str(report).splitlines()] or [
        "probe: not run"
    ]


def show_plan(summary: Summary, console: Console, title: str) -> None:
    """The plan with its predicted memory, below a line that says of what."""
    console.print(Text(title, style="bold"))
    for line in tile_lines(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def show_check(report: CheckReport, console: Console, title: str, rows: int = 12) -> None:
    """What was compared, worst first, below a line that says of what."""
    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for name in ("error", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for difference in report.differences[:rows]:
        verdict = "ok" if difference.ok else "DIFFERS"
        style = None if difference.ok else "red"
        table.add_row(
            difference.name, f"{difference.error:.1e}", f"{difference.allowed:.1e}", verdict, style=style
        )
    console.print(str(report).splitlines()[0], highlight=False, markup=False)
    console.print(table)
    if len(report.differences) > rows:
        console.print(f"and {len(report.differences) - rows} with smaller errors", highlight=False)


def show_bench(workload: Workload, rows: Sequence[Row], console: Console, roofline: float | None = None) -> None:
    """One line per method: seconds and bytes, over those of the plain network, and what was predicted.

    With the least seconds that the device could take, `roofline`, how near each method is, instead of its MACs.
    """
    console.print(f"{workload.title}, one training step on {workload.device}", highlight=False)
    console.print(_bench_table([row for row in rows if not row.failure], roofline))
    for row in rows:
        if row.failure:
            console.print(f"{row.method.label}: {row.failure}", highlight=False, markup=False)
    threads = torch.get_num_threads()
    console.print(
        f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}, medians of processes by turns",
        highlight=False,
    )


def _bench_table(rows: Sequence[Row], roofline: float | None) -> Table:
    plain = next((row for row in rows if row.method.kind == PLAIN), None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    last = "MACs" if roofline is None else "roofline"
    for name in ("seconds", "time", "predicted", "peak", "memory", "predicted", last):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method.label,
            f"{row.seconds:.2f}",
            f"{row.seconds / plain.seconds:.2f}x" if plain else "",
            f"{row.predicted_time:.2f}x" if row.predicted_time is not None else "",
            bytes_text(row.peak_bytes),
            f"{row.peak_bytes / plain.peak_bytes:.2f}x" if plain else "",
            bytes_text(row.predicted_bytes) if row.predicted_bytes is not None else "",
            _last_cell(row, roofline),
        )
    return table


def _last_cell(row: Row, roofline: float | None) -> str:
    """How near a method is to the least time, or its MACs where that is not known."""
    if roofline is not None:
        return f"{roofline / row.seconds:.0%}"
    return f"{row.overhead:.2f}x" if row.overhead is not None else ""


def show_rules(rows: Sequence[OpRule], console: Console) -> None:
    """The table of rules, a line per family."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("family", no_wrap=True)
    table.add_column("operators")
    for family, run in itertools.groupby(rows, key=lambda row: row.family):
        table.add_row(family, ", ".join(row.operator.removeprefix("aten::") for row in run))
    console.print(table)
    console.print("and every operator that torch itself declares pointwise", highlight=False)


def progress(console: Console) -> Progress:
    """A progress bar that leaves nothing behind, for a console on standard error."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)
