"""What the planner predicts for a GPU at 8192 x 8192, frozen BatchNorm, one training step; nothing is run.

For each network: a budget, the least that any plan needs, and the least at which tiles compute less than 1.5 times
the plain network's arithmetic. Seconds are what planning itself takes.
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.graph.autograd_saves import saves_of
from fxstream.machine.units import bytes_text, parse_bytes
from fxstream.planning.plan import make_plan
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory
from fxstream.tools.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--size", type=int, default=8192)
parser.add_argument("--overhead", type=float, default=1.5)
parser.add_argument("--device", default="cuda", help="what to plan for; it need not be there")
options = parser.parse_args()

table = Table("network", "plain", "budget", "segments", "MACs", "time", "planned in")
for name, budget in (("resnet18", "1.6GB"), ("resnet50", "5GiB"), ("densenet121", "6GiB")):
    model = fxstream.freeze_batch_norm(build(f"torchvision/{name}")).train()
    graph = fxstream.analyze(model, options.size).graph
    graph = reuse_memory(graph.with_saves(saves_of(graph)))  # once for all budgets

    def plan(memory, graph=graph):
        return make_plan(graph, Request(None, memory=memory), device=torch.device(options.device))

    try:
        plan(1)
    except fxstream.PlanError as error:
        least = error.least_bytes
    cheap = least
    while plan(cheap).overhead >= options.overhead:
        cheap = int(1.03 * cheap)
    for memory in (parse_bytes(budget), cheap, least):
        start = time.perf_counter()
        found = plan(memory)
        seconds = time.perf_counter() - start
        predicted = found.prediction
        table.add_row(
            name,
            bytes_text(predicted.plain_bytes),
            bytes_text(memory),
            str(len(found.segments)),
            f"{found.overhead:.2f}x",
            f"{predicted.time_ratio:.2f}x",
            f"{seconds:.1f} s",
        )
Console().print(table)
