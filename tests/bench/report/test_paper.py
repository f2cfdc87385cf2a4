from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from claim_records import record_of, write_records

from bench.claims import load_claims
from bench.ledger import find_records, load_paper_suites, make_ledger
from bench.report.paper import layout_table, paper_tables, write_ledger, write_paper
from bench.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parents[3]
CLAIMS = load_claims(ROOT / "suites/claims")


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(ROOT / "suites/paper/coco_val.yaml")


def texts(table: object) -> list[list[str]]:
    return [[entry.text for entry in row] for row in table.rows]  # type: ignore[attr-defined]


def written(suite: Suite, results: Path) -> dict[str, str]:
    folder = results / "reports/paper"
    return write_paper(suite, paper_tables(suite, CLAIMS, find_records(results, suite.name)), folder)


@pytest.fixture
def measured(tmp_path: Path, suite: Suite) -> Path:
    """ResNet-50 at one step measured near the published value, at four far from it."""
    records = []
    for cell in suite.cells:
        if cell.axes["backbone"] == "resnet50":
            base = 0.373 if cell.axes["sampling_steps"] == 1 else 0.33
            records.append(record_of(suite, cell, base + 0.001 * (cell.axes["eval_seed"] - 1)))
    write_records(tmp_path, records)
    return tmp_path


def test_the_layout_is_the_papers(suite: Suite, tmp_path: Path) -> None:
    (table,) = paper_tables(suite, CLAIMS, [])
    layout = layout_table(table, tmp_path)
    assert [column.label for column in layout.columns] == [
        "backbone",
        *("Mask AP (1 step), published", "Mask AP (1 step), ours"),
        *("Mask AP (4 step), published", "Mask AP (4 step), ours"),
    ]
    assert texts(layout) == [
        ["COCO-val-Res50", "37.3", "not attempted", "37.5", "not attempted"],
        ["COCO-val-Res101", "41.0", "not attempted", "41.1", "not attempted"],
        ["COCO-val-Swin-B", "46.6", "not attempted", "46.8", "not attempted"],
        ["COCO-val-Swin-L", "47.8", "not attempted", "47.8", "not attempted"],
        ["COCO-testdev-Res50", "37.1", "not checkable", "", ""],
        ["COCO-testdev-Res101", "41.5", "not checkable", "", ""],
        ["COCO-testdev-Swin-B", "47.6", "not checkable", "", ""],
        ["COCO-testdev-Swin-L", "48.3", "not checkable", "", ""],
    ]


def test_ours_stands_beside_with_interval_and_verdict(suite: Suite, measured: Path) -> None:
    (table,) = paper_tables(suite, CLAIMS, find_records(measured, suite.name))
    first = texts(layout_table(table, measured))[0]
    assert first == [
        "COCO-val-Res50",
        *("37.3", "37.3 ± 0.2 (reproduced)"),
        *("37.5", "33.0 ± 0.2 (not reproduced)"),
    ]


def test_each_number_links_to_its_record_and_has_its_command(suite: Suite, measured: Path) -> None:
    files = written(suite, measured)
    record = next(found for found in find_records(measured, suite.name) if found.record["axes"]["sampling_steps"] == 1)
    link = f"../../coco_val/box/{record.path.name}"
    assert (measured / "reports/paper" / link).resolve() == record.path.resolve()
    assert f"[37.3 ± 0.2 (reproduced)]({link})" in files["coco_val.md"]
    assert f"\\href{{{link}}}{{37.3 $\\pm$ 0.2 (reproduced)}}" in files["coco_val.tex"]
    assert "run-suite coco_val.yaml --data-root \\<data-root\\>" in files["coco_val.md"]
    comments = [line for line in files["coco_val.tex"].splitlines() if line.startswith("% COCO-val-")]
    assert len(comments) == 8
    assert comments[0].startswith(f"% COCO-val-Res50, Mask AP (1 step): {link}, ../../coco_val/box/")
    assert comments[0].endswith(".json: run-suite coco_val.yaml --data-root <data-root>")
    assert comments[2].startswith("% COCO-val-Res101, Mask AP (1 step): no record: run-suite ")
    assert f"{comments[0]}\n" in files["coco_val.tex"]


def test_a_command_cannot_leave_its_comment(suite: Suite, measured: Path) -> None:
    for path in (measured / "coco_val/box").glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"command": "run-suite a.yaml\n\\input{other}\r\u2028\\end{table}"}))
    text = written(suite, measured)["coco_val.tex"]
    assert text.count("\\input{other} \\end{table}") == 2
    assert all("other" not in line or line.startswith("% ") for line in text.splitlines())


