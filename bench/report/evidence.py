"""What a report needs beyond records: predictions, ground truth, pictures and losses, out of the store and the data.

The one module of the reports that reads them; where something is not there, it says so in a line. Loads no torch: the
readers of annotations and predictions do without it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from bench.errors import StoreError
from bench.record import scrub
from bench.report.cells import Record
from bench.stats.breakdown import Scene
from bench.store import Store
from diffinst.config import DataConfig
from diffinst.data import catalog
from diffinst.data.annotations import (
    CLASS_AGNOSTIC_NAME,
    CocoAnnotations,
    compress_segmentation,
    decode_segmentation,
    read_annotations,
    read_image,
)
from diffinst.data.lvis import LvisAnnotations, read_lvis
from diffinst.errors import DataError, DiffInstError
from diffinst.evaluation.coco_ap import ground_truth
from diffinst.evaluation.matches import MatchTable, build_matches, match_greedily
from diffinst.evaluation.predictions import PREDICTIONS_FOLDER, iter_predictions, to_coco_results

LOSSES_NAME = "losses.jsonl"
_MAX_DETECTIONS = {"coco": 100, "lvis": 300}  # an image and class; an image
_LVIS_DETECTIONS = 300
_MAX_NAMED = 5


class NotThere(Exception):
    """Why something that a report would show cannot be had, in one line."""


@dataclass(frozen=True)
class Truth:
    """The ground truth of a split as it is scored.

    content: COCO. image_ids: (I,) rising. pictures: image id -> file. open_categories: image id -> classes that are not
    annotated exhaustively; known_categories: image id -> classes of which anything is known (None: all; LVIS).
    """

    content: dict[str, Any]
    image_ids: tuple[int, ...]
    pictures: Mapping[int, Path]
    has_masks: bool
    class_agnostic: bool
    format: str
    open_categories: Mapping[int, frozenset[int]]
    known_categories: Mapping[int, frozenset[int]] | None

    @cached_property
    def category_names(self) -> dict[int, str]:
        return {entry["id"]: entry["name"] for entry in self.content["categories"]}

    @cached_property
    def annotations(self) -> dict[int, list[dict[str, Any]]]:
        """By image, in the order of the file."""
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in self.content["annotations"]:
            found[annotation["image_id"]].append(annotation)
        return found

    @cached_property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) by image."""
        return {entry["id"]: (entry["height"], entry["width"]) for entry in self.content["images"]}

    def picture(self, image_id: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB.

        Raises:
            NotThere: the file is missing or damaged.
        """
        try:
            return read_image(self.pictures[image_id])
        except DataError as error:
            raise NotThere(f"the picture of image {image_id} cannot be read: {_reason(error)}") from error


@dataclass(frozen=True)
class CellEvidence:
    """What one cell predicted. iou_type: 'segm' where both sides have masks. results: COCO results that count."""

    record: Record
    truth: Truth
    iou_type: str
    results: tuple[dict[str, Any], ...]

    @cached_property
    def by_image(self) -> dict[int, list[dict[str, Any]]]:
        """Results by image, best first."""
        found: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in self.truth.image_ids}
        for result in self.results:
            found[result["image_id"]].append(result)
        return {image_id: sorted(entries, key=lambda entry: -entry["score"]) for image_id, entries in found.items()}

    @cached_property
    def matches(self) -> MatchTable:
        """As the scores have it."""
        limit = _MAX_DETECTIONS[self.truth.format]
        table = build_matches(
            self.truth.content, list(self.results), self.truth.image_ids, self.iou_type, max_detections=limit
        )
        if not self.truth.open_categories:
            return table
        is_open = np.array(
            [
                int(table.category_ids[category]) in self.truth.open_categories.get(int(table.image_ids[image]), ())
                for category, image in zip(table.category, table.image)
            ],
            dtype=bool,
        )
        return replace(table, ignored=table.ignored | (~table.matched & is_open))

    def scenes(self) -> Iterator[Scene]:
        """Each image with the overlaps of all its detections and instances, whatever their classes."""
        for image_id in self.truth.image_ids:
            yield self.scene(image_id)

    def scene(self, image_id: int) -> Scene:
        """One image; its detections in the order of `by_image`, at most as many a class as are scored."""
        results, annotations = self.counted(image_id), self.truth.annotations.get(image_id, [])
        is_crowd = np.array([bool(item.get("iscrowd", 0)) for item in annotations], dtype=bool)
        return Scene(
            score=np.array([result["score"] for result in results], dtype=np.float64),
            category=np.array([result["category_id"] for result in results], dtype=np.int64),
            truth_category=np.array([item["category_id"] for item in annotations], dtype=np.int64),
            is_crowd=is_crowd,
            overlaps=self._overlaps(results, annotations, is_crowd, self.truth.sizes[image_id]),
            open_categories=self.truth.open_categories.get(image_id, frozenset()),
        )

    def counted(self, image_id: int) -> list[dict[str, Any]]:
        """The detections of an image that are scored, best first."""
        seen: dict[int, int] = defaultdict(int)
        kept = []
        for result in self.by_image[image_id]:
            seen[result["category_id"]] += 1
            if seen[result["category_id"]] <= _MAX_DETECTIONS[self.truth.format]:
                kept.append(result)
        return kept

    def _overlaps(
        self,
        results: list[dict[str, Any]],
        annotations: list[dict[str, Any]],
        is_crowd: np.ndarray,
        size: tuple[int, int],
    ) -> np.ndarray:
        if not results or not annotations:
            return np.zeros((len(results), len(annotations)))
        if self.iou_type == "bbox":
            found, truth = [result["bbox"] for result in results], [item["bbox"] for item in annotations]
        else:
            found = [result["segmentation"] for result in results]
            truth = [compress_segmentation(item["segmentation"], *size) for item in annotations]
        return np.asarray(coco_mask.iou(found, truth, is_crowd.astype(np.uint8).tolist()), dtype=np.float64)


@dataclass(frozen=True)
class Losses:
    """A training's losses. iterations: (N,). total: (N,). parts: name without its stage -> (N,), summed over stages."""

    node_id: str
    iterations: tuple[int, ...]
    total: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]


