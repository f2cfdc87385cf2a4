"""Files of torch and detectron2: the same tensors as their own readers give, and no more than that."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffinst.errors import CheckpointError
from diffinst.weights.files import open_released, sha256_of, write_pkl, write_pth

ZIP, LEGACY = {"_use_new_zipfile_serialization": True}, {"_use_new_zipfile_serialization": False}


def state() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "a.weight": base,
        "a.view": base[1:3, ::2],
        "a.transposed": base.T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "bf.x": torch.tensor([0.5], dtype=torch.bfloat16),
        "double.x": torch.tensor([1e-3], dtype=torch.float64),
        "betas": torch.tensor([1e-9], dtype=torch.float64),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "none": torch.empty(0, 3),
    }


def save(path: Path, content: Any, settings: dict[str, Any]) -> Path:
    torch.save(content, path, **settings)
    return path


@pytest.mark.parametrize("settings", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_torch_files_read_as_torch_reads_them(settings: dict[str, Any], tmp_path: Path) -> None:
    content = {
        "model": OrderedDict(state()),
        "ema_state": {"a.weight": torch.ones(4, 6)},
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "scheduler": {"base_lrs": [0.1], "last_epoch": 5},
        "iteration": 9,
    }
    path = save(tmp_path / "model.pth", content, settings)
    expected = torch.load(path, weights_only=True)["model"]
    found = open_released(path)
    assert list(found.states) == ["model", "ema_state"]
    tensors = found.tensors()
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        assert_close(tensors[name], value.detach().to(tensors[name].dtype), rtol=0, atol=0)
    kinds = {name: value.dtype for name, value in tensors.items()}
    assert {kinds[name] for name in ("half", "bf.x", "double.x", "a.view", "parameter")} == {torch.float32}
    assert (kinds["count"], kinds["mask"], kinds["betas"]) == (torch.int64, torch.bool, torch.float64)
    assert found.tensors("ema_state")["a.weight"].sum() == 24
    with pytest.raises(CheckpointError, match="no 'teacher' in it. There: model, ema_state"):
        found.tensors("teacher")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays(protocol: int, tmp_path: Path) -> None:
    arrays = {"w": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.float64(2.5), "i": np.array(3)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol))
    found = open_released(tmp_path / "x.pkl").tensors()
    assert found["w"].dtype == torch.float32
    assert found["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert float(found["n"]) == 2.5
    assert int(found["i"]) == 3


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"x": torch.ones(1)}, {"x"}),
        ({"state_dict": {"x": torch.ones(1)}, "epoch": 3}, {"x"}),
        ({"model": {"module.x": torch.ones(1), "module.y": torch.ones(1)}}, {"x", "y"}),
        ({"model": {"module.x": torch.ones(1), "y": torch.ones(1)}}, {"module.x", "y"}),
    ],
)
def test_where_the_state_stands(content: Any, names: set[str], tmp_path: Path) -> None:
    assert set(open_released(save(tmp_path / "x", content, ZIP)).tensors()) == names


def test_written_files_are_plain(tmp_path: Path) -> None:
    states = {
        "model": {"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)},
        "ema_state": {"a": torch.ones(1)},
    }
    write_pth(tmp_path / "x.pth", states)
    write_pkl(tmp_path / "x.pkl", states)
    by_torch = torch.load(tmp_path / "x.pth", weights_only=True)
    by_pickle = pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert set(by_pickle) == {"model", "ema_state", "__author__", "matching_heuristics"}
    for name, value in states["model"].items():
        assert torch.equal(by_torch["model"][name], value)
        np.testing.assert_array_equal(by_pickle["model"][name], value.numpy())
        for suffix in (".pth", ".pkl"):
            assert torch.equal(open_released(tmp_path / f"x{suffix}").tensors()[name], value)
    assert not list(tmp_path.glob("*.tmp"))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["weight", "optimizer"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_files_do_nothing_but_raise(form: str, place: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "mark"
    if form == "pickle":
        content: dict[str, Any] = {"model": {"w": np.ones(2)}}
    else:
        content = {"model": {"w": torch.ones(2)}}
    if place == "weight":
        content["model"]["v"] = Evil(mark)
    else:
        content["optimizer"] = [Evil(mark)]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        save(path, content, ZIP if form == "zip" else LEGACY)
    with pytest.raises(CheckpointError, match=r"evil\.pth: it asks for 'posix\.system', which is refused") as raised:
        open_released(path)
    assert "\n" not in str(raised.value)
    assert not mark.exists()


def repack(source: Path, target: Path, *, compression: int = zipfile.ZIP_STORED, **changes: bytes | None) -> Path:
    """A torch file with parts replaced (None: left out), by the last part of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.rpartition("/")[2]
            content = changes.get(f"part_{name.replace('.', '_')}", old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return target


class TestBrokenFiles:
    @pytest.mark.parametrize("settings", [ZIP, LEGACY], ids=["zip", "legacy"])
    def test_truncated(self, settings: dict[str, Any], tmp_path: Path) -> None:
        content = save(tmp_path / "x.pth", {"model": state()}, settings).read_bytes()
        for length in {1, 2, 10, 30, len(content) // 3, len(content) // 2, len(content) - 30, len(content) - 1}:
            (tmp_path / "cut.pth").write_bytes(content[:length])
            with pytest.raises(CheckpointError, match="cut.pth: "):
                open_released(tmp_path / "cut.pth").tensors()

    def test_empty_missing_and_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty.pth").touch()
        for name, message in (("empty.pth", "empty"), ("gone.pth", "cannot be read .No such"), (".", "is a folder")):
            with pytest.raises(CheckpointError, match=message):
                open_released(tmp_path / name)

    def test_random_bytes(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        for start in (b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
            for size in (1, 7, 300):
                (tmp_path / "x").write_bytes(start + generator.bytes(size))
                with pytest.raises(CheckpointError):
                    open_released(tmp_path / "x")

    def test_an_archive_that_grows(self, tmp_path: Path) -> None:
        source = save(tmp_path / "x.pth", {"model": {"w": torch.zeros(10**6)}}, ZIP)
        small = repack(source, tmp_path / "bomb.pth", compression=zipfile.ZIP_DEFLATED)
        assert small.stat().st_size < 20_000
        with pytest.raises(CheckpointError, match="a compressed archive"):
            open_released(small)

    def test_a_storage_of_another_length(self, tmp_path: Path) -> None:
        source = save(tmp_path / "x.pth", {"model": {"w": torch.zeros(4)}}, ZIP)
        with pytest.raises(CheckpointError, match="storage 0 has 3 bytes instead of 16"):
            open_released(repack(source, tmp_path / "y.pth", part_0=b"123")).tensors()

    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
    def test_changed_bytes_are_refused_or_harmless(self, form: str, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        if form == "pickle":
            path.write_bytes(pickle.dumps({"model": {"w": np.arange(9.0), "v": np.ones((2, 2), "f4")}}, 2))
        else:
            save(path, {"model": {"w": torch.arange(9.0), "v": torch.ones(2, 2)}}, ZIP if form == "zip" else LEGACY)
        content, generator = path.read_bytes(), np.random.default_rng(0)
        for _ in range(300):
            changed = bytearray(content)
            for position in generator.integers(len(content), size=generator.integers(1, 4)):
                changed[position] = generator.integers(256)
            path.write_bytes(changed)
            try:
                open_released(path).tensors()
            except CheckpointError as error:
                message = str(error)
            else:
                message = ""
            assert "\n" not in message

    def test_an_archive_of_something_else(self, tmp_path: Path) -> None:
        source = save(tmp_path / "x.pth", {"model": {"w": torch.zeros(4)}}, ZIP)
        with pytest.raises(CheckpointError, match=r"without data\.pkl"):
            open_released(repack(source, tmp_path / "y.pth", part_data_pkl=None))
        with pytest.raises(CheckpointError, match="big-endian"):
            open_released(repack(source, tmp_path / "z.pth", part_byteorder=b"big"))

    def test_a_legacy_storage_that_claims_more(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.pth", {"model": {"w": torch.zeros(4)}}, LEGACY)
        content = path.read_bytes()
        path.write_bytes(content[:-24] + struct.pack("<q", 2**50) + content[-16:])
        with pytest.raises(CheckpointError, match="another length"):
            open_released(path)

    def test_a_legacy_list_of_storages_that_holds_something_else(self, tmp_path: Path) -> None:
        path = save(tmp_path / "w.pth", state(), LEGACY)
        content = path.read_bytes()
        # Its last pickle is the list of keys: here one that holds a tuple besides.
        end = content.index(b"e.", content.rindex(b"\x80\x02]"))
        path.write_bytes(content[:end] + b")" + b"\x85" * 3 + content[end:])
        with pytest.raises(CheckpointError, match="its list of storages does not fit"):
            open_released(path)

    def test_a_view_as_old_torch_wrote_it(self, tmp_path: Path) -> None:
        content = b"\x80\x02}\x8c\x01w(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x01"
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            archive.writestr("w/data.pkl", content + b")" + b"2\x86" * 40 + b"tQs.")
        with pytest.raises(CheckpointError, match="views of storages"):
            open_released(tmp_path / "w.pth")

    def test_one_storage_many_names(self, tmp_path: Path) -> None:
        base = torch.zeros(1000)
        path = save(tmp_path / "x.pth", {"model": {str(i): base[:] for i in range(2000)}}, ZIP)
        with pytest.raises(CheckpointError, match="claim more bytes than the file has"):
            open_released(path).tensors()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([torch.ones(1)], "but a list"),
            ({}, "no names and tensors"),
            ({"model": {"w": "text"}}, "no names and tensors, e.g. under 'w'"),
            ({"model": {3: torch.ones(1)}}, "no names and tensors, e.g. under '3'"),
            ({"blobs": {"conv1_w": torch.ones(1)}}, "Caffe2's weights"),
        ],
    )
    def test_no_weights_in_it(self, content: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_released(save(tmp_path / "x.pth", content, ZIP))


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")
