from __future__ import annotations

import copy
import csv
import io
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_records import make_grid, make_record, with_error
from rich.console import Console

from bench.report.tables import grid_table, long_table, to_csv, to_latex, to_markdown
from bench.report.terminal import to_terminal

CONDITIONS = (
    "suite quickstart · data shapes, 200 validation images of 96 px · backbone tiny, 3 stages · "
    "1 500 iterations of batch 8 · Example CPU 9000, 2 cores · torch 2.14.1 · commit 0123456789"
)


def _grid(records: list) -> object:
    return grid_table(records, rows="num_proposals", columns="sampling_steps", metric="segm/AP")


def test_grid_as_markdown() -> None:
    assert (
        to_markdown(_grid(make_grid()))
        == f"""\
### Mask AP by proposals and sampling steps

| proposals ↓ · sampling steps → |    1 |         2 |         4 |
|-------------------------------:|-----:|----------:|----------:|
|                             20 | 31.0 |      33.2 | ? missing |
|                             50 | 34.5 |      36.3 |      38.1 |
|                            100 | 38.0 | ○ skipped |  ✗ failed |

- AP and AR are ×100.
- ✗ failed: sampling_steps=4 num_proposals=100: out of memory: the process was killed
- ○ skipped: sampling_steps=2 num_proposals=100: its training failed
- ? missing: sampling_steps=4 num_proposals=20: no record yet

*{CONDITIONS}*
"""
    )


def test_grid_as_csv() -> None:
    assert to_csv(_grid(make_grid())) == (
        "num_proposals,sampling_steps=1,sampling_steps=2,sampling_steps=4\n"
        "20,31,33.2,missing\n"
        "50,34.5,36.3,38.1\n"
        "100,38,skipped,failed\n"
    )


def test_grid_as_latex() -> None:
    text = to_latex(_grid(make_grid()))
    body = text[text.index("\\toprule") : text.index("\\end{tabular}")]
    assert (
        body
        == r"""\toprule
& \multicolumn{3}{c}{sampling steps} \\
\cmidrule(l){2-4}
proposals & 1 & 2 & 4 \\
\midrule
20 & 31.0 & 33.2 & \textit{? missing} \\
50 & 34.5 & 36.3 & 38.1 \\
100 & 38.0 & \textit{$\circ$ skipped} & \textit{$\times$ failed} \\
\bottomrule
"""
    )
    assert "\\caption{Mask AP by proposals and sampling steps.}" in text


def test_long_table_has_a_row_per_cell_and_a_column_per_metric() -> None:
    table = long_table(make_grid())
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(rows) == 9
    assert rows[0] == {
        "sampling_steps": "1",
        "num_proposals": "20",
        "segm/AP [x100]": "31",
        "segm/AP50 [x100]": "49.6",
        "segm/AP75 [x100]": "27.9",
        "bbox/AP [x100]": "34.1",
        "latency_s/total [ms]": "7.1",
        "latency_s/total/p5 [ms]": "6.39",
        "latency_s/total/p95 [ms]": "8.875",
        "peak_memory_bytes/rss [MiB]": "612",
        "num_parameters [M]": "1.23457",
        "flops": "2.5",
    }
    assert rows[-1]["latency_s/total/p95 [ms]"] == "failed"
    assert "7.1 (6.4–8.9)" in to_markdown(table)


def test_a_median_that_samples_tell_has_its_interval_in_a_long_table() -> None:
    records = [make_record(steps) for steps in (1, 2)]
    # Ranks 2 and 8 of nine, as in tests/bench/stats/test_latency.py.
    records[0]["samples"] = {"latency_s": {"total": [0.003, 0.001, 0.002, 0.009, 0.008, 0.007, 0.006, 0.005, 0.004]}}
    records[0]["metrics"]["latency_s/total"]["value"] = 0.005
    table = long_table(records, metrics=["segm/AP", "latency_s/total"])
    first, second = csv.DictReader(io.StringIO(to_csv(table)))
    names = ("latency_s/total/low [ms]", "latency_s/total/high [ms]")
    assert [first[name] for name in names] == ["2", "8"]
    assert [second[name] for name in names] == ["", ""]
    text = to_markdown(table)
    assert r"5.0 \[2.0–8.0\] (" in text
    assert "Latency is the median per image [its 95 % interval within the run] (5th–95th percentile)." in table.notes
    # Of two runs the mean of the medians is shown, which the samples of one do not tell.
    twice = [copy.deepcopy(records[0]) for _ in range(2)]
    twice[1]["axes"]["seed"] = 1
    shown = long_table([*twice, records[1]], metrics=["latency_s/total"])
    assert "latency_s/total/low [ms]" not in to_csv(shown)


def test_long_table_names_its_metrics() -> None:
    table = long_table([make_record()], metrics=["flops", "segm/AP"], title="Cost")
    assert [column.label for column in table.columns][-2:] == ["GFLOPs", "mask AP"]
    assert table.title == "Cost"


def test_not_measured_is_not_a_zero_and_says_why() -> None:
    text = to_markdown(long_table([make_record(1), make_record(2, latency_s=None)]))
    row = next(line for line in text.splitlines() if line.startswith("|              2 |"))
    assert "n/a" in row
    assert "n/a not measured: latency: not asked for" in text


