"""The workflows for GitHub Actions: valid, of known actions, and with commands and options that exist."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from bench import cli, diffbench

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / ".github/workflows/ci.yml", ROOT / "docs/compare-workflow.yml")
ACTIONS = {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        yield from job["steps"]


def scripts(path: Path) -> list[str]:
    return [step["run"] for step in steps(path) if "run" in step]


def commands(path: Path, program: str) -> Iterator[list[str]]:
    """The arguments of each call of a program, lines that go on joined."""
    for script in scripts(path):
        for line in script.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;", line):
                words = part.split()
                names = ["" if "=" in word else word.lstrip("$").rpartition("/")[2] for word in words]
                if program in names:
                    yield words[names.index(program) + 1 :]


def options_of(app: typer.Typer, name: str | None = None) -> set[str]:
    command: Any = typer.main.get_command(app)
    if name is not None:
        assert name in command.commands, f"diffbench has no command {name}"
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_step_runs_something_known(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content[True]  # YAML 1.1 reads `on` as true
    for step in steps(path):
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert action in ACTIONS
            assert re.fullmatch(r"v\d+", version)
    assert not re.findall(r"https?://(?!github\.com/)", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_options_and_files_of_every_command_exist(path: Path) -> None:
    called = 0
    for name, *arguments in commands(path, "diffbench"):
        known = options_of(diffbench.app, name)
        assert {word for word in arguments if word.startswith("--")} <= known, name
        called += 1
    for arguments in commands(path, "run-suite"):
        assert {word for word in arguments if word.startswith("--")} <= options_of(cli.app)
        called += 1
    assert called >= 3
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    for arguments in commands(path, "tox"):
        if "-e" in arguments:
            assert f"testenv:{arguments[arguments.index('-e') + 1]}" in tox
    for file in re.findall(r"[\w./-]*\b(?:tests|suites)/[\w/.-]+|constraints\.txt", path.read_text()):
        assert (ROOT / file.removeprefix("../base/")).exists(), file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_scripts_are_valid_bash(path: Path) -> None:
    for script in scripts(path):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_an_inconclusive_comparison_passes(path: Path) -> None:
    """Where an exit code is let through, it is 6; a JUnit file is written beside a comparison that does fail."""
    for script in scripts(path):
        for line in script.replace("\\\n", " ").splitlines():
            if "diffbench" in line and ("compare" in line or "race" in line.split()):
                assert line.rstrip().endswith("|| test $? -eq 6" if "--format github" in line else "|| true")
                assert "--format github" in line or "--format junit" in line
