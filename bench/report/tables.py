"""Tables out of records: a `Table` is built once, then written as Markdown, CSV or LaTeX.

Pure functions: the same records give the same text. AP is shown x100; failed, skipped, missing and not measured are
four different entries, and every one is explained below the table.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.report.best import Best, find_best
from bench.report.cells import (
    REPEAT_AXES,
    STATE_TEXT,
    STATES,
    Record,
    State,
    Value,
    absence_of,
    axis_value,
    bare,
    group_by,
    is_measured,
    is_score,
    metric_names,
    once,
    ordered,
    reason_of_absence,
    unit_of,
    value_of,
    varying_axes,
)
from bench.report.conditions import conditions
from bench.report.latency import quantiles_of
from bench.report.metrics import Style, axis_label, axis_text, csv_field, style_of
from bench.stats.paired import image_sets

# The columns of a long table that does not name its own; a column that no record knows is left out.
LONG_METRICS = (
    "segm/AP",
    "segm/AP50",
    "segm/AP75",
    "segm/APr",
    "segm/APc",
    "segm/APf",
    "bbox/AP",
    "latency_s/total",
    "peak_memory_bytes/cuda_allocated",
    "peak_memory_bytes/rss",
    "training_step_s/total",
    "peak_memory_bytes/training_cuda_allocated",
    "peak_memory_bytes/training_rss",
    "num_parameters",
    "flops",
)
_MARKS: dict[State, str] = {
    "failed": "✗",
    "skipped": "○",
    "missing": "?",
    "unmeasured": "n/a",
    "incomparable": "≠",
    "absent": "·",
}
_MAX_REASONS = 8
_FEW_RARE_INSTANCES = 100  # with fewer, one that is found or lost moves APr by more than a point


@dataclass(frozen=True)
class Column:
    """label and unit as people read them; csv_names: the column's names in CSV, one per number an entry holds."""

    label: str
    csv_names: tuple[str, ...]
    unit: str = ""
    align_right: bool = True


@dataclass(frozen=True)
class Entry:
    """text: as people read it. csv: one field per CSV name of its column. state: why there is no number, or 'ok'.

    without_range: `text` where there is little room; '' for the same. lost: its end, where runs have no number.
    link: what Markdown and LaTeX link the text to, relative to the written file; '' for nothing. is_best: better than
    all others of its kind beyond chance, and bold therefore.
    """

    text: str
    csv: tuple[str, ...]
    state: State = "ok"
    without_range: str = ""
    lost: str = ""
    link: str = ""
    is_best: bool = False

    @property
    def short(self) -> str:
        return self.without_range or self.text


