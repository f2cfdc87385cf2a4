from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import SuiteErrors
from bench.gates import DEFAULT_GATES, METRIC_KINDS, Gate, load_gates

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTATION = ROOT / "docs/gates.md"

GOOD = """\
level: 0.01
calibration: noise/box.yaml
require: [segm/AP, latency_s/*]
gates:
  segm/AP: {relative: 0.02, absolute: 0.005}
  segm/*: {relative: 0, absolute: 1}
  latency_s/total: {relative: 0.05, absolute: 0.0005, noise: 0.02}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "gates.yaml"
    path.write_text(text)
    return path


def errors(folder: Path, text: str) -> list[str]:
    with pytest.raises(SuiteErrors) as caught:
        load_gates(write(folder, text))
    return [str(error).removeprefix(str(folder / "gates.yaml")) for error in caught.value.errors]


def test_reads_everything(tmp_path: Path) -> None:
    gates = load_gates(write(tmp_path, GOOD))
    assert (gates.level, gates.require) == (0.01, ("segm/AP", "latency_s/*"))
    assert gates.calibration == tmp_path / "noise/box.yaml"
    assert gates.of("latency_s/total") == Gate(relative=0.05, absolute=0.0005, noise=0.02)


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    gates = load_gates(write(tmp_path, GOOD))
    assert gates.of("segm/AP") == Gate(relative=0.02, absolute=0.005)
    assert gates.of("segm/AP50") == Gate(relative=0.0, absolute=1.0)
    assert gates.of("bbox/AP") is None


def test_all_mistakes_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = """\
level: 2
gate: {}
require: [bbox/AP]
gates:
  segm/*: {relative: 0.02, absolute: 0.005}
  segm/AP: {relative: 0.02, absolute: 0.005}
  latency/total: {relative: 0.02, absolute: 0.005}
  flops: {relative: 1e-3, absolut: 0}
  num_parameters: {relative: 0.1}
"""
    assert errors(tmp_path, text) == [
        ":1:8: level: 2 is not allowed. Allowed: a number from 0.0001 to 0.5",
        ":2:1: gate: unknown key. Allowed: level, calibration, require, gates. Did you mean 'gates'?",
        ":3:11: require[0]: no gate is for 'bbox/AP'. Add one under gates, or leave it out",
        ":6:3: gates.segm/AP: is never reached: 'segm/*' above matches first. Move it up",
        ":7:3: gates.latency/total: no metric begins with 'latency'. Allowed: segm, bbox, latency_s, training_step_s, "
        "peak_memory_bytes, num_parameters, flops, benchmark_s. Did you mean 'latency_s'?",
        ":8:21: gates.flops.relative: '1e-3' is not allowed. Allowed: a number of at least 0. "
        "YAML reads 1e-3 as text: write 1.0e-3",
        ":8:27: gates.flops.absolut: unknown key. Allowed: relative, absolute, noise. Did you mean 'absolute'?",
        ":9:19: gates.num_parameters: needs absolute. Write 0 for no threshold",
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ":1:1: null is not allowed. Allowed: a mapping with gates"),
        ("level: 0.1\n", ":1:1: gates: needs a mapping from metric patterns to {relative: ..., absolute: ...}"),
        ("gates: []\n", ":1:8: gates: needs a mapping from metric patterns to {relative: ..., absolute: ...}"),
        ("gates: {segm/AP: 3}\n", ":1:18: gates.segm/AP: 3 is not allowed. Allowed: a mapping of fields"),
        ("gates: {flops: }\n", ":1:15: gates.flops: needs relative and absolute. Write 0 for no threshold"),
    ],
)
def test_one_mistake(tmp_path: Path, text: str, error: str) -> None:
    assert errors(tmp_path, text) == [error]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SuiteErrors, match=r"gates.yaml: cannot be read \(No such file or directory\)"):
        load_gates(tmp_path / "gates.yaml")
    (tmp_path / "gates.yaml").write_bytes(b"\xff")
    with pytest.raises(SuiteErrors, match="it is not UTF-8 text"):
        load_gates(tmp_path / "gates.yaml")


def test_the_documentation_has_the_built_in_gates_and_the_format(tmp_path: Path) -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    built_in, format_of_a_file = (part.partition("```")[0] for part in text.split("```yaml\n")[1:])
    found = load_gates(write(tmp_path, built_in))
    assert list(found.gates.items()) == list(DEFAULT_GATES.gates.items())
    assert (found.require, found.level) == (DEFAULT_GATES.require, DEFAULT_GATES.level)
    example = load_gates(write(tmp_path, format_of_a_file))
    assert None not in (example.calibration, example.of("latency_s/total").noise)
    assert set(METRIC_KINDS) <= set(text.partition("Metrics begin with")[2].partition(".\n")[0].split("`"))
    for place in (ROOT / "README.md", ROOT / "bench/compare_cli.py"):
        assert "docs/gates.md" in place.read_text(encoding="utf-8")


def test_the_built_in_gates_judge_what_a_suite_measures() -> None:
    for metric in ("segm/AP", "bbox/AP", "latency_s/total", "peak_memory_bytes/rss", "num_parameters", "flops"):
        assert DEFAULT_GATES.of(metric) is not None
    assert DEFAULT_GATES.of("num_images") is None
