"""Time of what the harness does to many runs: scoring, planning 10,000 of them, tables and comparisons of 10,000."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_records import MACHINE, timed_record
from report_records import make_record

from bench.calibration import Floor, Noise
from bench.compare import compare
from bench.diffbench import main
from bench.plan import build_plan
from bench.record import dump_json
from bench.report.build import read_records
from bench.report.tables import grid_table, long_table, to_csv
from bench.stats.bootstrap import bootstrap
from bench.suite import load_suite
from diffinst.evaluation.coco_ap import score_coco
from diffinst.evaluation.matches import MatchTable, build_matches
from diffinst.evaluation.predictions import to_coco_results
from diffinst.ops.rle import encode_masks

pytestmark = pytest.mark.bench

NUM_RECORDS = 10_000
MAX_SECONDS = 5.0  # of CPU time: what others do on the machine is none of a record's business
BUSY = 4  # how many times as long a busy machine may take for whole commands: its caches and clock are shared


def on_cpu(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, adding the CPU time of each call to `seconds`."""

    def call(*arguments: Any, **settings: Any) -> Any:
        start = time.process_time()
        found = function(*arguments, **settings)
        seconds.append(time.process_time() - start)
        return found

    return call


def within(what: str, seconds: float, aim: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Tell the CPU time of one go through all beside its aim; it may be more where the machine is busy."""
    limit = BUSY * aim
    told = f"{what}: {seconds:.1f} s of CPU time for {NUM_RECORDS:,} (aim {aim:.0f} s, limit {limit:.0f} s)"
    with capsys.disabled():
        sys.stdout.write(f"\n{told}\n")
    assert seconds < limit, told


def squares(generator: np.random.Generator, count: int, size: int = 64) -> tuple[np.ndarray, list[list[float]]]:
    """Masks of squares and their boxes (xywh)."""
    masks, boxes = np.zeros((count, size, size), dtype=bool), []
    for mask in masks:
        x, y, side = (int(value) for value in generator.integers(4, size // 2, 3))
        mask[y : y + side, x : x + side] = True
        boxes.append([float(x), float(y), float(side), float(side)])
    return masks, boxes


@pytest.fixture(scope="module")
def scene() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of 100 images with 3 instances each, and 10 detections an image."""
    generator = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    predictions = []
    for image_id in range(1, 101):
        masks, boxes = squares(generator, 10)
        encoded = encode_masks(masks)
        for box, segmentation in zip(boxes[:3], encoded):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1 + len(annotations) % 4,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        predictions.append(
            {
                "image_id": image_id,
                "category_id": generator.integers(1, 5, 10).tolist(),
                "score": generator.random(10).tolist(),
                "bbox": boxes,
                "segmentation": encoded,
            }
        )
    images = [{"id": number, "height": 64, "width": 64, "file_name": f"{number}.png"} for number in range(1, 101)]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 5)]
    return {"images": images, "annotations": annotations, "categories": categories}, predictions


def test_scoring(benchmark: Any, scene: Any) -> None:
    content, predictions = scene
    scores = benchmark(lambda: score_coco(copy.copy(content), predictions))
    assert scores.num_images == 100


def test_matching_and_resampling(benchmark: Any, scene: Any) -> None:
    content, predictions = scene
    results = to_coco_results(predictions)

    def run() -> Any:
        matches = build_matches(content, results, range(1, 101), "segm")
        return bootstrap(matches, num_resamples=200)

    assert benchmark(run)["AP"].count == 100


def result_like_coco_val(num_images: int = 5000, detections: int = 60, num_categories: int = 80) -> MatchTable:
    """Matches of as many images, classes and instances as COCO val2017 has."""
    generator = np.random.default_rng(0)
    count = num_images * detections
    category = generator.integers(0, num_categories, count).astype(np.int32)
    score = generator.beta(1, 3, count)
    order = np.lexsort((-score, category))
    # 36,000 instances, found at falling rates as the IoU asked for rises.
    quality = np.where(generator.random(count) < 0.1, generator.random(count) * 0.6 + 0.4, 0.0)[order]
    thresholds = np.linspace(0.5, 0.95, 10)
    return MatchTable(
        image_ids=np.arange(1, num_images + 1),
        category_ids=np.arange(1, num_categories + 1),
        thresholds=thresholds,
        image=np.repeat(np.arange(num_images, dtype=np.int32), detections)[order],
        category=category[order],
        score=score[order],
        matched=quality[None] >= thresholds[:, None],
        ignored=np.zeros((10, count), dtype=bool),
        num_instances=generator.poisson(0.09, (num_categories, num_images)).astype(np.int16),
    )


def test_a_thousand_resamples_of_a_result_like_coco_val(benchmark: Any) -> None:
    matches = result_like_coco_val()
    found = benchmark.pedantic(bootstrap, (matches,), {"num_resamples": 1000}, rounds=1, iterations=1)
    assert found["AP"].count == 5000
    if benchmark.stats is not None:  # it is with --benchmark-disable
        assert benchmark.stats.stats.min < 10


def test_planning_10_000_runs(benchmark: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        "name: many\ndata: {dataset: shapes}\naxes:\n  product:\n"
        f"    num_proposals: {list(range(1, 101))}\n    sampling_steps: {list(range(1, 101))}\n"
    )
    seconds: list[float] = []
    plan = benchmark.pedantic(on_cpu(lambda: build_plan(load_suite(path)), seconds), rounds=3)
    assert len(plan.cells) == NUM_RECORDS
    within("plan", min(seconds), 2.0, capsys)


