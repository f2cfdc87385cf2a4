"""The page of a suite: records, plan and store in, one HTML text out; the same input gives the same text.

Nothing is fetched and nothing is run: the page holds its styles and pictures, has no script, and a policy that forbids
both. All that comes from data is escaped by the template engine or by `charts`; links are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.outlook import PlanLine
from bench.report.build import build_tables
from bench.report.cells import Record, metric_names
from bench.report.conditions import conditions
from bench.report.evidence import EvidenceReader
from bench.report.html import views
from bench.report.html.chart_views import ChartView, chart_view, missing_plots, plot_specs
from bench.report.html.evidence_views import view_evidence
from bench.report.metrics import style_of
from bench.report.state import CELL_STATES, STATE_MARK, CellState
from bench.report.tables import Table

PICTURES = 4  # of each kind in the gallery
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_WEB = re.compile(r"https?://[^\s\"'<>\\]+", re.IGNORECASE)
_RELATIVE = re.compile(r"(?:\.\./)*[\w.-]+(?:/[\w.-]+)*", re.ASCII)
# Control characters that HTML forbids, halves of surrogate pairs, and what turns the direction of text around.
_FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


@dataclass(frozen=True)
class ReportInput:
    """What a page is made of.

    states: of the cells in the order of the table. tables, plots: entries of the suite, as mappings. notes: of the
    selection. plan: None where no plan is known. claims: published numbers beside ours; None for none, and then
    `claims_note` says why. reader: None for records alone. pictures: of each kind in the gallery, 0 for none.
    """

    suite: str
    machine: str
    states: Sequence[CellState]
    description: str = ""
    notes: Sequence[str] = ()
    tables: Sequence[Any] = ()
    plots: Sequence[Mapping[str, Any]] = ()
    plan: Sequence[PlanLine] | None = None
    claims: Sequence[Table] | None = None
    claims_note: str = "No published numbers were asked for."
    reader: EvidenceReader | None = None
    pictures: int = PICTURES


@dataclass(frozen=True)
class Page:
    """text: the whole file. num_pictures: pictures of the data set in it; is_generated: they are no photographs."""

    text: str
    num_pictures: int
    is_generated: bool


def build_page(content: ReportInput) -> Page:
    """Make the page of a suite on one machine."""
    records = [state.record for state in content.states]
    # Where nothing is measured any more, the older records say what there was.
    metric = views.main_metric([*records, *(state.older for state in content.states if state.older is not None)])
    charts, chart_notes = _charts(records, content.plots)
    evidence = view_evidence(records, content.reader, metric, pictures=content.pictures)
    latencies, latency_notes = views.latency_rows(records)
    environments, environment_notes = views.environments(records)
    text = _template().render(
        policy=POLICY,
        suite=content.suite,
        description=content.description,
        machine=content.machine,
        conditions=conditions(records, metric_names(records)),
        notes=content.notes,
        counts=[(name, STATE_MARK[name], sum(state.state == name for state in content.states)) for name in CELL_STATES],
        rows=views.state_rows(content.states, metric),
        metric_label=style_of(metric).label if metric else "",
        intervals=_intervals(records, metric),
        plan=content.plan,
        tables=list(build_tables(records, content.tables).values()),
        charts=charts,
        chart_notes=chart_notes,
        bars=_bars(records, metric),
        latencies=latencies,
        latency_notes=latency_notes,
        evidence=evidence,
        environments=environments,
        environment_notes=environment_notes,
        commands=views.commands(records),
        claims=content.claims,
        claims_note=content.claims_note,
        last=max((str(record.get("finished_at") or "") for record in records), default=""),
        many=views.MANY,
    )
    return Page(clean(text), evidence.num_pictures, evidence.is_generated)


def clean(text: str) -> str:
    """Without characters that no page may hold, or that make it read as something else."""
    return _FORBIDDEN.sub("\ufffd", text)


def safe_link(target: str) -> str:
    """The target if it is a web page or a file beside this one; '' for anything else, such as 'javascript:'."""
    return target if _WEB.fullmatch(target) or _RELATIVE.fullmatch(target) else ""


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("bench.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["safe_link"] = safe_link
    environment.filters["headings"] = _headings
    return environment.get_template("page.html.j2")


def _headings(table: Table) -> list[str]:
    return [f"{column.label} ({column.unit})" if column.unit else column.label for column in table.columns]


def _charts(records: Sequence[Record], asked: Sequence[Mapping[str, Any]]) -> tuple[list[ChartView], list[str]]:
    charts, notes = [], []
    for spec in plot_specs(records, asked):
        try:
            charts.append(chart_view(records, spec))
        except ValueError as error:
            notes.append(f"Not drawn: {error}.")
    return charts, [*notes, *missing_plots(records)]


def _bars(records: Sequence[Record], metric: str | None) -> views.BarsView | None:
    if metric is None:
        return None
    with_classes = [record for record in records if record.get("per_class", {}).get(metric)]
    ranked = [record for record in with_classes if record.get("metrics", {}).get(metric, {}).get("value") is not None]
    if not ranked:
        return None
    best = max(ranked, key=lambda record: record["metrics"][metric]["value"])
    return views.class_bars(best, views.cell_names(records)(best), metric)


def _intervals(records: Sequence[Record], metric: str | None) -> str:
    if metric is None:
        return ""
    errors = [record.get("metrics", {}).get(metric, {}).get("standard_error") for record in records]
    label = style_of(metric).label
    if any(error is not None for error in errors):
        return f"{label[:1].upper()}{label[1:]} ± 1.96 standard errors: a 95 % interval, over images."
    return f"The records hold no standard error of {label}."
