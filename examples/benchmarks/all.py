"""Every table of the README that needs no GPU, one after the other: an hour on two cores, `--quick` minutes."""

import argparse
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
quick = parser.parse_args().quick
here = Path(__file__).parent
size = "512" if quick else "2048"
bench = ["-m", "fxstream", "bench", "--freeze-batch-norm", "--train", "--size", size, "--rounds", "1"]
for command in (
    [here / "capture.py", *(["--networks", "resnet18"] if quick else [])],
    [here / "planner.py"],
    [here / "memory.py", *(["--sizes", "1024"] if quick else [])],
    [here / "growth.py", *(["--sizes", "1024"] if quick else [])],
    [here / "tiles.py", *(["--quick"] if quick else [])],
    [here / "table1.py", *([] if quick else ["--sizes", "2048"])],
    [here / "batch_statistics.py", *(["--size", "512", "--budgets", "300MiB,100MiB"] if quick else [])],
    [*bench, "torchvision/resnet50", "--memory", "40%,25%,15%"],
    [*bench, "torchvision/densenet121", "--memory", "40%,20%,10%"],
):
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)
