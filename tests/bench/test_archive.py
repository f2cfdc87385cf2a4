from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import archive
from bench.archive import check_archive, compress, read_entries, write_archive

FILES: dict[str, bytes | Path] = {
    "b/two.txt": b"two\n" * 9,
    "a.json": b"{}",
    "empty": b"",
    "c.txt.gz": compress(b"see" * 40),
}


def write(folder: Path, files: dict[str, bytes | Path] = FILES) -> Path:
    path = folder / "x.zip"
    write_archive(path, files, {"format": "test"})
    return path


def findings(path: Path, data: bytes) -> tuple[str, ...]:
    path.write_bytes(data)
    return check_archive(path).findings


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = write(tmp_path_factory.mktemp("archive"))
    return path.with_name("y.zip"), path.read_bytes()


def test_a_zip_as_others_read_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert found.namelist() == ["manifest.json", "a.json", "b/two.txt", "c.txt.gz", "empty"]
        assert found.read("b/two.txt") == FILES["b/two.txt"]
        assert {info.date_time for info in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_files_that_are_read_in_pieces_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path).read_bytes()
    monkeypatch.setattr(archive, "_CHUNK", 5)
    (tmp_path / "two").write_bytes(b"two\n" * 9)
    path = write(tmp_path, {**FILES, "b/two.txt": tmp_path / "two"})
    assert path.read_bytes() == whole
    assert check_archive(path).findings == ()


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    first = write(tmp_path).read_bytes()
    (tmp_path / "two").write_bytes(b"two\n" * 9)
    assert write(tmp_path, {**dict(reversed(FILES.items())), "b/two.txt": tmp_path / "two"}).read_bytes() == first


def test_what_was_packed_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    check = check_archive(path)
    assert check.findings == ()
    assert check.manifest is not None
    found = dict(read_entries(path, check.manifest))
    assert found == {"a.json": b"{}", "b/two.txt": b"two\n" * 9, "c.txt": b"see" * 40, "empty": b""}


@given(st.data())
@settings(max_examples=300)
def test_any_changed_byte_is_found(packed: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = packed
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    assert findings(path, whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])


def test_one_bit_of_each_byte(packed: tuple[Path, bytes]) -> None:
    path, whole = packed
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        assert findings(path, bytes(changed)), f"byte {place}"


@given(st.data())
def test_any_cut_and_any_addition_is_found(packed: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = packed
    assert findings(path, whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert findings(path, whole + data.draw(st.binary(min_size=1, max_size=40)))
    place = data.draw(st.integers(0, len(whole)))
    assert findings(path, whole[:place] + b"\0" + whole[place:])


def test_a_changed_byte_is_named(packed: tuple[Path, bytes]) -> None:
    path, whole = packed
    data = whole.index(b"two\n" * 9)
    changed = bytearray(whole)
    changed[data + 4] ^= 1
    assert findings(path, bytes(changed)) == ("b/two.txt: its content does not match its SHA-256",)
    changed = bytearray(whole)
    changed[data - 5] ^= 1  # in the name before it
    assert findings(path, bytes(changed))[-1] == (
        f"the header of b/two.txt: byte {data - 5} of the archive is not as it should be"
    )
    assert findings(path, whole[: data + 3]) == (f"the archive ends after {data + 3} bytes, within b/two.txt",)
    assert findings(path, whole + b"..") == (f"2 bytes follow the end of the archive at byte {len(whole)}",)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("more.txt", "more.txt: is in the archive, but not in manifest.json"),
        ("a.json", "a.json: is in the archive 2 times"),
        ("../../escape", "'../../escape': refused, its name leads elsewhere or is no plain one"),
        ("/etc/x", "'/etc/x': refused, its name leads elsewhere or is no plain one"),
    ],
)
def test_an_added_entry_is_named(tmp_path: Path, name: str, message: str) -> None:
    path = write(tmp_path)
    with zipfile.ZipFile(path, "a") as found:
        found.writestr(name, b"...")
    assert message in check_archive(path).findings


def test_a_missing_entry_and_a_compressed_one_are_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    with zipfile.ZipFile(path) as found:
        entries = {name: found.read(name) for name in found.namelist()}
    with zipfile.ZipFile(path, "w") as found:
        for name, data in entries.items():
            if name != "a.json":
                info = zipfile.ZipInfo(name)
                kind = zipfile.ZIP_DEFLATED if name == "b/two.txt" else zipfile.ZIP_STORED
                found.writestr(info, data, compress_type=kind)
    # Rewritten by another program: its first header differs already.
    assert check_archive(path).findings
    raw = entries["manifest.json"]
    known = b"".join(piece.known if piece.entry is None else raw for piece in list(archive.layout(raw, []))[:2])
    with path.open("wb") as file:
        file.write(known)
    assert check_archive(path).findings[0].startswith(f"the archive ends after {len(known)} bytes")


def test_the_manifest_is_held_to_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    digest = write_archive(path, FILES, {"format": "test"})
    assert check_archive(path, sha256=digest.upper()).findings == ()
    write_archive(path, FILES | {"a.json": b"[]"}, {"format": "test"})
    assert check_archive(path).findings == ()
    assert check_archive(path, sha256=digest).findings[0].startswith("manifest.json: its SHA-256 is ")


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", ".hidden", "a/../b", "a\\b", "", "manifest.json", "C:x"])
def test_names_that_lead_elsewhere_are_not_written_and_not_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="is no name"):
        write_archive(tmp_path / "x.zip", {name: b""}, {})
    monkeypatch.setattr(archive, "is_safe", lambda _: True)
    if name != "manifest.json":
        write_archive(tmp_path / "x.zip", {name: b""}, {})
        monkeypatch.undo()
        assert "no name that a file in here may have" in check_archive(tmp_path / "x.zip").findings[0]


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"bomb.gz": gzip.compress(bytes(10**6), mtime=0)})
    assert check_archive(path).findings == ()
    monkeypatch.setattr(archive, "MAX_UNCHECKED_BYTES", 10**5)
    assert "unpack to 1000000 are refused" in check_archive(path).findings[0]


def test_sizes_and_places_of_64_bits_are_what_zip_programs_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_ZIP64", 1500)
    path = write(tmp_path, {"a.txt": b"a" * 900, "b.txt": b"b" * 2000, "c.txt": b"c"})
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert [len(found.read(name)) for name in ("a.txt", "b.txt", "c.txt")] == [900, 2000, 1]
    assert check_archive(path).findings == ()
    monkeypatch.undo()
    assert check_archive(path).findings
