"""A summary as one self-contained HTML page: no scripts, no other files, layers folded by module."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fxstream.machine.units import bytes_text, macs_text
from fxstream.report.summary import Layer, Summary
from fxstream.report.terminal import (
    cut_lines,
    field_text,
    grouped,
    probe_lines,
    region_lines,
    tile_lines,
    window_text,
)
from fxstream.rules import Tileability

__all__ = ["html_page"]

COLUMNS = ("module", "operator", "field", "stride", "halo", "output", "memory", "MACs", "verdict")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c2430;
  background: #fff }
h1 { font-size: 1.4rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px }
th { text-align: right; font-weight: 600; border-bottom: 1px solid #9aa5b5; padding: .2rem .5rem }
td { text-align: right; padding: .15rem .5rem; border-bottom: 1px solid #e6eaf0 }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2), th:last-child, td:last-child { text-align: left }
details { border-top: 1px solid #d5dbe4; padding: .3rem 0 } summary { cursor: pointer }
summary span { color: #5b6777; font-size: 13px; margin-left: .8rem }
pre { white-space: pre-wrap; background: #f5f7fa; padding: .7rem .9rem; font-size: 13px; margin: .3rem 0 }
.barrier { color: #b04a12 }
"""


def html_page(summary: Summary, depth: int = 1) -> str:
    """The page as text; groups of layers by the first `depth` parts of their module path can be opened."""
    image = " x ".join(map(str, summary.image))
    mode = "train" if summary.training else "eval"
    groups = "\n".join(_group(name, run) for name, run in grouped(summary.layers, depth))
    sections = "\n".join(
        f"<h2>{title}</h2>\n<pre>{escape(chr(10).join(lines))}</pre>"
        for title, lines in (
            ("Regions", region_lines(summary)),
            ("Cuts", cut_lines(summary)),
            ("Tiles and memory", tile_lines(summary)),
            ("Probe", probe_lines(summary)),
        )
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(summary.name)}: receptive fields and streaming</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{escape(summary.name)}</h1>
<p>image {image}, {mode} mode; {len(summary.layers)} operators, {macs_text(summary.macs)}MACs, activations
{bytes_text(summary.bytes)}, {summary.streamed_share:.1%} of them can be streamed</p>
{sections}
<h2>Layers</h2>
{groups}
</body></html>
"""


def _group(name: str, layers: Sequence[Layer]) -> str:
    size, stride, _ = field_text(layers[-1].field)
    is_local = all(layer.kind is Tileability.LOCAL for layer in layers)
    what = f"{len(layers)} operators, field {size}" + (f" at stride {stride}" if stride else "")
    costs = f"{bytes_text(sum(x.bytes for x in layers))}, {macs_text(sum(x.macs for x in layers))}MACs"
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = "\n".join(map(_row, layers))
    style = "" if is_local else ' class="barrier"'
    return (
        f"<details><summary{style}><b>{escape(name)}</b><span>{what}; {costs}</span></summary>"
        f"<table><tr>{head}</tr>\n{rows}</table></details>"
    )


def _row(layer: Layer) -> str:
    cells = (
        layer.module or layer.node,
        f"{layer.operator} {window_text(layer)}",
        *field_text(layer.field),
        "x".join(map(str, layer.shape)),
        bytes_text(layer.bytes),
        macs_text(layer.macs),
        layer.kind.value if layer.kind is Tileability.LOCAL else f"{layer.kind.value}: {layer.reason}",
    )
    style = "" if layer.kind is Tileability.LOCAL else ' class="barrier"'
    title = f' title="{escape(layer.source)}"' if layer.source else ""
    return f"<tr{style}{title}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
