"""Predicted: what a tile, a memory, larger images, batches and a call without gradients cost a ResNet-50.

    python examples/benchmarks/which_memory.py

Every row is `fxstream.plan` of a network with frozen BatchNorm in float32, for a GPU; nothing runs. `time` is over
that of the plain network on a GPU that could hold it.
"""

import argparse

from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.units import bytes_text
from fxstream.tools.zoo import build

ROWS = (
    *((f"tile={tile}", {"tile": tile}) for tile in (2048, 1024, 512, 300)),
    ("tile=2048, segments=1", {"tile": 2048, "segments": 1}),
    ("memory=5GiB", {"memory": "5GiB"}),
    *((f"memory=5GiB, {size} pixels", {"memory": "5GiB", "size": size}) for size in (4096, 16384, 32768)),
    ("memory=5GiB, 16384, offload", {"memory": "5GiB", "size": 16384, "offload": True}),
    ("memory=3GiB, 16384", {"memory": "3GiB", "size": 16384}),
    ("memory=3GiB, 16384, offload", {"memory": "3GiB", "size": 16384, "offload": True}),
    ("memory=5GiB, batch of 4", {"memory": "5GiB", "batch": 4}),
    ("memory=1GiB, no gradients", {"memory": "1GiB", "training": False}),
    ("memory=3GiB, no gradients", {"memory": "3GiB", "training": False}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192, help="pixels where a row does not say more")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only the first so many")
    given = parser.parse_args()
    network = fxstream.freeze_batch_norm(build("torchvision/resnet50")).train()
    table = Table("asked for", "segments", "MACs", "time", "memory", "plain")
    for text, options in ROWS[: given.rows]:
        plan = fxstream.plan(network, **{"size": given.size, "device": "cuda"} | options)
        predicted = plan.prediction
        table.add_row(
            text,
            str(len(plan.segments)),
            f"{plan.overhead:.2f}x",
            f"{predicted.time_ratio:.2f}x",
            bytes_text(predicted.bytes),
            bytes_text(predicted.plain_bytes),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
