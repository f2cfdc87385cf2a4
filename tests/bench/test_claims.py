from __future__ import annotations

from pathlib import Path

import pytest

from bench.claims import LOCK_NAME, check_lock, load_claims, lock_text
from bench.diffbench import main
from bench.errors import BenchError, SuiteErrors

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = ROOT / "suites/claims"

# Typed from the published tables, apart from the claim files: (data, split, backbone) -> values at 1 and 4 steps.
DIFFUSIONINST = {
    ("coco", "val2017", "resnet50"): (37.3, 37.5),
    ("coco", "val2017", "resnet101"): (41.0, 41.1),
    ("coco", "val2017", "swin_b"): (46.6, 46.8),
    ("coco", "val2017", "swin_l"): (47.8, 47.8),
    ("coco", "test-dev2017", "resnet50"): (37.1, None),
    ("coco", "test-dev2017", "resnet101"): (41.5, None),
    ("coco", "test-dev2017", "swin_b"): (47.6, None),
    ("coco", "test-dev2017", "swin_l"): (48.3, None),
    ("lvis", "val", "resnet50"): (22.3, None),
    ("lvis", "val", "resnet101"): (27.0, None),
    ("lvis", "val", "swin_b"): (36.0, None),
}
SUPERSEDED = {
    ("coco", "val2017", "resnet50"): (35.1, 35.5),
    ("coco", "val2017", "resnet101"): (36.3, 36.5),
    ("coco", "val2017", "swin_b"): (44.0, 44.2),
    ("lvis", "val", "resnet101"): (24.6, None),
    ("lvis", "val", "swin_b"): (34.8, None),
}
DIFFUSIONDET = {
    ("coco", "val2017", "resnet50"): (45.5, 46.1),
    ("coco", "val2017", "resnet101"): (46.6, 46.9),
    ("coco", "val2017", "swin_b"): (52.3, 52.7),
    ("lvis", "val", "resnet50"): (30.4, 31.8),
    ("lvis", "val", "resnet101"): (31.9, 32.9),
    ("lvis", "val", "swin_b"): (40.6, 41.9),
}
DETECTRON2 = {"resnet50": (41.0, 37.2, 0.043, 3.4), "resnet101": (42.9, 38.6, 0.056, 4.6)}
OTHER_PAPER = {"SimCLR": (60.6, 61.9, 64.0, 65.3, 66.1), "SimCLR + MACL": (61.6, 64.3, 65.2, 66.5, 66.9)}
TRAINING = {"GPUs": 8, "h": 26, "images": 32}

