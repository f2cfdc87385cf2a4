from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import Rectangles, tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close

from diffinst.checkpoint import load_checkpoint, load_model_weights
from diffinst.engine.ema import WeightAverage
from diffinst.engine.train import TrainProgress, train


def test_by_hand() -> None:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 0.0)
    average = WeightAverage(model, 0.75)
    for weight, expected in ((5.0, 2.0), (2.0, 2.0), (-2.0, 1.0)):  # 0.75 * 1 + 0.25 * 5, ...
        nn.init.constant_(model.weight, weight)
        average.update(model)
        assert average.tensors["weight"].item() == expected
    assert average.tensors["bias"].item() == 0.0
    assert model.weight.item() == -2.0


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (1.0, 1.0)])
def test_ends_of_the_range(decay: float, expected: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, decay)
    nn.init.constant_(model.weight, 3.0)
    average.update(model)
    assert average.tensors["weight"].item() == expected


def test_statistics_are_averaged_and_counters_are_copied() -> None:
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    model(torch.tensor([[10.0, 20.0], [30.0, 40.0]]))  # momentum 0.1: the mean becomes (2, 3)
    average.update(model)
    assert average.tensors["running_mean"].tolist() == [1.0, 1.5]
    assert average.tensors["num_batches_tracked"].item() == 1
    assert model.running_mean.tolist() == [2.0, 3.0]


def test_what_does_not_change_stays_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    average = WeightAverage(model, 0.999)
    for _ in range(100):
        average.update(model)
    assert torch.equal(average.tensors["weight"], model.weight)


def test_equals_the_two_products_of_the_release() -> None:
    torch.manual_seed(0)
    model, decay = nn.Linear(20, 20), 0.999
    average, slow = WeightAverage(model, decay), model.weight.detach().double()
    for _ in range(50):
        nn.init.normal_(model.weight)
        average.update(model)
        slow = decay * slow + (1 - decay) * model.weight.detach().double()
    assert_close(average.tensors["weight"].double(), slow, rtol=1e-5, atol=1e-6)


def test_training_averages_the_weights_after_each_step(tmp_path: Path) -> None:
    model = tiny_model()
    expected = {name: value.double() for name, value in model.state_dict().items()}

    def follow(progress: TrainProgress) -> None:
        for name, value in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()

    path = train(model, Rectangles(), tiny_config(ema_decay=0.9), tmp_path, progress=follow)
    found = load_checkpoint(path)
    assert found.ema.keys() == found.model.keys()
    for name, value in found.ema.items():
        if value.is_floating_point():
            assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    moved = "box_head.stages.0.class_logits.weight"
    assert not torch.equal(found.ema[moved], found.model[moved])


def test_averaging_changes_no_weight_and_is_off_by_default(tmp_path: Path) -> None:
    paths = [
        train(tiny_model(), Rectangles(), tiny_config(iterations=3, **settings), tmp_path / str(index))
        for index, settings in enumerate([{}, {"ema_decay": 0.9}])
    ]
    plain, averaged = (load_checkpoint(path) for path in paths)
    assert not plain.ema
    for name, value in plain.model.items():
        assert torch.equal(averaged.model[name], value), name


def test_the_average_loads_into_a_model(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(train(tiny_model(), Rectangles(), tiny_config(iterations=3, ema_decay=0.5), tmp_path))
    model = tiny_model()
    load_model_weights(model, checkpoint, use_ema=True)
    assert all(torch.equal(value, checkpoint.ema[name]) for name, value in model.state_dict().items())
