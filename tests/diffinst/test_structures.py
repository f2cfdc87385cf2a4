from __future__ import annotations

import pytest
import torch

from diffinst.structures import Candidates, Features


def test_to_moves_tensors_and_lists_and_keeps_what_is_none() -> None:
    features = Features([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], mask_features=None)
    moved = features.to("meta")
    assert [level.device.type for level in moved.pyramid] == ["meta", "meta"]
    assert moved.mask_features is None
    assert features.pyramid[0].device.type == "cpu"


@pytest.mark.parametrize(("device", "is_waited_for"), [("cpu", True), (torch.device("cpu"), True), ("meta", False)])
def test_copies_to_the_host_are_waited_for(
    device: torch.device | str, is_waited_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: asked.append(non_blocking) or self)
    Candidates(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1)).to(device)
    assert asked == [not is_waited_for] * 3


@pytest.mark.gpu
def test_what_comes_back_from_a_gpu_is_there() -> None:
    boxes = torch.rand(500_000, 4)
    on_gpu = Candidates(boxes.cuda(), boxes[:, 0].cuda(), torch.zeros(len(boxes), device="cuda"))
    for _ in range(20):
        torch.cuda._sleep(10_000_000)  # what is queued before the copy is still at work
        assert torch.equal(on_gpu.to("cpu").boxes_xyxy, boxes)
