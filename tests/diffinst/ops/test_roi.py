import gc
import weakref

import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import roi_align

from diffinst.ops import roi
from diffinst.ops.roi import assign_levels, levels_of_table, pixel_table, pool_boxes, share_table

STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def ops() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_fixture("ops").items() if array.ndim}


def make_pyramid(batch_size=2, channels=3, height=64, width=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch_size, channels, height // s, width // s, generator=generator, dtype=dtype) for s in STRIDES
    ]


def make_boxes(batch_size=2, num_boxes=30, dtype=torch.float32):
    """Boxes of all sizes, many of them partly or wholly outside of the image."""
    generator = torch.Generator().manual_seed(1)
    size = 10 ** (torch.rand(batch_size, num_boxes, 2, generator=generator, dtype=dtype) * 3)
    corner = torch.rand(batch_size, num_boxes, 2, generator=generator, dtype=dtype) * 150 - 40
    return torch.cat([corner, corner + size], dim=-1)


def pool_one_by_one(pyramid, strides, boxes_xyxy, resolution, sampling_ratio):
    """The obvious way: box by box, each with torchvision's operator on its level."""
    pooled = []
    for image, boxes in enumerate(boxes_xyxy):
        for box in boxes:
            level = int(assign_levels(box[None]))
            pooled.append(
                roi_align(
                    pyramid[level][image][None],
                    [box[None]],
                    resolution,
                    1 / strides[level],
                    sampling_ratio,
                    aligned=True,
                )
            )
    return torch.cat(pooled)


@pytest.fixture(params=["bags", "roi_align"])
def method(request):
    return request.param


