"""Finding a checkout's package, and standing in for a package that it wants; no detectron2 needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers.original import (
    find_commit,
    find_package,
    import_package,
    noise_giver,
    stand_in_for_timm,
    stand_in_names,
)
from bench.peers.protocol import PeerError


@pytest.fixture
def clean_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of a test leave nothing behind."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "diffusiondet")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("timm", "diffusiondet"):  # not torch, which cannot be loaded twice
            del sys.modules[name]


def package(folder: Path, text: str = "") -> Path:
    (folder / "diffusiondet").mkdir()
    (folder / "diffusiondet" / "__init__.py").write_text(text)
    return folder


def test_either_package_is_found(tmp_path: Path) -> None:
    assert find_package(str(package(tmp_path))) == (tmp_path, "diffusiondet")


@pytest.mark.parametrize(
    ("checkout", "message"), [(None, "needs `checkout:`"), ("", "needs"), ("/nowhere", "has neither")]
)
def test_no_checkout(checkout: str | None, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        find_package(checkout)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_clone_itself(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "inside").mkdir()
    package(tmp_path)
    assert find_commit(tmp_path) is None
    git("init")
    assert find_commit(tmp_path) is None  # nothing committed
    git("add", ".")
    git("commit", "--message", "x")
    assert find_commit(tmp_path) == git("rev-parse", "HEAD")
    assert find_commit(tmp_path / "inside") is None
    assert find_commit(tmp_path / "nowhere") is None


@pytest.mark.usefixtures("clean_modules")
def test_without_timm_its_three_things_are_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    assert stand_in_for_timm() == ["timm.models.layers: DropPath, to_2tuple and trunc_normal_ of this runner"]
    monkeypatch.delitem(sys.modules, "timm")
    layers = sys.modules["timm.models.layers"]
    assert layers.to_2tuple(7) == (7, 7)
    assert layers.to_2tuple((7, 5)) == (7, 5)
    assert layers.DropPath(0.5).eval()(3) == 3
    assert stand_in_names() == ["timm.models.layers"]


@pytest.mark.usefixtures("clean_modules")
@pytest.mark.parametrize("text", ["import a_package_that_nobody_has", "undefined_name", "def"])
def test_a_clone_that_cannot_be_imported(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PeerError, match="diffusiondet: cannot be imported"):
        import_package(package(tmp_path, text), "diffusiondet")


def test_each_image_has_noise_of_its_own() -> None:
    import torch

    around = noise_giver(eval_seed=0, num_proposals=3, steps=1)
    draws = []
    for image_id in (1, 2, 1):
        with around(image_id):
            draws.append(torch.randn((1, 3, 4)))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
