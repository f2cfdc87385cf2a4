"""The contract that every backbone keeps."""

from __future__ import annotations

import weakref
from typing import get_args

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from diffinst.backbones.base import Backbone
from diffinst.backbones.frozen_norm import ConvFrozenNorm
from diffinst.backbones.registry import BACKBONES, IMAGENET_WEIGHTS
from diffinst.backbones.resnet import ResNet
from diffinst.backbones.swin import Swin
from diffinst.config import FREEZING_BACKBONES, BackboneName

# The full ResNets have nothing that a narrow one has not; they are held to the released names and shapes elsewhere.
SMALL = {
    "resnet": lambda: ResNet(depth=50, stem_channels=8, res2_channels=16, width_per_group=4, freeze_at=0),
    "resnet_grouped": lambda: ResNet(
        depth=50, stem_channels=8, res2_channels=16, width_per_group=2, num_groups=2, freeze_at=0
    ),
    "swin": lambda: Swin(embed_dim=8, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4), window_size=3),
    "efficientnet_lite0": lambda: BACKBONES["efficientnet_lite0"](0),
    "tiny": lambda: BACKBONES["tiny"](0),
}


@pytest.fixture(params=SMALL)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return SMALL[request.param]().eval()


def test_every_configurable_name_is_registered() -> None:
    assert set(BACKBONES) == set(get_args(BackboneName))
    assert set(IMAGENET_WEIGHTS) <= set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_configuration_knows_which_freeze_stages(name: BackboneName) -> None:
    with torch.device("meta"):
        parameters = BACKBONES[name](5).parameters()
    assert any(not parameter.requires_grad for parameter in parameters) == (name in FREEZING_BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_strides_are_4_to_32(name: BackboneName) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name](2)
    assert list(backbone.out_shapes) == ["res2", "res3", "res4", "res5"]
    assert [shape.stride for shape in backbone.out_shapes.values()] == [4, 8, 16, 32]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32)])
def test_maps_are_as_declared(backbone: Backbone, height: int, width: int) -> None:
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, height, width))
    assert {name: tuple(x.shape) for name, x in features.items()} == {
        name: (2, channels, height // stride, width // stride)
        for name, (channels, stride) in backbone.out_shapes.items()
    }


def test_a_batch_equals_its_images_one_by_one(backbone: Backbone) -> None:
    images = torch.randn(3, 3, 32, 64)
    with torch.no_grad():
        together = backbone(images)
        for index, image in enumerate(images):
            alone = backbone(image[None])
            for name, x in together.items():
                assert_close(x[index], alone[name][0], rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient(backbone: Backbone) -> None:
    backbone.train()
    loss = sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64)).values())
    loss.backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_the_tiny_backbone_is_tiny() -> None:
    assert sum(p.numel() for p in BACKBONES["tiny"](2).parameters()) < 400_000
    assert all(p.requires_grad for p in BACKBONES["tiny"](2).parameters())


def test_the_tiny_backbone_trains_on_a_single_coarsest_pixel() -> None:
    """At 32 x 32 there is one pixel at stride 32, which has no variance: running statistics are used, as in eval."""
    torch.manual_seed(0)
    backbone = BACKBONES["tiny"](0).train()
    norm = backbone.stages[3].norm2
    torch.nn.init.constant_(norm.running_mean, 0.5)
    backbone(torch.randn(1, 3, 32, 32))["res5"].sum().backward()
    assert norm.weight.grad is not None
    x = torch.randn(1, 112, 1, 1)
    assert_close(norm(x), (x - 0.5) / (1 + norm.eps) ** 0.5)
    assert_close(norm(x), norm.eval()(x))
    assert_close(norm.running_mean, torch.full((112,), 0.5))


@pytest.mark.parametrize("groups", [1, 4])
def test_folded_norm_equals_convolution_then_norm(groups: int) -> None:
    torch.manual_seed(0)
    conv = ConvFrozenNorm(8, 12, 3, stride=2, padding=1, groups=groups, norm_eps=1e-3)
    for buffer in conv.norm.buffers():
        buffer.uniform_(0.5, 2.0)
    x = torch.randn(2, 8, 9, 11)
    twin = FrozenBatchNorm2d(12, eps=1e-3)
    twin.load_state_dict(conv.norm.state_dict())
    expected = twin(functional.conv2d(x, conv.weight, stride=2, padding=1, groups=groups))
    assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_conv_frozen_norm_keeps_no_folded_weights_and_has_the_gradients_of_the_two() -> None:
    torch.manual_seed(0)
    conv, x = ConvFrozenNorm(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5, requires_grad=True)
    conv.norm.running_var.uniform_(0.5, 2)
    conv.norm.running_mean.normal_()
    expected = torch.autograd.grad(conv.norm(conv._conv_forward(x, conv.weight, None)).sin().sum(), [x, conv.weight])
    folded = []
    conv.folded = lambda: folded.append(ConvFrozenNorm.folded(conv)) or folded[-1]  # type: ignore[method-assign, func-returns-value]
    output = conv(x).sin().sum()
    gone = weakref.ref(folded.pop()[0])
    assert gone() is None
    for gradient, wanted in zip(torch.autograd.grad(output, [x, conv.weight]), expected, strict=True):
        assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert len(folded) == 1


def test_folded_norm_by_hand() -> None:
    """Weight 2, mean 3, variance 4, scale 6, shift 1: (2x - 3) / 2 * 6 + 1 = 6x - 8, so 5 gives 22."""
    conv = ConvFrozenNorm(1, 1, 1, norm_eps=0.0)
    torch.nn.init.constant_(conv.weight, 2)
    for name, value in {"running_mean": 3, "running_var": 4, "weight": 6, "bias": 1}.items():
        conv.norm.get_buffer(name).fill_(value)
    assert_close(conv(torch.full((1, 1, 1, 1), 5.0)), torch.full((1, 1, 1, 1), 22.0))


def test_frozen_statistics_do_not_move_in_training() -> None:
    backbone = SMALL["efficientnet_lite0"]().train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.randn(1, 3, 32, 32))
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name
