"""Test-time augmentation: what views see, how it comes back, how it is merged, and which mask is whose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffinst.build import seeded_model
from diffinst.config import DataConfig, ModelConfig, SamplerConfig
from diffinst.data.transforms import plan_test, plan_views, transform_image, view_image
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.engine.evaluate import predict_split
from diffinst.engine.inference import batch_noise, detect
from diffinst.engine.predict import detect_image
from diffinst.engine.tta import detect_augmented
from diffinst.evaluation.predictions import iter_predictions
from diffinst.model import DiffusionInst
from diffinst.structures import Detections, Features, HeadOutput, ImageBatch, Sample

SMALL: dict[str, Any] = {
    "num_proposals": 12,
    "max_detections": 8,
    "tta": True,
    "tta_shortest_edges": (48, 40),
    "tta_longest_edge": 96,
    "tta_min_box_sizes": (),
    "tta_max_box_sizes": (),
}


def settings_of(**changes: Any) -> SamplerConfig:
    return SamplerConfig(**SMALL | changes)


@pytest.fixture(scope="module")
def model() -> DiffusionInst:
    config = ModelConfig(
        backbone="tiny",
        num_classes=3,
        hidden_dim=16,
        num_stages=2,
        num_attention_heads=2,
        dim_feedforward=16,
        dim_dynamic=4,
        mask_branch_channels=8,
        mask_branch_layers=1,
    )
    model = seeded_model(config, seed=3).eval()
    for stage in model.box_head.stages:
        torch.nn.init.zeros_(stage.class_logits.bias)  # scores around a half
    return model


def picture(height: int = 53, width: int = 71, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def original(image: np.ndarray, image_id: int = 7) -> Sample:
    return Sample(torch.from_numpy(image.transpose(2, 0, 1).copy()), image_id, image.shape[:2])


def assert_same(found: Detections, expected: Detections) -> None:
    assert found.labels.tolist() == expected.labels.tolist()
    assert_close(found.scores, expected.scores, rtol=0, atol=0)
    assert_close(found.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=0)
    assert found.masks is not None
    assert (found.masks == expected.masks).all()


class Reader:
    """Stands for a network that reads: one detection, the box of the bright pixels, with brightness as the mask.

    Mask features are every fourth pixel, as a trained network's are: those at the middle of what they stand for.
    Proposals beyond the first are empty boxes of score 0. `say` may change box (in view pixels) and score by the
    number of the view, counted in the order of calls.
    """

    training = False
    snr_scale = 2.0

    def __init__(self, say: Callable[[int, torch.Tensor, float], tuple[torch.Tensor, float]] | None = None) -> None:
        self.backbone = type("Backbone", (), {"size_divisor": 32})()
        self.mask_branch: object | None = object()
        self.schedule = NoiseSchedule(1000)
        self.say = say or (lambda call, box, score: (box, score))
        self.calls = 0

    def make_batch(self, samples: list[Sample]) -> ImageBatch:
        (sample,) = samples
        height, width = sample.image.shape[1:]
        images = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
        images[0, :, :height, :width] = sample.image / 255
        return ImageBatch(images, [(height, width)], [sample.original_size], [sample.image_id])

    def encode(self, images: torch.Tensor) -> Features:
        brightness = images.mean(dim=1, keepdim=True)
        inside = brightness[0, 0] > 0.5
        rows, columns = inside.any(dim=1).nonzero().flatten(), inside.any(dim=0).nonzero().flatten()
        box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        return Features([box], brightness[:, :, 2::4, 2::4])

    def denoise(
        self,
        features: Features,
        boxes_xyxy: torch.Tensor,
        t: torch.Tensor,  # noqa: ARG002
        *,
        compiled: bool = False,  # noqa: ARG002
    ) -> HeadOutput:
        box, score = self.say(self.calls, features.pyramid[0], 0.9)
        self.calls += 1
        boxes = torch.zeros_like(boxes_xyxy)
        boxes[0, 0] = box
        logits = torch.full((*boxes.shape[:2], 3), -20.0)
        logits[0, 0, 1] = torch.logit(torch.tensor(score))
        return HeadOutput(logits[None], boxes[None], torch.ones(1, *boxes.shape[:2], 1))

    def mask_logits(self, mask_features: torch.Tensor, mask_params: torch.Tensor) -> torch.Tensor:
        return (mask_features - 0.5) * 40 * mask_params[:, :, None]


def bracket(height: int = 200, width: int = 310) -> np.ndarray:
    """A shape like the letter L, left of the middle: mirrored or upside down it is another."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[40:160, 30:60] = 255
    image[130:160, 30:130] = 255
    return image


