"""Predicted peak of a training step beside the measured one, over networks and budgets; frozen BatchNorm.

Measured are the tensors that are alive at the peak, on CUDA the allocator's peak, and what the process as a whole
grew by, in which workspaces and what the allocator keeps are too; with `return_freed` it keeps nothing large. Each
figure is of a process of its own.

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

table = Table("network", "within", "predicted", "tensors", "process", "returned", "of the budget", "time")
for name in options.networks:
    model = fxstream.freeze_batch_norm(load(name)).train()
    methods = [Method(PLAIN, "plain")]
    for share in options.shares:
        memory, plain = budget_of_share(model, options.size, share, options.device)
        methods.append(Method(FXSTREAM, f"{share:.0%}", {"memory": memory}))
        methods.append(Method(FXSTREAM, "returned", {"memory": memory, "return_freed": True}))
    shape = (1, 3, options.size, options.size)
    workload = Workload(name, ((shape, ""),), train=True, freeze_batch_norm=True, device=options.device)
    rows = iter(compare(workload, methods, rounds=1))
    for row in rows:
        predicted = row.predicted_bytes or plain
        returned = next(rows) if row.method.kind == FXSTREAM else None
        memory = row.method.options.get("memory", 0)
        table.add_row(
            name,
            row.method.label,
            bytes_text(predicted),
            row.failure or bytes_text(row.peak_bytes),
            bytes_text(row.resident_bytes),
            bytes_text(returned.resident_bytes) if returned else "",
            f"{returned.resident_bytes / memory:.2f}" if returned else "",
            f"{returned.seconds / row.seconds:.2f}x" if returned and row.seconds else "",
        )
    table.add_section()
console = Console(width=110)
console.print(table)
