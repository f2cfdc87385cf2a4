"""Tables of the paper with ours beside them, and the ledger of all claims.

Pure functions: the same claims, suites and records give the same text. A cell without a number says why; one with a
number links to its record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.claims import Claim
from bench.ledger import Attempt, FoundRecord, LedgerRow, attempt, judgement_of
from bench.report.cells import REPEAT_AXES, bare, ordered
from bench.report.conditions import conditions
from bench.report.metrics import axis_label, axis_text, style_of
from bench.report.tables import Column, Entry, Table, to_csv, to_latex, to_markdown
from bench.suite import Suite, SuiteCell, TableSpec
from bench.verdict import Judgement, Verdict

_DIGITS = {"AP": 1, "%": 1, "s/image": 3}
_NOTHING = "–"


@dataclass(frozen=True)
class PaperCell:
    """One place of a paper's table: the published number, if there is one in the claim files, and ours."""

    row: str
    column: str
    claim: Claim | None
    attempt: Attempt | None
    judgement: Judgement | None


@dataclass(frozen=True)
class PaperTable:
    """One metric over two axes, rows and columns in the order and words of the paper as far as claims have them."""

    title: str
    metric: str
    row_label: str
    cells: tuple[PaperCell, ...]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(cell.column for cell in self.cells))

    def at(self, row: str, column: str) -> PaperCell | None:
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


def paper_tables(suite: Suite, claims: Mapping[str, Claim], records: Sequence[FoundRecord]) -> list[PaperTable]:
    """The suite's grid tables in the paper's layout; claims that no cell measures are rows at the end of the first."""
    grids = [spec for spec in suite.tables if spec.kind == "grid"]
    tables = [_paper_table(suite, spec, claims, records) for spec in grids]
    loose = [claims[tie.claim] for tie in suite.claims or () if tie.cell is None]
    if tables and loose:
        extra = [PaperCell(one.fields.row, one.fields.column, one, None, judgement_of(one, None)) for one in loose]
        tables[0] = replace(tables[0], cells=(*tables[0].cells, *extra))
    return tables


def _paper_table(
    suite: Suite, spec: TableSpec, claims: Mapping[str, Claim], records: Sequence[FoundRecord]
) -> PaperTable:
    assert spec.rows is not None
    assert spec.columns is not None
    assert spec.metric is not None
    row_axes = [*_other_axes(suite, spec), bare(spec.rows)]
    columns = ordered(_hashable(cell.axes[bare(spec.columns)]) for cell in suite.cells)
    groups: dict[tuple[Any, ...], list[SuiteCell]] = {}
    for cell in suite.cells:
        key = (*(_hashable(cell.axes[name]) for name in row_axes), _hashable(cell.axes[bare(spec.columns)]))
        groups.setdefault(key, []).append(cell)
    keys = list(dict.fromkeys(key[:-1] for key in groups))
    found: dict[tuple[Any, ...], tuple[Claim | None, Attempt]] = {}
    for key in (*((*row, column) for row in keys for column in columns),):
        if key in groups:
            claim = _claim_of(suite, groups[key], spec.metric, claims)
            found[key] = claim, attempt(suite, groups[key], records, claim, spec.metric)
    rows = {row: [found[key][0] for key in found if key[:-1] == row] for row in keys}
    heads = {column: [found[key][0] for key in found if key[-1] == column] for column in columns}
    row_names = _names(rows, "row", lambda row: _row_words(row_axes, row), enough=2)
    column_names = _names(heads, "column", lambda column: _words(bare(spec.columns or ""), column), enough=len(heads))
    cells = []
    for key, (claim, made) in found.items():
        judgement = judgement_of(claim, made) if claim is not None else None
        cells.append(PaperCell(row_names[key[:-1]], column_names[key[-1]], claim, made, judgement))
    title = spec.title or f"{style_of(spec.metric).label} by {axis_label(spec.rows)} and {axis_label(spec.columns)}"
    return PaperTable(title[:1].upper() + title[1:], spec.metric, axis_label(spec.rows), tuple(cells))


def _claim_of(suite: Suite, cells: Sequence[SuiteCell], metric: str, claims: Mapping[str, Claim]) -> Claim | None:
    for tie in suite.claims or ():
        claim = claims[tie.claim]
        if claim.fields.metric == metric and tie.cell is not None and all(tie.fits(cell.axes) for cell in cells):
            return claim
    return None


