"""The tables and plots that a suite asks for, checked against its axes and measurements. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from bench.fields import check_mapping, did_you_mean, show
from bench.metric_names import COCO_AP_NAMES, METRICS, metrics_of
from bench.suite_axes import FIELD_NAMES, Axes, Notes
from bench.suite_types import Measure, PlotSpec, TableSpec
from bench.yaml_source import Item
from diffinst.config import section_of


class ReportReader:
    """Reads `tables` and `plots`; what is wrong with them goes to `notes`.

    Args:
        sections: the fields that the suite sets, by section.
    """

    def __init__(self, notes: Notes, axes: Axes, sections: Mapping[str, Mapping[str, Any]]) -> None:
        self.notes, self.axes, self.sections = notes, axes, sections

    def read(self, measure: Measure) -> tuple[tuple[TableSpec, ...], tuple[PlotSpec, ...]]:
        """The valid tables and plots. measure: what the suite measures."""
        axes = list(dict.fromkeys([*(choice.axis for choice in self.axes.choices()), "seed"]))
        tables = []
        for i, item in enumerate(self.notes.items(self.notes.root.value.get("tables"), "tables", "tables")):
            key = f"tables[{i}]"
            found = self._complete(TableSpec, item, key, _required_of_table(item))
            if found is None:
                continue
            table = TableSpec(**found)
            unused = ["rows", "columns", "metric"] if table.kind == "long" else ["metrics"]
            for name in unused:
                if name in found:
                    self.notes.note(
                        item.key_places[name], f"{key}.{name}", f"unused in a table of kind {table.kind}. Remove it"
                    )
            self._check_names(item, key, {"rows": axes, "columns": axes}, measure)
            if table.kind == "grid" and table.rows == table.columns:
                self.notes.note(
                    item.value["columns"].place, f"{key}.columns", "the same axis as rows. Choose another one"
                )
            tables.append(table)
        plots = []
        for i, item in enumerate(self.notes.items(self.notes.root.value.get("plots"), "plots", "plots")):
            key = f"plots[{i}]"
            found = self._complete(PlotSpec, item, key, ("x", "y"))
            if found is None:
                continue
            self._check_names(item, key, {"x": [*axes, *METRICS], "lines": axes}, measure)
            plots.append(PlotSpec(**found))
        return tuple(tables), tuple(plots)

    def _known_metrics(self) -> set[str]:
        """What is measured on any of the suite's data sets."""
        base, choices = self.sections["data"], [choice.fields for choice in self.axes.choices()]
        datasets = {base.get("dataset", "shapes"), *(fields.get(("data", "dataset")) for fields in choices)}
        formats = {base.get("annotation_format"), *(fields.get(("data", "annotation_format")) for fields in choices)}
        return {
            name
            for dataset in datasets - {None}
            for form in formats
            for name in metrics_of({"dataset": dataset, "annotation_format": form})
        }

    def _complete(self, model: type[BaseModel], item: Item, key: str, required: Sequence[str]) -> dict[str, Any] | None:
        known = len(self.notes.problems)
        if item.value is None:
            self.notes.note(
                item.place, key, f"null is not allowed. Allowed: a mapping with {', '.join(model.model_fields)}"
            )
            return None
        found = check_mapping(model, item, key, self.notes.problems)
        if isinstance(item.value, dict):
            missing = [name for name in required if name not in item.value]
            if missing:
                self.notes.note(item.place, key, f"needs {', '.join(missing)} too")
        return found if len(self.notes.problems) == known else None

    def _check_names(self, item: Item, key: str, axes: Mapping[str, list[str]], measure: Measure) -> None:
        """Whether the names in a table or plot are axes and metrics of this suite."""
        for name, child in item.value.items():
            if name in {"kind", "title"}:
                continue
            allowed = list(axes.get(name, METRICS))
            for entry in child.value if isinstance(child.value, list) else [child]:
                value = entry.value
                bare = value.rpartition(".")[2] if value in FIELD_NAMES else value
                path = f"{key}.{name}"
                if value is None:
                    continue
                if bare not in allowed:
                    shown = [n for n in allowed if n not in METRICS] + ["a metric"] * (name == "x")
                    what = (
                        ", ".join(shown)
                        if name in axes
                        else "metrics such as segm/AP, bbox/AP50, latency_s/total, flops"
                    )
                    hint = _is_field_hint(value) or did_you_mean(value, allowed)
                    self.notes.note(entry.place, path, f"{show(value)} is not allowed. Allowed: {what}.{hint}")
                elif value in METRICS and not getattr(measure, METRICS[value]):
                    setting = METRICS[value]
                    self.notes.note(
                        entry.place, path, f"{value} is not measured. Set measure.{setting} true, or take it out"
                    )
                elif value in METRICS and value not in self._known_metrics():
                    others = "COCO" if value.rpartition("/")[2] in COCO_AP_NAMES else "LVIS"
                    self.notes.note(
                        entry.place, path, f"{value} is measured on {others} annotations only. Take it out of the suite"
                    )


def _is_field_hint(name: str) -> str:
    return " It is a field, but no axis of this suite" if section_of(name) or name in FIELD_NAMES else ""


def _required_of_table(item: Item) -> tuple[str, ...]:
    if not isinstance(item.value, dict):
        return ()
    kind = item.value.get("kind")
    return () if kind is not None and kind.value == "long" else ("rows", "columns", "metric")
