"""One suite's results as one archive that scores itself again elsewhere, without a GPU, a model or an image.

    suite.yaml, plan.json                       what was asked: the suite as given, its overrides, cells, nodes, tables
    records/MACHINE/RUN_ID.json                 as they are stored
    evidence/...                                unchanged, what environments name: a dirty diff, a lock of packages
    nodes/NODE_ID.json                          what nodes noted: times, outputs, the environment of their process
    predictions/NODE_ID/*.jsonl.gz              one line an image
    annotations/NODE_ID.json.gz                 the ground truth of the scored images, as far as scoring reads it
    claims/*.yaml, claims/claims.lock           of the suites of the paper
    report/MACHINE/*                            tables, made again out of the records; plots and pages as they are

No image is packed, and no path, host or user name. `bench.verify_pack` reads it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.archive import compress, is_safe, write_archive
from bench.claims import LOCK_NAME
from bench.errors import BenchError, RecordError, StoreError
from bench.execute import private_texts
from bench.plan import Cell, Node, Plan
from bench.record import Resamples, dump_json, scrub
from bench.report.build import FOLDER, REPORTS, TABLE_WRITERS, Selection, build_tables
from bench.store import NodeResult, Store
from bench.suite import Suite
from diffinst.config import DataConfig
from diffinst.data import catalog

FORMAT = "diffinst-bench-pack"
_PAGES = (".html", ".svg", ".png", ".csv", ".md", ".tex", ".json")
# What the scorers read of an annotation file (COCO, LVIS), and whom it is owed to.
_IMAGE_KEYS = ("id", "file_name", "height", "width", "license", "neg_category_ids", "not_exhaustive_category_ids")
_INSTANCE_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
_CATEGORY_KEYS = ("id", "name", "frequency", "image_count")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """sha256: of the manifest. notes: what is not in the archive and why, in words."""

    sha256: str
    num_records: int
    num_files: int
    notes: tuple[str, ...]


def pack(
    selections: Mapping[str, Selection],
    results: Path,
    out: Path,
    *,
    suite: Suite | None = None,
    plan: Plan | None = None,
    overrides: Sequence[str] = (),
    data_root: Path | None = None,
    claims: Path | None = None,
    with_annotations: bool = True,
    partial: bool = False,
    progress: Progress = lambda text: None,  # noqa: ARG005 - nobody listens
) -> Packed:
    """Write the archive of a suite's results.

    Args:
        selections: machine -> its records. suite, plan, overrides: where a suite file was given.
        with_annotations: False leaves out annotations that others own, and pages that show their pictures; `shapes`
            are generated and always packed.
        partial: records may lack their predictions; the manifest then names them.
    Raises:
        RecordError: a scored record has no predictions here. DataError: annotations are not found.
        StoreError: the archive cannot be written.
    """
    packer = _Packer(Store(results), data_root, progress)
    records = {
        machine: [r for r in chosen.records if r["status"] != "missing"] for machine, chosen in selections.items()
    }
    name = next(record["suite"] for found in records.values() for record in found)
    tables = [] if suite is None else [_as_dict(spec) for spec in suite.tables]
    cells = [] if plan is None else [_cell(cell) for cell in plan.cells]
    if suite is not None:
        packer.add_text("suite.yaml", suite.path.read_text(encoding="utf-8"))
        if suite.claims is not None and claims is not None:
            if not (claims / LOCK_NAME).is_file():
                raise BenchError(
                    f"--claims {claims}: has no {LOCK_NAME}, and {suite.path} is tied to claims. "
                    "Give the folder of the claim files"
                )
            for path in [*sorted(claims.glob("*.yaml")), claims / LOCK_NAME]:
                packer.add_text(f"claims/{path.name}", path.read_text(encoding="utf-8"))
            for path in sorted((results / REPORTS / "paper").glob(f"{suite.name}.*")):
                packer.add_file(f"report/paper/{path.name}", path)
    nodes: dict[str, Any] = {}
    if plan is not None:
        nodes = {node.id: packer.node(node) for node in plan.nodes.values()}
        packer.notes += _other_nodes(records, plan)
    for machine, found in records.items():
        for number, record in enumerate(found, start=1):
            progress(f"{machine}: record {number} of {len(found)}")
            packer.add_record(machine, record, nodes, with_annotations=with_annotations)
        for stem, table in build_tables(selections[machine].records, tables).items():
            for ending, writer in TABLE_WRITERS.items():
                packer.files[f"report/{machine}/{stem}.{ending}"] = writer(table).encode()
        for path in sorted((results / name / machine / FOLDER).glob("*")):
            is_page = path.suffix == ".html"
            if path.suffix in _PAGES and f"report/{machine}/{path.name}" not in packer.files:
                if is_page and not with_annotations:
                    packer.notes.append(
                        f"report/{machine}/{path.name}: left out, as it may show pictures of the data set"
                    )
                elif path.suffix in (".png", ".svg", ".html"):
                    packer.add_file(f"report/{machine}/{path.name}", path)
    if packer.without_predictions and not partial:
        run, why = next(iter(packer.without_predictions.items()))
        lacking = {name.partition("/")[0] for name in packer.without_predictions}
        others = ", ".join(machine for machine, found in records.items() if found and machine not in lacking)
        ways = ["Run the suite here"]
        ways += [f"choose a --machine that has all of its own ({others})"] if others else []
        ways += [f"or pack {'the rest' if others else 'it'} with --partial"]
        raise RecordError(
            f"{run}: its predictions are not stored in {packer.store.nodes_folder}, or not what scores them ({why}; "
            f"so for {len(packer.without_predictions)} records of {', '.join(sorted(lacking))}). {', '.join(ways)}"
        )
    packer.notes += [f"{run}: cannot be scored again: {why}" for run, why in packer.without_predictions.items()]
    packer.add_json(
        "plan.json",
        {"suite": name, "overrides": list(overrides), "cells": cells, "nodes": list(nodes.values()), "tables": tables},
    )
    facts = {
        "format": FORMAT,
        "suite": name,
        "machines": sorted(records),
        "annotations": packer.annotations,
        "not_scored_again": packer.without_predictions,
        "evidence_left_out": packer.evidence_left_out,
    }
    progress(f"writing {len(packer.files)} files")
    digest = write_archive(out, packer.files, packer.scrubbed(facts))
    return Packed(digest, sum(map(len, records.values())), len(packer.files), tuple(packer.notes))


def annotations_of(content: Mapping[str, Any], image_ids: Sequence[int] | None) -> bytes:
    """What scoring reads of an annotation file, for these images (None: all); equal content gives equal bytes."""
    wanted = None if image_ids is None else set(image_ids)
    images = []
    for image in content["images"]:
        if wanted is None or image["id"] in wanted:
            kept = {key: image[key] for key in _IMAGE_KEYS if key in image}
            # A name is all that scoring needs, and LVIS has it in a URL only.
            kept["file_name"] = Path(str(kept.get("file_name", f"{image['id']}.jpg"))).name
            images.append(kept)
    ids = {image["id"] for image in images}
    small = {
        "licenses": content.get("licenses", []),
        "images": images,
        "annotations": [
            {key: item[key] for key in _INSTANCE_KEYS if key in item}
            for item in content["annotations"]
            if item.get("image_id") in ids
        ],
        "categories": [{key: item[key] for key in _CATEGORY_KEYS if key in item} for item in content["categories"]],
    }
    return json.dumps(small, separators=(",", ":"), ensure_ascii=True).encode()


def find_annotations(data: DataConfig, root: Path | None) -> bytes:
    """`annotations_of` a configuration's validation split.

    Raises:
        DataError: not found, or no annotation file.
    """
    paths = catalog.resolve(data, "val", root)
    try:
        content = json.loads(paths.annotations.read_bytes())
        return annotations_of(content, paths.image_ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{paths.annotations}: is no file of annotations ({error})") from error


def evidence_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """Files of the results folder that an environment names with their digest: name -> SHA-256."""
    found: dict[str, str] = {}
    for part in environment.values():
        if isinstance(part, Mapping) and isinstance(part.get("file"), str) and isinstance(part.get("sha256"), str):
            found[part["file"]] = part["sha256"]
    return found


class _Packer:
    """Collects the files of an archive; each node's once."""

    def __init__(self, store: Store, data_root: Path | None, progress: Progress) -> None:
        self.store, self.data_root, self.progress = store, data_root, progress
        self.files: dict[str, bytes | Path] = {}
        self.notes: list[str] = []
        self.annotations: dict[str, dict[str, Any]] = {}
        self.without_predictions: dict[str, str] = {}
        self.evidence_left_out: dict[str, str] = {}
        root = {} if data_root is None else {str(data_root.absolute()): "<data-root>"}
        self.private = private_texts(store, root)

    def scrubbed(self, content: Any) -> Any:
        return _scrubbed(content, self.private)

    def add_json(self, name: str, content: Any) -> None:
        self.files[name] = dump_json(self.scrubbed(content)).encode()

    def add_text(self, name: str, text: str) -> None:
        self.files[name] = str(self.scrubbed(text)).encode()

    def add_file(self, name: str, path: Path) -> None:
        """A file of a report; of text, what must not be told is replaced."""
        if not is_safe(name):
            raise BenchError(f"{path}: cannot be packed under this name. Rename it")
        data = path.read_bytes()
        if path.suffix != ".png":
            for text, mark in sorted(self.private.items(), key=lambda item: -len(item[0])):
                pattern = rf"(?<![\w.-]){re.escape(text)}(?![\w-])".encode()
                data = re.sub(pattern, mark.replace("\\", r"\\").encode(), data)
        self.files[name] = data

    def node(self, node: Node | NodeResult) -> dict[str, Any]:
        """All that its id is made of, without its options, which name folders of this machine."""
        told = {"id": node.id, "kind": node.kind, "inputs": list(node.inputs), "spec": node.spec}
        if self.scrubbed(node.spec) != node.spec:
            return told  # nobody can make the id again out of settings that are not told
        return told | {"code": node.code, "content": node.content, "spec_id": node.spec_id}

    def add_record(
        self, machine: str, record: Mapping[str, Any], nodes: dict[str, Any], *, with_annotations: bool
    ) -> None:
        run = f"{machine}/{record['run_id']}"
        path = self.store.record_path(record["suite"], machine, record["run_id"])
        stored = json.loads(path.read_text(encoding="utf-8"))
        told = _scrubbed(stored, {})
        self.files[f"records/{run}.json"] = path.read_bytes() if told == stored else dump_json(told).encode()
        self._add_evidence(record.get("environment", {}))
        done = {kind: self._node(node_id, nodes) for kind, node_id in record["nodes"].items()}
        if record["status"] != "ok" or "score" not in record["nodes"]:
            return
        predicted = done.get("predict")
        if predicted is None:
            self.without_predictions[run] = f"no complete node {record['nodes'].get('predict', 'predict')}"
            return
        if record["nodes"]["score"] not in nodes:
            self.without_predictions[run] = f"no complete node {record['nodes']['score']}"
            return
        folder = self.store.folder(predicted.id)
        for name in sorted(predicted.files):
            if name.endswith(".jsonl"):
                self.files.setdefault(
                    f"predictions/{predicted.id}/{Path(name).name}.gz", compress((folder / name).read_bytes())
                )
        self._add_annotations(record, with_annotations=with_annotations)

    def _add_evidence(self, environment: Mapping[str, Any]) -> None:
        """The files that an environment names, as they are: what goes beside records was vetted when it was written."""
        for name, sha256 in evidence_of(environment).items():
            if f"evidence/{name}" in self.files or name in self.evidence_left_out:
                continue
            source = (self.store.root / name).resolve()
            if not is_safe(name) or not source.is_relative_to(self.store.root.resolve()):
                why = "it is not among what may be published"
            elif not source.is_file():
                why = "it is not in the results folder"
            elif hashlib.sha256(data := source.read_bytes()).hexdigest() != sha256:
                why = f"it has changed since it was written: its SHA-256 is no longer {sha256}"
            else:
                self.files[f"evidence/{name}"] = data
                continue
            self.evidence_left_out[name] = why
            self.notes.append(f"evidence/{name}: left out: {why}")

    def _node(self, node_id: str, nodes: dict[str, Any]) -> NodeResult | None:
        try:
            done = self.store.result(node_id)
        except StoreError as error:
            self.notes.append(str(self.scrubbed(str(error))))
            return None
        if done is not None:
            nodes.setdefault(node_id, self.node(done))
            self._add_evidence(done.environment)
            if f"nodes/{node_id}.json" not in self.files:
                self.add_json(f"nodes/{node_id}.json", done.model_dump(mode="json"))
        return done

    def _add_annotations(self, record: Mapping[str, Any], *, with_annotations: bool) -> None:
        node_id = record["nodes"]["dataset"]
        if node_id in self.annotations:
            return
        data = DataConfig.model_validate_json(json.dumps(record["config"]["data"]))
        root = self.data_root
        if data.dataset == "shapes":
            root = self.store.folder(node_id)
            if not self.store.is_done(node_id):
                raise RecordError(
                    f"{record['run_id']}: its data set {node_id} is no longer stored. Run the suite again"
                )
        self.progress(f"annotations of {data.dataset}")
        content = find_annotations(data, root)
        is_packed = with_annotations or data.dataset == "shapes"
        self.annotations[node_id] = {
            "packed": is_packed,
            "dataset": data.dataset,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        if is_packed:
            self.files[f"annotations/{node_id}.json.gz"] = compress(content)
        else:
            self.notes.append(f"annotations of {data.dataset}: left out; verify-pack finds them with --data-root DIR")


def _cell(cell: Cell) -> dict[str, Any]:
    return asdict(cell)


def _other_nodes(records: Mapping[str, Sequence[Mapping[str, Any]]], plan: Plan) -> list[str]:
    """A note on records that name other nodes than the plan does."""
    planned = {cell.run_id: set(cell.nodes.values()) for cell in plan.cells if not cell.missing}
    # The nodes of a latency and a training step have the device in them, which a plan without one does not know.
    other = [
        f"{machine}/{record['run_id']}"
        for machine, found in records.items()
        for record in found
        if not planned.get(record["run_id"], set()).issuperset(
            node_id for kind, node_id in record["nodes"].items() if kind not in ("latency", "training_step")
        )
    ]
    if not other:
        return []
    return [
        f"{len(other)} records are of other code or files than today's, or their data set is not here: "
        f"`diffbench explain {other[0].partition('/')[2]}` says more"
    ]


def _as_dict(spec: Any) -> dict[str, Any]:
    return dict(spec) if isinstance(spec, Mapping) else spec.model_dump(mode="json", exclude_none=True)


def _scrubbed(content: Any, private: Mapping[str, str]) -> Any:
    """`scrub`, but for resamples: numbers in base64, which can look like a path."""
    if isinstance(content, Mapping):
        if _is_resamples(content):
            return dict(content)
        return {scrub(key, private): _scrubbed(value, private) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_scrubbed(item, private) for item in content]
    return scrub(content, private) if isinstance(content, str) else content


def _is_resamples(content: Mapping[str, Any]) -> bool:
    if "values" not in content:
        return False
    try:
        Resamples.model_validate(content)
    except ValidationError:
        return False
    return True
