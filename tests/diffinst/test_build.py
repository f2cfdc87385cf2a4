from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffinst.backbones.registry import BACKBONES
from diffinst.backbones.tiny import Tiny
from diffinst.build import (
    _Undrawn,
    build_backbone,
    build_model,
    load_backbone_weights,
    require_device,
    restored_model,
    seeded_model,
)
from diffinst.checkpoint import load_checkpoint, load_model_weights, save_checkpoint
from diffinst.config import Config, ModelConfig
from diffinst.errors import CheckpointError, ConfigError

SMALL: dict = {
    "num_classes": 2,
    "hidden_dim": 16,
    "num_stages": 1,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "dim_dynamic": 4,
    "mask_branch_channels": 8,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_builds(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone=name))
    assert [stride for _, stride in backbone.out_shapes.values()] == [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["resnet50", "swin_t", "efficientnet_lite0", "tiny"])
def test_every_kind_of_backbone_gets_its_pyramid(name: str) -> None:
    model = build_model(ModelConfig(backbone=name, **SMALL))
    assert list(model.fpn.out_shapes.values()) == [(16, 4), (16, 8), (16, 16), (16, 32)]


def test_every_size_reaches_its_module() -> None:
    config = ModelConfig(
        backbone="tiny",
        num_classes=7,
        hidden_dim=24,
        num_stages=3,
        num_attention_heads=3,
        dim_feedforward=40,
        dim_dynamic=6,
        num_class_layers=2,
        num_box_layers=4,
        pooler_resolution=5,
        pooler_sampling_ratio=1,
        box_pooling="roi_align",
        dropout=0.25,
        mask_branch_channels=20,
        mask_branch_layers=2,
        mask_feature_channels=6,
        mask_head_channels=(5, 4),
        mask_head_kernel="triton",
        mask_norm="group",
        snr_scale=1.5,
        num_train_timesteps=50,
    )
    model = build_model(config)
    stages = model.box_head.stages
    stage = stages[1]
    assert len(stages) == 3
    assert stage.class_logits.weight.shape == (7, 24)
    assert stage.self_attention.num_heads == 3
    assert stage.self_attention.dropout == stage.dropout.p == 0.25
    assert stage.feedforward[0].weight.shape == (40, 24)
    assert stage.dynamic_conv.generate.weight.shape == (2 * 24 * 6, 24)
    assert stage.dynamic_conv.out.weight.shape == (24, 25 * 24)
    assert (len(stage.class_tower), len(stage.box_tower)) == (2 * 3, 4 * 3)
    assert (stage.pooler_resolution, stage.pooler_sampling_ratio, stage.box_pooling) == (5, 1, "roi_align")
    assert stage.mask_params.weight.shape == (6 * 5 + 5 * 4 + 4 * 1 + 5 + 4 + 1, 24)
    assert model.mask_branch.project.weight.shape == (6, 20, 1, 1)
    assert len(model.mask_branch.tower) == 2
    assert isinstance(model.mask_branch.tower[0][1], torch.nn.GroupNorm)
    assert (model.num_classes, model.snr_scale, model.mask_head_channels) == (7, 1.5, (5, 4))
    assert model.mask_head_kernel == "triton"
    assert model.schedule.num_timesteps == 50


def test_class_count_is_needed() -> None:
    with pytest.raises(ConfigError, match="num_classes is not set"):
        build_model(ModelConfig(backbone="tiny"))


def test_a_device_that_cannot_detect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []
    monkeypatch.setattr("diffinst.build.require_triton", lambda *arguments: asked.append(arguments))
    require_device(ModelConfig(), "cpu")
    require_device(ModelConfig(mask_head_kernel="triton", mask="none"), "cpu")
    assert not asked
    require_device(ModelConfig(mask_head_kernel="triton", mask_feature_channels=4), "cuda:1")
    assert asked == [("cuda:1", 4, (8, 8))]


def test_seed_decides_the_weights_and_nothing_else_changes() -> None:
    config = ModelConfig(backbone="tiny", **SMALL)
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    models = [seeded_model(config, seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected_draw)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["backbone.stem.weight"], models[2]["backbone.stem.weight"])


def test_imagenet_weights_differ_from_random_ones() -> None:
    backbones = [
        build_backbone(ModelConfig(backbone="efficientnet_lite0", backbone_weights=w)) for w in ("imagenet", "none")
    ]
    assert (backbones[0].stem.norm.running_var != 1).all()
    assert (backbones[1].stem.norm.running_var == 1).all()


