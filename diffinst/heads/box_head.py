"""The iterative box head: what is run once per sampling step (DiffusionDet, arXiv:2211.09788 section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from diffinst.heads.compiled import call_compiled
from diffinst.heads.dynamic_conv import DynamicConv
from diffinst.heads.time_embedding import TimeEmbedding
from diffinst.ops.boxes import apply_deltas
from diffinst.ops.linear import Linear
from diffinst.ops.paths import note_path
from diffinst.ops.roi import BoxPooling, SharedTable, lay_out, pixel_table, pool_boxes, share_table
from diffinst.structures import HeadOutput

# The bias that makes every class start at this probability, so that the many negatives do not swamp the focal loss
# (RetinaNet, arXiv:1708.02002 section 4.1).
PRIOR_PROBABILITY = 0.01
PRIOR_BIAS = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)


def _tower(dim: int, num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU()]
    return nn.Sequential(*layers)


class BoxHeadStage(nn.Module):
    """Refines the boxes once and predicts classes and mask filters for them.

    Args:
        num_classes: K.
        num_mask_params: P filter parameters per proposal, or None for boxes only.
        dim: width D of the pyramid and of the proposal features.
        time_dim: width of the time embedding.
        dim_feedforward, dim_dynamic, num_attention_heads, dropout: sizes of the proposal's transformer layer.
        num_class_layers, num_box_layers: hidden layers before the class logits; before box deltas and mask filters.
        strides: of the pyramid's levels, finest first.
        pooler_resolution, pooler_sampling_ratio: side of the RoI features; samples per bin and axis.
        box_pooling: how RoI features are computed, see `diffinst.ops.roi.pool_boxes`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_mask_params: int | None,
        dim: int,
        time_dim: int,
        dim_feedforward: int,
        dim_dynamic: int,
        num_attention_heads: int,
        num_class_layers: int,
        num_box_layers: int,
        strides: Sequence[int],
        pooler_resolution: int = 7,
        pooler_sampling_ratio: int = 2,
        box_pooling: BoxPooling = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.pooler_resolution = pooler_resolution
        self.pooler_sampling_ratio = pooler_sampling_ratio
        self.box_pooling = box_pooling

        self.self_attention = nn.MultiheadAttention(dim, num_attention_heads, dropout=dropout, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.dynamic_conv = DynamicConv(dim=dim, dim_dynamic=dim_dynamic, resolution=pooler_resolution)
        self.dynamic_conv_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            Linear(dim, dim_feedforward), nn.ReLU(), nn.Dropout(dropout), Linear(dim_feedforward, dim)
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.time_affine = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim))

        self.class_tower = _tower(dim, num_class_layers)
        self.box_tower = _tower(dim, num_box_layers)
        self.class_logits = nn.Linear(dim, num_classes)
        nn.init.constant_(self.class_logits.bias, PRIOR_BIAS)
        self.box_deltas = nn.Linear(dim, 4)
        self.mask_params = None if num_mask_params is None else Linear(dim, num_mask_params)

    def forward(
        self,
        pyramid: list[Tensor],
        boxes_xyxy: Tensor,
        proposal_features: Tensor | None,
        time_embedding: Tensor,
        table: Tensor | SharedTable | None = None,
        *,
        compiled: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """One refinement.

        Args:
            pyramid: (B, D, H/s, W/s) per stride s.
            boxes_xyxy: (B, N, 4) pixels.
            proposal_features: (B, N, D) of the stage before, None at the first.
            time_embedding: (B, time_dim).
            table: `diffinst.ops.roi.pixel_table` of the pyramid; made where needed if not given.
            compiled: all but the pooling, whose shapes are those of the image, through `torch.compile`.
        Returns:
            class_logits (B, N, K), boxes_xyxy (B, N, 4), mask_params (B, N, P) or None, proposal_features (B, N, D);
            the first three in float32.
        """
        batch, num_proposals = boxes_xyxy.shape[:2]
        pool = partial(
            pool_boxes,
            pyramid,
            self.strides,
            boxes_xyxy,
            resolution=self.pooler_resolution,
            sampling_ratio=self.pooler_sampling_ratio,
            method=self.box_pooling,
            table=table,
        )
        roi_features = pool()  # (B*N, D, r, r)
        if proposal_features is None:
            proposal_features = roi_features.mean(dim=(2, 3)).unflatten(0, (batch, num_proposals))
        if compiled:
            return call_compiled(
                BoxHeadStage._refine, self, roi_features, boxes_xyxy, proposal_features, time_embedding
            )
        return self._refine(roi_features, boxes_xyxy, proposal_features, time_embedding, pool)

    def _refine(
        self,
        roi_features: Tensor,
        boxes_xyxy: Tensor,
        x: Tensor,
        time_embedding: Tensor,
        pool: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What `forward` does with (B*N, D, r, r) RoI features and (B, N, D) proposal features x.

        Args:
            pool: makes the RoI features again.
        """
        attended = self.self_attention(x, x, x, need_weights=False)[0]
        x = self.self_attention_norm(x + self.dropout(attended))
        interacted = self.dynamic_conv(x.flatten(0, 1), roi_features, pool).unflatten(0, x.shape[:2])
        x = self.dynamic_conv_norm(x + self.dropout(interacted))
        x = self.feedforward_norm(x + self.dropout(self.feedforward(x)))
        proposal_features = x

        scale, shift = self.time_affine(time_embedding)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        x = x * (scale + 1) + shift
        box_features = self.box_tower(x)
        # Coordinates and scores keep full precision whatever the autocast type.
        class_logits = self.class_logits(self.class_tower(x)).float()
        mask_params = None if self.mask_params is None else self.mask_params(box_features).float()
        boxes_xyxy = apply_deltas(self.box_deltas(box_features).float(), boxes_xyxy)
        return class_logits, boxes_xyxy, mask_params, proposal_features


class BoxHead(nn.Module):
    """A cascade of stages with weights of their own, conditioned on the diffusion timestep.

    Takes the arguments of `BoxHeadStage` (all but `time_dim`) and `num_stages`.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        num_classes: int,
        num_mask_params: int | None,
        dim: int,
        dim_feedforward: int,
        dim_dynamic: int,
        num_attention_heads: int,
        num_class_layers: int,
        num_box_layers: int,
        strides: Sequence[int],
        pooler_resolution: int = 7,
        pooler_sampling_ratio: int = 2,
        box_pooling: BoxPooling = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.box_pooling = box_pooling
        self.time_embedding = TimeEmbedding(dim)
        self.stages = nn.ModuleList(
            BoxHeadStage(
                num_classes=num_classes,
                num_mask_params=num_mask_params,
                dim=dim,
                time_dim=self.time_embedding.out_dim,
                dim_feedforward=dim_feedforward,
                dim_dynamic=dim_dynamic,
                num_attention_heads=num_attention_heads,
                num_class_layers=num_class_layers,
                num_box_layers=num_box_layers,
                strides=strides,
                pooler_resolution=pooler_resolution,
                pooler_sampling_ratio=pooler_sampling_ratio,
                box_pooling=box_pooling,
                dropout=dropout,
            )
            for _ in range(num_stages)
        )
        # Biases and norms keep torch's defaults.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def pixel_table(self, pyramid: list[Tensor]) -> Tensor | None:
        """What all calls on one pyramid share, see `diffinst.ops.roi.pixel_table`."""
        return pixel_table(pyramid, self.box_pooling)

    def lay_out(self, pyramid: list[Tensor]) -> list[Tensor]:
        """The pyramid as all calls on it read it, see `diffinst.ops.roi.lay_out`."""
        return lay_out(pyramid, self.box_pooling)

    def forward(
        self,
        pyramid: list[Tensor],
        boxes_xyxy: Tensor,
        t: Tensor,
        table: Tensor | None = None,
        *,
        compiled: bool = False,
    ) -> HeadOutput:
        """Denoises boxes.

        Args:
            pyramid: (B, D, H/s, W/s) per stride s, finest first.
            boxes_xyxy: (B, N, 4) noisy boxes in pixels, on the pyramid's device.
            t: (B,) diffusion timesteps.
            table: `pixel_table` of the pyramid; made here if not given.
            compiled: the stages through `torch.compile`, in inference.
        Returns:
            Predictions of every stage. Boxes pass between stages without gradient, proposal features with it.
        """
        note_path("box_head", "compiled" if compiled else "eager")
        time_embedding = self.time_embedding(t)
        boxes_xyxy = boxes_xyxy.float()
        if table is None:
            table = self.pixel_table(pyramid)
        shared = None if table is None else share_table(table)
        proposal_features: Tensor | None = None
        class_logits, boxes, mask_params = [], [], []
        for stage in self.stages:
            stage_logits, boxes_xyxy, stage_mask_params, proposal_features = stage(
                pyramid, boxes_xyxy.detach(), proposal_features, time_embedding, shared, compiled=compiled
            )
            class_logits.append(stage_logits)
            boxes.append(boxes_xyxy)
            if stage_mask_params is not None:
                mask_params.append(stage_mask_params)
        return HeadOutput(
            class_logits=torch.stack(class_logits),
            boxes_xyxy=torch.stack(boxes),
            mask_params=torch.stack(mask_params) if mask_params else None,
        )
