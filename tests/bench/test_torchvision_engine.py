"""torchvision's Mask R-CNN on our samples: trained and resumed like ours, and detections in pixels of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import Rectangles, tiny_config
from torchvision.models.detection import MaskRCNN

from bench.engines import TORCHVISION_RECIPES
from bench.torchvision_engine import RECIPES, build_network, detect, load_weights, network_losses
from diffinst.checkpoint import load_checkpoint, load_model_weights
from diffinst.config import SamplerConfig
from diffinst.engine.train import train
from diffinst.errors import CheckpointError, DataError, TrainingError
from diffinst.structures import Sample, Target

SETTINGS = SamplerConfig()


def tiny(num_classes: int = 2, seed: int = 0) -> MaskRCNN:
    return build_network("maskrcnn_tiny_fpn", num_classes, seed)


def samples(count: int = 3, size: int = 64) -> list[Sample]:
    data = Rectangles()
    found = [data.training_sample(index, torch.Generator().manual_seed(index)) for index in range(count)]
    generator = torch.Generator().manual_seed(7)
    images = [torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator) for _ in found]
    return [Sample(image, item.image_id, (size, size)) for image, item in zip(images, found)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A training of 10 iterations in one go: its folder and its total losses."""
    folder = tmp_path_factory.mktemp("trained")
    network = tiny()
    totals: list[float] = []
    train(
        network,
        Rectangles(),
        tiny_config(),
        folder,
        losses=network_losses(network),
        progress=lambda p: totals.append(p.total),
    )
    return folder, totals


def test_the_names_of_recipes_agree_with_those_a_suite_may_use() -> None:
    assert set(RECIPES) == set(TORCHVISION_RECIPES)


@pytest.mark.parametrize("recipe", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_torchvisions_own_recipes_detect(recipe: str) -> None:
    network = build_network(recipe, 2, 0).eval()
    # torchvision states 44.4 and 46.4 million with COCO's 91 classes; 3 classes have fewer rows.
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(
        {"maskrcnn_resnet50_fpn": 43.9, "maskrcnn_resnet50_fpn_v2": 45.9}[recipe], abs=0.1
    )
    (found,) = detect(network, samples(1), SETTINGS)
    assert found.masks is not None
    assert found.masks.shape[1:] == (64, 64)


def test_initial_weights_depend_on_the_seed_alone_and_nothing_else_is_drawn() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.state_dict().values(), second.state_dict().values()))
    assert all(torch.equal(one, two) for one, two in pairs)
    assert any(not torch.equal(one, two) for one, two in zip(first.state_dict().values(), other.state_dict().values()))


def test_the_network_sees_the_pixels_that_it_is_given() -> None:
    """torchvision's own transform would enlarge the shorter side to 800."""
    (sample,) = samples(1)
    batch, _ = tiny().eval().transform([sample.image.float() / 255])
    assert batch.image_sizes == [(64, 64)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(batch.tensors[0], (sample.image / 255 - mean) / std)


def test_training_learns_and_reports_torchvisions_losses(trained: tuple[Path, list[float]]) -> None:
    folder, totals = trained
    assert totals[-1] < 0.8 * totals[0]
    last = json.loads((folder / "losses.jsonl").read_text().splitlines()[-1])
    names = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert last["losses"].keys() == names


def train_until(folder: Path, end: int) -> None:
    network = tiny()
    seen: list[int] = []
    train(
        network,
        Rectangles(),
        tiny_config(),
        folder,
        losses=network_losses(network),
        progress=lambda progress: seen.append(progress.iteration),
        stop=lambda: seen[-1] >= end,
    )


def test_a_training_that_was_stopped_gives_the_same_weights(trained: tuple[Path, list[float]], tmp_path: Path) -> None:
    for end in (4, 7, 10):
        train_until(tmp_path, end)
    expected = load_file(trained[0] / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert (tmp_path / "losses.jsonl").read_text() == (trained[0] / "losses.jsonl").read_text()


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    network = tiny()
    losses = network_losses(network)

    def broken(batch: list[Sample], iteration: int) -> dict[str, torch.Tensor]:
        found = losses(batch, iteration)
        return found | {"loss_mask": found["loss_mask"] * float("nan")} if iteration == 2 else found

    with pytest.raises(TrainingError, match="iteration 3: loss_mask is nan"):
        train(network, Rectangles(), tiny_config(), tmp_path, losses=broken)


def test_a_batch_without_an_instance_trains_the_proposals(trained: tuple[Path, list[float]]) -> None:
    network = tiny()
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.bool))
    batch = [Sample(item.image, item.image_id, item.original_size, empty) for item in samples(2)]
    losses = network_losses(network)(batch, 0)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_mask"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert network.rpn.head.cls_logits.weight.grad.abs().sum() > 0


def test_masks_are_needed_to_train() -> None:
    (sample,) = samples(1)
    target = Target(torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([0]))
    with pytest.raises(DataError, match="has boxes only"):
        network_losses(tiny())([Sample(sample.image, 5, sample.original_size, target)], 0)


@pytest.fixture(scope="module")
def network(trained: tuple[Path, list[float]]) -> MaskRCNN:
    found = tiny()
    load_model_weights(found, load_checkpoint(trained[0] / "model.safetensors"))
    found.roi_heads.score_thresh = 0.0  # ten iterations make no confident detection
    return found.eval()


