from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from claim_records import record_of, write_records
from report_records import make_record

from bench.diffbench import main
from bench.plan import build_plan
from bench.record import parse_record
from bench.store import Store
from bench.suite import load_suite

ROOT = Path(__file__).resolve().parents[2]

SMALL = """\
name: small
data: {dataset: shapes}
axes: {product: {sampling_steps: [1, 2, 4], num_proposals: [20, 50]}}
tables: [{rows: num_proposals, columns: sampling_steps, metric: segm/AP}]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with claims, a paper suite with records, a suite of its own with records, and all that is generated."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(ROOT / "suites/claims", "suites/claims")
        Path("suites/paper").mkdir()
        shutil.copy(ROOT / "suites/paper/coco_val.yaml", "suites/paper")
        Path("suites/small.yaml").write_text(SMALL)
        results = Path("results")
        paper = load_suite(Path("suites/paper/coco_val.yaml"))
        cells = [
            cell for cell in paper.cells if (cell.axes["backbone"], cell.axes["sampling_steps"]) == ("resnet50", 1)
        ]
        write_records(results, [record_of(paper, cell, 0.373) for cell in cells])
        overrides = ["iterations=7", "sampling_steps=[1, 2]"]
        for cell in build_plan(load_suite(Path("suites/small.yaml"), overrides)).cells:
            record = make_record(cell.axes["sampling_steps"], cell.axes["num_proposals"], ap=0.3)
            record |= {"suite": "small", "run_id": cell.run_id, "axes": cell.axes, "config": cell.config}
            record |= {"command": "run-suite suites/small.yaml --set iterations=7 --set 'sampling_steps=[1, 2]'"}
            Store(results).write_record(parse_record(record, "test"), "box")
        assert main(["claims", "--write"]) == 0
        assert main(["table", "suites/paper/coco_val.yaml"]) == 0
        assert main(["table", "suites/small.yaml", "--set", overrides[0], "--set", overrides[1]]) == 0
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Path:
    """A copy of the built project, which is the current folder."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return tmp_path


def flip(path: Path, text: str, new: str) -> int:
    """Change one place in a file; the number of its line."""
    content = path.read_text()
    assert text in content
    path.write_text(content.replace(text, new, 1))
    return content[: content.index(text)].count("\n") + 1


