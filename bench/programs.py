"""Whether the programs that a suite names may be run: a suite is data, and its user says what runs. Loads no torch.

`engine.python` is an interpreter, and `engine.checkout` a folder of code. A suite may name what lies in the places that
are made for them: interpreters below `.tox/` of the current folder, and clones below `checkouts/` of the data root. All
else runs only if the user names it too: with `--set`, or in the variable DIFFBENCH_ALLOW_PROGRAMS, a list of files and
folders separated as in PATH.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bench.errors import SuiteError, SuiteErrors
from bench.plan import Plan
from bench.suite import Suite, SuiteCell, axes_label
from bench.yaml_source import Place

VARIABLE = "DIFFBENCH_ALLOW_PROGRAMS"
_FIELDS = ("python", "checkout")
_WHAT = {"python": "a program", "checkout": "code"}


def check_programs(suite: Suite, plan: Plan, data_root: Path | None) -> None:
    """Refuse a plan with a program that nobody allowed.

    Raises:
        SuiteErrors: the programs of the suite that may not be run, once each.
    """
    cells = {axes_label(cell.axes): cell for cell in suite.cells}
    found: dict[str, SuiteError] = {}
    for planned in plan.cells:
        cell = cells[planned.label]
        # A missing cell has no nodes, and runs nothing. Data sets are shared between engines, and other nodes between
        # cells: each runs the program of the cell that brought it.
        node_ids = [node_id for kind, node_id in planned.nodes.items() if kind != "dataset"]
        for node_id in node_ids if cell.engine.is_external else []:
            for problem in _problems(suite, cell, plan.nodes[node_id].options["engine"], data_root):
                found.setdefault(str(problem), problem)
    if found:
        raise SuiteErrors(found.values())


def _problems(
    suite: Suite, cell: SuiteCell, resolved: dict[str, str | None], data_root: Path | None
) -> Iterator[SuiteError]:
    """resolved: the engine's section with absolute paths, as far as what it names is here."""
    places = {"python": (Path(".tox"), ".tox/ of the current folder")}
    if data_root is not None:
        places["checkout"] = data_root / "checkouts", "checkouts/ of the data root"
    for name in _FIELDS:
        written, used = getattr(cell.engine, name), resolved[name]
        if written is None or used is None:
            continue
        # What the user typed means a place below the current folder; the plan looks in other places before.
        if written in suite.programs and _by_name(written) == _by_name(used):
            continue
        folder, where = places.get(name, (None, "checkouts/ of a data root, see --data-root"))
        goes_back = ".." in Path(written).parts  # behind a link, that is another place than its name says
        is_own = folder is not None and not Path(written).is_absolute() and not goes_back and _is_below(used, folder)
        if is_own or any(_is_below(used, Path(allowed)) for allowed in _allowed()):
            continue
        # What an axis has cannot be set by itself, but for the interpreter.
        by_set = f"--set engine.{name}={used}, or with " if name == "python" or "engine" not in cell.places else ""
        place = cell.places.get("engine") or suite.places.get("engine") or Place(suite.path)
        message = f"'{written}' is {_WHAT[name]} that would be run. Allowed in a suite: a path below {where}"
        yield place.error(f"engine.{name}", f"{message}. Allow it with {by_set}{VARIABLE}={used}")


def _is_below(path: str, folder: Path) -> bool:
    return _by_name(path).is_relative_to(_by_name(folder))


def _by_name(path: str | Path) -> Path:
    """Absolute, without '..' and without following links, as an interpreter often is one."""
    return Path(os.path.normpath(Path(path).absolute()))


def _allowed() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
