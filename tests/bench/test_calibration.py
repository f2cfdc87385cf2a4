from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_records import MACHINE, timed_record, timed_run

from bench.calibration import Floor, Noise, calibrate, dump_calibration, load_calibration
from bench.errors import BenchError, SuiteErrors

LATENCY = "latency_s/total"


def run(latency_s: float, *, ap: float = 0.25, seed: int = 0, **axes: Any) -> list[dict[str, Any]]:
    record = timed_record(ap=ap, generator=np.random.default_rng(seed))
    record["metrics"][LATENCY]["value"] = latency_s
    record["axes"] |= axes
    return [record]


def test_floors_by_hand() -> None:
    # Logarithms -1, 0 and 1 around 0.01: variance 1.
    runs = [run(0.01 * math.exp(power), seed=number) for number, power in enumerate((-1, 0, 1))]
    floors = calibrate(runs, "abc").machines[MACHINE]
    assert floors[LATENCY].noise == pytest.approx(1.0)
    assert (floors[LATENCY].degrees_of_freedom, floors[LATENCY].scale, floors[LATENCY].cells) == (2, "log", 1)
    assert floors["peak_memory_bytes/rss"].noise == 0
    assert floors["segm/AP"] == Floor(noise=0.0, degrees_of_freedom=2, scale="absolute")
    assert "num_parameters" not in floors
    assert "num_images" not in floors


def test_cells_are_pooled_by_their_variances() -> None:
    spreads = {1: 0.1, 2: 0.3}
    runs = []
    for number, power in enumerate((-1, 0, 1)):
        cells = [run(0.01 * math.exp(power * spread), seed=number)[0] for spread in spreads.values()]
        for cell, steps in zip(cells, spreads):
            cell["axes"] = {"sampling_steps": steps, "seed": 0}
        runs.append(cells)
    found = calibrate(runs, "abc").machines[MACHINE][LATENCY]
    assert found.noise == pytest.approx(math.sqrt((0.01 + 0.09) / 2))
    assert (found.degrees_of_freedom, found.cells) == (2, 2)  # runs less one, however many cells


def test_ap_varies_over_evaluation_seeds() -> None:
    runs = [
        [run(0.01, ap=ap, seed=number, eval_seed=seed)[0] for seed, ap in enumerate((0.20, 0.22, 0.24, 0.26))]
        for number in range(3)
    ]
    found = calibrate(runs, "abc").machines[MACHINE]["segm/AP"]
    assert found.noise == pytest.approx(math.sqrt(0.002 / 3))
    assert found.degrees_of_freedom == 3


def test_suites_with_the_same_axes_are_apart() -> None:
    def both(number: int) -> list[dict[str, Any]]:
        one, two = run(0.01, ap=0.2, seed=number)[0], run(0.01 * math.exp(number), ap=0.4, seed=9 + number)[0]
        return [one, two | {"suite": "other"}]

    found = calibrate([both(number) for number in range(3)], "abc")
    floors = found.machines[MACHINE]
    assert (floors[LATENCY].cells, floors[LATENCY].noise) == (2, pytest.approx(math.sqrt((0 + 1) / 2)))
    # Neither suite's AP varies; that they differ from each other is no noise.
    assert (floors["segm/AP"].cells, floors["segm/AP"].noise) == (2, 0.0)
    turned = calibrate([both(number)[::-1] for number in range(3)], "abc")
    assert turned.machines[MACHINE][LATENCY] == floors[LATENCY]


def test_what_differs_in_luck_only_is_estimated_well() -> None:
    generator = np.random.default_rng(0)
    found = [calibrate([timed_run(generator) for _ in range(6)], "abcdef") for _ in range(200)]
    noises = [noise.machines[MACHINE][LATENCY].noise for noise in found]
    # 3 % between runs, and the share of 60 samples within one: 1.2533 * 5 % / sqrt(60).
    assert np.sqrt(np.mean(np.square(noises))) == pytest.approx(math.hypot(0.03, 0.0081), rel=0.05)


