import pytest
import torch
from torch.testing import assert_close

from diffinst.config import SamplerConfig
from diffinst.diffusion.ddim import ddim_step
from diffinst.diffusion.noise import noise_for
from diffinst.diffusion.sampler import sample
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.diffusion.signal import MIN_BOX_SIZE, boxes_to_signal, to_normalised
from diffinst.structures import HeadOutput

WHWH = torch.tensor([[100.0, 80.0, 100.0, 80.0], [60.0, 90.0, 60.0, 90.0], [50.0, 50.0, 50.0, 50.0]])
NUM_PROPOSALS = 6
IMAGE_IDS = [11, 5, 8]


class FakeHead:
    """Moves boxes half-way to a fixed one and is sure of those that end up left of the middle of their image."""

    def __init__(self, whwh, num_mask_params=3):
        self.whwh = whwh
        self.num_mask_params = num_mask_params
        self.seen = []

    def __call__(self, boxes_xyxy, t):
        self.seen.append((boxes_xyxy, t))
        target = self.whwh[:, None] * torch.tensor([0.2, 0.2, 0.6, 0.6])
        boxes_xyxy = (boxes_xyxy + target) / 2
        is_left = boxes_xyxy[..., :1] < self.whwh[:, None, :1] * 0.2
        logits = torch.where(is_left, 3.0, -3.0).expand(-1, -1, 2)
        mask_params = boxes_xyxy.mean(-1, keepdim=True).expand(-1, -1, self.num_mask_params)
        # two stages, of which only the last may count
        return HeadOutput(
            class_logits=torch.stack([-logits, logits]),
            boxes_xyxy=torch.stack([boxes_xyxy * 0, boxes_xyxy]),
            mask_params=torch.stack([mask_params * 0, mask_params]) if self.num_mask_params else None,
        )


def noise_of(image_ids, num_proposals=NUM_PROPOSALS):
    return lambda step, purpose: torch.stack(
        [noise_for(0, image_id, step, purpose, (num_proposals, 4)) for image_id in image_ids]
    )


def run(rows=slice(None), head=None, **settings):
    whwh = WHWH[rows]
    return sample(
        head or FakeHead(whwh),
        whwh=whwh,
        schedule=NoiseSchedule(1000),
        settings=SamplerConfig(num_proposals=NUM_PROPOSALS, **settings),
        snr_scale=2.0,
        noise=noise_of([IMAGE_IDS[i] for i in range(3)[rows]]),
    )


def test_times_and_boxes_that_the_head_sees():
    head = FakeHead(WHWH)
    steps = run(head=head, sampling_steps=4)
    assert [step.t for step in steps] == [999, 749, 499, 249]
    assert [t.tolist() for _, t in head.seen] == [[999] * 3, [749] * 3, [499] * 3, [249] * 3]
    for boxes_xyxy, _ in head.seen:
        normalised = to_normalised(boxes_xyxy, WHWH)
        assert (normalised > -1e-6).all()
        assert (normalised < 1 + 1e-6).all()


def test_first_step_starts_from_the_initial_noise():
    assert_close(run()[0].x_t, noise_of(IMAGE_IDS)(0, "initial"), rtol=0, atol=0)


def test_only_the_last_stage_counts():
    head = FakeHead(WHWH)
    (step,) = run(head=head)
    output = head(*head.seen[0])
    assert_close(step.boxes_xyxy, output.boxes_xyxy[1])
    assert_close(step.class_logits, output.class_logits[1])
    assert_close(step.mask_params, output.mask_params[1])
    assert_close(step.x_0, boxes_to_signal(to_normalised(output.boxes_xyxy[1], WHWH), 2.0).clamp(-2, 2))


def test_renewal_replaces_each_in_its_slot():
    steps = run(sampling_steps=3)
    noise = noise_of(IMAGE_IDS)
    schedule = NoiseSchedule(1000)
    for index, (now, after) in enumerate(zip(steps, steps[1:])):
        assert now.keep.any()
        assert not now.keep.all()
        moved = ddim_step(
            now.x_0,
            now.noise_pred,
            alpha=schedule.alpha(now.t),
            alpha_next=schedule.alpha(after.t),
            eta=1.0,
            noise=noise(index, "step"),
        )
        assert_close(after.x_t[now.keep], moved[now.keep], rtol=0, atol=0)
        assert_close(after.x_t[~now.keep], noise(index, "renewal")[~now.keep].double(), rtol=0, atol=0)


