from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from coco_files import tiny_content, write_set
from torch.testing import assert_close

from diffinst.config import DataConfig
from diffinst.data.coco import CocoDataset
from diffinst.data.loader import evaluation_batches, training_batches
from diffinst.errors import DataError
from diffinst.structures import Sample

# Starting a process beside other threads is what DataLoader does on Linux; Python 3.12 and later warn of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    annotations, images = write_set(tmp_path, tiny_content())
    data = DataConfig(
        shortest_edge_train=(16, 20, 24), shortest_edge_test=20, crop_shortest_edge=(20,), crop_size_range=(10, 16)
    )
    return CocoDataset(annotations, images, data=data, split="train")


def _assert_same(first: list[list[Sample]], second: list[list[Sample]]) -> None:
    assert [len(batch) for batch in first] == [len(batch) for batch in second]
    for one, other in zip((s for batch in first for s in batch), (s for batch in second for s in batch)):
        assert one.image_id == other.image_id
        assert torch.equal(one.image, other.image)
        assert (one.target is None) == (other.target is None)
        if one.target is not None and other.target is not None:
            assert_close(vars(one.target), vars(other.target), rtol=0, atol=0)


def test_the_number_of_workers_changes_nothing(dataset: CocoDataset) -> None:
    runs = [
        list(training_batches(dataset, batch_size=2, seed=1, end_iteration=5, num_workers=workers))
        for workers in (0, 1, 2)
    ]
    assert len(runs[0]) == 5
    _assert_same(runs[0], runs[1])
    _assert_same(runs[0], runs[2])
    first, second = (list(evaluation_batches(dataset, batch_size=2, num_workers=workers)) for workers in (0, 2))
    _assert_same(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_an_image_is_told_alike_by_a_worker(
    dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def refuse(*_: object) -> None:
        raise DataError("photo.jpg: corrupt JPEG. Replace it")

    monkeypatch.setattr(dataset, "training_sample", refuse)
    monkeypatch.setattr(dataset, "test_sample", refuse)
    with pytest.raises(DataError, match="^photo.jpg: corrupt JPEG. Replace it$"):
        next(training_batches(dataset, batch_size=2, seed=1, num_workers=workers))
    with pytest.raises(DataError, match="^photo.jpg: corrupt JPEG. Replace it$"):
        next(evaluation_batches(dataset, batch_size=2, num_workers=workers))


def test_a_restart_goes_on_with_the_same_batches(dataset: CocoDataset) -> None:
    whole = list(training_batches(dataset, batch_size=2, seed=1, end_iteration=7))
    _assert_same(list(training_batches(dataset, batch_size=2, seed=1, start_iteration=4, end_iteration=7)), whole[4:])


def test_training_never_ends_by_itself(dataset: CocoDataset) -> None:
    assert len(list(islice(training_batches(dataset, batch_size=1, seed=0), 20))) == 20


def test_another_seed_gives_other_batches(dataset: CocoDataset) -> None:
    first, second = (list(training_batches(dataset, batch_size=3, seed=seed, end_iteration=3)) for seed in (0, 1))
    with pytest.raises(AssertionError):
        _assert_same(first, second)


def test_the_global_random_state_is_untouched(dataset: CocoDataset) -> None:
    state = torch.get_rng_state()
    list(training_batches(dataset, batch_size=1, seed=0, end_iteration=2))
    list(evaluation_batches(dataset, batch_size=1))
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_sees_every_image_once_in_batches_of_equal_size(dataset: CocoDataset, tmp_path: Path) -> None:
    content = tiny_content()
    content["images"][0].update(height=40, width=30)  # image 11: resized to (27, 20), the others to (20, 30)
    content["annotations"] = []
    annotations, images = write_set(tmp_path / "other", content)
    mixed = CocoDataset(annotations, images, data=DataConfig(shortest_edge_test=20, longest_edge_test=30), split="val")
    batches = list(evaluation_batches(mixed, batch_size=8, size_divisor=8))
    assert [[sample.image_id for sample in batch] for batch in batches] == [[5, 8], [11]]
    assert all(sample.target is None for batch in batches for sample in batch)


def test_images_that_are_done_are_skipped(dataset: CocoDataset) -> None:
    batches = list(evaluation_batches(dataset, batch_size=2, skip_ids={8}))
    assert [[sample.image_id for sample in batch] for batch in batches] == [[5, 11]]
    assert list(evaluation_batches(dataset, batch_size=2, skip_ids={5, 8, 11})) == []
