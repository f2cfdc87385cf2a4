from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare import Comparison, Outcome, Row
from bench.report.comparison import MAX_ROWS, WRITERS, summary, to_github, to_json, to_junit, to_markdown, to_text

WORSE = Row(
    "quickstart",
    "sampling_steps=4",
    "latency_s/total",
    Outcome.WORSE,
    base=0.010,
    head=0.0112,
    unit="s",
    change=0.12,
    low=0.08,
    high=0.16,
    smallest=0.05,
    p_value=1e-6,
    reason="samples, noise floor",
    machine="box",
    path="results/quickstart/box/1.json",
)
NOISY = Row(
    "quickstart",
    "sampling_steps=1",
    "segm/AP",
    Outcome.NOISY,
    base=0.30,
    head=0.29,
    unit="fraction",
    is_ratio=False,
    change=-0.01,
    low=-0.03,
    high=0.01,
    smallest=0.021,
    reason="images",
)
SAME = Row("quickstart", "sampling_steps=1", "flops", Outcome.SAME, base=1e9, head=1e9, change=0.0, reason="equal")
MISSING = Row("quickstart", "sampling_steps=8 seed=0", "", Outcome.MISSING, reason="in base only")
ALL = Comparison((NOISY, SAME, MISSING, WORSE), ("torch 2.13.0 and 2.14.1",))
NASTY = "a|b\n::error::x %0A <script>alert(1)</script> \x1b[31m @someone `x` ]]> & \"'\u202e"
BAD_ROW = Row(NASTY, NASTY, f"segm/{NASTY}", Outcome.WORSE, 1.0, 2.0, NASTY, reason=NASTY, machine=NASTY, path=NASTY)
BAD = Comparison((BAD_ROW,), (NASTY,))


def test_summary() -> None:
    assert summary(ALL) == "regression (exit code 1): 1 worse, 1 missing, 1 too noisy to tell, 1 same"
    assert summary(Comparison(())) == "cells or metrics are missing or extra (exit code 3): nothing was compared"


def test_text_tells_the_gravest_first_and_leaves_out_what_is_the_same() -> None:
    lines = to_text(ALL).splitlines()
    assert lines[0] == "note: torch 2.13.0 and 2.14.1"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["worse", "missing", "too noisy to tell"]
    assert "10.0 ms  11.2 ms  +12.0 % [+8.0 %, +16.0 %]  5.0 %      samples, noise floor" in lines[2]
    assert "30.0     29.0     -1.00 [-3.00, +1.00]       2.10       images" in lines[4]
    assert lines[-1] == summary(ALL)
    assert len(lines) == 6


def test_markdown() -> None:
    text = to_markdown(ALL)
    assert text.startswith("### Comparison: regression (exit code 1): 1 worse,")
    row = next(line for line in text.splitlines() if line.startswith("| worse"))
    assert row == (
        "| worse | quickstart (box) | sampling_steps=4 | latency_s/total | 10.0 ms | 11.2 ms "
        "| +12.0 % \\[+8.0 %, +16.0 %\\] | 5.0 % | samples, noise floor |"
    )
    assert "- torch 2.13.0 and 2.14.1" in text


def test_json_has_everything() -> None:
    content = json.loads(to_json(ALL))
    assert (content["version"], content["exit_code"], content["counts"]["worse"]) == (1, 1, 1)
    assert [row["outcome"] for row in content["rows"]] == ["too noisy to tell", "same", "missing", "worse"]
    assert content["rows"][3]["head"] == 0.0112


def test_junit() -> None:
    (suite,) = ElementTree.fromstring(to_junit(ALL))
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]
    assert [[child.tag for child in case] for case in suite] == [["skipped"], [], ["error"], ["failure"]]
    assert suite[3].get("classname") == "quickstart.box"
    assert suite[3][0].get("message") == (
        "worse, latency_s/total 10.0 ms -> 11.2 ms, +12.0 % [+8.0 %, +16.0 %], samples, noise floor"
    )


COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def check_junit(text: str) -> ElementTree.Element:
    """What tools that read JUnit files rely on: the elements, their attributes, and counts that are right."""
    assert text.startswith("<?xml version='1.0'")
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    assert {suite.tag for suite in root} == {"testsuite"}
    for element, cases in (
        (root, [case for suite in root for case in suite]),
        *((suite, list(suite)) for suite in root),
    ):
        assert element.get("name") is not None
        assert element.get("tests") == str(len(cases)) != "0"
        for attribute, tag in COUNTED.items():
            assert element.get(attribute) == str(len([case for case in cases if case.find(tag) is not None]))
        for case in cases:
            assert (case.tag, set(case.attrib)) == ("testcase", {"classname", "name"})
            assert len(case) <= 1
            for child in case:
                expected = {"message"} if child.tag == "skipped" else {"message", "type"}
                assert (child.tag in COUNTED.values(), set(child.attrib)) == (True, expected)
    return root


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(Outcome)), st.text()), max_size=8))
def test_junit_counts_what_it_holds(cells: list[tuple[str, Outcome, str]]) -> None:
    rows = tuple(Row(suite, text, "segm/AP", outcome, reason=text) for suite, outcome, text in cells)
    root = check_junit(to_junit(Comparison(rows)))
    assert sum(len(suite) for suite in root) == max(1, len(rows))


def test_a_junit_file_of_nothing_does_not_pass() -> None:
    root = check_junit(to_junit(Comparison(())))
    assert root.get("errors") == "1"
    assert root[0][0][0].get("message") == "missing, nothing was compared"


def test_github_annotations() -> None:
    assert to_github(ALL).splitlines() == [
        "::warning title=too noisy to tell%3A quickstart segm/AP::sampling_steps=1: too noisy to tell, "
        "segm/AP 30.0 -> 29.0, -1.00 [-3.00, +1.00], seen from 2.10, images",
        "::error title=missing%3A quickstart::sampling_steps=8 seed=0: missing, in base only",
        "::error file=results/quickstart/box/1.json,title=worse%3A quickstart latency_s/total::sampling_steps=4: "
        "worse, latency_s/total 10.0 ms -> 11.2 ms, +12.0 %25 [+8.0 %25, +16.0 %25], samples, noise floor",
        f"::error title=diffbench compare::{summary(ALL)}",
    ]
    assert to_github(Comparison((SAME,))).startswith("::notice title=diffbench compare::no regression")
    assert (
        to_github(Comparison((NOISY,))).splitlines()[-1].startswith("::warning title=diffbench compare::inconclusive")
    )


def test_benchmarks_are_shown_in_milliseconds() -> None:
    row = Row("benchmarks", "a", "benchmark_s/a", Outcome.BETTER, 0.25, 1.25e-5, "s", change=-0.99995)
    assert "250 ms" in to_text(Comparison((row,)))
    assert "0.0125 ms" in to_text(Comparison((row,)))


def test_long_tables_are_cut_for_people_and_say_so() -> None:
    many = Comparison((MISSING,) * (MAX_ROWS + 7))
    assert "... and 7 more, all of them with --format json" in to_text(many)
    assert "... and 7 more" in to_markdown(many)
    assert len(json.loads(to_json(many))["rows"]) == MAX_ROWS + 7


def test_nothing_escapes_its_place() -> None:
    text = to_text(BAD)
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4
    markdown = to_markdown(BAD)
    assert "<script>" not in markdown.replace("\\<", "")
    assert "@s" not in markdown
    assert [line.count(" | ") for line in markdown.splitlines() if line.startswith("| worse")] == [8]
    assert [line[:7] for line in to_github(BAD).splitlines()] == ["::error", "::error"]
    command = to_github(BAD).splitlines()[0]
    assert "%250A" in command
    assert command.count(",") == command.split("::", 2)[2].count(",") + 1  # one, between file and title
    (suite,) = ElementTree.fromstring(to_junit(BAD))
    assert "<script>" in (suite[0][0].get("message") or "")


@given(st.text(), st.sampled_from(list(Outcome)), st.sampled_from(sorted(WRITERS)))
def test_any_text_can_be_written(text: str, outcome: Outcome, name: str) -> None:
    row = Row(text, text, f"segm/{text}", outcome, 1.0, 2.0, text, reason=text, machine=text, path=text)
    written = WRITERS[name](Comparison((row,), (text,)))
    if name == "junit":
        ElementTree.fromstring(written)
    if name == "json":
        json.loads(written)
    if name == "github":
        assert all(line.startswith("::") for line in written.splitlines())


@pytest.mark.parametrize("name", WRITERS)
def test_a_comparison_of_nothing_can_be_written(name: str) -> None:
    assert WRITERS[name](Comparison(()))
