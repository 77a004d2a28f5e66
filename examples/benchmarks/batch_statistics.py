"""Networks with batch statistics: passes, memory and time of a training step within several budgets.

Every budget runs in a process of its own. Memory is counted over all tensors of a step, without the image and the
parameters. Usage: python batch_statistics.py [--network NAME] [--size N] [--budgets 12GiB,8GiB,6GiB]
"""

import argparse
import json
import subprocess
import sys
import time

import torch

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.tools.model_spec import load

WIDTHS = (8, 8, 5, 6, 6, 6, 9, 9, 8)


def one(network: str, size: int, budget: str) -> None:
    torch.manual_seed(0)
    model, image = load(network, weights=True).train(), torch.randn(1, 3, size, size)
    module = fxstream.compile(model, memory=budget, verify=False)
    small = fxstream.compile(model, memory=2**40, verify=False)
    small(torch.randn(1, 3, 64, 64))  # torch's own start
    started = time.perf_counter()
    found = measure(lambda: module(image).sum().backward())
    seconds = time.perf_counter() - started
    plan = module.plan
    ran = {}
    for segment in plan.segments:
        for name in segment.segment.nodes:
            ran[name] = ran.get(name, 0) + 1
    convolutions = [count for name, count in ran.items() if name.startswith("conv")]
    print(
        json.dumps(
            {
                "segments": len(plan.segments),
                "whole": sum(not segment.axes for segment in plan.segments),
                "most": max(convolutions, default=0),
                "overhead": plan.overhead,
                "predicted_time": plan.prediction.time_ratio,
                "predicted": plan.prediction.bytes,
                "plain": plan.prediction.plain_bytes,
                "measured": found.peak_bytes,
                "seconds": seconds,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="torchvision/resnet50")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--budgets", default="12GiB,8GiB,6GiB")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(options.network, options.size, options.one)
    print(f"{options.network}, training mode, image 1x3x{options.size}x{options.size}; torch {torch.__version__}")
    columns = zip(("budget", "segments", "whole", "passes", "MACs", "time", "peak", "measured", "seconds"), WIDTHS)
    print(" ".join(f"{name:>{width}}" for name, width in columns))
    plain = ""
    for budget in options.budgets.split(","):
        command = [sys.executable, "-W", "ignore", __file__, "--network", options.network]
        command += ["--size", str(options.size), "--one", budget]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{budget:>8} {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"{budget:>8} {row['segments']:>8} {row['whole']:>5} {row['most']:>6} {row['overhead']:>5.2f}x"
            f" {row['predicted_time']:>5.2f}x {bytes_text(row['predicted']):>9} {bytes_text(row['measured']):>9}"
            f" {row['seconds']:>8.1f}",
            flush=True,
        )
        plain = bytes_text(row["plain"])
    print(f"plain, predicted: {plain or '?'}. passes: of the convolution that runs most often, in forward.")
    print("MACs: of the forwards of all passes, over one plain forward. time and peak: predicted.")
    return None


if __name__ == "__main__":
    main()
