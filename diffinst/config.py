"""Configuration as values: frozen, comparable, printable, checked on creation. Loads no torch.

Every field name is unique across the sections, so that a suite may use it bare as an axis (`sampling_steps: [1, 4]`).
Where the released code departs from its own intent, a field holds both behaviours; `RELEASED` is the set of values that
reproduces the release, and the defaults are the intended ones. `DIFFERENCES.md` explains each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IntTuple = Annotated[tuple[int, ...], Field(strict=False)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]

_NEUTRAL = "neutral"


def added(default: Any, **settings: Any) -> Any:
    """A field that came after results were first recorded; its default means what was done before there was a choice.

    At that value it is no part of what identifies a result (`identity`), so that earlier results stay valid.
    """
    return Field(default=default, json_schema_extra={_NEUTRAL: True}, **settings)


BackboneName = Literal[
    "resnet50",
    "resnet101",
    "swin_t",
    "swin_s",
    "swin_b",
    "swin_l",
    "swin_b_384",
    "swin_l_384",
    "efficientnet_lite0",
    "tiny",
]


# Of these, `freeze_at` freezes stages; the others train whole. A test holds the names to the backbones.
FREEZING_BACKBONES: tuple[BackboneName, ...] = ("resnet50", "resnet101", "efficientnet_lite0")


class Section(BaseModel):
    """Base of all configuration sections: strict types, unknown keys refused, values frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ModelConfig(Section):
    """The network. Defaults are the published ResNet-50 model (released configs, arXiv:2212.02773 section 4)."""

    backbone: BackboneName = "resnet50"
    backbone_weights: str = Field(
        default="none",
        description="'none' (random), 'imagenet' (where an installable package carries them), or a safetensors file",
    )
    weights: str = added(
        "none", description="a safetensors file with the whole model's weights: nothing is trained; or 'none'"
    )
    freeze_at: Annotated[int, Field(ge=0, le=5)] = Field(
        default=2, description="stages frozen in training: 0 none, 1 stem, 2 stem and res2, ...; Swin and tiny: none"
    )
    num_classes: PositiveInt | None = Field(default=None, description="None: taken from the data set")
    hidden_dim: PositiveInt = 256
    num_stages: PositiveInt = 6
    num_attention_heads: PositiveInt = 8
    dim_feedforward: PositiveInt = 2048
    dim_dynamic: PositiveInt = 64
    num_class_layers: NonNegativeInt = 1
    num_box_layers: NonNegativeInt = 3
    pooler_resolution: PositiveInt = 7
    pooler_sampling_ratio: PositiveInt = 2
    box_pooling: Literal["auto", "roi_align", "bags"] = added(
        "auto",
        description="torchvision's roi_align (release), weighted bags of pixels, or the faster: bags on a CPU",
    )
    dropout: Probability = 0.0
    mask: Literal["dynamic", "none"] = Field(default="dynamic", description="'none' is DiffusionDet: boxes only")
    mask_branch_channels: PositiveInt = 128
    mask_branch_layers: NonNegativeInt = 4
    mask_feature_channels: PositiveInt = 8
    mask_head_channels: IntTuple = (8, 8)
    mask_head_kernel: Literal["auto", "torch", "triton"] = added(
        "auto",
        description="in detection: matrix products, or one Triton kernel on a GPU; auto: torch, as triton is untimed",
    )
    mask_norm: Literal["batch", "group"] = "batch"
    snr_scale: PositiveFloat = 2.0
    num_train_timesteps: PositiveInt = 1000
    init: Literal["released", "fixed"] = Field(
        default="fixed", description="'released' finds the class bias by shape and hits others at small class counts"
    )

    @model_validator(mode="after")
    def _check_divisibility(self) -> ModelConfig:
        if self.hidden_dim % self.num_attention_heads:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be a multiple of num_attention_heads ({self.num_attention_heads})"
            )
        if self.hidden_dim % 2:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be even: half of the time embedding is sin, half cos"
            )
        return self


