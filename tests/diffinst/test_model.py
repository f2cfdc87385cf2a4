from __future__ import annotations

import pytest
import torch
from helpers import load_fixture
from released_tiny_model import released_tiny_model
from torch.testing import assert_close

from diffinst.build import build_model
from diffinst.config import ModelConfig
from diffinst.model import DiffusionInst
from diffinst.ops.roi import pixel_table
from diffinst.structures import Sample


def _tiny(**changes: object) -> DiffusionInst:
    sizes: dict = {
        "backbone": "tiny",
        "num_classes": 3,
        "hidden_dim": 16,
        "num_stages": 2,
        "num_attention_heads": 2,
        "dim_feedforward": 16,
        "dim_dynamic": 4,
        "mask_branch_channels": 8,
        "mask_branch_layers": 1,
    }
    torch.manual_seed(0)
    return build_model(ModelConfig(**(sizes | changes)))


def _sample(height: int, width: int, image_id: int = 1, value: int | None = None) -> Sample:
    generator = torch.Generator().manual_seed(image_id)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    if value is not None:
        image.fill_(value)
    return Sample(image=image, image_id=image_id, original_size=(2 * height, 2 * width))


def _noisy_boxes(num_images: int, num_proposals: int = 6) -> torch.Tensor:
    boxes = torch.rand(num_images, num_proposals, 4, generator=torch.Generator().manual_seed(2)) * 30
    boxes[..., 2:] += boxes[..., :2] + 1
    return boxes


def test_batch_by_hand() -> None:
    """Tiny normalises as ResNet: red of 124 is (124 - 123.675) / 58.395 = 0.005566; padding is 0 after that."""
    batch = _tiny().make_batch([_sample(33, 20, image_id=7, value=124)])
    assert batch.images.shape == (1, 3, 64, 32)
    assert_close(batch.images[0, 0, :33, :20], torch.full((33, 20), 0.005566), rtol=1e-3, atol=0)
    assert not batch.images[0, :, 33:].any()
    assert not batch.images[0, :, :, 20:].any()
    assert (batch.image_sizes, batch.original_sizes, batch.image_ids) == ([(33, 20)], [(66, 40)], [7])


def test_batch_parity() -> None:
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("ops").items()}
    samples = [
        Sample(image=fixture[f"pre_img{i}"], image_id=i, original_size=tuple(fixture[f"pre_img{i}"].shape[1:]))
        for i in range(2)
    ]
    batch = released_tiny_model().make_batch(samples)
    assert_close(batch.images, fixture["pre_tensor"], rtol=1e-5, atol=1e-6)
    assert_close(batch.whwh, fixture["pre_whwh"])
    assert batch.image_sizes == [tuple(size) for size in fixture["pre_sizes"].tolist()]


def test_batch_leaves_its_samples_alone() -> None:
    sample = _sample(40, 40)
    before = sample.image.clone()
    _tiny().make_batch([sample, _sample(20, 60, image_id=2)])
    assert torch.equal(sample.image, before)


def test_whole_training_forward_parity() -> None:
    """Two images of different sizes, from pixels to the outputs of every stage, batch norm in training mode."""
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("train_step").items()}
    model = released_tiny_model().train()
    samples = [
        Sample(image=fixture[f"img{i}_uint8"], image_id=i, original_size=tuple(fixture[f"img{i}_uint8"].shape[1:]))
        for i in range(2)
    ]
    with torch.no_grad():
        features = model.encode(model.make_batch(samples).images)
        boxes, t = fixture["head_in_boxes"].float(), torch.cat([fixture["img0_t"], fixture["img1_t"]])
        output = model.denoise(features, boxes, t)
    ours = {
        **{f"feat_p{level}": x for level, x in zip((2, 3, 4, 5), features.pyramid)},
        "mask_feat": features.mask_features,
        "head_logits": output.class_logits,
        "head_boxes": output.boxes_xyxy,
        "head_kernels": output.mask_params,
    }
    for name, value in ours.items():
        scale = fixture[name].abs().max().item()
        assert_close(value, fixture[name], rtol=1e-4, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}")


