from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from claim_records import record_of, write_records

from bench.claims import Claim, load_claims
from bench.errors import SuiteError
from bench.ledger import (
    Attempt,
    attempt,
    check_ties,
    command_of,
    find_records,
    judgement_of,
    load_paper_suites,
    make_ledger,
    needs_of,
)
from bench.suite import Suite, load_suite
from bench.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = load_claims(ROOT / "suites/claims")
R50 = "diffinst-coco-val-r50-1"


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(ROOT / "suites/paper/coco_val.yaml")


@pytest.fixture(scope="module")
def trained() -> Suite:
    return load_suite(ROOT / "suites/paper/coco_val_trained.yaml", ["seeds=[0, 1, 2]"])


@pytest.fixture(scope="module")
def baseline() -> Suite:
    return load_suite(ROOT / "suites/paper/baseline.yaml")


def cells_of(suite: Suite, claim: str) -> list:
    (tie,) = [tie for tie in suite.claims or () if tie.claim == claim]
    return [cell for cell in suite.cells if tie.fits(cell.axes)]


def judged(
    tmp_path: Path, suite: Suite, values: list[float], claim: str = R50, **changes: Any
) -> tuple[Verdict, str, Attempt]:
    cells = cells_of(suite, claim)
    name = CLAIMS[claim].fields.metric or "segm/AP"
    records = [record_of(suite, cell, value, metric_name=name, **changes) for cell, value in zip(cells, values)]
    write_records(tmp_path, records)
    made = attempt(suite, cells, find_records(tmp_path, suite.name), CLAIMS[claim])
    judgement = judgement_of(CLAIMS[claim], made)
    return judgement.verdict, judgement.reason, made


