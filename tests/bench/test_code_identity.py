"""Code counts by what it does and what reaches it: writing changes nothing, a changed constant what it touches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.code_identity import SOURCE_ROOT, Source, node_code
from bench.execute import LATE_MODULES
from bench.outlook import changed_parts

FILES = {
    "pkg/__init__.py": "",
    "pkg/main.py": '''
"""What runs."""
from pkg import constants
from pkg.helpers import help_out as helper, Shape
import pkg.registry
import math

LIMIT = 3  # how many
OTHER = 4


def run(value: Shape) -> int:
    """Do it."""
    return helper(value) + LIMIT + constants.STEP


def stop():
    return OTHER


if __name__ == "__main__":
    stop()
''',
    "pkg/constants.py": "STEP = 1\nUNUSED = 2\n",
    "pkg/helpers.py": """
import numpy as np
from pkg.shapes import Shape, Ring


def help_out(value):
    return np.sum(value) + _inner()


def _inner():
    return Ring().area()


def nobody():
    return 0
""",
    "pkg/shapes.py": """
class Shape:
    def area(self):
        return 0


class Ring(Shape):
    side = 2

    def area(self):
        from pkg.late import factor

        return self.side * factor


class Never:
    pass
""",
    "pkg/late.py": "factor = 2\n",
    "pkg/registry.py": "known = {}\nfor name in ('a', 'b'):\n    known[name] = len(name)\n",
}


def write(folder: Path, **changes: str) -> Source:
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changes.get(path.stem, text))
    return Source(folder, ["pkg"])


def code_of(folder: Path, **changes: str) -> dict[str, str]:
    return dict(write(folder, **changes).code(["pkg.main:run"]).parts)


def test_what_is_reached_and_nothing_else(tmp_path: Path) -> None:
    names = set(code_of(tmp_path))
    assert names == {
        *("pkg:", "pkg.main:", "pkg.main:run", "pkg.main:LIMIT"),
        *("pkg.constants:", "pkg.constants:STEP"),
        *("pkg.helpers:", "pkg.helpers:help_out", "pkg.helpers:_inner"),
        *("pkg.shapes:", "pkg.shapes:Ring", "pkg.shapes:Shape"),  # a base class, though no name of an annotation
        *("pkg.late:", "pkg.late:factor"),
        *("pkg.registry:", "pkg.registry:known"),
    }


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("main", "# how many", "# so many, and more"),
        ("main", '"""Do it."""', '"""Do it well."""'),
        ("main", '"""What runs."""', '"""What runs, and why."""'),
        ("main", "value: Shape", "value: object"),
        ("main", "helper(value) + LIMIT + constants.STEP", "(helper(value)\n        + LIMIT + constants.STEP)"),
        ("main", "OTHER = 4", "OTHER = 5"),
        ("main", "    stop()", "    run(1)"),
        ("constants", "UNUSED = 2", "UNUSED = 3"),
        ("helpers", "    return 0", "    return 1"),
        ("shapes", "class Never:\n    pass", "class Never:\n    x = 1"),
        ("main", "from pkg import constants\n", "from pkg import constants\n\n\n"),
    ],
)  # fmt: skip
def test_what_changes_nothing(tmp_path: Path, module: str, old: str, new: str) -> None:
    text = FILES[f"pkg/{module}.py"]
    assert old in text
    assert code_of(tmp_path / "a") == code_of(tmp_path / "b", **{module: text.replace(old, new)})


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        ("main", "LIMIT = 3", "LIMIT = 4", ["pkg.main.LIMIT"]),
        ("constants", "STEP = 1", "STEP = 2", ["pkg.constants.STEP"]),
        ("helpers", "np.sum", "np.max", ["pkg.helpers.help_out"]),
        ("helpers", "import numpy as np", "import torch as np", ["pkg.helpers.help_out"]),
        ("shapes", "side = 2", "side = 3", ["pkg.shapes.Ring"]),
        ("shapes", "        return 0", "        return 1", ["pkg.shapes.Shape"]),
        ("late", "factor = 2", "factor = 2.0", ["pkg.late.factor"]),
        ("registry", "len(name)", "name", ["pkg.registry"]),
    ],
)
def test_what_changes_exactly_what_it_touches(
    tmp_path: Path, module: str, old: str, new: str, changed: list[str]
) -> None:
    text = FILES[f"pkg/{module}.py"]
    assert old in text
    before, after = code_of(tmp_path / "a"), code_of(tmp_path / "b", **{module: text.replace(old, new)})
    assert changed_parts(before, after) == changed


def test_a_module_as_a_value_counts_whole(tmp_path: Path) -> None:
    text = FILES["pkg/main.py"].replace("constants.STEP", "len(vars(constants))")
    assert "pkg.constants:UNUSED" in code_of(tmp_path, main=text)


def test_a_name_handed_on_by_another_module_is_followed(tmp_path: Path) -> None:
    text = FILES["pkg/main.py"].replace("import math", "from pkg.helpers import Ring as Torus").replace(
        "+ LIMIT", "+ LIMIT + Torus.side"
    )  # fmt: skip
    text = text.replace("helper(value)", "value")
    assert "pkg.shapes:Ring" in code_of(tmp_path, main=text)


def test_what_is_left_out_is_not_followed(tmp_path: Path) -> None:
    parts = write(tmp_path).code(["pkg.main:run"], ["pkg.helpers"]).parts
    assert not any(name.startswith(("pkg.helpers", "pkg.shapes")) for name in parts)


def test_a_root_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"pkg\.main:nothing"):
        write(tmp_path).code(["pkg.main:nothing"])


# -- this project's own ------------------------------------------------------------------------------------------------


def changed_kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, old: str, new: str) -> set[str]:
    """Which nodes' code changes when a piece of source does."""
    from bench import code_identity

    clone = tmp_path / "source"
    for path in (*SOURCE_ROOT.glob("bench/**/*.py"), *SOURCE_ROOT.glob("diffinst/**/*.py")):
        target = clone / path.relative_to(SOURCE_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    file = clone.joinpath(*module.split(".")).with_suffix(".py")
    text = file.read_text()
    assert text.count(old) >= 1, f"{module} has no {old!r} any more"
    file.write_text(text.replace(old, new, 1))
    kinds = ("dataset", "train", "weights", "predict", "score", "latency", "training_step")

    def digests() -> dict[str, str]:
        node_code.cache_clear()
        return {kind: node_code(kind, backbone="tiny", dataset="shapes").digest for kind in kinds}

    before = digests()
    monkeypatch.setattr(code_identity, "_source", lambda: Source(clone, ("bench", "diffinst")))
    after = digests()
    monkeypatch.undo()
    node_code.cache_clear()
    return {kind for kind in kinds if before[kind] != after[kind]}


TIMED = {"latency", "training_step"}


@pytest.mark.parametrize(
    ("module", "old", "new", "kinds"),
    [
        ("diffinst.losses", "\n\n\n", "\n\n\ndef _unused() -> None:\n    return None\n\n\n", set()),
        ("diffinst.losses", "    return ", "    return 1 * ", {"train", "training_step"}),
        ("diffinst.diffusion.ddim", "    return ", "    return 1 * ", {"predict", "weights", *TIMED}),
        ("diffinst.evaluation.coco_ap", "    return ", "    return 1 * ", {"score"}),
        ("diffinst.backbones.swin", "    return ", "    return 1 * ", set()),
        (
            "diffinst.backbones.tiny",
            "        return ",
            "        return 1 * ",
            {"train", "predict", "weights", *TIMED},
        ),
        ("bench.measure.memory", "    return ", "    return 1 * ", TIMED),
        ("bench.measure.training", "    return ", "    return 1 * ", {"training_step"}),
        ("bench.measure.disturbances", "DISTURBED_SHARE = ", "DISTURBED_SHARE = 2 * ", TIMED),
        ("bench.measure.disturbances", "_HARMLESS = (", '_HARMLESS = ("board_limit", ', TIMED),
        ("bench.report.tables", "    return ", "    return 1 * ", set()),
        ("bench.server", "    return ", "    return 1 * ", set()),
    ],
)
def test_a_changed_line_changes_the_nodes_that_run_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, old: str, new: str, kinds: set[str]
) -> None:
    assert changed_kinds(monkeypatch, tmp_path, module, old, new) == kinds


