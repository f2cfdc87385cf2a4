from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from coco_files import tiny_content, write_set
from html_pages import check_harmless, read_page
from report_store import GOOD, POOR, add_losses, add_predictions, predictions

from bench.diffbench import main
from bench.plan import build_plan
from bench.record import metric, parse_record
from bench.store import Store
from bench.suite import load_suite


def _suite(folder: Path) -> Path:
    write_set(folder / "data", tiny_content())
    path = folder / "small.yaml"
    paths = {
        f"{split}_{kind}": str(folder / "data" / name)
        for split in ("train", "val")
        for kind, name in (("annotations", "instances.json"), ("images", "images"))
    }
    suite = {
        "name": "small",
        "description": "Four cells, <b>one</b> of them run.",
        "data": {"dataset": "custom", **paths},
        "axes": {"product": {"sampling_steps": [1, 2, 4, 8]}},
        "measure": {"score": True, "latency": False, "memory": False, "flops": False},
    }
    path.write_text(yaml.safe_dump(suite))
    return path


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells: two ok with a store, one failed, one that has not been run."""
    monkeypatch.chdir(tmp_path)
    path = _suite(tmp_path)
    _write_records(path, tmp_path / "results", machine="box")
    return path


def _write_records(path: Path, results: Path, *, machine: str) -> None:
    store = Store(results)
    cells = build_plan(load_suite(path)).cells
    with store.lock():
        for number, cell in enumerate(cells[:3]):
            failed = number == 2
            record = {
                "schema_version": 2,
                "suite": "small",
                "run_id": cell.run_id,
                "label": cell.label,
                "status": "failed" if failed else "ok",
                "reason": "predict: out of memory" if failed else None,
                "log": "MemoryError: <script>" if failed else None,
                "axes": cell.axes,
                "config": cell.config,
                "nodes": dict(cell.nodes),
                "code": dict(cell.code),
                "metrics": {
                    "segm/AP": metric("segm/AP", None if failed else 0.25 * (number + 1), "failed").model_dump()
                },
                "environment": {"machine": machine, "os": "Linux"},
                "command": "run-suite small.yaml",
                "started_at": "2026-01-02T03:04:05Z",
                "finished_at": "2026-01-02T03:05:05Z",
                "duration_s": 1.0,
            }
            store.write_record(parse_record(record, "test"), machine)
            if not failed and not store.folder(cell.nodes["predict"]).exists():
                add_predictions(store, cell.nodes["predict"], predictions((POOR, GOOD)[number]))
        if not store.folder(cells[0].nodes["train"]).exists():
            add_losses(store, cells[0].nodes["train"])


def test_the_page_lies_beside_the_records_and_shows_every_cell(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(suite)]) == 0
    out = capsys.readouterr().out
    assert "wrote results/small/box/report/index.html: 2 ok, 1 failed, 1 missing, 0.1 MB" in out
    assert "note: it holds 7 pictures of the data set; leave them out with --no-gallery" in out
    page = check_harmless(Path("results/small/box/report/index.html").read_text())
    for text in ("✓ 2 ok", "✗ 1 failed", "? 1 missing", "predict: out of memory", "MemoryError: <script>"):
        assert text in page.texts
    assert "Four cells, <b>one</b> of them run." in page.texts
    assert "No published number is tied to this suite." in page.texts
    assert "Training loss" in page.texts
    assert "Precision against recall at IoU 0.50" in page.texts


def test_the_same_call_gives_the_same_bytes_and_other_machines_have_pages_of_their_own(suite: Path) -> None:
    _write_records(suite, Path("results"), machine="other")
    assert main(["report", str(suite)]) == 0
    pages = [Path(f"results/small/{name}/report/index.html") for name in ("box", "other")]
    before = [page.read_bytes() for page in pages]
    assert main(["report", str(suite)]) == 0
    assert [page.read_bytes() for page in pages] == before
    assert not list(pages[0].parent.glob(".*"))


def test_the_page_tells_no_path_of_this_machine(suite: Path) -> None:
    Path("data/instances.json").unlink()
    assert main(["report", "results/small", "--out", "a.html"]) == 0
    page = read_page(Path("a.html").read_text())
    assert "instances.json: no such file" in page.text
    assert str(Path.cwd()) not in Path("a.html").read_text()


def test_no_page_is_written_through_a_link_out_of_the_results(suite: Path, capsys: pytest.CaptureFixture) -> None:
    outside = Path("outside")
    outside.mkdir()
    Path("results/small/box/report").symlink_to(outside.absolute())
    assert main(["report", str(suite)]) == 2
    err = capsys.readouterr().err
    assert "results/small/box/report: a link leads from here to " in err
    assert err.count("\n") == 1
    assert not list(outside.iterdir())
    assert main(["report", str(suite), "--out", "results/small/box/report/index.html"]) == 0  # it was asked for


def test_records_alone_give_a_page_without_a_suite_file(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "results/small", "--machine", "box", "--out", "pages/a.html", "--no-gallery"]) == 0
    assert "wrote pages/a.html: 2 ok, 1 failed, " in capsys.readouterr().out
    page = read_page(Path("pages/a.html").read_text())
    assert any(text.startswith("No suite file was given") for text in page.texts)
    assert not page.all("img")


def test_settings_that_differ_make_cells_stale_and_only_restricts_them(
    suite: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = ["--set", "sampling_steps=[2, 16]", "--set", "eta=0.5", "--out", "a.html"]
    assert main(["report", str(suite), *settings]) == 0
    assert "wrote a.html: 1 stale, 1 missing" in capsys.readouterr().out
    page = read_page(Path("a.html").read_text())
    assert "the record of 2026-01-02 is of other settings: sampler.eta 1 instead of 0.5" in page.texts
    assert "50.0 (older)" in page.texts
    # No cell of this call has ever been run: as for tables, an earlier page stays.
    assert main(["report", str(suite), "--set", "sampling_steps=[16]", "--out", "a.html"]) == 2
    assert "none of the records in results/small belongs to this suite" in capsys.readouterr().err
    assert "50.0 (older)" in Path("a.html").read_text()
    assert main(["report", str(suite), "--only", "sampling_steps=1", "--out", "a.html"]) == 0
    assert "1 ok, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "results/nowhere: no records"),
        (["results/small", "--set", "seed=1"], "--set and --only need a suite file"),
        (["small.yaml", "--machine", "other"], "--machine other: no records. Allowed: box"),
        (["small.yaml", "--out", "a.txt"], "--out a.txt: is not allowed. Allowed: a file name that ends in .html"),
        (["small.yaml", "--out", "small.yaml/a.html"], "small.yaml: cannot be written"),
        (["small.yaml", "--data-root", "gone"], "--data-root gone: no such folder"),
        (["gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    suite: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_file_for_two_machines_is_refused(suite: Path, capsys: pytest.CaptureFixture) -> None:
    _write_records(suite, Path("results"), machine="other")
    assert main(["report", str(suite), "--out", "a.html"]) == 2
    assert "there are records of box, other. Choose one with --machine" in capsys.readouterr().err