class TestPublishedWeights:
    def test_three_seeds_near_the_value_reproduce_it(self, tmp_path: Path, suite: Suite) -> None:
        verdict, reason, made = judged(tmp_path, suite, [0.373, 0.374, 0.372])
        assert verdict is Verdict.REPRODUCED
        assert made.measured is not None
        assert (made.measured.value, made.measured.runs) == (pytest.approx(37.3), 3)
        # Standard deviation 0.1: 4.303 * 0.1 / sqrt(3) = 0.248.
        assert made.measured.interval == pytest.approx((37.3 - 0.2484, 37.3 + 0.2484), abs=1e-3)
        assert "(3 runs)" in reason

    def test_one_seed_is_inconclusive(self, tmp_path: Path, suite: Suite) -> None:
        verdict, reason, _ = judged(tmp_path, suite, [0.373])
        assert verdict is Verdict.INCONCLUSIVE
        assert "no interval" in reason

    def test_one_seed_far_off_is_not_reproduced(self, tmp_path: Path, suite: Suite) -> None:
        assert judged(tmp_path, suite, [0.351])[0] is Verdict.NOT_REPRODUCED

    def test_the_earlier_value_is_recognised(self, tmp_path: Path, suite: Suite) -> None:
        verdict, reason, _ = judged(tmp_path, suite, [0.351, 0.352, 0.350])
        assert verdict is Verdict.NOT_REPRODUCED
        assert "agrees with 35.1, which the same source gave from 2022-12-09 to 2022-12-22" in reason

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"data__dataset": "coco_mini"}, "data coco_mini, not coco"),
            ({"images": 4999}, "4999 of 5000 images"),
            ({"images": None}, "the record does not say on how many images"),
            ({"data__val_image_ids": "ids.txt"}, "a list of images, not the whole split"),
            ({"data__class_agnostic": True}, "class-agnostic"),
            ({"model__weights": "none"}, "trained here; it takes the published weights"),
            ({"model__weights": "weights/mine.safetensors"}, "weights mine.safetensors, not the published diffinst_"),
            ({"model__backbone": "resnet101"}, "backbone resnet101, not resnet50"),
            ({"sampler__sampling_steps": 2}, "sampling_steps 2, not 1"),
            ({"sampler__num_proposals": 300}, "num_proposals 300, not 500"),
            ({"sampler__tta": True}, "with test-time augmentation"),
            ({"sampler__eta": 0.0}, "other settings than the suite's: sampler.eta 0 instead of 1"),
            ({"data__shortest_edge_test": 400}, "data.shortest_edge_test 400 instead of 800"),
        ],
    )
    def test_another_measurement_reproduces_nothing(
        self, tmp_path: Path, suite: Suite, changes: dict[str, Any], why: str
    ) -> None:
        verdict, reason, _ = judged(tmp_path, suite, [0.373, 0.374, 0.372], **changes)
        assert verdict is Verdict.INCONCLUSIVE
        assert why in reason

    @pytest.mark.parametrize(
        "changes",
        [
            {"model__weights": "<data-root>/weights/diffinst_coco_res50.safetensors"},
            {"train__iterations": 7},  # nothing is trained
            {"data__eval_batch_size": 4},
        ],
    )
    def test_what_changes_no_number_does_not_count(self, tmp_path: Path, suite: Suite, changes: dict[str, Any]) -> None:
        assert judged(tmp_path, suite, [0.373, 0.374, 0.372], **changes)[0] is Verdict.REPRODUCED

    def test_a_record_from_before_a_field_has_its_default(self, tmp_path: Path, suite: Suite) -> None:
        cells = cells_of(suite, R50)
        records = [record_of(suite, cell, 0.373) for cell in cells]
        for record in records:
            del record.config["sampler"]["tta"]
        write_records(tmp_path, records)
        made = attempt(suite, cells, find_records(tmp_path, suite.name), CLAIMS[R50])
        assert made.measured is not None
        assert made.measured.objections == ()

    def test_an_interval_in_the_record_counts_for_a_single_run(self, suite: Suite) -> None:
        from bench.ledger import FoundRecord

        cell = cells_of(suite, R50)[0]
        record = record_of(suite, cell, 0.373).model_dump(mode="json")
        record["metrics"]["segm/AP"] |= {"standard_error": 0.001, "error_of": "images"}
        made = attempt(suite, [cell], [FoundRecord(record, Path("results/coco_val/box/1.json"))], CLAIMS[R50])
        assert made.measured is not None
        assert made.measured.interval == pytest.approx((37.3 - 0.196, 37.3 + 0.196), abs=1e-4)
        assert made.measured.basis == "images of one run"
        assert judgement_of(CLAIMS[R50], made).verdict is Verdict.REPRODUCED


class TestTraining:
    claim = "diffinst-coco-val-swinb-1"

    def test_three_full_trainings_reproduce(self, tmp_path: Path, trained: Suite) -> None:
        verdict, reason, _ = judged(tmp_path, trained, [0.466, 0.467, 0.465], self.claim)
        assert verdict is Verdict.REPRODUCED
        assert "(3 trainings)" in reason

    def test_one_training_is_inconclusive(self, tmp_path: Path, trained: Suite) -> None:
        assert judged(tmp_path, trained, [0.466], self.claim)[0] is Verdict.INCONCLUSIVE

    def test_errors_over_images_say_nothing_about_another_training(self, trained: Suite) -> None:
        from bench.ledger import FoundRecord

        cell = cells_of(trained, self.claim)[0]
        record = record_of(trained, cell, 0.466).model_dump(mode="json")
        record["metrics"]["segm/AP"] |= {"standard_error": 0.001, "error_of": "images"}
        made = attempt(trained, [cell], [FoundRecord(record, Path("1.json"))], CLAIMS[self.claim])
        assert made.measured is not None
        assert made.measured.interval is None

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"train__iterations": 224_999}, "trained on 7199968 images in all, of the 7200000 of the published"),
            ({"model__weights": "mine.safetensors"}, "weights from a file, of whose training nothing is recorded"),
            ({"data__train_image_ids": "ids.txt"}, "trained on a list of images"),
        ],
    )
    def test_a_lesser_training_reproduces_nothing(
        self, tmp_path: Path, trained: Suite, changes: dict[str, Any], why: str
    ) -> None:
        verdict, reason, _ = judged(tmp_path, trained, [0.466, 0.467, 0.465], self.claim, **changes)
        assert verdict is Verdict.INCONCLUSIVE
        assert why in reason

    def test_evaluation_seeds_of_one_training_make_no_interval(self, tmp_path: Path, suite: Suite) -> None:
        cells = cells_of(suite, self.claim)
        write_records(tmp_path, [record_of(suite, cell, 0.466, model__weights="none") for cell in cells])
        made = attempt(suite, cells, find_records(tmp_path, suite.name), CLAIMS[self.claim])
        assert made.measured is not None
        assert (made.measured.runs, made.measured.interval) == (3, None)

    def test_an_assumed_configuration_cannot_refute(self, tmp_path: Path, trained: Suite) -> None:
        verdict, reason, _ = judged(tmp_path, trained, [0.40, 0.401, 0.402], "diffinst-coco-val-swinl-1")
        assert verdict is Verdict.INCONCLUSIVE
        assert "assumed here: everything of Swin-B" in reason


