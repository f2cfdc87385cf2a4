"""Configuration files of the released code: every key has its place, or is refused where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import SuiteErrors
from bench.suite import DATASETS, load_suite
from bench.upstream import literal, read_upstream, suite_name, to_suite
from bench.upstream_keys import DATA_SETS, FIXED, FIXED_RESNET, FIXED_SWIN, NO_EFFECT, SWINS, all_keys
from diffinst.config import Config

BASE = """\
MODEL:
  META_ARCHITECTURE: "ARCH"
  WEIGHTS: "models/first.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {NAME: "build_resnet_fpn_backbone", FREEZE_AT: 1}
  RESNETS:
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
    DEPTH: 101
    STRIDE_IN_1X1: False
    NORM: FrozenBN
    NUM_GROUPS: 1
    WIDTH_PER_GROUP: 64
    STEM_OUT_CHANNELS: 64
    RES2_OUT_CHANNELS: 256
    RES5_DILATION: 1
  SWIN: {SIZE: T, USE_CHECKPOINT: True, OUT_FEATURES: "(0, 1, 2, 3)"}
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"], OUT_CHANNELS: 128, NORM: "", FUSE_TYPE: sum}
  ROI_HEADS: {IN_FEATURES: ["p2", "p3", "p4", "p5"], NUM_CLASSES: 3}
  ROI_BOX_HEAD: {POOLER_TYPE: "ROIAlignV2", POOLER_RESOLUTION: 5, POOLER_SAMPLING_RATIO: 1}
  MASK_ON: True
  DEVICE: cuda
  ARCH:
    NUM_CLASSES: 1203
    NUM_PROPOSALS: 200
    NHEADS: 4
    DROPOUT: 0.1
    DIM_FEEDFORWARD: 512
    ACTIVATION: relu
    HIDDEN_DIM: 128
    NUM_CLS: 2
    NUM_REG: 4
    NUM_HEADS: 3
    NUM_DYNAMIC: 2
    DIM_DYNAMIC: 32
    CLASS_WEIGHT: 1.5
    GIOU_WEIGHT: 2.5
    L1_WEIGHT: 4
    DEEP_SUPERVISION: True
    NO_OBJECT_WEIGHT: 0.3
    USE_FOCAL: False
    USE_FED_LOSS: True
    ALPHA: 0.3
    GAMMA: 1.5
    PRIOR_PROB: 0.01
    OTA_K: 7
    SNR_SCALE: 1.0
    SAMPLE_STEP: 4
    USE_NMS: False
MODEL_EMA: {ENABLED: True, DECAY: 0.99, DEVICE: cpu, USE_EMA_WEIGHTS_FOR_EVAL_ONLY: True, YOLOX: False}
DATASETS:
  TRAIN: ("lvis_v1_train",)
  TEST: ("lvis_v1_val",)
SOLVER:
  IMS_PER_BATCH: 8
  BASE_LR: 1e-5
  STEPS: (210, 250)  # a comment
  MAX_ITER: 270
  GAMMA: 0.2
  WARMUP_FACTOR: 0.02
  WARMUP_ITERS: 10
  WARMUP_METHOD: linear
  WEIGHT_DECAY: 0.001
  WEIGHT_DECAY_NORM: 0.0
  WEIGHT_DECAY_BIAS: 0.0
  MOMENTUM: 0.9
  LR_SCHEDULER_NAME: WarmupCosineLR
  CHECKPOINT_PERIOD: 100
  OPTIMIZER: "ADAMW"
  BACKBONE_MULTIPLIER: 1.0
  AMP: {ENABLED: False}
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.5, NORM_TYPE: 2.0}
INPUT:
  MIN_SIZE_TRAIN: (480, 512)
  MIN_SIZE_TRAIN_SAMPLING: choice
  MAX_SIZE_TRAIN: 1000
  MIN_SIZE_TEST: 600
  MAX_SIZE_TEST: 900
  CROP: {ENABLED: True, TYPE: "absolute_range", SIZE: "(300, 500)"}
  RANDOM_FLIP: horizontal
  MASK_FORMAT: polygon
  FORMAT: "RGB"
TEST:
  EVAL_PERIOD: 7330
  DETECTIONS_PER_IMAGE: 100
  PRECISE_BN: {ENABLED: False, NUM_ITER: 200}
  AUG:
    ENABLED: True
    MIN_SIZES: (400, 800)
    MAX_SIZE: 2000
    FLIP: False
    CVPODS_TTA: True
    SCALE_FILTER: True
    SCALE_RANGES: ([96, 10000], [0, 256])
