"""The runner with the real detectron2, in the interpreter that `tox -e detectron2` makes; Python 3.10, nothing of ours.

A thin Mask R-CNN learns a few iterations on generated rectangles, is stopped and goes on, predicts and is timed. The
engine for original repositories runs a small project written here, which draws noise in the released order, and where
DIFFINST_CHECKOUTS names a folder of clones, these: DiffusionInst, DiffusionDet or both.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.detectron2

RUNNER = Path(__file__).resolve().parents[3] / "bench" / "peers" / "run_peer.py"
RECIPE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
THIN = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of bright rectangles, two categories whose ids have gaps."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 7):
        pixels = generator.integers(0, 60, (64, 96, 3), dtype=np.uint8)
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 96})
        for category in (3, 9):
            left, top = (int(value) for value in generator.integers(2, 30, 2))
            right, bottom = left + 40, top + 24
            pixels[top:bottom, left:right, int(category == 9)] = 220
            corners = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [left, top, 40, 24],
                    "area": 960,
                    "segmentation": [corners],
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
    categories = [{"id": 3, "name": "red"}, {"id": 9, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def job(data: Path, folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    image_ids = [1, 2, 3, 4, 5, 6] if kind == "train" else [2, 5]
    content = {
        "protocol": 1,
        "kind": kind,
        "engine": {"name": "detectron2", "recipe": RECIPE, "engine_weights": "none", "options": THIN},
        "folder": str(folder),
        "annotations": str(data / "instances.json"),
        "images": str(data),
        "image_ids": image_ids,
        "file_names": [f"{number}.png" for number in image_ids],
        "class_names": ["red", "green"],
        "category_ids": [3, 9],
        "train": {
            "seed": 0,
            "iterations": 6,
            "batch_size": 2,
            "learning_rate": 0.01,
            "weight_decay": 1e-4,
            "clip_gradient_norm": 1.0,
            "warmup_iterations": 2,
            "warmup_factor": 0.1,
            "schedule": "cosine",
            "schedule_steps": [],
            "schedule_gamma": 0.1,
            "log_every": 1,
            "checkpoint_every": 2,
        },
        "data": {
            "shortest_edge_train": [48, 64],
            "longest_edge_train": 128,
            "shortest_edge_test": 64,
            "longest_edge_test": 128,
            "flip_probability": 0.5,
            "crop_probability": 0.5,
            "crop_shortest_edge": [64],
            "crop_size_range": [40, 60],
        },
        "sampler": {"max_detections": 7, "score_threshold": 0.0},
        "weights": None,
        "device": "cpu",
        "threads": 1,
        "measure": {"warmup": 1, "latency_images": 3, "latency_seconds": 0.0},
    }
    return {**content, **changes}


def start(content: dict[str, Any]) -> subprocess.Popen[str]:
    path = Path(content["folder"]).with_suffix(".json")
    path.write_text(json.dumps(content))
    return subprocess.Popen(
        [sys.executable, str(RUNNER), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Exit code and the last line."""
    process = start(content)
    out, err = process.communicate(timeout=300)
    assert out, err
    return process.returncode, [json.loads(line) for line in out.splitlines()][-1]