def test_one_table_serves_all_calls(method):
    pyramid, boxes = make_pyramid(), make_boxes()
    table = pixel_table(pyramid, method)
    assert (table is None) == (method == "roi_align")
    if table is not None:
        assert table.shape == (2 * sum((64 // s) * (96 // s) for s in STRIDES), 3)
        assert_close(table[2 * 16 * 24 + 12], pyramid[1][0, :, 1, 0])  # second level, first image, second row of 12
    alone = pool_boxes(pyramid, STRIDES, boxes, method=method)
    assert torch.equal(pool_boxes(pyramid, STRIDES, boxes, method=method, table=table), alone)


def test_the_pyramid_again_in_the_memory_of_its_table():
    pyramid = make_pyramid()
    table = pixel_table(pyramid, "bags")
    levels = levels_of_table(table, pyramid)
    assert all(torch.equal(level, expected) for level, expected in zip(levels, pyramid, strict=True))
    assert {level.untyped_storage().data_ptr() for level in levels} == {table.untyped_storage().data_ptr()}
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
    half = make_pyramid(dtype=torch.bfloat16)
    kept = levels_of_table(pixel_table(half, "bags"), half)
    assert all(level is expected for level, expected in zip(kept, half, strict=True))


def test_levels_by_hand():
    # 224 px -> p4 (index 2), each halving one level down; log2 just below a whole number falls to the level below.
    sizes = torch.tensor([0.0, 1.0, 56.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 1e6])
    boxes = torch.stack([torch.zeros(10), torch.zeros(10), sizes, sizes], dim=1)
    assert assign_levels(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_levels_parity(ops):
    assert assign_levels(ops["lvl_boxes"]).tolist() == ops["lvl_levels"].tolist()
    assert assign_levels(ops["roi_boxes"]).flatten().tolist() == ops["roi_levels"].tolist()


def test_levels_of_impossible_boxes():
    inf, nan = float("inf"), float("nan")
    boxes = torch.tensor([[0.0, 0, inf, inf], [nan, 0, 1, 1], [5, 5, 1, 1], [-3e38, -3e38, 3e38, 3e38]])
    assert assign_levels(boxes).tolist() == [3, 0, 0, 3]


def test_pool_by_hand(method):
    # A plane f(x, y) = x + 10 y, pixel centres at stride 4: sampling a plane gives the plane at the cell centres.
    height, width = 16, 24
    plane = torch.arange(width)[None] + 10.0 * torch.arange(height)[:, None]
    box = torch.tensor([[[16.0, 8.0, 48.0, 40.0]]])  # in feature pixels x 4..12, y 2..10, less half a pixel
    pooled = pool_boxes([plane[None, None]], [4], box, resolution=2, sampling_ratio=2, method=method)
    # cells 4 px wide: centres at x = 3.5 + 2, 3.5 + 6 and y = 1.5 + 2, 1.5 + 6
    assert_close(pooled, torch.tensor([[[[5.5 + 35, 9.5 + 35], [5.5 + 75, 9.5 + 75]]]]))


def test_pool_parity(ops, method):
    pyramid = [ops[f"roi_p{level}"] for level in (2, 3, 4, 5)]
    pooled = pool_boxes(pyramid, STRIDES, ops["roi_boxes"], resolution=7, sampling_ratio=2, method=method)
    assert_close(pooled, ops["roi_out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("resolution", "sampling_ratio"), [(7, 2), (14, 1), (3, 3)])
def test_pool_equals_one_by_one(method, resolution, sampling_ratio):
    pyramid, boxes = make_pyramid(), make_boxes()
    pooled = pool_boxes(pyramid, STRIDES, boxes, resolution=resolution, sampling_ratio=sampling_ratio, method=method)
    expected = pool_one_by_one(pyramid, STRIDES, boxes, resolution, sampling_ratio)
    assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_pool_gradients_equal_one_by_one(method):
    boxes = make_boxes(dtype=torch.float64)
    gradients = []
    for pool in (
        lambda levels: pool_boxes(levels, STRIDES, boxes, method=method),
        lambda levels: pool_one_by_one(levels, STRIDES, boxes, 7, 2),
    ):
        pyramid = [level.requires_grad_() for level in make_pyramid(dtype=torch.float64)]
        pooled = pool(pyramid)
        weights = torch.linspace(-1, 1, pooled.numel(), dtype=torch.float64).reshape(pooled.shape)
        (pooled * weights).sum().backward()
        gradients.append([level.grad for level in pyramid])
    assert_close(gradients[0], gradients[1])


def test_poolings_of_a_shared_table_add_up_their_gradients():
    pyramid, boxes = [level.requires_grad_() for level in make_pyramid()], make_boxes()
    weights = torch.randn(2, 30, 3, 7, 7, generator=torch.Generator().manual_seed(2))
    parts = [(boxes[:, some], weights[:, some]) for some in (slice(20), slice(20, None))]

    def gradients(share):
        table = share(pixel_table(pyramid, "bags"))
        sums = [
            (pool_boxes(pyramid, STRIDES, some, method="bags", table=table) * part.flatten(0, 1)).sum()
            for some, part in parts
        ]
        found = torch.autograd.grad(sum(sums), pyramid, retain_graph=True)
        # The same graph again: nothing of the first time is left over.
        for first, second in zip(found, torch.autograd.grad(sum(sums), pyramid), strict=True):
            assert torch.equal(first, second)
        return found

    pooled = pool_one_by_one(pyramid, STRIDES, boxes, 7, 2)
    expected = torch.autograd.grad((pooled * weights.flatten(0, 1)).sum(), pyramid)
    for share in (lambda table: table, share_table):
        for gradient, wanted in zip(gradients(share), expected, strict=True):
            assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


def test_a_shared_table_is_gone_with_what_used_it():
    pyramid = [level.requires_grad_() for level in make_pyramid()]
    gc.collect()
    gc.disable()  # no cycle keeps it
    try:
        table = share_table(pixel_table(pyramid, "bags"))
        total = weakref.ref(table.total)
        loss = pool_boxes(pyramid, STRIDES, make_boxes(), method="bags", table=table).sum()
        loss.backward()
        del table, loss
        assert total() is None
    finally:
        gc.enable()


def test_a_table_without_gradients_gives_none():
    pyramid = make_pyramid()
    pooled = pool_boxes(pyramid, STRIDES, make_boxes(), method="bags", table=share_table(pixel_table(pyramid, "bags")))
    assert not pooled.requires_grad


def test_pool_reads_channels_last_alike(method):
    pyramid, boxes = make_pyramid(channels=8), make_boxes()
    strided = [level.contiguous(memory_format=torch.channels_last) for level in pyramid]
    assert_close(pool_boxes(strided, STRIDES, boxes, method=method), pool_boxes(pyramid, STRIDES, boxes, method=method))


def test_levels_apart_are_all_levels_with_the_others_out_of_sight(monkeypatch):
    boxes, found = make_boxes(), []
    for apart in (roi._pool_levels_apart, roi._pool_by_level):
        monkeypatch.setattr(roi, "_pool_levels_apart", apart)
        pyramid = [level.requires_grad_() for level in make_pyramid()]
        pooled = pool_boxes(pyramid, STRIDES, boxes, method="roi_align")
        assert torch.equal(
            pooled, pool_boxes([level.detach() for level in pyramid], STRIDES, boxes, method="roi_align")
        )
        (pooled * torch.arange(pooled.numel()).view_as(pooled).cos()).sum().backward()
        found.append([pooled, *(level.grad for level in pyramid)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_pyramid_is_laid_out_once(method):
    pyramid = [level.contiguous(memory_format=torch.channels_last) for level in make_pyramid()]
    laid_out = roi.lay_out(pyramid, method)
    assert all(torch.equal(one, other) for one, other in zip(laid_out, pyramid, strict=True))
    assert all(level.is_contiguous() == (method == "roi_align") for level in laid_out)


def test_pool_survives_boxes_that_are_not_finite(method):
    inf, nan = float("inf"), float("nan")
    boxes = torch.tensor([[[nan, nan, nan, nan], [-inf, -inf, inf, inf], [0, 0, inf, 5], [3e38, 0, -3e38, 9]]])
    pooled = pool_boxes(make_pyramid(batch_size=1), STRIDES, boxes, method=method)
    assert pooled.isfinite().all()


def test_pool_without_boxes(method):
    pyramid = [level.requires_grad_() for level in make_pyramid()]
    pooled = pool_boxes(pyramid, STRIDES, torch.zeros(2, 0, 4), method=method)
    assert pooled.shape == (2 * 0, 3, 7, 7)
    for gradient in torch.autograd.grad(pooled.sum(), pyramid):
        assert not gradient.any()


def test_pool_waits_for_nothing(method):
    # The meta device has no values: whatever would need one on the host raises.
    pyramid = [level.to("meta") for level in make_pyramid()]
    assert pool_boxes(pyramid, STRIDES, make_boxes().to("meta"), method=method).shape == (60, 3, 7, 7)


def test_auto_takes_bags_on_a_cpu():
    pyramid, boxes = make_pyramid(), make_boxes()
    auto, bags, operator = (pool_boxes(pyramid, STRIDES, boxes, method=m) for m in ("auto", "bags", "roi_align"))
    assert torch.equal(auto, bags)
    assert not torch.equal(auto, operator)  # they round otherwise


@given(st.integers(1, 3), st.integers(0, 6))
def test_pool_of_batch_equals_images(batch_size, num_boxes):
    pyramid, boxes = make_pyramid(batch_size), make_boxes(batch_size, num_boxes)
    alone = [pool_boxes([level[i : i + 1] for level in pyramid], STRIDES, boxes[i : i + 1]) for i in range(batch_size)]
    assert_close(pool_boxes(pyramid, STRIDES, boxes), torch.cat(alone))


def test_torchvisions_pooling_is_refused_without_its_operators(monkeypatch):
    def operators():
        raise ImportError("no operators")

    monkeypatch.setattr(roi, "operators", operators)
    assert pool_boxes(make_pyramid(1), STRIDES, make_boxes(1, 2), method="bags").shape[0] == 2
    with pytest.raises(ImportError, match="no operators"):
        pool_boxes(make_pyramid(1), STRIDES, make_boxes(1, 2), method="roi_align")


def test_pool_in_half_precision():
    pyramid, boxes = make_pyramid(channels=8), make_boxes()
    half = [level.bfloat16().requires_grad_() for level in pyramid]
    pooled = pool_boxes(half, STRIDES, boxes)
    assert pooled.dtype == torch.bfloat16
    exact = pool_boxes([level.detach().float() for level in half], STRIDES, boxes)
    assert_close(pooled, exact.bfloat16())
    pooled.sum().backward()
    assert half[0].grad.isfinite().all()


@pytest.mark.gpu
def test_pool_on_a_gpu_equals_cpu():
    pyramid, boxes = make_pyramid(), make_boxes()
    pooled = pool_boxes([level.cuda() for level in pyramid], STRIDES, boxes.cuda())
    assert_close(pooled.cpu(), pool_boxes(pyramid, STRIDES, boxes), rtol=1e-4, atol=1e-5)