class SamplerConfig(Section):
    """Inference: how boxes are denoised and which detections are kept. Changing it never needs a new training."""

    sampling_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    num_proposals: PositiveInt = 500
    eval_seed: NonNegativeInt = 0
    eta: Probability = Field(default=1.0, description="0 is deterministic DDIM, 1 is ancestral sampling")
    renewal: bool = True
    renewal_threshold: Probability = 0.5
    renewal_order: Literal["front", "in_place"] = added(
        "in_place", description="kept proposals move to the front (release), or stay in their slots"
    )
    ensemble: Literal["all", "all_but_last", "none"] = Field(
        default="all",
        description="which steps' detections are pooled; the release drops the last one when there are several",
    )
    predict_noise_from: Literal["clamped", "unclamped"] = Field(
        default="clamped", description="x_t as the head saw it, or (release) before clamping"
    )
    zero_size_proposals: Literal["keep", "clamp"] = Field(
        default="clamp", description="'keep' (release) lets noise make boxes of zero width or height, which stay so"
    )
    nms_iou_threshold: Probability | None = Field(default=0.5, description="class-wise; null: no suppression")
    score_threshold: Probability = 0.0
    max_detections: PositiveInt | None = Field(default=100, description="per image, by score; null (release): no limit")
    mask_threshold: Probability = 0.5
    mask_clip: Literal["truncated", "covering"] = Field(
        default="covering", description="masks end at the box: corners truncated (release), or every pixel it touches"
    )
    inference_precision: Literal["fp32", "bf16"] = added(
        "fp32", description="bf16: backbone and head under autocast; boxes, scores and masks stay float32"
    )
    compile: Literal["none", "head"] = added(
        "none", description="head: the box head's stages through torch.compile, all but their pooling"
    )
    use_ema: bool = added(False, description="the moving average of the weights, which train.ema_decay keeps")
    tta: bool = added(False, description="test-time augmentation: all of tta_*; false: the test size alone")
    tta_shortest_edges: IntTuple = added((400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800, 800))
    tta_longest_edge: PositiveInt = added(4000)
    tta_flip: bool = added(True, description="each size mirrored, too")
    tta_min_box_sizes: IntTuple = added(
        (96, 96, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0),
        description="of each size, detections whose box is larger are kept: root of the area in its pixels; empty: all",
    )
    tta_max_box_sizes: IntTuple = added(
        (10000, 10000, 10000, 10000, 10000, 10000, 10000, 256, 256, 192, 192, 96, 10000),
        description="of each size, detections whose box is smaller are kept; empty: all",
    )
    tta_merge: Literal["soft_vote", "vote", "nms"] = added("soft_vote")
    tta_vote_iou_threshold: Probability = added(0.65, description="boxes that vote together")

    @model_validator(mode="after")
    def _check_augmentation(self) -> SamplerConfig:
        num_sizes = len(self.tta_shortest_edges)
        if not num_sizes:
            raise ValueError("tta_shortest_edges needs at least one size")
        if min(self.tta_shortest_edges) < 1:
            raise ValueError(f"tta_shortest_edges {list(self.tta_shortest_edges)} must be at least 1 each")
        for name in ("tta_min_box_sizes", "tta_max_box_sizes"):
            if len(getattr(self, name)) not in (0, num_sizes):
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {num_sizes} tta_shortest_edges")
        return self


class TrainConfig(Section):
    """Optimisation, targets and losses (released configs; batch 16)."""

    seed: NonNegativeInt = 0
    iterations: PositiveInt = 450_000
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2.5e-5
    weight_decay: NonNegativeFloat = 1e-4
    clip_gradient_norm: PositiveFloat | None = 1.0
    warmup_iterations: NonNegativeInt = 1000
    warmup_factor: Probability = 0.01
    schedule: Literal["step", "cosine"] = "step"
    schedule_steps: IntTuple = (350_000, 420_000)
    schedule_gamma: Probability = 0.1
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU that has bf16 units, else fp32"
    )
    num_train_proposals: PositiveInt = 500
    proposal_padding: Literal["concat", "repeat"] = "concat"
    matcher: Literal["released", "fixed"] = Field(
        default="fixed", description="'released' may lose instances; both end after a bounded number of rounds"
    )
    ota_k: PositiveInt = 5
    empty_batch_loss: Literal["released", "fixed"] = Field(
        default="fixed", description="'released' gives mask branch and filters no gradient when a batch has no instance"
    )
    class_weight: NonNegativeFloat = 2.0
    l1_weight: NonNegativeFloat = 5.0
    giou_weight: NonNegativeFloat = 2.0
    mask_weight: NonNegativeFloat = 5.0
    focal_alpha: Probability = 0.25
    focal_gamma: NonNegativeFloat = 2.0
    class_loss: Literal["focal", "bce"] = added("focal")
    federated_loss: bool = added(False, description="classes of the batch and sampled others only (LVIS)")
    federated_classes: PositiveInt = added(50, description="per stage; the background index counts, so one less")
    federated_power: NonNegativeFloat = added(0.5, description="of a class's image count, its weight when sampled")
    repeat_threshold: PositiveFloat | None = added(
        None, description="images of classes on a smaller share of images are repeated (LVIS: 0.001); null: no"
    )
    ema_decay: Probability | None = added(None, description="moving average of the weights; null: none")
    checkpoint_every: PositiveInt = 5000
    log_every: PositiveInt = 20
    num_workers: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        if list(self.schedule_steps) != sorted(set(self.schedule_steps)):
            raise ValueError(f"schedule_steps {list(self.schedule_steps)} must rise")
        return self