GOOD = """\
source: {name: a README, kind: readme, url: 'https://example.org', revision: r1, date: 2023-01-03, place: its table}
defaults:
  quantity: mask AP
  unit: AP
  metric: segm/AP
  method: M
  dataset: coco
groups:
  - name: val
    common:
      split: val2017
      images: 5000
      evidence: weights
      weights_file: m.safetensors
      config: public
      tolerance_within: 0.4
      tolerance_sampling: 1.0
      tolerance_basis: a choice
    claims:
      - {id: one, value: 37.3, sampling_steps: 1, superseded: [{value: 35.1, since: 2022-12-09, until: 2022-12-22}]}
      - {id: four, value: 37.5, sampling_steps: 4, images: 100}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.yaml").write_text(GOOD)
    return tmp_path


def _steps(name: str) -> dict[tuple[str, str, str | None], dict[int | None, float]]:
    found: dict[tuple[str, str, str | None], dict[int | None, float]] = {}
    for claim in load_claims(CLAIMS).values():
        fields = claim.fields
        if claim.place.file is not None and claim.place.file.stem == name:
            found.setdefault((fields.dataset, fields.split, fields.backbone), {})[fields.sampling_steps] = fields.value
    return found


@pytest.mark.parametrize(("name", "table"), [("diffusioninst", DIFFUSIONINST), ("diffusiondet", DIFFUSIONDET)])
def test_every_number_of_the_tables_is_in_the_claim_files(name: str, table: dict[tuple, tuple]) -> None:
    expected = {
        key: {step: value for step, value in zip((1, 4), values) if value is not None} for key, values in table.items()
    }
    assert _steps(name) == expected


def test_every_superseded_number_is_there_with_its_days() -> None:
    found: dict[tuple[str, str, str | None], dict[int | None, float]] = {}
    for claim in load_claims(CLAIMS).values():
        for old in claim.earlier():
            assert old.id == f"{claim.id}@2022-12-22"
            assert old.source.date == "2022-12-09"
            assert old.fields.value != claim.fields.value
            key = (old.fields.dataset, old.fields.split, old.fields.backbone)
            found.setdefault(key, {})[old.fields.sampling_steps] = old.fields.value
    expected = {
        key: {step: value for step, value in zip((1, 4), values) if value is not None}
        for key, values in SUPERSEDED.items()
    }
    assert found == expected


def test_the_baseline_of_detectron2_is_there() -> None:
    claims = [claim.fields for claim in load_claims(CLAIMS).values() if claim.fields.engine == "detectron2"]
    order = ("box AP", "mask AP", "inference time", "training memory")
    found = {
        backbone: tuple(next(c.value for c in claims if (c.backbone, c.quantity) == (backbone, what)) for what in order)
        for backbone in DETECTRON2
    }
    assert found == DETECTRON2
    assert len(claims) == 8


def test_the_table_of_the_other_paper_is_there_as_what_it_is() -> None:
    claims = [claim for claim in load_claims(CLAIMS).values() if claim.id.startswith("other-")]
    found = {
        method: tuple(claim.fields.value for claim in claims if claim.fields.method == method) for method in OTHER_PAPER
    }
    assert found == OTHER_PAPER
    assert [claim.fields.column for claim in claims[:5]] == [f"batch size {2**n}" for n in range(7, 12)]
    assert all("another paper" in claim.fields.contradicted for claim in claims)
    assert all("2207.07874" in claim.source.note for claim in claims)


def test_the_cost_of_training_is_there() -> None:
    claims = [claim.fields for claim in load_claims(CLAIMS).values() if claim.source.kind == "paper"]
    assert {claim.unit: claim.value for claim in claims} == TRAINING


def test_nothing_else_is_claimed() -> None:
    claims = load_claims(CLAIMS)
    assert len(claims) == 15 + 12 + 8 + 10 + 3
    assert sum(len(claim.superseded) for claim in claims.values()) == 8


def test_values_are_written_as_published() -> None:
    claims = load_claims(CLAIMS)
    shown = [claims[name].value_text for name in ("diffinst-coco-val-r101-1", "detectron2-r50-latency")]
    assert shown == ["41.0", "0.043"]
    assert claims["diffinst-training-hours"].value_text == "26"


def test_own_fields_win_over_the_groups_and_those_over_the_files(folder: Path) -> None:
    one, four = load_claims(folder).values()
    assert (one.fields.images, four.fields.images) == (5000, 100)
    assert (one.fields.quantity, one.fields.split, one.source.date) == ("mask AP", "val2017", "2023-01-03")
    assert (four.place.line, one.superseded[0].value) == (21, 35.1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value: 37.3", "value: '37.3'", "good.yaml:20:26: groups[0].claims[0].value: '37.3' is not allowed"),
        ("value: 37.3", "valeu: 37.3", "valeu: unknown key"),
        ("id: four", "id: one", "'one' is there already, in "),
        ("id: four", "id: Four", "needs an id of up to 64 small letters"),
        ("kind: readme", "kind: blog", "good.yaml:1:32: source.kind: 'blog' is not allowed. Allowed: readme"),
        ("date: 2023-01-03", "date: January", "source.date: 'January' is not allowed. Allowed: a day as 2022-12-31"),
        (", date: 2023-01-03", "", "good.yaml:1:9: source.date: is needed. Allowed: a day as 2022-12-31, or unknown"),
        (", revision: r1", "", "source.revision: is needed. Allowed: a commit or version, or unknown"),
        (
            "revision: r1",
            "revision: ''",
            "source.revision: '' is not allowed. Allowed: a commit or version, or unknown",
        ),
        (", place: its table", "", "source.place: is needed. Allowed: a table or section"),
        (", url: 'https://example.org'", "", "source.url: is needed"),
        ("until: 2022-12-22", "until: 2022-12-01", "since 2022-12-09 is after until 2022-12-01"),
        (", until: 2022-12-22", "", "superseded[0]: needs until too"),
        ("metric: segm/AP", "metric: segm/APx", "metric 'segm/APx' is not measured"),
        ("tolerance_within: 0.4", "tolerance_within: 1.4", "tolerance_within 1.4 is above tolerance_sampling 1.0"),
        ("      tolerance_basis: a choice\n", "", "needs tolerance_basis, as its evidence is weights"),
        ("evidence: weights", "evidence: none", "needs why_not, as its evidence is none"),
        ("evidence: weights", "evidence: training", "needs iterations, batch_size, as its evidence is training"),
        ("config: public", "config: partly", "needs assumed, as its config is partly"),
        ("defaults:", "defaults:\n  value: 3.0", "good.yaml:3:3: defaults.value: belongs to one claim"),
        ("groups:", "group:", "groups: needs a list of groups"),
        ("value: 37.5, ", "", "claims[1]: needs value, the published number"),
        ("images: 100", "images: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named_with_their_place(folder: Path, old: str, new: str, message: str) -> None:
    (folder / "good.yaml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(SuiteErrors) as caught:
        load_claims(folder)
    assert message in str(caught.value)
    assert all(line.startswith(f"{folder}/good.yaml:") for line in str(caught.value).splitlines())


def test_what_is_not_known_of_a_source_is_said_so(folder: Path) -> None:
    text = GOOD.replace("revision: r1", "revision: unknown").replace("date: 2023-01-03", "date: unknown", 1)
    (folder / "good.yaml").write_text(text)
    sources = {(claim.source.revision, claim.source.date) for claim in load_claims(folder).values()}
    assert sources == {("", "")}


def test_all_mistakes_at_once_over_all_files(folder: Path) -> None:
    (folder / "good.yaml").write_text(GOOD.replace("37.3", "much").replace("37.5", "more"))
    (folder / "other.yaml").write_text("source: {}\n")
    with pytest.raises(SuiteErrors) as caught:
        load_claims(folder)
    text = str(caught.value)
    assert [part in text for part in ("good.yaml:20:", "good.yaml:21:", "other.yaml:1:", "'much'", "'more'")] == [
        True
    ] * 5


def test_a_folder_without_claims_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no claim files. Give the folder"):
        load_claims(tmp_path)


class TestLock:
    def test_the_project_is_locked(self) -> None:
        assert check_lock(CLAIMS) == []
        assert (CLAIMS / LOCK_NAME).read_text() == lock_text(CLAIMS)

    def test_a_flipped_digit_is_named_with_file_and_line(self, folder: Path) -> None:
        (folder / LOCK_NAME).write_text(lock_text(folder))
        (folder / "good.yaml").write_text(GOOD.replace("37.3", "37.8"))
        (found,) = check_lock(folder)
        number = next(i for i, line in enumerate(lock_text(folder).splitlines(), 1) if "[one].value" in line)
        name = "groups[val].claims[one].value"
        assert str(found) == f"{folder}/good.yaml:20: {name}: 37.8, but claims.lock:{number} has 37.3"

    @pytest.mark.parametrize(
        ("old", "new"),
        [("35.1", "35.7"), ("tolerance_within: 0.4", "tolerance_within: 0.9"), ("2022-12-22", "2022-12-23")],
    )
    def test_every_value_is_locked(self, folder: Path, old: str, new: str) -> None:
        (folder / LOCK_NAME).write_text(lock_text(folder))
        (folder / "good.yaml").write_text(GOOD.replace(old, new))
        (found,) = check_lock(folder)
        assert new.rpartition(" ")[2].strip('"') in str(found)

    def test_added_and_removed_claims_are_named(self, folder: Path) -> None:
        (folder / LOCK_NAME).write_text(lock_text(folder))
        lines = GOOD.splitlines(keepends=True)
        (folder / "good.yaml").write_text("".join(lines[:-1]) + "      - {id: two, value: 37.4}\n")
        text = "\n".join(map(str, check_lock(folder)))
        assert 'good.yaml:21: groups[val].claims[two].id: "two" is not in claims.lock' in text
        assert "claims[four].value: 37.5 is no longer in the claim files" in text

    def test_comments_and_layout_are_free(self, folder: Path) -> None:
        (folder / LOCK_NAME).write_text(lock_text(folder))
        (folder / "good.yaml").write_text("# a comment\n\n" + GOOD.replace("  value", " value"))
        assert check_lock(folder) == []

    def test_a_change_on_purpose(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        assert main(["claims", "--lock", "--claims", str(folder)]) == 0
        (folder / "good.yaml").write_text(GOOD.replace("37.3", "37.8"))
        assert len(check_lock(folder)) == 1
        capsys.readouterr()
        assert main(["claims", "--lock", "--claims", str(folder)]) == 0
        assert "[one].value: 37.8, but claims.lock:" in capsys.readouterr().out
        assert check_lock(folder) == []

    def test_without_a_lock(self, folder: Path) -> None:
        (found,) = check_lock(folder)
        assert "cannot be read. Make it with: diffbench claims --lock" in str(found)