class EvidenceReader:
    """Reads what records name.

    Args:
        store: of the results folder.
        data_root: folder of the data sets; None where none is given.
        configs: run id -> the data section with its paths as they are on this machine, where a plan knows it.
        private: text -> mark, for what no report may tell.
    """

    def __init__(
        self,
        store: Store,
        data_root: Path | None = None,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        private: Mapping[str, str] | None = None,
    ) -> None:
        self._store, self._data_root, self._configs = store, data_root, configs or {}
        self._private = {str(store.root.absolute()): "<results>", str(store.root): "<results>", **(private or {})}
        if data_root is not None:
            self._private |= {str(data_root.absolute()): "<data-root>", str(data_root): "<data-root>"}
        self._truths: dict[str, Truth | NotThere] = {}

    def cell(self, record: Record) -> CellEvidence:
        """Predictions and ground truth of a record.

        Raises:
            NotThere: they are not in the store, or the data set is not found.
        """
        if record.get("status") != "ok":
            raise NotThere(f"the run is {record.get('status')}")
        node = record.get("nodes", {}).get("predict")
        if node is None:
            raise NotThere("the record names no predictions: the suite did not ask for scores")
        try:
            if self._store.result(node) is None:
                raise NotThere("its predictions are not in the store")
            truth = self._truth(record)
            records = list(iter_predictions(self._store.folder(node) / PREDICTIONS_FOLDER))
        except (StoreError, DataError) as error:
            raise NotThere(self._scrubbed(error)) from error
        if sorted(record["image_id"] for record in records) != list(truth.image_ids):
            raise NotThere("its predictions are of other images than the data set that is found here")
        has_masks = truth.has_masks and all(record["segmentation"] is not None for record in records)
        results = to_coco_results(records)
        if truth.class_agnostic:
            results = [{**result, "category_id": 1} for result in results]
        if unknown := {result["category_id"] for result in results} - truth.category_names.keys():
            numbers = ", ".join(str(number) for number in sorted(unknown)[:_MAX_NAMED])
            raise NotThere(f"its predictions are of classes that the data set found here does not have: {numbers}")
        return CellEvidence(record, truth, "segm" if has_masks else "bbox", tuple(_counting(results, truth)))

    def losses(self, record: Record) -> Losses:
        """The losses of a record's training.

        Raises:
            NotThere: there was no training, or its folder is not in the store.
        """
        node = record.get("nodes", {}).get("train")
        if node is None:
            raise NotThere("nothing was trained: the weights come from a file")
        path = self._store.folder(node) / LOSSES_NAME
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return _losses(node, lines)
        except FileNotFoundError as error:
            raise NotThere(f"the losses of {node} are not in the store") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NotThere(f"the losses of {node} cannot be read: {LOSSES_NAME} is damaged") from error

    def _truth(self, record: Record) -> Truth:
        data = self._configs.get(str(record.get("run_id"))) or record.get("config", {}).get("data", {})
        dataset = str(record.get("nodes", {}).get("dataset"))
        key = json.dumps([data, dataset], sort_keys=True)
        if key not in self._truths:
            try:
                self._truths[key] = self._read_truth(DataConfig.model_validate(data), dataset)
            except NotThere as reason:
                self._truths[key] = reason
            except (DiffInstError, OSError, ValueError) as error:
                self._truths[key] = NotThere(self._scrubbed(error))
        found = self._truths[key]
        if isinstance(found, NotThere):
            raise found
        return found

    def _read_truth(self, data: DataConfig, dataset: str) -> Truth:
        root = self._data_root
        if data.dataset == "shapes":
            # Looking must not generate: the set is in the folder of its node, or it is not there.
            if self._store.result(dataset) is None:
                raise NotThere("its data set is not in the store")
            root = self._store.folder(dataset)
        paths = catalog.resolve(data, "val", root)
        self._check_annotations(paths.annotations, dataset)
        form = catalog.annotation_format(data)
        read: CocoAnnotations
        if form == "lvis":
            read = read_lvis(paths.annotations, skip_invalid=data.skip_invalid)
        else:
            read = read_annotations(paths.annotations, skip_invalid=data.skip_invalid)
        ids = sorted(read.images) if paths.image_ids is None else sorted(set(paths.image_ids))
        if any(image_id not in read.images for image_id in ids):
            raise NotThere("the annotations that are found here do not hold all images of the id list")
        content = ground_truth(read, ids, class_agnostic=data.class_agnostic)
        if data.class_agnostic:
            content["categories"] = [{"id": 1, "name": CLASS_AGNOSTIC_NAME}]
        pictures = {number: paths.images / read.images[number].file_name for number in ids}
        opened: dict[int, frozenset[int]] = {}
        known: dict[int, frozenset[int]] | None = None
        if isinstance(read, LvisAnnotations):
            content["annotations"] = [item for item in content["annotations"] if item["area"] > 0]
            present: dict[int, set[int]] = defaultdict(set)
            for item in content["annotations"]:
                present[item["image_id"]].add(item["category_id"])
            opened = {number: read.not_exhaustive[number] for number in ids if read.not_exhaustive[number]}
            known = {number: read.negative[number] | present[number] for number in ids}
            # COCO's images may lie in one folder.
            pictures = {
                number: path if path.is_file() else paths.images / path.name for number, path in pictures.items()
            }
        return Truth(content, tuple(ids), pictures, read.has_masks, data.class_agnostic, form, opened, known)

    def _check_annotations(self, path: Path, dataset: str) -> None:
        """Refuse annotations other than those that were scored, where the store knows these."""
        node = self._store.result(dataset)
        split = node.outputs.get("splits", {}).get("val", {}) if node is not None else {}
        scored = split.get("annotations_sha256")
        if scored is None or not path.is_file():
            return  # a file that is missing is told by those who read it
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != scored:
            raise NotThere(
                f"{path.name} has changed since its predictions were scored: SHA-256 {found[:12]} instead of "
                f"{scored[:12]}. Restore the file, or score again with run-suite"
            )

    def _scrubbed(self, error: Exception) -> str:
        return str(scrub(_reason(error), self._private))


