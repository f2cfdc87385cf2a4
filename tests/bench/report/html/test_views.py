from __future__ import annotations

from report_records import make_record

from bench.report.html.views import class_bars, latency_rows


def test_classes_stand_best_first_with_half_their_interval() -> None:
    record = make_record()
    record["per_class"] = {"segm/AP": {"cat": 0.2, "dog": 0.4, "emu": None}}
    record["per_class_errors"] = {"segm/AP": {"cat": 0.01, "dog": None, "emu": None}}
    view = class_bars(record, "the only cell", "segm/AP")
    assert view is not None
    # 1.96 * 0.01 is 0.0196: 2.0 points of AP x 100
    assert [(bar.label, bar.text) for bar in view.shown] == [("dog", "40.0"), ("cat", "20.0 ± 2.0")]
    assert view.notes[1:] == ("±: half the 95 % interval over images.", "1 class has no instance in the split.")
    del record["per_class_errors"]
    old = class_bars(record, "the only cell", "segm/AP")
    assert old is not None
    assert [bar.text for bar in old.shown] == ["40.0", "20.0"]
    assert len(old.notes) == 2


def test_medians_of_latencies_have_their_interval() -> None:
    record = make_record()
    # 99 samples of 1 to 99 ms in an order without memory: the median is 50 ms, its interval is inside the samples.
    record["samples"] = {"latency_s": {"total": [(37 * i % 99 + 1) / 1e3 for i in range(99)]}}
    (row,), notes = latency_rows([record])
    median, _, rest = row.texts[1].partition(" ")
    low, high = (float(end) for end in rest.strip("[]").split("–"))
    assert median == "50.0"
    assert 30 < low < 50 < high < 70
    assert "In brackets: the 95 % interval of the median." in notes
    assert row.texts[4] == "99"


def test_few_samples_have_no_interval() -> None:
    record = make_record()
    record["samples"] = {"latency_s": {"total": [0.1, 0.2]}}
    (row,), notes = latency_rows([record])
    assert row.texts[1] == "150.0"
    assert len(notes) == 1
    assert latency_rows([make_record(status="failed", reason="x")]) == ([], [])