def test_the_mask_head_is_computed_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []
    monkeypatch.setattr("diffinst.model.apply_mask_head", lambda *_, **named: asked.append(named))
    for kernel in ("auto", "torch", "triton"):
        _tiny(mask_head_kernel=kernel).mask_logits(torch.zeros(8, 2, 2), torch.zeros(1, 153))
    assert [named["kernel"] for named in asked] == ["auto", "torch", "triton"]


@pytest.mark.parametrize("num_classes", [1, 2, 3, 80])
def test_every_parameter_has_a_gradient(num_classes: int) -> None:
    model = _tiny(num_classes=num_classes)
    batch = model.make_batch([_sample(96, 96), _sample(64, 80, image_id=2)])
    features = model.encode(batch.images)
    boxes = torch.cat([_noisy_boxes(2), torch.tensor([0.0, 0.0, 1000.0, 1000.0]).expand(2, 1, 4)], dim=1)
    output = model.denoise(features, boxes, torch.tensor([0, 999]))
    params = output.mask_params[:, :, :2].transpose(0, 1).flatten(0, 2)
    masks = model.mask_logits(features.mask_features, params, torch.tensor([0] * 4 + [1] * 4))
    assert masks.shape == (8, 24, 24)
    loss = output.class_logits.square().mean() + output.boxes_xyxy.square().mean() + masks.square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = _tiny().eval()
    samples = [_sample(64, 64, image_id=index) for index in range(3)]
    boxes, t = _noisy_boxes(3), torch.tensor([999, 500, 0])
    with torch.no_grad():
        features = model.encode(model.make_batch(samples).images)
        together = model.denoise(features, boxes, t)
        for index, sample in enumerate(samples):
            one = slice(index, index + 1)
            alone_features = model.encode(model.make_batch([sample]).images)
            alone = model.denoise(alone_features, boxes[one], t[one])
            assert_close(features.mask_features[one], alone_features.mask_features, rtol=1e-4, atol=1e-5)
            assert_close(together.class_logits[:, one], alone.class_logits, rtol=1e-4, atol=1e-5)
            assert_close(together.boxes_xyxy[:, one], alone.boxes_xyxy, rtol=1e-4, atol=1e-3)


def test_mask_features_do_not_depend_on_boxes() -> None:
    """Encoding takes images alone, so that it can be done once for all sampling steps."""
    model = _tiny().eval()
    calls = []
    model.mask_branch.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        features = model.encode(model.make_batch([_sample(64, 64)]).images)
        for t in (999, 499, 0):
            model.denoise(features, _noisy_boxes(1), torch.tensor([t]))
    assert len(calls) == 1


def test_boxes_only_model() -> None:
    model = _tiny(mask="none")
    features = model.encode(model.make_batch([_sample(64, 64)]).images)
    output = model.denoise(features, _noisy_boxes(1), torch.tensor([10]))
    assert features.mask_features is None
    assert output.mask_params is None
    assert not [name for name, _ in model.named_parameters() if "mask" in name]


def test_constants_stay_out_of_the_state() -> None:
    names = set(_tiny().state_dict())
    assert not [name for name in names if name.startswith(("pixel_", "schedule"))]


def test_the_pyramid_is_laid_out_once_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many stages and sampling steps: it is the largest copy that the box head makes."""
    made = []

    def counted(*args: object, **kwargs: object) -> torch.Tensor | None:
        made.append(pixel_table(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("diffinst.heads.box_head.pixel_table", counted)
    monkeypatch.setattr("diffinst.ops.roi.pixel_table", counted)
    model = _tiny(box_pooling="bags").eval()
    batch = model.make_batch([_sample(32, 32)])
    with torch.no_grad():
        features = model.encode(batch.images)
        for t in (999, 500):
            model.denoise(features, _noisy_boxes(1), torch.full((1,), t))
    assert len(made) == 1
    assert features.pixel_table is made[0]
