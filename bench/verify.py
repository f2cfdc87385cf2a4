"""Do generated files say what the records and claim files say? They are made again in memory and compared byte by byte.

What is held to what:
    CLAIMS/*.yaml                        to CLAIMS/claims.lock, value by value
    RESULTS/reports/claims.*             to claims, paper suites and records
    RESULTS/reports/paper/NAME.*         to the suite NAME, claims and records
    RESULTS/SUITE/MACHINE/report/*       to the machine's records and the suite: tables in Markdown, CSV and LaTeX

A machine's report is of a suite with the settings of one run-suite, so each `--set` and `--only` that its records name
is tried; a file is right if one of them gives it. Plots are not compared: each version of matplotlib draws other bytes.

A file that is gone is told as well: where a report has some of its tables or of its plots, it has all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.claims import Mismatch, check_lock, load_claims
from bench.errors import BenchError, RecordError, SuiteError
from bench.ledger import check_ties, find_records, load_paper_suites, make_ledger
from bench.plan import build_plan
from bench.report.build import FOLDER, PLOT_ENDINGS, REPORTS, TABLE_WRITERS, build_tables, plot_names, select
from bench.report.cells import Record
from bench.report.paper import paper_tables, write_ledger, write_paper
from bench.store import Store
from bench.suite import Suite, load_suite

ENDINGS = (".md", ".csv", ".tex")
PLOT_SUFFIXES = tuple(f".{ending}" for ending in PLOT_ENDINGS)


@dataclass(frozen=True)
class Outcome:
    """checked: how many files were compared. mismatches: where they are not what they should be."""

    checked: int
    mismatches: tuple[Mismatch, ...]


def verify(paths: Sequence[Path], *, results: Path, claims: Path, suites: Path) -> Outcome:
    """Compare what is generated with what it is generated from.

    Args:
        paths: files or folders; only what lies in them is compared. Empty: everything.
        results, claims, suites: the folders of results, of claim files and of suites (paper suites in `suites`/paper).
    Raises:
        BenchError: a path holds nothing that is generated, or a source cannot be read.
    """
    checked, mismatches = 0, []
    if _wanted_any(paths, [*claims.glob("*.yaml"), *claims.glob("*.lock")]):
        checked += len(list(claims.glob("*.yaml")))
        mismatches += check_lock(claims)
    files = [path for path in _generated(results) if _wanted(paths, path)]
    expected = _Expected(results, claims, suites)
    for path in files:
        checked += 1
        mismatches += expected.compare(path)
    gone = [path for path in expected.gone() if _wanted(paths, path)]
    checked += len(gone)
    mismatches += [Mismatch(str(path), "is missing. Restore it, or write it again with diffbench") for path in gone]
    for path in paths:
        inside = [file for file in [*files, *gone, *claims.glob("*")] if _inside(file, path)]
        if not inside:
            raise BenchError(f"{path}: holds no claim file and no generated table. Give a folder of results, or a file")
    if not checked:
        raise BenchError(
            f"{results}, {claims}: nothing to verify. Give the folders with --results DIR and --claims DIR"
        )
    return Outcome(checked, tuple(mismatches))


def _generated(results: Path) -> list[Path]:
    """Every table that the harness writes below a results folder."""
    return [path for folder in _folders(results) for path in _with_endings(folder, ENDINGS)]


def _folders(results: Path) -> list[Path]:
    reports = results / REPORTS
    return [reports, reports / "paper", *sorted(results.glob(f"[!.]*/*/{FOLDER}"))]


def _with_endings(folder: Path, endings: Sequence[str]) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix in endings]


def _wanted(paths: Sequence[Path], file: Path) -> bool:
    return not paths or any(_inside(file, path) for path in paths)


def _wanted_any(paths: Sequence[Path], files: Iterable[Path]) -> bool:
    return any(_wanted(paths, file) for file in files)


def _inside(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


@dataclass(frozen=True)
class _Version:
    """A machine's report with one setting: file name -> text of its tables, and the names of its plots."""

    tables: dict[str, str]
    plots: tuple[str, ...]

    def like(self, found: Mapping[str, bytes]) -> int:
        """How many of the tables that are there are as this version has them."""
        return sum(found.get(name) == text.encode() for name, text in self.tables.items())


