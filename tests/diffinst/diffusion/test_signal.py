import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.diffusion.signal import (
    MIN_BOX_SIZE,
    boxes_to_signal,
    draw_repeats,
    pad_ground_truth,
    signal_to_boxes,
    to_normalised,
    to_pixels,
)
from diffinst.ops.boxes import box_cxcywh_to_xyxy

SCALE = 2.0
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_fixture("diffusion").items()}


def diffused(boxes_cxcywh, t, noise):
    """Normalised xyxy as the head sees them, before they are scaled to pixels."""
    signal = boxes_to_signal(boxes_cxcywh[None], SCALE)
    return box_cxcywh_to_xyxy(signal_to_boxes(NoiseSchedule(1000).add_noise(signal, noise[None], t), SCALE))[0]


def test_signal_by_hand():
    boxes = torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert_close(boxes_to_signal(boxes, SCALE), torch.tensor([-2.0, 0.0, 1.0, 2.0]))
    signal = torch.tensor([-5.0, 0.0, 1.0, 2.5])
    assert_close(signal_to_boxes(signal, SCALE), torch.tensor([0.0, 0.5, 0.75, 1.0]))


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), st.floats(0.5, 4))
def test_round_trip(box, scale):
    boxes = torch.tensor([box])
    assert_close(signal_to_boxes(boxes_to_signal(boxes, scale), scale), boxes)


def test_least_size():
    signal = torch.tensor([[-3.0, -3.0, -3.0, -3.0], [0.0, 0.0, -1.0, 2.0]])
    assert_close(signal_to_boxes(signal, SCALE)[0], torch.zeros(4))
    boxes = signal_to_boxes(signal, SCALE, min_size=MIN_BOX_SIZE)
    assert_close(boxes, torch.tensor([[0.0, 0.0, 1e-4, 1e-4], [0.5, 0.5, 0.25, 1.0]]))


def test_pixels_by_hand():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]], [[0.5, 0.5, 0.2, 0.4]]])
    whwh = torch.tensor([[100.0, 50.0, 100.0, 50.0], [10.0, 10.0, 10.0, 10.0]])
    pixels = to_pixels(boxes, whwh)
    assert_close(pixels, torch.tensor([[[40.0, 15.0, 60.0, 35.0]], [[4.0, 3.0, 6.0, 7.0]]]))
    assert_close(to_normalised(pixels, whwh), boxes)


@pytest.mark.parametrize("case", ["n0", "n1", "n3", "n19", "n20", "n26", "t999_n3", "t0_n3"])
def test_concat_parity(stored, case):
    key = f"concat_{case}"
    selected = stored.get(f"{key}_shuffled")
    padded = pad_ground_truth(
        stored[f"{key}_gt"],
        20,
        method="concat",
        placeholder_noise=stored.get(f"{key}_placeholder_randn", torch.zeros(0, 4)),
        repeats=None if selected is None else selected.long(),
    )
    assert_close(
        diffused(padded, stored[f"{key}_t"], stored[f"{key}_noise"]).double(), stored[f"{key}_out_xyxy"], **CLOSE
    )


@pytest.mark.parametrize("case", ["n0", "n1", "n3", "n19", "n20"])
def test_repeat_parity(stored, case):
    key = f"repeat_{case}"
    padded = pad_ground_truth(stored[f"{key}_gt"], 20, method="repeat", repeats=stored[f"{key}_shuffled"])
    assert_close(
        diffused(padded, stored[f"{key}_t"], stored[f"{key}_noise"]).double(), stored[f"{key}_out_xyxy"], **CLOSE
    )


def test_two_images_parity(stored):
    for image in (0, 1):
        padded = pad_ground_truth(
            stored[f"pt_img{image}_target_boxes"], 20, placeholder_noise=stored[f"pt_img{image}_placeholder_randn"]
        )
        found = diffused(padded, stored["pt_t"][image], stored["pt_noise"][image])
        assert_close(found.double(), stored["pt_diffused_boxes"][image], **CLOSE)


def test_concat_by_hand():
    boxes = torch.tensor([[0.2, 0.3, 0.1, 0.1]])
    noise = torch.tensor([[0.0, 3.0, -6.0, 1.5]])
    # noise / 6 + 0.5, sizes at least 1e-4
    expected = torch.tensor([[0.2, 0.3, 0.1, 0.1], [0.5, 1.0, 1e-4, 0.75]])
    assert_close(pad_ground_truth(boxes, 2, placeholder_noise=noise), expected)


def test_no_instance_is_one_box_over_the_image():
    padded = pad_ground_truth(torch.zeros(0, 4), 3, method="repeat")
    assert_close(padded, torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(3, 4))
    assert_close(pad_ground_truth(torch.zeros(0, 4), 3)[0], padded[0])


@pytest.mark.parametrize("method", ["concat", "repeat"])
@pytest.mark.parametrize("num_instances", [0, 1, 3, 10, 17])
def test_always_n_boxes_of_the_instances(method, num_instances):
    boxes = torch.rand(num_instances, 4, generator=torch.Generator().manual_seed(0))
    before = boxes.clone()
    draws = [
        pad_ground_truth(boxes, 10, method=method, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert draws[0].shape == (10, 4)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(boxes, before)
    is_instance = (draws[0][:, None] == boxes[None]).all(-1).any(-1)
    if num_instances:
        expected = 10 if method == "repeat" else min(num_instances, 10)
        assert is_instance.sum() == expected
    if num_instances == 17 or (num_instances != 10 and method == "concat"):
        assert not torch.equal(draws[0], draws[2])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_repeats_are_as_equal_as_can_be(num_instances, num_proposals, seed):
    counts = draw_repeats(num_instances, num_proposals, torch.Generator().manual_seed(seed))
    assert counts.shape == (num_instances,)
    assert counts.sum() == num_proposals
    assert counts.max() - counts.min() <= 1


def test_draws_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"placeholder_noise must have shape \(3, 4\), got \(2, 4\)"):
        pad_ground_truth(torch.rand(2, 4), 5, placeholder_noise=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"repeats must have shape \(2,\), got \(3,\)"):
        pad_ground_truth(torch.rand(2, 4), 5, method="repeat", repeats=torch.ones(3, dtype=torch.int64))