def test_seeds_become_mean_and_deviation() -> None:
    records = [make_record(seed=seed, ap=ap) for seed, ap in enumerate((0.40, 0.44, 0.48))]
    text = to_markdown(long_table(records, metrics=["segm/AP"]))
    assert "44.0 ± 4.0" in text
    assert "Mean ± standard deviation over 3 seeds." in text


def test_a_lost_seed_is_told_in_the_entry() -> None:
    records = [make_record(seed=0, ap=0.4), make_record(seed=1, status="failed", reason="crash")]
    assert "40.0, 1 of 2 runs" in to_markdown(long_table(records, metrics=["segm/AP"]))
    # Once a row, however many columns.
    both = to_markdown(long_table(records, metrics=["segm/AP", "bbox/AP", "num_parameters"]))
    assert "40.0, 1 of 2 runs |" in both
    assert both.count("1 of 2 runs") == 1


def test_other_axes_become_leading_columns_and_combinations_out_of_the_suite_a_dot() -> None:
    records = [make_record(1, 20, backbone="tiny"), make_record(2, 20, backbone="resnet50")]
    table = _grid(records)
    assert [column.label for column in table.columns] == ["backbone", "proposals", "1", "2"]
    assert [[entry.text for entry in row] for row in table.rows] == [
        ["tiny", "20", "25.0", "·"],
        ["resnet50", "20", "·", "25.0"],
    ]
    assert "· not in the suite." in table.notes


def test_box_only_suites_have_no_mask_columns() -> None:
    record = make_record()
    for name in ("segm/AP", "segm/AP50", "segm/AP75"):
        record["metrics"][name] |= {"value": None, "reason": "no masks"}
    assert "mask" not in to_markdown(long_table([record]))


def test_what_no_run_measured_has_no_column() -> None:
    records = [make_record(1), make_record(2)]
    for record in records:
        record["metrics"]["training_step_s/total"] = {
            "value": None,
            "unit": "s",
            "higher_is_better": False,
            "reason": "not asked for",
        }
    assert "training" not in to_markdown(long_table(records))
    records[1]["metrics"]["training_step_s/total"] = {"value": 0.5, "unit": "s", "higher_is_better": False}
    assert "training step (s)" in to_markdown(long_table(records))
    assert "latency" not in to_markdown(long_table([make_record(latency_s=None)]))


def test_nothing_but_failures_is_still_a_table() -> None:
    text = to_markdown(long_table([make_record(status="failed", reason="crash")]))
    assert "✗ failed" in text


def test_two_commits_are_not_mixed_silently() -> None:
    other = make_record(2)
    other["environment"] = {**other["environment"], "commit": "fedcba9876543210", "dirty": True}
    text = to_markdown(long_table([make_record(1), other]))
    assert "commit 0123456789 / fedcba9876 with uncommitted changes" in text


@pytest.mark.parametrize("write", [to_markdown, to_csv, to_latex])
def test_the_same_records_give_the_same_bytes_and_are_left_unchanged(write) -> None:
    records = make_grid()
    before = copy.deepcopy(records)
    first = write(_grid(records)), write(long_table(records))
    assert records == before
    shuffled = list(records)
    random.Random(0).shuffle(shuffled)
    assert write(_grid(shuffled)) == first[0]
    assert (write(_grid(records)), write(long_table(records))) == first


SPECIAL = r"a|b_c $5 %& #1 {x} ~^ \cmd <b>*bold*</b> [l](u) `code`"


def test_markdown_special_characters_stay_text() -> None:
    records = [make_record(note=SPECIAL), make_record(note="other\nline")]
    lines = to_markdown(long_table(records, metrics=["segm/AP"], title=SPECIAL)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    # Unescaped pipes alone separate columns: every row has as many.
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert r"a\|b_c" in rows[2]
    assert r"\<b\>\*bold\*" in rows[2]
    assert "other line" in rows[3]


def test_latex_special_characters_stay_text() -> None:
    text = to_latex(
        long_table([make_record(note=SPECIAL), make_record(note="x")], metrics=["segm/AP"], title="50 % & $1")
    )
    row = next(line for line in text.splitlines() if line.startswith("a\\textbar{}"))
    assert row == (
        r"a\textbar{}b\_c \$5 \%\& \#1 \{x\} \textasciitilde{}\textasciicircum{} \textbackslash{}cmd "
        r"\textless{}b\textgreater{}{*}bold{*}\textless{}/b\textgreater{} {[}l{]}(u) `code` & 25.0 \\"
    )
    assert r"\caption{50 \% \& \$1.}" in text


@given(st.text(max_size=40))
def test_no_text_breaks_a_row(text: str) -> None:
    records = [make_record(note=text), make_record(note="plain")]
    table = long_table(records, metrics=["segm/AP"])
    markdown = [line for line in to_markdown(table).split("\n") if line.startswith("|")]
    assert len(markdown) == (4 if text != "plain" else 3)
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in markdown}) == 1
    latex = to_latex(table)
    body = latex[latex.index("\\midrule") : latex.index("\\bottomrule")].strip().split("\n")[1:]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 1 and row.endswith(r"\\") for row in body)
    rows = list(csv.reader(io.StringIO(to_csv(table), newline="")))
    assert {len(row) for row in rows} == {len(table.columns)}


