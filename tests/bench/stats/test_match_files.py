"""Match tables that go to disk and come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lvis_files import federated_scene

from bench.errors import RecordError
from bench.stats.match_files import file_name, read_matches, write_matches
from diffinst.evaluation.lvis_ap import prepare_lvis
from diffinst.evaluation.matches import MatchTable, build_size_matches

FIELDS = MatchTable.__dataclass_fields__


def tables_of(seed: int = 0, *, num_results: int | None = None) -> dict[str, MatchTable]:
    scorable = prepare_lvis(*federated_scene(seed))
    results = scorable.results[:num_results]
    return build_size_matches(scorable.content, results, scorable.image_ids, "segm", federated=True)


@pytest.mark.parametrize("num_results", [None, 0])
def test_all_comes_back(num_results: int | None, tmp_path: Path) -> None:
    tables, path = tables_of(num_results=num_results), tmp_path / file_name("segm")
    write_matches(path, tables)
    found = read_matches(path)
    assert list(found) == ["all", "small", "medium", "large"]
    for size, table in tables.items():
        for name in FIELDS:
            ours, theirs = getattr(table, name), getattr(found[size], name)
            assert ours.dtype == theirs.dtype, name
            assert np.array_equal(ours, theirs), name


def test_the_same_tables_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_matches(tmp_path / name, tables_of())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_is_not_whole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "matches-segm.npz"
    with pytest.raises(RecordError, match=r"matches-segm.npz: cannot be read \(No such file"):
        read_matches(path)
    write_matches(path, tables_of())
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-50], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="matches-segm.npz: cannot be read"):
            read_matches(path)
