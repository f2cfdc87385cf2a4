from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_training import Rectangles, killed_config, tiny_config, tiny_model

import diffinst
from diffinst.build import seeded_model
from diffinst.checkpoint import load_checkpoint, load_model_weights
from diffinst.config import Config, TrainConfig
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.engine.train import TrainProgress, draw_noisy_boxes, train, training_losses
from diffinst.errors import CheckpointError, TrainingError
from diffinst.losses import compute_losses
from diffinst.structures import Sample, Target


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without threads, and much faster on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole training."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(tiny_model(), Rectangles(), tiny_config(), folder)
    return folder


def assert_same_training(folder: Path, expected: Path) -> None:
    """The same losses and weights to the last bit."""
    assert (folder / "losses.jsonl").read_text() == (expected / "losses.jsonl").read_text()
    found, wanted = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def stop_after(calls: int) -> object:
    """A stop function that says yes at its call number `calls`."""
    answers = iter([False] * (calls - 1) + [True])
    return lambda: next(answers)


def test_a_whole_training(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == ["losses.jsonl", "model.safetensors"]
    lines = [json.loads(line) for line in (undisturbed / "losses.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 11))
    terms = ("loss_ce", "loss_bbox", "loss_giou", "loss_masks")
    assert set(lines[0]["losses"]) == {*terms, *(f"{term}_0" for term in terms)}
    assert lines[3]["learning_rate"] == pytest.approx(1e-3)
    assert lines[9]["learning_rate"] == pytest.approx(1e-4)

    checkpoint = load_checkpoint(undisturbed / "model.safetensors")
    assert checkpoint.iteration == 10
    assert checkpoint.config == tiny_config()
    assert checkpoint.class_names == ("wide", "high")
    assert checkpoint.category_ids == (1, 7)
    assert not checkpoint.optimizer
    initial = tiny_model().state_dict()
    assert not checkpoint.ema
    unmoved = [name for name, value in checkpoint.model.items() if torch.equal(value, initial[name])]
    assert unmoved == ["fpn.output.3.bias"]  # no box of these images is large enough for p5


def test_kill_and_the_same_command_again(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    undisturbed = tmp_path_factory.mktemp("undisturbed_too")
    train(tiny_model(), Rectangles(), killed_config(), undisturbed)
    assert any(name.startswith("ema/") for name in load_file(undisturbed / "model.safetensors"))
    script = [sys.executable, tiny_training.__file__, str(tmp_path), str(torch.get_num_threads())]
    # The folder of the script holds tests/diffinst, which must not be taken for the package.
    root = str(Path(diffinst.__file__).parents[1])
    child = subprocess.Popen(script, env=os.environ | {"PYTHONPATH": root})
    losses, deadline = tmp_path / "losses.jsonl", time.monotonic() + 100
    try:
        while not (losses.is_file() and losses.read_text().count("\n") == 6):
            assert child.poll() is None, "the training ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").iteration == 4

    train(tiny_model(), Rectangles(), killed_config(), tmp_path)
    assert_same_training(tmp_path, undisturbed)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_stop_and_go_on(undisturbed: Path, tmp_path: Path) -> None:
    for calls, iteration in ((1, 1), (4, 5)):
        path = train(tiny_model(), Rectangles(), tiny_config(), tmp_path, stop=stop_after(calls))
        assert path == tmp_path / "checkpoint.safetensors"
        assert load_checkpoint(path).iteration == iteration
    assert train(tiny_model(), Rectangles(), tiny_config(), tmp_path) == tmp_path / "model.safetensors"
    assert_same_training(tmp_path, undisturbed)


def test_worker_processes_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    train(tiny_model(), Rectangles(), tiny_config(num_workers=1), tmp_path)
    assert_same_training(tmp_path, undisturbed)


def test_the_global_generator_changes_nothing_and_is_left_alone(undisturbed: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    train(tiny_model(), Rectangles(), tiny_config(), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert_same_training(tmp_path, undisturbed)


def test_another_seed_is_another_training(undisturbed: Path, tmp_path: Path) -> None:
    train(tiny_model(), Rectangles(), tiny_config(seed=1, iterations=1), tmp_path)
    first, other = ((folder / "losses.jsonl").read_text().splitlines()[0] for folder in (undisturbed, tmp_path))
    assert first != other


def test_a_finished_training_is_not_repeated(undisturbed: Path) -> None:
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    model = tiny_model()
    path = train(model, Rectangles(), tiny_config(log_every=7), undisturbed)
    assert path.stat().st_mtime_ns == before
    assert torch.equal(model.state_dict()["backbone.stem.weight"], tiny_model().state_dict()["backbone.stem.weight"])


def test_a_line_cut_by_a_kill_is_dropped(undisturbed: Path, tmp_path: Path) -> None:
    train(tiny_model(), Rectangles(), tiny_config(), tmp_path, stop=stop_after(5))
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"iteration": 6, "learning_rate": 0.001}\n{"iteration": 7, "lea')
    train(tiny_model(), Rectangles(), tiny_config(), tmp_path)
    assert_same_training(tmp_path, undisturbed)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_losses_that_are_lost_are_told(tmp_path: Path, damage: str) -> None:
    train(tiny_model(), Rectangles(), tiny_config(), tmp_path, stop=stop_after(5))
    path = tmp_path / "losses.jsonl"
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(before[:-40] if damage == "cut" else before.replace(b"1", b"2", 1))
    message = rf"{path}: what was logged up to iteration 5 .* delete checkpoint\.safetensors beside it to train"
    with pytest.raises(CheckpointError, match=message):
        train(tiny_model(), Rectangles(), tiny_config(), tmp_path)
    path.write_bytes(before)
    train(tiny_model(), Rectangles(), tiny_config(), tmp_path)
    path.write_bytes(before)
    with pytest.raises(CheckpointError, match=r"up to iteration 10 is gone .* delete model\.safetensors beside it"):
        train(tiny_model(), Rectangles(), tiny_config(), tmp_path)


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    train(tiny_model(), Rectangles(), tiny_config(iterations=7, log_every=3), tmp_path, progress=seen.append)
    assert [progress.iteration for progress in seen] == [3, 6, 7]
    assert seen[0].seconds_left is None
    assert seen[1].seconds_left > 0
    assert seen[2].seconds_left == 0
    assert seen[0].total == pytest.approx(sum(seen[0].losses.values()))
    assert seen[0].iterations == 7


def test_losses_fall_on_one_image(tmp_path: Path) -> None:
    class OneImage(Rectangles):
        def __len__(self) -> int:
            return 1

        def training_sample(self, index: int, generator: torch.Generator) -> Sample:
            del index, generator
            return super().training_sample(4, torch.Generator().manual_seed(0))

    seen: list[float] = []
    config = tiny_config(iterations=60, log_every=1, schedule_steps=(), learning_rate=5e-3, checkpoint_every=1000)
    train(tiny_model(), OneImage(), config, tmp_path, progress=lambda progress: seen.append(progress.total))
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])


def test_boxes_only(tmp_path: Path) -> None:
    class WithoutMasks(Rectangles):
        def training_sample(self, index: int, generator: torch.Generator) -> Sample:
            sample = super().training_sample(index, generator)
            sample.target.masks = None
            return sample

    model_config = tiny_training.MODEL.model_copy(update={"mask": "none"})
    config = Config(model=model_config, train=tiny_training.TRAIN.model_copy(update={"iterations": 1}))
    train(seeded_model(model_config, 0), WithoutMasks(), config, tmp_path)
    (line,) = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert not any("masks" in name for name in json.loads(line)["losses"])


class TestNotFinite:
    def test_loss(self, tmp_path: Path) -> None:
        model = tiny_model()
        train(model, Rectangles(), tiny_config(), tmp_path, stop=stop_after(2))
        checkpoint = tmp_path / "checkpoint.safetensors"
        before = checkpoint.read_bytes()

        def poison(progress: TrainProgress) -> None:
            if progress.iteration == 3:
                torch.nn.init.constant_(model.mask_branch.project.bias, torch.nan)

        with pytest.raises(TrainingError) as caught:
            train(model, Rectangles(), tiny_config(), tmp_path, progress=poison)
        message = str(caught.value)
        assert message.startswith("iteration 4: loss_masks")
        assert "is nan (images 10" in message
        assert f"the last good checkpoint is {checkpoint} (iteration 2)" in message
        assert "train.learning_rate" in message
        assert "\n" not in message
        assert checkpoint.read_bytes() == before

    def test_gradient(self, tmp_path: Path) -> None:
        model = tiny_model()
        parameter = next(model.box_head.parameters())
        parameter.register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(TrainingError, match="iteration 1: gradient norm is .*there is no checkpoint yet"):
            train(model, Rectangles(), tiny_config(), tmp_path)


class TestOtherCheckpoint:
    def test_other_configuration(self, undisturbed: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            train(tiny_model(), Rectangles(), tiny_config(learning_rate=2e-3, batch_size=4), undisturbed)
        assert "train.batch_size 2 instead of 4, train.learning_rate 0.001 instead of 0.002" in str(caught.value)
        assert "Use another output folder" in str(caught.value)

    def test_other_checkpoint_to_go_on_from(self, tmp_path: Path) -> None:
        train(tiny_model(), Rectangles(), tiny_config(), tmp_path, stop=stop_after(1))
        with pytest.raises(CheckpointError, match="another training: train.seed 0 instead of 3"):
            train(tiny_model(), Rectangles(), tiny_config(seed=3), tmp_path)

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="file/out: cannot be written"):
            train(tiny_model(), Rectangles(), tiny_config(), tmp_path / "file" / "out")


class TestNoisyBoxes:
    settings = TrainConfig(seed=3, num_train_proposals=8)
    schedule = NoiseSchedule(1000)
    targets = [
        Target(torch.tensor([[8.0, 8.0, 24.0, 24.0]]), torch.tensor([0])),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    whwh = torch.tensor([[64.0, 32.0, 64.0, 32.0], [40.0, 40.0, 40.0, 40.0]])

    def draw(self, iteration: int, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        changed = self.settings.model_copy(update=settings)
        return draw_noisy_boxes(self.targets, self.whwh, changed, self.schedule, 2.0, iteration)

    def test_shapes_and_range(self) -> None:
        boxes, t = self.draw(0)
        assert boxes.shape == (2, 8, 4)
        assert t.shape == (2,)
        assert ((t >= 0) & (t < 1000)).all()
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2
        assert (centre >= 0).all()
        assert (centre <= self.whwh[:, None, :2]).all()

    def test_is_a_function_of_seed_and_iteration(self) -> None:
        again = [torch.equal(self.draw(5)[0], self.draw(*key)[0]) for key in ((5,), (6,))]
        assert again == [True, False]
        assert not torch.equal(self.draw(5)[0], self.draw(5, seed=4)[0])

    def test_timesteps_cover_the_schedule(self) -> None:
        t = torch.cat([self.draw(iteration)[1] for iteration in range(200)])
        assert 450 < t.float().mean() < 550
        assert t.min() < 30
        assert t.max() > 970

    def test_first_slot_is_the_instance_when_there_is_hardly_any_noise(self) -> None:
        # A schedule of one step: alpha is near 1 only for t = 0 of a long schedule, so use one of a million steps.
        schedule = NoiseSchedule(1_000_000)
        boxes = torch.cat([
            draw_noisy_boxes(self.targets, self.whwh, self.settings, schedule, 2.0, iteration)[0][:1, 0]
            for iteration in range(60)
        ])  # fmt: skip
        nearest = (boxes - self.targets[0].boxes_xyxy).abs().amax(1).min()
        assert nearest < 6

    def test_boxes_without_width_are_kept(self) -> None:
        # Where the signal is clamped to its lower end; as released, whatever `zero_size_proposals` says for inference.
        sizes = torch.cat([boxes[..., 2:] - boxes[..., :2] for boxes, _ in map(self.draw, range(60))]).flatten(0, 1)
        share = (sizes <= 1e-5).any(1).float().mean()
        assert 0.005 < share < 0.1

    def test_more_instances_than_proposals(self) -> None:
        crowd = Target(torch.rand(20, 4).sort(dim=1).values * 30, torch.zeros(20, dtype=torch.int64))
        for padding in ("concat", "repeat"):
            changed = self.settings.model_copy(update={"proposal_padding": padding})
            boxes, _ = draw_noisy_boxes([crowd], self.whwh[:1], changed, self.schedule, 2.0, 0)
            assert boxes.shape == (1, 8, 4)
            assert boxes.isfinite().all()


def test_every_parameter_learns_even_from_a_batch_without_instances() -> None:
    dataset, model = Rectangles(), tiny_model().train()
    empty = [dataset.training_sample(index, torch.Generator().manual_seed(0)) for index in (0, 5)]
    assert not any(len(sample.target) for sample in empty)
    batch = model.make_batch(empty)
    targets = [sample.target for sample in empty]
    for empty_batch_loss, without_gradient in (("fixed", False), ("released", True)):
        settings = tiny_training.TRAIN.model_copy(update={"empty_batch_loss": empty_batch_loss})
        boxes, t = draw_noisy_boxes(targets, batch.whwh, settings, NoiseSchedule(1000), 2.0, 0)
        losses = training_losses(model, batch.images, targets, batch.whwh, boxes, t, settings)
        model.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        missing = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
        assert ("mask_branch" in missing) == without_gradient
        assert missing <= {"mask_branch", "box_head"}


@pytest.mark.parametrize(
    "changes",
    [
        {"matcher": "released"},
        {"class_loss": "bce"},
        {"empty_batch_loss": "released"},
        {"ota_k": 2},
        {"class_weight": 1.0},
        {"l1_weight": 1.0},
        {"giou_weight": 1.0},
        {"mask_weight": 1.0},
        {"focal_alpha": 0.5},
        {"focal_gamma": 1.0},
    ],
    ids=str,
)
def test_settings_reach_the_losses(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def compute(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        given.update(kwargs)
        return {}

    monkeypatch.setattr("diffinst.engine.train.compute_losses", compute)
    sample = Rectangles().training_sample(2, torch.Generator().manual_seed(0))
    model = tiny_model()
    batch = model.make_batch([sample])
    settings = tiny_training.TRAIN.model_copy(update=changes)
    boxes = torch.tensor([[[2.0, 2.0, 20.0, 20.0]]])
    training_losses(model, batch.images, [sample.target], batch.whwh, boxes, torch.tensor([5]), settings)
    assert {name: given[name] for name in changes} == changes
    assert given.pop("federated") is None
    assert all(given[name] == getattr(settings, name) for name in given)


class FewAndMany(Rectangles):
    """Ten classes, as the federated loss needs some to leave out; of those that occur the second is rare."""

    class_names = tuple(f"class {number}" for number in range(10))
    category_ids = tuple(range(10))
    class_image_counts = (900, 1, 400, 400, 400, 400, 400, 400, 400, 0)

    def image_labels(self) -> list[set[int]]:
        return [set(range(min(index % 5, 2))) for index in range(len(self))]


FEDERATED = {"federated_loss": True, "federated_classes": 4, "repeat_threshold": 3.0, "class_loss": "bce"}


def train_federated(folder: Path, *, stop: object = None, **changes: object) -> Path:
    config = tiny_config(**(FEDERATED | changes))
    model = seeded_model(tiny_training.MODEL.model_copy(update={"num_classes": 10}), 0)
    return train(model, FewAndMany(), config, folder, stop=stop)


def test_a_federated_training_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    train_federated(tmp_path / "whole")
    checkpoint = train_federated(tmp_path / "stopped", stop=stop_after(5))
    assert load_checkpoint(checkpoint).iteration == 5
    train_federated(tmp_path / "stopped")
    assert_same_training(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        {"federated_loss": False},
        {"federated_classes": 6},
        {"federated_power": 0.0},
        {"repeat_threshold": None},
        {"class_loss": "focal"},
    ],
    ids=str,
)
def test_each_setting_of_a_federated_training_counts(
    changes: dict[str, object], federated: str, tmp_path: Path
) -> None:
    train_federated(tmp_path, iterations=4, **changes)
    assert (tmp_path / "losses.jsonl").read_text() != federated


@pytest.fixture(scope="module")
def federated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The losses of four iterations."""
    folder = tmp_path_factory.mktemp("federated")
    train_federated(folder, iterations=4)
    return (folder / "losses.jsonl").read_text()


def test_classes_are_sampled_anew_for_each_iteration_and_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []

    def compute(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        drawn.extend(kwargs["federated"].arrival)
        return compute_losses(*args, **kwargs)

    monkeypatch.setattr("diffinst.engine.train.compute_losses", compute)
    train_federated(tmp_path, iterations=3)
    orders = {tuple(arrival.argsort().tolist()) for arrival in drawn}
    assert len(drawn) == len(orders) == 3 * 2


def test_bf16_autocast_gives_nearly_the_same_losses() -> None:
    dataset, model = Rectangles(), tiny_model().train()
    model.eval()  # no dropout
    samples = [dataset.training_sample(index, torch.Generator().manual_seed(0)) for index in (2, 3)]
    batch, targets = model.make_batch(samples), [sample.target for sample in samples]
    boxes, t = draw_noisy_boxes(targets, batch.whwh, tiny_training.TRAIN, NoiseSchedule(1000), 2.0, 0)
    totals = []
    for precision in ("auto", "fp32", "bf16"):
        settings = tiny_training.TRAIN.model_copy(update={"precision": precision})
        losses = training_losses(model, batch.images, targets, batch.whwh, boxes, t, settings)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        totals.append(float(sum(loss.detach() for loss in losses.values())))
    assert totals[0] == totals[1]
    assert totals[2] == pytest.approx(totals[1], rel=0.1)
    assert totals[2] != totals[1]


@pytest.mark.parametrize("box_pooling", ["bags", "roi_align"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_have_nearly_the_gradients_of_the_whole(
    precision: str, box_pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Rectangles()
    model = seeded_model(tiny_training.MODEL.model_copy(update={"box_pooling": box_pooling}), 0).eval()
    samples = [dataset.training_sample(index, torch.Generator().manual_seed(0)) for index in (2, 3)]
    batch, targets = model.make_batch(samples), [sample.target for sample in samples]
    boxes, t = draw_noisy_boxes(targets, batch.whwh, tiny_training.TRAIN, NoiseSchedule(1000), 2.0, 0)
    settings = tiny_training.TRAIN.model_copy(update={"precision": precision})
    found = []
    for elements in (2**24, 100):
        monkeypatch.setattr("diffinst.heads.dynamic_conv._FILTER_ELEMENTS_TRAINING_CPU", elements)
        model.zero_grad()
        losses = training_losses(model, batch.images, targets, batch.whwh, boxes, t, settings)
        torch.stack(list(losses.values())).sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    whole, parts = found
    assert float((parts - whole).norm() / whole.norm()) < (1e-4 if precision == "fp32" else 0.05)


def test_weights_of_a_finished_training_load(undisturbed: Path) -> None:
    model = tiny_model()
    load_model_weights(model, load_checkpoint(undisturbed / "model.safetensors"))
    expected = load_file(undisturbed / "model.safetensors")
    assert torch.equal(model.state_dict()["backbone.stem.weight"], expected["model/backbone.stem.weight"])
