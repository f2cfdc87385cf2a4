"""Released weights become ours, whole: by name, by shape, and by what the model then computes."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import check_free_steps, load_fixture, load_json_fixture, relative_error
from released_tiny_model import released_tiny_model
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from diffinst.backbones.registry import BACKBONES
from diffinst.backbones.resnet import ResNet
from diffinst.backbones.swin import Swin
from diffinst.build import build_model
from diffinst.checkpoint import Checkpoint, load_checkpoint, load_model_weights, save_checkpoint
from diffinst.cli import main
from diffinst.config import Config, ModelConfig, SamplerConfig
from diffinst.diffusion.sampler import sample
from diffinst.errors import CheckpointError
from diffinst.postprocess import select_candidates
from diffinst.weights.constants import schedule_constants, window_index
from diffinst.weights.exporting import export_weights, released_state
from diffinst.weights.importing import import_weights, read_released
from diffinst.weights.settings import backbone_shapes, nearest_backbone

SMALL = {"num_classes": 7, "hidden_dim": 16, "num_stages": 2, "dim_feedforward": 24, "dim_dynamic": 4}
MODELS: dict[str, dict[str, Any]] = {
    "DiffusionInst": {"mask_branch_channels": 16, "mask_branch_layers": 2, "num_class_layers": 2},
    "DiffusionDet": {"mask": "none", "pooler_resolution": 5, "num_box_layers": 1},
    "other mask head": {"mask_feature_channels": 4, "mask_head_channels": (6, 6), "mask_branch_channels": 8},
}


def write(path: Path, states: dict[str, Any]) -> Path:
    """Arrays as a .pth or .pkl file."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(states | {"__author__": "test", "matching_heuristics": True}, 2))
    else:
        torch.save(
            {key: {n: torch.from_numpy(np.asarray(a)) for n, a in state.items()} for key, state in states.items()}, path
        )
    return path


@pytest.fixture(autouse=True)
def thin_backbones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backbones of the stored outputs in the place of two published ones, which hold a hundred megabytes."""
    thin = {
        "resnet50": lambda _: ResNet(depth=50, stem_channels=8, res2_channels=32, width_per_group=8),
        "swin_t": lambda _: Swin(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8)),
    }
    for name, build in thin.items():
        monkeypatch.setitem(BACKBONES, name, build)
    backbone_shapes.cache_clear()
    yield
    backbone_shapes.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model on ResNet-50 with a small head and a moving average."""
    torch.manual_seed(0)
    settings = ModelConfig(**SMALL, **MODELS[getattr(request, "param", "DiffusionInst")])
    model = build_model(settings)
    average = {name: value + 1 for name, value in model.state_dict().items()}
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, model=model.state_dict(), config=Config(model=settings), iteration=5, ema=average)
    return path


