"""A summary as plain data for other programs.

`SCHEMA` numbers the form: keys are added under the same number, and removed or renamed only under a new one. Sizes
are in pixels of the image, bytes in bytes, MACs of one forward pass; closed forms are text in the symbols of
`closed_form`; a key that does not apply is null.

`FORMS` is the whole form: per class its keys in their order, and what each holds.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxstream.geometry.receptive_field import ReceptiveField
from fxstream.planning.estimate import Prediction
from fxstream.planning.plan import Plan
from fxstream.probe.probe import ProbeReport
from fxstream.report.closed_form import FieldForm, TileForms
from fxstream.report.summary import Cut, Layer, RegionSummary, Summary
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tools.benchmark import Row, Workload
from fxstream.tools.check import CheckReport, Difference

__all__ = ["SCHEMA", "as_json", "bench_json", "plan_json"]

SCHEMA = 3

Form = dict[str, Callable[[Any], Any]]
"""The keys of a class, and how the value of each is read from an object."""


def _form(*keys: str | Mapping[str, Callable[[Any], Any]]) -> Form:
    """Keys in their order: as text, ``key`` or ``key=attribute.attribute.index``, or with a function."""
    form: Form = {}
    for some in keys:
        if isinstance(some, str):
            pairs = (key.partition("=") for key in some.split())
            form |= {key: _reader(path or key) for key, _, path in pairs}
        else:
            form |= some
    return form


def _reader(path: str) -> Callable[[Any], Any]:
    """What a path of attributes and indices leads to; None as soon as one of them is."""

    def read(value: Any) -> Any:
        for step in path.split("."):
            if value is not None:
                value = value[int(step)] if step.lstrip("-").isdigit() else getattr(value, step)
        return value

    return read


def _rounded(path: str) -> Callable[[Any], int]:
    """The number that a path leads to, as a whole one."""
    read = _reader(path)
    return lambda value: round(read(value))


FORMS: dict[type, Form] = {
    Summary: _form(
        "network=name image training bound_to_size=bound",
        {"operators": lambda summary: len(summary.layers)},
        "macs activation_bytes=bytes streamed_share reductions layers regions cuts plan probe",
    ),
    Layer: _form(
        "node module operator kernel=window.0 stride=window.1 dilation=window.2",
        "field shape bytes macs verdict=kind reason source",
    ),
    RegionSummary: _form(
        "first last operators=nodes share macs worthwhile",
        {"input": lambda region: "image" if region.is_image else region.source},
        "field output_extent=extent forms",
    ),
    ReceptiveField: _form(
        "size stride halo padding offset period",
        {"low": lambda field: FieldForm.of(field).low, "high": lambda field: FieldForm.of(field).high},
    ),
    TileForms: _form(
        "owned overlap",
        {"box": lambda forms: next(iter(forms.box.values()))},
        "macs activation_bytes overhead",
    ),
    Cut: _form(
        "module=verdict.module operator=verdict.operator count",
        "kind=verdict.kind reason=verdict.reason source=verdict.source advice",
    ),
    Plan: _form("streamed_share reductions_overhead overhead predicted=prediction segments"),
    Prediction: _form(
        "training time_ratio plain_bytes bytes",
        {"at": lambda prediction: prediction.binding or None},
        {name: _rounded(f"peak.{name}") for name in ("boundaries", "gradients", "kept", "unit", "weights")},
        "offloaded",
    ),
    SegmentPlan: _form(
        "name=segment.name first=segment.covers.0 last=segment.covers.-1",
        "first_module=segment.ends.0 last_module=segment.ends.1",
        {
            "operators": lambda plan: len(plan.segment.covers),
            "grid": lambda plan: [len(tiles) for tiles in plan.axes],
        },
        "tiles=tile_count",
        {"largest_read": lambda plan: plan.largest(plan.segment.spatial[0][0]) if plan.axes else []},
        "kept overlap overhead parts",
    ),
    ProbeReport: _form("part agrees nodes measured one_sidedly=blurred mismatches unprobed seconds"),
    CheckReport: _form("ok dtype differences plan"),
    Difference: _form("name error allowed ok"),
    Row: _form(
        "way=method.label seconds peak_bytes resident_bytes predicted_bytes predicted_time overhead",
        {"failure": lambda row: row.failure or None},
    ),
}


def _plain(value: Any) -> Any:
    """A value as JSON has it; numbers that are not floats, closed forms and mismatches are text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if type(value) in FORMS:
        return {key: _plain(read(value)) for key, read in FORMS[type(value)].items()}
    return value.value if isinstance(value, enum.Enum) else str(value).removeprefix("torch.")


def as_json(report: Summary | CheckReport) -> dict[str, Any]:
    """A report as plain data; `schema` is the number of its form."""
    return {"schema": SCHEMA, **_plain(report)}


def plan_json(plan: Plan, network: str, training: bool) -> dict[str, Any]:
    """The plan of a network as plain data; `training` is the network's mode."""
    return {"schema": SCHEMA, "network": network, "training": training, **_plain(plan)}


def bench_json(workload: Workload, rows: Sequence[Row], roofline: float | None = None) -> dict[str, Any]:
    """The rows of a benchmark as plain data; `roofline` are the least seconds that the device could take."""
    settings = dataclasses.asdict(workload)
    options = settings.pop("options")
    return {
        "schema": SCHEMA,
        **settings,
        **options,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "roofline_seconds": roofline,
        "rows": _plain(rows),
    }
