from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import needs_compiler
from torch.testing import assert_close

from diffinst.build import seeded_model
from diffinst.config import RELEASED, ModelConfig, SamplerConfig
from diffinst.engine.inference import SCOPES, batch_noise, detect
from diffinst.ops.paths import forget_paths, paths_taken
from diffinst.ops.rle import encode_masks
from diffinst.structures import Sample

SMALL = {
    "backbone": "tiny",
    "num_classes": 3,
    "hidden_dim": 32,
    "num_stages": 2,
    "num_attention_heads": 4,
    "dim_feedforward": 64,
    "dim_dynamic": 8,
    "mask_branch_channels": 16,
    "mask_branch_layers": 1,
}
IMAGE_IDS = [139, 7, 5000, 42, 1]


def make_model(**changes):
    model = seeded_model(ModelConfig(**SMALL | changes), seed=0).eval()
    for stage in model.box_head.stages:
        torch.nn.init.zeros_(stage.class_logits.bias)  # scores around a half: renewal keeps some and replaces some
    return model


def in_double_precision(model):
    """The network inside in float64, what enters and leaves it in float32.

    A convolution rounds otherwise in another batch, and an untrained network gives scores so close to each other that
    this changes their order.
    """
    model.double()
    model.box_head.time_embedding.mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    model.mask_branch.register_forward_hook(lambda module, inputs, output: output.float())
    return model


def make_samples(image_ids=IMAGE_IDS):
    samples = []
    for image_id in image_ids:
        generator = torch.Generator().manual_seed(image_id)
        image = torch.randint(256, (3, 60 - image_id % 3, 64), generator=generator, dtype=torch.uint8)
        samples.append(Sample(image=image, image_id=image_id, original_size=(90, 70 + image_id % 7)))
    return samples


def detect_ids(model, image_ids, settings):
    batch = model.make_batch(make_samples(image_ids))
    batch = replace(batch, images=batch.images.to(model.pixel_mean.dtype))
    found = detect(model, batch, settings)
    return dict(zip(image_ids, found))


def assert_same_detections(found, expected):
    assert found.labels.tolist() == expected.labels.tolist()
    assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert_close(found.boxes_xyxy, expected.boxes_xyxy, rtol=1e-4, atol=1e-2)
    if expected.masks is None:
        assert found.masks is None
    else:
        assert (found.masks != expected.masks).float().mean() < 1e-4


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("sampling_steps", [1, 3])
@pytest.mark.parametrize("preset", ["released", "fixed"])
def test_batches_equal_images_one_by_one(sampling_steps, preset):
    model = in_double_precision(make_model())
    settings = SamplerConfig(
        num_proposals=30, sampling_steps=sampling_steps, **RELEASED["sampler"] if preset == "released" else {}
    )
    alone = {image_id: detect_ids(model, [image_id], settings)[image_id] for image_id in IMAGE_IDS}
    assert all(len(found) > 0 for found in alone.values())
    assert sum(len(found) for found in alone.values()) > 40
    for batch in ([139, 7], [5000, 42, 1], IMAGE_IDS, [1, 5000, 139, 42, 7]):
        for image_id, found in detect_ids(model, batch, settings).items():
            assert_same_detections(found, alone[image_id])


def test_detections_lie_in_the_original_image(model):
    settings = SamplerConfig(num_proposals=30, max_detections=10)
    for sample, found in zip(make_samples(), detect(model, model.make_batch(make_samples()), settings)):
        height, width = sample.original_size
        assert 0 < len(found) <= 10
        assert found.masks.shape == (len(found), height, width)
        assert (found.scores.diff() <= 0).all()
        x1, y1, x2, y2 = found.boxes_xyxy.unbind(-1)
        assert ((x1 >= 0) & (x1 < x2) & (x2 <= width)).all()
        assert ((y1 >= 0) & (y1 < y2) & (y2 <= height)).all()


def test_another_seed_gives_other_detections(model):
    first, second = (
        detect_ids(model, [7], SamplerConfig(num_proposals=30, eval_seed=seed))[7].boxes_xyxy[:5] for seed in (0, 1)
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("num_proposals", [1, 2])
def test_few_proposals(model, num_proposals):
    found = detect_ids(model, [7, 42], SamplerConfig(num_proposals=num_proposals, sampling_steps=2))
    assert all(len(detections) <= 2 * num_proposals for detections in found.values())


def test_boxes_only():
    found = detect_ids(make_model(mask="none"), [7, 42], SamplerConfig(num_proposals=20))
    assert all(len(detections) > 0 and detections.masks is None for detections in found.values())


def test_nothing_passes_the_threshold(model):
    found = detect_ids(model, [7], SamplerConfig(num_proposals=20, score_threshold=1.0))[7]
    assert len(found) == 0
    assert found.masks.shape == (0, 90, 70)


def test_image_features_are_computed_once(model, monkeypatch):
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images: calls.append(len(images)) or encode(images))
    detect_ids(model, [7, 42], SamplerConfig(num_proposals=10, sampling_steps=4))
    assert calls == [2]