DATALOADER:
  FILTER_EMPTY_ANNOTATIONS: False
  NUM_WORKERS: 4
  SAMPLER_TRAIN: "RepeatFactorTrainingSampler"
  REPEAT_THRESHOLD: 0.002
SEED: 7
OUTPUT_DIR: out
CUDNN_BENCHMARK: False
VIS_PERIOD: 0
VERSION: 2
"""
# What BASE says, field by field; everything else is as `preset: released` has it.
EXPECTED = {
    "model": {
        "backbone": "resnet101",
        "freeze_at": 1,
        "hidden_dim": 128,
        "num_stages": 3,
        "num_attention_heads": 4,
        "dim_feedforward": 512,
        "dim_dynamic": 32,
        "num_class_layers": 2,
        "num_box_layers": 4,
        "pooler_resolution": 5,
        "pooler_sampling_ratio": 1,
        "dropout": 0.1,
        "snr_scale": 1.0,
    },
    "sampler": {
        "sampling_steps": 4,
        "num_proposals": 200,
        "nms_iou_threshold": None,
        "use_ema": True,
        "tta": True,
        "tta_shortest_edges": (400, 800),
        "tta_longest_edge": 2000,
        "tta_flip": False,
        "tta_min_box_sizes": (96, 0),
        "tta_max_box_sizes": (10000, 256),
    },
    "train": {
        "seed": 7,
        "iterations": 270,
        "batch_size": 8,
        "learning_rate": 1e-5,
        "weight_decay": 0.001,
        "clip_gradient_norm": 0.5,
        "warmup_iterations": 10,
        "warmup_factor": 0.02,
        "schedule": "cosine",
        "schedule_steps": (210, 250),
        "schedule_gamma": 0.2,
        "num_train_proposals": 200,
        "ota_k": 7,
        "class_weight": 1.5,
        "l1_weight": 4.0,
        "giou_weight": 2.5,
        "focal_alpha": 0.3,
        "focal_gamma": 1.5,
        "class_loss": "bce",
        "federated_loss": True,
        "repeat_threshold": 0.002,
        "ema_decay": 0.99,
        "checkpoint_every": 100,
    },
    "data": {
        "dataset": "lvis",
        "shortest_edge_train": (480, 512),
        "longest_edge_train": 1000,
        "shortest_edge_test": 600,
        "longest_edge_test": 900,
        "crop_size_range": (300, 500),
    },
}
SMALL = """\
_BASE_: base.yaml
MODEL:
  ARCH: {NUM_CLASSES: 80, USE_FOCAL: True, USE_FED_LOSS: False, USE_NMS: True}