@dataclass(frozen=True)
class Table:
    """A finished table, not yet written in any format.

    num_keys: the leading columns that say which row it is. column_axis: for a grid, the name over the value columns.
    conditions: under which the numbers were measured. notes: how to read the entries, and why some are not there.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    num_keys: int
    column_axis: str = ""
    conditions: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def grid_table(records: Sequence[Record], *, rows: str, columns: str, metric: str, title: str | None = None) -> Table:
    """One metric over two axes; other axes that vary become leading columns, and seeds become one mean.

    Args:
        records: JSON objects of RunRecord, 'missing' ones included where a plan is known.
        rows, columns: axis names, bare or dotted.
        metric: a metric name such as 'segm/AP'.
        title: by default made from the metric and the axes.
    """
    style = style_of(metric, unit_of(records, metric))
    others = [name for name in varying_axes(records) if name not in {bare(rows), bare(columns)}]
    column_values = ordered(axis_value(record, columns) for record in records)
    groups = group_by(records, [*others, rows, columns])
    keys = _row_keys(records, [*others, rows])

    full = len(keys) * len(column_values)
    values = {cell: value_of(found, metric) for cell, found in groups.items()}
    best = find_best(groups, [metric], {(metric, cell): value for cell, value in values.items()})
    spans = _Spans.of(values.values())
    absent = Value("absent")
    body = []
    for key in keys:
        entries = []
        for column in column_values:
            cell = (*key, column)
            is_best = (metric, cell) in best.cells
            entries.append(_entry(values.get(cell, absent), style, spans, quantiles=False, is_best=is_best))
        body.append((*(_key_entry(part) for part in key), *entries))
    key_columns = [_key_column(name, records) for name in [*others, rows]]
    value_columns = [
        Column(axis_text(value), spans.csv_names(f"{bare(columns)}={axis_text(value)}")) for value in column_values
    ]
    return Table(
        title=title or f"{_capital(style.heading)} by {axis_label(rows)} and {axis_label(columns)}",
        columns=(*key_columns, *value_columns),
        rows=tuple(body),
        num_keys=len(key_columns),
        column_axis=axis_label(columns),
        conditions=conditions(records, [metric]),
        notes=(
            *_notes(records, [metric], list(values.values()), best, quantiles=False),
            *(("· not in the suite.",) if len(groups) < full else ()),
        ),
    )


def long_table(records: Sequence[Record], *, metrics: Sequence[str] = (), title: str | None = None) -> Table:
    """One row per cell, one column per metric; latency with its 5th and 95th percentile.

    The median of a single run has its 95 % interval, where the record has the samples.

    Args:
        records: as for `grid_table`.
        metrics: names in column order; by default those of `LONG_METRICS` that the records know.
        title: by default 'All cells'.
    """
    known = metric_names(records)
    names = list(metrics) or _default_metrics(records, known)
    axes = varying_axes(records) or _fallback_axes(records)
    groups = group_by(records, axes)
    values = {(name, key): value_of(found, name) for name in names for key, found in groups.items()}
    best = find_best(groups, names, values)
    spans = {name: _Spans.of(values[name, key] for key in groups) for name in names}
    styles = {name: style_of(name, unit_of(records, name)) for name in names}
    with_ends = [name for name in names if styles[name].quantiles]
    within = _within_runs(groups, with_ends)
    timed = {name for name, _ in within}
    body = []
    for key in _row_keys(records, axes):
        entries = []
        for name in names:
            style, is_best = styles[name], (name, key) in best.cells
            ends = within.get((name, key), (None, None)) if name in timed else None
            entry = _entry(values[name, key], style, spans[name], quantiles=style.quantiles, ends=ends, is_best=is_best)
            entries.append(entry)
        body.append((*(_key_entry(part) for part in key), *_said_once(entries)))
    metric_columns = [_metric_column(name, styles[name], spans[name], has_ends=name in timed) for name in names]
    return Table(
        title=title or "All cells",
        columns=(*(_key_column(name, records) for name in axes), *metric_columns),
        rows=tuple(body),
        num_keys=len(axes),
        conditions=conditions(records, names),
        notes=_notes(records, names, list(values.values()), best, quantiles=True, has_ends=bool(timed)),
    )


def headings(table: Table) -> list[str]:
    """What stands over the columns, with units; the last key column also names the axis over the values."""
    texts = [f"{column.label} ({column.unit})" if column.unit else column.label for column in table.columns]
    if table.column_axis and table.num_keys:
        texts[table.num_keys - 1] += f" ↓ · {table.column_axis} →"
    return texts


def to_markdown(table: Table) -> str:
    """A GitHub table whose source is aligned too, so that it reads well as text; title, notes and conditions around."""
    header = [_markdown_escape(text) for text in headings(table)]
    body = [[_markdown_entry(entry) for entry in row] for row in table.rows]
    widths = [max(3, *(len(line[i]) for line in [header, *body])) for i in range(len(header))]

    def line(fields: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if column.align_right else text.ljust(width)
            for text, width, column in zip(fields, widths, table.columns)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width + 1) + ":" if column.align_right else "-" * (width + 2)
        for width, column in zip(widths, table.columns)
    ]
    parts = [f"### {_markdown_escape(table.title)}", ""]
    parts += [line(header), "|" + "|".join(rule) + "|", *(line(row) for row in body), ""]
    parts += [f"- {_markdown_escape(note)}" for note in table.notes]
    if table.conditions:
        parts += ["", "*" + _markdown_escape(" · ".join(table.conditions)) + "*"]
    return "\n".join(parts).rstrip() + "\n"


def to_csv(table: Table) -> str:
    """Numbers in the table's units, unrounded to six digits; an entry without a number says why in words."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([csv_field(name) for column in table.columns for name in column.csv_names])
    for row in table.rows:
        writer.writerow([csv_field(text) for entry in row for text in entry.csv])
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A `table` environment for a paper (packages booktabs and textcomp), everything escaped."""
    keys, values = table.columns[: table.num_keys], table.columns[table.num_keys :]
    spec = "".join("r" if column.align_right else "l" for column in table.columns)
    packages = "booktabs,hyperref" if any(entry.link for row in table.rows for entry in row) else "booktabs"
    lines = [f"% needs \\usepackage{{{packages}}}", "\\begin{table}[tb]", "\\centering", "\\small"]
    lines += [f"\\caption{{{_latex_caption(table)}}}", f"\\begin{{tabular}}{{@{{}}{spec}@{{}}}}", "\\toprule"]
    if table.column_axis:
        first, last = len(keys) + 1, len(table.columns)
        axis = f"\\multicolumn{{{len(values)}}}{{c}}{{{_latex_escape(table.column_axis)}}}"
        lines += [" & ".join([*[""] * len(keys), axis]).strip() + " \\\\", f"\\cmidrule(l){{{first}-{last}}}"]
    lines.append(" & ".join(_latex_heading(column) for column in table.columns) + " \\\\")
    lines.append("\\midrule")
    for row in table.rows:
        lines.append(" & ".join(_latex_entry(entry) for entry in row) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    if table.notes or table.conditions:
        small = " ".join(_latex_escape(_sentence(text)) for text in table.notes)
        where = _latex_escape(_sentence(" · ".join(table.conditions))) if table.conditions else ""
        lines.append("\\par\\smallskip\\parbox{\\linewidth}{\\footnotesize " + f"{small} {where}".strip() + "}")
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _default_metrics(records: Sequence[Record], known: Sequence[str]) -> list[str]:
    names = [name for name in LONG_METRICS if name in known]
    # What nobody asked for, or a GPU's memory on a machine without one: the column could only say so in every row.
    names = [name for name in names if is_score(name) or any(is_measured(record, name) for record in records)]
    finished = [record for record in records if record.get("status") == "ok"]
    found = {(is_measured(record, "segm/AP"), is_measured(record, "bbox/AP")) for record in finished}
    if found == {(False, True)}:
        names = [name for name in names if not name.startswith("segm/")]  # a suite of boxes only
    return names or list(known) or ["segm/AP"]


def _fallback_axes(records: Sequence[Record]) -> list[str]:
    names = [bare(name) for record in records for name in record.get("axes", {})]
    return list(dict.fromkeys(name for name in names if name not in REPEAT_AXES))


def _row_keys(records: Sequence[Record], names: Sequence[str]) -> list[tuple[Any, ...]]:
    places = [
        {value: place for place, value in enumerate(ordered(axis_value(record, name) for record in records))}
        for name in names
    ]
    present = set(group_by(records, names))
    return sorted(present, key=lambda key: tuple(place[part] for place, part in zip(places, key)))


def _key_column(name: str, records: Sequence[Record]) -> Column:
    values = [axis_value(record, name) for record in records]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return Column(axis_label(name), (bare(name),), align_right=numeric)


def _key_entry(value: Any) -> Entry:
    return Entry(axis_text(value), (axis_text(value),))


@dataclass(frozen=True)
class _Spans:
    """What the intervals of a column, or of a grid, are over; none of them where no value has an interval."""

    over: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, values: Iterable[Value]) -> _Spans:
        return cls(tuple(dict.fromkeys(value.over for value in values if value.half is not None)))

    def csv_names(self, name: str, unit: str = "") -> tuple[str, ...]:
        return (f"{name}{unit}", f"{name} ±{unit}", f"{name} ± over") if self.over else (f"{name}{unit}",)


def _within_runs(
    groups: Mapping[tuple[Any, ...], Sequence[Record]], names: Sequence[str]
) -> dict[tuple[str, tuple[Any, ...]], tuple[float, float]]:
    """(name, key) -> 95 % interval of a latency of a cell of one run, where there is one to tell."""
    single = {key: cell[0] for key, cell in groups.items() if len(cell) == 1}
    wanted = [(name, key) for name in names for key, record in single.items() if is_measured(record, name)]
    found = zip(wanted, quantiles_of([(single[key], name) for name, key in wanted]))
    return {
        place: (entry.low, entry.high)
        for place, entry in found
        if entry is not None and entry.low is not None and entry.high is not None
    }


def _metric_column(name: str, style: Style, spans: _Spans, *, has_ends: bool = False) -> Column:
    unit = f" [{style.unit}]" if style.unit else " [x100]" if style.scale == 100 else ""
    ends = (f"{name}/p5{unit}", f"{name}/p95{unit}") if style.quantiles else ()
    within = (f"{name}/low{unit}", f"{name}/high{unit}") if has_ends else ()
    return Column(style.label, (*spans.csv_names(name, unit), *ends, *within), style.unit)


def _entry(
    value: Value,
    style: Style,
    spans: _Spans,
    *,
    quantiles: bool,
    ends: tuple[float | None, float | None] | None = None,
    is_best: bool = False,
) -> Entry:
    """ends: of the interval of a median, in a column that has some."""
    if value.mean is None:
        word = STATE_TEXT[value.state]
        text = _MARKS[value.state] if value.state in {"unmeasured", "absent"} else f"{_MARKS[value.state]} {word}"
        count = (3 if spans.over else 1) + 2 * quantiles + 2 * (ends is not None)
        return Entry(text, (word,) * count, value.state)
    text = short = style.format(value.mean)
    range_ = ""
    if value.half is not None:
        text += f" ± {style.format(value.half)}"
        if len(spans.over) > 1:
            text += f" ({_and(value.over)})"
    elif value.spread is not None:
        text += f" ± {style.format(value.spread)}"
        short = text
    if ends is not None and ends[0] is not None and ends[1] is not None:
        range_ = f" [{style.format(ends[0])}–{style.format(ends[1])}]"
    if quantiles and value.low is not None and value.high is not None:
        range_ += f" ({style.format(value.low)}–{style.format(value.high)})"
    lost = f", {value.count} of {value.total} runs" if value.count < value.total else ""
    fields = [_csv_number(value.mean, style)]
    if spans.over:
        fields += [_csv_number(value.half, style), _and(value.over)]
    if quantiles:
        fields += [_csv_number(value.low, style), _csv_number(value.high, style)]
    if ends is not None:
        fields += [_csv_number(end, style) for end in ends]
    return Entry(text + range_ + lost, tuple(fields), without_range=short + lost, lost=lost, is_best=is_best)


def _csv_number(number: float | None, style: Style) -> str:
    return "" if number is None else f"{number * style.scale:.6g}"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _said_once(entries: Sequence[Entry]) -> list[Entry]:
    """A run that failed has no number in any column: the word stands in the first, its mark alone in the others.

    Likewise how many of a cell's runs a number is of.
    """
    said: set[State] = set()
    shown = []
    lost = ""
    for entry in entries:
        if entry.lost and entry.lost == lost:
            entry = replace(
                entry, text=entry.text.removesuffix(lost), without_range=entry.without_range.removesuffix(lost)
            )
        lost = entry.lost or lost
        again = entry.state in said and entry.state not in {"ok", "unmeasured"}
        shown.append(Entry(_MARKS[entry.state], entry.csv, entry.state) if again else entry)
        said.add(entry.state)
    return shown


def _notes(
    records: Sequence[Record],
    metrics: Sequence[str],
    values: Sequence[Value],
    best: Best,
    *,
    quantiles: bool,
    has_ends: bool = False,
) -> tuple[str, ...]:
    notes = []
    if any(style_of(name).scale == 100 for name in metrics):
        notes.append("AP and AR are ×100.")
    timed = [name for name in metrics if style_of(name).quantiles]
    within = " [its 95 % interval within the run]" if has_ends else ""
    ends = " (5th–95th percentile)." if quantiles else "."
    if any(name.startswith("latency_s") for name in timed):
        notes.append(f"Latency is the median per image{within}{ends}")
    if any(name.startswith("training_step_s") for name in timed):
        notes.append(f"The time of a training step is the median of its repetitions{within}{ends}")
    shown = [value for value in values if value.mean is not None]
    spans = _Spans.of(shown)
    if spans.over:
        what = f"over {_and(spans.over[0])}" if len(spans.over) == 1 else "over what stands in brackets"
        notes.append(f"± of AP and AR: half the 95 % interval, {what}.")
    repeated = [f"{count} {axis_label(name)}s" for name, count in _repeats(records).items() if count > 1]
    if repeated and (not spans.over or any(value.half is None for value in shown)):
        other = "Other values: mean" if spans.over else "Mean"
        notes.append(f"{other} ± standard deviation over {' × '.join(repeated)}.")
    if best.num_tests:
        family = f"Holm's procedure over {best.num_tests} comparison{'' if best.num_tests == 1 else 's'}"
        test = f"(95 %, paired on the same images, {family})"
        bold = f"Bold: better than the next best beyond chance {test}."
        notes.append(bold if best.cells else f"No value is better than the next best beyond chance {test}.")
    notes += _warnings(records, metrics)
    incomparable = dict.fromkeys(value.reason for value in values if value.state == "incomparable")
    marked = [f"{_MARKS['incomparable']} not comparable, and not averaged: {reason}." for reason in incomparable]
    is_whole = all(value.count == value.total for value in values)
    return (*notes, *marked, *(() if is_whole else absences(records, metrics)))


@once
def _repeats(records: Sequence[Record]) -> dict[str, int]:
    """How many values each axis has that only repeats a measurement."""
    return {name: len({axis_value(record, name) for record in records}) for name in REPEAT_AXES}


def _warnings(records: Sequence[Record], metrics: Sequence[str]) -> list[str]:
    """What a reader of AP has to know of the sets of images it was taken on."""
    scores = [name for name in metrics if is_score(name)]
    measured = [record for record in records if any(is_measured(record, name) for name in scores)]
    found = []
    counts = sorted({count for count, _ in image_sets(measured) if count is not None})
    if len(counts) > 1:
        found.append(
            f"Sets of {_and([str(count) for count in counts])} images: AP of one is not comparable to another's."
        )
    lvis = [record for record in measured if _is_lvis(record)]
    rare = [record["metrics"].get("num_instances/rare", {}).get("value") for record in lvis]
    known = [int(count) for count in rare if count is not None]
    has_rare = any(name.endswith("/APr") for name in scores)
    if lvis and (has_rare or (known and min(known) < _FEW_RARE_INSTANCES)):
        several = "" if known and min(known) == 1 else "s"
        how_many = f" on {min(known)} instance{several} of rare classes" if known else " on few instances"
        found.append(
            f"Caution, LVIS: rare classes have at most 10 training images each, and APr rests{how_many}: "
            "it moves by chance alone, and AP with it."
        )
    return found


def _is_lvis(record: Record) -> bool:
    data = record.get("config", {}).get("data", {})
    return data.get("annotation_format") == "lvis" or str(data.get("dataset", "")).startswith("lvis")


def absences(records: Sequence[Record], metrics: Sequence[str]) -> tuple[str, ...]:
    """One line per state and reason: which runs have no number for the metrics, and why."""
    axes = [*varying_axes(records), *REPEAT_AXES]
    absent: dict[tuple[State, str], dict[str, None]] = {}
    for record in records:
        for name in metrics:
            if not is_measured(record, name):
                state = absence_of(record)
                label = style_of(name).label if state == "unmeasured" else _cell_label(record, axes, records)
                absent.setdefault((state, reason_of_absence(record, name)), {})[label] = None
    found = sorted(absent.items(), key=lambda item: STATES.index(item[0][0]))
    lines = []
    for (state, reason), names in found[:_MAX_REASONS]:
        labels = list(names)
        shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
        lines.append(f"{_MARKS[state]} {STATE_TEXT[state]}: {shown}: {_short(reason)}")
    if len(found) > _MAX_REASONS:
        lines.append(f"... and {len(found) - _MAX_REASONS} more reasons; see the records.")
    return tuple(lines)


def _cell_label(record: Record, axes: Sequence[str], records: Sequence[Record]) -> str:
    varying = [name for name in axes if len({axis_value(other, name) for other in records}) > 1]
    return " ".join(f"{name}={axis_text(axis_value(record, name))}" for name in varying) or str(record.get("label", ""))


def _short(text: str) -> str:
    return textwrap.shorten(text, width=160, placeholder=" ...")


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")
_MARKDOWN = re.compile(r"([\\`*|<>\[\]~&])")
_OUTER_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # inside a word it is plain text


def _one_line(text: str) -> str:
    """Line breaks and control characters would break a table's row."""
    return text if text.isprintable() else _BREAKS.sub(" ", text)