def _other_axes(suite: Suite, spec: TableSpec) -> list[str]:
    """Axes that vary besides rows, columns and seeds, and do not follow from them as a weights file does."""
    shown = {bare(spec.rows or ""), bare(spec.columns or ""), *REPEAT_AXES}
    names = [name for name in suite.cells[0].axes if name not in shown]
    others = []
    for name in names:
        values: dict[tuple[Any, ...], set[Any]] = {}
        for cell in suite.cells:
            key = tuple(_hashable(cell.axes[axis]) for axis in (bare(spec.rows or ""), bare(spec.columns or "")))
            values.setdefault(key, set()).add(_hashable(cell.axes[name]))
        if any(len(found) > 1 for found in values.values()):
            others.append(name)
    return others


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else axis_text(value) if isinstance(value, dict) else value


def _names(
    claims: Mapping[Any, Sequence[Claim | None]], part: str, otherwise: Callable[[Any], str], *, enough: int
) -> dict[Any, str]:
    """The paper's own words for rows or columns, where the claims give different ones to `enough` of them."""
    found: dict[Any, str] = {}
    for key, group in claims.items():
        names = {getattr(claim.fields, part) for claim in group if claim is not None} - {""}
        if len(names) == 1:
            found[key] = names.pop()
    if len(set(found.values())) < len(found) or len(found) < min(enough, len(claims)):
        found = {}
    return {key: found.get(key) or otherwise(key) for key in claims}


def _row_words(names: Sequence[str], values: Sequence[Any]) -> str:
    """The value alone of the axis that heads the column; others with their name."""
    return ", ".join([*(_words(name, value) for name, value in zip(names, values[:-1])), axis_text(values[-1])])


def _words(name: str, value: Any) -> str:
    """'1 step', '300 proposals', 'resnet50', 'renewal false', 'signal scale 2'."""
    text = axis_text(value)
    if name == "sampling_steps":
        return f"{text} step" if value == 1 else f"{text} steps"
    if name == "num_proposals":
        return f"{text} proposals"
    is_name = isinstance(value, str) and name in ("backbone", "dataset", "engine")
    return text if is_name else f"{axis_label(name)} {text}"


# -- writing ----------------------------------------------------------------------------------------------------------


def write_paper(suite: Suite, tables: Sequence[PaperTable], folder: Path) -> dict[str, str]:
    """File name -> text of the suite's report, as it belongs into `folder` (links to records are relative to it)."""
    markdown, latex = [f"# {suite.name}", "", suite.description, ""], []
    markdown += ["Published numbers beside ours; AP and AR are ×100. Numbers of ours link to their records.", ""]
    for table in tables:
        markdown += [to_markdown(layout_table(table, folder)), to_markdown(_short_cells_table(table, folder))]
        latex.append(to_latex(layout_table(table, folder, explained=True)) + _latex_origins(table, folder))
    return {
        f"{suite.name}.md": "\n".join(markdown).rstrip() + "\n",
        f"{suite.name}.tex": "\n".join(latex),
        f"{suite.name}.csv": to_csv(cells_table(tables, folder)),
    }


def layout_table(table: PaperTable, folder: Path, *, explained: bool = False) -> Table:
    """The table as the paper has it, each column twice: published, and ours; explained: with a note for each place."""
    columns = [Column(table.row_label, ("row",), align_right=False)]
    for name in table.columns:
        columns += [Column(f"{name}, published", (f"{name} published",)), Column(f"{name}, ours", (f"{name} ours",))]
    body = []
    for row in table.rows:
        entries = [Entry(row, (row,))]
        for name in table.columns:
            entries += _pair(table.at(row, name), table.metric, folder)
        body.append(tuple(entries))
    records = [found.record for cell in table.cells if cell.attempt for found in cell.attempt.records]
    notes = ["AP and AR are ×100."] if style_of(table.metric).scale == 100 else []
    if explained:
        notes += [line for cell in table.cells if (line := _explained(cell))]
    if any(cell.claim is None for cell in table.cells):
        notes.append(f"{_NOTHING} no published number in the claim files.")
    return Table(
        table.title,
        tuple(columns),
        tuple(body),
        1,
        conditions=conditions(records, [table.metric]) if records else (),
        notes=tuple(notes),
    )


