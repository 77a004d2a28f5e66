"""How much of every torchvision classifier and of one network per timm family streams, and does the probe agree?

    python examples/networks.py [NAME ...] [--packages [LIST.py]]

Networks are built on the meta device with frozen BatchNorm: no weights, no memory. Per network one row: whether it
could be captured, the share of the activations in streamable regions, what ends the first region, its receptive
field and stride, and how many nodes the probe measured. Writes the rows to a JSON file as it goes and prints a
table and a summary at the end. All networks take about an hour on two cores; name some to run only those.

With `--packages` the networks are those of `package_networks.py`, or of another file that has such a list, small
and with random weights, each in a process of its own; a row also says whether a training step within 30% of the
memory of plain, or the least that works, has its results and gradients. That takes two hours on one core.
"""

import argparse
import csv
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import package_table
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fxstream
from fxstream.graph.fields import main_image, receptive_fields
from fxstream.probe.probe import probe
from fxstream.tiling.parts import streamable_share, worthwhile
from fxstream.tools import zoo

ATTEMPTS = ((512, False), (None, False), (None, True))
"""Image size (None is the network's own), and whether with real weights, for code that looks at their values."""


def every_network() -> list[str]:
    """All torchvision classifiers, and of each timm module its smallest network."""
    zoo.define_missing_torchvision_schemas()
    import timm
    import torchvision

    classifiers = [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    families = []
    for module in timm.list_modules():
        sizes = {name: parameters(f"timm/{name}") for name in sorted(timm.list_models(module=module), key=len)[:4]}
        buildable = {name: size for name, size in sizes.items() if size is not None}
        if buildable:
            families.append(f"timm/{min(buildable, key=buildable.__getitem__)}")
    return classifiers + families


def build(target: str) -> torch.nn.Module:
    """On the meta device, or on the CPU where a constructor computes with numbers."""
    try:
        with torch.device("meta"):
            return zoo.build(target)
    except (fxstream.InputError, NotImplementedError):
        return zoo.build(target)


def parameters(target: str) -> int | None:
    try:
        return sum(p.numel() for p in build(target).parameters())
    except Exception:
        return None


def own_size(model: torch.nn.Module) -> int:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("input_size", (3, 224, 224))[-1]


def row_of(target: str, global_ops: str = "auto") -> dict[str, object]:
    """One row of the table; a failure is a row too."""
    started = time.perf_counter()
    row: dict[str, object] = {"network": target}
    try:
        model = fxstream.freeze_batch_norm(build(target).eval())
    except Exception as error:
        return row | {"failure": f"cannot be built: {error}"[:200]}
    for size, real in ATTEMPTS:
        try:
            size = size or own_size(model)
            if real:
                model = fxstream.freeze_batch_norm(zoo.build(target).eval())
            channels = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3,))[0]
            analysis = fxstream.analyze(model, size, channels=channels, global_ops=global_ops)
            break
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {error}"[:200]
    else:
        return row
    row.pop("failure", None)
    graph = analysis.graph
    parts = worthwhile(graph)
    row |= {
        "size": size,
        "bound": analysis.captured.bound,
        "streamed": streamable_share(graph),
        "parts": len(parts),
    }
    row["cut"] = f"{analysis.cut.operator}: {analysis.cut.reason}" if analysis.cut else ""
    source = main_image(graph)
    if analysis.regions and source:
        fields = receptive_fields(graph, analysis.regions[0].nodes, source)
        field = fields.get(analysis.regions[0].nodes[-1])
        row["field"] = [[f.size, str(f.stride), *f.halo] for f in field] if field else None
    row["analysis_seconds"] = round(time.perf_counter() - started, 1)
    reports = [probe(graph, part) for part in parts]
    row |= {
        "nodes": sum(r.nodes for r in reports),
        "measured": sum(r.measured for r in reports),
        "blurred": sum(r.blurred for r in reports if not r.unprobed),
        "mismatches": [str(m) for r in reports for m in r.mismatches],
        "unprobed": sorted({r.unprobed for r in reports if r.unprobed}),
        "probe_seconds": round(sum(r.seconds for r in reports), 1),
    }
    return row


def agreement(row: dict[str, object]) -> str:
    if not row.get("nodes"):
        return "nothing to probe"
    if row["mismatches"]:
        return f"{len(row['mismatches'])} MISMATCHES"
    blurred = f" + {row['blurred']} one-sidedly" if row["blurred"] else ""
    unprobed = f", {'; '.join(row['unprobed'])}" if row["unprobed"] else ""
    return f"{row['measured']} of {row['nodes']}{blurred}{unprobed}"


