from __future__ import annotations

import json
from pathlib import Path

from coco_files import block
from lvis_files import federated_scene

from diffinst.config import DataConfig
from diffinst.evaluation import coco_ap, lvis_ap
from diffinst.evaluation.scoring import metric_names, score_split

FILES = {"train_annotations": "a", "train_images": "a", "val_annotations": "a", "val_images": "a"}
LVIS = DataConfig(dataset="custom", annotation_format="lvis", **FILES)
COCO = DataConfig(dataset="custom", **FILES)


def test_the_annotations_decide_how_they_are_scored(tmp_path: Path) -> None:
    content, records = federated_scene(0)
    for image in content["images"]:
        image["file_name"] = "x.jpg"
    path = tmp_path / "both.json"
    path.write_text(json.dumps(content))
    lvis, coco = (score_split(data, path, records) for data in (LVIS, COCO))
    assert lvis == lvis_ap.score_lvis(path, records)
    assert coco == coco_ap.score_coco(path, records)
    assert (tuple(lvis.metrics), tuple(coco.metrics)) == (metric_names(LVIS), metric_names(COCO))
    assert metric_names(DataConfig(dataset="lvis_v05")) == metric_names(LVIS)


def test_settings_reach_the_scores(tmp_path: Path) -> None:
    content, records = federated_scene(1)
    content["annotations"].append(block(1000, 1, 99, (0, 0, 5, 5)))
    for image in content["images"]:
        image["file_name"] = "x.jpg"
    path = tmp_path / "both.json"
    path.write_text(json.dumps(content))
    changes = {"skip_invalid": True}
    for data in (LVIS, COCO):
        scores = score_split(
            data.model_copy(update=changes), path, records[:3], iou_types=("bbox",), image_ids=[1, 2, 3]
        )
        assert scores.num_images == 3
        assert set(scores.metrics) == {name for name in metric_names(data) if name.startswith("bbox/")}
    agnostic = score_split(COCO.model_copy(update=changes | {"class_agnostic": True}), path, records)
    assert set(agnostic.per_class["bbox"]) == {"object"}