def cells_table(tables: Sequence[PaperTable], folder: Path) -> Table:
    """A row for each place of the tables: claim, numbers, verdict and why, record and command."""
    heads = ("table", "row", "column", "claim", "published", "ours", "low", "high", "runs")
    columns = [Column(head, (head,), align_right=head in heads[4:]) for head in heads]
    columns += [Column(head, (head,), align_right=False) for head in ("verdict", "why", "record", "command")]
    body = []
    for table in tables:
        for cell in table.cells:
            body.append(tuple(_cell_entries(table, cell, folder)))
    return Table("Every cell", tuple(columns), tuple(body), 4)


def _short_cells_table(table: PaperTable, folder: Path) -> Table:
    """`cells_table` of one table for reading: the interval in one column, without what the reader sees anyway."""
    heads = ("cell", "claim", "published", "ours", "95 % interval", "verdict", "why", "record", "command")
    columns = tuple(Column(head, (head,), align_right=head in heads[2:5]) for head in heads)
    body = []
    for cell in table.cells:
        _, row, column, claim, published, ours, low, high, _, *rest = _cell_entries(table, cell, folder)
        interval = f"{low.text} to {high.text}" if low.text else ""
        body.append((_text(f"{row.text}, {column.text}"), claim, published, ours, _text(interval), *rest))
    return Table("Every cell", columns, tuple(body), 2)


def _cell_entries(table: PaperTable, cell: PaperCell, folder: Path) -> Iterable[Entry]:
    claim, made = cell.claim, cell.attempt
    measured = made.measured if made else None
    number = _writer(claim, table.metric)
    interval = measured.interval if measured else None
    yield from (_text(text) for text in (table.title, cell.row, cell.column, claim.id if claim else ""))
    yield _text(claim.value_text if claim else "")
    yield _text(number(measured.value) if measured else "")
    yield from (_text(number(end)) for end in interval) if interval else (_text(""), _text(""))
    yield _text(str(measured.runs) if measured else "")
    yield _text(_verdict_of(cell))
    yield _text(_why(cell))
    first = made.records[0] if made and made.records else None
    more = f" and {len(made.records) - 1} more" if made and len(made.records) > 1 else ""
    shown = f"{first.record['run_id']}{more}" if first else ""
    paths = " ".join(_link(found, folder) for found in made.records) if made else ""
    yield Entry(shown, (paths,), link=_link(first, folder) if first else "")
    yield _text(made.command if made else "")


def _pair(cell: PaperCell | None, metric: str, folder: Path) -> list[Entry]:
    if cell is None:
        return [_text(""), _text("")]
    published = _text(cell.claim.value_text if cell.claim else _NOTHING)
    made = cell.attempt
    if made is None or made.measured is None:
        return [published, Entry(_verdict_of(cell), (_verdict_of(cell),), "missing")]
    number = _writer(cell.claim, metric)
    text = number(made.measured.value)
    if made.measured.interval is not None:
        low, high = made.measured.interval
        text += f" ± {number((high - low) / 2)}"
    if cell.judgement is not None:
        text += f" ({cell.judgement.verdict})"
    return [published, Entry(text, (text,), link=_link(made.records[0], folder))]


def _verdict_of(cell: PaperCell) -> str:
    if cell.judgement is not None:
        return str(cell.judgement.verdict)
    return "measured" if cell.attempt is not None and cell.attempt.measured is not None else str(Verdict.NOT_ATTEMPTED)


def _why(cell: PaperCell) -> str:
    """The reason of the verdict; where there is none, why there is no number, or what speaks against it."""
    made = cell.attempt
    if cell.judgement is not None:
        text = cell.judgement.reason
    elif made is not None and made.measured is None:
        text = made.reason
    else:
        text = "; ".join(made.measured.objections) if made is not None and made.measured is not None else ""
    if made is not None and made.others:
        text += f". Also measured on {', '.join(made.others)}"
    return text


def _explained(cell: PaperCell) -> str:
    why = _why(cell)
    if not why:
        return ""
    record = f" Record {cell.attempt.records[0].record['run_id']}." if cell.attempt and cell.attempt.records else ""
    return f"{cell.row}, {cell.column}: {_verdict_of(cell)}: {why}.{record}"


def _latex_origins(table: PaperTable, folder: Path) -> str:
    """Comment lines with each cell's records and its command, to be copied: typeset, dashes and quotes would change."""
    lines = []
    for cell in table.cells:
        if made := cell.attempt:
            records = ", ".join(_link(found, folder) for found in made.records) or "no record"
            lines.append(f"{cell.row}, {cell.column}: {records}: {made.command or 'no command'}")
    return "".join(f"% {' '.join(line.split())}\n" for line in lines)


