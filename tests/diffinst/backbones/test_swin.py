from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from helpers import load_fixture, load_json_fixture
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from diffinst.backbones.fpn import FPN
from diffinst.backbones.registry import BACKBONES
from diffinst.backbones.swin import Swin, _WindowAttention, swin_b, swin_l, swin_s, swin_t
from diffinst.released_names import from_released_name, rename_released


@pytest.fixture(scope="module")
def fixture() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_fixture("swin_tiny").items()}


@pytest.fixture(scope="module")
def released(fixture: dict[str, Tensor]) -> Swin:
    swin = Swin(embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8))
    weights = {f"backbone.bottom_up.{name[4:]}": value for name, value in fixture.items() if name.startswith("sd__")}
    swin.load_state_dict({name.removeprefix("backbone."): value for name, value in rename_released(weights).items()})
    return swin.eval()


# Among the maps: higher than a window, lower, as high; as wide and not as high; each shifted and not.
@pytest.mark.parametrize(("images", "maps"), [("x", "out"), ("x2", "out2")])
def test_parity_at_sizes_that_need_padding(fixture: dict[str, Tensor], released: Swin, images: str, maps: str) -> None:
    with torch.no_grad():
        features = released(fixture[images].float())
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for index, x in enumerate(features.values()):
        expected = fixture[f"{maps}_swin{index}"]
        assert_close(x, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item(), msg=f"{maps} {index}")


