"""The fused mask head against matrix products: in Triton's interpreter, which needs a process of its own, and on a GPU.

Whether Triton interprets is decided when it is imported, and torchvision imports it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffinst.errors import ConfigError
from diffinst.heads.mask_head import apply_mask_head, num_mask_params
from diffinst.ops import mask_head_triton
from diffinst.ops.mask_head_triton import mask_logits, require_triton

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import triton"], capture_output=True, check=False).returncode != 0,
    reason="Triton cannot be imported",
)


class Case(NamedTuple):
    """One call: features (C, H, W), instances, hidden channels, types of features and filters."""

    size: tuple[int, int, int]
    num_instances: int
    channels: tuple[int, ...] = (8, 8)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    layout: str = "rows"


CASES = {
    "usual": Case((8, 16, 32), 3),
    "odd_sizes_and_two_blocks": Case((8, 33, 41), 5),
    "one_pixel": Case((8, 1, 1), 2),
    "one_instance": Case((8, 7, 5), 1),
    "no_instances": Case((8, 4, 4), 0),
    "no_pixels": Case((8, 0, 4), 2),
    "a_single_linear_layer": Case((5, 6, 7), 2, ()),
    "no_powers_of_two": Case((3, 6, 7), 2, (5, 4, 6)),
    "one_channel": Case((1, 6, 7), 2, (1,)),
    "wide": Case((16, 6, 7), 2, (16, 16)),
    "bfloat16": Case((8, 6, 7), 2, dtypes=(torch.bfloat16, torch.bfloat16)),
    "float16_filters": Case((8, 6, 7), 2, dtypes=(torch.float32, torch.float16)),
    "channels_innermost": Case((8, 6, 7), 2, layout="channels"),
    "a_window": Case((8, 6, 7), 2, layout="window"),
}

_CHILD = """
import sys
import torch
from diffinst.heads.mask_head import apply_mask_head
from diffinst.ops.mask_head_triton import mask_logits
from diffinst.ops.paths import paths_taken

inputs = torch.load(sys.argv[1])
outputs = {name: mask_logits(*tensors, channels=channels) for name, (*tensors, channels) in inputs.items()}
features, params, channels = inputs["usual"]
images = torch.stack([features, -features])
outputs["two_images"] = apply_mask_head(images, params, torch.tensor([0, 1, 1]), channels=channels, kernel="triton")
outputs["paths"] = paths_taken()
params = params.requires_grad_()
outputs["training"] = apply_mask_head(features, params, channels=channels, kernel="triton").requires_grad
outputs["paths_in_training"] = paths_taken()
torch.save(outputs, sys.argv[2])
"""


def _inputs(case: Case) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    channels, height, width = case.size
    features = torch.randn(channels, height, width, generator=generator)
    params = torch.randn(case.num_instances, num_mask_params(channels, case.channels), generator=generator)
    features, params = features.to(case.dtypes[0]), params.to(case.dtypes[1])
    if case.layout == "channels":
        features = features.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif case.layout == "window":
        features = features[:, 1:4, 2:6]
    return features, params, case.channels


def _check(found: Tensor, features: Tensor, params: Tensor, channels: Sequence[int]) -> None:
    """The same as matrix products in float64, but for the rounding of float32."""
    assert found.dtype == torch.float32
    expected = apply_mask_head(features.double(), params.double(), channels=channels)
    assert_close(
        found.double(),
        expected,
        rtol=1e-5,
        atol=1e-5 * max(1.0, expected.abs().amax().item() if expected.numel() else 0.0),
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the interpreter makes of all cases."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save({name: _inputs(case) for name, case in CASES.items()}, folder / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder / "inputs.pt"), str(folder / "outputs.pt")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict = torch.load(folder / "outputs.pt")
    return found


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_matrix_products(name: str, interpreted: dict) -> None:
    _check(interpreted[name], *_inputs(CASES[name]))


@needs_triton
def test_the_named_choice_reaches_the_kernel_and_training_takes_matrix_products(interpreted: dict) -> None:
    features, params, channels = _inputs(CASES["usual"])
    expected = apply_mask_head(torch.stack([features, -features]), params, torch.tensor([0, 1, 1]), channels=channels)
    assert_close(interpreted["two_images"], expected, rtol=1e-4, atol=1e-4)
    assert interpreted["paths"] == {"mask_head": ["triton"]}
    assert interpreted["training"]
    assert interpreted["paths_in_training"] == {"mask_head": ["torch", "triton"]}


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_equals_matrix_products(name: str) -> None:
    features, params, channels = _inputs(CASES[name])
    found = mask_logits(features.cuda(), params.cuda(), channels=channels)
    assert found.is_cuda
    _check(found.cpu(), features, params, channels)


@needs_triton
def test_compiled_for_a_gpu_activations_stay_in_registers() -> None:
    """Without a GPU: what the compiler makes of the kernel for compute capability 9.0."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, _ = mask_head_triton._load_kernel()
    types = ["*fp32"] * 3 + ["i32"] * 2 + ["constexpr"] * 3
    constants = {(5,): (8, 8, 8, 1), (6,): 136, (7,): mask_head_triton._BLOCK}
    options = {"num_warps": mask_head_triton._NUM_WARPS}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), constants)
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared == 0
    assert compiled.asm["ptx"].count("fma.rn.f32") == 136 * 4  # each weight once for each of a thread's pixels
    assert "bar.sync" not in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"]


@needs_triton
def test_a_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device, and this is 'cpu'. Set mask_head_kernel to") as caught:
        mask_logits(*_inputs(CASES["usual"])[:2], channels=(8, 8))
    assert "\n" not in str(caught.value)
    require_triton("cuda", 8, (8, 8))


@needs_triton
def test_layers_too_large_to_unroll_are_refused_in_one_line() -> None:
    require_triton("cuda", 31, (32,))  # 31 * 32 + 32 = 1024 weights
    with pytest.raises(ConfigError, match=r"32 channels with mask_head_channels \[32\] have 1056. Set .*'torch'$"):
        require_triton("cuda", 32, (32,))


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    mask_head_triton._load_kernel.cache_clear()
    for name in ("triton", "diffinst.ops.mask_head_kernel"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Triton is not installed. Run: python -m pip install triton") as caught:
        require_triton("cuda", 8, (8, 8))
    assert "\n" not in str(caught.value)


@needs_triton
@pytest.mark.parametrize(
    ("features", "params", "message"),
    [
        (torch.zeros(8, 2, 2), torch.zeros(1, 152), "152 parameters per instance, but these channels need 153"),
        (torch.zeros(8, 2, 2).double(), torch.zeros(1, 153), "mask_features is torch.float64; allowed: torch.float32"),
        (torch.zeros(8, 2, 2), torch.zeros(1, 153).int(), "mask_params is torch.int32"),
        (torch.zeros(8, 2, 2), torch.zeros(1, 153, requires_grad=True), "mask_params requires a gradient"),
    ],
)
def test_wrong_inputs_are_refused(
    monkeypatch: pytest.MonkeyPatch, features: Tensor, params: Tensor, message: str
) -> None:
    monkeypatch.setattr(mask_head_triton, "require_triton", lambda *_: None)
    with pytest.raises(ValueError, match=message):
        mask_logits(features, params, channels=(8, 8))