def result(content: dict[str, Any]) -> dict[str, Any]:
    code, last = run(content)
    assert code == 0, last
    return last["result"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained") / "out"
    return folder, result(job(data, folder, "train"))


def test_a_training_leaves_weights_and_losses(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, found = trained
    assert sorted(path.name for path in folder.iterdir()) == ["losses.jsonl", "weights.pth"]
    log = lines(folder / "losses.jsonl")
    assert [line["iteration"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in log][:3] == pytest.approx([0.001, 0.00425, 0.0075])  # towards the cosine
    assert log[-1]["losses"] == found["last_losses"]
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"} <= found["last_losses"].keys()
    assert found["optimizer"].endswith("SGD")
    assert found["environment"]["packages"]["sal-detectron2"] == "0.7.2"
    assert found["environment"]["device"] == "cpu"
    assert found["environment"]["threads"].keys() == {"intra_op", "inter_op"}
    assert found["environment"]["flags"]["float32_matmul_precision"] == "highest"


def test_a_stopped_training_goes_on_to_the_same_weights(
    data: Path, tmp_path: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    content = job(data, tmp_path / "out", "train")
    process = start(content)
    assert process.stdout is not None
    process.stdout.readline()  # the first iteration is done
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 3
    assert (tmp_path / "out" / "checkpoint.pth").is_file()
    assert not (tmp_path / "out" / "weights.pth").exists()
    assert result(content)["last_losses"] == trained[1]["last_losses"]
    assert lines(tmp_path / "out" / "losses.jsonl") == lines(trained[0] / "losses.jsonl")


def test_predictions_and_times(data: Path, tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    weights = str(trained[0] / "weights.pth")
    found = result(job(data, tmp_path / "predict", "predict", weights=weights))
    assert (found["num_images"], found["num_parameters"]) == (2, trained[1]["num_parameters"])
    records = lines(tmp_path / "predict" / "results.jsonl")
    assert [record["image_id"] for record in records] == [2, 5]
    for record in records:
        assert 0 < len(record["score"]) <= 7
        assert set(record["category_id"]) <= {3, 9}
        assert len({len(record[key]) for key in ("score", "category_id", "bbox", "segmentation")}) == 1
        assert all(mask["size"] == [64, 96] for mask in record["segmentation"])
    timed = result(job(data, tmp_path / "latency", "latency", weights=weights))
    assert len(timed["samples"]["latency_s"]["total"]) == 3
    assert min(timed["samples"]["latency_s"]["total"]) > 0
    assert timed["peak_memory_bytes"]["rss"] > 1e8


def test_a_pickle_of_arrays_is_read_as_the_same_weights(
    data: Path, tmp_path: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    import torch

    state = torch.load(trained[0] / "weights.pth", weights_only=True)["model"]
    content = {"model": {name: value.numpy() for name, value in state.items()}, "__author__": "x"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    found = []
    for path in (trained[0] / "weights.pth", tmp_path / "w.pkl"):
        folder = tmp_path / path.suffix
        result(job(data, folder, "predict", **_with({}, engine_weights=str(path))))
        found.append(lines(folder / "results.jsonl"))
    assert found[0] == found[1]


def test_gradients_are_clipped_as_the_suite_says(data: Path, tmp_path: Path) -> None:
    losses = []
    for norm in (1e-9, 1e9, None):
        content = job(data, tmp_path / f"{norm}", "train")
        content["train"] |= {"iterations": 3, "weight_decay": 0.0, "clip_gradient_norm": norm}
        losses.append(result(content)["last_losses"])
    assert losses[0] != losses[1] == losses[2]


def test_gradients_are_clipped_once(data: Path, tmp_path: Path) -> None:
    model_zoo = pytest.importorskip("detectron2.model_zoo")
    losses = []
    for norm, options in ((1e9, {"SOLVER.CLIP_GRADIENTS.ENABLED": False}), (1e9, {}), (None, {})):
        recipe = tmp_path / "clips.yaml"
        clips = "SOLVER: {CLIP_GRADIENTS: {ENABLED: true, CLIP_VALUE: 1.0e-9}}"
        recipe.write_text(f"_BASE_: {model_zoo.get_config_file(RECIPE)}\n{clips}\n")
        engine = {"name": "detectron2", "recipe": str(recipe), "options": {**THIN, **options}}
        content = job(data, tmp_path / f"{norm}-{len(options)}", "train", engine=engine)
        content["train"] |= {"iterations": 3, "weight_decay": 0.0, "clip_gradient_norm": norm}
        losses.append(result(content)["last_losses"])
    assert losses[0] == losses[1] != losses[2]


def test_nothing_in_a_recipe_is_executed(data: Path, tmp_path: Path) -> None:
    recipe, touched = tmp_path / "evil.yaml", tmp_path / "touched"
    recipe.write_text(
        f"MODEL: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{touched}]]\n"
    )
    code, last = run(job(data, tmp_path / "out", "predict", **_with({}, recipe=str(recipe))))
    assert (code, touched.exists()) == (2, False)
    assert "evil.yaml: is no configuration that detectron2 here understands" in last["error"]
    assert "\n" not in last["error"]


def test_the_optimizer_may_be_adamw(data: Path, tmp_path: Path) -> None:
    engine = {"name": "detectron2", "recipe": RECIPE, "options": {**THIN, "SOLVER.OPTIMIZER": "ADAMW"}}
    content = job(data, tmp_path / "out", "train", engine=engine)
    content["train"] |= {"iterations": 1, "learning_rate": 1e-3}
    assert result(content)["optimizer"] == "AdamW"


def _with(options: dict[str, Any], **engine: Any) -> dict[str, Any]:
    return {"engine": {"name": "detectron2", "recipe": RECIPE, "options": {**THIN, **options}, **engine}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (_with({}, recipe="mask_rcnn.yaml"), "neither a file nor in detectron2's model zoo"),
        (_with({"MODEL.NECK.WIDTH": 3}), "'MODEL.NECK.WIDTH' is no option"),
        (_with({"MODEL.RESNETS.DEPTH": "deep"}), "MODEL.RESNETS.DEPTH: 'deep' does not fit"),
        (_with({"MODEL.RESNETS.DEPTH": 51}), "cannot build GeneralizedRCNN"),
        (_with({}, engine_weights="absent.pth"), "absent.pth: cannot be read"),
        ({"device": "cuda:99"}, "--device cuda:99: cannot be used here"),
    ],
)
def test_mistakes_are_one_line(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    code, last = run(job(data, tmp_path / "out", "predict", **changes))
    assert code == 2
    assert message in last["error"]
    assert "\n" not in last["error"]


def test_weights_of_another_model(data: Path, tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    changes = _with({"MODEL.ROI_BOX_HEAD.FC_DIM": 64}, engine_weights=str(trained[0] / "weights.pth"))
    code, last = run(job(data, tmp_path / "out", "predict", **changes))
    assert code == 2
    assert "is of another model: roi_heads.box_head.fc1.weight is (32, 784) instead of (64, 784)" in last["error"]


# A project as small as can be, with the interface of the two repositories: boxes are its noise, one more draw a step.
PROJECT = {
    "diffusiondet/__init__.py": """
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from detectron2.config import CfgNode
from . import detector

def add_diffusiondet_config(cfg):
    cfg.MODEL.DiffusionDet = CfgNode({"NUM_CLASSES": 80, "NUM_PROPOSALS": 300, "SAMPLE_STEP": 1})
""",
    "diffusiondet/detector.py": """
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances

@META_ARCH_REGISTRY.register()
class DiffusionDet(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.settings = cfg.MODEL.DiffusionDet
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("betas", torch.zeros(4))

    def forward(self, inputs):
        n = self.settings.NUM_PROPOSALS
        x = torch.randn((1, n, 4), device=self.weight.device)
        for _ in range(self.settings.SAMPLE_STEP - 1):
            kept = x[:, :2].double()
            x = torch.cat((torch.randn_like(kept), torch.randn(1, n - torch.tensor(2), 4)), dim=1)
        found = Instances((inputs[0]["height"], inputs[0]["width"]))
        found.pred_boxes, found.scores = Boxes(x[0].float()), torch.arange(n) * self.weight[0] / n
        found.pred_classes = torch.zeros(n, dtype=torch.int64)
        return [{"instances": found}]
""",
    "configs/small.yaml": "MODEL:\n  META_ARCHITECTURE: DiffusionDet\nINPUT:\n  FORMAT: RGB\n",
}


@pytest.fixture
def original(data: Path, tmp_path: Path) -> dict[str, Any]:
    """A prediction job for the project, with weights."""
    import torch

    for name, text in PROJECT.items():
        path = tmp_path / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    torch.save({"model": {"weight": torch.tensor([1.0, 2.0, 3.0])}}, tmp_path / "w.pth")
    engine = {
        "name": "original",
        "checkout": str(tmp_path / "clone"),
        "recipe": "configs/small.yaml",
        "engine_weights": str(tmp_path / "w.pth"),
    }
    sampler = {"sampling_steps": 2, "num_proposals": 5, "eval_seed": 3, "max_detections": 2}
    return job(data, tmp_path / "out", "predict", engine=engine, sampler=sampler)


def test_an_original_draws_the_harness_noise(original: dict[str, Any]) -> None:
    sys.path.insert(0, str(RUNNER.parents[2]))
    from bench.peers.noise import noise_for

    found = result(original)
    assert found["environment"]["checkout"] == {"package": "diffusiondet", "commit": None}
    records = lines(Path(original["folder"]) / "results.jsonl")
    assert [record["image_id"] for record in records] == [2, 5]
    for record in records:
        assert record["category_id"] == [3, 3]
        assert record["segmentation"] is None
        assert record["score"] == pytest.approx([0.8, 0.6])  # the best two of five
        expected = noise_for(3, record["image_id"], 0, "renewal", (5, 4))[[4, 3]].astype(np.float64)
        expected[:, 2:] -= expected[:, :2]
        np.testing.assert_array_equal(record["bbox"], expected)


def test_an_original_is_timed_with_noise_of_its_own(original: dict[str, Any]) -> None:
    assert len(result({**original, "kind": "latency"})["samples"]["latency_s"]["total"]) == 3


def test_mistakes_with_an_original(original: dict[str, Any], tmp_path: Path) -> None:
    code, last = run({**original, "kind": "train"})
    assert (code, "engine original does not train" in last["error"]) == (2, True)
    code, last = run({**original, "engine": {**original["engine"], "recipe": "small.yaml"}})
    assert (code, "In this checkout there are: configs/small.yaml" in last["error"]) == (2, True)
    detector = tmp_path / "clone" / "diffusiondet" / "detector.py"
    detector.write_text(detector.read_text().replace("torch.randn_like(kept)", "torch.randn(1, 2, 4)"))
    code, last = run(original)
    assert (code, "which the released code does not" in last["error"]) == (2, True)


CHECKOUTS = Path(os.environ.get("DIFFINST_CHECKOUTS", "/nonexistent"))
# Writes the random weights of a job's own model, so that there are some that fit.
WRITE_WEIGHTS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from bench.peers import detectron, original
from bench.peers.protocol import read_job
job = read_job(Path(sys.argv[1]))
model = detectron.build_model(original.build_config(job), 0)
torch.save({"model": model.state_dict()}, job.engine["engine_weights"])
"""


REPOSITORIES = pytest.mark.parametrize(
    ("repository", "recipe"),
    [("DiffusionInst", "configs/diffinst.coco.res50.yaml"), ("DiffusionDet", "configs/diffdet.coco.res50.yaml")],
)


def thin_clone(repository: str, recipe: str, weights: Path) -> dict[str, Any]:
    """The engine of a clone with a thin model; skips the test where there is no clone."""
    if not (CHECKOUTS / repository).is_dir():
        pytest.skip(f"DIFFINST_CHECKOUTS names no folder with a clone of {repository}")
    sizes = {"PRIOR_PROB": 0.45, "HIDDEN_DIM": 16, "NUM_HEADS": 2, "NHEADS": 4, "DIM_FEEDFORWARD": 32, "DIM_DYNAMIC": 8}
    return {
        "name": "original",
        "checkout": str(CHECKOUTS / repository),
        "recipe": recipe,
        "engine_weights": str(weights),
        "options": {name: value for name, value in THIN.items() if name.startswith(("MODEL.RESNETS.W", "MODEL.FPN"))}
        | {"MODEL.RESNETS.RES2_OUT_CHANNELS": 16, "MODEL.RESNETS.STEM_OUT_CHANNELS": 8}
        | {f"MODEL.{repository}.{name}": value for name, value in sizes.items()},
    }


def write_random_weights(content: dict[str, Any], path: Path) -> None:
    """Of the model of a job, which is written to `path`."""
    path.write_text(json.dumps(content))
    command = [sys.executable, "-c", WRITE_WEIGHTS, str(path), str(RUNNER.parents[2])]
    subprocess.run(command, check=True, capture_output=True)


@REPOSITORIES
def test_a_clone_of_an_original_predicts_the_same_twice(
    data: Path, tmp_path: Path, repository: str, recipe: str
) -> None:
    engine = thin_clone(repository, recipe, tmp_path / "w.pth")
    sampler = {"sampling_steps": 2, "num_proposals": 30, "eval_seed": 3, "max_detections": None}
    found = []
    for number in range(2):
        content = job(data, tmp_path / f"out{number}", "predict", engine=engine, sampler=sampler)
        if number == 0:
            write_random_weights(content, tmp_path / "job.json")
        environment = result(content)["environment"]
        found.append(lines(tmp_path / f"out{number}" / "results.jsonl"))
    assert environment["checkout"]["package"] == repository.lower()
    assert found[0] == found[1]  # noise is a function of seed and image
    for record in found[0]:
        assert 0 < len(record["score"]) <= 30
        assert set(record["category_id"]) <= {3, 9}
        assert (record["segmentation"] is not None) == (repository == "DiffusionInst")


@REPOSITORIES
def test_steps_of_training_of_a_clone_are_timed(data: Path, tmp_path: Path, repository: str, recipe: str) -> None:
    engine = thin_clone(repository, recipe, tmp_path / "w.pth")
    content = job(data, tmp_path / "out", "training_step", engine=engine)
    content["train"] = {"seed": 0, "batch_size": 2, "num_train_proposals": 30}
    content["measure"] = {"warmup": 1, "training_step_count": 2}
    write_random_weights(content, tmp_path / "job.json")
    found = result(content)
    assert len(found["samples"]["training_step_s"]["total"]) == 2
    assert found["peak_memory_bytes"]["rss"] > 2**20
    assert found["num_parameters"] > 1000
    code, last = run(job(data, tmp_path / "other", "training_step"))
    assert (code, "measure.training_step is not for engine detectron2" in last["error"]) == (2, True)