class TestReleasedTinyModel:
    """The stored model of the released code, whose thin ResNet stands in for ResNet-50 here."""

    @pytest.mark.parametrize("suffix", [".pth", ".pkl"])
    def test_gives_the_stored_sampler_outputs(
        self, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / f"tiny{suffix}", {"model": load_fixture("tiny_model_state")})
        command = ["import-weights", f"tiny{suffix}", "--out", "tiny.safetensors", "--preset", "released"]
        assert main([*command, "--set", "num_attention_heads=4", "--set", "num_proposals=20"]) == 0
        config = load_checkpoint(Path("tiny.safetensors"), with_tensors=False).config
        model = build_model(config.model).eval()
        load_model_weights(model, load_checkpoint(Path("tiny.safetensors")))
        expected = released_tiny_model().state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

        head_io = load_fixture("head_io")
        for fixture, num_steps in (("sampler_steps1_img0", 1), ("sampler_steps4_img0", 4)):
            stored = {key: torch.from_numpy(np.asarray(array)) for key, array in load_fixture(fixture).items()}
            images = stored["feature_image_index"]
            pyramid = [torch.from_numpy(head_io[f"p{level}"]).float()[images] for level in (2, 3, 4, 5)]
            settings = config.sampler.model_copy(update={"sampling_steps": num_steps})
            with torch.no_grad():
                steps = sample(
                    lambda boxes, t, pyramid=pyramid: model.box_head(pyramid, boxes, t),
                    whwh=stored["images_whwh"],
                    schedule=model.schedule,
                    settings=settings,
                    snr_scale=config.model.snr_scale,
                    noise=lambda step, purpose, stored=stored: stored_noise(stored, step, purpose),
                )
                mask_features = model.mask_branch(pyramid)
            # Rounding grows 30-fold from step to step of the tiny network (DIFFERENCES.md), so two free steps.
            errors = []
            for index, step in enumerate(steps[:2]):
                found = {"logits": step.class_logits, "boxes": step.boxes_xyxy, "kernels": step.mask_params}
                pairs = [(values, stored[f"step{index}_{key}_last"].float()) for key, values in found.items()]
                errors.append(max(relative_error(*pair) for pair in pairs))
            check_free_steps(errors)
            assert_close(mask_features, stored["mask_feat"], rtol=1e-4, atol=1e-4)
            if num_steps == 1:
                (candidates,) = select_candidates(steps, settings)
                assert candidates.labels.tolist() == stored["final_img0_classes"].tolist()
                assert_close(candidates.scores, stored["final_img0_scores"], rtol=1e-4, atol=1e-4)

    def test_sizes_are_read_off(self, tmp_path: Path) -> None:
        imported = read_released(write(tmp_path / "tiny.pth", {"model": load_fixture("tiny_model_state")}))
        assert imported.kind == "DiffusionInst"
        assert imported.settings == {
            "backbone": "resnet50",
            "num_classes": 5,
            "hidden_dim": 32,
            "num_stages": 2,
            "dim_feedforward": 64,
            "dim_dynamic": 8,
            "num_class_layers": 1,
            "num_box_layers": 3,
            "pooler_resolution": 7,
            "mask": "dynamic",
            "mask_branch_channels": 128,
            "mask_branch_layers": 4,
            "mask_feature_channels": 8,
            "mask_norm": "batch",
            "mask_head_channels": (8, 8),
        }
        assert imported.assumed == {
            "num_attention_heads": 8,
            "pooler_sampling_ratio": 2,
            "snr_scale": 2.0,
            "num_train_timesteps": 1000,
        }

    def test_a_backbone_of_no_published_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        backbone_shapes.cache_clear()
        path = write(tmp_path / "tiny.pth", {"model": load_fixture("tiny_model_state")})
        assert "backbone" not in read_released(path).settings
        with pytest.raises(CheckpointError, match="its backbone is none of this program's"):
            import_weights(path, tmp_path / "x.safetensors", Config())
        assert not (tmp_path / "x.safetensors").exists()


def stored_noise(stored: dict[str, Tensor], step: int, purpose: str) -> Tensor:
    """The draws of a stored run; a draw that the release never made is NaN."""
    if purpose == "initial":
        return stored["init_noise"]
    num_kept = int(stored[f"step{step}_renewal_keep"].sum())
    draws = stored[f"step{step}_{'ddim' if purpose == 'step' else 'renewal'}_noise"]
    slots = torch.full((1, 20, 4), torch.nan, dtype=draws.dtype)
    slots[:, slice(None, num_kept) if purpose == "step" else slice(num_kept, None)] = draws
    return slots


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("checkpoint", list(MODELS), indirect=True)
def test_import_of_the_export_is_the_same(checkpoint: Path, suffix: str, tmp_path: Path) -> None:
    num_tensors = export_weights(checkpoint, tmp_path / f"released{suffix}")
    imported = import_weights(tmp_path / f"released{suffix}", tmp_path / "back.safetensors", Config())
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "back.safetensors")
    for part in ("model", "ema"):
        own, found = getattr(before, part), getattr(after, part)
        assert own.keys() == found.keys()
        assert all(torch.equal(value, found[name].to(value.dtype)) for name, value in own.items())
    assert all(value.dtype == after.model[name].dtype for name, value in before.model.items())
    without_masks = {"mask_branch_channels", "mask_branch_layers"} if before.config.model.mask == "none" else set()
    assert after.config.model.model_dump(exclude=without_masks) == before.config.model.model_dump(exclude=without_masks)
    assert num_tensors == len(before.model) + 12 == len(imported.weights) + len(imported.left_out)
    assert after.source["kind"] == ("DiffusionDet" if without_masks else "DiffusionInst")

    metadata = load_checkpoint(tmp_path / "back.safetensors", with_tensors=False)
    assert (metadata.config, metadata.source, metadata.model) == (after.config, after.source, {})
    model = build_model(metadata.config.model)
    load_model_weights(model, load_checkpoint(tmp_path / "back.safetensors"))
    assert all(torch.equal(value, before.model[name]) for name, value in model.state_dict().items())