class _Expected:
    """What generated files should hold; each source is read once."""

    def __init__(self, results: Path, claims: Path, suites: Path) -> None:
        self.results, self.claims_folder, self.suites = results, claims, suites
        self.texts: dict[Path, dict[str, list[str]]] = {}
        self.versions: dict[Path, list[_Version]] = {}
        self.suite_paths: dict[str, Path] | None = None

    def compare(self, path: Path) -> list[Mismatch]:
        candidates = self._of(path.parent).get(path.name, [])
        if not candidates:
            return [Mismatch(str(path), "no table of the suite makes this file as things stand. Delete it, or restore")]
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            return [Mismatch(str(path), f"cannot be read ({error})")]
        if text in candidates:
            return []
        nearest = min(candidates, key=lambda candidate: len(_differing(text, candidate)))
        return [_first_difference(path, text, nearest)]

    def gone(self) -> Iterator[Path]:
        """The files that belong to those that are there, and are not there themselves."""
        for folder in _folders(self.results):
            tables, plots = _with_endings(folder, ENDINGS), _with_endings(folder, PLOT_SUFFIXES)
            names: list[str] = []
            if tables or plots:
                texts = self._of(folder)
                if folder in self.versions:
                    names = self._of_report(folder, tables, plots)
                else:  # of a suite, or of the ledger
                    stems = {path.stem for path in tables}
                    names = [name for name in texts if Path(name).stem in stems]
            yield from (folder / name for name in names if not (folder / name).exists())

    def _of_report(self, folder: Path, tables: Sequence[Path], plots: Sequence[Path]) -> list[str]:
        """The files of that version of a machine's report which is most like what is there."""
        found = {path.name: path.read_bytes() for path in tables}
        there = {*found, *(path.name for path in plots)}

        def likeness(version: _Version) -> tuple[int, int]:
            return version.like(found), -len({*version.tables, *version.plots} - there)

        best = max(self.versions[folder], key=likeness, default=None)
        if best is None:
            return []
        return [*(best.tables if tables else ()), *(best.plots if plots else ())]

    def _of(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self.texts:
            self.texts[folder] = self._texts(folder)
        return self.texts[folder]

    def _texts(self, folder: Path) -> dict[str, list[str]]:
        """File name -> what it may hold, for one folder of generated files."""
        reports = self.results / REPORTS
        if folder == reports:
            rows = make_ledger(load_claims(self.claims_folder), load_paper_suites(self._paper()), self.results)
            return {name: [text] for name, text in write_ledger(rows, folder).items()}
        if folder == reports / "paper":
            return {name: [text] for name, text in self._paper_texts(folder)}
        return self._machine_texts(folder)

    def _paper(self) -> Path:
        return self.suites / "paper"

    def _paper_texts(self, folder: Path) -> Iterator[tuple[str, str]]:
        claims = load_claims(self.claims_folder)
        for suite in load_paper_suites(self._paper()):
            check_ties(suite, claims)
            tables = paper_tables(suite, claims, find_records(self.results, suite.name))
            yield from write_paper(suite, tables, folder).items()

    def _machine_texts(self, folder: Path) -> dict[str, list[str]]:
        """The tables of one machine's report, for each setting with which its records were made."""
        machine, name = folder.parent.name, folder.parent.parent.name
        records = Store(self.results).plain_records(name, machine)
        path = self._suite_path(name)
        versions = self.versions[folder] = []
        for overrides, only in _settings(records) if path is not None else []:
            try:
                suite = load_suite(path, overrides) if path is not None else None
                plan = build_plan(suite, only=only) if suite is not None else None
            except SuiteError:
                continue  # a setting of an older version of the suite
            assert suite is not None
            assert plan is not None
            versions += _versions(suite, select(records, plan.cells).records)
        versions += _versions(load_suite(path) if path is not None else None, select(records, None).records)
        found: dict[str, list[str]] = {}
        for version in versions:
            for name_of_table, text in version.tables.items():
                texts = found.setdefault(name_of_table, [])
                if text not in texts:
                    texts.append(text)
        return found

    def _suite_path(self, name: str) -> Path | None:
        if self.suite_paths is None:
            self.suite_paths = {}
            for path in sorted(self.suites.rglob("*.yaml")):
                if not path.resolve().is_relative_to(self.claims_folder.resolve()):
                    try:
                        self.suite_paths.setdefault(load_suite(path).name, path)
                    except SuiteError:
                        continue  # no suite
        return self.suite_paths.get(name)


def _settings(records: Sequence[Record]) -> list[tuple[list[str], str | None]]:
    """The `--set` and `--only` of the command lines that the records name, and none of them."""
    found: list[tuple[list[str], str | None]] = [([], None)]
    for record in records:
        overrides: list[str] = []
        only = None
        words = shlex.split(record["command"])
        for option, value in _options(words):
            if option == "--set":
                overrides.append(value)
            elif option == "--only":
                only = value
        for setting in ((overrides, only), (overrides, None)):
            if setting not in found:
                found.append(setting)
    return found


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, after in zip(words, [*words[1:], ""]):
        option, equals, value = word.partition("=")
        if word in ("--set", "--only"):
            yield word, after
        elif option in ("--set", "--only") and equals:
            yield option, value


def _versions(suite: Suite | None, records: Sequence[Record]) -> list[_Version]:
    """The report of the selected records; none where it cannot be made of them."""
    if not records:
        return []
    try:
        tables = build_tables(records, suite.tables if suite is not None else ())
    except RecordError:
        return []
    texts = {
        f"{stem}.{ending}": writer(table) for stem, table in tables.items() for ending, writer in TABLE_WRITERS.items()
    }
    return [_Version(texts, tuple(plot_names(records, suite.plots if suite is not None else ())))]


def _differing(text: str, other: str) -> list[int]:
    """Numbers of the lines, from 1, that differ."""
    lines, others = text.split("\n"), other.split("\n")
    longer = max(len(lines), len(others))
    lines += [""] * (longer - len(lines))
    others += [""] * (longer - len(others))
    return [number for number, (here, there) in enumerate(zip(lines, others), start=1) if here != there]


def _first_difference(path: Path, text: str, expected: str) -> Mismatch:
    numbers = _differing(text, expected)
    if not numbers:
        return Mismatch(f"{path}:1", "differs in empty lines at its end. Write it again with diffbench")
    number = numbers[0]
    here, there = (part.split("\n")[number - 1 : number] or [""] for part in (text, expected))
    first, second = _around(here[0], there[0])
    more = f"; {len(numbers) - 1} more lines differ" if len(numbers) > 1 else ""
    return Mismatch(f"{path}:{number}", f"has '{first}', should have '{second}'{more}")


def _around(here: str, there: str, width: int = 24) -> tuple[str, str]:
    """Both lines around the place where they part."""
    start = next((i for i, (one, two) in enumerate(zip(here, there)) if one != two), min(len(here), len(there)))
    begin = max(0, start - width // 2)
    shown = [line[begin : start + width].strip("\r") for line in (here, there)]
    return shown[0], shown[1]
