from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffinst.checkpoint import load_checkpoint, save_checkpoint
from diffinst.cli import main, overlaid_config, override_config, read_config
from diffinst.config import Config
from diffinst.errors import ConfigError

CONFIG = """\
model:
  backbone: tiny
  num_stages: 1
  hidden_dim: 32
  dim_feedforward: 32
  dim_dynamic: 8
  num_attention_heads: 2
  mask_branch_channels: 16
  mask_branch_layers: 1
sampler: {num_proposals: 6, max_detections: 5}
train:
  iterations: 2
  batch_size: 2
  warmup_iterations: 0
  schedule_steps: []
  num_train_proposals: 8
data:
  shapes_train_images: 4
  shapes_val_images: 2
  shapes_image_size: 32
  shortest_edge_train: [32]
  shortest_edge_test: 32
  crop_probability: 0.0
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFINST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_train_evaluate_predict(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "config.yaml", "--out", "run", "--device", "cpu", "--set", "iterations=1"]) == 0
    checkpoint = config_file.parent / "run/model.safetensors"
    assert load_checkpoint(checkpoint).iteration == 1
    assert load_checkpoint(checkpoint).config.model.num_classes == 4
    assert "wrote run/model.safetensors" in capsys.readouterr().out.replace("\n", "")

    evaluate = ["evaluate", "run/model.safetensors", "--out", "scores", "--device", "cpu"]
    assert main(evaluate) == 0
    first = capsys.readouterr().out
    metrics = json.loads((config_file.parent / "scores/metrics.json").read_text())
    assert set(metrics["metrics"]) >= {"segm/AP", "bbox/AP", "segm/AP50", "bbox/ARl"}
    assert "segm/AP " in first
    assert main([*evaluate, "--set", "sampling_steps=2"]) == 0
    assert len(list((config_file.parent / "scores").glob("predictions-*"))) == 2
    Path("steps.yaml").write_text("sampler: {sampling_steps: 2}\n")
    assert main([*evaluate, "--config", "steps.yaml"]) == 0
    assert len(list((config_file.parent / "scores").glob("predictions-*"))) == 2  # the same settings, written otherwise

    photographs = next((config_file.parent / "cache").glob("*/val"))
    assert main(["predict", "run/model.safetensors", str(photographs), "--out", "drawn", "--device", "cpu"]) == 0
    assert len(list((config_file.parent / "drawn").glob("*.png"))) == 2
    assert json.loads((config_file.parent / "drawn/predictions.json").read_text())
    assert "drew 2 photographs" in capsys.readouterr().out

    loaded = load_checkpoint(checkpoint)
    assert loaded.category_ids == (1, 2, 3, 4)
    ids = (13, 27, 31, 90)
    save_checkpoint(Path("ids"), model=loaded.model, config=loaded.config, iteration=1, category_ids=ids)
    assert main(["predict", "ids", str(photographs), "--out", "drawn2", "--device", "cpu"]) == 0
    results = json.loads(Path("drawn2/predictions.json").read_text())
    assert results
    assert {result["category_id"] for result in results} <= {*ids}


def test_a_training_with_stages_frozen_at_random_values_says_so(
    config_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffinst.engine.train

    monkeypatch.setattr(diffinst.engine.train, "train", lambda *_, **__: Path("run/checkpoint.safetensors"))
    command = ["train", "config.yaml", "--out", "run", "--device", "cpu"]
    assert main([*command, "--set", "backbone=efficientnet_lite0"]) == 130
    warning = "diffinst: warning: config.yaml: model.freeze_at: the first 2 stages of efficientnet_lite0 are frozen"
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len(warning)] for line in lines if "warning" in line] == [warning]
    assert main([*command, "--set", "backbone=tiny"]) == 130
    assert "warning" not in capsys.readouterr().err


def test_averaged_weights_are_evaluated_when_asked_for(config_file: Path) -> None:
    settings = ["--set", "iterations=2", "--set", "ema_decay=0.5", "--set", "learning_rate=0.01"]
    assert main(["train", "config.yaml", "--out", "run", "--device", "cpu", *settings]) == 0
    evaluate = ["evaluate", "run/model.safetensors", "--out", "scores", "--device", "cpu", "--set"]
    for use_ema in ("true", "false"):
        assert main([*evaluate, f"use_ema={use_ema}"]) == 0
    folders = (config_file.parent / "scores").glob("predictions-*")
    assert len({"".join(path.read_text() for path in folder.glob("*.jsonl")) for folder in folders}) == 2


def test_an_evaluation_loads_images_with_as_many_processes_as_asked(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffinst.engine.evaluate

    given: list[int] = []

    def stopped(model, dataset, settings, folder, *, num_workers: int = 0, **rest) -> int:
        given.append(num_workers)
        return 0

    monkeypatch.setattr(diffinst.engine.evaluate, "predict_split", stopped)
    settings = ["--set", "iterations=1", "--set", "num_workers=1"]
    assert main(["train", "config.yaml", "--out", "run", "--device", "cpu", *settings]) == 0
    evaluate = ["evaluate", "run/model.safetensors", "--out", "scores", "--device", "cpu"]
    assert main(evaluate) == 130
    assert main([*evaluate, "--workers", "0"]) == 130
    assert main([*evaluate, "--workers", "3"]) == 130
    assert given == [1, 0, 3]


def test_a_checkpoint_of_other_classes_is_refused(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    main(["train", "config.yaml", "--out", "run", "--device", "cpu", "--set", "iterations=1"])
    capsys.readouterr()
    arguments = ["evaluate", "run/model.safetensors", "--out", "scores", "--set", "class_agnostic=true"]
    assert main([*arguments, "--device", "cpu"]) == 2
    assert "made for 4 classes" in capsys.readouterr().err


def test_a_checkpoint_that_the_device_cannot_run_is_refused(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["--set", "iterations=1", "--set", "mask_head_kernel=triton"]
    assert main(["train", "config.yaml", "--out", "run", "--device", "cpu", *settings]) == 0  # training takes torch
    capsys.readouterr()
    assert main(["evaluate", "run/model.safetensors", "--out", "scores", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diffinst: mask_head_kernel 'triton'")
    assert not Path("scores").exists()  # before any image


def test_a_checkpoint_of_as_many_but_other_classes_is_refused(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    main(["train", "config.yaml", "--out", "run", "--device", "cpu", "--set", "iterations=1"])
    loaded = load_checkpoint(Path("run/model.safetensors"))
    first, *others = loaded.class_names
    save_checkpoint(
        Path("other.safetensors"), model=loaded.model, config=loaded.config, iteration=1, class_names=("lion", *others)
    )
    capsys.readouterr()
    assert main(["evaluate", "other.safetensors", "--out", "scores", "--device", "cpu"]) == 2
    assert f"'lion' where that has '{first}'. Choose the data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "gone.yaml", "--out", "x"], "gone.yaml: cannot be read (No such file or directory)"),
        (["train", "config.yaml", "--out", "x", "--set", "iteration=3"], "Did you mean 'iterations'?"),
        (["train", "config.yaml", "--out", "x", "--set", "iterations"], "needs the form KEY=VALUE"),
        (["train", "config.yaml", "--out", "x", "--device", "gpu"], "--device gpu: not a device"),
        (["train", "config.yaml", "--out", "x", "--device", "mps"], "--device mps: not a device that can run it"),
        (["train", "config.yaml", "--out", "x", "--set", "num_classes=7"], "but the data set has 4 classes"),
        (
            ["train", "config.yaml", "--out", "x", "--set", "num_train_timesteps=5", "--set", "sampling_steps=6"],
            "--set: sampling_steps (6) must not exceed num_train_timesteps (5)",
        ),
        (
            ["train", "config.yaml", "--out", "x", "--set", "use_ema=true"],
            "--set: use_ema needs the average that ema_decay",
        ),
        (["evaluate", "gone.safetensors", "--out", "x"], "gone.safetensors: no such checkpoint"),
        (["predict", "gone.safetensors", "gone.jpg", "--out", "x"], "gone.jpg: no such file or folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    config_file: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (config_file.parent / "x").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampler: {sampling_step: 1}", r"sampler.sampling_step: unknown key. Did you mean 'sampling_steps'\?"),
        ("samplers: {}", r"samplers: unknown key. Did you mean 'sampler'\?"),
        ("train: {learning_rate: 1e-4}", "train.learning_rate: .* YAML reads 1e-4 as text: write 0.0001"),
        ("train: {batch_size: 0}", "train.batch_size: .*greater than or equal to 1"),
        ("- 1", "must be a mapping with the sections model, sampler, train, data"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_configuration_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path, [])


def test_an_empty_configuration_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\nmodel:\n")
    assert read_config(path, []) == Config()


def test_overrides_are_yaml_bare_or_dotted() -> None:
    changed = override_config(Config(), ["sampler.eta=0.5", "num_proposals=7", "nms_iou_threshold=null"])
    assert (changed.sampler.eta, changed.sampler.num_proposals, changed.sampler.nms_iou_threshold) == (0.5, 7, None)
    assert override_config(Config(), []) == Config()


def test_what_a_checkpoint_fixes_cannot_be_set() -> None:
    with pytest.raises(ConfigError, match="the checkpoint fixes it. Allowed are fields of sampler, data"):
        override_config(Config(), ["num_stages=2"], allowed=("sampler", "data"))


def test_a_file_of_an_evaluation_lies_over_the_checkpoints_configuration(tmp_path: Path) -> None:
    trained = Config.model_validate(
        {"train": {"ema_decay": 0.9}, "data": {"dataset": "nuclei", "shortest_edge_test": 64}, "sampler": {"eta": 0.5}}
    )
    path = tmp_path / "config.yaml"
    path.write_text("sampler: {use_ema: true, sampling_steps: 4}\n")
    changed = overlaid_config(trained, path)
    assert changed.data == trained.data
    assert changed.train == trained.train
    assert (changed.sampler.eta, changed.sampler.use_ema, changed.sampler.sampling_steps) == (0.5, True, 4)
    path.write_text("data: {longest_edge_test: 99}\n")
    assert overlaid_config(trained, path).data == trained.data.model_copy(update={"longest_edge_test": 99})
    path.write_text("sampler:\n")
    assert overlaid_config(trained, path) == trained


def test_where_a_checkpoints_own_set_lies_is_not_about_another(tmp_path: Path) -> None:
    places = dict.fromkeys(("train_annotations", "train_images", "val_annotations", "val_images"), "x")
    trained = Config.model_validate({"data": {"dataset": "custom", **places, "shortest_edge_test": 64}})
    path = tmp_path / "config.yaml"
    path.write_text("data: {dataset: coco}\n")
    data = overlaid_config(trained, path).data
    assert (data.dataset, data.val_annotations, data.shortest_edge_test) == ("coco", None, 64)
    path.write_text("data: {dataset: custom, val_images: y}\n")
    data = overlaid_config(trained, path).data
    assert (data.val_annotations, data.val_images) == ("x", "y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1}", "config.yaml: train: the checkpoint fixes it. Allowed are the sections sampler, data"),
        ("model:", "config.yaml: model: the checkpoint fixes it"),
        ("samplers: {}", r"config.yaml: samplers: unknown key. Did you mean 'sampler'\?"),
        ("sampler: {eta: 2}", "config.yaml: sampler.eta: .*less than or equal to 1"),
        ("sampler: 3", "config.yaml: sampler: 3 is not allowed. Allowed: a mapping with the fields sampling_steps, "),
        ("sampler: 0", "config.yaml: sampler: 0 is not allowed"),
        ("sampler: {use_ema: true}", "config.yaml: use_ema needs the average that ema_decay keeps"),
    ],
)
def test_a_wrong_file_of_an_evaluation_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        overlaid_config(Config(), path)


def test_help_loads_no_torch() -> None:
    code = "import sys; from diffinst.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
