"""Does an archive of results tell the truth? Every byte is checked, every cell scored, every table made again.

Nothing of the archive is executed; what is read of it is unpacked into a temporary folder, and only once no byte of it
is in doubt. Scoring needs neither torch nor a GPU nor an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.archive import check_archive, read_entries
from bench.claims import LOCK_NAME, check_lock
from bench.errors import BenchError, RecordError
from bench.measure.accuracy import measure_accuracy
from bench.pack import FORMAT, evidence_of, find_annotations
from bench.plan import Cell, make_id
from bench.record import RunRecord, load_record
from bench.report.build import TABLE_WRITERS, build_tables, select
from diffinst.config import DataConfig
from diffinst.errors import DiffInstError
from diffinst.evaluation.predictions import iter_predictions

TOLERANCE = 1e-9
_SCORED = ("bbox/", "segm/", "num_images", "num_instances")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Verified:
    """findings: one line each; empty where all is well. scored: cells scored again. notes: what was not, and why."""

    findings: tuple[str, ...]
    files: int = 0
    scored: int = 0
    tables: int = 0
    notes: tuple[str, ...] = ()


def verify_pack(
    path: Path,
    *,
    sha256: str | None = None,
    data_root: Path | None = None,
    rescore: bool = True,
    progress: Progress = lambda text: None,  # noqa: ARG005 - nobody listens
) -> Verified:
    """Check an archive of `bench.pack`.

    Args:
        sha256: of its manifest, as `pack` gave it. data_root: where annotations are that were left out.
    Raises:
        BenchError: it cannot be read, or needs a data root.
    """
    check = check_archive(
        path, sha256=sha256, progress=lambda done, total: progress(f"bytes {done * 100 // max(total, 1)} %")
    )
    if check.manifest is None:
        return Verified(check.findings)
    if check.manifest.get("format") != FORMAT:
        return Verified((f"manifest.json: its format is {check.manifest.get('format')!r}, not '{FORMAT}'",))
    with tempfile.TemporaryDirectory(prefix="verify-pack-") as name:
        folder = Path(name)
        for entry, data in read_entries(path, check.manifest):
            place = folder / entry
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        try:
            return _Verifier(folder, check.manifest, data_root, progress).verify(rescore=rescore)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            # Whoever wrote the manifest anew can write anything.
            return Verified((f"plan.json: is not what diffbench pack writes ({type(error).__name__}: {error})",))


def rescore_cell(record: RunRecord, spec: Mapping[str, Any], annotations: Path, predictions: Path) -> dict[str, Any]:
    """What the score node of a record computes, out of its predictions: 'metrics' by name, each with its 'value'.

    What else a score node computes from the same files belongs here too: `compare_outputs` compares all of it.
    """
    stored = record.config["data"]
    known = ("dataset", "annotation_format", "class_agnostic", "skip_invalid")
    data = DataConfig(**{key: stored[key] for key in known if key in stored})
    with tempfile.TemporaryDirectory() as folder:  # for the match tables
        found = measure_accuracy(
            data, annotations, iter_predictions(predictions), Path(folder), iou_types=tuple(spec["iou_types"])
        )
    return found.outputs()


def compare_outputs(record: RunRecord, outputs: Mapping[str, Any]) -> Iterator[str]:
    """Every number of a record's scores that is not what scoring gave now; a metric that the record lacks is new."""
    stored = record.model_dump(mode="json")
    for name, entry in stored["metrics"].items():
        if not name.startswith(_SCORED):
            continue
        found = outputs["metrics"].get(name, {"value": None})
        for key, value in found.items():
            if key == "standard_error" and entry.get(key) is None:
                continue  # recorded before there were any
            if key in ("value", "standard_error") and not _same(entry.get(key), value):
                what = name if key == "value" else f"{name} {key}"
                yield f"{what} is {_text(entry.get(key))} in the record, and {_text(value)} scored again"
    for name, classes in stored["per_class"].items():
        for label, value in classes.items():
            again = outputs["per_class"].get(name, {}).get(label)
            if not _same(value, again):
                yield f"{name} of '{label}' is {_text(value)} in the record, and {_text(again)} scored again"
    for name, drawn in outputs.get("resamples", {}).items():
        held = stored["resamples"].get(name)
        if held is not None and ":" not in held["images"]:  # recorded before labels were part of it
            drawn = drawn | {"images": drawn["images"].partition(":")[0]}
        if held is not None and held != drawn:
            yield f"resamples of {name} differ from those of the record"