def detections_of(reader: Reader, image: np.ndarray, **changes: Any) -> Detections:
    changes = {"score_threshold": 0.04, "tta_shortest_edges": (200, 128), "tta_longest_edge": 1000} | changes
    return detect_augmented(reader, original(image), settings_of(**changes))  # type: ignore[arg-type]


def test_views_are_each_size_and_its_mirror_image() -> None:
    views = plan_views((100, 200), settings_of(tta_shortest_edges=(50, 80), tta_longest_edge=120))
    # 80 x 160 is too long: 60 x 120.
    assert [(view.number, view.size, view.mirrored) for view in views] == [
        (0, (50, 100), False),
        (1, (50, 100), True),
        (2, (60, 120), False),
        (3, (60, 120), True),
    ]
    assert len(plan_views((100, 200), SamplerConfig())) == 26
    assert [view.mirrored for view in plan_views((9, 9), settings_of(tta_flip=False))] == [False, False]


def test_a_view_of_the_test_size_is_the_test_image_and_its_mirror_image_exactly_that() -> None:
    image, data = picture(), DataConfig(shortest_edge_test=48, longest_edge_test=96)
    plain, mirrored = plan_views((53, 71), settings_of())[:2]
    resized = transform_image(image, plan_test((53, 71), data))
    assert_close(view_image(image, plain), resized, rtol=0, atol=0)
    assert_close(view_image(image, mirrored), resized.flip(2), rtol=0, atol=0)


@pytest.mark.parametrize("merge", ["nms", "vote", "soft_vote"])
@pytest.mark.parametrize("size", [(200, 310), (201, 303)])
def test_boxes_and_masks_come_back_the_right_way_round(merge: str, size: tuple[int, int]) -> None:
    image = bracket(*size)
    found = detections_of(Reader(), image, tta_merge=merge)
    assert found.labels[0] == 1
    assert_close(found.boxes_xyxy[0], torch.tensor([30.0, 40, 130, 160]), rtol=0, atol=2.0)
    assert found.masks is not None
    expected = torch.from_numpy(image[:, :, 0] > 0)
    overlap = (found.masks[0] & expected).sum() / (found.masks[0] | expected).sum()
    assert overlap > 0.93
    assert (found.masks[0].flip(1) & expected).sum() < 0.1 * expected.sum()


def test_the_mirrored_view_alone_gives_what_the_other_does() -> None:
    found = []
    for better in (0, 1):
        reader = Reader(lambda call, box, score, better=better: (box, 0.9 if call == better else 0.3))
        found.append(detections_of(reader, bracket(), tta_shortest_edges=(200,), tta_merge="nms"))
    assert [len(item) for item in found] == [1, 1]
    assert_close(found[0].boxes_xyxy, found[1].boxes_xyxy)
    masks = [item.masks for item in found if item.masks is not None]
    # Every fourth pixel is another one from the other side: outlines differ by at most a pixel, and do.
    assert 0 < (masks[0] ^ masks[1]).sum() < 0.04 * masks[0].sum()


def test_the_mask_is_that_of_the_best_member_cut_to_the_merged_box() -> None:
    def say(call: int, box: torch.Tensor, score: float) -> tuple[torch.Tensor, float]:
        # The second view, mirrored, sees the box reach 20 pixels less far down.
        return (box, 0.8) if call == 0 else (box - torch.tensor([0.0, 0, 0, 20]), 0.4)

    found = detections_of(Reader(say), bracket(), tta_shortest_edges=(200,), tta_merge="vote")
    # (0.8 * 160 + 0.4 * 140) / 1.2 = 153.3: the mask of the first goes on to 160, and is cut after row 153.
    assert_close(found.boxes_xyxy, torch.tensor([[30.0, 40, 130, 460 / 3]]))
    assert_close(found.scores, torch.tensor([0.8]))
    assert found.masks is not None
    assert found.masks[0, 153].any()
    assert not found.masks[0, 154:].any()


