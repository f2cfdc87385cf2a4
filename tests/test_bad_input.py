"""What users get wrong, through the command lines: one line that names the place and the way out, code 2, nothing lost.

The mistakes in data sets are made in one suite, a cell each, beside a healthy one: so they show as well that a mistake
ends its own run only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import block_mask, rle_of, tiny_content, write_set
from lvis_files import tiny_lvis, write_lvis
from PIL import Image
from safetensors.torch import save_file

import bench.cli
import diffinst.cli
from bench.fingerprints import Fingerprints
from bench.plan import Plan, build_plan
from bench.record import RunRecord
from bench.store import Store
from bench.suite import load_suite
from diffinst.build import seeded_model
from diffinst.checkpoint import load_checkpoint, save_checkpoint
from diffinst.config import Config

ROOT = Path(__file__).resolve().parents[1]
MODEL = """{backbone: tiny, freeze_at: 0, hidden_dim: 16, num_stages: 1, num_attention_heads: 2, dim_feedforward: 16,
   dim_dynamic: 4, mask_branch_channels: 8, mask_branch_layers: 1}"""
TRAIN = "{iterations: 2, batch_size: 3, num_train_proposals: 6, warmup_iterations: 0, schedule_steps: []}"
SMALL = f"""\
name: small
model:
  {MODEL}
train: {TRAIN}
axes:
  product: {{num_proposals: [5]}}
