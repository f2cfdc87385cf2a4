"""The suites of the paper's tables, as committed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.claims import load_claims
from bench.cli import main
from bench.ledger import check_ties
from bench.plan import build_plan
from bench.suite import Suite, load_suite
from diffinst.config import RELEASED

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "suites/paper").glob("*.yaml"))
WITH_WEIGHTS = ("coco_val", "proposals_steps", "renewal_ensemble", "diffusiondet_coco", "diffusiondet_lvis")
TRAINED = ("coco_val_trained", "lvis", "signal_scale", "padding")


def load(name: str) -> Suite:
    return load_suite(ROOT / f"suites/paper/{name}.yaml")


def test_the_readme_says_where_every_weights_file_comes_from() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Reproduce the paper") :]
    told = set()
    for name in re.findall(r"`([^`\s]+)`", section):
        head, brace, rest = name.partition("{")
        parts, _, tail = rest.partition("}")
        told |= {f"{head}{part}{tail}" for part in parts.split(",")} if brace else {name}
    assert "weights with Swin and on LVIS are not published" in section
    unpublished = {"diffinst_coco_swinb.safetensors", "diffinst_coco_swinl.safetensors"}
    for path in [*PATHS, *sorted((ROOT / "suites").glob("*.yaml"))]:
        for file in re.findall(r"\bweights/([\w.-]+\.(?:safetensors|pkl|pth))", path.read_text()):
            assert {file, Path(file).stem} & (told | unpublished), (path.name, file)


def test_there_is_a_suite_for_each_table() -> None:
    assert {path.stem for path in PATHS} == {*WITH_WEIGHTS, *TRAINED, "baseline"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_is_valid_tied_and_says_how_to_run_it(path: Path) -> None:
    suite = load_suite(path)
    assert suite.name == path.stem
    assert suite.description
    assert suite.claims is not None
    check_ties(suite, load_claims(ROOT / "suites/claims"))
    lines = suite.source_text.splitlines()
    assert lines[0].startswith(f"# run-suite suites/paper/{path.name} --data-root DIR")
    assert "hour" in lines[1]
    assert lines[2].startswith("# Expected: ")


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_with_published_weights_nothing_is_trained(name: str) -> None:
    suite = load(name)
    assert all(cell.config.model.weights != "none" for cell in suite.cells)
    assert {cell.config.model.mask for cell in suite.cells} == {"none" if "det" in name else "dynamic"}


@pytest.mark.parametrize("name", [*WITH_WEIGHTS, *TRAINED])
def test_as_released_but_for_the_axes(name: str) -> None:
    suite = load(name)
    varied = set(suite.cells[0].axes)
    for cell in suite.cells:
        for section, values in RELEASED.items():
            found = {field: getattr(getattr(cell.config, section), field) for field in values if field not in varied}
            assert found == {field: value for field, value in values.items() if field not in varied}


@pytest.mark.parametrize("name", TRAINED)
def test_trainings_have_the_released_schedules(name: str) -> None:
    for cell in load(name).cells:
        train = cell.config.train
        assert (train.batch_size, train.learning_rate, train.weight_decay) == (32, 5e-5, 1e-4)
        on_lvis = cell.config.data.dataset == "lvis"
        assert (train.iterations, train.schedule_steps) == (
            (135_000, (105_000, 125_000)) if on_lvis else (225_000, (175_000, 210_000))
        )
        assert (train.federated_loss, train.repeat_threshold) == ((True, 0.001) if on_lvis else (False, None))


def test_what_was_assumed_is_said() -> None:
    text = load("coco_val_trained").source_text
    for what in ("Assumed, because the release does not say", "ResNet-50: its files", "Swin-L: in no file"):
        assert what in text


def test_the_axes_of_the_tables() -> None:
    def axes(name: str, *names: str) -> set[tuple]:
        return {tuple(cell.axes[axis] for axis in names) for cell in load(name).cells}

    four = ("resnet50", "resnet101", "swin_b", "swin_l")
    for name in ("coco_val", "coco_val_trained"):
        assert axes(name, "backbone", "sampling_steps") == {(b, s) for b in four for s in (1, 4)}
    assert axes("lvis", "backbone", "sampling_steps") == {(b, 1) for b in four[:3]}
    assert len(axes("proposals_steps", "num_proposals", "sampling_steps")) == 16
    assert axes("signal_scale", "snr_scale") == {(1.0,), (2.0,), (3.0,)}
    assert axes("padding", "proposal_padding") == {("concat",), ("repeat",)}
    assert axes("renewal_ensemble", "renewal", "ensemble") == {
        (renewal, ensemble) for renewal in (True, False) for ensemble in ("all_but_last", "all", "none")
    }


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_without_weights_the_plan_says_what_is_missing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for cell in build_plan(load_suite(path)).cells:
        assert cell.missing is not None
        assert "weights/" in cell.missing


def test_without_anything_run_suite_says_so_and_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(ROOT / "suites/paper/renewal_ensemble.yaml"), "--data-root", str(tmp_path)]) == 1
    assert not list(tmp_path.rglob("*.json"))
