"""What the process of a training step grows by beside its budget, over nine networks; frozen BatchNorm.

The budget counts tensors. With `return_freed` it holds for the process, in which workspaces, what the allocator
keeps, and what the first call loads are too. Each figure is of a process of its own: the largest resident memory
of three steps, above what the process had with the model and the image.

    python examples/benchmarks/process_memory.py
"""

import argparse

from budget import budget_of_share
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.units import bytes_text
from fxstream.tools.benchmark import FXSTREAM, PLAIN, Method, Workload, compare
from fxstream.tools.model_spec import load

SIZES = {
    "torchvision/resnet18": 1536,
    "torchvision/resnet50": 1024,
    "torchvision/densenet121": 1024,
    "torchvision/efficientnet_b0": 1024,
    "torchvision/vgg11": 768,
    "torchvision/mobilenet_v3_small": 1536,
    "torchvision/fcn_resnet50": 768,
    "torchvision/convnext_tiny": 768,
    "examples/segmentation.py:UNet(width=32)": 1024,
}
"""Pixels at which a share of 40% of the activations is some hundred MiB and more."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--networks", nargs="+", default=list(SIZES))
parser.add_argument("--size", type=int, help="pixels, the same for all networks")
parser.add_argument("--shares", type=float, nargs="+", default=[0.4], help="budgets, of plain's activations")
options = parser.parse_args()

table = Table("network", "size", "plain", "budget", "process", "of it", "returned", "of it", "time")
for name in options.networks:
    size = options.size or SIZES.get(name, 1024)
    model = fxstream.freeze_batch_norm(load(name)).train()
    methods = [Method(PLAIN, "plain")]
    budgets = [budget_of_share(model, size, share)[0] for share in options.shares]
    for memory in budgets:
        methods.append(Method(FXSTREAM, "kept", {"memory": memory}))
        methods.append(Method(FXSTREAM, "returned", {"memory": memory, "return_freed": True}))
    workload = Workload(name, (((1, 3, size, size), ""),), train=True, freeze_batch_norm=True)
    plain, *rows = compare(workload, methods, rounds=1)
    for memory, kept, returned in zip(budgets, rows[::2], rows[1::2], strict=True):
        table.add_row(
            name.rpartition("/")[2].rpartition(":")[2].partition("(")[0],
            str(size),
            plain.failure or bytes_text(plain.resident_bytes),
            bytes_text(memory),
            kept.failure or bytes_text(kept.resident_bytes),
            f"{kept.resident_bytes / memory:.2f}",
            returned.failure or bytes_text(returned.resident_bytes),
            f"{returned.resident_bytes / memory:.2f}",
            f"{returned.seconds / kept.seconds:.2f}x" if kept.seconds else "",
        )
console = Console(width=110)
console.print(table)