def test_what_is_imported_late_counts_where_it_runs() -> None:
    def modules(**settings: str) -> set[str]:
        return {part.partition(":")[0] for part in node_code("predict", **settings).parts}

    late = {"diffinst.backbones.swin", "bench.torchvision_engine"}
    assert modules(backbone="swin_t") & late == {"diffinst.backbones.swin"}
    assert modules(backbone="tiny") & late == set()
    assert modules(engine="torchvision") & late == {"bench.torchvision_engine"}
    assert set(LATE_MODULES) == late


def test_every_kind_and_engine_has_code() -> None:
    for engine in ("diffinst", "torchvision", "detectron2", "original"):
        for kind in ("dataset", "train", "weights", "predict", "score", "latency", "training_step"):
            assert f"bench.worker:run_{kind}" in node_code(kind, engine).parts
    peers = node_code("predict", "detectron2").parts
    assert any(name.startswith("bench.peers.detectron:") for name in peers)
    assert not any(
        name.startswith(("diffinst.heads", "bench.torchvision_engine", "bench.peers.original")) for name in peers
    )
    assert any(name.startswith("bench.peers.original:") for name in node_code("predict", "original").parts)


def test_digests_do_not_depend_on_the_process() -> None:
    command = "from bench.code_identity import node_code; print(node_code('train').digest)"
    found = {
        subprocess.run(
            [sys.executable, "-c", command],
            cwd=SOURCE_ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{node_code('train').digest}\n"}