def test_renewal_moves_kept_ones_to_the_front():
    steps = run(sampling_steps=3, renewal_order="front")
    noise = noise_of(IMAGE_IDS)
    schedule = NoiseSchedule(1000)
    for index, (now, after) in enumerate(zip(steps, steps[1:])):
        for image in range(3):
            kept = now.keep[image].nonzero()[:, 0]
            assert 0 < len(kept) < NUM_PROPOSALS
            moved = ddim_step(
                now.x_0[image, kept],
                now.noise_pred[image, kept],
                alpha=schedule.alpha(now.t),
                alpha_next=schedule.alpha(after.t),
                eta=1.0,
                noise=noise(index, "step")[image, : len(kept)],
            )
            fresh = noise(index, "renewal")[image, len(kept) :].double()
            assert_close(after.x_t[image], torch.cat([moved, fresh]), rtol=0, atol=0)


def test_renewal_keeps_by_the_best_class():
    (step,) = run(renewal_threshold=0.5)
    assert torch.equal(step.keep, step.class_logits.amax(-1) > 0)
    (strict,) = run(renewal_threshold=0.99)  # sigmoid(3) = 0.95
    assert not strict.keep.any()


def test_without_renewal_all_are_kept():
    steps = run(sampling_steps=3, renewal=False)
    assert all(step.keep.all() for step in steps)
    assert not torch.equal(steps[1].x_t, run(sampling_steps=3)[1].x_t)


def test_eta_zero_draws_no_noise():
    first, second = run(sampling_steps=2, eta=0.0, renewal=False), run(sampling_steps=2, eta=1.0, renewal=False)
    expected = ddim_step(
        first[0].x_0,
        first[0].noise_pred,
        alpha=NoiseSchedule(1000).alpha(999),
        alpha_next=NoiseSchedule(1000).alpha(499),
        eta=0.0,
        noise=torch.zeros_like(first[0].x_0),
    )
    assert_close(first[1].x_t, expected)
    assert not torch.equal(first[1].x_t, second[1].x_t)


def test_zero_size_proposals():
    sizes = {}
    for choice in ("keep", "clamp"):
        head = FakeHead(WHWH)

        def noise(step, purpose):
            return torch.full((3, NUM_PROPOSALS, 4), -2.5)

        sample(
            head,
            whwh=WHWH,
            schedule=NoiseSchedule(1000),
            settings=SamplerConfig(zero_size_proposals=choice),
            snr_scale=2.0,
            noise=noise,
        )
        boxes_xyxy = head.seen[0][0]
        sizes[choice] = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    assert_close(sizes["keep"], torch.zeros(3, NUM_PROPOSALS, 2))
    assert_close(sizes["clamp"], (WHWH[:, None, :2] * MIN_BOX_SIZE).expand_as(sizes["clamp"]))


def test_noise_prediction_from_clamped_or_unclamped():
    schedule = NoiseSchedule(1000)
    x_t = noise_of(IMAGE_IDS)(0, "initial")
    times = torch.full((3,), 999)
    assert (x_t.abs() > 2).any()
    for choice, seen in [("unclamped", x_t), ("clamped", x_t.clamp(-2, 2))]:
        (step,) = run(predict_noise_from=choice, zero_size_proposals="keep")
        assert_close(step.noise_pred, schedule.predict_noise(seen, step.x_0, times), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampling_steps", [1, 2, 4])
def test_batch_equals_images_one_by_one(sampling_steps):
    together = run(sampling_steps=sampling_steps)
    alone = [run(slice(i, i + 1), sampling_steps=sampling_steps) for i in range(3)]
    for index, step in enumerate(together):
        for image in range(3):
            for name in ("class_logits", "boxes_xyxy", "mask_params", "x_t", "x_0", "noise_pred", "keep"):
                one, many = getattr(alone[image][index], name)[0], getattr(step, name)[image]
                assert_close(many, one, rtol=0, atol=0)


def test_without_masks():
    assert all(step.mask_params is None for step in run(head=FakeHead(WHWH, num_mask_params=0), sampling_steps=2))


def test_waits_for_nothing():
    # The meta device has no values: whatever would need one on the host raises.
    steps = sample(
        lambda boxes_xyxy, t: HeadOutput(boxes_xyxy.new_zeros(1, 3, 6, 2), boxes_xyxy[None], None),
        whwh=WHWH.to("meta"),
        schedule=NoiseSchedule(1000).to("meta"),
        settings=SamplerConfig(sampling_steps=4, num_proposals=NUM_PROPOSALS),
        snr_scale=2.0,
        noise=lambda step, purpose: torch.zeros(3, NUM_PROPOSALS, 4, device="meta"),
    )
    assert len(steps) == 4