def test_every_stored_name_of_the_published_models_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of that size is made: names and shapes alone."""
    monkeypatch.undo()
    stored = {"resnet50": load_json_fixture("keys_full_diffinst_coco_r50")}
    for backbone, name in (("resnet101", "r101"), ("swin_b", "swinb")):
        keys = load_json_fixture(f"keys_backbone_{name}_fpn")
        stored[backbone] = {f"backbone.{key}": value for key, value in keys.items()}
    for backbone, keys in stored.items():
        config = Config(model=ModelConfig(backbone=backbone, num_classes=80))
        with torch.device("meta"):
            model = build_model(config.model)
        checkpoint = Checkpoint(Path("x"), config, 0, (), model.state_dict(), {})
        exported = {name: list(value.shape) for name, value in released_state(checkpoint, checkpoint.model).items()}
        if backbone != "resnet50":
            exported = {name: shape for name, shape in exported.items() if name.startswith("backbone.")}
        assert exported == {name: shape for name, (shape, _) in keys.items()}


class TestConstants:
    def test_noise_schedule_of_the_release(self) -> None:
        stored = load_fixture("schedule")
        found = schedule_constants(1000)
        assert len(found) == 12
        for name, value in found.items():
            assert_close(value, torch.from_numpy(stored[name]), rtol=1e-10, atol=1e-10)

    def test_window_index_by_hand(self) -> None:
        # Two by two: from each position the others are at (row + 1) * 3 + column + 1.
        assert window_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]

    def test_window_index_of_the_release(self) -> None:
        stored = load_fixture("swin_tiny")["sd__layers.0.blocks.0.attn.relative_position_index"]
        assert torch.equal(window_index(7), torch.from_numpy(stored))

    def test_constants_of_the_file_must_be_those(self, checkpoint: Path, tmp_path: Path) -> None:
        export_weights(checkpoint, tmp_path / "x.pth")
        content = torch.load(tmp_path / "x.pth", weights_only=True)
        content["model"]["alphas_cumprod"][3] += 0.1
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="another noise schedule.*alphas_cumprod differ"):
            read_released(tmp_path / "x.pth")


class TestBackbones:
    def resnet(self) -> dict[str, np.ndarray]:
        stored = load_fixture("tiny_model_state")
        prefix = "backbone.bottom_up."
        return {name.removeprefix(prefix): array for name, array in stored.items() if name.startswith(prefix)}

    def test_resnet_50_of_detectron2(self, tmp_path: Path) -> None:
        state = self.resnet()
        extra = {"stem.fc.weight": np.ones((3, 2), "f4"), "stem.conv1.norm.num_batches_tracked": np.array(0)}
        path = write(tmp_path / "R-50.pkl", {"model": state | extra})
        imported = import_weights(path, tmp_path / "R-50.safetensors", Config())
        assert imported.kind == "backbone"
        assert imported.settings == {"backbone": "resnet50"}
        assert set(imported.left_out) == set(extra)
        settings = ModelConfig(backbone_weights=str(tmp_path / "R-50.safetensors"), mask="none", **SMALL)
        model = build_model(settings)
        found = model.backbone.state_dict()["res4.5.conv2.norm.running_var"]
        assert torch.equal(found, torch.from_numpy(state["res4.5.conv2.norm.running_var"]).float())
        with safe_open(tmp_path / "R-50.safetensors", framework="pt") as file:
            source = json.loads(file.metadata()["source"])
        assert source["file"] == "R-50.pkl"
        assert len(source["sha256"]) == 64

    def test_swin_of_its_authors(self, tmp_path: Path) -> None:
        stored = {name[4:]: array for name, array in load_fixture("swin_tiny").items() if name.startswith("sd__")}
        state = {name: array for name, array in stored.items() if not re.match(r"norm\d", name)}
        state |= {"norm.weight": np.ones(128, "f4"), "head.bias": np.ones(5, "f4")}
        imported = import_weights(write(tmp_path / "swin.pth", {"model": state}), tmp_path / "s.safetensors", Config())
        assert imported.settings == {"backbone": "swin_t"}
        assert len(imported.filled) == 8
        settings = {"backbone": "swin_t", "backbone_weights": str(tmp_path / "s.safetensors"), "mask": "none"}
        found = build_model(ModelConfig(**SMALL, **settings)).backbone.state_dict()
        assert torch.equal(found["norms.2.weight"], torch.ones(64))
        reduction = torch.from_numpy(stored["layers.1.downsample.reduction.weight"]).float()
        assert torch.equal(found["merges.1.reduction.weight"], reduction)
        state["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((49, 49), int)
        with pytest.raises(CheckpointError, match="other windows"):
            read_released(write(tmp_path / "other.pth", {"model": state}))

    def test_the_backbone_of_a_whole_file_will_do(self, checkpoint: Path) -> None:
        model = build_model(ModelConfig(backbone_weights=str(checkpoint), mask="none", **SMALL))
        expected = load_checkpoint(checkpoint).model["backbone.stem.weight"]
        assert torch.equal(model.backbone.state_dict()["stem.weight"], expected)

    @pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith(("resnet", "swin"))])
    def test_each_is_told_by_its_shapes(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        backbone_shapes.cache_clear()
        shapes = dict(backbone_shapes(name))
        assert nearest_backbone(shapes) == (name, [])
        last = next(reversed(shapes))
        shapes.pop(last)
        assert nearest_backbone(shapes) == (name, [last])
        assert nearest_backbone(shapes, optional=frozenset([last])) == (name, [])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"res2_0_branch2a_w": np.ones(1, "f4")}, "1 of 266 names are known neither.*res2_0_branch2a_w"),
            ({"stem.conv1.weight": np.ones((8, 1, 7, 7), "f4")}, r"Nearest is resnet50, but stem\.weight differ"),
        ],
    )
    def test_others_are_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = write(tmp_path / "x.pkl", {"model": self.resnet() | change})
        with pytest.raises(CheckpointError, match=message):
            read_released(path)


class TestRefusals:
    def changed(self, checkpoint: Path, tmp_path: Path, **changes: Tensor | None) -> Path:
        export_weights(checkpoint, tmp_path / "x.pth")
        content = torch.load(tmp_path / "x.pth", weights_only=True)
        content.pop("ema_state")
        for name, value in changes.items():
            if value is None:
                content["model"].pop(name)
            else:
                content["model"][name] = value
        torch.save(content, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"teacher.w": torch.ones(1)}, "1 names are none of DiffusionInst's or DiffusionDet's: teacher.w"),
            ({"head.head_series.1.bboxes_delta.bias": None}, "lacks head.head_series.1.bboxes_delta.bias"),
            ({"head.head_series.0.class_logits.weight": None}, "lacks head.head_series.0.class_logits.weight"),
            ({"head.head_series.0.norm4.weight": torch.ones(1)}, "none of DiffusionInst's"),
            (
                {"head.head_series.0.bboxes_delta.bias": torch.ones(5)},
                r"bboxes_delta.bias of shape \(5,\) instead of \(4,\)",
            ),
            (
                {"head.head_series.0.class_logits.weight": torch.tensor(1.0)},
                "class_logits.weight has an impossible shape",
            ),
            ({"backbone.fpn_output2.weight": torch.ones(0, 1, 1, 1)}, "fpn_output2.weight has an impossible shape"),
            ({"head.head_series.0.class_logits.weight": torch.ones(2**40, 0)}, "class_logits.weight has an impossible"),
            (
                {"backbone.bottom_up.stem.conv1.weight": torch.ones(8, 1, 7, 7)},
                "its backbone is none of this program's",
            ),
        ],
    )
    def test_every_name_is_accounted_for(
        self, changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
    ) -> None:
        path = self.changed(checkpoint, tmp_path, **changes)
        with pytest.raises(CheckpointError, match=message) as raised:
            import_weights(path, tmp_path / "out.safetensors", Config())
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out.safetensors").exists()

    def test_known_constants_of_losses_and_norms_are_left_out(self, checkpoint: Path, tmp_path: Path) -> None:
        path = self.changed(
            checkpoint,
            tmp_path,
            **{
                "criterion.fed_loss_cls_weights": torch.ones(7),
                "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.tensor(3),
            },
        )
        imported = import_weights(path, tmp_path / "out.safetensors", Config())
        assert len(imported.left_out) == 12 + 2
        assert imported.ema == {}

    def test_models_that_the_release_does_not_have(self, tmp_path: Path) -> None:
        for change, message in (
            ({"backbone": "tiny"}, "no backbone tiny"),
            ({"mask_norm": "group"}, "mask_norm group"),
        ):
            settings = ModelConfig(**SMALL | change)
            model = build_model(settings)
            path = tmp_path / "own.safetensors"
            save_checkpoint(path, model=model.state_dict(), config=Config(model=settings), iteration=0)
            with pytest.raises(CheckpointError, match=message):
                export_weights(path, tmp_path / "x.pth")
            assert not (tmp_path / "x.pth").exists()


def test_settings_that_no_shape_tells_can_be_given(checkpoint: Path, tmp_path: Path) -> None:
    export_weights(checkpoint, tmp_path / "x.pth")
    base = Config(model=ModelConfig(num_attention_heads=4), sampler=SamplerConfig(num_proposals=30))
    import_weights(tmp_path / "x.pth", tmp_path / "a.safetensors", base, given=["num_attention_heads", "num_proposals"])
    found = load_checkpoint(tmp_path / "a.safetensors").config
    assert (found.model.num_attention_heads, found.model.hidden_dim, found.sampler.num_proposals) == (4, 16, 30)
    bad = Config(model=ModelConfig(num_attention_heads=32))
    with pytest.raises(CheckpointError, match=r"must be a multiple of num_attention_heads \(32.*--set"):
        import_weights(tmp_path / "x.pth", tmp_path / "b.safetensors", bad, given=["num_attention_heads"])
    with pytest.raises(CheckpointError, match="has 7 classes, but 2 names"):
        import_weights(tmp_path / "x.pth", tmp_path / "b.safetensors", Config(), class_names=("a", "b"))


@pytest.mark.parametrize(
    ("num_classes", "dataset", "max_detections"),
    [(80, "coco", 100), (1203, "lvis", 300), (1230, "lvis_v05", 300), (7, "shapes", 100)],
)
def test_data_set_by_number_of_classes(num_classes: int, dataset: str, max_detections: int, tmp_path: Path) -> None:
    settings = ModelConfig(**SMALL | {"num_classes": num_classes, "mask": "none", "num_stages": 1})
    model = build_model(settings)
    save_checkpoint(tmp_path / "own.safetensors", model=model.state_dict(), config=Config(model=settings), iteration=0)
    export_weights(tmp_path / "own.safetensors", tmp_path / "x.pth")
    import_weights(tmp_path / "x.pth", tmp_path / "back.safetensors", Config())
    found = load_checkpoint(tmp_path / "back.safetensors").config
    assert (found.data.dataset, found.sampler.max_detections) == (dataset, max_detections)
