from __future__ import annotations

from typing import Literal

import pytest
import torch
from helpers import load_fixture
from released_tiny_model import pyramid_of, released_tiny_model
from torch import nn
from torch.testing import assert_close

from diffinst.heads.mask_branch import MaskBranch


def test_parity_in_evaluation_mode() -> None:
    fixture = load_fixture("head_io")
    with torch.no_grad():
        out = released_tiny_model().mask_branch(pyramid_of(fixture))
    assert_close(out, torch.from_numpy(fixture["mask_feat"]), rtol=1e-4, atol=1e-4)


def test_parity_in_training_mode() -> None:
    fixture = load_fixture("head_io")
    mask_branch = released_tiny_model().mask_branch.train()
    with torch.no_grad():
        out = mask_branch(pyramid_of(fixture))
    assert_close(out, torch.from_numpy(fixture["mask_feat_trainmode"]), rtol=1e-4, atol=1e-4)
    for released, norm in {
        "mask_refine.0.1": mask_branch.refine[0][1],
        "mask_head.3.1": mask_branch.tower[3][1],
    }.items():
        for name in ("running_mean", "running_var"):
            expected = torch.from_numpy(fixture[f"after_train__{released}.{name}"])
            assert_close(norm.get_buffer(name), expected, rtol=1e-5, atol=1e-6)


def test_levels_are_summed_where_they_lie() -> None:
    """With identity convolutions and norms, only p2..p4 count, each repeated over its pixels' area."""
    branch = MaskBranch(in_channels=1, channels=1, num_layers=0, out_channels=1).eval()
    for conv in (module for module in branch.modules() if isinstance(module, nn.Conv2d)):
        nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, conv.weight.shape[-1] // 2, conv.weight.shape[-1] // 2] = 1
    nn.init.zeros_(branch.project.bias)
    pyramid = [torch.full((1, 1, 8 // 2**level, 8 // 2**level), 10.0**level) for level in range(4)]
    scale = (1 + branch.refine[0][1].eps) ** -0.5  # of a fresh batch norm
    with torch.no_grad():
        assert_close(branch(pyramid), torch.full((1, 1, 8, 8), 111.0 * scale))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("channels", "num_layers", "out_channels"), [(32, 1, 8), (12, 0, 3), (5, 2, 1)])
def test_any_size(norm: Literal["batch", "group"], channels: int, num_layers: int, out_channels: int) -> None:
    branch = MaskBranch(in_channels=4, channels=channels, num_layers=num_layers, out_channels=out_channels, norm=norm)
    pyramid = [torch.randn(2, 4, 16 // 2**level, 24 // 2**level) for level in range(4)]
    out = branch(pyramid)
    assert out.shape == (2, out_channels, 16, 24)
    out.square().sum().backward()
    assert not [name for name, p in branch.named_parameters() if p.grad is None]


def test_group_norm_does_not_look_at_the_batch() -> None:
    torch.manual_seed(0)
    branch = MaskBranch(in_channels=4, channels=16, num_layers=1, norm="group").train()
    pyramid = [torch.randn(3, 4, 16 // 2**level, 16 // 2**level) for level in range(4)]
    together = branch(pyramid)
    for image in range(3):
        assert_close(branch([level[image, None] for level in pyramid])[0], together[image], rtol=1e-4, atol=1e-5)


def test_a_batch_norm_in_inference_is_part_of_the_convolution() -> None:
    torch.manual_seed(0)
    branch = MaskBranch(in_channels=4, channels=6, num_layers=2)
    for norm in (module for module in branch.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    pyramid = [torch.randn(2, 4, 16 // 2**level, 24 // 2**level) for level in range(4)]
    expected = branch.eval()(pyramid)  # with gradients each norm is a step of its own
    with torch.inference_mode():
        assert_close(branch(pyramid), expected, rtol=1e-5, atol=1e-6)
        calls = []
        for norm in (module for module in branch.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.register_forward_hook(lambda *_: calls.append(1))
        branch(pyramid)
        assert not calls
        before = branch.refine[0][1].running_mean.clone()
        branch.train()(pyramid)
        assert len(calls) == 5
        assert not torch.equal(branch.refine[0][1].running_mean, before)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_inference_sums_as_training_does(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    branch = MaskBranch(in_channels=4, channels=6, num_layers=1, norm="group").eval()
    pyramid = [torch.randn(2, 4, 16 // 2**level, 8 // 2**level) for level in range(4)]
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        expected = branch(pyramid).detach()
        with torch.no_grad():
            assert_close(branch(pyramid), expected, rtol=0, atol=1e-6)
