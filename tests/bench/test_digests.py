"""Changed bytes are found where they are read, older results have no digests and load, and a plan hashes nothing."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from bench import digests, server
from bench.errors import StoreError
from bench.plan import Node
from bench.server import Input, Job
from bench.store import Store


def finish(folder: Path, kind: str, content: bytes, inputs: dict[str, Input] | None = None) -> Input:
    """A node that was run: one file, and one log."""
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(content)
    (folder / "log").write_bytes(b"log")
    sources = tuple(source.id for source in (inputs or {}).values())
    node = Node(id=folder.name, kind=kind, inputs=sources, spec={})  # type: ignore[arg-type]
    job = Job(node, folder, inputs or {}, {}, lambda _: None, [folder / "data"], [folder / "log"])
    assert server._run_job(lambda _: {"answer": 42}, job) == 0
    return Input(node.id, kind, folder, {}, {})


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_digests_by_hand(tmp_path: Path) -> None:
    finish(tmp_path / "train-1", "train", b"abc")
    done = json.loads((tmp_path / "train-1" / "done.json").read_text())
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    assert done["digests"] == {"data": abc, "log": hashlib.sha256(b"log").hexdigest()}
    assert done["files"] == {"data": 3}
    assert digests.changed_files(tmp_path / "train-1") == []


def test_a_flipped_byte_is_found_by_the_node_that_reads_it(tmp_path: Path) -> None:
    source = finish(tmp_path / "train-1", "train", b"weights")
    finish(tmp_path / "predict-1", "predict", b"boxes", {"train": source})
    flip(source.folder / "data", 3)
    assert digests.changed_files(source.folder) == ["data"]
    with pytest.raises(StoreError, match=r"train-1/data: has changed since it was written .* delete it and run"):
        finish(tmp_path / "predict-2", "predict", b"boxes", {"train": source})
    assert not (tmp_path / "predict-2" / "done.json").exists()


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    dataset = finish(tmp_path / "dataset-1", "dataset", b"images")
    train = finish(tmp_path / "train-1", "train", b"weights", {"dataset": dataset})
    flip(train.folder / "log", 0)  # a log stops nobody, but is told of
    assert digests.changed_files(train.folder) == ["log"]
    flip(dataset.folder / "data", 0)  # of a node further up
    predict = {"train": train, "dataset": dataset}
    node = Node(id="predict-1", kind="predict", inputs=("train-1",), spec={})
    (tmp_path / "predict-1").mkdir()
    job = Job(node, tmp_path / "predict-1", predict, {}, lambda _: None)
    assert server._run_job(lambda _: {}, job) == 0


def test_every_flipped_byte_of_done_json_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish(store.folder("train-1"), "train", b"weights")
    path = store.folder("train-1") / "done.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place)
        with pytest.raises(StoreError, match=r"train-1/done\.json: .*Delete this file"):
            pytest.fail(f"byte {place} ({whole[place : place + 1]!r}) goes unseen: {store.result('train-1')}")
        path.write_bytes(whole)
    assert store.is_done("train-1")
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size < len(whole) - 1:  # without its last line break it says the same
            with pytest.raises(StoreError):
                store.result("train-1")


def test_a_result_from_before_there_were_digests_loads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = finish(store.folder("train-1"), "train", b"weights")
    path = source.folder / "done.json"
    content: dict[str, Any] = json.loads(path.read_text())
    del content["digests"], content["checksum"]
    path.write_text(json.dumps(content, indent=2) + "\n")
    assert store.is_done("train-1")
    assert digests.changed_files(source.folder) == []
    finish(store.folder("predict-1"), "predict", b"boxes", {"train": source})


def test_a_plan_hashes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    finish(store.folder("train-1"), "train", b"weights")

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is hashed")

    monkeypatch.setattr(digests, "file_digest", refuse)
    assert store.is_done("train-1")
    assert threading.active_count() == 1


@pytest.mark.parametrize("text", ["{}\n", '{\n  "outputs": {\n    "checksum": ""\n  }\n}\n', ""])
def test_text_without_a_checksum_of_its_own_is_left_alone(text: str) -> None:
    assert digests.seal(text) == text
    assert digests.is_intact(text)
