"""Weights are read as data: what a pickle would run raises an error instead."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.peers.protocol import PeerError
from bench.peers.weights import read_weights


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_the_model_zoo(tmp_path: Path, protocol: int) -> None:
    arrays = OrderedDict(stem=np.arange(6, dtype=np.float32).reshape(2, 3), scale=np.float32(2))
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_weights(path)
    np.testing.assert_array_equal(found["model"]["stem"], arrays["stem"])
    assert found["matching_heuristics"] is True


def test_a_torch_file_with_and_without_the_key_model(tmp_path: Path) -> None:
    for content in ({"w": torch.ones(2)}, {"model": {"w": torch.ones(2)}, "iteration": 3}):
        torch.save(content, tmp_path / "w.pth")
        assert read_weights(tmp_path / "w.pth")["model"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["w.pkl", "w.pth"])
def test_what_a_pickle_says_is_not_done(tmp_path: Path, name: str) -> None:
    target = tmp_path / "made"
    content = {"model": Evil(target)}
    if name == "w.pkl":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(PeerError, match="is no file of weights"):
        read_weights(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("data", [b"", b"nonsense", pickle.dumps([1, 2]), b"\x80\x04\x95"])
@pytest.mark.parametrize("name", ["w.pkl", "w.pth"])
def test_damaged_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PeerError, match=name):
        read_weights(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot be read: No such file"):
        read_weights(tmp_path / "absent.pth")