def test_what_was_just_generated_is_right(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify"]) == 0
    generated = [path for path in Path("results").rglob("*") if path.suffix in {".md", ".csv", ".tex"}]
    assert len(generated) == 2 + 3 + 3
    claims = len(list(Path("suites/claims").glob("*.yaml")))
    assert capsys.readouterr().out == f"{len(generated) + claims} files as their sources say\n"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("results/reports/paper/coco_val.tex", "41.1", "41.7"),
        ("results/reports/paper/coco_val.md", "(reproduced)", "(not reproduced)"),
        ("results/reports/paper/coco_val.csv", ",37.3,37.3,", ",37.3,37.8,"),
        ("results/reports/claims.md", "36.0", "36.6"),
        ("results/reports/claims.csv", "not attempted", "reproduced"),
        ("results/small/box/report/segm-AP-by-num_proposals-and-sampling_steps.tex", "30.0", "39.0"),
        ("results/small/box/report/segm-AP-by-num_proposals-and-sampling_steps.csv", "20,30", "20,31"),
    ],
)
def test_a_flipped_digit_in_a_generated_file_is_named_with_its_line(
    project: Path, capsys: pytest.CaptureFixture, name: str, old: str, new: str
) -> None:
    line = flip(Path(name), old, new)
    assert main(["verify"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{name}:{line}: has '")
    assert out.count("\n") == 1
    assert re.search(r"diffbench: 1 mismatch in \d+ files", err)


def test_a_flipped_digit_in_a_claim_file_is_named_with_its_line(project: Path, capsys: pytest.CaptureFixture) -> None:
    line = flip(Path("suites/claims/diffusioninst.yaml"), "value: 46.6", "value: 49.6")
    assert main(["verify"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"suites/claims/diffusioninst.yaml:{line}: .*\[diffinst-coco-val-swinb-1\].value: 49.6, "
        r"but claims.lock:\d+ has 46.6",
        out[0],
    )
    # What was generated from it no longer agrees either.
    assert [text.split(":")[0] for text in out[1:]] == [
        "results/reports/claims.csv",
        "results/reports/claims.md",
        *(f"results/reports/paper/coco_val.{ending}" for ending in ("csv", "md", "tex")),
    ]


def test_accepting_a_change_takes_the_lock_and_the_tables(project: Path) -> None:
    flip(Path("suites/claims/diffusioninst.yaml"), "value: 46.6", "value: 49.6")
    assert main(["claims", "--lock"]) == 0
    assert main(["verify"]) == 1
    assert main(["claims", "--write"]) == 0
    assert main(["table", "suites/paper/coco_val.yaml"]) == 0
    assert main(["verify"]) == 0


def test_a_changed_record_is_caught_in_what_was_made_of_it(project: Path, capsys: pytest.CaptureFixture) -> None:
    path = sorted(Path("results/small/box").glob("*.json"))[0]
    flip(path, '"value": 0.3,', '"value": 0.9,')
    assert main(["verify", "results/small"]) == 1
    assert capsys.readouterr().out.count("results/small/box/report/") == 3


def test_paths_restrict_what_is_compared(project: Path, capsys: pytest.CaptureFixture) -> None:
    flip(Path("results/reports/paper/coco_val.tex"), "41.1", "41.7")
    assert main(["verify", "results/small", "suites/claims"]) == 0
    assert main(["verify", "results/reports/paper/coco_val.md"]) == 0
    assert main(["verify", "results/reports/paper/coco_val.tex"]) == 1


def test_a_line_that_was_added_or_removed_is_named(project: Path, capsys: pytest.CaptureFixture) -> None:
    path = Path("results/reports/paper/coco_val.csv")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert main(["verify", str(path)]) == 1
    assert f"{path}:{len(lines)}: has ''" in capsys.readouterr().out


def test_a_file_that_no_table_makes_is_named(project: Path, capsys: pytest.CaptureFixture) -> None:
    Path("results/small/box/report/best.md").write_text("| 99.9 |\n")
    assert main(["verify"]) == 1
    assert "report/best.md: no table of the suite makes this file" in capsys.readouterr().out


GRID = "segm-AP-by-num_proposals-and-sampling_steps"
PLOT = "segm-AP-against-sampling_steps"


@pytest.mark.parametrize("name", [f"small/box/report/{GRID}.md", "reports/claims.csv", "reports/paper/coco_val.tex"])
def test_a_file_that_is_gone_is_named(project: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    path = Path("results") / name
    path.unlink()
    assert main(["verify"]) == 1
    missing = f"{path}: is missing. Restore it, or write it again with diffbench\n"
    assert capsys.readouterr().out == missing
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().out == missing
    assert main(["verify", "suites/claims"]) == 0


def test_a_plot_that_is_gone_is_named_and_a_report_without_any_is_none(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = ["--set", "iterations=7", "--set", "sampling_steps=[1, 2]"]
    assert main(["plot", "suites/small.yaml", *settings]) == 0
    assert main(["verify"]) == 0
    Path(f"results/small/box/report/{PLOT}.svg").unlink()
    capsys.readouterr()
    assert main(["verify"]) == 1
    assert capsys.readouterr().out.startswith(f"results/small/box/report/{PLOT}.svg: is missing")
    shutil.rmtree("results/small/box/report")
    assert main(["verify"]) == 0


def test_other_line_ends_are_another_file(project: Path, capsys: pytest.CaptureFixture) -> None:
    path = Path("results/reports/claims.csv")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n", 1))
    assert main(["verify", str(path)]) == 1
    assert f"{path}:1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "suites/small.yaml"], "suites/small.yaml: holds no claim file and no generated table"),
        (["verify", "nowhere"], "nowhere: holds no claim file and no generated table"),
        (["verify", "--results", "nowhere", "--claims", "gone"], "nowhere, gone: nothing to verify"),
        (["claims", "--suite", "coco"], "--suite coco: no paper suite. Allowed: coco_val"),
        (["claims", "--suite", "coco_val", "--write"], "--write: with all claims only. Leave --suite out"),
        (["claims", "--claims", "gone"], "gone: no claim files"),
        (["table", "suites/paper/coco_val.yaml", "--claims", "gone"], "gone: no claim files"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    project: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_claims_are_printed_as_they_are_written(project: Path, capsys: pytest.CaptureFixture) -> None:
    for form, ending in (("markdown", "md"), ("csv", "csv")):
        assert main(["claims", "--format", form]) == 0
        assert capsys.readouterr().out == Path(f"results/reports/claims.{ending}").read_text()


def test_claims_of_one_suite(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["claims", "--suite", "coco_val", "--format", "csv"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 12 + 6  # with the superseded ones of six
    assert "diffdet" not in "".join(rows)


def test_a_paper_table_is_printed_as_it_is_written(project: Path, capsys: pytest.CaptureFixture) -> None:
    for form in ("md", "csv", "tex"):
        assert main(["table", "suites/paper/coco_val.yaml", "--print", form]) == 0
        assert capsys.readouterr().out == Path(f"results/reports/paper/coco_val.{form}").read_text()


def test_the_projects_own_files_are_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["verify"]) == 0, capsys.readouterr().out
