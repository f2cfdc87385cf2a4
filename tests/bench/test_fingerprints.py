"""Digests of data: what is in the files decides, and what a cache knows it knows by size and times."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from coco_files import tiny_content

from bench.fingerprints import Fingerprints, fingerprints_for, save_if_possible
from diffinst.config import DataConfig


def make_set(root: Path) -> DataConfig:
    (root / "images").mkdir(parents=True)
    content = tiny_content()
    (root / "val.json").write_text(json.dumps(content))
    for image in content["images"]:
        (root / "images" / image["file_name"]).write_bytes(f"pixels of {image['id']}".encode())
    settle(root)
    return DataConfig(dataset="custom", val_annotations="val.json", val_images="images")


def settle(root: Path) -> None:
    """Make all files old enough for their times to be trusted."""
    for path in root.rglob("*"):
        if path.is_file():
            facts = path.stat()
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns - 10**10))


def trust_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # The time of a change of times cannot be set back.
    monkeypatch.setattr("bench.fingerprints._SETTLED_NS", -(10**12))


def test_a_file_is_the_hash_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    # FIPS 180-2, example B.1: ba7816bf 8f01cfea ...
    assert Fingerprints().of_file(path) == "ba7816bf8f01cfea" == hashlib.sha256(b"abc").hexdigest()[:16]


def test_a_split_is_its_annotations_and_every_image(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    before = Fingerprints().of_split(data, "val", tmp_path)
    assert before == Fingerprints().of_split(data, "val", tmp_path)
    found = [before]
    for path in (tmp_path / "val.json", tmp_path / "images" / "5.png"):
        text = path.read_bytes()
        path.write_bytes(text + b" ")
        found.append(Fingerprints().of_split(data, "val", tmp_path))
        path.write_bytes(text)
    (tmp_path / "images" / "8.png").unlink()
    found.append(Fingerprints().of_split(data, "val", tmp_path))
    assert len(set(found)) == 4
    assert None not in found


def test_other_files_and_the_place_do_not_matter(tmp_path: Path) -> None:
    data = make_set(tmp_path / "a")
    make_set(tmp_path / "b")
    (tmp_path / "b" / "images" / "other.png").write_bytes(b"another's")
    one, other = (Fingerprints().of_split(data, "val", tmp_path / name) for name in "ab")
    assert one == other


def test_a_list_of_ids_leaves_the_other_images_out(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    (tmp_path / "ids.txt").write_text("11\n5\n")
    listed = data.model_copy(update={"val_image_ids": str(tmp_path / "ids.txt")})
    before = Fingerprints().of_split(listed, "val", tmp_path)
    (tmp_path / "images" / "8.png").write_bytes(b"something else")
    assert Fingerprints().of_split(listed, "val", tmp_path) == before
    (tmp_path / "images" / "11.png").write_bytes(b"something else")
    assert Fingerprints().of_split(listed, "val", tmp_path) != before


def test_what_cannot_be_read_or_is_generated_has_none(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    assert Fingerprints().of_split(data, "train", tmp_path) is None
    assert Fingerprints().of_split(DataConfig(dataset="coco"), "val", tmp_path) is None
    assert Fingerprints().of_split(DataConfig(dataset="shapes"), "val", tmp_path) is None


def test_broken_annotations_are_left_to_the_reader(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    for text in ("{", "[]", '{"images": 3}', '{"images": [1, {"id": 2}, {"file_name": "../../etc/passwd"}]}'):
        (tmp_path / "val.json").write_text(text)
        assert Fingerprints().of_split(data, "val", tmp_path) is not None


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_set(tmp_path / "data")
    trust_times(monkeypatch)
    store = tmp_path / "store"
    store.mkdir()
    first = fingerprints_for(store)
    expected = first.of_split(data, "val", tmp_path / "data")
    first.save()

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("bench.fingerprints._digest", refuse)
    assert fingerprints_for(store).of_split(data, "val", tmp_path / "data") == expected


def test_a_file_of_another_time_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_times(monkeypatch)
    path = tmp_path / "x"
    path.write_bytes(b"one")
    found = Fingerprints(tmp_path / "cache.json")
    before = found.of_file(path)
    path.write_bytes(b"two")  # as long as before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert found.of_file(path) != before


def test_a_file_just_written_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    facts = path.stat()
    found = Fingerprints(tmp_path / "cache.json")
    before = found.of_file(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as if within the same tick of the clock
    assert found.of_file(path) != before


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 0}', '{"version": 1, "files": 3}', "\0"])
def test_a_damaged_cache_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "fingerprints.json").write_text(text)
    (tmp_path / "x").write_bytes(b"abc")
    assert fingerprints_for(tmp_path).of_file(tmp_path / "x") == "ba7816bf8f01cfea"


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    found = fingerprints_for(tmp_path / "none")
    found.of_file(tmp_path / "x")
    save_if_possible(found)
    assert not (tmp_path / "none").exists()


def test_progress_is_told(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    told: list[tuple[int, int]] = []
    Fingerprints(progress=lambda done, total: told.append((done, total))).of_split(data, "val", tmp_path)
    assert told == [(1, 1), (1, 3), (2, 3), (3, 3)]  # the annotations, then the images
