"""What a valid suite says that is seldom meant, with its place: said before hours are spent on it. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bench.errors import SuiteError
from bench.suite import LVIS_DETECTIONS, Suite, SuiteCell, is_lvis
from bench.yaml_source import Place
from diffinst.config import frozen_at_random


def warnings_of(suite: Suite, cells: Iterable[SuiteCell]) -> list[SuiteError]:
    """Each warning once, in the order of the cells; `str` of one is its line.

    Args:
        cells: those of the suite that are to be run.
    """
    found: dict[str, SuiteError] = {}
    for cell in cells:
        for warning in _of_cell(suite, cell):
            found.setdefault(str(warning), warning)
    return list(found.values())


def _of_cell(suite: Suite, cell: SuiteCell) -> Iterator[SuiteError]:
    message = frozen_at_random(cell.config.model) if cell.engine.is_default else None
    if message is not None:
        names = ("model.backbone_weights", "model.freeze_at", "model.backbone")
        yield _place(suite, cell, names).error("model.freeze_at", message)
    kept = cell.config.sampler.max_detections
    if suite.measure.score and kept is not None and kept < LVIS_DETECTIONS and is_lvis(dict(cell.config.data)):
        message = f"{kept} detections an image are kept, where LVIS scores {LVIS_DETECTIONS}"
        way = f"Give max_detections: {LVIS_DETECTIONS}"
        place = _place(suite, cell, ("sampler.max_detections", "data.dataset"))
        yield place.error("sampler.max_detections", f"{message}. {way}")


def _place(suite: Suite, cell: SuiteCell, names: Iterable[str]) -> Place:
    """Where the first of these fields that is written anywhere has its value."""
    for name in names:
        for places in (cell.places, suite.places):
            if name in places:
                return places[name]
    return Place(suite.path)