MODEL_EMA: {ENABLED: False}
DATASETS: {TRAIN: '("coco_2017_train",)', TEST: '("coco_2017_val",)'}
DATALOADER: {SAMPLER_TRAIN: TrainingSampler}
INPUT: {CROP: {ENABLED: False}}
TEST: {AUG: {ENABLED: False, SCALE_FILTER: False}}
SOLVER: {CLIP_GRADIENTS: {ENABLED: False}}
"""


def write(folder: Path, changes: str = "", *, arch: str = "DiffusionInst", small: bool = True) -> Path:
    """base.yaml with every key, and a file on top of it."""
    (folder / "base.yaml").write_text(BASE.replace("ARCH:", f"{arch}:").replace('"ARCH"', f'"{arch}"'))
    path = folder / "top.yaml"
    path.write_text((SMALL.replace("ARCH:", f"{arch}:") if small else "_BASE_: base.yaml\n") + changes)
    return path


def flat(tree: dict[str, Any], prefix: str = "") -> set[str]:
    keys = set()
    for name, value in tree.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return keys


def problems(path: Path) -> list[str]:
    with pytest.raises(SuiteErrors) as raised:
        read_upstream(path)
    return str(raised.value).splitlines()


@pytest.mark.parametrize(("arch", "mask"), [("DiffusionInst", "dynamic"), ("DiffusionDet", "none")])
def test_every_key_reaches_its_field(arch: str, mask: str, tmp_path: Path) -> None:
    path = write(tmp_path, arch=arch, small=False)
    written = flat(yaml.safe_load((tmp_path / "base.yaml").read_text()))
    assert written == set(all_keys(arch))
    upstream = read_upstream(path)
    suite = tmp_path / "suite.yaml"
    suite.write_text(to_suite(upstream, "a file"))
    (cell,) = load_suite(suite).cells
    assert cell.config == upstream.config()
    found, default = cell.config, Config.model_validate(released())
    for section, values in EXPECTED.items():
        expected = dict(getattr(default, section)) | values
        assert dict(getattr(found, section)) == (expected | {"mask": mask} if section == "model" else expected)
    assert (upstream.architecture, upstream.seed, upstream.weights) == (arch, 7, "models/first.pkl")
    text = suite.read_text()
    assert "learning_rate: 1.0e-05  # SOLVER.BASE_LR" in text
    assert "# MODEL.WEIGHTS is models/first.pkl. Convert that file" in text
    assert ("bbox/AP" in text) is (mask == "none")
    assert len(upstream.notes) == len(NO_EFFECT)


def released() -> dict[str, Any]:
    from diffinst.config import RELEASED

    return {name: dict(values) for name, values in RELEASED.items()}


def test_the_top_file_wins_over_its_base(tmp_path: Path) -> None:
    config = read_upstream(write(tmp_path)).config()
    assert (config.data.dataset, config.data.crop_probability, config.sampler.tta) == ("coco", 0.0, False)
    assert (config.train.class_loss, config.train.federated_loss, config.train.repeat_threshold) == (
        "focal",
        False,
        None,
    )
    assert (config.train.ema_decay, config.sampler.use_ema) == (None, False)
    assert (config.sampler.nms_iou_threshold, config.train.clip_gradient_norm) == (0.5, None)
    assert config.sampler.tta_min_box_sizes == config.sampler.tta_max_box_sizes == ()
    assert config.train.iterations == 270


def test_what_no_file_sets_is_as_in_detectron2(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text(
        """\
MODEL:
  META_ARCHITECTURE: DiffusionInst
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {NAME: build_swintransformer_fpn_backbone}
  FPN: {IN_FEATURES: [swin0, swin1, swin2, swin3]}
  ROI_HEADS: {IN_FEATURES: [p2, p3, p4, p5]}
  ROI_BOX_HEAD: {POOLER_SAMPLING_RATIO: 2}
DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}
INPUT: {FORMAT: RGB}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: False}
"""
    )
    upstream = read_upstream(path)
    config = upstream.config()
    assert (config.model.backbone, config.model.pooler_resolution) == ("swin_b", 14)
    assert (config.sampler.num_proposals, config.train.num_train_proposals) == (300, 300)
    assert (config.train.batch_size, config.train.learning_rate, config.train.iterations) == (16, 0.001, 40000)
    assert (config.train.warmup_factor, config.train.clip_gradient_norm) == (0.001, None)
    assert (config.data.shortest_edge_train, config.data.crop_probability) == ((800,), 0.0)
    assert upstream.seed is None
    assert "num_proposals: 300" in to_suite(upstream, "x")


@pytest.mark.parametrize("size", SWINS)
def test_sizes_of_swin(size: str, tmp_path: Path) -> None:
    changes = f"""\
MODEL:
  BACKBONE: {{NAME: build_swintransformer_fpn_backbone}}
  SWIN: {{SIZE: {size}}}
  FPN: {{IN_FEATURES: [swin0, swin1, swin2, swin3]}}