def test_scopes_are_timed_in_order(model):
    events = []

    @contextmanager
    def timer(scope):
        events.append(("start", scope))
        yield
        events.append(("end", scope))

    detect(model, model.make_batch(make_samples()), SamplerConfig(num_proposals=10), timer=timer)
    assert events == [(event, scope) for scope in SCOPES for event in ("start", "end")]


def test_detections_need_no_gradient(model):
    found = detect_ids(model, [7], SamplerConfig(num_proposals=10))[7]
    assert not found.boxes_xyxy.requires_grad


def test_training_mode_is_refused(model):
    try:
        with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
            detect(model.train(), model.make_batch(make_samples()), SamplerConfig(num_proposals=10))
    finally:
        model.eval()


def test_a_batch_that_would_change_an_image_is_refused(model):
    # Alone 60 x 64 pads to 64 x 64, beside the taller one to 96 x 64: convolutions would carry the difference inside.
    tall = Sample(torch.zeros(3, 70, 64, dtype=torch.uint8), image_id=3, original_size=(70, 64))
    batch = model.make_batch([*make_samples([7]), tall])
    with pytest.raises(ValueError, match="image 7 alone is padded to 64 x 64, in this batch to 96 x 64"):
        detect(model, batch, SamplerConfig(num_proposals=10))
    with torch.no_grad():
        alone = model.encode(model.make_batch(make_samples([7])).images).mask_features[0]
        together = model.encode(batch.images).mask_features[0, :, :16]
    assert not torch.allclose(alone, together, rtol=1e-3, atol=1e-3)


def test_noise_belongs_to_the_image():
    settings = SamplerConfig(num_proposals=4)
    together, alone = batch_noise([5, 6], settings, "cpu"), batch_noise([6], settings, "cpu")
    assert together(2, "step").shape == (2, 4, 4)
    assert_close(together(2, "step")[1], alone(2, "step")[0], rtol=0, atol=0)
    assert not torch.equal(together(2, "step")[0], together(2, "step")[1])
    assert not torch.equal(together(2, "step"), together(2, "renewal"))


@pytest.mark.gpu
@pytest.mark.parametrize("mask_head_kernel", ["torch", "triton"])
def test_gpu_equals_cpu(model, mask_head_kernel):
    settings = SamplerConfig(num_proposals=30)
    expected = detect_ids(model, [7, 42], settings)
    found = detect_ids(make_model(mask_head_kernel=mask_head_kernel).cuda(), [7, 42], settings)
    for image_id, detections in found.items():
        assert_same_detections(detections.to("cpu"), expected[image_id])


def test_bf16_computes_otherwise_and_gives_float32(model):
    forget_paths()
    batch = model.make_batch(make_samples([139]))
    settings = SamplerConfig(num_proposals=20, max_detections=None, nms_iou_threshold=None)
    (full,) = detect(model, batch, settings)
    assert paths_taken()["precision"] == ["fp32"]
    products = []
    model.box_head.stages[0].dynamic_conv.out.register_forward_hook(lambda _, __, out: products.append(out.dtype))
    (half,) = detect(model, batch, settings.model_copy(update={"inference_precision": "bf16"}))
    assert paths_taken()["precision"] == ["bf16", "fp32"]
    assert products == [torch.bfloat16]
    assert {half.boxes_xyxy.dtype, half.scores.dtype} == {torch.float32}
    assert min(len(half), len(full)) > 3  # which boxes of an untrained network are empty is a matter of rounding
    assert half.scores[0] != full.scores[0]
    assert_close(half.scores[0], full.scores[0], rtol=0, atol=0.02)


@needs_compiler
def test_a_compiled_head_finds_the_same_and_is_told(model):
    forget_paths()
    settings = SamplerConfig(num_proposals=30, sampling_steps=2)
    expected = detect_ids(model, [7, 42], settings)
    assert paths_taken()["box_head"] == ["eager"]
    forget_paths()
    for image_id, detections in detect_ids(model, [7, 42], settings.model_copy(update={"compile": "head"})).items():
        assert_same_detections(detections, expected[image_id])
    assert paths_taken()["box_head"] == ["compiled"]


@pytest.mark.parametrize("mask_form", ["bitmaps", "rle"])
def test_the_form_of_masks(model, mask_form):
    batch = model.make_batch(make_samples([139, 42]))
    settings = SamplerConfig(num_proposals=20)
    for found, expected in zip(detect(model, batch, settings, mask_form=mask_form), detect(model, batch, settings)):
        assert (found.masks is None) == (mask_form == "rle")
        assert (found.encodings or encode_masks(found.masks)) == encode_masks(expected.masks)
