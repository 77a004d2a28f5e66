"""Predicted peak of a training step beside the measured one, over networks and budgets; frozen BatchNorm.

Measured are the tensors that are alive at the peak, on CUDA the allocator's peak, and what the process as a whole
grew by, in which workspaces and what allocators hold back are too. Every row is a process of its own.

    python examples/benchmarks/predictions.py
"""

import argparse

from budget import budget_of_share
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.units import bytes_text
from fxstream.tools.benchmark import FXSTREAM, PLAIN, Method, Workload, compare
from fxstream.tools.model_spec import load

NETWORKS = (
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/densenet121",
    "torchvision/vgg11_bn",
    "torchvision/mobilenet_v2",
    "torchvision/inception_v3",
    "torchvision/efficientnet_b0",
    "timm/convnext_atto",
    "timm/regnetx_002",
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--networks", nargs="+", default=NETWORKS)
parser.add_argument("--size", type=int, default=1024)
parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.3], help="budgets, of plain's activations")
parser.add_argument("--device", default="cpu")
options = parser.parse_args()

table = Table("network", "way", "predicted", "measured", "predicted / measured", "process grew by")
for name in options.networks:
    model = fxstream.freeze_batch_norm(load(name)).train()
    methods = [Method(PLAIN, "plain")]
    for share in options.shares:
        memory, plain = budget_of_share(model, options.size, share, options.device)
        methods.append(Method(FXSTREAM, f"{share:.0%}", {"memory": memory}))
    shape = (1, 3, options.size, options.size)
    workload = Workload(name, ((shape, ""),), train=True, freeze_batch_norm=True, device=options.device)
    for row in compare(workload, methods, rounds=1):
        predicted = row.predicted_bytes or plain
        measured = row.failure or bytes_text(row.peak_bytes)
        ratio = f"{predicted / row.peak_bytes:.2f}" if row.peak_bytes else ""
        table.add_row(
            name, row.method.label, bytes_text(predicted), measured, ratio, bytes_text(row.resident_bytes)
        )
    table.add_section()
console = Console(width=110)
console.print(table)