class TestOtherEngines:
    def test_what_draws_nothing_needs_one_run(self, tmp_path: Path, baseline: Suite) -> None:
        verdict, reason, _ = judged(tmp_path, baseline, [0.3722], "detectron2-r50-mask")
        assert verdict is Verdict.REPRODUCED
        assert "nothing is drawn at random" in reason

    def test_other_weights(self, tmp_path: Path, baseline: Suite) -> None:
        change = {"engine__engine_weights": "weights/model_final_a3ec72.pkl"}
        verdict, reason, _ = judged(tmp_path, baseline, [0.3722], "detectron2-r50-mask", **change)
        assert verdict is Verdict.INCONCLUSIVE
        assert "weights model_final_a3ec72.pkl, not the published model_final_f10217.pkl" in reason

    def test_another_engine(self, tmp_path: Path, baseline: Suite) -> None:
        change = {"engine__name": "torchvision"}
        assert (
            "engine torchvision, not detectron2"
            in judged(tmp_path, baseline, [0.37], "detectron2-r50-mask", **change)[1]
        )


class TestSeveralMachines:
    def test_a_whole_measurement_goes_before_a_later_one_of_something_else(self, tmp_path: Path, suite: Suite) -> None:
        cells = cells_of(suite, R50)
        write_records(tmp_path, [record_of(suite, cell, 0.373) for cell in cells], "first")
        late = {"images": 20, "started_at": "2026-02-02T00:00:00Z"}
        write_records(tmp_path, [record_of(suite, cell, 0.5, **late) for cell in cells], "second")
        made = attempt(suite, cells, find_records(tmp_path, suite.name), CLAIMS[R50])
        assert {found.machine for found in made.records} == {"first"}
        assert made.others == ("second",)

    def test_of_whole_ones_the_latest_counts_and_never_the_nearest(self, tmp_path: Path, suite: Suite) -> None:
        cells = cells_of(suite, R50)
        write_records(tmp_path, [record_of(suite, cell, 0.373) for cell in cells], "near")
        late = "2026-02-02T00:00:00Z"
        write_records(tmp_path, [record_of(suite, cell, 0.30, started_at=late) for cell in cells], "far")
        made = attempt(suite, cells, find_records(tmp_path, suite.name), CLAIMS[R50])
        assert {found.machine for found in made.records} == {"far"}