"""


# -- helpers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line on standard error."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err[:-1]

    @property
    def mistakes(self) -> list[str]:
        """Where progress is on standard error, too: the lines that the command itself says."""
        return [line for line in self.err.splitlines() if line.startswith("run-suite: ")]


def call(main: Callable[[Sequence[str]], int], arguments: Sequence[object], capture: pytest.CaptureFixture) -> Ended:
    capture.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capture.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return Ended(code, captured.out, captured.err)


RunSuite = Callable[..., Ended]


@pytest.fixture
def run_suite(capsys: pytest.CaptureFixture) -> RunSuite:
    return lambda *arguments: call(bench.cli.main, arguments, capsys)


@pytest.fixture
def diffinst_command(capsys: pytest.CaptureFixture) -> RunSuite:
    return lambda *arguments: call(diffinst.cli.main, arguments, capsys)


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything below a folder; a folder itself counts as empty."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DIFFINST_DATASETS", raising=False)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


# -- the suite file and the options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{iterations:", "{iteration:", ":5:9: train.iteration: unknown key. .* Did you mean 'iterations'?"),
        ("axes:", "axis:", ":6:1: axis: unknown key. .* Did you mean 'axes'?"),
        (
            "num_proposals: [5]",
            "num_proposal: [5]",
            ":7:13: axes.product.num_proposal: unknown field. Allowed: a field of .* Did you mean 'num_proposals'?",
        ),
        (SMALL, "", ":1:1: not a suite. Allowed: a mapping with the keys name, .*"),
    ],
    ids=["a typo in a key", "a typo in a suite key", "an axis over an unknown field", "an empty file"],
)
def test_a_wrong_suite(suite: Path, run_suite: RunSuite, old: str, new: str, message: str) -> None:
    suite.write_text(SMALL.replace(old, new))
    results = suite.with_name("results")
    ended = run_suite(suite, "--results", results)
    assert ended.code == 2
    assert re.fullmatch(f"{suite}{message}".replace("?", r"\?"), ended.message)
    assert not results.exists()


def test_a_suite_that_is_not_utf8(suite: Path, run_suite: RunSuite) -> None:
    suite.write_bytes("name: small\ndescription: für alle\n".encode("latin-1"))
    ended = run_suite(suite)
    assert (ended.code, ended.message) == (2, f"{suite}:2:15: byte 0xfc is not UTF-8 text. Save the file as UTF-8")


def test_a_suite_that_is_not_there(suite: Path, run_suite: RunSuite) -> None:
    gone = suite.with_name("smal.yaml")
    ended = run_suite(gone)
    there = f"There: {suite}. Did you mean '{suite}'?"
    assert ended.code == 2
    assert ended.message == f"{gone}: cannot be read (No such file or directory). Give a suite file. {there}"
    folder = suite.parent
    ended = run_suite(folder)
    assert (ended.code, ended.message) == (2, f"{folder}: is a folder. Give a suite file. {there}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "iteration=5"],
            r"--set iteration=5: unknown key\. Allowed: a field of .* Did you mean 'iterations'\?",
        ),
        (["--set", "iterations=few"], "--set iterations=few: 'few' is not allowed. Allowed: an integer of at least 1"),
        (["--only", "num_proposals=6"], "--only num_proposals=6: matches no cell. Cells: 'num_proposals=5 seed=0'"),
        (["--device", "gpu"], "--device gpu: is not allowed. Allowed: cpu, cuda, cuda:N"),
        (["--data-root", "/nowhere"], "--data-root /nowhere: no such folder. Give the one that holds the data sets"),
        (
            ["--set", "dataset=coco"],
            ".*/small.yaml: data.dataset: no folder is given that holds 'coco'. Give it with --data-root DIR or "
            "DIFFINST_DATASETS=DIR",
        ),
    ],
)
def test_a_wrong_option(suite: Path, run_suite: RunSuite, arguments: list[str], message: str) -> None:
    results = suite.with_name("results")
    ended = run_suite(suite, "--results", results, *arguments)
    assert ended.code == 2
    assert re.fullmatch(message, ended.message)
    assert not results.exists()


def test_a_plan_needs_no_data(suite: Path, run_suite: RunSuite) -> None:
    assert run_suite(suite, "--plan", "--set", "dataset=coco").code == 0


# -- the results folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def results(suite: Path) -> Path:
    """A results folder with something to lose."""
    folder = suite.with_name("results")
    (folder / ".store" / "train-0").mkdir(parents=True)
    (folder / ".store" / "train-0" / "model.safetensors").write_bytes(b"weights")
    (folder / "small" / "machine").mkdir(parents=True)
    (folder / "small" / "machine" / "run.json").write_text("{}")
    return folder


HOLDER = """
import sys
from pathlib import Path
from bench.store import Store
with Store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_results_folder_in_use(suite: Path, results: Path, run_suite: RunSuite) -> None:
    command = [sys.executable, "-c", HOLDER, str(results)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = content_of(results)
        ended = run_suite(suite, "--results", results)
        assert ended.code == 2
        assert ended.message == (
            f"run-suite: {results}: in use by another run-suite (process {holder.pid}). "
            "Wait for it, stop it, or choose another folder with --results DIR"
        )
        assert content_of(results) == before
        assert run_suite(suite, "--results", results, "--plan").code == 0
        holder.communicate()
    with Store(results).lock():  # free again
        pass


def test_a_results_folder_below_a_file(suite: Path, run_suite: RunSuite) -> None:
    for folder in (suite, suite / "results"):
        ended = run_suite(suite, "--results", folder)
        assert ended.code == 2
        assert ended.message == (
            f"run-suite: {folder}: cannot be written: a file stands where a folder is needed. "
            "Free or allow it, or choose a folder with --results DIR"
        )
    assert suite.read_text() == SMALL


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EROFS, "the file system is read-only"), (errno.EACCES, "no permission to write")],
    ids=["read-only file system", "no permission"],
)
def test_a_results_folder_where_every_write_is_refused(
    suite: Path, results: Path, run_suite: RunSuite, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    really_open = os.open

    def refuse_to_write(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(results)):
            raise OSError(number, os.strerror(number), str(path))
        return really_open(path, flags, *rest, **options)

    before = content_of(results)
    monkeypatch.setattr(os, "open", refuse_to_write)
    ended = run_suite(suite, "--results", results)
    assert ended.code == 2
    assert ended.message == (
        f"run-suite: {results}: cannot be written: {reason}. Free or allow it, or choose a folder with --results DIR"
    )
    assert content_of(results) == before


# Gives up what lets root pass over permissions (CAP_DAC_OVERRIDE and its like), which takes effect in a new program.
WITHOUT_PRIVILEGES = """
import ctypes, os, sys
if sys.platform == "linux":
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
main = "import os, sys; from bench.cli import main; sys.exit(77 if os.access(sys.argv[3], os.W_OK) else main())"
os.execv(sys.executable, [sys.executable, "-c", main, *sys.argv[1:]])
"""


def test_a_results_folder_without_permission_to_write(suite: Path, results: Path) -> None:
    before = content_of(results)
    folders = [results, *(path for path in results.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        command = [sys.executable, "-c", WITHOUT_PRIVILEGES, str(suite), "--results", str(results)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    if ended.returncode == 77:
        pytest.skip("this process is root and may not give up the right to write everywhere")
    assert ended.returncode == 2
    assert ended.stderr == (
        f"run-suite: {results}: cannot be written: no permission to write. "
        "Free or allow it, or choose a folder with --results DIR\n"
    )
    assert content_of(results) == before


# -- data sets, through run-suite -------------------------------------------------------------------------------------

# Each set has images 5, 8 and 11 of 20 x 30 pixels; annotation 9 belongs to image 5.
Change = Callable[[Path, dict[str, Any]], None]


def _change_annotation(**changes: Any) -> Change:
    def change(_: Path, content: dict[str, Any]) -> None:
        content["annotations"][2] |= changes

    return change


def _corrupt_jpeg(folder: Path, content: dict[str, Any]) -> None:
    content["images"][1]["file_name"] = "5.jpg"
    path = folder / "images" / "5.jpg"
    Image.effect_noise((30, 20), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-300])


def _missing_image(_: Path, content: dict[str, Any]) -> None:
    content["images"][1]["file_name"] = "lost.png"


WRONG_MASK = {"segmentation": rle_of(block_mask((20, 31), (2, 0, 3, 20)))}
FAULTS: dict[str, Change] = {
    "missing_image": _missing_image,
    "zero_width": _change_annotation(bbox=[2, 0, 0, 20]),
    "mask_size": _change_annotation(**WRONG_MASK),
    "category": _change_annotation(category_id=4),
    "corrupt_jpeg": _corrupt_jpeg,
    "corrupt_val_jpeg": _corrupt_jpeg,
}
# What is said of each: after 'run-suite: <node>: ', with <set> for the folder of the data set.
WAY_OUT = "Correct or remove it, or set skip_invalid: true to leave out malformed annotations."
MESSAGES = {
    "missing_image": "dataset: <set>/instances.json: image 5: no file <set>/images/lost.png. "
    "Put it there, or leave the image out with an id list (train_image_ids).",
    "zero_width": "dataset: <set>/instances.json: annotation 9 (image 5): bbox [2, 0, 0, 20] has zero width; "
    f"width and height must be above 0. {WAY_OUT}",
    "mask_size": "dataset: <set>/instances.json: annotation 9 (image 5): mask has size [20, 31], but the image is "
    f"[20, 30] (height, width); both must agree. {WAY_OUT}",
    "category": "dataset: <set>/instances.json: annotation 9 (image 5): category_id 4 is not listed in 'categories'; "
    f"allowed: 3, 7. {WAY_OUT}",
    "corrupt_jpeg": "train: <set>/instances.json: image 5: <set>/images/5.jpg: cannot be decoded: image file is "
    "truncated (* bytes not processed); the file is damaged or no image, replace it",
    "corrupt_val_jpeg": "predict: <set>/instances.json: image 5: <set>/images/5.jpg: cannot be decoded: image file is "
    "truncated (* bytes not processed); the file is damaged or no image, replace it",
    "coco": "dataset: dataset 'coco', val split: not found. Tried <root>/coco/annotations/instances_val2017.json, "
    "<root>/annotations/instances_val2017.json. Give the folder that holds it with --data-root DIR or "
    "DIFFINST_DATASETS=DIR.",
    "truncated checkpoint": "train: <node>/checkpoint.safetensors: truncated, corrupt or not a checkpoint "
    "(*). Delete it and train again, or copy it again.",
    "another model's checkpoint": "train: <node>/checkpoint.safetensors: belongs to another training: "
    "model.hidden_dim 32 instead of 16. Use another output folder, the same configuration, or delete the file to "
    "start anew.",
}


@dataclass(frozen=True)
class Faulty:
    """A suite with a healthy cell and one for each fault, run once."""

    root: Path
    suite: Path
    plan: Plan
    before: dict[str, bytes]
    ended: Ended

    @property
    def results(self) -> Path:
        return self.root / "results"

    def node_folder(self, fault: str, kind: str) -> Path:
        return Store(self.results).folder(_cell(self.plan, fault).nodes[kind])  # type: ignore[index]

    def record(self, fault: str) -> RunRecord:
        run_id = _cell(self.plan, fault).run_id
        return next(record for record in Store(self.results).records() if record.run_id == run_id)


def _cell(plan: Plan, fault: str) -> Any:
    rates = {"truncated checkpoint": 0.5, "another model's checkpoint": 0.25}
    for cell in plan.cells:
        shown = str(cell.axes["data"])
        is_set = "=coco" in shown if fault == "coco" else f"{fault if fault not in rates else 'healthy'}/" in shown
        if is_set and cell.axes["learning_rate"] == rates.get(fault, 0.125):
            return cell
    raise KeyError(fault)


def _data(train: str, val: str) -> str:
    paths = f"train_annotations: {train}/instances.json, train_images: {train}/images, "
    return f"{{dataset: custom, {paths}val_annotations: {val}/instances.json, val_images: {val}/images}}"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    root = tmp_path_factory.mktemp("faulty")
    write_set(root / "healthy", tiny_content())
    cells = [_data("healthy", "healthy")]
    for name, change in FAULTS.items():
        content = tiny_content()
        # Each set needs a content of its own: equal annotation files are the same data set to the plan.
        content["info"] = {"description": name}
        write_set(root / name, content)
        change(root / name, content)
        (root / name / "instances.json").write_text(json.dumps(content))
        cells.append(_data("healthy", name) if name == "corrupt_val_jpeg" else _data(name, "healthy"))
    cells.append("{dataset: coco}")
    path = root / "faulty.yaml"
    text = f"name: faulty\nmodel:\n  {MODEL}\ntrain: {TRAIN[:-1]}, learning_rate: 0.125}}\n"
    text += "sampler: {num_proposals: 5}\nmeasure: {latency: false, memory: false, flops: false}\n"
    text += "data: {shortest_edge_train: [32], shortest_edge_test: 32, crop_probability: 0.0}\n"
    text += "axes:\n  product:\n    data:\n" + "".join(f"      - {cell}\n" for cell in cells)
    text += "  include:\n" + "".join(f"    - {{data: {cells[0]}, learning_rate: {rate}}}\n" for rate in (0.5, 0.25))
    path.write_text(text)
    # With what the files hold, as run-suite plans: else the ids, and so the folders, are others than those of the run.
    plan = build_plan(load_suite(path), data_root=root, device="cpu", contents=Fingerprints())
    results = root / "results"
    for fault in ("truncated checkpoint", "another model's checkpoint"):
        folder = Store(results).folder(_cell(plan, fault).nodes["train"])
        folder.mkdir(parents=True)
        node = plan.nodes[_cell(plan, fault).nodes["train"]]
        config = Config.model_validate_json(json.dumps(node.options["config"]))
        changes = {"num_classes": 2} | ({"hidden_dim": 32} if fault.startswith("another") else {})
        config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
        checkpoint = folder / "checkpoint.safetensors"
        model = seeded_model(config.model, 0).state_dict()
        save_checkpoint(checkpoint, model=model, config=config, iteration=1, class_names=("dog", "cat"))
        if fault.startswith("truncated"):
            checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    before = content_of(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "bench.cli", path, "--results", results, "--data-root", root]
        done = subprocess.run(
            [*map(str, command), "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    return Faulty(root, path, plan, before, Ended(done.returncode, done.stdout, done.stderr))


def test_each_fault_in_the_data_is_one_line_and_the_code_is_2(faulty: Faulty) -> None:
    assert faulty.ended.code == 2
    assert "Traceback" not in faulty.ended.out + faulty.ended.err
    # A line for each; both splits of 'coco' have one, as either may be elsewhere.
    assert len(faulty.ended.mistakes) == len(MESSAGES) + 1
    assert faulty.ended.err.splitlines()[-len(MESSAGES) - 1 :] == faulty.ended.mistakes  # last, where they are seen
    assert f"run-suite: faulty: 1 of {1 + len(MESSAGES)} runs ok, {len(MESSAGES)} failed" in faulty.ended.out


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_fault_is_told_and_recorded(faulty: Faulty, fault: str) -> None:
    node = faulty.node_folder(fault, "train").resolve()
    text = MESSAGES[fault].replace("<set>", str(faulty.root / fault))
    text = text.replace("<root>", str(faulty.root)).replace("<node>", str(node))
    pattern = re.escape(text).replace(r"\*", ".*")
    assert sum(re.fullmatch(f"run-suite: {pattern}", line) is not None for line in faulty.ended.mistakes) == 1

    record = faulty.record(fault)
    assert record.status == "failed"
    assert record.reason is not None
    told = MESSAGES[fault].replace("<set>", f"<data-root>/{fault}").replace("<root>", "<data-root>")
    told = told.replace("<node>", f"<results>/.store/{node.name}")
    assert re.fullmatch(re.escape(told).replace(r"\*", ".*"), record.reason)
    assert record.metrics["segm/AP"].value is None
    assert record.log  # with the details
    assert str(faulty.root) not in record.model_dump_json()


def test_a_fault_costs_nothing_else(faulty: Faulty) -> None:
    after = content_of(faulty.root)
    assert {name: after.get(name) for name in faulty.before} == faulty.before
    assert faulty.record("healthy").status == "ok"
    assert (faulty.node_folder("corrupt_val_jpeg", "train") / "model.safetensors").is_file()


def test_put_right_the_same_command_goes_on(faulty: Faulty, run_suite: RunSuite) -> None:
    root = faulty.root
    healthy = content_of(faulty.node_folder("healthy", "predict"))
    shutil.copy(root / "healthy" / "images" / "5.png", root / "corrupt_jpeg" / "images" / "5.jpg")
    command = [faulty.suite, "--results", faulty.results, "--data-root", root, "--device", "cpu"]
    ended = run_suite(*command, "--only", "data=*corrupt_jpeg/*")
    assert ended.code == 0, ended.err
    assert faulty.record("corrupt_jpeg").status == "ok"
    assert len(list(faulty.results.glob("faulty/*/history/*.json"))) == 1  # the failure is kept
    assert content_of(faulty.node_folder("healthy", "predict")) == healthy


def test_a_gpu_that_is_not_there(faulty: Faulty, run_suite: RunSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = faulty.root / "gpu"
    only = ["--only", "learning_rate=0.5"]
    ended = run_suite(faulty.suite, "--results", results, "--data-root", faulty.root, "--device", "cuda", *only)
    assert ended.code == 2
    (line,) = ended.mistakes
    assert re.fullmatch(
        r"run-suite: train: --device cuda: cannot be used here \([^().]*\)\. Use 'cpu', or leave it out", line
    )


# -- diffinst ---------------------------------------------------------------------------------------------------------

CONFIG = f"""\
model:
  {MODEL}
train: {TRAIN}
data: {{dataset: custom, train_annotations: set/instances.json, train_images: set/images,
        val_annotations: set/instances.json, val_images: set/images,
        shortest_edge_train: [32], shortest_edge_test: 32, crop_probability: 0.0}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml, a data set, a training in 'run' and a photograph."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "coco.yaml").write_text("data: {dataset: coco}\n")
    write_set(folder / "set", tiny_content())
    Image.effect_noise((40, 30), 60).convert("RGB").save(folder / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert diffinst.cli.main(["train", "config.yaml", "--out", "run", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the current folder."""
    monkeypatch.delenv("DIFFINST_DATASETS", raising=False)
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


CHECKPOINT = Path("run/model.safetensors")
TRAIN_AGAIN = ("train", "config.yaml", "--out", "run", "--device", "cpu")


def _truncate() -> None:
    CHECKPOINT.write_bytes(CHECKPOINT.read_bytes()[:5000])


def _empty() -> None:
    CHECKPOINT.write_bytes(b"")


def _of_another_program() -> None:
    save_file({"weight": torch.zeros(2)}, CHECKPOINT)


def _weights_of_another_model() -> None:
    config = load_checkpoint(CHECKPOINT).config
    wide = seeded_model(config.model.model_copy(update={"hidden_dim": 32}), 0)
    save_checkpoint(CHECKPOINT, model=wide.state_dict(), config=config, iteration=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _truncate,
            r"truncated, corrupt or not a checkpoint \(.*\)\. Delete it and train again, or copy it again\.",
        ),
        (_empty, r"truncated, corrupt or not a checkpoint \(.*\)\. Delete it and train again, or copy it again\."),
        (
            _of_another_program,
            r"holds tensors but is no checkpoint of this program\. Write one with `diffinst train`\.",
        ),
        (
            _weights_of_another_model,
            r"checkpoint of another model: \S+ is \(32, .*\) instead of \(16, .*\), and \d+ more\. "
            r"Use the model configuration stored in the checkpoint, or a checkpoint of this model\.",
        ),
        (CHECKPOINT.unlink, r"no such checkpoint\. Give a \.safetensors file written by `diffinst train`\."),
    ],
    ids=["truncated", "empty", "of another program", "weights of another model", "not there"],
)
def test_a_wrong_checkpoint(work: Path, diffinst_command: RunSuite, spoil: Callable[[], None], message: str) -> None:
    del work
    spoil()
    before = content_of(Path())
    for arguments in (["evaluate", CHECKPOINT], ["predict", CHECKPOINT, "photo.jpg"]):
        ended = diffinst_command(*arguments, "--out", "out", "--device", "cpu")
        assert ended.code == 2
        assert re.fullmatch(rf"diffinst: run/model\.safetensors: {message}", ended.message)
    assert content_of(Path()) == before


def test_going_on_with_the_training_of_another_model(work: Path, diffinst_command: RunSuite) -> None:
    before = content_of(work)
    ended = diffinst_command(*TRAIN_AGAIN, "--set", "hidden_dim=32")
    assert ended.code == 2
    assert ended.message == (
        "diffinst: run/model.safetensors: belongs to another training: model.hidden_dim 16 instead of 32. "
        "Use another output folder, the same configuration, or delete the file to start anew."
    )
    assert content_of(work) == before


def test_data_of_other_classes(work: Path, diffinst_command: RunSuite) -> None:
    content = tiny_content()
    content["categories"].append({"id": 9, "name": "cow"})
    (work / "set" / "instances.json").write_text(json.dumps(content))
    ended = diffinst_command("evaluate", CHECKPOINT, "--out", "out")
    assert ended.code == 2
    assert ended.message == (
        "diffinst: run/model.safetensors: made for 2 classes, but set/instances.json has 3. "
        "Choose the data set that it was trained on"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("fault", ["missing_image", "zero_width", "mask_size", "category", "corrupt_jpeg"])
def test_faults_in_the_data_of_a_training(work: Path, diffinst_command: RunSuite, fault: str) -> None:
    content = tiny_content()
    FAULTS[fault](work / "set", content)
    (work / "set" / "instances.json").write_text(json.dumps(content))
    before = content_of(work)
    ended = diffinst_command("train", "config.yaml", "--out", "new", "--device", "cpu")
    assert ended.code == 2
    text = MESSAGES[fault].partition(": ")[2].replace("<set>", "set")
    assert re.fullmatch("diffinst: " + re.escape(text).replace(r"\*", ".*"), ended.message)
    assert {name: value for name, value in content_of(work).items() if not name.startswith("new")} == before


def _without_negatives(content: dict[str, Any]) -> None:
    del content["images"][0]["neg_category_ids"]


def _unknown_frequency(content: dict[str, Any]) -> None:
    content["categories"][1]["frequency"] = "sometimes"


def _lost_folder(content: dict[str, Any]) -> None:
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/test2017/11.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without_negatives,
            "set/lvis.json: image 11: neg_category_ids is None; it must be a list of category ids, which may be empty. "
            "A file without it is no LVIS file: set annotation_format: coco",
        ),
        (
            _unknown_frequency,
            "set/lvis.json: category 3 (dog): frequency is 'sometimes'; allowed: r, c, f (rare, common, frequent)",
        ),
        (
            _lost_folder,
            "set/lvis.json: image 11: no file set/coco/11.png. Put it there, or leave the image out with an id list "
            "(train_image_ids).",
        ),
    ],
)
def test_faults_in_lvis_files(
    work: Path, diffinst_command: RunSuite, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = tiny_lvis()
    write_lvis(work / "set", content)
    change(content)
    (work / "set" / "lvis.json").write_text(json.dumps(content))
    settings = ("annotation_format=lvis", "train_annotations=set/lvis.json", "train_images=set/coco")
    sets = [part for text in settings for part in ("--set", text)]
    ended = diffinst_command("train", "config.yaml", "--out", "new", "--device", "cpu", *sets)
    assert ended.code == 2
    assert ended.message == f"diffinst: {message}"
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "coco.yaml", "--out", "new"],
            "dataset 'coco': no root folder is given. Give the folder that holds it with --data-root DIR or "
            "DIFFINST_DATASETS=DIR.",
        ),
        (["predict", CHECKPOINT, "gone.jpg", "--out", "new"], "gone.jpg: no such file or folder. Check the path"),
        (
            ["predict", CHECKPOINT, "run", "--out", "new"],
            "run: no image in this folder, and no video. Looked for .jpg, *",
        ),
        (
            ["predict", CHECKPOINT, "config.yaml", "--out", "new"],
            "config.yaml: cannot be decoded: cannot identify image file '*config.yaml'; the file is damaged or no "
            "image, replace it",
        ),
        (
            ["predict", CHECKPOINT, "photo.jpg", "--out", "config.yaml"],
            "config.yaml: cannot be written (File exists). Choose a folder that can, with --out DIR",
        ),
        (
            ["evaluate", CHECKPOINT, "--out", "config.yaml"],
            "config.yaml/predictions-*: cannot write predictions: Not a directory; choose a writable folder",
        ),
        (
            ["train", "config.yaml", "--out", "photo.jpg/new"],
            "photo.jpg/new: cannot be written (Not a directory). Choose another folder, or change its permissions.",
        ),
        (
            ["predict", CHECKPOINT, "photo.jpg", "--out", "new", "--device", "cuda:99"],
            "--device cuda:99: there are * CUDA devices. Use cpu or auto",
        ),
    ],
)
def test_wrong_arguments(work: Path, diffinst_command: RunSuite, arguments: list[object], message: str) -> None:
    before = content_of(work)
    ended = diffinst_command(*arguments)
    assert ended.code == 2
    assert re.fullmatch("diffinst: " + re.escape(message).replace(r"\*", ".*"), ended.message)
    assert {name: value for name, value in content_of(work).items() if name != "new"} == before


def test_a_damaged_photograph_leaves_earlier_drawings_alone(work: Path, diffinst_command: RunSuite) -> None:
    assert diffinst_command("predict", CHECKPOINT, "photo.jpg", "--out", "out", "--device", "cpu").code == 0
    before = content_of(work / "out")
    ended = diffinst_command("predict", CHECKPOINT, "photo.jpg", "--out", "out", "--device", "cpu")
    assert ended.code == 2
    assert ended.message == (
        "diffinst: out/photo.jpg: is there already, and 2 more. Choose another folder with --out DIR, or replace with "
        "--force"
    )
    data = (work / "photo.jpg").read_bytes()
    (work / "photo.jpg").write_bytes(data[: len(data) // 2])
    ended = diffinst_command("predict", CHECKPOINT, "photo.jpg", "--out", "out", "--device", "cpu", "--force")
    assert ended.code == 2
    assert re.fullmatch(
        r"diffinst: photo\.jpg: cannot be decoded: image file is truncated \(\d+ bytes not processed\); "
        "the file is damaged or no image, replace it",
        ended.message,
    )
    assert content_of(work / "out") == before