def slow_attention(layer: _WindowAttention, x: Tensor, *, shift: int) -> Tensor:
    """Pixel by pixel: who shares its window after the shift, and was near it before."""
    window, heads = layer.window_size[0], layer.num_heads
    height, width, channels = x.shape[1:]
    padded = functional.pad(x[0], (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = padded.shape[:2]
    q, k, v = layer.qkv(padded).view(rows, columns, 3, heads, channels // heads).unbind(2)
    table = layer.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, heads)
    out = torch.empty(rows, columns, channels)
    for y, z in itertools.product(range(rows), range(columns)):
        # In the shifted map pixel (y, z) is at (sy, sz); what wrapped around is set apart by the mask.
        sy, sz = (y - shift) % rows, (z - shift) % columns
        logits, values = [], []
        for ty, tz in itertools.product(range(window), range(window)):
            ty, tz = sy // window * window + ty, sz // window * window + tz
            if (ty >= rows - shift) != (sy >= rows - shift) or (tz >= columns - shift) != (sz >= columns - shift):
                continue
            other = (ty + shift) % rows, (tz + shift) % columns
            bias = table[sy - ty + window - 1, sz - tz + window - 1]
            logits.append((q[y, z] * k[other]).sum(-1) / (channels // heads) ** 0.5 + bias)
            values.append(v[other])
        weights = torch.stack(logits).softmax(dim=0)
        out[y, z] = (weights[..., None] * torch.stack(values)).sum(dim=0).flatten()
    return layer.proj(out)[None, :height, :width]


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(4, 4), (3, 2), (3, 4), (4, 9), (9, 2), (5, 8)])
def test_attention_equals_slow_twin(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    layer = _WindowAttention(6, [4, 4], [shift, shift], num_heads=2)
    with torch.no_grad():
        layer.relative_position_bias_table.normal_()
        x = torch.randn(1, *size, 6)
        assert_close(layer(x), slow_attention(layer, x, shift=shift), rtol=1e-5, atol=1e-6)


def test_torchvisions_attention_forgets_the_shift_of_a_single_window() -> None:
    """Why `_WindowAttention` is here; when this fails, it may go."""
    torch.manual_seed(0)
    ours = _WindowAttention(6, [4, 4], [2, 2], num_heads=2)
    theirs = torchvision.models.swin_transformer.ShiftedWindowAttention(6, [4, 4], [2, 2], num_heads=2)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    with torch.no_grad():
        large, small = torch.randn(1, 5, 6, 6), torch.randn(1, 4, 3, 6)
        assert torch.equal(ours(large), theirs(large))
        assert not torch.allclose(ours(small), theirs(small), atol=1e-3)


def test_names_shapes_and_counts_of_the_base_size_are_the_releases() -> None:
    keys = load_json_fixture("keys_backbone_swinb_fpn")
    info = load_json_fixture("backbone_info")["swinb_fpn"]
    with torch.device("meta"):
        backbone = swin_b()
        fpn = FPN(backbone.out_shapes, out_channels=256)
    ours = {
        f"{part}.{name}": list(value.shape)
        for part, module in (("backbone", backbone), ("fpn", fpn))
        for name, value in module.state_dict().items()
    }
    released = {from_released_name(f"backbone.{name}"): shape for name, (shape, _) in keys.items()}
    del released[None]  # relative_position_index
    assert ours == released
    parameters = [*backbone.parameters(), *fpn.parameters()]
    assert sum(p.numel() for p in parameters) == info["n_params"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == info["trainable"]


# 29, 50, 88 and 197 million in table 1 of arXiv:2103.14030, with the classifier.
@pytest.mark.parametrize(
    ("build", "millions", "channels", "window", "depths", "rate"),
    [
        (swin_t, 27.5, 96, 7, (2, 2, 6, 2), 0.2),
        (swin_s, 48.8, 96, 7, (2, 2, 18, 2), 0.2),
        (swin_b, 86.7, 128, 7, (2, 2, 18, 2), 0.3),
        (swin_l, 195.0, 192, 7, (2, 2, 18, 2), 0.3),
        (lambda: swin_b(12), 86.9, 128, 12, (2, 2, 18, 2), 0.3),
        (lambda: swin_l(12), 195.2, 192, 12, (2, 2, 18, 2), 0.3),
    ],
)
def test_published_sizes(
    build: object, millions: float, channels: int, window: int, depths: tuple[int, ...], rate: float
) -> None:
    with torch.device("meta"):
        swin = build()  # type: ignore[operator]
    assert sum(p.numel() for p in swin.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert list(swin.out_shapes.values()) == [(channels * 2**i, 4 * 2**i) for i in range(4)]
    assert tuple(len(stage) for stage in swin.stages) == depths
    blocks = [block for stage in swin.stages for block in stage]
    assert {block.attn.num_heads * 32 for block in swin.stages[2]} == {4 * channels}
    assert {tuple(block.attn.window_size) for block in blocks} == {(window, window)}
    assert [block.attn.shift_size[0] for block in swin.stages[2][:4]] == [0, window // 2] * 2
    assert blocks[0].stochastic_depth.p == 0.0
    assert blocks[-1].stochastic_depth.p == pytest.approx(rate)
    assert blocks[1].stochastic_depth.p == pytest.approx(rate / (sum(depths) - 1))


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("swin")])
def test_all_is_trained_whatever_freeze_at_says(name: str) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name](5)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_the_index_of_relative_positions_is_no_part_of_the_state(released: Swin) -> None:
    assert not [name for name in released.state_dict() if "index" in name]
    assert released.stages[0][0].attn.relative_position_index.shape == (49 * 49,)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 33), (32, 32)])
def test_any_size(released: Swin, height: int, width: int) -> None:
    with torch.no_grad():
        features = released(torch.zeros(1, 3, height, width))
    for stride, x in zip((4, 8, 16, 32), features.values()):
        assert x.shape[-2:] == (-(-height // stride), -(-width // stride))
        assert x.isfinite().all()


def test_stochastic_depth_is_a_function_of_the_seed() -> None:
    swin = Swin(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 1, 1, 1), window_size=3, stochastic_depth=0.5)
    images = torch.randn(2, 3, 32, 32)

    def last_map(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return swin(images)["res5"]

    assert torch.equal(last_map(0), last_map(0))
    assert not torch.equal(last_map(0), last_map(1))
    swin.eval()
    assert torch.equal(last_map(0), last_map(1))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    swin = Swin(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    for name in ("stages.1.0.attn.qkv", "stages.2.0.mlp.0", "merges.1.reduction"):
        layer = swin.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        assert layer.bias is None or not layer.bias.any(), name
    assert swin.stages[0][0].attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.2)