def match_class(overlaps: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matching of the COCO evaluation, for `bench.stats.breakdown`, which does not know the evaluator."""
    return match_greedily(overlaps, is_crowd, thresholds)


def region_mask(item: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of an annotation or a result."""
    return decode_segmentation(item["segmentation"], *size)


def _counting(results: list[dict[str, Any]], truth: Truth) -> list[dict[str, Any]]:
    """Without what LVIS leaves out: more than 300 an image, empty masks, classes of which an image says nothing."""
    if truth.known_categories is None:
        return results
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    kept = []
    for image_id, entries in by_image.items():
        best = sorted(entries, key=lambda entry: -entry["score"])[:_LVIS_DETECTIONS]
        kept += [
            entry for entry in best if entry["category_id"] in truth.known_categories[image_id] and not _is_empty(entry)
        ]
    return kept


def _is_empty(result: dict[str, Any]) -> bool:
    if "segmentation" in result:
        return int(coco_mask.area(result["segmentation"])) == 0
    return bool(result["bbox"][2] * result["bbox"][3] <= 0)


def _losses(node: str, lines: list[dict[str, Any]]) -> Losses:
    if not lines:
        raise ValueError("no lines")
    parts: dict[str, list[float]] = {}
    total = []
    for position, line in enumerate(lines):
        values = {name: float(value) for name, value in line["losses"].items()}
        total.append(sum(values.values()))
        for name, value in values.items():
            # 'loss_ce_0' is that of the first stage; 'loss_ce' of the last.
            stem = name.rstrip("0123456789").removesuffix("_").removeprefix("loss_")
            series = parts.setdefault(stem, [0.0] * len(lines))
            series[position] += value
    iterations = tuple(int(line["iteration"]) for line in lines)
    return Losses(node, iterations, tuple(total), {name: tuple(values) for name, values in parts.items()})


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
