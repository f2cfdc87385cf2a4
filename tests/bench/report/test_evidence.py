from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lvis_files import federated_scene
from report_store import GOOD, add_dataset, add_predictions, make_results, predictions

from bench.report.evidence import EvidenceReader, NotThere, match_class
from bench.report.html.evidence_views import precision_curve
from bench.stats.breakdown import error_breakdown
from bench.store import Store
from diffinst.config import DataConfig
from diffinst.evaluation.lvis_ap import score_lvis


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("masks", [True, False])
def test_errors_come_to_the_ap50_of_the_record(tmp_path: Path, class_agnostic: bool, masks: bool) -> None:
    results, records = make_results(tmp_path, masks=masks, class_agnostic=class_agnostic)
    reader = EvidenceReader(Store(results))
    for record in records:
        cell = reader.cell(record)
        assert cell.iou_type == ("segm" if masks else "bbox")
        if masks:
            expected = record["metrics"]["segm/AP50"]["value"]
            assert error_breakdown(cell.scenes(), match_class).ap == pytest.approx(expected, abs=1e-12)


def test_one_ground_truth_serves_all_cells_and_its_pictures_can_be_read(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    reader = EvidenceReader(Store(results))
    one, other = (reader.cell(record).truth for record in records)
    assert one is other
    assert one.image_ids == (5, 8, 11)
    assert one.category_names == {3: "dog", 7: "cat"}
    assert one.picture(8).shape == (20, 30, 3)
    one.pictures[8].unlink()  # type: ignore[attr-defined]
    with pytest.raises(NotThere, match="the picture of image 8 cannot be read"):
        one.picture(8)


def test_paths_of_a_plan_go_before_those_of_the_record(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    here = records[0]["config"]["data"]
    moved = {**here, "val_annotations": "<path>/instances.json", "val_images": "<path>/images"}
    records[0]["config"]["data"] = moved
    with pytest.raises(NotThere, match="instances.json: no such file"):
        EvidenceReader(Store(results)).cell(records[0])
    configs = {records[0]["run_id"]: here}
    assert EvidenceReader(Store(results), configs=configs).cell(records[0]).truth.image_ids == (5, 8, 11)


def test_what_is_not_there_is_said_in_a_line_without_paths(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    store = Store(results)
    failed = {**records[0], "status": "failed"}
    unscored = {**records[0], "nodes": {}}
    gone = {**records[0], "nodes": {"predict": "predict-9", "dataset": "dataset-1"}}
    shard = store.folder("predict-1") / "predictions/predictions-00000.jsonl"
    damaged = shard.read_bytes()
    shard.write_bytes(damaged.replace(b"0.9", b"0.8", 1))
    reader = EvidenceReader(store, private={str(tmp_path): "<tmp>"})
    expected = {
        "the run is failed": failed,
        "names no predictions": unscored,
        "its predictions are not in the store": gone,
        "predictions-00000.jsonl: is damaged": records[0],
    }
    for message, record in expected.items():
        with pytest.raises(NotThere, match=message) as raised:
            reader.cell(record)
        assert str(tmp_path) not in str(raised.value)
        assert "\n" not in str(raised.value)


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    store = Store(results)
    with store.lock():
        add_predictions(store, "predict-3", predictions({11: [], 5: []}))
    records[0]["nodes"]["predict"] = "predict-3"
    with pytest.raises(NotThere, match="are of other images"):
        EvidenceReader(store).cell(records[0])


def test_annotations_that_changed_since_they_were_scored_are_refused(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    annotations = tmp_path / "data/instances.json"
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(content | {"annotations": content["annotations"][:1]}))
    with pytest.raises(NotThere, match=r"^instances\.json has changed .* SHA-256 .* score again") as raised:
        EvidenceReader(Store(results)).cell(records[0])
    assert "\n" not in str(raised.value)


def test_predictions_of_classes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    store = Store(results)
    annotations = tmp_path / "data/instances.json"
    annotations.write_text(
        annotations.read_text().replace('"category_id": 7', '"category_id": 9').replace('"id": 7', '"id": 9')
    )
    with store.lock():
        add_dataset(store, "dataset-1", annotations)
    with pytest.raises(NotThere, match="are of classes that the data set found here does not have: 7$"):
        EvidenceReader(store).cell(records[0])


def test_the_generated_set_is_never_generated_by_looking_at_it(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    records[0]["config"]["data"] = DataConfig(dataset="shapes").model_dump(mode="json")
    records[0]["nodes"]["dataset"] = "dataset-9"
    before = sorted(results.rglob("*"))
    with pytest.raises(NotThere, match="its data set is not in the store"):
        EvidenceReader(Store(results)).cell(records[0])
    assert sorted(results.rglob("*")) == before


def test_losses_are_summed_over_stages(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    reader = EvidenceReader(Store(results))
    losses = reader.losses(records[0])
    assert losses.iterations == (10, 20, 30)
    assert losses.parts["ce"] == pytest.approx((0.4, 0.2, 4 / 30))
    assert losses.parts["masks"] == (2.0, 2.0, 2.0)
    assert losses.total == pytest.approx((2.4, 2.2, 2 + 4 / 30))
    path = results / ".store/train-1/losses.jsonl"
    for content in ("", "{}\n", "[1]\n", '{"iteration": 1, "losses": {"loss_ce"'):
        path.write_text(content)
        with pytest.raises(NotThere, match="is damaged"):
            reader.losses(records[0])
    path.unlink()
    with pytest.raises(NotThere, match="are not in the store"):
        reader.losses(records[0])
    with pytest.raises(NotThere, match="the weights come from a file"):
        reader.losses({"nodes": {}})


@pytest.mark.parametrize("seed", range(3))
def test_lvis_leaves_out_what_its_scores_leave_out(tmp_path: Path, seed: int) -> None:
    content, made = federated_scene(seed, num_images=6, most=6)
    annotations = tmp_path / "lvis.json"
    annotations.write_text(json.dumps(content))
    (tmp_path / "coco").mkdir()
    scores = score_lvis(annotations, made)
    store = Store(tmp_path / "results")
    with store.lock():
        add_predictions(store, "predict-1", made)
    data = DataConfig(
        dataset="custom",
        annotation_format="lvis",
        val_annotations=str(annotations),
        val_images=str(tmp_path / "coco"),
    )
    record = {
        "status": "ok",
        "run_id": "1",
        "config": {"data": data.model_dump(mode="json")},
        "nodes": {"dataset": "dataset-1", "predict": "predict-1"},
    }
    cell = EvidenceReader(store).cell(record)
    found = error_breakdown(cell.scenes(), match_class)
    assert found.ap == pytest.approx(scores.metrics["segm/AP50"], abs=1e-9)
    # What counts in the match table, too.
    curves = precision_curve(cell, 0)
    assert np.mean(curves) == pytest.approx(scores.metrics["segm/AP50"], abs=1e-9)


def test_detections_beyond_the_limit_do_not_count(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    store = Store(results)
    many = {**GOOD, 8: [(7, 0.5 - i / 1000, (i % 20, 0, i % 20 + 5, 9)) for i in range(130)]}
    with store.lock():
        add_predictions(store, "predict-3", predictions(many))
    records[0]["nodes"]["predict"] = "predict-3"
    cell = EvidenceReader(store).cell(records[0])
    assert len(cell.by_image[8]) == 130
    assert len(cell.scene(8).score) == len(cell.counted(8)) == 100
    assert (cell.matches.image == 1).sum() == 100