class _Verifier:
    def __init__(self, folder: Path, manifest: Mapping[str, Any], data_root: Path | None, progress: Progress) -> None:
        self.folder, self.manifest, self.data_root, self.progress = folder, manifest, data_root, progress
        self.plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        self.specs = {node["id"]: node["spec"] for node in self.plan["nodes"]}
        self.findings: list[str] = []
        self.notes: list[str] = []
        self.names = {entry["name"] for entry in manifest["files"]}
        self.left_out: dict[str, str] = manifest.get("evidence_left_out", {})
        self.tells_evidence = "evidence_left_out" in manifest  # packs of before left it out in silence, or scrubbed it
        self.evidence: set[tuple[str, str]] = set()  # looked at

    def verify(self, *, rescore: bool) -> Verified:
        scored = tables = 0
        machines = sorted(path for path in (self.folder / "records").glob("*") if path.is_dir())
        if not machines:
            return Verified(("records/: there is no record in the archive",))
        for machine in machines:
            records = self._records(machine)
            for record in records:
                self._check_evidence(f"records/{machine.name}/{record.run_id}.json", record.environment)
            if rescore:
                scored += self._score(machine.name, records)
            tables += self._tables(machine.name, records)
        for path in sorted((self.folder / "nodes").glob("*.json")):
            self._check_evidence(f"nodes/{path.name}", json.loads(path.read_text(encoding="utf-8"))["environment"])
        self._check_ids()
        if (self.folder / "claims").is_dir():
            self.findings += [f"claims/{LOCK_NAME}: {found.message}" for found in check_lock(self.folder / "claims")]
        if rescore and not scored and not self.findings:
            self.findings.append(
                "records/: no cell could be scored again, so nothing was verified but bytes and tables"
            )
        return Verified(tuple(self.findings), len(self.manifest["files"]), scored, tables, tuple(self.notes))

    def _records(self, machine: Path) -> list[RunRecord]:
        found = []
        for path in sorted(machine.glob("*.json")):
            try:
                found.append(load_record(path))
            except RecordError as error:
                self.findings.append(str(error).replace(f"{self.folder}/", ""))
        return found

    def _check_ids(self) -> None:
        """Is each node's id that of its settings, inputs, code and files?"""
        spec_ids = {node["id"]: node.get("spec_id") for node in self.plan["nodes"]}
        for node in self.plan["nodes"]:
            if not node.get("code"):
                continue  # older than digests of code in ids, or of settings that are not told
            found = make_id(node["kind"], node["spec"], node["inputs"], node["code"], node["content"])
            if found != node["id"]:
                self.findings.append(f"plan.json: the node {node['id']} has the id {found} by what it is made of")
            inputs = [spec_ids.get(source) for source in node["inputs"]]
            if all(inputs) and node["spec_id"] != make_id(node["kind"], node["spec"], [str(text) for text in inputs]):
                self.findings.append(f"plan.json: the node {node['id']} has another spec_id by what it is made of")

    def _check_evidence(self, place: str, environment: Mapping[str, Any]) -> None:
        """Are the files that an environment names there, and those that it means? Each is told of once."""
        for name, sha256 in evidence_of(environment).items():
            path = self.folder / "evidence" / name
            if (name, sha256) in self.evidence:
                continue
            self.evidence.add((name, sha256))
            if f"evidence/{name}" in self.names:
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                if found != sha256 and self.tells_evidence:
                    self.findings.append(f"evidence/{name}: its SHA-256 is {found}, and {place} names {sha256}")
            elif not self.tells_evidence:
                self.notes.append(f"evidence/{name}: not in the archive, which is of before that was told")
            elif name in self.left_out:
                self.notes.append(f"evidence/{name}: not in the archive: {self.left_out[name]}")
            else:
                self.findings.append(f"evidence/{name}: is not in the archive, and {place} names it")

    def _score(self, machine: str, records: list[RunRecord]) -> int:
        scored = 0
        for number, record in enumerate(records, start=1):
            self.progress(f"{machine}: scoring {number} of {len(records)}")
            place = f"records/{machine}/{record.run_id}.json ({record.label})"
            if record.status != "ok" or "score" not in record.nodes:
                continue
            left_out = self.manifest["not_scored_again"].get(f"{machine}/{record.run_id}")
            if left_out is not None:
                self.notes.append(f"{place}: not scored again: {left_out}")
                continue
            score = record.nodes["score"]
            if score not in self.specs:
                self.findings.append(
                    f"{place}: its node {score} is not in plan.json, so how to score it is not known. Pack it again "
                    "where that node is stored"
                )
                continue
            try:
                annotations = self._annotations(record)
                predictions = self.folder / "predictions" / record.nodes["predict"]
                outputs = rescore_cell(record, self.specs[score], annotations, predictions)
            except DiffInstError as error:
                if isinstance(error, _NeedsDataRoot):
                    raise
                self.findings.append(f"{place}: {str(error).replace(f'{self.folder}/', '')}")
                continue
            scored += 1
            self.findings += [f"{place}: {finding}" for finding in compare_outputs(record, outputs)]
        return scored

    def _annotations(self, record: RunRecord) -> Path:
        node_id = record.nodes["dataset"]
        path = self.folder / "annotations" / f"{node_id}.json"
        listed = self.manifest["annotations"][node_id]
        if not path.exists():
            if self.data_root is None:
                raise _NeedsDataRoot(
                    f"the annotations of '{listed['dataset']}' were left out of the archive. Give the folder with "
                    "the data set with --data-root DIR, or check the bytes alone with --no-rescore"
                )
            content = find_annotations(
                DataConfig.model_validate_json(json.dumps(record.config["data"])), self.data_root
            )
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        if hashlib.sha256(path.read_bytes()).hexdigest() != listed["sha256"]:
            raise BenchError(f"annotations of '{listed['dataset']}' are not those that the archive was packed with")
        return path

    def _tables(self, machine: str, records: list[RunRecord]) -> int:
        if not records:
            return 0
        cells = [Cell(**cell) for cell in self.plan["cells"]] or None
        chosen = select([record.model_dump(mode="json") for record in records], cells)
        count = 0
        for stem, table in build_tables(chosen.records, self.plan["tables"]).items():
            for ending, writer in TABLE_WRITERS.items():
                name = f"report/{machine}/{stem}.{ending}"
                path = self.folder / name
                count += 1
                if not path.exists():
                    self.findings.append(f"{name}: is not in the archive, and the records give it")
                elif path.read_bytes() != writer(table).encode():
                    self.findings.append(f"{name}: is not what the records give")
        return count


class _NeedsDataRoot(BenchError):
    """The annotations have to be found elsewhere."""


def _same(stored: float | None, found: float | None) -> bool:
    if stored is None or found is None:
        return stored is found
    return math.isclose(stored, found, rel_tol=0, abs_tol=TOLERANCE)


def _text(value: float | None) -> str:
    return "undefined" if value is None else repr(value)