def show(rows: list[dict[str, object]], console: Console) -> None:
    table = Table("network", "size", "streams", "parts", "ends at", "field / stride", "nodes measured, agree")
    for row in rows:
        if "failure" in row:
            table.add_row(row["network"], "-", "-", "-", str(row["failure"]), "", "")
            continue
        field = " x ".join(dict.fromkeys(f"{f[0]}/{f[1]}" for f in row.get("field") or []))
        cells = [str(row["size"]), f"{row['streamed']:.0%}", str(row["parts"]), row["cut"], field, agreement(row)]
        table.add_row(row["network"], *cells)
    console.print(table)
    good = [row for row in rows if "failure" not in row]
    probed = [row for row in good if row["nodes"]]
    console.print(f"{len(rows)} networks, {len(good)} captured; {len(rows) - len(good)} failures")
    for least in (0.9, 0.5, 0.1):
        console.print(
            f"  at least {least:.0%} of the activations stream: {sum(r['streamed'] >= least for r in good)}"
        )
    agree = sum(not r["mismatches"] and not r["unprobed"] for r in probed)
    nodes, measured = sum(r["nodes"] for r in probed), sum(r["measured"] for r in probed)
    blurred, wrong = sum(r["blurred"] for r in probed), sum(bool(r["mismatches"]) for r in probed)
    console.print(
        f"  probe: {agree} of {len(probed)} networks with something to stream agree in every part,"
        f" {wrong} disagree; {measured} of {nodes} nodes measured, {blurred} of them one-sidedly"
    )
    ends = Counter(str(row["cut"]) for row in good)
    for reason, count in ends.most_common(8):
        console.print(f"  {count} first end at {reason or 'nothing'}")


COLUMNS = [
    "network",
    "size",
    "bound_to_size",
    "streamed_share",
    "parts",
    "receptive_field",
    "stride",
    "halo",
    "nodes",
    "measured",
    "mismatches",
    "not_probed",
    "first_cut",
    "failure",
]


def cells_of(row: dict[str, object]) -> dict[str, object]:
    """A row of the table as text; the receptive field is the one along the first axis."""
    cells = {"network": row["network"], "failure": row.get("failure", "")}
    if "failure" not in row:
        cells |= {"size": row["size"], "bound_to_size": row["bound"], "parts": row["parts"]}
        cells |= {"streamed_share": round(row["streamed"], 4), "first_cut": row["cut"]}
        cells |= {"nodes": row["nodes"], "measured": row["measured"]}
        cells |= {"mismatches": len(row["mismatches"]), "not_probed": "; ".join(row["unprobed"])}
    if row.get("field"):
        size, stride, before, after = row["field"][0]
        cells |= {"receptive_field": size, "stride": stride, "halo": f"{before}+{after}"}
    return cells


def write_csv(rows: Iterable[dict[str, object]], columns: list[str], path: Path) -> None:
    """The table as text, a line per network."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help="torchvision/NAME or timm/NAME; all if none is named")
    parser.add_argument("--json", type=Path, help="where the rows go, and are continued")
    parser.add_argument("--csv", type=Path, help="where the table goes as text")
    parser.add_argument("--global-ops", choices=("auto", "cut"), default="auto", help="as in compile")
    parser.add_argument(
        "--packages",
        nargs="?",
        type=Path,
        const=package_table.LIST,
        metavar="LIST.py",
        help="networks of packages",
    )
    parser.add_argument("--seconds", type=float, default=package_table.SECONDS, help="for each of --packages")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    warnings.simplefilter("ignore")
    console = Console()
    if options.packages:
        names = package_table.names_of(options.packages, options.networks, console)
        ask = partial(package_table.row_of, path=options.packages, seconds=options.seconds)
        show_rows, cells, columns = package_table.show, package_table.cells_of, package_table.COLUMNS
    else:
        names, ask = options.networks or every_network(), partial(row_of, global_ops=options.global_ops)
        show_rows, cells, columns = show, cells_of, COLUMNS
    target = options.json or Path("package_networks.json" if options.packages else "networks.json")
    rows = json.loads(target.read_text()) if target.exists() else []  # a run that was cut off goes on
    known = {row["network"] for row in rows}
    for name in track(names, "networks", console=Console(stderr=True)):
        if name not in known:
            rows.append(ask(name))
            target.write_text(json.dumps(rows, indent=1))
    show_rows(rows, console)
    if options.csv:
        write_csv(map(cells, rows), columns, options.csv)


if __name__ == "__main__":
    main()