def test_detections_of_another_size_than_the_view_is_for_do_not_count() -> None:
    # The root of the area: 109.5 at 200 pixels, 70.1 at 128.
    def count(**limits: Any) -> int:
        return len(
            detections_of(Reader(), bracket(), tta_flip=False, nms_iou_threshold=None, tta_merge="nms", **limits)
        )

    assert count() == 2
    assert count(tta_min_box_sizes=(100, 100)) == 1
    assert count(tta_min_box_sizes=(100, 60)) == 2
    assert count(tta_min_box_sizes=(110, 0)) == 1
    assert count(tta_max_box_sizes=(100, 100)) == 1
    assert count(tta_max_box_sizes=(100, 60)) == 0
    none = detections_of(Reader(), bracket(), tta_max_box_sizes=(9, 9))
    assert none.masks is not None
    assert tuple(none.masks.shape) == (0, 200, 310)
    assert tuple(none.boxes_xyxy.shape) == (0, 4)


def test_the_score_threshold_holds_for_softened_scores() -> None:
    def say(call: int, box: torch.Tensor, score: float) -> tuple[torch.Tensor, float]:
        return (box, 0.9) if call == 0 else (box - torch.tensor([0.0, 0, 0, 30]), 0.6)

    # 1 - IoU = 30 / 120: 0.6 becomes 0.15.
    assert_close(
        detections_of(Reader(say), bracket(), tta_shortest_edges=(200,), tta_flip=True).scores,
        torch.tensor([0.9, 0.15]),
    )
    assert len(detections_of(Reader(say), bracket(), tta_shortest_edges=(200,), score_threshold=0.2)) == 1


def test_one_view_of_the_test_size_is_plain_detection(model: DiffusionInst) -> None:
    image, data = picture(), DataConfig(shortest_edge_test=48, longest_edge_test=96)
    for changes in ({"sampling_steps": 3}, {"nms_iou_threshold": None}, {"score_threshold": 0.01}):
        settings = settings_of(tta_shortest_edges=(48,), tta_flip=False, tta_merge="nms", **changes)
        plain = SamplerConfig(**settings.model_dump() | {"tta": False})
        found = detect_image(model, image, 7, data=data, settings=settings)
        assert_same(found, detect_image(model, image, 7, data=data, settings=plain))
        assert len(found) > 0


def test_each_view_has_noise_of_its_own_and_the_first_that_of_plain_detection(model: DiffusionInst) -> None:
    draws = [batch_noise([7], settings_of(), "cpu", view=view)(0, "initial") for view in range(3)]
    assert_close(draws[0], batch_noise([7], settings_of(), "cpu")(0, "initial"), rtol=0, atol=0)
    assert (draws[0] != draws[1]).any()
    assert (draws[1] != draws[2]).any()
    assert_close(draws[2], batch_noise([1, 7], settings_of(), "cpu", view=2)(0, "initial")[1:], rtol=0, atol=0)
    # So two views of one size do not find the same boxes twice.
    settings = settings_of(tta_shortest_edges=(48, 48), tta_flip=False, nms_iou_threshold=None, tta_merge="nms")
    boxes = detect_augmented(model, original(picture()), settings).boxes_xyxy
    assert len(boxes.unique(dim=0)) == len(boxes) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"tta_shortest_edges": (48, 36)},
        {"tta_longest_edge": 60},
        {"tta_flip": False},
        {"tta_min_box_sizes": (20, 20)},
        {"tta_max_box_sizes": (20, 20)},
        {"tta_merge": "vote"},
        {"tta_merge": "nms"},
        {"tta_vote_iou_threshold": 0.2},
        {"max_detections": 3},
        {"max_detections": None},
        {"eval_seed": 1},
    ],
)
def test_every_setting_has_an_effect(model: DiffusionInst, changes: dict[str, Any]) -> None:
    sample = original(picture())
    before = detect_augmented(model, sample, settings_of(max_detections=40))
    after = detect_augmented(model, sample, settings_of(**{"max_detections": 40} | changes))
    assert before.boxes_xyxy.shape != after.boxes_xyxy.shape or bool((before.boxes_xyxy != after.boxes_xyxy).any())