def test_imagenet_weights_that_no_package_carries() -> None:
    with pytest.raises(ConfigError, match="for resnet50, only for efficientnet_lite0"):
        build_backbone(ModelConfig(backbone="resnet50", backbone_weights="imagenet"))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_weights_from_a_file(tmp_path: Path, prefix: str) -> None:
    saved = Tiny()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    if prefix:
        state["fpn.lateral.0.bias"] = torch.zeros(1)
    save_file(state, tmp_path / "weights.safetensors")
    config = ModelConfig(backbone="tiny", backbone_weights=str(tmp_path / "weights.safetensors"))
    loaded = build_backbone(config).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.state_dict().items())


def test_missing_weights_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no such file\. Allowed: 'none', 'imagenet'"):
        load_backbone_weights(Tiny(), tmp_path / "nothing.safetensors")


def test_truncated_weights_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(Tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated") as caught:
        load_backbone_weights(Tiny(), path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_backbone(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(Tiny(stem_channels=8).state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r"stem\.weight is \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\).* and \d+ more"
    ):
        load_backbone_weights(Tiny(), path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is missing"):
        load_backbone_weights(Tiny(), path)


@pytest.mark.parametrize("name", ["resnet50", "swin_t", "efficientnet_lite0", "tiny"])  # one of each kind
def test_a_restored_model_is_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    config = ModelConfig(backbone=name, **SMALL)
    trained = seeded_model(config, 1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.25)
    save_checkpoint(tmp_path / "a.safetensors", model=trained.state_dict(), config=Config(model=config), iteration=1)
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    copied = build_model(config)
    load_model_weights(copied, checkpoint)
    before = torch.random.get_rng_state()
    model = restored_model(checkpoint)
    assert torch.equal(torch.random.get_rng_state(), before)
    for values in zip(*(one.state_dict().values() for one in (model, copied, trained)), strict=True):
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])
    for one, other in zip(model.buffers(), copied.buffers(), strict=True):
        assert torch.equal(one, other)  # those that are in no checkpoint too
    flags = [[parameter.requires_grad for parameter in one.parameters()] for one in (model, copied)]
    assert flags[0] == flags[1]
    held = {tensor.data_ptr() for tensor in checkpoint.model.values() if tensor.numel()}
    assert all(parameter.data_ptr() in held for parameter in model.parameters())


def test_a_model_of_another_size_is_not_restored(tmp_path: Path) -> None:
    config = ModelConfig(backbone="tiny", **SMALL)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model=seeded_model(config, 1).state_dict(), config=Config(model=config), iteration=1)
    other = config.model_copy(update={"hidden_dim": 24})
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        restored_model(load_checkpoint(path), other)
    with pytest.raises(CheckpointError, match="no moving average"):
        restored_model(load_checkpoint(path), use_ema=True)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (0.5, 0.9)])
def test_drawing_until_all_is_in_bounds_ends(bounds: tuple[float, float]) -> None:
    """As Swin's weights are drawn; what is in memory before is out of bounds."""
    parameter = torch.nn.Parameter(torch.full((50,), 9.0))
    with _Undrawn():
        torch.nn.init.trunc_normal_(parameter, 0, 1, *bounds)
        torch.nn.init.xavier_uniform_(untouched := torch.nn.Parameter(torch.full((2, 3), 9.0)))
        torch.nn.init.normal_(untouched)
        torch.nn.init.kaiming_normal_(untouched)
    assert (untouched == 9).all()


def test_half_precision_of_a_file_becomes_the_models(tmp_path: Path) -> None:
    config = ModelConfig(backbone="tiny", **SMALL)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model=seeded_model(config, 1).half().state_dict(), config=Config(model=config), iteration=1)
    model = restored_model(load_checkpoint(path))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    wanted = seeded_model(config, 1).half().float()
    assert all(map(torch.equal, model.parameters(), wanted.parameters()))


@pytest.mark.parametrize("method", ["auto", "roi_align"])
def test_what_torchvision_lacks_is_known_before_any_work(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def operators() -> None:
        raise ImportError("no operators")

    monkeypatch.setattr("diffinst.ops.roi.operators", operators)
    with pytest.raises(ImportError, match="no operators"):
        build_model(ModelConfig(backbone="tiny", box_pooling=method, **SMALL))
