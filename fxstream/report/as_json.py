"""A summary as plain data for other programs.

`SCHEMA` numbers the form: keys are added under the same number, and removed or renamed only under a new one. Sizes
are in pixels of the image, bytes in bytes, MACs of one forward pass; closed forms are text in the symbols of
`closed_form`; a key that does not apply is null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.planning.plan import Plan
from fxstream.probe.probe import ProbeReport
from fxstream.report.closed_form import FieldForm
from fxstream.report.summary import Layer, Summary
from fxstream.tools.benchmark import Row, Workload
from fxstream.tools.check import CheckReport

__all__ = ["SCHEMA", "as_json", "bench_json", "check_json", "plan_json", "probe_json"]

SCHEMA = 2


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain data; `schema` is the number of its form."""
    return {
        "schema": SCHEMA,
        "network": summary.name,
        "image": list(summary.image),
        "training": summary.training,
        "bound_to_size": summary.bound,
        "operators": len(summary.layers),
        "macs": summary.macs,
        "activation_bytes": summary.bytes,
        "streamed_share": summary.streamed_share,
        "reductions": summary.reductions,
        "layers": [_layer_json(layer) for layer in summary.layers],
        "regions": [
            {
                "first": region.first,
                "last": region.last,
                "operators": region.nodes,
                "share": region.share,
                "macs": region.macs,
                "worthwhile": region.worthwhile,
                "input": "image" if region.is_image else region.source,
                "field": _fields_json(region.field),
                "output_extent": list(region.extent),
                "forms": _or_none(
                    region.forms,
                    lambda forms: {
                        "owned": [str(f) for f in forms.owned],
                        "overlap": [str(f) for f in forms.overlap],
                        "box": [str(f) for f in next(iter(forms.box.values()))],
                        "macs": str(forms.macs),
                        "activation_bytes": str(forms.activation_bytes),
                        "overhead": str(forms.overhead),
                    },
                ),
            }
            for region in summary.regions
        ],
        "cuts": [
            {
                "module": cut.verdict.module,
                "operator": cut.verdict.operator,
                "count": cut.count,
                "kind": cut.verdict.kind.value,
                "reason": cut.verdict.reason,
                "source": cut.verdict.source,
                "advice": cut.advice,
            }
            for cut in summary.cuts
        ],
        "plan": _or_none(summary.plan, plan_json),
        "probe": [probe_json(report) for report in summary.probe],
    }


def _or_none(value: Any, form: Callable[[Any], Any]) -> Any:
    return None if value is None else form(value)


def _fields_json(fields: Sequence[ReceptiveField] | None) -> list[dict[str, Any]] | None:
    if fields is None:
        return None
    return [
        {
            "size": field.size,
            "stride": str(field.stride),
            "halo": list(field.halo),
            "padding": field.padding,
            "offset": str(field.offset),
            "period": field.period,
            "low": str(FieldForm.of(field).low),
            "high": str(FieldForm.of(field).high),
        }
        for field in fields
    ]


def _layer_json(layer: Layer) -> dict[str, Any]:
    return {
        "node": layer.node,
        "module": layer.module,
        "operator": layer.operator,
        "kernel": _or_none(layer.window, lambda window: list(window[0])),
        "stride": _or_none(layer.window, lambda window: list(window[1])),
        "dilation": _or_none(layer.window, lambda window: list(window[2])),
        "field": _fields_json(layer.field),
        "shape": list(layer.shape),
        "bytes": layer.bytes,
        "macs": layer.macs,
        "verdict": layer.kind.value,
        "reason": layer.reason,
        "source": layer.source,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "streamed_share": plan.streamed_share,
        "reductions_overhead": plan.reductions_overhead,
        "overhead": plan.overhead,
        "predicted": {
            "training": plan.prediction.training,
            "time_ratio": plan.prediction.time_ratio,
            "plain_bytes": plan.prediction.plain_bytes,
            "bytes": plan.prediction.bytes,
            "at": plan.prediction.binding or None,
            "boundaries": round(plan.prediction.peak.boundaries),
            "gradients": round(plan.prediction.peak.gradients),
            "kept": round(plan.prediction.peak.kept),
            "unit": round(plan.prediction.peak.unit),
            "weights": round(plan.prediction.peak.weights),
            "offloaded": plan.prediction.offloaded,
        },
        "segments": [
            {
                "name": part.segment.name,
                "first": part.segment.covers[0],
                "last": part.segment.covers[-1],
                "first_module": part.segment.ends[0],
                "last_module": part.segment.ends[1],
                "operators": len(part.segment.covers),
                "grid": [len(tiles) for tiles in part.axes],
                "tiles": math.prod(len(tiles) for tiles in part.axes),
                "largest_read": list(part.largest(part.segment.spatial[0][0])) if part.axes else [],
                "kept": part.kept,
                "overlap": part.overlap,
                "overhead": part.overhead,
            }
            for part in plan.segments
        ],
    }


def probe_json(report: ProbeReport) -> dict[str, Any]:
    """A probe's report as plain data."""
    return {
        "part": report.part,
        "agrees": report.agrees,
        "nodes": report.nodes,
        "measured": report.measured,
        "one_sidedly": report.blurred,
        "mismatches": [str(mismatch) for mismatch in report.mismatches],
        "unprobed": report.unprobed,
        "seconds": report.seconds,
    }


def bench_json(workload: Workload, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows of a benchmark as plain data."""
    return {
        "schema": SCHEMA,
        **dataclasses.asdict(workload),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [
            {
                "way": row.method.label,
                "seconds": row.seconds,
                "peak_bytes": row.peak_bytes,
                "resident_bytes": row.resident_bytes,
                "predicted_bytes": row.predicted_bytes,
                "predicted_time": row.predicted_time,
                "overhead": row.overhead,
                "failure": row.failure or None,
            }
            for row in rows
        ],
    }


def check_json(report: CheckReport) -> dict[str, Any]:
    """A comparison as plain data."""
    return {
        "schema": SCHEMA,
        "ok": report.ok,
        "dtype": str(report.dtype).removeprefix("torch."),
        "differences": [
            {"name": d.name, "error": d.error, "allowed": d.allowed, "ok": d.ok} for d in report.differences
        ],
        "plan": plan_json(report.plan),
    }
