"""Weights are read as data: what a pickle would run raises an error instead."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
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
    assert found["model"]["stem"].dtype == np.float32
    assert found["model"]["scale"] == 2
    assert found["matching_heuristics"] is True


def test_weights_at_the_top_of_a_pickle(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": array, "n": np.array(3)}))
    found = read_weights(tmp_path / "w.pkl")["model"]
    np.testing.assert_array_equal(found["w"], array)
    assert found["n"] == 3


def test_an_array_of_many_names_is_made_once(tmp_path: Path) -> None:
    """Otherwise a small file could fill the memory: a pickle names the same array again for a few bytes."""
    array = np.zeros(2_000_000, dtype=np.float32)
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": {f"w{i}": array for i in range(50_000)}, "again": array}))
    found = read_weights(path)
    assert len(found["model"]) == 50_000
    assert len({id(entry) for entry in found["model"].values()} | {id(found["again"])}) == 1


class Calling:
    def __init__(self, function: object, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.parts


RECONSTRUCT = np.zeros(1).__reduce__()[0]
# The first makes an object of an address that the file names, which crashes when it is looked at.
ATTACKS = {
    "array of addresses": pickle.dumps({"model": {"w": Calling(np.ndarray, (1,), np.dtype("O"), b"A" * 8)}}),
    "array of a buffer": pickle.dumps({"model": {"w": Calling(np.ndarray, (1,), np.dtype("f8"), b"A" * 8)}}),
    "array of objects": pickle.dumps({"model": {"w": np.array([1, None], dtype=object)}}),
    "_reconstruct of objects": pickle.dumps({"model": {"w": Calling(RECONSTRUCT, np.ndarray, (9,), b"O")}}),
    "type of objects": pickle.dumps({"model": {"w": np.dtype("O")}}),
    "_frombuffer of objects": (
        b"\x80\x04}\x8c\x01wcnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAAcnumpy\ndtype\n\x8c\x01O\x85RK\x01\x85"
        b"\x8c\x01CtRs."
    ),
    "key in tuples": b"\x80\x04}" + b")" + b"\x85" * 300_000 + b"Ns.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_memory_is_left_alone(tmp_path: Path, name: str) -> None:
    # Elsewhere, since what goes wrong is a crash.
    (tmp_path / "w.pkl").write_bytes(ATTACKS[name])
    code = """
import sys
from pathlib import Path
from bench.peers.protocol import PeerError
from bench.peers.weights import read_weights
try:
    print(read_weights(Path(sys.argv[1])))
except PeerError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "w.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "w.pkl: is no file of weights" in done.stdout


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
