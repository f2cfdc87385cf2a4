"""Engines in an interpreter of their own, with a fake one: what it is told, what it may say, and how it may end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import external
from bench.engines import EngineConfig
from bench.errors import PeerCrash, PeerError
from bench.external import latency_outputs, make_job, run_peer, training_step_outputs, write_shards
from diffinst.config import Config
from diffinst.evaluation.predictions import iter_predictions

FAKE = Path(__file__).resolve().parents[1] / "fake_peer.py"
ROOT = Path(__file__).resolve().parents[2]


class Split:
    """Two images of 4 x 6 pixels and two classes."""

    def __init__(self, folder: Path) -> None:
        self.annotations_path = folder / "a.json"
        self.images_dir = folder
        self.image_ids = [3, 8]
        self.class_names = ("one", "two")
        self.category_ids = (1, 5)
        images = [{"id": image_id, "height": 4, "width": 6} for image_id in self.image_ids]
        self.annotations_path.write_text(json.dumps({"images": images}))

    def file_names(self) -> list[str]:
        return ["3.png", "val2017/8.png"]


SIZES = [(4, 6), (4, 6)]


def options(**settings: Any) -> dict[str, Any]:
    engine = EngineConfig(name="detectron2", python=sys.executable, options=settings)
    return {"engine": engine.resolved(), "config": Config().model_dump(mode="json")}


def job(folder: Path, kind: str = "train", measure: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    content = make_job(kind, options(**settings), Split(folder), folder, device="cpu", threads=1, measure=measure)
    content["train"]["iterations"] = 3
    return content


def run(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = {"progress": lambda *_: None, "stop": lambda: False, "runner": FAKE, **changes}
    return run_peer(content, **settings)


def test_a_peer_is_told_what_it_looks_at_and_no_more(tmp_path: Path) -> None:
    content = make_job("predict", options(), Split(tmp_path), tmp_path, device="cpu", threads=2, weights=tmp_path / "w")
    assert content["protocol"] == 1
    assert content["weights"] == str(tmp_path / "w")
    assert (content["image_ids"], content["category_ids"]) == ([3, 8], [1, 5])
    assert content["file_names"] == ["3.png", "val2017/8.png"]
    assert content["sampler"] == {"max_detections": 100, "score_threshold": 0.0}
    assert {"iterations", "learning_rate", "seed", "log_every", "num_workers"} <= content["train"].keys()
    assert content["train"]["clip_gradient_norm"] == 1.0
    assert not {"ota_k", "num_train_proposals", "matcher"} & content["train"].keys()
    assert content["engine"]["recipe"] == "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    json.dumps(content, allow_nan=False)


def test_the_runner_is_part_of_the_package() -> None:
    assert external.RUNNER.is_file()
    assert external.RUNNER.is_relative_to(Path(external.__file__).parent)


def test_progress_and_result_come_back_and_prints_go_to_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int, str]] = []
    result = run(job(tmp_path), progress=lambda *event: seen.append(event))
    assert result["num_parameters"] == 7
    assert seen == [(1, 3, "training"), (2, 3, "training"), (3, 3, "training")]
    log = capfd.readouterr().err
    assert "loading" in log
    assert "a library says hello" in log


@pytest.mark.parametrize(
    ("mode", "kind", "text"),
    [
        ("mistake", PeerError, "engine detectron2: detectron2 is not installed. Install it"),
        ("crash", PeerCrash, "engine detectron2: ValueError: bad thing"),
        ("traceback", PeerCrash, "its process ended with exit code 1 and no result (RuntimeError: no protocol at all)"),
        ("segfault", PeerCrash, "its process crashed with SIGSEGV"),
        ("kill", PeerCrash, "its process was killed; most often this is the kernel short of memory"),
        ("silent", PeerCrash, "its process ended with exit code 0 and no result (loading)"),
    ],
)
def test_each_way_to_fail_is_one_line(tmp_path: Path, mode: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        run(job(tmp_path, mode=mode))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("python", ["/no/such/python", "README.md"])
def test_an_interpreter_that_cannot_be_started_is_named(tmp_path: Path, python: str) -> None:
    content = job(tmp_path)
    content["engine"]["python"] = python if python.startswith("/") else str(ROOT / python)
    with pytest.raises(PeerError, match=r"python '.*' cannot be started .*--set engine.python=PATH"):
        run(content)


def test_our_packages_are_not_forced_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert run(job(tmp_path, mode="variables")) == {"found": []}


def test_a_helper_left_behind_does_not_hold_us(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = run(job(tmp_path, mode="helper"))
    os.kill(result["pid"], signal.SIGKILL)
    assert time.monotonic() - begin < 20


def test_asked_to_stop_it_keeps_its_work_and_goes_on_from_it(tmp_path: Path) -> None:
    content = job(tmp_path, pause_s=0.3)
    content["train"]["iterations"] = 50
    seen: list[int] = []
    assert run(content, progress=lambda done, *_: seen.append(done), stop=lambda: bool(seen)) == {}
    done = len((tmp_path / "losses.jsonl").read_text().splitlines())
    assert 1 <= done < 50
    content["train"]["iterations"] = done + 1
    again: list[int] = []
    assert run(content, progress=lambda done, *_: again.append(done))["num_parameters"] == 7
    assert again == [done + 1]


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    content = job(tmp_path, mode="hang")
    (tmp_path / "job").write_text(json.dumps(content))
    code = (
        "import json, sys; from pathlib import Path; from bench.external import run_peer; "
        "run_peer(json.loads(Path(sys.argv[1]).read_text()), progress=print, stop=lambda: False, runner=sys.argv[2])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job"), str(FAKE)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    peer = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    peer.wait(10)


# -- detections -------------------------------------------------------------------------------------------------------


def test_detections_become_shards(tmp_path: Path) -> None:
    assert run(job(tmp_path, "predict"))["num_images"] == 2
    count = write_shards("x", tmp_path / "results.jsonl", Split(tmp_path), SIZES, tmp_path / "shards")
    assert count == 2
    found = list(iter_predictions(tmp_path / "shards"))
    assert [record["image_id"] for record in found] == [3, 8]
    # No background, then 4 x 6 pixels: 24 is 0b11000, whose sixth bit says that a sign bit follows.
    assert found[0]["segmentation"] == [{"size": [4, 6], "counts": "0h0"}]
    # Once more, as after a kill in between: the shards that are there stay.
    assert write_shards("x", tmp_path / "results.jsonl", Split(tmp_path), SIZES, tmp_path / "shards") == 2
    assert len(list(iter_predictions(tmp_path / "shards"))) == 2


GOOD: dict[str, Any] = {
    "image_id": 3,
    "category_id": [5],
    "score": [0.5],
    "bbox": [[0.0, 0.0, 1.0, 1.0]],
    "segmentation": [{"size": [4, 6], "counts": "0h0"}],
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_id": 4}, "image 4 was not asked for"),
        ({"category_id": [2]}, "category 2 is none of the data set"),
        ({"score": [float("nan")]}, "a score is no finite number"),
        ({"score": [True]}, "a score is no finite number"),
        ({"bbox": [[0, 0, 1]]}, "a bbox is not four finite numbers"),
        ({"bbox": [[0, 0, 1, float("inf")]]}, "a bbox is not four finite numbers"),
        ({"score": []}, "its lists differ in length: [0, 1]"),
        ({"score": 3}, "category_id, score and bbox have to be lists"),
        ({"segmentation": [{"size": [6, 4], "counts": "0h0"}]}, "a mask has size [6, 4], the image [4, 6]"),
        ({"segmentation": [{"size": [4, 6], "counts": "0i0"}]}, "does not cover its 4 x 6 pixels"),
        ({"segmentation": [{"size": [4, 6], "counts": "0h"}]}, "the RLE of a mask is cut off"),
        ({"segmentation": [[1, 2, 3, 4]]}, "a mask is no compressed RLE"),
        ({"more": 1}, "needs the keys"),
    ],
)
def test_detections_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**GOOD, "image_id": 8}) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(PeerCrash) as caught:
        write_shards("x", path, Split(tmp_path), SIZES, tmp_path / "shards")
    assert "line 2 of its results.jsonl: " in str(caught.value)
    assert text in str(caught.value)


def test_every_image_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(PeerCrash, match="gave no detections for 1 images, the first is 8"):
        write_shards("x", path, Split(tmp_path), SIZES, tmp_path / "shards")
    path.write_text((json.dumps(GOOD) + "\n") * 2)
    with pytest.raises(PeerCrash, match="image 3 comes twice"):
        write_shards("x", path, Split(tmp_path), SIZES, tmp_path / "others")
    path.write_text("{")
    with pytest.raises(PeerCrash, match="is no JSON"):
        write_shards("x", path, Split(tmp_path), SIZES, tmp_path / "more")


def test_boxes_alone_are_detections(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [GOOD | {"image_id": image_id, "segmentation": None} for image_id in (3, 8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_shards("x", path, Split(tmp_path), SIZES, tmp_path / "shards") == 2


# -- latency ----------------------------------------------------------------------------------------------------------

ASKED = {"latency": True, "latency_images": 4, "latency_seconds": 0.0, "memory": True, "flops": True}


def test_measurements_are_metrics_and_reasons(tmp_path: Path) -> None:
    outputs = latency_outputs("detectron2", run(job(tmp_path, "latency", ASKED)), ASKED)
    assert outputs["samples"] == {"latency_s": {"total": [0.25] * 4}}
    untold = {"samples": None, "reason": "engine detectron2 does not tell"}
    assert outputs["sample_marks"] == {"latency_s": {"contended": untold, "throttled": untold}}
    found = outputs["metrics"]
    assert found["latency_s/total"]["value"] == 0.25
    assert found["latency_s/head/p95"]["reason"] == "engine detectron2 does not time it apart"
    assert found["peak_memory_bytes/rss"]["value"] == 1000
    assert found["peak_memory_bytes/cuda_allocated"]["reason"] == "not measured on a CUDA device"
    assert found["num_parameters"]["value"] == 7
    assert found["flops"]["reason"] == "engine detectron2 does not count it"


def test_only_what_is_asked_for_is_reported(tmp_path: Path) -> None:
    asked = ASKED | {"latency": False, "flops": False}
    outputs = latency_outputs("x", run(job(tmp_path, "latency", asked)), asked)
    assert "samples" not in outputs
    assert {name.split("/")[0] for name in outputs["metrics"]} == {"peak_memory_bytes"}


@pytest.mark.parametrize("result", [{}, {"samples": {"latency_s": {}}}, {"samples": {"latency_s": {"total": ["a"]}}}])
def test_measurements_that_make_no_sense_are_refused(result: dict[str, Any]) -> None:
    with pytest.raises(PeerCrash, match="its measurements are not what the protocol says"):
        latency_outputs("x", result, ASKED)


def test_a_training_step_of_a_peer(tmp_path: Path) -> None:
    engine = {"checkout": str(tmp_path), "recipe": "r.yaml", "engine_weights": "w.pth"}
    content = job(tmp_path, "training_step", {"training_step_count": 3}, name="original", **engine)
    assert content["measure"] == {"warmup": 1, "training_step_count": 3}
    assert {"seed", "batch_size", "num_train_proposals"} <= content["train"].keys()
    outputs = training_step_outputs("original", run(content))
    assert outputs["samples"] == {"training_step_s": {"total": [0.5] * 3}}
    assert outputs["sample_marks"]["training_step_s"]["contended"]["reason"] == "engine original does not tell"
    found = outputs["metrics"]
    assert found["training_step_s/total"]["value"] == 0.5
    assert found["training_step_s/total/p95"]["unit"] == "s"
    assert found["peak_memory_bytes/training_rss"]["value"] == 2000
    assert found["peak_memory_bytes/training_cuda_reserved"]["reason"] == "not measured on a CUDA device"


@pytest.mark.parametrize(
    "result", [{}, {"samples": {"training_step_s": {"total": []}}}, {"samples": {"latency_s": {}}}]
)
def test_training_steps_that_make_no_sense_are_refused(result: dict[str, Any]) -> None:
    with pytest.raises(PeerCrash, match="its measurements are not what the protocol says"):
        training_step_outputs("x", result)
