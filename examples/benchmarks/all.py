"""Every table of the README that needs no GPU, one after the other: two hours on two cores, `--quick` minutes.

The table of `peers.py` too, where lightstream is installed.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
quick = parser.parse_args().quick
here = Path(__file__).parent
size = "512" if quick else "2048"
peers = [[here / "peers.py"]] if importlib.util.find_spec("lightstream") and not quick else []
bench = ["-m", "fxstream", "bench", "--size", size, "--rounds", "1" if quick else "2"]
for command in (
    [here / "capture.py", *(["--networks", "resnet18"] if quick else [])],
    [here / "planner.py"],
    [here / "memory.py", *(["--sizes", "1024"] if quick else [])],
    [here / "growth.py", *(["--sizes", "1024"] if quick else [])],
    [here / "tiles.py", *(["--quick"] if quick else [])],
    [here / "table1.py"],
    [here / "batch_statistics.py", *(["--size", "512", "--budgets", "300MiB,100MiB"] if quick else [])],
    [here / "predictions.py", *(["--size", "512", "--networks", "torchvision/resnet18"] if quick else [])],
    [here / "economies.py", *(["--size", "768", "--networks", "torchvision/resnet18"] if quick else [])],
    *peers,
    [*bench, "torchvision/resnet50", "--memory", "39%,25%,15%"],
    [*bench, "torchvision/densenet121", "--memory", "43%,20%,10%"],
):
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)
