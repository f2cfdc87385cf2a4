from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bench.diffbench import main
from bench.suite import load_suite

SUITE = "preset: released\ndata: {dataset: coco}\naxes: {product: {sampling_steps: [1, 4]}}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(SUITE)
    return tmp_path


def test_there_and_back(capsys: pytest.CaptureFixture) -> None:
    export = [
        "export-config",
        "two.yaml",
        "--cell",
        "sampling_steps=4,seed=0",
        "--out",
        "up.yaml",
        "--weights",
        "w.pth",
    ]
    assert main(export) == 0
    assert yaml.safe_load(Path("up.yaml").read_text())["MODEL"]["WEIGHTS"] == "w.pth"
    assert main(["import-config", "up.yaml", "--out", "back.yaml"]) == 0
    assert "wrote back.yaml: DiffusionInst" in capsys.readouterr().out.replace("\n", " ")
    (cell,) = load_suite(Path("back.yaml")).cells
    assert cell.config == load_suite(Path("two.yaml")).cells[1].config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import-config", "gone.yaml", "--out", "x.yaml"], "gone.yaml: cannot be read"),
        (["import-config", "two.yaml", "--out", "x.yaml"], "MODEL.META_ARCHITECTURE"),
        (["import-config", "two.yaml", "--out", "x.txt"], "ends in .yaml or .yml"),
        (["import-config", "two.yaml", "--out", "two.yaml"], "is there already"),
        (["export-config", "two.yaml", "--out", "x.yaml"], "the suite has 2 cells"),
        (["export-config", "two.yaml", "--cell", "sampling_steps=1,seed=0", "--out", "no/x.yaml"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_each_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = Path("two.yaml").read_text()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert Path("two.yaml").read_text() == before
    assert not Path("x.yaml").exists()


def test_force_replaces(capsys: pytest.CaptureFixture) -> None:
    arguments = ["export-config", "two.yaml", "--cell", "sampling_steps=1,seed=0", "--out", "up.yaml"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert main([*arguments, "--force"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