def _markdown_escape(text: str) -> str:
    text = _MARKDOWN.sub(r"\\\1", _one_line(text))
    return _OUTER_UNDERSCORE.sub(r"\\_", text) if "_" in text else text


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\char34{}",
        "[": r"{[}",  # after \\ a bare bracket would be read as a length
        "]": r"{]}",
        "*": r"{*}",  # after \\ a bare star would be read as part of it
        "±": r"$\pm$",
        "×": r"$\times$",
        "·": r"$\cdot$",
        "–": "--",
        "✗": r"$\times$",
        "○": r"$\circ$",
        "↓": r"$\downarrow$",
        "→": r"$\rightarrow$",
        "≠": r"$\neq$",
    }
)


def _latex_escape(text: str) -> str:
    return _one_line(text).translate(_LATEX)


def _latex_heading(column: Column) -> str:
    label = re.sub(r"\b(A[PR])(\d+|[smlrcf])\b", r"\1\\textsubscript{\2}", _latex_escape(column.label))
    return f"{label} ({_latex_escape(column.unit)})" if column.unit else label


def _markdown_entry(entry: Entry) -> str:
    text = _markdown_escape(entry.text)
    if entry.is_best:
        text = f"**{text}**"
    return f"[{text}]({entry.link.replace(' ', '%20')})" if entry.link else text


def _latex_entry(entry: Entry) -> str:
    text = _latex_escape(entry.text)
    if entry.is_best:
        text = f"\\textbf{{{text}}}"
    if entry.link:
        target = re.sub(r"([%#{}])", r"\\\1", entry.link)
        text = f"\\href{{{target}}}{{{text}}}"
    return text if entry.state == "ok" else f"\\textit{{{text}}}"


def _latex_caption(table: Table) -> str:
    return _sentence(_latex_escape(table.title))
