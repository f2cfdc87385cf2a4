"""What the harness adds to a bare loop of detections: the aim is a hundredth, even of those of the smallest model."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.detectors import Detector, our_detector
from bench.measure.disturbances import Watch
from bench.measure.latency import SCOPES, Timer, measure_latency
from bench.suite import load_suite
from diffinst.build import build_model
from diffinst.data.coco import CocoDataset
from diffinst.data.shapes import generate
from diffinst.engine.evaluate import write_predictions
from diffinst.engine.inference import untimed
from diffinst.evaluation.predictions import to_record
from diffinst.structures import Detections, Sample

pytestmark = pytest.mark.bench

QUICKSTART = Path(__file__).parents[2] / "suites/quickstart.yaml"
NUM_IMAGES = 128
MAX_SHARE = 0.01  # of a detection
BUSY = 4  # times as much may be added on a busy machine
ROUNDS = 5


@dataclass(frozen=True)
class Scene:
    """Images, a detector, what it finds, and its seconds an image."""

    dataset: CocoDataset
    detector: Detector
    found: list[Detections]
    detection_s: float


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The quickest cell of the quickstart suite: 96 x 96 pixels, 20 proposals, one step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = load_suite(QUICKSTART).cells[0].config
    assert (config.sampler.num_proposals, config.sampler.sampling_steps) == (20, 1)
    root = generate(
        tmp_path_factory.mktemp("data") / "shapes",
        num_train=1,
        num_val=NUM_IMAGES,
        image_size=config.data.shapes_image_size,
        seed=0,
    )
    dataset = CocoDataset(root / "annotations/instances_val.json", root / "val", data=config.data, split="val")
    model = build_model(config.model.model_copy(update={"num_classes": dataset.num_classes}))
    detector = our_detector(model, config.sampler)
    samples = [dataset.test_sample(index) for index in range(NUM_IMAGES)]
    found, seconds = [], []
    for sample in samples:
        start = time.process_time()
        found += detector.detect([sample], untimed)
        seconds.append(time.process_time() - start)
    yield Scene(dataset, detector, found, statistics.median(seconds))
    torch.set_num_threads(threads)


def quickest(run: Callable[[], object]) -> float:
    """CPU seconds an image of the best of some rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        run()
        rounds.append((time.process_time() - start) / NUM_IMAGES)
    return min(rounds)


def tell(what: str, added_s: float, scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    share = added_s / scene.detection_s
    told = f"{what}: {1e6 * added_s:.0f} us added to {1e3 * scene.detection_s:.2f} ms of a detection, {share:.2%}"
    with capsys.disabled():
        sys.stdout.write(f"\n{told} (aim {MAX_SHARE:.0%}, limit {BUSY * MAX_SHARE:.0%})\n")
    assert share < BUSY * MAX_SHARE, told


def test_timing_adds_little(benchmark: Any, scene: Scene, capsys: Any) -> None:
    def answer(index: int, timer: Timer) -> object:
        for scope in SCOPES:
            with timer(scope):
                pass
        return scene.found[index]

    def measured() -> object:
        return measure_latency(
            answer, NUM_IMAGES, device="cpu", min_images=NUM_IMAGES - 3, min_seconds=0, watch=Watch("cpu")
        )

    def bare() -> object:
        return [answer(index, untimed) for index in range(NUM_IMAGES)]

    added = quickest(measured) - quickest(bare)
    benchmark.pedantic(measured, rounds=3)
    tell("timing", added, scene, capsys)


def test_predicting_adds_little(benchmark: Any, scene: Scene, tmp_path: Path, capsys: Any) -> None:
    by_id = dict(zip(scene.dataset.image_ids, scene.found))
    folders = (tmp_path / str(number) for number in range(2 * ROUNDS))

    def answer(samples: Sequence[Sample]) -> list[Detections]:
        return [by_id[sample.image_id] for sample in samples]

    def harness() -> object:
        return write_predictions(answer, scene.dataset, next(folders))

    def bare() -> None:
        records = []
        for index in range(NUM_IMAGES):
            sample = scene.dataset.test_sample(index)
            [found] = answer([sample])
            records.append(to_record(sample.image_id, found, scene.dataset.category_ids))
        (tmp_path / "bare.json").write_text(json.dumps(records))

    added = quickest(harness) - quickest(bare)
    benchmark.pedantic(harness, rounds=3)
    tell("predicting", added, scene, capsys)
