"""Which programs a suite may name, and who has to allow the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.cli import main
from bench.errors import SuiteErrors
from bench.plan import build_plan
from bench.programs import check_programs
from bench.suite import load_suite

ORIGINAL = "{name: original, python: .tox/d2/bin/python, checkout: %s, recipe: configs/a.yaml, engine_weights: w.pth}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with an interpreter below .tox, another beside it, and a data root with a checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFBENCH_ALLOW_PROGRAMS", raising=False)
    for path in (".tox/d2/bin/python", "bin/python", "data/.tox/d3/bin/python", "data/w.pth"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    for path in ("data/checkouts/D", "data/other/D"):
        (Path(path) / "configs").mkdir(parents=True)
        (Path(path) / "configs" / "a.yaml").touch()
    return tmp_path


def refused(text: str, *overrides: str) -> list[str]:
    path = Path("s.yaml")
    path.write_text(f"data: {{dataset: coco}}\n{text}\n")
    suite = load_suite(path, overrides)
    try:
        check_programs(suite, build_plan(suite, data_root=Path("data")), Path("data"))
    except SuiteErrors as error:
        return str(error).splitlines()
    return []


def detectron2(python: str) -> str:
    return f"engine: {{name: detectron2, python: {python}}}"


def test_what_lies_in_its_place_may_be_run(folder: Path) -> None:
    assert refused(detectron2(".tox/d2/bin/python")) == []
    assert refused(detectron2(".tox/not-made-yet/bin/python")) == []
    assert refused("engine: " + ORIGINAL % "checkouts/D") == []
    assert refused("engine: " + ORIGINAL % "checkouts/not-here-and-so-missing") == []
    assert refused("engine: torchvision") == []
    assert refused("seeds: [0, 1]") == []


@pytest.mark.parametrize(
    "python",
    [sys.executable, "bin/python", "python3", ".tox/../bin/python", "../x", ".toxic/python", ".tox/d3/bin/python"],
)
def test_another_interpreter_is_refused_in_a_line(folder: Path, python: str) -> None:
    (line,) = refused(detectron2(python))
    used = {"bin/python": f"{folder}/bin/python", ".tox/../bin/python": f"{folder}/.tox/../bin/python"}
    used[".tox/d3/bin/python"] = f"{folder}/data/.tox/d3/bin/python"
    assert line == (
        f"s.yaml:2:9: engine.python: '{python}' is a program that would be run. Allowed in a suite: a path below .tox/ "
        f"of the current folder. Allow it with --set engine.python={used.get(python, python)}, or with "
        f"DIFFBENCH_ALLOW_PROGRAMS={used.get(python, python)}"
    )


def test_an_absolute_path_is_refused_even_below_tox(folder: Path) -> None:
    assert len(refused(detectron2(f"{folder}/.tox/d2/bin/python"))) == 1


def test_a_checkout_elsewhere_is_refused(folder: Path) -> None:
    (line,) = refused("engine: " + ORIGINAL % "other/D")
    assert line == (
        "s.yaml:2:9: engine.checkout: 'other/D' is code that would be run. Allowed in a suite: a path below checkouts/ "
        f"of the data root. Allow it with --set engine.checkout={folder}/data/other/D, or with "
        f"DIFFBENCH_ALLOW_PROGRAMS={folder}/data/other/D"
    )
    (line,) = refused(f"axes: {{product: {{engine: [torchvision, {ORIGINAL % 'other/D'}]}}}}")
    assert line.startswith("s.yaml:2:40: engine.checkout: ")
    assert line.endswith(f"the data root. Allow it with DIFFBENCH_ALLOW_PROGRAMS={folder}/data/other/D")


def test_what_set_names_may_be_run(folder: Path) -> None:
    assert refused(detectron2("bin/python"), "engine.python=bin/python") == []
    assert refused(detectron2(".tox/d2/bin/python"), f"engine.python={sys.executable}") == []
    assert refused("axes: {product: {engine: [{name: detectron2, python: a}]}}", "engine.python=bin/python") == []
    assert refused("name: s", "engine={name: detectron2, python: /p}") == []
    assert refused("engine: " + ORIGINAL % "checkouts/D", f"engine.checkout={folder}/data/other/D") == []
    axis = "axes: {product: {engine: [torchvision]}}"
    assert refused(axis, "engine={name: detectron2, python: /p}") == []
    assert len(refused(detectron2("bin/python"), "engine.recipe=a.yaml")) == 1


def test_what_set_names_is_what_the_user_sees_from_here(folder: Path) -> None:
    """A path of --set is looked for below the data root and beside the suite too."""
    Path("data/bin").mkdir()
    Path("data/bin/python").touch()
    (line,) = refused(detectron2("bin/python"), "engine.python=bin/python")
    assert line.endswith(
        f"--set engine.python={folder}/data/bin/python, or with DIFFBENCH_ALLOW_PROGRAMS={folder}/data/bin/python"
    )
    assert refused(detectron2("bin/python"), f"engine.python={folder}/bin/python") == []


def test_every_cell_is_looked_at(folder: Path) -> None:
    """Cells that share a training bring programs of their own to the nodes that they do not share."""
    engines = "[{name: detectron2, python: .tox/d2/bin/python}, {name: detectron2, python: bin/python}]"
    (line,) = refused(f"axes: {{zip: {{engine: {engines}, score_threshold: [0.0, 0.1]}}}}")
    assert "'bin/python' is a program that would be run" in line


def test_a_data_root_may_be_named_by_a_way_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("here").mkdir()
    monkeypatch.chdir("here")
    Path("s.yaml").write_text("data: {dataset: coco}\nengine: " + ORIGINAL % "checkouts/D" + "\n")
    suite = load_suite(Path("s.yaml"))
    check_programs(suite, build_plan(suite, data_root=Path("../data")), Path("../data"))
    with pytest.raises(SuiteErrors, match=r"engine\.checkout"):
        check_programs(suite, build_plan(suite, data_root=Path("../data")), None)


def test_what_the_variable_names_may_be_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_ALLOW_PROGRAMS", f"data/other:{folder}/bin/python")
    assert refused(detectron2("bin/python")) == []
    assert refused(detectron2(f"{folder}/bin/python")) == []
    assert refused("engine: " + ORIGINAL % "other/D") == []
    assert len(refused(detectron2("bin/python3"))) == 1


def test_the_command_refuses_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(f"engine: {{name: detectron2, python: {sys.executable}}}\n")
    for arguments in ([], ["--plan"]):
        assert main(["s.yaml", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"s.yaml:1:9: engine.python: '{sys.executable}' is a program")
    assert not Path("results").exists()
    assert main(["s.yaml", "--plan", "--set", f"engine.python={sys.executable}"]) == 0
