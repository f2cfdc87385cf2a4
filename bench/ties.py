"""A suite's `claims:`, which says the published numbers that its cells are measured against.

    claims:
      - {claim: diffinst-coco-val-r50-1, cell: {backbone: resnet50, sampling_steps: 1}}
      - {claim: diffinst-coco-testdev-r50-1}        # stands in the same table, and no cell can measure it

`cell` names axis values; all cells that have them (seeds differ) measure the claim. Ties change no result and no id.
`claims: []` is for a table of the paper whose numbers are not in the claim files: its report has the paper's layout.
Whether the claims exist is checked where the claim files are read (`bench.ledger`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.errors import SuiteError
from bench.fields import did_you_mean, show
from bench.yaml_source import Item, Place

_KEYS = ("claim", "cell")


@dataclass(frozen=True)
class ClaimTie:
    """claim: an id of the claim files. cell: axis values; None where no cell of the suite measures the claim."""

    claim: str
    cell: Mapping[str, Any] | None
    place: Place = field(default=Place(None), compare=False)

    def fits(self, axes: Mapping[str, Any]) -> bool:
        """Whether a cell with these axis values measures the claim."""
        return self.cell is not None and all(name in axes and axes[name] == want for name, want in self.cell.items())


def read_ties(
    item: Item | None, cells: Sequence[Mapping[str, Any]], problems: list[SuiteError], *, must_fit: bool = True
) -> tuple[ClaimTie, ...] | None:
    """The ties of a suite, None where it has no `claims:`; what is wrong with them is noted.

    Args:
        item: the value of `claims:`, or None.
        cells: the axes of the suite's cells.
        must_fit: whether a tie that fits no cell is a mistake (not so where axes were replaced with `--set`).
    """
    if item is None:
        return None
    if not isinstance(item.value, list):
        problems.append(item.place.error("claims", f"{show(item.plain())} is not allowed. Allowed: a list of mappings"))
        return None
    ties: list[ClaimTie] = []
    for position, entry in enumerate(item.value):
        tie = _read_tie(entry, f"claims[{position}]", cells, problems, must_fit)
        if tie is None:
            continue
        if any(tie.claim == other.claim and tie.cell == other.cell for other in ties):
            problems.append(tie.place.error(f"claims[{position}]", f"{show(tie.claim)} is tied to this cell already"))
        ties.append(tie)
    return tuple(ties)


def _read_tie(
    entry: Item, key: str, cells: Sequence[Mapping[str, Any]], problems: list[SuiteError], must_fit: bool
) -> ClaimTie | None:
    if not isinstance(entry.value, dict):
        allowed = "a mapping with claim and, where a cell measures it, cell"
        problems.append(entry.place.error(key, f"{show(entry.plain())} is not allowed. Allowed: {allowed}"))
        return None
    known = len(problems)
    for name, place in entry.key_places.items():
        if name not in _KEYS:
            hint = did_you_mean(name, _KEYS)
            problems.append(place.error(f"{key}.{name}", f"unknown key. Allowed: {', '.join(_KEYS)}.{hint}"))
    claim = entry.value.get("claim")
    if claim is None or not isinstance(claim.value, str):
        problems.append(entry.place.error(key, "needs claim, the id of a claim"))
    cell = entry.value.get("cell")
    wanted: dict[str, Any] | None = None
    if cell is not None:
        wanted = _read_cell(cell, f"{key}.cell", cells, problems)
    if len(problems) > known or claim is None:
        return None
    tie = ClaimTie(claim.value, wanted, entry.place)
    if must_fit and wanted is not None and not any(tie.fits(axes) for axes in cells):
        problems.append(entry.place.error(f"{key}.cell", f"{show(wanted)} fits no cell of the suite"))
        return None
    return tie


def _read_cell(
    cell: Item, key: str, cells: Iterable[Mapping[str, Any]], problems: list[SuiteError]
) -> dict[str, Any] | None:
    if not isinstance(cell.value, dict) or not cell.value:
        message = f"{show(cell.plain())} is not allowed. Allowed: a mapping from axis to value"
        problems.append(cell.place.error(key, message))
        return None
    axes = list(dict.fromkeys(name for axes in cells for name in axes))
    wanted = {}
    for name, value in cell.value.items():
        bare = name.rpartition(".")[2]
        if axes and bare not in axes:
            hint = did_you_mean(bare, axes)
            problems.append(cell.key_places[name].error(f"{key}.{name}", f"no axis. Allowed: {', '.join(axes)}.{hint}"))
        wanted[bare] = value.plain()
    return wanted