class TestIntervals:
    def records(self, *, aps: tuple[float, ...] = (0.30, 0.35), images: str = "a") -> list[dict]:
        generator = np.random.default_rng(0)
        common = generator.normal(0, 0.05, 200)
        return [
            with_error(make_record(steps, ap=ap), 0.01, ap + common + generator.normal(0, 0.002, 200), images=images)
            for steps, ap in enumerate(aps, 1)
        ]

    def test_all_formats_carry_them(self) -> None:
        table = long_table(self.records(), metrics=["segm/AP", "flops"])
        markdown = to_markdown(table)
        assert re.search(r"\|\s+30.0 ± 2.0 \|", markdown)
        assert "**35.0 ± 2.0**" in markdown
        assert "- ± of AP and AR: half the 95 % interval, over images.\n" in markdown
        assert "Bold: better than the next best beyond chance (95 %, paired on the same images, Holm's" in markdown
        assert "1 comparison)" in markdown
        latex = to_latex(table)
        assert r"30.0 $\pm$ 2.0 & 2.50" in latex
        assert r"\textbf{35.0 $\pm$ 2.0}" in latex
        assert list(csv.reader(io.StringIO(to_csv(table)))) == [
            ["sampling_steps", "segm/AP [x100]", "segm/AP ± [x100]", "segm/AP ± over", "flops"],
            ["1", "30", "1.95996", "images", "2.5"],
            ["2", "35", "1.95996", "images", "2.5"],
        ]

    def test_a_grid_has_them_and_its_best_too(self) -> None:
        table = grid_table(self.records(), rows="num_proposals", columns="sampling_steps", metric="segm/AP")
        assert [entry.text for entry in table.rows[0]] == ["20", "30.0 ± 2.0", "35.0 ± 2.0"]
        assert [entry.is_best for entry in table.rows[0]] == [False, False, True]
        assert to_csv(table).splitlines()[0] == ",".join(
            ["num_proposals", *(f"sampling_steps={n}{end}" for n in (1, 2) for end in ("", " ±", " ± over"))]
        )

    def test_what_differs_between_cells_stands_in_the_entry(self) -> None:
        records = self.records()
        again = with_error(make_record(2, seed=1, ap=0.36), 0.01)
        table = long_table([*records, again], metrics=["segm/AP", "latency_s/total"])
        texts = [row[1].text for row in table.rows]
        assert texts[0] == "30.0 ± 2.0 (images)"
        assert texts[1].startswith("35.5 ± ")
        assert texts[1].endswith(" (images and 2 trainings)")
        assert "± of AP and AR: half the 95 % interval, over what stands in brackets." in table.notes
        assert "Other values: mean ± standard deviation over 2 seeds." in table.notes

    def test_no_difference_is_said_too(self) -> None:
        notes = long_table(self.records(aps=(0.30, 0.3001)), metrics=["segm/AP"]).notes
        assert any(note.startswith("No value is better than the next best beyond chance") for note in notes)

    def test_records_of_different_images_are_told_apart(self) -> None:
        records = self.records()
        records[1]["metrics"]["num_images"]["value"] = 50
        notes = long_table(records, metrics=["segm/AP"]).notes
        assert "Sets of 50 and 200 images: AP of one is not comparable to another's." in notes
        assert not any("beyond chance" in note for note in notes)

    def test_seeds_on_different_images_are_refused(self) -> None:
        records = [make_record(seed=0), make_record(seed=1)]
        records[1]["metrics"]["num_images"]["value"] = 50
        for text in (to_markdown(long_table(records, metrics=["segm/AP"])), to_latex(_grid(records))):
            assert "not comparable, and not averaged: scored on 50 and 200 images" in text

    @pytest.mark.parametrize(("rare", "is_warned"), [(None, False), (12, True), (500, False)])
    def test_few_rare_instances_are_a_caution(self, rare: int | None, is_warned: bool) -> None:
        record = make_record()
        record["config"]["data"]["dataset"] = "lvis"
        if rare is not None:
            record["metrics"]["num_instances/rare"] = {"value": rare, "unit": "instances", "higher_is_better": None}
        text = to_markdown(long_table([record], metrics=["segm/AP"]))
        assert ("Caution, LVIS" in text) == is_warned
        assert ("on 12 instances of rare classes" in text) == (rare == 12)
        record["metrics"]["segm/APr"] = record["metrics"]["segm/AP"]
        assert "Caution, LVIS" in to_markdown(long_table([record], metrics=["segm/APr"]))

    def test_a_narrow_terminal_leaves_them_out_and_says_so(self) -> None:
        console = Console(width=24, record=True, file=io.StringIO())
        console.print(to_terminal(long_table(self.records(), metrics=["segm/AP", "latency_s/total"])))
        text = console.export_text()
        assert "35.0" in text
        assert "35.0 ±" not in text