def test_machine_classes_are_apart() -> None:
    runs = [
        [*run(0.01 + 0.001 * number, seed=number), timed_record(machine="big", generator=np.random.default_rng(number))]
        for number in range(3)
    ]
    assert set(calibrate(runs, "abc").machines) == {MACHINE, "big"}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_runs_are_refused(count: int) -> None:
    with pytest.raises(BenchError, match=f"{count} runs? on {MACHINE}, at least 3 are needed"):
        calibrate([run(0.01, seed=number) for number in range(count)], "ab")


def test_no_records_are_refused() -> None:
    with pytest.raises(BenchError, match="no records"):
        calibrate([], [])


def changed(runs: list[list[dict[str, Any]]], what: str) -> list[list[dict[str, Any]]]:
    last = runs[-1][0]
    if what == "cell":
        last["axes"] = {"sampling_steps": 9, "seed": 0}
    elif what == "protocol":
        last["measure"] = last["measure"] | {"latency_seconds": 9.0}
    elif what == "commit":
        last["environment"] |= {"commit": "fedcba9876543210"}
    elif what == "failed":
        last |= {"status": "failed", "reason": "killed"}
    elif what == "copy":
        runs[-1] = runs[0]
    return runs


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cell", "cell '.*' is in .*, not in .*. Give runs of the same suite"),
        ("protocol", r"a and c differ in more than luck, in cell '.*': measure.latency_seconds 3 and 9"),
        ("commit", "commit 0123456789 and fedcba9876"),
        ("failed", "cell '.*' of c failed. Run it again"),
        ("copy", "a and c hold the same samples. Give each run once"),
    ],
)
def test_runs_that_are_no_repetitions_are_refused(what: str, message: str) -> None:
    runs = changed([run(0.01, seed=number) for number in range(3)], what)
    with pytest.raises(BenchError, match=message):
        calibrate(runs, "abc")


def test_the_floor_of_two_machines_is_the_larger_one_and_none_if_one_is_unknown() -> None:
    small, large = (Floor(noise=noise, degrees_of_freedom=4, scale="log") for noise in (0.01, 0.02))
    noise = Noise({"a": {LATENCY: small}, "b": {LATENCY: large}})
    assert noise.of(["a", "b"], LATENCY) == large
    assert noise.of(["a", "c"], LATENCY) is None
    assert noise.of([], LATENCY) is None


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_gives_the_floors_back(tmp_path: Path, suffix: str) -> None:
    floors = {LATENCY: Floor(noise=1.25e-07, degrees_of_freedom=4, scale="log", cells=9)}
    noise = Noise({"some: machine": floors, "another": {"segm/AP": Floor(noise=0, degrees_of_freedom=1, scale="log")}})
    path = tmp_path / f"calibration{suffix}"
    path.write_text(dump_calibration(noise, suffix))
    assert load_calibration(path) == noise


BAD = """\
version: 1
machine: {}
machines:
  box:
    latency_s/total: {noise: -1, degrees_of_freedom: 4, scale: log}
    segm/AP: {noise: 0.1, degrees_of_freedom: 4}
  other: 3
"""


def test_all_mistakes_of_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    path.write_text(BAD)
    with pytest.raises(SuiteErrors) as caught:
        load_calibration(path)
    assert [str(error).removeprefix(str(path)) for error in caught.value.errors] == [
        ":2:1: machine: unknown key. Allowed: version, machines. Did you mean 'machines'?",
        ":5:30: machines.box.latency_s/total.noise: -1 is not allowed. Allowed: a number of at least 0",
        ":6:14: machines.box.segm/AP: needs scale",
        ":7:10: machines.other: needs a mapping from metrics to floors",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "gates: {}\n", "no calibration file"),
        ("c.yaml", "version: 2\n", "version: 2 is not allowed. Allowed: 1"),
        ("c.yaml", "version: 1\n", "machines: needs a mapping"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "[" * 100_000, "not valid JSON"),
        ("c.json", "[1, 2]", "no calibration file"),
        ("c.json", '{"version": 1, "machines": {"box": {"flops": {"noise": "x"}}}}', "'x' is not allowed"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SuiteErrors, match=message):
        load_calibration(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SuiteErrors, match=r"cannot be read \(No such file or directory\). Write it with diffbench"):
        load_calibration(tmp_path / "calibration.yaml")
