import math

import numpy as np
import pytest
import torch
from helpers import load_fixture
from torch.testing import assert_close
from torchvision.ops import nms

from diffinst.config import RELEASED, SamplerConfig
from diffinst.diffusion.sampler import StepPrediction
from diffinst.heads.mask_head import apply_mask_head, num_mask_params
from diffinst.ops.paths import forget_paths, paths_taken
from diffinst.ops.rle import encode_masks
from diffinst.postprocess import finish, select_candidates
from diffinst.structures import Candidates


def make_step(class_logits, boxes_xyxy, mask_params=None, t=999):
    unused = torch.zeros_like(boxes_xyxy)
    return StepPrediction(
        t=t,
        class_logits=class_logits,
        boxes_xyxy=boxes_xyxy,
        mask_params=mask_params,
        x_t=unused,
        x_0=unused,
        noise_pred=unused,
        keep=torch.ones(boxes_xyxy.shape[:2], dtype=torch.bool),
    )


def random_step(seed, batch_size=2, num_proposals=40, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch_size, num_proposals, 2, generator=generator) * 30
    size = torch.rand(batch_size, num_proposals, 2, generator=generator) * 40 + 5
    return make_step(
        torch.randn(batch_size, num_proposals, num_classes, generator=generator),
        torch.cat([corner, corner + size], dim=-1),
        torch.randn(batch_size, num_proposals, 5, generator=generator),
    )


def select_slowly(steps, image, iou_threshold):
    """Boxes and filters tiled over classes, the N best of each step, suppression class by class."""
    boxes, scores, labels, params = [], [], [], []
    for step in steps:
        num_proposals, num_classes = step.class_logits.shape[1:]
        pairs = [(proposal, label) for proposal in range(num_proposals) for label in range(num_classes)]
        probability = step.class_logits[image].sigmoid()
        pairs.sort(key=lambda pair: -probability[pair])
        for proposal, label in pairs[:num_proposals]:
            boxes.append(step.boxes_xyxy[image, proposal])
            scores.append(probability[proposal, label])
            labels.append(label)
            params.append(step.mask_params[image, proposal])
    boxes, scores, labels, params = torch.stack(boxes), torch.stack(scores), torch.tensor(labels), torch.stack(params)
    kept = torch.cat(
        [
            members[nms(boxes[members], scores[members], iou_threshold)]
            for members in (torch.where(labels == label)[0] for label in labels.unique())
        ]
    )
    kept = kept[scores[kept].argsort(descending=True)]
    return boxes[kept], scores[kept], labels[kept], params[kept]


def assert_same_candidates(found, boxes, scores, labels, params):
    assert found.labels.tolist() == labels.tolist()
    assert_close(found.scores, scores)
    assert_close(found.boxes_xyxy, boxes)
    assert_close(found.mask_params, params)


def test_best_pairs_by_hand():
    # Two proposals, two classes: proposal 1 has the two best pairs, so proposal 0 gives nothing.
    logits = torch.tensor([[[0.0, -1.0], [2.0, 1.0]]])
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 9.0, 9.0]]])
    params = torch.tensor([[[10.0], [20.0]]])
    (found,) = select_candidates([make_step(logits, boxes, params)], SamplerConfig())
    assert found.labels.tolist() == [0, 1]
    assert_close(found.scores, torch.tensor([2.0, 1.0]).sigmoid())
    assert_close(found.boxes_xyxy, boxes[0, [1, 1]])
    assert found.mask_params.tolist() == [[20.0], [20.0]]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_selection_equals_slow_twin(num_steps):
    steps = [random_step(seed) for seed in range(num_steps)]
    found = select_candidates(steps, SamplerConfig(nms_iou_threshold=0.3))
    for image in (0, 1):
        expected = select_slowly(steps, image, 0.3)
        assert len(expected[0]) < 40 * num_steps
        assert_same_candidates(found[image], *expected)


@pytest.mark.parametrize(("ensemble", "members"), [("all", [0, 1, 2]), ("all_but_last", [0, 1]), ("none", [2])])
def test_ensemble_pools_these_steps(ensemble, members):
    steps = [random_step(seed) for seed in range(3)]
    found = select_candidates(steps, SamplerConfig(ensemble=ensemble))
    for image in (0, 1):
        assert_same_candidates(found[image], *select_slowly([steps[i] for i in members], image, 0.5))