"""
    assert read_upstream(write(tmp_path, changes, small=False)).config().model.backbone == SWINS[size]


def test_data_sets_are_known_to_suites() -> None:
    assert {name for name, _ in DATA_SETS.values()} <= set(DATASETS)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ("SOLVER: {BASE_LRR: 1}", ":2:10: SOLVER.BASE_LRR: unknown key. Did you mean 'SOLVER.BASE_LR'?"),
            ("MODEL: {DiffusionDet: {NHEADS: 8}}", "MODEL.DiffusionDet.NHEADS: of DiffusionDet, but MODEL.META"),
            ("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}", "'GeneralizedRCNN' is not allowed. Allowed: DiffusionInst"),
            ("MODEL: 3", "MODEL: unknown key"),
            ("MODEL: {BACKBONE: {NAME: build_bifpn}}", "'build_bifpn' is not allowed. Allowed: build_resnet_fpn"),
            ("MODEL: {RESNETS: {DEPTH: 18}}", "MODEL.RESNETS.DEPTH: 18 is not allowed. Allowed: 50, 101"),
            ("MODEL: {RESNETS: {DEPTH: [50]}}", "MODEL.RESNETS.DEPTH: [50] is not allowed"),
            ("MODEL: {FPN: {OUT_CHANNELS: 64}}", "MODEL.FPN.OUT_CHANNELS: 64 is not allowed. It must equal"),
            ("DATASETS: {TRAIN: '(\"mine\",)'}", "DATASETS.TRAIN: ['mine'] is not allowed. Allowed: coco_2017_train"),
            ('DATASETS: {TEST: \'("a", "b")\'}', "DATASETS.TEST: ['a', 'b'] is not allowed. Allowed: one data set"),
            ("DATASETS: {TEST: '(\"coco_2017_val\",)'}", "DATASETS.TEST: ['coco_2017_val'] is not allowed"),
            ("MODEL: {DiffusionInst: {NUM_CLASSES: 80}}", "NUM_CLASSES: 80 is not allowed. lvis_v1_train has 1203"),
            (
                "MODEL: {DiffusionInst: {USE_FED_LOSS: False}}",
                "USE_FOCAL: false is not allowed. The release has no loss",
            ),
            ("MODEL: {DiffusionInst: {USE_NMS: 3}}", "USE_NMS: 3 is not allowed. Allowed: True, False"),
            (
                "MODEL: {DiffusionInst: {NUM_HEADS: 0}}",
                "NUM_HEADS: 0 is not allowed. Allowed: an integer of at least 1",
            ),
            ("MODEL: {DiffusionInst: {NHEADS: 7}}", "hidden_dim (128) must be a multiple of num_attention_heads (7)"),
            ("SOLVER: {STEPS: '(3, \"a\")'}", "SOLVER.STEPS: [3, 'a'] is not allowed"),
            (
                "SOLVER: {LR_SCHEDULER_NAME: Other}",
                "'Other' is not allowed. Allowed: WarmupMultiStepLR, WarmupCosineLR",
            ),
            ("SOLVER: {CLIP_GRADIENTS: {CLIP_TYPE: value}}", "CLIP_TYPE: 'value' is not allowed. Allowed: full_model"),
            ("SOLVER: {CLIP_GRADIENTS: {NORM_TYPE: 1.0}}", "NORM_TYPE: 1.0 is not allowed. Allowed: 2.0"),
            ("DATALOADER: {SAMPLER_TRAIN: Other}", "SAMPLER_TRAIN: 'Other' is not allowed. Allowed: TrainingSampler"),
            ("INPUT: {CROP: {TYPE: relative}}", "INPUT.CROP.TYPE: 'relative' is not allowed. Allowed: absolute_range"),
            ("TEST: {AUG: {SCALE_RANGES: '(3, 4)'}}", "SCALE_RANGES: [3, 4] is not allowed. Allowed: pairs"),
            ("SEED: text", "SEED: 'text' is not allowed. Allowed: an integer"),
            ("MODEL: {WEIGHTS: 3}", "MODEL.WEIGHTS: 3 is not allowed. Allowed: text"),
            ("SOLVER: {BASE_LR: 1, BASE_LR: 2}", "SOLVER.BASE_LR: duplicate key"),
            ("SOLVER: !!python/object:os.system {}", "tag !!python/object:os.system is not allowed"),
        ],
    )
    def test_by_name_and_place(self, changes: str, message: str, tmp_path: Path) -> None:
        found = problems(write(tmp_path, changes, small=False))
        assert any(message in line for line in found), found
        assert all("top.yaml:" in line or "base.yaml:" in line for line in found)

    @pytest.mark.parametrize("key", [*FIXED, *FIXED_RESNET])
    def test_constants_of_the_release(self, key: str, tmp_path: Path) -> None:
        value: Any = "another"
        tree: dict[str, Any] = {"_BASE_": "base.yaml"}
        place = tree
        *parents, last = key.replace("{arch}", "DiffusionInst").split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
        path = write(tmp_path)
        path.write_text(yaml.safe_dump(tree))
        (line,) = problems(path)
        assert f"{'.'.join([*parents, last])}: 'another' is not allowed. Allowed: " in line

    def test_constants_that_no_file_sets(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text("MODEL: {META_ARCHITECTURE: DiffusionInst, BACKBONE: {NAME: build_resnet_fpn_backbone}}\n")
        found = "\n".join(problems(path))
        for key in ("MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1", "INPUT.FORMAT", "DATASETS.TRAIN"):
            assert f"{key}: " in found
        assert (
            "x.yaml:1:1: INPUT.FORMAT: 'BGR', which holds as no file sets it, is not allowed. Allowed: 'RGB'" in found
        )

    def test_all_at_once(self, tmp_path: Path) -> None:
        assert len(problems(write(tmp_path, "SEED: x\nA: 1\nB: {C: 2}\n", small=False))) == 3


class TestBases:
    def test_a_chain_over_folders(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        write(tmp_path / "a")
        (tmp_path / "middle.yaml").write_text("_BASE_: a/top.yaml\nSEED: 1\nSOLVER: {MAX_ITER: 5}\n")
        (tmp_path / "top.yaml").write_text("_BASE_: middle.yaml\nSEED: 2\n")
        upstream = read_upstream(tmp_path / "top.yaml")
        assert [path.name for path in upstream.files] == ["base.yaml", "top.yaml", "middle.yaml", "top.yaml"]
        assert (upstream.seed, upstream.config().train.iterations) == (2, 5)
        assert to_suite(upstream, "x").startswith(
            "# Out of top.yaml, based on middle.yaml, based on top.yaml, based on"
        )

    def test_a_mistake_in_a_base_is_placed_there(self, tmp_path: Path) -> None:
        path = write(tmp_path)
        (tmp_path / "base.yaml").write_text("\n" + (tmp_path / "base.yaml").read_text() + "EXTRA: 1\n")
        (line,) = problems(path)
        assert line.startswith(f"{tmp_path}/base.yaml:")
        assert "EXTRA: unknown key" in line

    def test_several(self, tmp_path: Path) -> None:
        write(tmp_path)
        (tmp_path / "seed.yaml").write_text("SEED: 11\n")
        (tmp_path / "x.yaml").write_text("_BASE_: [top.yaml, seed.yaml]\n")
        assert read_upstream(tmp_path / "x.yaml").seed == 11

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("top.yaml", "is based on itself"),
            ("loop.yaml", "is based on itself"),
            ("gone.yaml", "cannot be read (No such file or directory)"),
            (".", "is a folder"),
            ("https://example.com/base.yaml", "is not allowed. Allowed: the path of a YAML file"),
            ("3", "is not allowed. Allowed: the path of a YAML file"),
        ],
    )
    def test_impossible(self, base: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "loop.yaml").write_text("_BASE_: top.yaml\n")
        (tmp_path / "top.yaml").write_text(f"SEED: 1\n_BASE_: {base}\n")
        (line,) = problems(tmp_path / "top.yaml")
        assert message in line
        assert "_BASE_" in line

    @pytest.mark.parametrize(
        ("content", "message"), [(b"\xff", "UTF-8"), (b"[1]", "no configuration"), (b"a: [", "YAML")]
    )
    def test_no_configuration(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_bytes(content)
        assert message in problems(tmp_path / "x.yaml")[0]

    def test_missing(self, tmp_path: Path) -> None:
        assert "cannot be read" in problems(tmp_path / "gone.yaml")[0]


class TestLiterals:
    def test_as_detectron2_reads_them(self) -> None:
        assert literal("(210000, 250000)") == (210000, 250000)
        assert literal('("coco_2017_train",)') == ("coco_2017_train",)
        assert literal("1e-4") == 1e-4
        assert literal("B-22k") == "B-22k"
        assert literal(r"'\d'") == r"\d"
        assert literal("build_resnet_fpn_backbone") == "build_resnet_fpn_backbone"
        assert literal([1, "2"]) == [1, "2"]

    @pytest.mark.parametrize(
        "text", ["__import__('os').system('touch mark')", "[].append(1)", "(" * 5000, "9" * 20_000]
    )
    def test_are_never_evaluated(self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert literal(text) == text
        assert not (tmp_path / "mark").exists()


def test_names_of_suites() -> None:
    assert suite_name("diffinst.coco.res50") == "diffinst.coco.res50"
    assert suite_name(".a b/c") == "a_b_c"
    assert suite_name("reports") == suite_name("***") == "imported"


def test_swin_and_resnet_constants_have_one_form() -> None:
    assert set(FIXED_SWIN) & set(FIXED_RESNET) == {"MODEL.FPN.IN_FEATURES"}
