"""The results folder: whole files or none, one writer, nothing overwritten in silence."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from run_records import make_record

from bench import store as store_module
from bench.errors import NewerRecordError, StoreError
from bench.plan import Node
from bench.record import dump_json, metric
from bench.store import NodeResult, Store, later_text, write_atomic

NODE = Node(id="train-1", kind="train", inputs=("dataset-1",), spec={"seed": 0, "steps": (1, 2)})


def finish(store: Store, node: Node = NODE, **changes: Any) -> Path:
    folder = store.begin(node)
    (folder / "model").write_text("weights")
    content: dict[str, Any] = {
        "id": node.id,
        "kind": node.kind,
        "spec": node.spec,
        "inputs": list(node.inputs),
        "started_at": "2026-01-02T03:04:05Z",
        "finished_at": "2026-01-02T03:04:06Z",
        "duration_s": 1.0,
        "attempts": 1,
        "files": {"model": 7},
        "outputs": {"answer": 42},
        "environment": {},
    }
    write_atomic(folder / "done.json", dump_json(NodeResult.model_validate(content | changes).model_dump(mode="json")))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "results")
    with found.lock():
        pass
    return found


def test_looking_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    assert not store.is_done("train-1")
    assert store.records() == []
    assert list(tmp_path.iterdir()) == []


def test_a_finished_node_is_found(store: Store) -> None:
    finish(store)
    result = store.result("train-1")
    assert result is not None
    assert result.outputs == {"answer": 42}


def test_a_node_without_its_files_is_not_done(store: Store) -> None:
    folder = finish(store)
    (folder / "model").write_text("weight")
    assert not store.is_done("train-1")
    (folder / "model").unlink()
    assert not store.is_done("train-1")


def test_a_new_attempt_keeps_the_work_and_drops_the_claim(store: Store) -> None:
    folder = finish(store)
    (folder / ".done.json.x.tmp").write_text("half")
    (folder / ".tmpEcKoVe").write_text("half")  # safetensors writes so
    assert store.begin(NODE) == folder
    assert (folder / "model").exists()
    assert not store.is_done("train-1")
    assert not list(folder.glob(".*tmp*"))


def test_one_id_is_one_specification(store: Store) -> None:
    store.begin(NODE)
    store.begin(NODE)
    with pytest.raises(StoreError, match="made for another specification. Delete its folder"):
        store.begin(Node(id="train-1", kind="train", inputs=("dataset-1",), spec={"seed": 1}))


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": 9}'])
def test_a_damaged_claim_is_named(store: Store, text: str) -> None:
    folder = finish(store)
    (folder / "done.json").write_text(text)
    with pytest.raises(StoreError, match=r"done\.json: corrupt, or of another version\. Delete this file"):
        store.is_done("train-1")


def test_a_copied_folder_is_not_another_node(store: Store) -> None:
    finish(store).rename(store.folder("train-2"))
    with pytest.raises(StoreError, match="belongs to node train-1"):
        store.is_done("train-2")


def test_the_lock_is_for_one_and_names_the_holder(store: Store) -> None:
    with store.lock():
        other = Store(store.root)
        with pytest.raises(StoreError, match=rf"in use by another run-suite \(process {os.getpid()}\)"), other.lock():
            pass
    with store.lock():
        pass


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with (
        pytest.raises(StoreError, match="a file stands where a folder is needed") as caught,
        Store(tmp_path / "results").lock(),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EACCES, "no permission"), (errno.EROFS, "read-only"), (errno.ENOSPC, "no space")]
)
def test_an_unusable_folder_is_refused_before_work(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match=f"{reason}.*--results DIR"), store.lock():
        pytest.fail("work began")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="no permission to write"), Store(tmp_path / "results").lock():
        pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_breaks_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(StoreError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_may_be_told_not_to_replace(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "1", replace=False)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a", "2", replace=False)
    assert (tmp_path / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert oct((tmp_path / "a").stat().st_mode & 0o777) == "0o644"


def history(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.glob("steps/box/history/*"))


def test_records_are_kept_whatever_comes_after(store: Store) -> None:
    ok = make_record()
    better = make_record(metrics={"segm/AP": metric("segm/AP", 0.5)})
    failed = make_record(status="failed", reason="out of memory", metrics={})
    assert store.write_record(failed, "box") == "new"
    assert store.write_record(ok, "box") == "replaced"
    assert store.write_record(make_record(command="again"), "box") == "same"
    assert store.records()[0].command == ok.command
    assert store.write_record(better, "box") == "replaced"
    assert store.write_record(failed, "box") == "kept"
    assert store.records("steps", "box") == [better]
    assert history(store) == ["00ff.1.json", "00ff.2.json", "00ff.3.json"]
    found = [json.loads((store.root / "steps/box/history" / name).read_text())["status"] for name in history(store)]
    assert found == ["failed", "ok", "failed"]


def test_a_damaged_record_is_kept_and_replaced(store: Store) -> None:
    path = store.record_path("steps", "box", "00ff")
    path.parent.mkdir(parents=True)
    path.write_text("{half")
    assert store.write_record(make_record(), "box") == "replaced"
    assert store.records() == [make_record()]
    assert (path.parent / "history/00ff.1.json").read_text() == "{half"


@pytest.mark.parametrize("content", [b"{half \xff", b"[" * 100_000], ids=["no text", "too deep"])
def test_a_damaged_record_keeps_its_bytes(store: Store, content: bytes) -> None:
    path = store.record_path("steps", "box", "00ff")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert store.write_record(make_record(), "box") == "replaced"
    assert store.records() == [make_record()]
    assert (path.parent / "history/00ff.1.json").read_bytes() == content


def test_a_newer_record_is_refused_and_stays(store: Store) -> None:
    store.write_record(make_record(), "box")
    path = store.record_path("steps", "box", "00ff")
    text = json.dumps(json.loads(path.read_text()) | {"schema_version": 99, "novelty": 1})
    path.write_text(text)
    with pytest.raises(NewerRecordError, match=r"00ff\.json: schema version 99, .* reads up to 2\. Upgrade") as caught:
        store.write_record(make_record(command="again"), "box")
    assert "\n" not in str(caught.value)
    assert path.read_text() == text
    assert history(store) == []


def test_a_kill_between_keeping_and_writing_keeps_one_copy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_record(make_record(), "box")
    better = make_record(metrics={"segm/AP": metric("segm/AP", 0.5)})
    real = store_module.write_atomic

    def die(path: Path, text: str, **options: Any) -> None:
        if path.parent.name == "box":
            raise KeyboardInterrupt
        real(path, text, **options)

    monkeypatch.setattr(store_module, "write_atomic", die)
    with pytest.raises(KeyboardInterrupt):
        store.write_record(better, "box")
    monkeypatch.undo()
    assert store.records() == [make_record()]
    store.write_record(better, "box")
    assert store.records() == [better]
    assert history(store) == ["00ff.1.json"]


def test_leftovers_of_a_kill_go_when_the_folder_is_locked(store: Store) -> None:
    store.write_record(make_record(), "box")
    leftover = store.root / "steps/box/.00ff.json.abc.tmp"
    leftover.write_text("half")
    with store.lock():
        assert not leftover.exists()
    assert len(store.records()) == 1


def test_what_records_name_is_kept_once_and_never_touched(store: Store) -> None:
    with store.lock():
        name = store.keep_provenance("ab.patch", b"caf\xe9\n")
        before = (store.root / name).stat().st_mtime_ns
        assert store.keep_provenance("ab.patch", b"caf\xe9\n") == name == "provenance/ab.patch"
        assert (store.root / name).read_bytes() == b"caf\xe9\n"
        assert (store.root / name).stat().st_mtime_ns == before
        assert store.keep_provenance("ab.patch", b"1", publish=False) == ".store/provenance/ab.patch"


def test_a_damaged_file_of_that_name_is_told(store: Store) -> None:
    with store.lock():
        path = store.root / store.keep_provenance("ab.patch", b"whole")
        path.write_bytes(b"who")
        with pytest.raises(StoreError, match=r"ab\.patch: damaged.*Delete it"):
            store.keep_provenance("ab.patch", b"whole")
        assert path.read_bytes() == b"who"


def test_what_a_kill_left_of_them_is_removed(store: Store) -> None:
    with store.lock():
        folder = (store.root / store.keep_provenance("ab.patch", b"whole")).parent
    (folder / ".ab.patch.x.tmp").write_text("half")
    with store.lock():
        assert [path.name for path in folder.iterdir()] == ["ab.patch"]


def test_what_a_digest_of_code_stands_for(store: Store) -> None:
    with store.lock():
        store.keep_code("ab", {"bench.x:f": "cd"})
    assert store.code_parts("ab") == {"bench.x:f": "cd"}
    leftover = store.nodes_folder / "code/.cd.json.x.tmp"
    leftover.write_text("half")
    with store.lock():
        assert [path.name for path in leftover.parent.iterdir()] == ["ab.json"]


def test_a_place_for_code_that_cannot_be_made_is_one_line(store: Store) -> None:
    with store.lock():
        (store.nodes_folder / "code").write_text("in the way")
        with pytest.raises(StoreError, match="code: cannot be written: a file stands where a folder is needed"):
            store.keep_code("ab", {})


@pytest.mark.parametrize("link", [".store", "suite", "suite/machine", "suite/machine/history", ".store/train-1"])
def test_no_link_leads_out_of_the_results_folder(tmp_path: Path, link: str) -> None:
    store, outside = Store(tmp_path / "results"), tmp_path / "outside"
    outside.mkdir()
    (store.root / link).parent.mkdir(parents=True)
    (store.root / link).symlink_to(outside)

    def write() -> None:
        with store.lock():
            store.begin(NODE)
            store.write_record(make_record(suite="suite"), "machine")

    with pytest.raises(StoreError, match=r"a link leads from here to .*outside.*, out of the results folder .* Remove"):
        write()
    assert not list(outside.iterdir())


def test_no_file_outside_is_written_through_a_link(tmp_path: Path) -> None:
    store, precious = Store(tmp_path / "results"), tmp_path / "precious"
    precious.write_text("precious")
    store.root.mkdir()
    (store.root / ".lock").symlink_to(precious)
    with pytest.raises(StoreError), store.lock():
        pass
    (store.folder("train-1")).mkdir(parents=True)
    (store.folder("train-1") / "losses.jsonl").symlink_to(precious)
    with pytest.raises(StoreError, match=r"losses\.jsonl: a link leads"):
        store.begin(NODE)
    assert precious.read_text() == "precious"


def test_the_results_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    store = Store(tmp_path / "results")
    with store.lock():
        store.begin(NODE)
        assert store.write_record(make_record(suite="suite"), "machine") == "new"


def test_an_end_is_never_before_its_start() -> None:
    assert later_text("2026-12-31T23:59:59Z", 1.5) == "2027-01-01T00:00:00Z"


def test_bytes_that_are_no_text_are_named_or_counted(store: Store) -> None:
    folder = finish(store)
    (folder / "attempts.txt").write_bytes(b"\xff\n\xfe\n")
    assert store.attempts("train-1") == 2
    (folder / "failure.txt").write_bytes(b"no \xff\n")
    assert store.unfinished("train-1") == "failed before: no \ufffd"
    (folder / "done.json").write_bytes(b"\xff{}")
    with pytest.raises(StoreError, match=r"done\.json: corrupt"):
        store.result("train-1")
