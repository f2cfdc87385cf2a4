"""The runner as the harness starts it, in an interpreter that has no detectron2: one line, and the right exit code."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).resolve().parents[3] / "bench" / "peers"


def run(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the lines of standard output, each of which has to be JSON."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "run_peer.py"), str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def write(folder: Path, **changes: Any) -> Path:
    content = {
        "protocol": 1,
        "kind": "predict",
        "engine": {"name": "detectron2", "recipe": "x.yaml"},
        "folder": str(folder / "out"),
        "annotations": str(folder / "instances.json"),
        "images": str(folder),
        "image_ids": [1],
        "file_names": ["1.png"],
        "class_names": ["a"],
        "category_ids": [7],
    } | changes
    path = folder / "job.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is not None, reason="detectron2 is here")
def test_without_detectron2_one_line_says_what_to_do(tmp_path: Path) -> None:
    code, lines = run(write(tmp_path))
    assert code == 2
    assert len(lines) == 1
    assert "detectron2 cannot be imported here" in lines[0]["error"]
    assert "constraints-detectron2.txt" in lines[0]["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"engine": {"name": "mmdet"}}, "engine.name is 'mmdet'"), ({"kind": "guess"}, "kind is 'guess'")],
)
def test_a_wrong_job_is_a_mistake(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    code, lines = run(write(tmp_path, **changes))
    assert code == 2
    assert message in lines[0]["error"]


def test_usage() -> None:
    done = subprocess.run([sys.executable, str(PEERS / "run_peer.py")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage:")


# Of diffinst, what reads pickles of weights is used too, as it needs no more than numpy.
SHARED = "diffinst.weights.unpickle"
SHARED_FILES = [PEERS.parents[1] / name for name in ("diffinst/__init__.py", "diffinst/weights/__init__.py")]
SHARED_FILES.append(PEERS.parents[1] / f"{SHARED.replace('.', '/')}.py")


@pytest.mark.parametrize("path", [*sorted(PEERS.glob("*.py")), *SHARED_FILES], ids=lambda path: path.name)
def test_the_folder_is_python_3_10_and_stands_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    new_in_3_11 = {"tomllib", "StrEnum", "Self", "ExceptionGroup", "file_digest", "UTC"}
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            assert module.split(".")[0] != "diffinst" or module == SHARED
            assert module.split(".")[0] != "bench" or module.split(".")[1] == "peers"
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        names |= {node.attr} if isinstance(node, ast.Attribute) else set()
        assert not names & new_in_3_11
    # Heavy packages are imported where they are used, so that a missing one is told of in one line.
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    loaded = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert not {name.split(".")[0] for name in loaded} & {"torch", "torchvision", "detectron2", "pycocotools"}
