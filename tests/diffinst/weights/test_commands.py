"""diffinst init-, import- and export-weights, and what the other commands do with their files."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffinst.backbones.registry import BACKBONES
from diffinst.backbones.resnet import ResNet
from diffinst.build import build_model
from diffinst.checkpoint import load_checkpoint, save_checkpoint
from diffinst.cli import main
from diffinst.config import RELEASED, Config, ModelConfig
from diffinst.weights.settings import backbone_shapes

SIZES = {"num_classes": 4, "hidden_dim": 16, "num_stages": 1, "dim_feedforward": 16, "dim_dynamic": 4}
DATA = ("shapes_val_images=2", "shapes_image_size=32", "shortest_edge_test=32")


@pytest.fixture(autouse=True)
def released_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """released.pth in the current folder: a small model of shapes on a thin ResNet, with a moving average."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFINST_CACHE", str(tmp_path / "cache"))
    thin = lambda _: ResNet(depth=50, stem_channels=8, res2_channels=16, width_per_group=4)  # noqa: E731
    monkeypatch.setitem(BACKBONES, "resnet50", thin)
    backbone_shapes.cache_clear()
    torch.manual_seed(0)
    settings = ModelConfig(**SIZES, mask_branch_channels=16, mask_branch_layers=1)
    model = build_model(settings)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    average["box_head.stages.0.class_logits.bias"] -= 1
    save_checkpoint(
        Path("own.safetensors"), model=model.state_dict(), config=Config(model=settings), iteration=1, ema=average
    )
    assert main(["export-weights", "own.safetensors", "--out", "released.pth"]) == 0
    yield
    backbone_shapes.cache_clear()


def set_all(*fields: str) -> list[str]:
    return [part for field in fields for part in ("--set", field)]


def test_imported_weights_are_evaluated_and_draw(capsys: pytest.CaptureFixture) -> None:
    Path("names.txt").write_text("disc\nsquare\n\ntriangle\nstar\n")
    command = ["import-weights", "released.pth", "--out", "in.safetensors", "--classes", "names.txt"]
    assert main([*command, *set_all("num_proposals=6", *DATA), "--preset", "released"]) == 0
    output = capsys.readouterr().out
    assert "wrote in.safetensors: DiffusionInst" in output
    assert "and their moving average" in output
    assert "read off the shapes: backbone=resnet50, num_classes=4, hidden_dim=16" in output
    assert "not in the file, so as released (--set changes them): num_attention_heads=8" in output
    assert "12 names" in output
    found = load_checkpoint(Path("in.safetensors"))
    assert found.class_names == ("disc", "square", "triangle", "star")
    assert found.category_ids == ()
    assert found.config.sampler.num_proposals == 6
    for name, value in RELEASED["sampler"].items():
        assert getattr(found.config.sampler, name) == value

    # Classes of the generated images go by other names, so those are left out for scoring.
    assert main([*command[:4], "--force", *set_all("num_proposals=6", *DATA)]) == 0
    assert main(["evaluate", "in.safetensors", "--out", "scores", "--device", "cpu"]) == 0
    assert main(["evaluate", "in.safetensors", "--out", "average", "--device", "cpu", "--set", "use_ema=true"]) == 0
    assert "segm/AP" in json.loads(Path("scores/metrics.json").read_text())["metrics"]
    predictions = [next(Path(out).glob("predictions-*/*.jsonl")).read_text() for out in ("scores", "average")]
    assert predictions[0] != predictions[1]
    photograph = next(Path("cache").glob("*/val/*.png"))
    assert main(["predict", "in.safetensors", str(photograph), "--out", "drawn", "--device", "cpu"]) == 0


def test_classes_of_annotations() -> None:
    categories = [{"id": 9, "name": "d"}, {"id": 1, "name": "a"}, {"id": 3, "name": "b"}, {"id": 4, "name": "c"}]
    Path("x.json").write_text(json.dumps({"categories": categories}))
    assert main(["import-weights", "released.pth", "--out", "in.safetensors", "--classes", "x.json"]) == 0
    found = load_checkpoint(Path("in.safetensors"))
    assert (found.class_names, found.category_ids) == (("a", "b", "c", "d"), (1, 3, 4, 9))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch mark",)


