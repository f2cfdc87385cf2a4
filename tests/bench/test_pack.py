from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import block_mask, rle_of, tiny_content, write_set
from fake_worker import LIKE_A_PATH
from lvis_files import tiny_lvis, write_lvis
from run_records import make_record

from bench.archive import write_archive
from bench.diffbench import main
from bench.fingerprints import Fingerprints
from bench.measure.accuracy import measure_accuracy
from bench.plan import Node, build_plan, make_id
from bench.record import dump_json, load_record, metric, pack_resamples
from bench.store import NodeResult, Store
from bench.suite import Suite, load_suite
from bench.verify_pack import compare_outputs
from diffinst.config import DataConfig
from diffinst.evaluation.predictions import PredictionWriter, iter_predictions
from diffinst.evaluation.scoring import score_split

ROOT = Path(__file__).parents[2]
MACHINE = "some-cpu"
# Of a metric that scoring does not resample, so that it is not drawn again.
RESAMPLES = {"segm/APx": {"of": "images", "images": "0", "num_images": 3, "seed": 0, "count": 3, "values": LIKE_A_PATH}}
DATA = DataConfig(
    dataset="custom",
    val_annotations="set/instances.json",
    val_images="set/images",
    train_annotations="set/instances.json",
    train_images="set/images",
)