class TestWithoutARecord:
    def test_what_it_takes_depends_on_the_suite_alone(self, suite: Suite) -> None:
        cells = cells_of(suite, R50)
        made = attempt(suite, cells, [], CLAIMS[R50])
        assert made.measured is None
        assert made.reason == (
            "no record; it takes data coco, weights/diffinst_coco_res50.safetensors "
            "(published: the README's file host, password in the README)"
        )
        assert judgement_of(CLAIMS[R50], made).verdict is Verdict.NOT_ATTEMPTED

    def test_the_command_runs_just_these_cells(self, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        command = command_of(suite, cells_of(suite, R50))
        assert command == (
            "run-suite suites/paper/coco_val.yaml --data-root DIR --only 'sampling_steps=1 backbone=resnet50'"
        )

    def test_unpublished_weights_and_trainings(self, suite: Suite) -> None:
        swin = "diffinst-coco-val-swinb-1"
        assert needs_of(cells_of(suite, swin)[0], CLAIMS[swin]).endswith("swinb.safetensors (not published)")
        trained = load_suite(ROOT / "suites/paper/lvis.yaml")
        assert needs_of(trained.cells[0]) == (
            "data lvis, a training of 135000 iterations of 32 images, weights/imagenet_res50.safetensors"
        )

    def test_a_failed_run_says_why(self, tmp_path: Path, suite: Suite) -> None:
        cells = cells_of(suite, R50)
        record = record_of(suite, cells[0], 0.3)
        failed = record.model_copy(update={"status": "failed", "reason": "out of memory\ntrace", "metrics": {}})
        write_records(tmp_path, [failed])
        made = attempt(suite, cells, find_records(tmp_path, suite.name), CLAIMS[R50])
        assert made.reason == "failed on box: out of memory"


class TestLedger:
    def test_every_claim_has_a_row_not_attempted_or_better(self, tmp_path: Path) -> None:
        rows = make_ledger(CLAIMS, load_paper_suites(ROOT / "suites/paper"), tmp_path)
        assert [row.claim.id for row in rows if not row.claim.is_superseded] == list(CLAIMS)
        counts = {verdict: sum(row.judgement.verdict is verdict for row in rows) for verdict in Verdict}
        assert {verdict: count for verdict, count in counts.items() if count} == {
            Verdict.CONTRADICTED: 8 + 10,
            Verdict.NOT_CHECKABLE: 4 + 4 + 3,
            Verdict.NOT_ATTEMPTED: 8 + 3 + 12 + 4,
        }
        assert all(row.judgement.reason for row in rows)

    def test_every_claim_that_can_be_checked_is_tied_to_a_suite(self, tmp_path: Path) -> None:
        rows = make_ledger(CLAIMS, load_paper_suites(ROOT / "suites/paper"), tmp_path)
        assert all(row.attempt is not None for row in rows if row.judgement.verdict is Verdict.NOT_ATTEMPTED)

    def test_a_claim_that_is_trained_for_names_the_training(self, tmp_path: Path) -> None:
        rows = make_ledger(CLAIMS, load_paper_suites(ROOT / "suites/paper"), tmp_path)
        by_id = {row.claim.id: row for row in rows}
        suites = [by_id[f"diffinst-coco-val-{name}-1"].attempt.suite.name for name in ("r50", "swinb")]  # type: ignore[union-attr]
        assert suites == ["coco_val", "coco_val_trained"]

    def test_a_measurement_reaches_its_row(self, tmp_path: Path, suite: Suite) -> None:
        write_records(tmp_path, [record_of(suite, cell, 0.373) for cell in cells_of(suite, R50)])
        rows = make_ledger(CLAIMS, load_paper_suites(ROOT / "suites/paper"), tmp_path)
        row = next(row for row in rows if row.claim.id == R50)
        assert row.judgement.verdict is Verdict.REPRODUCED

    def test_an_unknown_claim_is_named_with_its_place(self, suite: Suite) -> None:
        some: dict[str, Claim] = {name: claim for name, claim in CLAIMS.items() if name != R50}
        with pytest.raises(
            SuiteError, match=r"coco_val.yaml:\d+:\d+: claims: no claim has the id 'diffinst-coco-val-r50-1'"
        ):
            check_ties(suite, some)