def test_csv_has_a_row_for_each_place_with_everything(suite: Suite, measured: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(written(suite, measured)["coco_val.csv"])))
    assert len(rows) == 8 + 4
    first = rows[0]
    assert (first["claim"], first["published"], first["ours"]) == ("diffinst-coco-val-r50-1", "37.3", "37.3")
    assert (first["low"], first["high"], first["runs"], first["verdict"]) == ("37.1", "37.5", "3", "reproduced")
    assert first["record"].count("../../coco_val/box/") == 3
    assert first["command"] == "run-suite coco_val.yaml --data-root <data-root>"
    assert rows[2]["why"].startswith("no record; it takes data coco, weights/diffinst_coco_res101.safetensors")
    assert all(row["why"] and row["verdict"] for row in rows)


def test_latex_is_escaped_and_explains_every_cell(suite: Suite, measured: Path) -> None:
    text = re.sub(r"\n% .*", "", written(suite, measured)["coco_val.tex"])
    assert text.startswith("% needs \\usepackage{booktabs,hyperref}")
    assert "weights/diffinst\\_coco\\_res101.safetensors" in text
    body = text.replace("\\_", "").replace("\\href{", "")
    assert "_" not in body.replace("../../coco_val/box/", "")
    assert "95 \\% interval" in text
    for row in (
        "COCO-val-Res101, Mask AP (1 step): not attempted",
        "COCO-testdev-Res50, Mask AP (1 step): not checkable",
    ):
        assert row in text


def test_the_same_records_give_the_same_bytes(suite: Suite, measured: Path) -> None:
    assert written(suite, measured) == written(suite, measured)


def test_a_table_without_published_numbers_says_so(tmp_path: Path) -> None:
    suite = load_suite(ROOT / "suites/paper/signal_scale.yaml")
    (table,) = paper_tables(suite, CLAIMS, [])
    layout = layout_table(table, tmp_path)
    assert texts(layout)[1] == ["2", "–", "not attempted", "–", "not attempted"]
    assert layout.columns[1].label == "1 step, published"
    assert "– no published number in the claim files." in layout.notes


def test_numbers_without_a_claim_are_shown_as_measured(tmp_path: Path) -> None:
    suite = load_suite(ROOT / "suites/paper/signal_scale.yaml")
    write_records(tmp_path, [record_of(suite, cell, 0.35) for cell in suite.cells[:1]])
    (table,) = paper_tables(suite, CLAIMS, find_records(tmp_path, suite.name))
    assert texts(layout_table(table, tmp_path))[0][1:3] == ["–", "35.0"]
    assert "measured" in written(suite, tmp_path)["signal_scale.csv"]


def test_the_papers_words_are_left_where_they_would_mislead() -> None:
    suite = load_suite(ROOT / "suites/paper/proposals_steps.yaml")
    (table,) = paper_tables(suite, CLAIMS, [])
    assert table.rows == ["100", "300", "500", "1000"]
    assert table.columns == ["1 step", "2 steps", "4 steps", "8 steps"]
    cell = table.at("500", "4 steps")
    assert cell is not None
    assert cell.claim is not None
    assert cell.claim.id == "diffinst-coco-val-r50-4"


def test_each_metric_of_the_baseline_has_its_claims() -> None:
    suite = load_suite(ROOT / "suites/paper/baseline.yaml")
    box, mask = paper_tables(suite, CLAIMS, [])
    assert box.columns == ["box AP", "inference time (s/im)", "train mem (GB)"]
    assert [cell.claim.value_text for cell in mask.cells if cell.claim] == ["37.2", "38.6"]
    assert box.rows == ["R50-FPN 3x", "R101-FPN 3x", "torchvision"]


class TestLedger:
    def test_markdown_has_every_source_and_every_number(self, tmp_path: Path) -> None:
        rows = make_ledger(CLAIMS, load_paper_suites(ROOT / "suites/paper"), tmp_path)
        text = write_ledger(rows, tmp_path / "reports")["claims.md"]
        assert "56 published numbers: 18 contradicted by another revision of the same source, 11 not checkable" in text
        assert all(row.claim.id in text for row in rows)
        for source in ("README of ShoufaChen/DiffusionDet", "DiffusionInst (arXiv:2212.02773)", "revision 04d9ead783"):
            assert source in text

    def test_csv_can_be_read_back(self, measured: Path) -> None:
        rows = make_ledger(CLAIMS, load_paper_suites(ROOT / "suites/paper"), measured)
        found = list(csv.DictReader(io.StringIO(write_ledger(rows, measured / "reports")["claims.csv"])))
        assert len(found) == 56
        row = next(row for row in found if row["claim"] == "diffinst-coco-val-r50-4")
        assert (row["published"], row["ours"], row["verdict"]) == ("37.5", "33.0", "not reproduced")
        assert row["record"].startswith("../coco_val/box/")
        assert (row["row"], row["column"], row["date"]) == ("COCO-val-Res50", "Mask AP (4 step)", "2023-01-03")
