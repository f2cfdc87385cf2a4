import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from diffinst.ops.rle import decode_rle, encode_masks


def encode_with_pycocotools(mask: np.ndarray) -> dict:
    encoding = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoding["size"], "counts": encoding["counts"].decode()}


def test_by_hand():
    # Column by column: 0 1 1 0 -> one zero, two ones, one zero; each below 32 is one character, 48 + count
    mask = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.bool)
    assert encode_masks(mask) == [{"size": [2, 2], "counts": "121"}]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_equals_pycocotools(seed, height, width, density):
    masks = np.random.default_rng(seed).random((3, height, width)) < density
    expected = [encode_with_pycocotools(mask) for mask in masks]
    assert encode_masks(masks) == expected
    assert encode_masks(torch.from_numpy(masks)) == expected
    assert (np.stack([decode_rle(encoding) for encoding in expected]) == masks).all()


@pytest.mark.parametrize("value", [False, True])
def test_uniform_masks(value):
    masks = torch.full((2, 13, 7), value)
    assert encode_masks(masks) == [encode_with_pycocotools(mask.numpy()) for mask in masks]


def test_layout_does_not_matter():
    masks = torch.rand(4, 11, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    column_by_column = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert encode_masks(column_by_column) == encode_masks(masks) == encode_masks(masks.to(torch.uint8))


def test_encodings_go_through_json():
    masks = torch.rand(2, 50, 60, generator=torch.Generator().manual_seed(0)) > 0.5
    encodings = json.loads(json.dumps(encode_masks(masks)))
    assert (np.stack([decode_rle(encoding) for encoding in encodings]) == masks.numpy()).all()


def test_decodes_bytes_too():
    encoding = {"size": [2, 2], "counts": b"121"}
    assert decode_rle(encoding).tolist() == [[False, True], [True, False]]


def test_no_masks():
    assert encode_masks(torch.zeros(0, 5, 6, dtype=torch.bool)) == []