@pytest.fixture(scope="module")
def sides() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """5,000 records a side, with 60 timings each."""
    generator = np.random.default_rng(0)
    base, head = (
        [timed_record(number, median_s=0.01, generator=generator) for number in range(NUM_RECORDS // 2)]
        for _ in range(2)
    )
    return base, head


def test_comparing_10_000_records(benchmark: Any, sides: Any) -> None:
    floor = Floor(noise=0.02, degrees_of_freedom=4, scale="log")
    noise = Noise({MACHINE: {"latency_s/total": floor}})
    seconds: list[float] = []
    found = benchmark.pedantic(on_cpu(compare, seconds), (*sides,), {"noise": noise}, rounds=3)
    assert {row.metric for row in found.rows} >= {"latency_s/total", "segm/AP"}
    assert min(seconds) < MAX_SECONDS


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """A hundred values of two axes each."""
    return [make_record(1 + number % 100, 1 + number // 100) for number in range(NUM_RECORDS)]


def test_all_cells_of_10_000_records(benchmark: Any, cells: Any) -> None:
    seconds: list[float] = []
    table = benchmark.pedantic(on_cpu(long_table, seconds), (cells,), rounds=2)
    assert min(seconds) < MAX_SECONDS
    assert len(to_csv(table).splitlines()) == 1 + NUM_RECORDS


def test_a_grid_of_10_000_records(benchmark: Any, cells: Any) -> None:
    settings = {"rows": "num_proposals", "columns": "sampling_steps", "metric": "segm/AP"}
    seconds: list[float] = []
    table = benchmark.pedantic(on_cpu(grid_table, seconds), (cells,), settings, rounds=2)
    assert min(seconds) < MAX_SECONDS
    assert (len(table.rows), len(table.columns)) == (100, 101)


REAL = Path(__file__).parents[2] / "results/quickstart/intel-xeon-2c-30512d"


@pytest.fixture(scope="module")
def real_folder() -> Iterator[Path]:
    """A suite's folder with 5,000 records each of 'base' and 'head', as large as committed ones: 600 MB."""
    found = [json.loads(path.read_text()) for path in sorted(REAL.glob("*.json"))]
    committed = [record for record in found if record["status"] == "ok" and record["resamples"]]
    with tempfile.TemporaryDirectory() as root:
        for side, factor in (("base", 1.0), ("head", 1.001)):
            folder = Path(root) / "quickstart" / side
            folder.mkdir(parents=True)
            for number in range(NUM_RECORDS // 2):
                record = copy.copy(committed[number % len(committed)])
                record["run_id"] = f"{number:016x}"
                record["axes"] = record["axes"] | {"num_proposals": 1 + number % 50, "sampling_steps": 1 + number // 50}
                record["metrics"] = {
                    name: entry if entry["value"] is None else entry | {"value": entry["value"] * factor}
                    for name, entry in record["metrics"].items()
                }
                (folder / f"{record['run_id']}.json").write_text(dump_json(record))
        yield Path(root) / "quickstart"


def test_reading_10_000_records(benchmark: Any, real_folder: Path, capsys: Any) -> None:
    seconds: list[float] = []
    read = on_cpu(read_records, seconds)
    found = benchmark.pedantic(read, (real_folder.parent, real_folder.name), rounds=1, iterations=1)
    assert {machine: len(records) for machine, records in found.items()} == dict.fromkeys(("base", "head"), 5000)
    within("reading", seconds[0], 3.0, capsys)


@pytest.mark.parametrize("form", ["csv", "all"])
def test_the_command_that_reads_10_000_records_into_tables(
    benchmark: Any, real_folder: Path, tmp_path: Path, capsys: Any, form: str
) -> None:
    seconds: list[float] = []
    run = on_cpu(main, seconds)
    where = ["--print", form] if form == "csv" else ["--out", str(tmp_path)]
    assert benchmark.pedantic(run, (["table", str(real_folder), *where],), rounds=1, iterations=1) == 0
    assert capsys.readouterr().out.count("\n") > NUM_RECORDS
    within(f"table, {form}", seconds[0], MAX_SECONDS, capsys)


def test_the_command_that_lists_10_000_records(benchmark: Any, real_folder: Path, capsys: Any) -> None:
    seconds: list[float] = []
    run = on_cpu(main, seconds)
    assert benchmark.pedantic(run, (["export", str(real_folder)],), rounds=1, iterations=1) == 0
    assert capsys.readouterr().out.count("\n") == 1 + NUM_RECORDS
    within("list", seconds[0], MAX_SECONDS, capsys)


def test_the_command_that_reads_and_compares_10_000_records(benchmark: Any, real_folder: Path, capsys: Any) -> None:
    seconds: list[float] = []
    run = on_cpu(main, seconds)
    arguments = ["compare", str(real_folder / "base"), str(real_folder / "head")]
    assert benchmark.pedantic(run, (arguments,), rounds=1, iterations=1) in (0, 1, 5, 6)
    assert capsys.readouterr().out.count("\n") > 100
    within("compare", seconds[0], MAX_SECONDS, capsys)