def test_without_a_limit_there_are_at_most_as_many_as_proposals(model: DiffusionInst) -> None:
    settings = settings_of(max_detections=None, nms_iou_threshold=None, tta_merge="nms")
    assert len(detect_augmented(model, original(picture()), settings)) == 12


def test_boxes_only_and_tiny_images(model: DiffusionInst) -> None:
    reader = Reader()
    reader.mask_branch = None
    assert detections_of(reader, bracket()).masks is None
    found = detect_augmented(model, original(picture(1, 1)), settings_of())
    assert found.masks is not None
    assert tuple(found.masks.shape[1:]) == (1, 1)


def test_scopes_are_entered_for_every_view(model: DiffusionInst) -> None:
    seen: list[str] = []

    def timer(scope: str) -> nullcontext[None]:
        seen.append(scope)
        return nullcontext()

    detect_augmented(model, original(picture()), settings_of(), timer=timer)
    assert seen == ["preprocess", "backbone", "head", "head"] * 4 + ["head", "masks"]


def test_a_resized_image_or_a_model_in_training_is_refused(model: DiffusionInst) -> None:
    sample = original(picture())
    with pytest.raises(ValueError, match=r"as in its file, \(50, 60\), not \(53, 71\)"):
        detect_augmented(model, Sample(sample.image, 7, (50, 60)), settings_of())
    model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        detect_augmented(model, sample, settings_of())
    model.eval()


class Split:
    """Images of several sizes, as files have them."""

    category_ids = (2, 5, 9)

    def __init__(self, image_ids: list[int]) -> None:
        self.image_ids = image_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def test_sizes(self) -> list[tuple[int, int]]:
        return [(48, 64)] * len(self)

    def test_sample(self, index: int) -> Sample:  # noqa: ARG002
        raise AssertionError("resized images are of no use to augmentation")

    def original_sample(self, index: int) -> Sample:
        image_id = self.image_ids[index]
        return original(picture(40 + image_id % 5, 61, seed=image_id), image_id)


def test_a_split_is_predicted_alike_in_any_order_and_batch_size(model: DiffusionInst, tmp_path: Path) -> None:
    ids = [31, 4, 15]
    predict_split(model, Split(ids), settings_of(), tmp_path / "a", batch_size=2)
    predict_split(model, Split(ids[::-1]), settings_of(), tmp_path / "b")
    predict_split(model, Split(ids[:1]), settings_of(), tmp_path / "c")
    found = [{record["image_id"]: record for record in iter_predictions(tmp_path / name)} for name in ("a", "b", "c")]
    assert set(found[0]) == set(ids)
    assert found[0] == found[1]
    assert found[2][31] == found[0][31]
    alone = detect_augmented(model, Split(ids).original_sample(1), settings_of())
    assert_close(torch.tensor(found[0][4]["score"]), alone.scores, rtol=0, atol=1e-6)


def test_plain_detection_does_not_look_at_these_settings(model: DiffusionInst) -> None:
    batch = model.make_batch([original(picture())])
    (found,) = detect(model, batch, SamplerConfig(num_proposals=12))
    (other,) = detect(model, batch, settings_of(max_detections=100, tta=False, tta_merge="nms"))
    assert_same(found, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tta_shortest_edges": ()}, "tta_shortest_edges needs at least one size"),
        ({"tta_shortest_edges": (0, 48)}, r"tta_shortest_edges \[0, 48\] must be at least 1 each"),
        ({"tta_min_box_sizes": (1,)}, "tta_min_box_sizes has 1 values for 2 tta_shortest_edges"),
        ({"tta_max_box_sizes": (1, 2, 3)}, "tta_max_box_sizes has 3 values for 2 tta_shortest_edges"),
    ],
)
def test_settings_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**changes)
