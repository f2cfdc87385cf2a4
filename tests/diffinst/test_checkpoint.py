from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffinst import checkpoint as module
from diffinst.checkpoint import load_checkpoint, load_model_weights, replacing, save_checkpoint
from diffinst.config import Config, ModelConfig, TrainConfig
from diffinst.errors import CheckpointError

CONFIG = Config(model=ModelConfig(num_classes=3, mask_head_channels=(4,)), train=TrainConfig(learning_rate=1e-3))


def small_model(*, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_checkpoint(
        path,
        model=small_model().state_dict(),
        config=CONFIG,
        iteration=42,
        class_names=("disc", "Viereck ü"),
        optimizer={"0.weight/exp_avg": torch.arange(3.0), "0.weight/step": torch.tensor(7.0)},
    )
    return path


def test_category_ids_go_around_and_earlier_files_have_none(saved: Path, tmp_path: Path) -> None:
    assert load_checkpoint(saved).category_ids == ()
    path = tmp_path / "ids.safetensors"
    save_checkpoint(path, model=small_model().state_dict(), config=CONFIG, iteration=1, category_ids=(3, 13))
    assert load_checkpoint(path).category_ids == (3, 13)


def test_goes_around(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.path == saved
    assert checkpoint.config == CONFIG
    assert checkpoint.iteration == 42
    assert checkpoint.class_names == ("disc", "Viereck ü")
    expected = small_model().state_dict()
    assert checkpoint.model.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(checkpoint.model[name], value)
        assert checkpoint.model[name].dtype == value.dtype  # the batch norm counts in int64
    assert checkpoint.optimizer["0.weight/exp_avg"].tolist() == [0, 1, 2]
    assert checkpoint.optimizer["0.weight/step"].shape == ()


def test_the_average_goes_around_beside_the_weights(saved: Path, tmp_path: Path) -> None:
    assert load_checkpoint(saved).ema == {}
    assert not [name for name in load_file(saved) if name.startswith("ema/")]
    path = tmp_path / "averaged.safetensors"
    weights, average = (small_model().state_dict() for _ in range(2))
    average["0.bias"] = torch.full((4,), 7.0)
    save_checkpoint(path, model=weights, ema=average, config=CONFIG, iteration=1)
    for use_ema, expected in ((False, weights), (True, average)):
        model = small_model()
        load_model_weights(model, load_checkpoint(path), use_ema=use_ema)
        assert torch.equal(model[0].bias, expected["0.bias"])


def test_an_average_that_is_not_there_is_one_line(saved: Path) -> None:
    model = small_model()
    with pytest.raises(CheckpointError, match="holds no moving average of the weights. Set sampler.use_ema to false"):
        load_model_weights(model, load_checkpoint(saved), use_ema=True)
    assert torch.equal(model[0].weight, small_model()[0].weight)


def test_loads_into_a_model(saved: Path) -> None:
    model = small_model()
    nn.init.zeros_(model[0].weight)
    load_model_weights(model, load_checkpoint(saved))
    assert torch.equal(model[0].weight, small_model()[0].weight)


def test_views_and_strides_do_not_matter(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path / "c", model={"a": base.T, "b": base[1:]}, config=CONFIG, iteration=0)
    found = load_checkpoint(tmp_path / "c").model
    assert torch.equal(found["a"], base.T)
    assert torch.equal(found["b"], base[1:])


class TestAtomicWriting:
    def test_failed_write_leaves_the_old_file(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        before = saved.read_bytes()
        monkeypatch.setattr(module, "save_file", fail)
        with pytest.raises(CheckpointError, match="cannot write the checkpoint .No space left.*same command again"):
            save_checkpoint(saved, model={}, config=CONFIG, iteration=43)
        assert saved.read_bytes() == before

    def test_left_over_of_a_killed_writer_is_overwritten(self, saved: Path) -> None:
        (saved.parent / "some.safetensors.tmp").write_bytes(b"half of a checkpoint")
        save_checkpoint(saved, model={}, config=CONFIG, iteration=43)
        assert load_checkpoint(saved).iteration == 43
        assert [path.name for path in saved.parent.iterdir()] == ["some.safetensors"]

    def test_content_is_on_disk_before_the_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[str] = []
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
        monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("replace"), replace(path, target)))
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("content")
        assert events == ["fsync", "replace", "fsync"]
        assert (tmp_path / "file").read_text() == "content"


class TestErrors:
    def error_of(self, path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message

    def test_missing(self, tmp_path: Path) -> None:
        assert "no such checkpoint" in self.error_of(tmp_path / "nothing.safetensors")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, saved: Path, share: float) -> None:
        content = saved.read_bytes()
        saved.write_bytes(content[: int(share * len(content))])
        message = self.error_of(saved)
        assert "truncated, corrupt or not a checkpoint" in message
        assert "Delete it" in message

    def test_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "photo.jpg"
        path.write_bytes(b"\xff\xd8\xff\xe0 not tensors at all")
        assert "not a checkpoint" in self.error_of(path)

    def test_tensors_of_another_program(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        save_file({"weight": torch.zeros(2)}, path)
        assert "no checkpoint of this program" in self.error_of(path)

    def test_newer_format(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "FORMAT_VERSION", 2)
        assert "checkpoint format 1, this version reads 2" in self.error_of(saved)

    def test_configuration_of_another_version(self, saved: Path) -> None:
        tensors = load_file(saved)
        changed = CONFIG.model_dump_json().replace('"num_stages"', '"stages"')
        metadata = {"diffinst_format": "1", "config": changed, "iteration": "1", "class_names": "[]"}
        save_file(tensors, saved, metadata=metadata)
        assert "not valid in this version (model.stages: Extra inputs" in self.error_of(saved)

    def test_another_model(self, saved: Path) -> None:
        model = small_model(width=5)
        before = model[0].weight.clone()
        with pytest.raises(CheckpointError) as caught:
            load_model_weights(model, load_checkpoint(saved))
        assert "checkpoint of another model: 0.weight is (4, 3) instead of (5, 3); 0.bias is (4,) " in str(caught.value)
        assert "and 3 more. Use the model configuration stored in the checkpoint" in str(caught.value)
        assert torch.equal(model[0].weight, before)

    def test_other_names(self, saved: Path) -> None:
        with pytest.raises(CheckpointError, match="1.bias is unknown to the model"):
            load_model_weights(nn.Sequential(nn.Linear(3, 4), nn.Identity()), load_checkpoint(saved))
        with pytest.raises(CheckpointError, match=r"2.weight is missing; 2.bias is missing\. Use"):
            load_model_weights(small_model().append(nn.Linear(4, 1)), load_checkpoint(saved))


def test_flipped_bytes_are_found(saved: Path) -> None:
    whole = saved.read_bytes()
    keys = [whole.index(f'"{key}":'.encode()) + 1 for key in ("sha256", "iteration", "config", "diffinst_format")]
    for place in sorted({*range(0, len(whole), 5), *(key + offset for key in keys for offset in range(6))}):
        data = bytearray(whole)
        data[place] ^= 1
        saved.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"^{saved}: "):
            pytest.fail(f"byte {place} goes unseen: {load_checkpoint(saved).iteration}")
    saved.write_bytes(whole)
    assert load_checkpoint(saved).iteration == 42


def test_a_file_from_before_there_were_checksums_loads(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del metadata["sha256"]
    save_file(tensors, saved, metadata=metadata)
    checkpoint = load_checkpoint(saved)
    assert (checkpoint.iteration, checkpoint.losses) == (42, None)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for number in range(8):  # the library's own order changes from file to file
        save_checkpoint(
            tmp_path / f"{number}", model=small_model().state_dict(), config=CONFIG, iteration=1, class_names=("ü",)
        )
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert load_checkpoint(tmp_path / "0").class_names == ("ü",)


def test_a_file_is_mapped_in_parts(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_checkpoint(saved)
    opened = []
    monkeypatch.setattr(module, "safe_open", lambda *args, **kw: opened.append(args) or safe_open(*args, **kw))
    monkeypatch.setattr(module, "_MAPPED_BYTES", 20)
    parts = load_checkpoint(saved)
    assert len(opened) > 3
    for one, other in ((whole.model, parts.model), (whole.optimizer, parts.optimizer)):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


LOAD = """
import re, sys
from pathlib import Path
import torch
from diffinst.checkpoint import load_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
checkpoint = load_checkpoint(Path(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of memory so")
def test_a_file_is_in_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    model = {f"{number}.weight": torch.ones(2**22) for number in range(20)}  # 16 MiB each
    save_checkpoint(path, model=model, config=CONFIG, iteration=1)
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True)
    assert 300 * 2**20 < int(done.stdout) < 1.5 * 320 * 2**20


def another(path: Path, number: int) -> None:
    """What a training does: another checkpoint takes the place of the one that is there."""
    save_checkpoint(
        path, model={"a": torch.full((4,), number), "b": torch.full((4,), number)}, config=CONFIG, iteration=1
    )


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_file_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    path, opened = tmp_path / "c.safetensors", []
    another(path, 1)
    monkeypatch.setattr(module, "_MAPPED_BYTES", 1)

    def open_and_replace(*args: Any, **options: Any) -> Any:
        opened.append(args)
        if len(opened) == 3:  # one tensor of the first file has been read
            if is_removed:
                path.unlink()
            else:
                another(path, 2)
        return safe_open(*args, **options)

    monkeypatch.setattr(module, "safe_open", open_and_replace)
    if is_removed:
        with pytest.raises(CheckpointError, match="was removed while it was read"):
            load_checkpoint(path)
    else:
        assert {value.tolist()[0] for value in load_checkpoint(path).model.values()} == {2}
