"""Predicted time over memory of a training step at 8192 x 8192: the numbers of `which_memory.md`; runs no network.

    python examples/pictures/pareto.py

ResNet-50 and DenseNet-121 with frozen BatchNorm, planned for a GPU within budgets from the least that takes no
more than six times the plain time up to most of what the plain network takes; then ResNet-50 with batch
statistics. Time is over the plain network's on a GPU that could hold it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

import fxstream
from fxstream.graph.autograd_saves import saves_of
from fxstream.machine.units import bytes_text
from fxstream.planning.plan import Plan, make_plan
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory
from fxstream.tools.zoo import build

NETWORKS = {"ResNet-50": "resnet50", "DenseNet-121": "densenet121"}
SLOWEST, STEP = 6, 1.1
RECOMPUTED = 4 / 3
"""Time of a step whose forward is computed twice and nothing more: a backward takes two forwards."""


def plans(model: nn.Module, size: int, count: int, most: float = 0.6) -> list[Plan]:
    """Plans within `count` budgets in equal ratios, up to `most` of the plain network's memory."""
    graph = fxstream.analyze(model, size).graph
    graph = reuse_memory(graph.with_saves(saves_of(graph)))  # once for all budgets

    def plan(memory: int) -> Plan:
        return make_plan(graph, Request(None, memory=memory), device=torch.device("cuda"))

    try:
        plan(1)
    except fxstream.PlanError as error:
        least = error.least_bytes
    while plan(least).prediction.time_ratio > SLOWEST:
        least = int(STEP * least)
    plain = plan(least).prediction.plain_bytes
    return [plan(int(memory)) for memory in np.geomspace(least, most * plain, count)]


def table_of(rows: dict[str, Sequence[Plan]]) -> Table:
    table = Table("network", "memory", "of plain", "segments", "streamed", "MACs", "time")
    for name, found in rows.items():
        for plan in found:
            predicted = plan.prediction
            table.add_row(
                name,
                bytes_text(predicted.bytes),
                f"{predicted.bytes / predicted.plain_bytes:.1%}",
                str(len(plan.segments)),
                f"{plan.streamed_share:.0%}",
                f"{plan.overhead:.2f}x",
                f"{predicted.time_ratio:.2f}x",
            )
        table.add_section()
    return table


def draw(rows: dict[str, Sequence[Plan]], size: int, path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, found), marker in zip(rows.items(), "os^"):
        plain = bytes_text(found[0].prediction.plain_bytes)
        memory = [plan.prediction.bytes / 2**30 for plan in found]
        axes.plot(memory, [p.prediction.time_ratio for p in found], marker + "-", label=f"{name}: {plain}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(RECOMPUTED, color="black", linewidth=0.8, linestyle=":")
    right = axes.get_xlim()[1]
    axes.text(right, RECOMPUTED, "one forward more ", va="bottom", ha="right", fontsize=9)
    axes.text(right, 1, "plain ", va="top", ha="right", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="memory of a step, GiB", ylabel="time over the plain network's")
    for axis, ticks in ((axes.xaxis, (0.5, 1, 2, 4, 8, 16, 32, 64)), (axes.yaxis, (1, 1.5, 2, 3, 4, 6))):
        axis.set_ticks(ticks, list(map(str, ticks)))
        axis.set_ticks([], minor=True)
    axes.set_title(f"predicted, one training step on an image of {size} x {size}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, title_fontsize=8, loc="upper right", title="the plain network takes")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, list[Plan]]:
    """Plans, table and picture; returns the plans."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--count", type=int, default=10, help="budgets of each network")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "pareto.png")
    options = parser.parse_args(arguments)
    console, rows = Console(width=100), {}
    for name, target in NETWORKS.items():
        model = fxstream.freeze_batch_norm(build(f"torchvision/{target}")).train()
        rows[name] = plans(model, options.size, options.count)
    batch = build("torchvision/resnet50").train()
    rows["ResNet-50, batch statistics"] = plans(batch, options.size, options.count)
    console.print(table_of(rows))
    draw(rows, options.size, options.plot)
    return rows


if __name__ == "__main__":
    main()