class DataConfig(Section):
    """Which images, and how they are resized and augmented.

    `dataset` names an entry of `diffinst.data.catalog`; 'custom' takes the four explicit paths instead.
    """

    dataset: str = "shapes"
    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    train_image_ids: str | None = Field(
        default=None, description="text file, one image id a line, restricting the split"
    )
    val_image_ids: str | None = Field(default=None, description="text file, one image id a line, restricting the split")
    class_agnostic: bool = Field(default=False, description="all categories become one")
    annotation_format: Literal["coco", "lvis"] = added("coco", description="of a custom data set's files")
    skip_invalid: bool = Field(default=False, description="drop malformed annotations (counted) instead of stopping")
    shortest_edge_train: IntTuple = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    longest_edge_train: PositiveInt = 1333
    shortest_edge_test: PositiveInt = 800
    longest_edge_test: PositiveInt = 1333
    flip_probability: Probability = 0.5
    crop_probability: Probability = 0.5
    crop_shortest_edge: IntTuple = (400, 500, 600)
    crop_size_range: IntTuple = (384, 600)
    crop_boxes: Literal["released", "fixed"] = Field(
        default="fixed", description="after a crop: boxes clipped (release) or recomputed from the cropped masks"
    )
    eval_batch_size: PositiveInt = 1
    shapes_train_images: PositiveInt = 2000
    shapes_val_images: PositiveInt = 200
    shapes_image_size: Annotated[int, Field(ge=32)] = 96
    shapes_seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_sizes(self) -> DataConfig:
        if not self.shortest_edge_train:
            raise ValueError("shortest_edge_train needs at least one size")
        if len(self.crop_size_range) != 2 or self.crop_size_range[0] > self.crop_size_range[1]:
            raise ValueError(f"crop_size_range {list(self.crop_size_range)} must be [min, max]")
        if self.crop_probability > 0 and not self.crop_shortest_edge:
            raise ValueError("crop_shortest_edge needs at least one size when crop_probability is above 0")
        return self


class Config(Section):
    """One run: what is trained on what, and how it is sampled. Stored whole in every checkpoint and record."""

    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()

    @model_validator(mode="after")
    def _check_steps(self) -> Config:
        steps, timesteps = self.sampler.sampling_steps, self.model.num_train_timesteps
        if steps > timesteps:
            raise ValueError(f"sampling_steps ({steps}) must not exceed num_train_timesteps ({timesteps})")
        return self

    @model_validator(mode="after")
    def _check_average(self) -> Config:
        if self.sampler.use_ema and self.train.ema_decay is None and self.model.weights == "none":
            raise ValueError("use_ema needs the average that ema_decay keeps (0.999 as released), or model.weights")
        return self


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "sampler": SamplerConfig,
    "train": TrainConfig,
    "data": DataConfig,
}

# The values that reproduce the released code where it departs from its own intent; `preset: released` in a suite.
RELEASED: dict[str, dict[str, Any]] = {
    "model": {"init": "released", "box_pooling": "roi_align"},
    "sampler": {
        "renewal_order": "front",
        "ensemble": "all_but_last",
        "predict_noise_from": "unclamped",
        "zero_size_proposals": "keep",
        "max_detections": None,
        "mask_clip": "truncated",
    },
    "train": {"matcher": "released", "empty_batch_loss": "released", "precision": "fp32"},
    "data": {"crop_boxes": "released"},
}


def identity(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a section's values, as JSON, those that tell results apart: all but `added` fields at their default."""
    neutral = _neutral_values(SECTIONS[section])
    return {name: value for name, value in values.items() if name not in neutral or value != neutral[name]}


@cache
def _neutral_values(section: type[Section]) -> dict[str, Any]:
    """The `added` fields of a section with their defaults, as JSON."""
    defaults = section().model_dump(mode="json")
    extras = {name: field.json_schema_extra for name, field in section.model_fields.items()}
    return {name: defaults[name] for name, extra in extras.items() if isinstance(extra, dict) and _NEUTRAL in extra}


def frozen_at_random(model: ModelConfig) -> str | None:
    """A line about stages that a training would keep as they were drawn; None where there are none."""
    if model.backbone not in FREEZING_BACKBONES or not model.freeze_at:
        return None
    if model.backbone_weights != "none" or model.weights != "none":
        return None
    ways = "a file ('diffinst import-weights' makes one)"
    ways += " or 'imagenet'" if model.backbone == "efficientnet_lite0" else ""
    stages = "the first stage" if model.freeze_at == 1 else f"the first {model.freeze_at} stages"
    verb = "is" if model.freeze_at == 1 else "are"
    return (
        f"{stages} of {model.backbone} {verb} frozen at random values, as backbone_weights is none. "
        f"Give backbone_weights {ways}, or train all stages with freeze_at: 0"
    )


def section_of(field: str) -> str | None:
    """The section a bare field name belongs to ('sampling_steps' -> 'sampler'), or None if there is none."""
    for name, section in SECTIONS.items():
        if field in section.model_fields:
            return name
    return None
