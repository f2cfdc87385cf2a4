from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffinst.ops import library
from diffinst.ops.library import operators

DETECTION = """
import sys
import torch
from diffinst.build import build_model
from diffinst.config import ModelConfig, SamplerConfig
from diffinst.engine.inference import detect
from diffinst.structures import Sample

torch.manual_seed(0)
model = build_model(ModelConfig(backbone="tiny", num_classes=2, num_stages=2, hidden_dim=16, num_attention_heads=2))
sample = Sample(image=torch.zeros(3, 64, 64, dtype=torch.uint8), image_id=1, original_size=(64, 64))
settings = SamplerConfig(num_proposals=20, score_threshold=0.0)
(found,) = detect(model.eval(), model.make_batch([sample]), settings)
heavy = ("torchvision", "torch._dynamo", "sympy", "triton", "torch.distributed.tensor")
print(len(found.scores) > 0, [name for name in heavy if name in sys.modules])
import torchvision
print(torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 4, 4]])], 1).item())
"""


def test_a_detection_does_without_the_package_which_may_come_later() -> None:
    done = subprocess.run([sys.executable, "-c", DETECTION], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True []", "1.0"]


def test_the_operators_are_torchvisions() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    assert operators().nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


POOLING = """
import sys
import torch
from bench.measure.determinism import OperatorRecorder
from diffinst.build import build_model
from diffinst.config import ModelConfig
from diffinst.ops.roi import pool_boxes

pyramid = [torch.rand(1, 4, 16 // 2**level, 16 // 2**level, requires_grad=True) for level in range(4)]
boxes = torch.tensor([[[0.0, 0, 40, 40]]])
with OperatorRecorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
    pooled = pool_boxes(pyramid, (4, 8, 16, 32), boxes, method="roi_align")
    pooled.float().square().sum().backward()
print("torchvision" in sys.modules, pooled.shape[0], bool(pyramid[0].grad.abs().sum() > 0))
"""


def test_torchvisions_pooling_may_be_the_first_to_import_it() -> None:
    done = subprocess.run([sys.executable, "-c", POOLING], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True 1 True"]


@pytest.mark.parametrize("why", ["missing", "empty", "broken"])
def test_operators_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str) -> None:
    operators.cache_clear()
    monkeypatch.setattr(torch.ops, "torchvision", object())
    if why == "broken":
        (tmp_path / "_C_stable.so").write_bytes(b"no library")
    (tmp_path / "__init__.py").write_text("")
    place = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})()
    monkeypatch.setattr(library, "find_spec", lambda _: None if why == "missing" else place)
    reason = r" \(.*_C_stable.so: .*\)" if why == "broken" else ""
    with pytest.raises(ImportError, match=f"compiled operators .*{reason}: install the torchvision release"):
        operators()
    operators.cache_clear()


def test_all_libraries_of_the_package_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between two releases the operators were in two."""
    operators.cache_clear()
    found, loaded = type("Found", (), {})(), []

    def load(path: Path) -> None:
        loaded.append(path.name)
        setattr(found, "roi_align" if path.name == "_C.so" else "nms", loaded)

    monkeypatch.setattr(torch.ops, "torchvision", found)
    monkeypatch.setattr(torch.ops, "load_library", load)
    for name in ("__init__.py", "_C.so", "_C_stable.so", "image.so"):
        (tmp_path / name).write_text("")
    place = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})()
    monkeypatch.setattr(library, "find_spec", lambda _: place)
    assert operators() is found
    assert loaded == ["_C.so", "_C_stable.so"]
    operators.cache_clear()