def test_single_step_is_never_left_out():
    step = random_step(0)
    for ensemble in ("all", "all_but_last", "none"):
        assert len(select_candidates([step], SamplerConfig(ensemble=ensemble))[0]) > 0


def test_without_suppression_all_stay_by_score():
    found = select_candidates([random_step(0), random_step(1)], SamplerConfig(nms_iou_threshold=None))[0]
    assert len(found) == 80
    assert (found.scores.diff() <= 0).all()


def test_score_threshold():
    steps = [random_step(0)]
    everything = select_candidates(steps, SamplerConfig())[0]
    found = select_candidates(steps, SamplerConfig(score_threshold=0.8))[0]
    assert 0 < len(found) < len(everything)
    assert_close(found.scores, everything.scores[everything.scores > 0.8])
    assert len(select_candidates(steps, SamplerConfig(score_threshold=1.0))[0]) == 0


def test_selection_parity():
    ops = {name: torch.from_numpy(np.asarray(array)) for name, array in load_fixture("ops").items()}
    step = make_step(ops["inf_logits"], ops["inf_boxes"], ops["inf_kernels"])
    for image, found in enumerate(select_candidates([step], SamplerConfig(**RELEASED["sampler"]))):
        prefix = f"inf_img{image}_"
        assert found.labels.tolist() == ops[prefix + "classes"].tolist()
        assert_close(found.scores, ops[prefix + "scores"])
        assert_close(found.boxes_xyxy, ops[prefix + "boxes"])
        masks = apply_mask_head(ops["inf_mask_feat"][image], found.mask_params).sigmoid()
        assert_close(masks, ops[prefix + "masks"], rtol=1e-4, atol=1e-5)


def some_candidates(boxes, with_masks=True):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return Candidates(
        boxes_xyxy=boxes,
        scores=torch.linspace(0.9, 0.1, count),
        labels=torch.arange(count),
        mask_params=torch.arange(count, dtype=torch.float32)[:, None] if with_masks else None,
    )


def constant_mask_head(mask_features, mask_params):
    """Probability above a half for filters above zero."""
    return mask_params[:, :, None].sub(0.5).expand(-1, *mask_features.shape[1:])


def finish_some(candidates, settings=None, mask_features=None, **changes):
    arguments = {
        "image_size": (40, 40),
        "original_size": (80, 40),
        "settings": settings or SamplerConfig(),
        "mask_head": constant_mask_head,
    }
    features = torch.zeros(2, 12, 10) if mask_features is None else mask_features
    return finish(candidates, features, **arguments | changes)


def test_finish_by_hand():
    # Twice as high in the file as in the network; the second box lies outside, the third has no height.
    found = finish_some(some_candidates([[-5, 10, 10, 20], [50, 0, 60, 10], [3, 7, 9, 7], [30, 30, 50, 50]]))
    assert_close(found.boxes_xyxy, torch.tensor([[0.0, 20.0, 10.0, 40.0], [30.0, 60.0, 40.0, 80.0]]))
    assert found.labels.tolist() == [0, 3]
    assert_close(found.scores, torch.linspace(0.9, 0.1, 4)[[0, 3]])
    assert found.masks.shape == (2, 80, 40)
    assert found.masks.dtype == torch.bool
    assert found.masks.sum((1, 2)).tolist() == [0, 200]  # the filter of the first is 0: no pixel
    assert found.masks[1, 60:, 30:].all()


def test_empty_boxes_do_not_count_as_detections():
    found = finish_some(
        some_candidates([[1, 1, 1, 9], [0, 0, 8, 8], [2, 2, 2, 2], [1, 1, 9, 9], [2, 2, 9, 9]]),
        SamplerConfig(max_detections=2),
    )
    assert found.labels.tolist() == [1, 3]


@pytest.mark.parametrize(("max_detections", "expected"), [(None, 150), (100, 100)])
def test_number_of_detections(max_detections, expected):
    found = finish_some(some_candidates([[0, 0, 9, 9]] * 150), SamplerConfig(max_detections=max_detections))
    assert len(found) == len(found.masks) == expected
    assert found.labels.tolist() == list(range(expected))  # the best of them


@pytest.mark.parametrize(("mask_clip", "expected"), [("truncated", 4), ("covering", 9)])
def test_mask_clip_reaches_the_masks(mask_clip, expected):
    # A mask of ones in a box from 0.5 to 2.5, at its own scale.
    candidates = some_candidates([[9, 9, 9, 9], [0.5, 0.5, 2.5, 2.5]])
    found = finish_some(candidates, SamplerConfig(mask_clip=mask_clip), original_size=(40, 40))
    assert found.masks.sum((1, 2)).tolist() == [expected]


