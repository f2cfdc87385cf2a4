from __future__ import annotations

from report_records import make_record

from bench.report.html.chart_views import chart_view


def _drawing(counts: tuple[int, ...]) -> str:
    records = [make_record(steps, ap=0.1 * place) for place, steps in enumerate((1, 2, 4, 8), start=1)]
    for record, count in zip(records, counts):
        record["metrics"]["num_images"]["value"] = count
    ((_, drawing),) = chart_view(records, {"x": "sampling_steps", "y": "segm/AP"}).panels
    return str(drawing)


def test_values_of_different_images_are_not_joined() -> None:
    together, apart = _drawing((60, 60, 60, 60)), _drawing((60, 60, 100, 100))
    assert together.count('class="line') == 1
    assert apart.count('class="line') == 2
    assert together.count("<title>") == apart.count("<title>")
