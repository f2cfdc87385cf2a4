"""Who may import whom: statically by layer, and by what a fresh interpreter has loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Layers of diffinst, lowest first: a module imports from its own layer or from lower ones.
LAYERS: list[set[str]] = [
    {"ops", "config", "errors", "structures"},
    {"diffusion"},
    {"backbones", "heads", "matching", "federated", "losses"},
    {"model", "postprocess"},
    {"build", "data", "evaluation", "checkpoint", "released_names", "weights", "drawing"},
    {"engine"},
    {"cli"},
]

# module -> packages that importing it in a fresh interpreter must not load.
# What torchvision's package brings, see diffinst.ops.library.
HEAVY = {"torchvision", "torch._dynamo", "torch._inductor", "sympy", "triton"}

MUST_NOT_LOAD: dict[str, set[str]] = {
    "diffinst": {"torch", "numpy", "pydantic", "bench"},
    "diffinst.config": {"torch", "numpy", "bench"},
    "diffinst.errors": {"torch", "numpy", "pydantic", "bench"},
    "diffinst.data.catalog": {"torch", "bench"},
    "diffinst.evaluation.scoring": {"torch", "bench"},
    "diffinst.data.annotations": {"torch", "bench"},
    "diffinst.data.lvis": {"torch", "bench"},
    "diffinst.evaluation.coco_ap": {"torch", "bench"},
    "diffinst.evaluation.matches": {"torch", "bench"},
    "diffinst.evaluation.predictions": {"torch", "bench"},
    "diffinst.weights.unpickle": {"torch", "pydantic", "bench", "diffinst.config"},
    "bench.peers.run_peer": {"torch", "pydantic", "bench.engines", "diffinst.config", "matplotlib", "pandas"},
    "diffinst.model": {"bench", "matplotlib", "pandas", *HEAVY},
    "diffinst.engine.inference": {"bench", "matplotlib", "pandas", *HEAVY},
    "bench.worker": {"matplotlib", "pandas", *HEAVY},
    "diffinst.engine.train": {"bench", "matplotlib", "pandas"},
    "diffinst.engine.evaluate": {"bench", "matplotlib", "pandas"},
    "bench.suite": {"torch", "matplotlib", "pandas"},
    "bench.upstream": {"torch", "matplotlib", "pandas"},
    "bench.plan": {"torch", "matplotlib", "pandas"},
    "bench.outlook": {"torch", "matplotlib", "pandas"},
    "bench.fingerprints": {"torch", "matplotlib", "pandas"},
    "bench.explain_cli": {"torch", "matplotlib", "pandas"},
    "bench.record": {"torch", "diffinst.model", "matplotlib"},
    "bench.plain_record": {"torch", "numpy", "diffinst.model", "matplotlib", "pandas"},
    "bench.digests": {"torch", "numpy", "diffinst.model", "matplotlib", "pandas"},
    "bench.store": {"torch", "diffinst.model", "matplotlib"},
    "bench.start": {"torch", "diffinst.model", "matplotlib"},
    "bench.execute": {"torch", "diffinst.model", "matplotlib"},
    "bench.measure.environment": {"torch", "diffinst", "pynvml", "pandas"},
    "bench.measure.source": {"torch", "diffinst", "pandas"},
    "bench.report.tables": {"torch", "diffinst.model"},
    "bench.report.plots": {"torch", "diffinst.model"},
    "bench.cli": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.report.frames": {"torch", "diffinst.model", "pandas"},
    "bench.diffbench": {"torch", "diffinst.model", "pandas"},
    "bench.claims": {"torch", "numpy", "diffinst.model", "pandas", "matplotlib"},
    "bench.verdict": {"torch", "numpy", "diffinst.model", "pandas", "matplotlib"},
    "bench.ledger": {"torch", "diffinst.model", "pandas", "matplotlib"},
    "bench.verify": {"torch", "diffinst.model", "pandas"},
    "bench.report.paper": {"torch", "diffinst.model", "pandas"},
    "bench.compare": {"torch", "diffinst.model", "diffinst.config", "matplotlib", "pandas"},
    "bench.compare_cli": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.archive": {"torch", "diffinst.model", "diffinst.config", "matplotlib", "pandas"},
    "bench.pack": {"torch", "diffinst.model", "pandas"},
    "bench.pack_cli": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.verify_pack": {"torch", "diffinst.model", "pandas"},
    "bench.race": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.measure.disturbances": {"torch", "numpy", "diffinst", "matplotlib", "pandas"},
    "bench.report.latency": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.stats.latency": {"torch", "diffinst", "matplotlib", "pandas"},
    "bench.stats.bootstrap": {"torch", "diffinst", "matplotlib", "pandas"},
    "bench.stats.paired": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.report.best": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.stats.scores": {"torch", "diffinst", "matplotlib", "pandas"},
    "bench.stats.match_files": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.stats.breakdown": {"torch", "diffinst", "matplotlib", "pandas"},
    "bench.report.evidence": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.report.html.charts": {"torch", "diffinst", "matplotlib", "pandas"},
    "bench.report.html.page": {"torch", "diffinst.model", "matplotlib", "pandas"},
    "bench.report_cli": {"torch", "diffinst.model", "matplotlib", "pandas"},
}

# Of the harness, only these may import diffinst beyond its configuration and errors, or torch.
MODEL_BRIDGE = (
    "bench.fingerprints",  # the catalogue of data sets, which loads no torch
    "bench.worker",
    "bench.measure",
    "bench.detectors",
    "bench.race_side",  # a process of its own
    "bench.external",
    "bench.torchvision_engine",
    "bench.peers",  # in interpreters of their own
    "bench.pack",  # finds and scores annotations, without torch
    "bench.verify_pack",
)

# Reports look at predictions beside ground truth: what reads both, and loads no torch.
EVIDENCE = ("bench.report.evidence", "bench.agreement")
READERS = {"diffinst.data", "diffinst.evaluation", "diffinst.ops"}


def _modules(package: str) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def _path_of(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_path_of(module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "diffinst" or len(parts) < 2:
        return None
    return next((level for level, names in enumerate(LAYERS) if parts[1] in names), None)


def test_every_module_of_diffinst_has_a_layer() -> None:
    unplaced = [module for module in _modules("diffinst") if module != "diffinst" and _layer(module) is None]
    assert not unplaced


@pytest.mark.parametrize("module", _modules("diffinst"))
def test_diffinst_imports_downwards_only(module: str) -> None:
    own = _layer(module)
    for name in _imports(module):
        assert name.split(".")[0] != "bench", f"{module} imports {name}"
        other = _layer(name)
        assert own is None or other is None or other <= own, f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("module", _modules("bench"))
def test_only_the_bridge_imports_the_model(module: str) -> None:
    if module.startswith(MODEL_BRIDGE):
        return
    allowed = {"diffinst", "diffinst.config", "diffinst.errors"}
    if module in EVIDENCE:
        allowed |= READERS
    for name in _imports(module):
        top = name.split(".")[0]
        assert top not in {"torch", "torchvision"}, f"{module} imports {name}"
        if top == "diffinst":
            is_light = ".".join(name.split(".")[:2]) in allowed or name == "diffinst.__version__"
            assert is_light, f"{module} imports {name}"


@pytest.mark.parametrize(("module", "forbidden"), MUST_NOT_LOAD.items(), ids=MUST_NOT_LOAD.keys())
def test_a_fresh_import_stays_light(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*(name for name in {sorted(forbidden)!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {module} loads {done.stdout.strip()}"
