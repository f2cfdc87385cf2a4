"""The lock of what is installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from bench.measure import packages
from bench.measure.packages import lock_digest, needed_packages, packages_lock


@pytest.fixture(autouse=True)
def _forget() -> None:
    needed_packages.cache_clear()
    packages_lock.cache_clear()


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    target = folder / f"{name}-{version}.dist-info"
    target.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (target / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)]) + "\n")


def use(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    found = list(importlib.metadata.distributions(path=[str(folder) for folder in folders]))
    monkeypatch.setattr(packages.importlib.metadata, "distributions", lambda: found)


def test_the_lock_lists_all_and_the_short_list_what_we_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path, "diffinst-bench", "1.0", "Some_Thing>=1")
    install(tmp_path, "some.thing", "2.0", "other; extra == 'more'")
    install(tmp_path, "other", "3.0")
    use(monkeypatch, tmp_path)
    assert packages_lock() == "other==3.0\nsome-thing==2.0\n"
    assert needed_packages() == {"diffinst-bench": "1.0", "some-thing": "2.0"}


def test_of_two_installations_the_one_that_is_imported_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(tmp_path / "first", "thing", "2.0")
    install(tmp_path / "second", "thing", "1.0")
    use(monkeypatch, tmp_path / "first", tmp_path / "second")
    assert packages_lock() == "thing==2.0\n"


def test_any_other_version_is_another_lock() -> None:
    assert lock_digest("a==1\n") != lock_digest("a==2\n")


def test_it_holds_what_this_process_has_loaded() -> None:
    lines = packages_lock().splitlines()
    assert f"pytest=={pytest.__version__}" in lines
    assert f"torch=={importlib.metadata.version('torch')}" in lines
    assert not any(line.startswith("diffinst-bench") for line in lines)
