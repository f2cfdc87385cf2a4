"""A results folder with a store: two cells of a tiny data set, with predictions, losses and records, made up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from coco_files import block_mask, rle_of, tiny_content, write_set
from report_records import make_record

from bench.plan import Node
from bench.record import parse_record
from bench.store import NodeResult, Store
from diffinst.config import DataConfig
from diffinst.evaluation.coco_ap import score_coco
from diffinst.evaluation.predictions import PredictionWriter

Box = tuple[int, int, int, int]
SIZE = (20, 30)

# (category, score, box) by image: the first cell finds two of three instances, the second one, and both are wrong once.
GOOD = {11: [(7, 0.9, (2, 4, 12, 14)), (3, 0.8, (10, 2, 30, 8)), (7, 0.3, (20, 10, 30, 20))], 5: [], 8: []}
POOR = {11: [(7, 0.9, (2, 4, 12, 14))], 5: [(7, 0.8, (2, 0, 3, 20))], 8: [(7, 0.7, (0, 10, 30, 20))]}


def predictions(found: dict[int, list[tuple[int, float, Box]]], *, masks: bool = True) -> list[dict[str, Any]]:
    """Prediction records of whole-box masks."""
    return [
        {
            "image_id": image_id,
            "category_id": [category for category, _, _ in items],
            "score": [score for _, score, _ in items],
            "bbox": [[x1, y1, x2 - x1, y2 - y1] for _, _, (x1, y1, x2, y2) in items],
            "segmentation": [rle_of(block_mask(SIZE, box)) for _, _, box in items] if masks else None,
        }
        for image_id, items in found.items()
    ]


def finish(store: Store, node_id: str, files: list[str], outputs: dict[str, Any] | None = None) -> None:
    """Write done.json of a node whose files are there."""
    folder = store.folder(node_id)
    done = NodeResult(
        id=node_id,
        kind=node_id.partition("-")[0],
        spec={},
        inputs=[],
        started_at="2026-01-02T03:04:05Z",
        finished_at="2026-01-02T03:04:06Z",
        duration_s=1.0,
        attempts=1,
        files={name: (folder / name).stat().st_size for name in files},
        outputs=outputs or {},
        environment={},
    )
    (folder / "done.json").write_text(done.model_dump_json())


def add_predictions(store: Store, node_id: str, records: list[dict[str, Any]]) -> None:
    """A finished node of predictions."""
    store.begin(Node(node_id, "predict", (), {}))
    with PredictionWriter(store.folder(node_id) / "predictions") as writer:
        for record in records:
            writer.add(record)
    finish(store, node_id, ["predictions/predictions-00000.jsonl"])


def add_dataset(store: Store, node_id: str, annotations: Path) -> None:
    """A finished node that knows which annotations were scored."""
    store.begin(Node(node_id, "dataset", (), {}))
    digest = hashlib.sha256(annotations.read_bytes()).hexdigest()
    finish(store, node_id, [], {"splits": {"val": {"annotations_sha256": digest}}})


def add_losses(store: Store, node_id: str, iterations: tuple[int, ...] = (10, 20, 30)) -> None:
    """A node of a training with three losses, one of them of two stages."""
    store.begin(Node(node_id, "train", (), {}))
    lines = [
        {"iteration": i, "losses": {"loss_ce": 3.0 / i, "loss_ce_0": 1.0 / i, "loss_masks": 2.0}} for i in iterations
    ]
    (store.folder(node_id) / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_results(root: Path, *, masks: bool = True, **data: Any) -> tuple[Path, list[dict[str, Any]]]:
    """Write a data set, a store and two records below `root`; the results folder and the records.

    Args:
        data: further fields of the data section.
    """
    annotations, images = write_set(root / "data", tiny_content())
    results = root / "results"
    store = Store(results)
    config = DataConfig(
        dataset="custom",
        val_annotations=str(annotations),
        val_images=str(images),
        **data,
    ).model_dump(mode="json")
    records = []
    with store.lock():
        add_dataset(store, "dataset-1", annotations)
        add_losses(store, "train-1")
        for steps, found in ((1, POOR), (2, GOOD)):
            made = predictions(found, masks=masks)
            add_predictions(store, f"predict-{steps}", made)
            scores = score_coco(annotations, made, class_agnostic=bool(data.get("class_agnostic")))
            record = make_record(steps)
            record["config"]["data"] = config
            record["nodes"] = {"dataset": "dataset-1", "train": "train-1", "predict": f"predict-{steps}"}
            record["run_id"] = f"{steps:016x}"
            for name, value in scores.metrics.items():
                if name in record["metrics"]:
                    record["metrics"][name] = {"value": value, "unit": "fraction", "higher_is_better": True}
                    if value is None:
                        record["metrics"][name]["reason"] = scores.reasons[name]
            record["per_class"] = {f"{name}/AP": values for name, values in scores.per_class.items() if values}
            record["samples"] = {"latency_s": {"total": [0.01 * steps, 0.012 * steps, 0.02 * steps]}}
            records.append(record)
            store.write_record(parse_record(record, "test"), "box")
    return results, records
