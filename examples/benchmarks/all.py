"""Runs benchmarks and writes what they print into the pages.

    python examples/benchmarks/all.py planner scaling  # these two
    python examples/benchmarks/all.py                  # all that this machine can run: two hours on two cores
    python examples/benchmarks/all.py --quick          # all in small sizes, minutes; the pages stay as they are

A block of a page lies between `<!-- result: NAME -->` and `<!-- end -->`: a command and its output, both written
by this script, so that no figure is without its command. Blocks of commands that need a GPU or lightstream stay as
they are where there is none.
"""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md")), Path(__file__).parent / "README.md")
WIDTH = 110
"""Characters of a line of output."""
BLOCK = re.compile(r"<!-- result: (\S+) -->\n(.*?)\n<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Benchmark:
    """The command as a page shows it; what `--quick` adds to it, None where it is left out; what it needs."""

    command: str
    quick: str | None = ""
    needs: str = ""


BENCH = "fxstream bench torchvision/{} --size 2048 --memory {} --eval --rounds 2"
TOKENS = "fxstream bench {} --size 1024 --memory 25% --eval --rounds 2"
SMALL = "--size 512 --memory 80% --rounds 1"
SMALLEST = "torchvision/resnet18"
REUSED = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 "
REPORT = "fxstream report torchvision/{} --size 8192 --memory {} --freeze-batch-norm --depth 1 --device cuda"
GPU = "python examples/benchmarks/gpu.py "
BENCHMARKS = {
    "quickstart": Benchmark("python examples/quickstart.py", "--size 640 --memory 80MiB --network " + SMALLEST),
    "report": Benchmark("fxstream report torchvision/resnet50 --size 8192 --depth 1"),
    "report_resnet50": Benchmark(REPORT.format("resnet50", "5GiB")),
    "report_densenet121": Benchmark(REPORT.format("densenet121", "6GiB")),
    "bench_resnet50": Benchmark(BENCH.format("resnet50", "39%,25%,15%"), SMALL),
    "bench_densenet121": Benchmark(BENCH.format("densenet121", "43%,20%,10%"), SMALL),
    "bench_resnet50_reused": Benchmark(REUSED + BENCH.format("resnet50", "39%,25%"), SMALL),
    "bench_densenet121_reused": Benchmark(REUSED + BENCH.format("densenet121", "43%,20%"), SMALL),
    "bench_swin_t_reused": Benchmark(REUSED + TOKENS.format("torchvision/swin_t"), SMALL),
    "bench_vit_s_reused": Benchmark(
        REUSED + TOKENS.format("'timm/vit_small_patch16_224(img_size=1024)'"), "--memory 80%"
    ),
    "decoder": Benchmark(
        REUSED + "python examples/benchmarks/decoder.py",
        "--decode 64 --gradient 64 --latent-frames 2 --repeats 1 --share 0.5",
        "diffusers",
    ),
    "sizes": Benchmark("python examples/benchmarks/sizes.py", "--networks resnet50 --repeats 1"),
    "sizes_many": Benchmark(
        "python examples/benchmarks/sizes.py --many 50 --networks resnet50 densenet121 efficientnet unet convnext",
        "--networks unet --many 2",
    ),
    "sizes_peaks": Benchmark(
        "python examples/benchmarks/sizes.py --peaks 10 --networks resnet50 --shape 1 3 448 448",
        "--peaks 1 --shape 1 3 256 256 --share 0.8",
    ),
    "drawings": Benchmark("python examples/pictures/draw.py", None),
    "pareto": Benchmark("python examples/pictures/pareto.py", None),
    "plan": Benchmark(
        "fxstream plan torchvision/resnet50 --size 8192 --memory 5GiB --freeze-batch-norm --device cuda"
    ),
    "which_memory": Benchmark("python examples/benchmarks/which_memory.py", "--size 2048 --rows 4"),
    "planner": Benchmark("python examples/benchmarks/planner.py"),
    "scaling": Benchmark("python examples/benchmarks/scaling.py"),
    "memory": Benchmark("python examples/benchmarks/memory.py", "--sizes 1024"),
    "process_memory": Benchmark(
        "python examples/benchmarks/process_memory.py", "--size 512 --shares 0.6 --networks " + SMALLEST
    ),
    "growth": Benchmark("python examples/benchmarks/growth.py --repeats 2", "--sizes 1024"),
    "tiles": Benchmark('python examples/benchmarks/tiles.py --networks "Table I"', "--quick"),
    "between_tiles": Benchmark("python examples/benchmarks/between_tiles.py", "--steps 2"),
    "compiled": Benchmark("python examples/benchmarks/compiled.py", None, "torchvision"),
    "table1": Benchmark("python examples/benchmarks/table1.py"),
    "batch_statistics": Benchmark(
        "python examples/benchmarks/batch_statistics.py --budgets 12GiB,8GiB,5GiB",
        "--size 512 --budgets 300MiB,100MiB",
    ),
    "launches": Benchmark(
        "python examples/benchmarks/launches.py --planned-for cuda --channels-last",
        "--size 512 --shares 0.7 --network " + SMALLEST,
    ),
    "predictions": Benchmark("python examples/benchmarks/predictions.py", "--size 512 --networks " + SMALLEST),
    "economies": Benchmark("python examples/benchmarks/economies.py", "--size 768 --networks " + SMALLEST),
    "peers": Benchmark("python examples/benchmarks/peers.py", None, "lightstream"),
    "gpu": Benchmark(GPU + "--compiled --repeats 3", None, "cuda"),
    "reading": Benchmark(
        "python examples/benchmarks/reading.py --rounds 2 --readers 1 2", "--size 2048 --tile 512", "imagecodecs"
    ),
    "networks_table": Benchmark("python examples/benchmarks/networks_table.py"),
}


def is_there(needs: str) -> bool:
    """Whether this machine has what a benchmark needs."""
    return (
        torch.cuda.is_available() if needs == "cuda" else not needs or importlib.util.find_spec(needs) is not None
    )


def output_of(command: str) -> str:
    """What the command prints on standard output; its errors go to the terminal. Raises where it fails."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    python = [sys.executable, *(["-m", "fxstream"] if words[len(settings)] == "fxstream" else [])]
    environment = os.environ | {"COLUMNS": str(WIDTH)} | settings
    done = subprocess.run(
        [*python, *words[len(settings) + 1 :]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return "\n".join(wrapped(line.rstrip()) for line in done.stdout.strip("\n").splitlines())


def wrapped(line: str) -> str:
    """A line of prose within the width of a page; tables are within it already."""
    indent = " " * (2 + len(line) - len(line.lstrip()))
    parts = textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts) if len(line) > WIDTH else line


def block(name: str, output: str) -> str:
    """The block of a page: the command, and what it printed."""
    command = BENCHMARKS[name].command
    return f"<!-- result: {name} -->\n```sh\n{command}\n```\n```\n{output}\n```\n<!-- end -->"


def write(name: str, output: str) -> list[Path]:
    """Replaces the blocks of that name; returns the pages that have one."""
    pages = [page for page in PAGES if f"<!-- result: {name} -->" in page.read_text()]
    for page in pages:
        new = BLOCK.sub(lambda old: block(name, output) if old[1] == name else old[0], page.read_text())
        page.write_text(new)
    return pages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all without one")
    parser.add_argument("--quick", action="store_true", help="small sizes; prints and leaves the pages alone")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    failed = []
    for name in options.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        if not is_there(benchmark.needs) or (options.quick and benchmark.quick is None):
            print(f"{name}: left out", flush=True)
            continue
        command = f"{benchmark.command} {benchmark.quick}" if options.quick else benchmark.command
        print(f"$ {command}", flush=True)
        try:
            output = output_of(command)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} ended with exit code {error.returncode}")
            continue
        print(output, flush=True)
        if not options.quick:
            print(f"written into {', '.join(map(str, write(name, output)))}", flush=True)
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