def _writer(claim: Claim | None, metric: str) -> Callable[[float], str]:
    """How a measured number is written: one digit more than published would feign precision, so as many."""
    style = style_of(metric)
    digits = _DIGITS.get(claim.fields.unit, style.digits) if claim is not None else style.digits
    return lambda value: f"{value:.{digits}f}"


def _link(found: FoundRecord, folder: Path) -> str:
    return Path(os.path.relpath(found.path, folder)).as_posix()


def _text(text: str) -> Entry:
    return Entry(text, (text,))


# -- the ledger -------------------------------------------------------------------------------------------------------


def ledger_table(rows: Sequence[LedgerRow], folder: Path) -> Table:
    """Every claim with its source, what was measured and the verdict."""
    heads = ("claim", "what", "published", "ours", "verdict", "why", "record", "command")
    sources = ("source", "place", "row", "column", "revision", "date", "url")
    columns = tuple(Column(head, (head,), align_right=head in heads[2:4]) for head in (*heads, *sources))
    body = tuple((*_ledger_entries(row, folder), *map(_text, _source_of(row.claim))) for row in rows)
    return Table("Published numbers and what became of them", columns, body, 1, notes=_counts(rows))


def write_ledger(rows: Sequence[LedgerRow], folder: Path) -> dict[str, str]:
    """File name -> text of the ledger, as it belongs into `folder`: Markdown by source, CSV with all in a row."""
    parts = ["# Published numbers and what became of them", "", *(f"- {note}" for note in _counts(rows)), ""]
    sources: dict[str, list[LedgerRow]] = {}
    for row in rows:
        sources.setdefault(str(row.claim.place.file), []).append(row)
    for found in sources.values():
        full = ledger_table(found, folder)
        width = len(full.columns) - 7
        title = found[0].claim.source.name
        table = replace(full, title=title, columns=full.columns[:width], notes=(_about(found[0].claim),))
        parts.append(to_markdown(replace(table, rows=tuple(row[:width] for row in full.rows))))
    return {"claims.md": "\n".join(parts), "claims.csv": to_csv(ledger_table(rows, folder))}


def _counts(rows: Sequence[LedgerRow]) -> tuple[str, ...]:
    counts = {verdict: sum(row.judgement.verdict is verdict for row in rows) for verdict in Verdict}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return (
        f"{len(rows)} published numbers: {said}.",
        "AP is ×100. An id with @DATE is a value that the source itself replaced after that day.",
    )


def _about(claim: Claim) -> str:
    source = claim.source
    parts = [source.place, source.url, f"revision {source.revision[:10]}" if source.revision else ""]
    parts += [source.date, source.note]
    return ". ".join(part for part in parts if part)


def _source_of(claim: Claim) -> tuple[str, ...]:
    source, fields = claim.source, claim.fields
    return source.name, source.place, fields.row, fields.column, source.revision, source.date, source.url


def _ledger_entries(row: LedgerRow, folder: Path) -> Iterable[Entry]:
    claim, made = row.claim, row.attempt
    fields = claim.fields
    measured = made.measured if made else None
    first = made.records[0] if made and made.records else None
    ours = _writer(claim, fields.metric or "")(measured.value) if measured else ""
    link = _link(first, folder) if first else ""
    unit = "" if fields.unit == "AP" else f" {fields.unit}"
    yield _text(claim.id)
    yield _text(_what(claim))
    yield _text(f"{claim.value_text}{unit}")
    yield Entry(ours, (ours,), link=link)
    yield _text(str(row.judgement.verdict))
    yield _text(row.judgement.reason)
    yield Entry(first.record["run_id"] if first else "", (link,), link=link)
    yield _text(made.command if made else "")


def _what(claim: Claim) -> str:
    """'mask AP, DiffusionInst resnet50, coco val2017, 1 step, 500 proposals'."""
    fields = claim.fields
    steps = f"{fields.sampling_steps} step{'s' if fields.sampling_steps != 1 else ''}" if fields.sampling_steps else ""
    parts = [fields.quantity, f"{fields.method} {fields.backbone or ''}".strip()]
    parts += [f"{fields.dataset} {fields.split}".strip(), steps]
    parts += [f"{fields.num_proposals} proposals" if fields.num_proposals else ""]
    return ", ".join(part for part in parts if part)
