"""Keys of the configuration files of DiffusionInst and DiffusionDet, and what each is here. Loads no torch.

Values of keys that no file sets are detectron2's and the releases' own. `{arch}` stands for the model's section.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {"DiffusionInst": "dynamic", "DiffusionDet": "none"}  # -> model.mask

# key -> (value if no file sets it, fields of ours that it gives)
FIELDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "MODEL.{arch}.NUM_PROPOSALS": (300, ("sampler.num_proposals", "train.num_train_proposals")),
    "MODEL.{arch}.NHEADS": (8, ("model.num_attention_heads",)),
    "MODEL.{arch}.DROPOUT": (0.0, ("model.dropout",)),
    "MODEL.{arch}.DIM_FEEDFORWARD": (2048, ("model.dim_feedforward",)),
    "MODEL.{arch}.HIDDEN_DIM": (256, ("model.hidden_dim",)),
    "MODEL.{arch}.NUM_CLS": (1, ("model.num_class_layers",)),
    "MODEL.{arch}.NUM_REG": (3, ("model.num_box_layers",)),
    "MODEL.{arch}.NUM_HEADS": (6, ("model.num_stages",)),
    "MODEL.{arch}.DIM_DYNAMIC": (64, ("model.dim_dynamic",)),
    "MODEL.{arch}.CLASS_WEIGHT": (2.0, ("train.class_weight",)),
    "MODEL.{arch}.GIOU_WEIGHT": (2.0, ("train.giou_weight",)),
    "MODEL.{arch}.L1_WEIGHT": (5.0, ("train.l1_weight",)),
    "MODEL.{arch}.ALPHA": (0.25, ("train.focal_alpha",)),
    "MODEL.{arch}.GAMMA": (2.0, ("train.focal_gamma",)),
    "MODEL.{arch}.OTA_K": (5, ("train.ota_k",)),
    "MODEL.{arch}.SNR_SCALE": (2.0, ("model.snr_scale",)),
    "MODEL.{arch}.SAMPLE_STEP": (1, ("sampler.sampling_steps",)),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": (14, ("model.pooler_resolution",)),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (0, ("model.pooler_sampling_ratio",)),
    "SOLVER.IMS_PER_BATCH": (16, ("train.batch_size",)),
    "SOLVER.BASE_LR": (0.001, ("train.learning_rate",)),
    "SOLVER.STEPS": ((30000,), ("train.schedule_steps",)),
    "SOLVER.MAX_ITER": (40000, ("train.iterations",)),
    "SOLVER.GAMMA": (0.1, ("train.schedule_gamma",)),
    "SOLVER.WARMUP_FACTOR": (0.001, ("train.warmup_factor",)),
    "SOLVER.WARMUP_ITERS": (1000, ("train.warmup_iterations",)),
    "SOLVER.WEIGHT_DECAY": (0.0001, ("train.weight_decay",)),
    "SOLVER.CHECKPOINT_PERIOD": (5000, ("train.checkpoint_every",)),
    "INPUT.MIN_SIZE_TRAIN": ((800,), ("data.shortest_edge_train",)),
    "INPUT.MAX_SIZE_TRAIN": (1333, ("data.longest_edge_train",)),
    "INPUT.MIN_SIZE_TEST": (800, ("data.shortest_edge_test",)),
    "INPUT.MAX_SIZE_TEST": (1333, ("data.longest_edge_test",)),
}

_PYRAMID = "the head takes four levels of the pyramid, strides 4 to 32"
# key -> (value if no file sets it, the value that it must have, why no other)
FIXED: dict[str, tuple[Any, Any, str]] = {
    "MODEL.{arch}.ACTIVATION": ("relu", "relu", "the only activation here"),
    "MODEL.{arch}.NUM_DYNAMIC": (2, 2, "the head computes with two dynamic layers, whatever this says"),
    "MODEL.{arch}.DEEP_SUPERVISION": (True, True, "every stage has its losses; false raises in the release"),
    "MODEL.{arch}.PRIOR_PROB": (0.01, 0.01, "a constant of the class bias here"),
    "MODEL.PIXEL_MEAN": ([103.53, 116.28, 123.675], [123.675, 116.28, 103.53], "the backbones fix it, in RGB"),
    "MODEL.PIXEL_STD": ([1.0, 1.0, 1.0], [58.395, 57.12, 57.375], "the backbones fix it, in RGB"),
    "MODEL.ROI_HEADS.IN_FEATURES": (["res4"], ["p2", "p3", "p4", "p5"], _PYRAMID),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlignV2", "boxes are pooled with half-pixel offsets"),
    "MODEL.FPN.NORM": ("", "", "the pyramid has no norm"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "sum", "the pyramid sums"),
    "MODEL_EMA.YOLOX": (False, False, "the average's decay is constant"),
    "SOLVER.OPTIMIZER": ("ADAMW", "ADAMW", "the only optimiser here"),
    "SOLVER.BACKBONE_MULTIPLIER": (1.0, 1.0, "one learning rate for all"),
    "SOLVER.WARMUP_METHOD": ("linear", "linear", "the only warm-up here"),
    "SOLVER.AMP.ENABLED": (False, False, "float16 is not trained here; set train.precision in the suite instead"),
    "INPUT.FORMAT": ("BGR", "RGB", "images are RGB"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "choice", "sizes are drawn from a list"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": (True, False, "images without instances are trained on"),
    "TEST.AUG.CVPODS_TTA": (True, True, "set sampler.tta_merge in the suite instead"),
}
FIXED_RESNET: dict[str, tuple[Any, Any, str]] = {
    "MODEL.RESNETS.OUT_FEATURES": (["res4"], ["res2", "res3", "res4", "res5"], _PYRAMID),
    "MODEL.FPN.IN_FEATURES": ([], ["res2", "res3", "res4", "res5"], _PYRAMID),
    "MODEL.RESNETS.STRIDE_IN_1X1": (True, False, "strides are in the 3x3 convolutions"),
    "MODEL.RESNETS.NORM": ("FrozenBN", "FrozenBN", "batch norms are frozen"),
    "MODEL.RESNETS.NUM_GROUPS": (1, 1, "no grouped convolutions"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (64, 64, "the published width"),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64, 64, "the published width"),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (256, 256, "the published width"),
    "MODEL.RESNETS.RES5_DILATION": (1, 1, "no dilation"),
}
FIXED_SWIN: dict[str, tuple[Any, Any, str]] = {
    "MODEL.SWIN.OUT_FEATURES": ((0, 1, 2, 3), (0, 1, 2, 3), _PYRAMID),
    "MODEL.FPN.IN_FEATURES": ([], ["swin0", "swin1", "swin2", "swin3"], _PYRAMID),
}

# key -> why any value gives the same results
NO_EFFECT: dict[str, str] = {
    "VERSION": "of the file's format",
    "OUTPUT_DIR": "run-suite --out chooses",
    "CUDNN_BENCHMARK": "speed alone",
    "VIS_PERIOD": "nothing is drawn in training",
    "MODEL.DEVICE": "run-suite --device chooses",
    "MODEL.MASK_ON": "the release does not read it: META_ARCHITECTURE says whether there are masks",
    "MODEL.ROI_HEADS.NUM_CLASSES": "the release reads MODEL.{arch}.NUM_CLASSES",
    "MODEL.{arch}.NO_OBJECT_WEIGHT": "of a loss that the release does not have",
    "MODEL.SWIN.USE_CHECKPOINT": "memory alone",
    "MODEL_EMA.DEVICE": "memory alone",
    "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY": "the release does not read it",
    "SOLVER.MOMENTUM": "AdamW has none",
    "SOLVER.WEIGHT_DECAY_NORM": "the release decays all weights alike",
    "SOLVER.WEIGHT_DECAY_BIAS": "the release decays all weights alike",
    "INPUT.RANDOM_FLIP": "the release always flips with probability 0.5",
    "INPUT.MASK_FORMAT": "the release always takes bit masks",
    "DATALOADER.NUM_WORKERS": "speed alone",
    "TEST.EVAL_PERIOD": "evaluation is after training",
    "TEST.DETECTIONS_PER_IMAGE": "the release does not read it",
    "TEST.PRECISE_BN.ENABLED": "the backbone's norms are frozen",
    "TEST.PRECISE_BN.NUM_ITER": "the backbone's norms are frozen",
}

# Keys that are read together with others; value if no file sets it.
SPECIAL: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.SWIN.SIZE": "B",
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.{arch}.NUM_CLASSES": 80,
    "MODEL.{arch}.USE_FOCAL": True,
    "MODEL.{arch}.USE_FED_LOSS": False,
    "MODEL.{arch}.USE_NMS": True,
    "MODEL_EMA.ENABLED": False,
    "MODEL_EMA.DECAY": 0.999,
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
    "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "DATALOADER.REPEAT_THRESHOLD": 0.0,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "INPUT.CROP.ENABLED": False,
    "INPUT.CROP.TYPE": "relative_range",
    "INPUT.CROP.SIZE": [0.9, 0.9],
    "TEST.AUG.ENABLED": False,
    "TEST.AUG.MIN_SIZES": (400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800, 800),
    "TEST.AUG.MAX_SIZE": 4000,
    "TEST.AUG.FLIP": True,
    "TEST.AUG.SCALE_FILTER": True,
    "TEST.AUG.SCALE_RANGES": (
        *([96, 10000], [96, 10000], [64, 10000], [64, 10000], [64, 10000], [0, 10000], [0, 10000]),
        *([0, 256], [0, 256], [0, 192], [0, 192], [0, 96], [0, 10000]),
    ),
    "SEED": -1,
}

RESNETS = {50: "resnet50", 101: "resnet101"}
# Sizes whose weights differ only in what they were pretrained on are one network.
SWINS = {
    "T": "swin_t",
    "S": "swin_s",
    "B": "swin_b",
    "B-22k": "swin_b",
    "B-22k-384": "swin_b_384",
    "L-22k": "swin_l",
    "L-22k-384": "swin_l_384",
}
SCHEDULES = {"WarmupMultiStepLR": "step", "WarmupCosineLR": "cosine"}
# detectron2's names of the two splits -> ours, and how many classes it has
DATA_SETS = {
    ("coco_2017_train", "coco_2017_val"): ("coco", 80),
    ("lvis_v1_train", "lvis_v1_val"): ("lvis", 1203),
    ("lvis_v0.5_train", "lvis_v0.5_val"): ("lvis_v05", 1230),
}


def all_keys(arch: str) -> list[str]:
    """Every key that is understood for a model."""
    tables: tuple[dict[str, Any], ...] = (FIELDS, FIXED, FIXED_RESNET, FIXED_SWIN, NO_EFFECT, SPECIAL)
    return sorted({key.replace("{arch}", arch) for table in tables for key in table})