def test_masks_are_decoded_for_kept_detections_only():
    decoded = []

    def mask_head(mask_features, mask_params):
        decoded.append(mask_params.flatten().tolist())
        return constant_mask_head(mask_features, mask_params)

    finish_some(some_candidates([[0, 0, 9, 9]] * 6), SamplerConfig(max_detections=2), mask_head=mask_head)
    assert decoded == [[0.0, 1.0]]


def test_masks_in_chunks(monkeypatch):
    candidates = some_candidates([[0, 0, 9, 9]] * 7)
    at_once = finish_some(candidates)
    monkeypatch.setattr("diffinst.postprocess._MAX_MASK_FLOATS", 3 * 120)
    chunked = finish_some(candidates)
    assert torch.equal(chunked.masks, at_once.masks)
    assert chunked.masks.transpose(1, 2).is_contiguous()


def _random_masks(count=9):
    """Boxes here and there in an image of 300 x 260, and filters of a real mask head for features of 16 channels."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, 2, generator=generator) * 39
    candidates = some_candidates(torch.cat([corners.amin(1), corners.amax(1)], dim=1).tolist())
    candidates.mask_params = torch.randn(count, num_mask_params(8, (8, 8)), generator=generator)
    features = torch.randn(8, 12, 10, generator=generator)
    return candidates, {"mask_features": features, "mask_head": apply_mask_head, "original_size": (300, 260)}


def test_a_mask_is_computed_under_its_box_alone(monkeypatch):
    candidates, arguments = _random_masks()
    seen = []

    def mask_head(mask_features, mask_params):
        seen.append(mask_features[0].numel() * len(mask_params))
        return apply_mask_head(mask_features, mask_params)

    forget_paths()
    found = finish_some(candidates, **arguments | {"mask_head": mask_head})
    assert paths_taken() == {"mask_head": ["torch"], "masks": ["under_their_boxes"]}
    assert len(seen) == len(found)
    assert sum(seen) < len(found) * 120 / 2
    monkeypatch.setattr("diffinst.ops.masks._PASTE_WHOLE_UP_TO_PIXELS", math.inf)
    whole = finish_some(candidates, **arguments)
    assert paths_taken()["masks"] == ["under_their_boxes", "whole"]
    assert (found.masks != whole.masks).sum() <= 2  # values that rounding moves over the threshold
    assert 0.02 < whole.masks.float().mean() < 0.5


@pytest.mark.parametrize("max_pixels", [1, 2 * 300 * 260, 10**9])
def test_masks_encoded_as_they_come(monkeypatch, max_pixels):
    candidates, arguments = _random_masks()
    monkeypatch.setattr("diffinst.postprocess._MAX_UNENCODED_PIXELS", max_pixels)
    bitmaps = finish_some(candidates, **arguments)
    encoded = finish_some(candidates, mask_form="rle", **arguments)
    assert encoded.masks is None
    assert bitmaps.encodings is None
    assert encoded.encodings == encode_masks(bitmaps.masks)
    assert len(encoded.encodings) == len(encoded) > 5


def test_no_masks_to_encode():
    assert finish_some(some_candidates([]), mask_form="rle").encodings == []
    assert finish_some(some_candidates([[0, 0, 9, 9]], with_masks=False), mask_form="rle").encodings is None


@pytest.mark.parametrize("max_detections", [None, 5])
def test_no_candidates(max_detections):
    found = finish_some(some_candidates([]), SamplerConfig(max_detections=max_detections))
    assert len(found) == 0
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.masks.shape == (0, 80, 40)


def test_boxes_only():
    candidates = some_candidates([[0, 0, 9, 9]], with_masks=False)
    found = finish(
        candidates,
        None,
        image_size=(40, 40),
        original_size=(80, 40),
        settings=SamplerConfig(),
        mask_head=None,
    )
    assert found.masks is None
    assert len(found) == 1
    (selected,) = select_candidates([make_step(torch.zeros(1, 3, 2), torch.rand(1, 3, 4))], SamplerConfig())
    assert selected.mask_params is None


def test_candidates_survive():
    candidates = some_candidates([[-5, 10, 10, 20], [30, 30, 50, 50]])
    before = candidates.boxes_xyxy.clone()
    finish_some(candidates)
    assert_close(candidates.boxes_xyxy, before, rtol=0, atol=0)
