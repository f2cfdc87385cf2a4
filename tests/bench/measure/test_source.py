"""The patch of a dirty source: the commit and the patch make the same tree again, and nobody's folders are in it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from bench.measure import source
from bench.measure.source import Source, private_reason, source_state

LATIN = b"# caf\xe9\n"


def git(root: Path, *arguments: str) -> str:
    names = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(("git", "-C", str(root), *names, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "checkout"
    for folder in ("diffinst", "bench", "results"):
        (root / folder).mkdir(parents=True)
    (root / "diffinst" / "model.py").write_text("WIDTH = 1\nDEPTH = 2\n")
    (root / "diffinst" / "old.py").write_text("gone = True\n")
    (root / "bench" / "run.sh").write_text("true\n")
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "results" / "record.json").write_text("{}\n")
    (root / ".gitignore").write_text("*.secret\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def make_dirty(root: Path) -> None:
    """One of each: changed, removed, executable, new, new in a new folder, binary, not UTF-8, no final line break."""
    (root / "diffinst" / "model.py").write_text("WIDTH = 3\nDEPTH = 2")
    (root / "diffinst" / "old.py").unlink()
    (root / "bench" / "run.sh").chmod(0o755)
    (root / "bench" / "new file.py").write_bytes(LATIN)
    (root / "suites").mkdir()
    (root / "suites" / "mine.yaml").write_text("name: mine\n")
    (root / "diffinst" / "table.bin").write_bytes(bytes(range(256)) * 8)
    git(root, "add", "bench/new file.py")  # staged or not makes no difference


def contents(root: Path) -> dict[str, tuple[bytes, bool]]:
    files = [path for name in source.SCOPE for path in (root / name, *(root / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): (path.read_bytes(), os.access(path, os.X_OK)) for path in files}


def test_clean_source_has_a_commit_and_no_patch(checkout: Path) -> None:
    (checkout / "results" / "record.json").write_text("changed\n")  # results are no source
    found = source_state(checkout)
    assert found == Source(git(checkout, "rev-parse", "HEAD"), dirty=False)
    assert found.facts() == {"commit": found.commit, "dirty": False}


def test_commit_and_patch_make_the_source_again(checkout: Path, tmp_path: Path) -> None:
    make_dirty(checkout)
    (checkout / "results" / "record.json").write_text("changed\n")
    (checkout / "bench" / "key.secret").write_text("ignored by git\n")
    found = source_state(checkout)
    assert found.dirty is True
    assert found.patch is not None
    assert b"results/" not in found.patch
    assert b"secret" not in found.patch

    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(checkout), str(again))
    (tmp_path / "stored.patch").write_bytes(found.patch)
    git(again, "apply", str(tmp_path / "stored.patch"))
    (checkout / "bench" / "key.secret").unlink()
    assert contents(again) == contents(checkout)
    assert found.facts()["diff"] == {"sha256": found.digest, "bytes": len(found.patch)}
    assert found.file_name == f"{hashlib.sha256(found.patch).hexdigest()[:16]}.patch"


def test_looking_changes_nothing_in_the_repository(checkout: Path) -> None:
    make_dirty(checkout)
    files = sorted(path for path in (checkout / ".git").rglob("*") if path.is_file())
    before = [(path, path.read_bytes()) for path in files]
    source_state(checkout)
    after = sorted(path for path in (checkout / ".git").rglob("*") if path.is_file())
    assert [(path, path.read_bytes()) for path in after] == before


def test_the_same_change_has_the_same_digest_whatever_the_users_settings(checkout: Path) -> None:
    make_dirty(checkout)
    plain = source_state(checkout).digest
    for name, value in {"diff.noprefix": "true", "diff.algorithm": "patience", "color.ui": "always"}.items():
        git(checkout, "config", name, value)
    assert source_state(checkout).digest == plain
    (checkout / "diffinst" / "model.py").write_text("WIDTH = 4\n")
    assert source_state(checkout).digest != plain


def test_a_folder_that_is_no_checkout_of_ours_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    assert source_state(tmp_path) == Source()
    assert source_state(checkout / "bench") == Source()  # inside somebody else's repository


def test_a_repository_without_a_commit_says_why_there_is_no_patch(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    found = source_state(tmp_path)
    assert (found.commit, found.dirty, found.patch) == (None, True, None)
    assert "no commit" in found.facts()["diff"]["reason"]


def test_much_that_git_does_not_know_is_refused_with_a_reason(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MAX_NEW_BYTES", 1000)
    (checkout / "bench" / "large.npy").write_bytes(bytes(1001))
    found = source_state(checkout)
    assert found.patch is None
    assert "files that git does not know" in found.facts()["diff"]["reason"]


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ("+data: datasets/coco\n", None),
        ("--- /dev/null\n+++ b/bench/a.py\n+Path('/proc/self/task')  # http://host/x/y\n", None),
        ("+data: /srv/ann/coco\n", "an absolute path"),
        ("-data: /home/ann/coco\n", "names this machine"),
        ("+# measured on ann-laptop\n", "names this machine"),
        ("+# measured on ann-laptop2\n", None),
        ("+" + "x" * source.MAX_PATCH_BYTES, "more than the 1048576"),
    ],
)
def test_what_tells_the_machine_or_is_large_is_not_published(patch: str, reason: str | None) -> None:
    found = private_reason(patch.encode(), ["/home/ann", "ann-laptop"])
    assert found is None if reason is None else reason in str(found)