def test_weights_to_start_from(capsys: pytest.CaptureFixture) -> None:
    sizes = set_all(*(f"{name}={value}" for name, value in SIZES.items()), "mask_branch_channels=16")

    def start(out: str, *options: str) -> dict[str, torch.Tensor]:
        assert main(["init-weights", "--out", out, *sizes, *options]) == 0
        return load_checkpoint(Path(out)).model

    first, again, other = start("1.safetensors"), start("2.safetensors"), start("3.safetensors", "--seed", "1")
    assert Path("1.safetensors").read_bytes() == Path("2.safetensors").read_bytes()
    name = "box_head.stages.0.class_logits.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    start("3.safetensors", "--force")
    assert Path("3.safetensors").read_bytes() == Path("1.safetensors").read_bytes()
    still = start("still.safetensors", "--still")
    moving = {key for key, value in first.items() if not torch.equal(value, still[key])}
    assert moving == {f"box_head.stages.0.box_deltas.{part}" for part in ("weight", "bias")}
    assert not still["box_head.stages.0.box_deltas.weight"].any()
    assert "random parameters" in capsys.readouterr().out
    assert main(["export-weights", "1.safetensors", "--out", "1.pth"]) == 0
    assert main(["import-weights", "1.pth", "--out", "back.safetensors"]) == 0
    back = load_checkpoint(Path("back.safetensors")).model
    assert back.keys() == first.keys()
    assert all(torch.equal(back[key], value) for key, value in first.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import-weights", "gone.pth", "--out", "x.safetensors"], "gone.pth: cannot be read"),
        (["import-weights", "evil.pkl", "--out", "x.safetensors"], "evil.pkl: it asks for"),
        (["import-weights", "released.pth", "--out", "x.pth"], "ends in .safetensors"),
        (["import-weights", "released.pth", "--out", "own.safetensors"], "is there already"),
        (["import-weights", "released.pth", "--out", "no/x.safetensors"], "there is no folder no"),
        (["import-weights", "released.pth", "--out", "x.safetensors", "--set", "num_stage=1"], "Did you mean"),
        (
            ["import-weights", "released.pth", "--out", "x.safetensors", "--set", "num_stages=2"],
            "lacks head.head_series.1",
        ),
        (["import-weights", "released.pth", "--out", "x.safetensors", "--classes", "gone"], "gone: cannot be read"),
        (
            ["import-weights", "released.pth", "--out", "x.safetensors", "--classes", "bad.json"],
            "no list of categories",
        ),
        (["import-weights", "released.pth", "--out", "x.safetensors", "--classes", "two.txt"], "2 names are given"),
        (["init-weights", "--out", "x.safetensors"], "--set num_classes=K is missing"),
        (["init-weights", "--out", "own.safetensors", "--set", "num_classes=2"], "is there already"),
        (["init-weights", "--out", "x.pth", "--set", "num_classes=2"], "ends in .safetensors"),
        (["export-weights", "gone.safetensors", "--out", "x.pth"], "gone.safetensors: no such checkpoint"),
        (["export-weights", "own.safetensors", "--out", "x.onnx"], "ends in .pth or .pkl"),
        (["export-weights", "own.safetensors", "--out", "released.pth"], "is there already"),
        (["export-weights", "own.safetensors", "--out", "own.pth", "--force"], "is there already"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    Path("evil.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    Path("bad.json").write_text("{}")
    Path("two.txt").write_text("a\nb\n")
    Path("own.pth").mkdir()
    before = {name: Path(name).read_bytes() for name in ("own.safetensors", "released.pth")}
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("mark").exists()
    assert not list(Path().glob("x.*"))
    assert before == {name: Path(name).read_bytes() for name in before}