def write_node(store: Store, kind: str, spec: dict[str, Any], inputs: list[str], files: dict[str, int]) -> str:
    node_id = f"{kind}-0123456789abcdef"
    done = NodeResult(
        id=node_id,
        kind=kind,
        spec=spec,
        inputs=inputs,
        started_at="2026-01-02T03:04:05Z",
        finished_at="2026-01-02T03:04:06Z",
        duration_s=1.0,
        attempts=1,
        files=files,
        outputs={"from": str(store.root.resolve()), **({"resamples": RESAMPLES} if kind == "score" else {})},
        environment={"home": str(Path.home() / "secret")},
    )
    folder = store.folder(node_id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(dump_json(done.model_dump()))
    return node_id


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `set/`, and in `results/` one scored run of it: half of the truth, slightly off."""
    monkeypatch.chdir(tmp_path)
    annotations, _ = write_set(tmp_path / "set", tiny_content())
    store = Store(tmp_path / "results")
    predictions = store.folder("predict-0123456789abcdef") / "predictions"
    with PredictionWriter(predictions) as writer:
        for image_id in (5, 8, 11):
            mask = [[0] * 30 for _ in range(20)]
            for y in range(4, 14):
                mask[y][3:12] = [1] * 9
            writer.add(
                {
                    "image_id": image_id,
                    "category_id": [7, 3],
                    "score": [0.9, 0.4],
                    "bbox": [[3.0, 4.0, 9.0, 10.0], [9.0, 2.0, 20.0, 6.0]],
                    "segmentation": [rle_of(np.array(mask)), rle_of(np.array(mask))],
                }
            )
    shard = next(predictions.glob("*.jsonl"))
    data = write_node(store, "dataset", {}, [], {})
    predict = write_node(store, "predict", {}, [data], {f"predictions/{shard.name}": shard.stat().st_size})
    score = write_node(store, "score", {"iou_types": ["bbox", "segm"]}, [predict, data], {})
    scores = score_split(DATA, annotations, iter_predictions(predictions))
    assert scores.metrics["segm/AP"]
    record = make_record(
        config={"data": DATA.model_dump(mode="json")},
        nodes={"dataset": data, "predict": predict, "score": score},
        metrics={
            **{name: metric(name, value, scores.reasons.get(name)) for name, value in scores.metrics.items()},
            "num_images": metric("num_images", scores.num_images),
            "num_instances": metric("num_instances", scores.num_instances),
        },
        per_class={f"{name}/AP": values for name, values in scores.per_class.items()},
        resamples=RESAMPLES,
    )
    store.write_record(record, MACHINE)
    return tmp_path


def pack(*arguments: str, out: str = "x.zip") -> int:
    return main(["pack", "results/steps", "--data-root", ".", "--out", out, *arguments])


def packed_files(name: str = "x.zip") -> dict[str, bytes]:
    with zipfile.ZipFile(name) as found:
        return {entry: found.read(entry) for entry in found.namelist()}


def rewrite(changes: dict[str, bytes | None], *, without: tuple[str, ...] = ()) -> None:
    """x.zip as y.zip, with other content (None: without the file) and a manifest that fits, some keys left out."""
    files: dict[str, bytes | Path] = {**packed_files()}
    manifest = json.loads(files.pop("manifest.json"))
    for name, data in changes.items():
        files.pop(name)
        if data is not None:
            files[name] = data
    write_archive(
        Path("y.zip"), files, {key: manifest[key] for key in manifest if key not in ("version", "files", *without)}
    )


def change_record(folder: Path, **changes: Any) -> None:
    path = folder / "results" / "steps" / MACHINE / "00ff.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content["metrics"][name.replace("__", "/")]["value"] = value
    path.write_text(dump_json(content))


def test_a_pack_scores_itself_again_without_what_it_was_made_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack() == 0
    printed = capsys.readouterr().out
    (folder / "results").rename(folder / "gone")
    (folder / "set").rename(folder / "gone too")
    assert main(["verify-pack", "x.zip", "--sha256", printed.partition("sha256 ")[2].split()[0]]) == 0
    assert capsys.readouterr().out == (
        "x.zip: 10 files as packed, 1 cell scored again to the same numbers, 3 tables as the records give them\n"
    )


def test_equal_results_give_equal_bytes(folder: Path) -> None:
    assert pack() == 0
    assert pack(out="y.zip") == 0
    assert (folder / "x.zip").read_bytes() == (folder / "y.zip").read_bytes()


def test_nothing_private_and_no_image(folder: Path) -> None:
    assert pack() == 0
    with zipfile.ZipFile(folder / "x.zip") as found:
        for name in found.namelist():
            assert not name.endswith((".png", ".jpg"))
            assert str(folder).encode() not in found.read(name), name
            assert str(Path.home()).encode() not in found.read(name), name


def test_resamples_that_look_like_a_path_are_packed_as_they_are(folder: Path) -> None:
    path = folder / "results" / "steps" / MACHINE / "00ff.json"
    content = json.loads(path.read_text())
    path.write_text(dump_json(content | {"log": "/home/ann/x failed"}))  # something to scrub, so that it is dumped anew
    assert pack() == 0
    files = packed_files()
    packed, node = (
        json.loads(files[name]) for name in (f"records/{MACHINE}/00ff.json", "nodes/score-0123456789abcdef.json")
    )
    assert packed["log"] == "<path>/x failed"
    assert packed["resamples"] == RESAMPLES
    assert node["outputs"] == {"from": "<results>", "resamples": RESAMPLES}


def test_a_number_that_is_not_so_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_record(folder, segm__AP=0.25, num_images=4)
    assert pack() == 0
    capsys.readouterr()
    assert main(["verify-pack", "x.zip"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "records/some-cpu/00ff.json (sampling_steps=1 seed=0): segm/AP is 0.25 in the record, and 0."
    )
    assert lines[1].endswith("num_images is 4 in the record, and 3 scored again")
    assert main(["verify-pack", "x.zip", "--no-rescore"]) == 0


def test_a_difference_within_rounding_is_none(folder: Path) -> None:
    path = folder / "results" / "steps" / MACHINE / "00ff.json"
    value = json.loads(path.read_text())["metrics"]["segm/AP"]["value"]
    change_record(folder, segm__AP=value + 5e-10)
    assert pack() == 0
    assert main(["verify-pack", "x.zip"]) == 0
    change_record(folder, segm__AP=value + 2e-9)
    assert pack(out="y.zip") == 0
    assert main(["verify-pack", "y.zip"]) == 1


def test_annotations_that_were_left_out_are_found_and_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack("--no-annotations") == 0
    with zipfile.ZipFile(folder / "x.zip") as found:
        assert not [name for name in found.namelist() if name.startswith("annotations")]
    capsys.readouterr()
    assert main(["verify-pack", "x.zip"]) == 2
    assert "--data-root DIR" in capsys.readouterr().err
    assert main(["verify-pack", "x.zip", "--data-root", "."]) == 0
    content = tiny_content()
    content["annotations"][0]["area"] = 99
    write_set(folder / "set", content)
    capsys.readouterr()
    assert main(["verify-pack", "x.zip", "--data-root", "."]) == 1
    assert "annotations of 'custom' are not those that the archive was packed with" in capsys.readouterr().out


def test_a_record_without_its_predictions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next((folder / "results" / ".store").rglob("*.jsonl")).unlink()
    assert pack() == 2
    assert "some-cpu/00ff: its predictions are not stored in" in capsys.readouterr().err
    assert not (folder / "x.zip").exists()
    assert pack("--partial") == 0
    capsys.readouterr()
    assert main(["verify-pack", "x.zip"]) == 1
    assert "no cell could be scored again" in capsys.readouterr().out


def test_a_table_that_the_records_do_not_give_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack() == 0
    rewrite({"report/some-cpu/cells.csv": b"segm/AP\n1.0\n"})
    capsys.readouterr()
    assert main(["verify-pack", "y.zip"]) == 1
    assert capsys.readouterr().out == "report/some-cpu/cells.csv: is not what the records give\n"


def test_verifying_loads_no_torch(folder: Path) -> None:
    assert pack() == 0
    code = "import sys; from bench.diffbench import main; code = main(['verify-pack', 'x.zip']); "
    code += "print(code, [name for name in ('torch', 'torchvision', 'diffinst.model') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "results/steps", "--out", "x.tar"], "ends in .zip"),
        (["pack", "results/other", "--out", "x.zip"], "no records"),
        (["pack", "results/steps", "--out", "x.zip", "--machine", "m"], "Allowed: some-cpu"),
        (["pack", "results/steps", "--out", "x.zip", "--set", "a=1"], "--set needs a suite file"),
        (["verify-pack", "none.zip"], "none.zip: cannot be read"),
        (["verify-pack", "none.zip", "--sha256", "12"], "64 hex digits"),
    ],
)
def test_mistakes_end_in_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert folder.is_dir()


def test_none_is_overwritten(folder: Path) -> None:
    (folder / "x.zip").write_text("mine")
    assert pack() == 2
    assert (folder / "x.zip").read_text() == "mine"


PATCH = b"""\
--- /dev/null
+++ b/bench/x.py
@@ -0,0 +1 @@
+# caf\xe9
"""


def name_evidence(folder: Path, **named: tuple[str, bytes]) -> None:
    """Part of the environment -> (path in the results folder, content): the record names it, and it is written."""
    path = folder / "results" / "steps" / MACHINE / "00ff.json"
    content = json.loads(path.read_text())
    for part, (name, data) in named.items():
        content["environment"][part] = {"sha256": hashlib.sha256(data).hexdigest(), "file": name}
        source = folder / "results" / name
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(data)
    path.write_text(dump_json(content))


def test_evidence_is_packed_unchanged_and_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name_evidence(folder, diff=("provenance/1.patch", PATCH), packages_lock=("provenance/2.lock.txt", b"numpy==1\n"))
    assert pack() == 0
    files = packed_files()
    assert files["evidence/provenance/1.patch"] == PATCH
    assert files["evidence/provenance/2.lock.txt"] == b"numpy==1\n"
    assert main(["verify-pack", "x.zip"]) == 0
    rewrite({"evidence/provenance/1.patch": PATCH + b"+\n", "evidence/provenance/2.lock.txt": None})
    capsys.readouterr()
    assert main(["verify-pack", "y.zip", "--no-rescore"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("evidence/provenance/1.patch: its SHA-256 is ")
    assert lines[0].endswith(f"and records/some-cpu/00ff.json names {hashlib.sha256(PATCH).hexdigest()}")
    assert lines[1] == (
        "evidence/provenance/2.lock.txt: is not in the archive, and records/some-cpu/00ff.json names it"
    )


def test_packs_of_before_evidence_was_told_are_right_still(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They left it out in silence, or changed it."""
    name_evidence(folder, diff=("provenance/1.patch", PATCH), packages_lock=("provenance/2.lock.txt", b"numpy==1\n"))
    assert pack() == 0
    changes = {"evidence/provenance/1.patch": PATCH + b"+\n", "evidence/provenance/2.lock.txt": None}
    rewrite(changes, without=("evidence_left_out",))
    capsys.readouterr()
    assert main(["verify-pack", "y.zip", "--no-rescore"]) == 0
    assert "note: evidence/provenance/2.lock.txt: not in the archive, which is of before" in capsys.readouterr().out


def test_evidence_that_is_left_out_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name_evidence(folder, diff=(".store/provenance/1.patch", PATCH), packages_lock=("provenance/2.lock.txt", b"1"))
    (folder / "results/provenance/2.lock.txt").write_bytes(b"2")
    assert pack() == 0
    assert not [name for name in packed_files() if name.startswith("evidence/")]
    out = capsys.readouterr().out
    assert "note: evidence/.store/provenance/1.patch: left out: it is not among what may be published\n" in out
    assert "note: evidence/provenance/2.lock.txt: left out: it has changed since it was written" in out
    assert main(["verify-pack", "x.zip"]) == 0
    out = capsys.readouterr().out
    assert "note: evidence/.store/provenance/1.patch: not in the archive: it is not among" in out
    assert "note: evidence/provenance/2.lock.txt: not in the archive: it has changed" in out


SUITE = """\
name: steps
data:
  dataset: custom
  annotation_format: {format}
  train_annotations: set/{file}
  train_images: set/{images}
  val_annotations: set/{file}
  val_images: set/{images}
model: {{backbone: tiny}}
axes: {{product: {{sampling_steps: [1, 4]}}}}
measure: {{latency: false, memory: false, flops: false}}
"""


def detections(image_id: int, *found: tuple[int, float, tuple[int, int, int, int]]) -> dict[str, Any]:
    """Of (category, score, xyxy box), their masks filling their boxes."""
    return {
        "image_id": image_id,
        "category_id": [category for category, _, _ in found],
        "score": [score for _, score, _ in found],
        "bbox": [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for _, _, (x1, y1, x2, y2) in found],
        "segmentation": [rle_of(block_mask((20, 30), box)) for _, _, box in found],
    }


def store_run(folder: Path, *, is_lvis: bool = False, more: str = "") -> Suite:
    """`s.yaml` of a small set, with stored nodes and a record of each cell, as run-suite leaves them."""
    if is_lvis:
        annotations, _ = write_lvis(folder / "set", tiny_lvis())
    else:
        annotations, _ = write_set(folder / "set", tiny_content())
    names = {"format": "lvis", "images": "coco"} if is_lvis else {"format": "coco", "images": "images"}
    (folder / "s.yaml").write_text(SUITE.format(file=annotations.name, **names) + more)
    suite = load_suite(folder / "s.yaml")
    plan = build_plan(suite, contents=Fingerprints())
    store = Store(folder / "results")
    store.root.mkdir()
    with store.lock(), tempfile.TemporaryDirectory() as tables:
        for node in plan.nodes.values():
            files: dict[str, int] = {}
            if node.kind == "predict":
                with PredictionWriter(store.folder(node.id) / "predictions") as writer:
                    for image_id in (5, 8, 11):
                        writer.add(detections(image_id, (7, 0.9, (2, 4, 11, 14)), (3, 0.4, (10, 2, 30, 8))))
                shard = next((store.folder(node.id) / "predictions").glob("*.jsonl"))
                files = {f"predictions/{shard.name}": shard.stat().st_size}
            keep_node(store, node, files)
        for cell in plan.cells:
            data = DataConfig.model_validate(cell.config["data"])
            found = measure_accuracy(
                data,
                annotations,
                iter_predictions(store.folder(cell.nodes["predict"]) / "predictions"),
                Path(tables),
                iou_types=("bbox", "segm"),
            ).outputs()
            assert found["metrics"]["segm/AP"]["value"]
            changes = {key: found[key] for key in ("metrics", "per_class", "resamples")}
            stored = make_record(
                **changes,
                run_id=cell.run_id,
                label=cell.label,
                axes=cell.axes,
                config=cell.config,
                nodes=cell.nodes,
                code=cell.code,
            )
            store.write_record(stored, MACHINE)
    return suite


def keep_node(store: Store, node: Node, files: dict[str, int]) -> None:
    content = {name: getattr(node, name) for name in ("id", "kind", "spec", "spec_id", "code", "content")}
    done = NodeResult(
        **content,
        inputs=list(node.inputs),
        started_at="2026-01-02T03:04:05Z",
        finished_at="2026-01-02T03:04:06Z",
        duration_s=1.0,
        attempts=1,
        files=files,
        outputs={},
        environment={},
    )
    store.folder(node.id).mkdir(exist_ok=True)
    (store.folder(node.id) / "done.json").write_text(dump_json(done.model_dump()))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pack_suite(*arguments: str, out: str = "x.zip") -> int:
    return main(["pack", "s.yaml", "--out", out, *arguments])


@pytest.mark.parametrize("is_lvis", [False, True])
def test_the_plan_of_a_suite_has_the_nodes_of_its_records(
    here: Path, capsys: pytest.CaptureFixture[str], *, is_lvis: bool
) -> None:
    store_run(here, is_lvis=is_lvis)
    assert pack_suite() == 0
    assert "note: " not in capsys.readouterr().out
    files = packed_files()
    plan = json.loads(files["plan.json"])
    records = [json.loads(data) for name, data in files.items() if name.startswith("records/")]
    assert len(records) == 2
    in_records = {node_id for found in records for node_id in found["nodes"].values()}
    assert in_records <= {node["id"] for node in plan["nodes"]}
    assert {node_id for cell in plan["cells"] for node_id in cell["nodes"].values()} == in_records
    for node in plan["nodes"]:
        made = make_id(node["kind"], node["spec"], node["inputs"], node["code"], node["content"])
        assert made == node["id"]
        assert bool(node["content"]) == (node["kind"] == "dataset")
    for folder in ("results", "set"):
        (here / folder).rename(here / f"{folder} gone")
    assert main(["verify-pack", "x.zip"]) == 0
    assert "2 cells scored again to the same numbers" in capsys.readouterr().out


def test_a_node_that_is_not_what_its_id_says_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_run(here)
    assert pack_suite() == 0
    plan = json.loads(packed_files()["plan.json"])
    node = next(node for node in plan["nodes"] if node["kind"] == "dataset")
    node["content"] = "0123456789abcdef"
    rewrite({"plan.json": dump_json(plan).encode()})
    capsys.readouterr()
    assert main(["verify-pack", "y.zip", "--no-rescore"]) == 1
    assert capsys.readouterr().out.startswith(f"plan.json: the node {node['id']} has the id dataset-")


def test_records_of_other_files_than_todays_are_noted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_run(here)
    next((here / "set" / "images").glob("*.png")).write_bytes(b"another picture")
    assert pack_suite() == 0
    assert "note: 2 records are of other code or files than today's" in capsys.readouterr().out
    assert main(["verify-pack", "x.zip"]) == 0


def test_a_score_node_that_is_gone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack() == 0
    plan = json.loads(packed_files()["plan.json"])
    plan["nodes"] = [node for node in plan["nodes"] if node["kind"] != "score"]
    rewrite({"plan.json": dump_json(plan).encode()})
    capsys.readouterr()
    assert main(["verify-pack", "y.zip"]) == 1
    assert (
        "(sampling_steps=1 seed=0): its node score-0123456789abcdef is not in plan.json, so how to score it is not "
        "known. Pack it again where that node is stored\n"
    ) in capsys.readouterr().out
    (folder / "results/.store/score-0123456789abcdef/done.json").unlink()
    assert pack(out="z.zip") == 2
    assert "(no complete node score-0123456789abcdef; so for 1 records of some-cpu)" in capsys.readouterr().err


def test_a_machine_without_predictions_beside_one_with_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = load_record(folder / "results" / "steps" / MACHINE / "00ff.json")
    nodes = {kind: f"{kind}-ffffffffffffffff" for kind in first.nodes}
    Store(folder / "results").write_record(first.model_copy(update={"nodes": nodes}), "other-gpu")
    assert pack() == 2
    error = capsys.readouterr().err
    assert error.startswith("diffbench: other-gpu/00ff: its predictions are not stored in ")
    assert "so for 1 records of other-gpu). Run the suite here, choose a --machine that has all" in error
    assert "of its own (some-cpu), or pack the rest with --partial" in error
    assert pack("--machine", MACHINE, out="y.zip") == 0
    assert pack("--machine", "other-gpu", out="z.zip") == 2
    assert "Run the suite here, or pack it with --partial" in capsys.readouterr().err
    assert pack("--partial") == 0
    capsys.readouterr()
    assert main(["verify-pack", "x.zip"]) == 0
    out = capsys.readouterr().out
    assert "note: records/other-gpu/00ff.json (sampling_steps=1 seed=0): not scored again: no complete node" in out
    assert "1 cell scored again to the same numbers, 6 tables" in out


def test_claims_go_along_and_are_held_to_their_lock(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tie = "claims: [{claim: diffinst-coco-val-r50-1, cell: {sampling_steps: 1}}]\n"
    store_run(here, more=tie)
    assert pack_suite("--claims", "nowhere") == 2
    assert "--claims nowhere" in capsys.readouterr().err
    assert pack_suite("--claims", str(ROOT / "suites" / "claims")) == 0
    files = packed_files()
    for path in [*(ROOT / "suites" / "claims").glob("*.yaml"), ROOT / "suites" / "claims" / "claims.lock"]:
        assert files[f"claims/{path.name}"] == path.read_bytes()
    assert main(["verify-pack", "x.zip"]) == 0
    changed = files["claims/other_paper.yaml"].replace(b"value: 60.6", b"value: 90.6")
    rewrite({"claims/other_paper.yaml": changed})
    capsys.readouterr()
    assert main(["verify-pack", "y.zip", "--no-rescore"]) == 1
    assert "90.6, but claims.lock:" in capsys.readouterr().out


@pytest.mark.parametrize(("recorded", "again"), [("a", True), ("a:1", True), ("b", False), ("a:2", False)])
def test_resamples_of_before_labels_counted_are_those_of_the_same_ids(recorded: str, again: bool) -> None:
    entry = {"of": "images", "num_images": 3, "seed": 0, "count": 2, "values": pack_resamples([0.5, 0.25])}
    record = make_record(resamples={"segm/AP": entry | {"images": recorded}}, metrics={}, per_class={})
    outputs = {"metrics": {}, "per_class": {}, "resamples": {"segm/AP": entry | {"images": "a:1"}}}
    assert (list(compare_outputs(record, outputs)) == []) is again
