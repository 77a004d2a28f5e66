"""What `examples/networks.csv` says of torchvision and timm networks: how much of each streams, and the probe.

    python examples/benchmarks/networks_table.py

The rows are made by `python examples/networks.py --global-ops cut --csv examples/networks.csv`, in an hour: frozen
BatchNorm, an image of 512 pixels or the network's own size, and streams that end at reductions over space.
"""

import csv
from collections import Counter
from pathlib import Path

SHARES = (0.9, 0.5, 0.1)


def main() -> None:
    with (Path(__file__).parent.parent / "networks.csv").open() as file:
        rows = list(csv.DictReader(file))
    captured = [row for row in rows if not row["failure"]]
    streamed = [row for row in captured if int(row["parts"])]
    agree = [row for row in streamed if not row["not_probed"] and not int(row["mismatches"])]
    counts = {"networks": len(rows), "captured": len(captured)}
    for share in SHARES:
        reached = [row for row in captured if float(row["streamed_share"]) >= share]
        counts[f"at least {share:.0%} of the activations stream"] = len(reached)
    counts["nothing streams"] = len(captured) - len(streamed)
    counts["probe agrees in every streamed part"] = len(agree)
    counts["probe disagrees"] = sum(int(row["mismatches"]) > 0 for row in streamed)
    counts["some part accepts only the network's own size, and is not probed"] = len(streamed) - len(agree)
    counts["operators in streamed parts"] = sum(int(row["nodes"]) for row in streamed)
    counts["of these measured"] = sum(int(row["measured"]) for row in streamed)
    for name, count in counts.items():
        print(f"{count:6}  {name}")
    print("\nthe first operator that ends the stream, and in how many networks:")
    cuts = Counter(row["first_cut"] or "nothing" for row in captured)
    for cut, count in cuts.most_common(2):
        print(f"{count:6}  {cut}")
    print(f"{len(captured) - sum(count for _, count in cuts.most_common(2)):6}  others")


if __name__ == "__main__":
    main()