def test_an_images_detections_do_not_depend_on_its_batch(network: MaskRCNN) -> None:
    images = samples(3)
    together = detect(network, images, SETTINGS)
    for image, found in zip(images, together):
        (alone,) = detect(network, [image], SETTINGS)
        assert len(alone) > 0
        torch.testing.assert_close(found.boxes_xyxy, alone.boxes_xyxy, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.labels, alone.labels)


def test_detections_are_in_pixels_of_the_file(network: MaskRCNN) -> None:
    (sample,) = samples(1)
    (same,) = detect(network, [sample], SETTINGS)
    (twice,) = detect(network, [Sample(sample.image, sample.image_id, (128, 192))], SETTINGS)
    factors = torch.tensor([3.0, 2.0, 3.0, 2.0])  # x by 192 / 64, y by 128 / 64
    torch.testing.assert_close(twice.boxes_xyxy, same.boxes_xyxy * factors)
    assert twice.masks is not None
    assert twice.masks.shape[1:] == (128, 192)
    assert twice.masks.dtype == torch.bool
    assert int(twice.labels.min()) >= 0
    assert int(twice.labels.max()) < 2
    assert twice.scores.tolist() == sorted(twice.scores.tolist(), reverse=True)


def test_the_number_of_detections_is_the_suites(network: MaskRCNN) -> None:
    (few,) = detect(network, samples(1), SamplerConfig(max_detections=3))
    (many,) = detect(network, samples(1), SamplerConfig(max_detections=None))
    assert len(few) == 3
    assert len(many) > 3
    torch.testing.assert_close(few.scores, many.scores[:3])


def test_a_higher_mask_threshold_gives_smaller_masks(network: MaskRCNN) -> None:
    areas = []
    for threshold in (0.3, 0.5, 0.7):
        (found,) = detect(network, samples(1), SamplerConfig(mask_threshold=threshold))
        assert found.masks is not None
        areas.append(int(found.masks.sum()))
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[-1]


def test_what_was_seen_before_changes_nothing(trained: tuple[Path, list[float]]) -> None:
    """torchvision pools at strides that it infers from the first image, 2 where 33 pixels are padded to 64."""
    (image,) = samples(1)
    state = load_checkpoint(trained[0] / "model.safetensors").model
    found = []
    for first in (33, 64):
        fresh = tiny().eval()
        fresh.load_state_dict(state)
        fresh.roi_heads.score_thresh = 0.0
        detect(fresh, [Sample(image.image[:, :first, :first], 1, (first, first))], SETTINGS)
        found += detect(fresh, [image], SETTINGS)
    torch.testing.assert_close(found[0].boxes_xyxy, found[1].boxes_xyxy, rtol=0, atol=0)
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=0, atol=0)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_load_from_each_kind_of_file(trained: tuple[Path, list[float]], tmp_path: Path) -> None:
    source = tiny(seed=3)
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        target = tiny()
        load_weights(target, tmp_path / name, [1, 2])
        assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())
    target = tiny()
    load_weights(target, trained[0] / "model.safetensors", [1, 2])
    expected = load_checkpoint(trained[0] / "model.safetensors").model
    assert all(torch.equal(value, expected[key]) for key, value in target.state_dict().items())


def test_published_classes_are_picked_by_category_id(tmp_path: Path) -> None:
    source = tiny(num_classes=90)  # 91 with the background, as torchvision's files
    torch.save(source.state_dict(), tmp_path / "coco.pth")
    target = tiny(seed=1)
    load_weights(target, tmp_path / "coco.pth", [17, 44])
    for ours, theirs in ((0, 0), (1, 17), (2, 44)):
        old, new = source.roi_heads.box_predictor, target.roi_heads.box_predictor
        assert torch.equal(new.cls_score.weight[ours], old.cls_score.weight[theirs])
        assert torch.equal(
            new.bbox_pred.weight[4 * ours : 4 * ours + 4], old.bbox_pred.weight[4 * theirs : 4 * theirs + 4]
        )
        assert torch.equal(new.bbox_pred.bias[4 * ours : 4 * ours + 4], old.bbox_pred.bias[4 * theirs : 4 * theirs + 4])
        masks = target.roi_heads.mask_predictor.mask_fcn_logits.weight[ours]
        assert torch.equal(masks, source.roi_heads.mask_predictor.mask_fcn_logits.weight[theirs])


def test_other_files_are_refused_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "broken.pth").write_bytes(b"no")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(tiny(num_classes=5).state_dict(), tmp_path / "other.pth")
    expected = {
        "broken.safetensors": "cannot be read as .safetensors or .pth",
        "broken.pth": "cannot be read as .safetensors or .pth",
        "gone.pth": "cannot be read as .safetensors or .pth",
        "list.pth": "holds no state dict",
        "other.pth": r"weights of another network: roi_heads.box_predictor.cls_score.weight is \(6, 128\) instead of",
    }
    for name, text in expected.items():
        with pytest.raises(CheckpointError, match=text) as caught:
            load_weights(tiny(), tmp_path / name, [1, 2])
        assert "\n" not in str(caught.value)
