"""detectron2's models: any of its configurations, trained and run by its own code.

A configuration is put together in this order, later ones winning: the recipe; what the suite says for every engine, as
far as detectron2 has the same thing; the suite's `options`, detectron2's own names. What the suite says for all:

    train.iterations, batch_size, learning_rate, weight_decay    SOLVER.MAX_ITER, IMS_PER_BATCH, BASE_LR, WEIGHT_DECAY
    train.warmup_iterations, warmup_factor                       SOLVER.WARMUP_ITERS, WARMUP_FACTOR
    train.schedule, schedule_steps, schedule_gamma               SOLVER.LR_SCHEDULER_NAME, STEPS, GAMMA
    train.clip_gradient_norm                                     of all weights together; null: as the recipe says
    data.shortest_edge_*, longest_edge_*                         INPUT.MIN_SIZE_*, MAX_SIZE_*
    data.flip_probability, crop_*                                the augmentations, in the same order and odds
    sampler.max_detections, score_threshold (if above 0)         TEST.DETECTIONS_PER_IMAGE, ROI_HEADS.SCORE_THRESH_TEST
    the data set's number of classes                             ROI_HEADS.NUM_CLASSES, RETINANET.NUM_CLASSES

Suppression stays the recipe's, ROI_HEADS.NMS_THRESH_TEST: `sampler.nms_iou_threshold` is about our own proposals.
Gradients are clipped once, by one of the two; under ADAMW by the suite alone.
The optimiser is detectron2's own, SGD with momentum, for which a learning rate has to be meant; the option
SOLVER.OPTIMIZER: ADAMW, under the name that DiffusionDet gave it, takes AdamW instead. Mixed precision stays the
recipe's. Training begins with random weights unless options name MODEL.WEIGHTS: the address in a recipe needs a
network. A recipe whose normalisation is frozen (the zoo's ResNets) learns little from those. All images are kept, those
without instances included.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.inference import Detector
from bench.peers.noise import key_bits
from bench.peers.protocol import Channel, Job, PeerError, Stopped
from bench.peers.records import Record, read_records
from bench.peers.weights import load_into, read_weights

OPTIMIZERS = ("SGD", "ADAMW")
CHECKPOINT_NAME, FINAL_NAME, LOSSES_NAME = "checkpoint.pth", "weights.pth", "losses.jsonl"
_SOLVER = {
    "iterations": "MAX_ITER",
    "batch_size": "IMS_PER_BATCH",
    "learning_rate": "BASE_LR",
    "weight_decay": "WEIGHT_DECAY",
    "warmup_iterations": "WARMUP_ITERS",
    "warmup_factor": "WARMUP_FACTOR",
    "schedule_steps": "STEPS",
    "schedule_gamma": "GAMMA",
}
_SCHEDULERS = {"step": "WarmupMultiStepLR", "cosine": "WarmupCosineLR"}


def import_detectron2() -> Any:
    """The package, or one line on how to get it."""
    try:
        import detectron2
        import detectron2.modeling
    except ImportError as error:
        raise PeerError(
            f"detectron2 cannot be imported here ({error}). Give `python:` an interpreter that has it; "
            "constraints-detectron2.txt lists what was used"
        ) from error
    return detectron2


def build_config(job: Job) -> Any:
    """The configuration of a job: recipe, shared settings, options.

    Raises:
        PeerError: there is no such recipe or option, or an option's value does not fit.
    """
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = OPTIMIZERS[0]
    _merge_recipe(cfg, job.engine.get("recipe") or "")
    cfg.MODEL.WEIGHTS = ""
    apply_shared(cfg, job)
    merge_options(cfg, job.options)
    return cfg


def _merge_recipe(cfg: Any, recipe: str) -> None:
    from detectron2 import model_zoo

    if not recipe:
        raise PeerError(
            "engine detectron2 needs a recipe, such as COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
        )
    try:
        path = recipe if Path(recipe).is_file() else model_zoo.get_config_file(recipe)
    except RuntimeError as error:
        raise PeerError(
            f"recipe {recipe!r} is neither a file nor in detectron2's model zoo, whose names look like "
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
        ) from error
    merge_file(cfg, path)


def merge_file(cfg: Any, path: str) -> None:
    """Read a YAML configuration, with those it is based on; nothing in it is executed, whatever its tags say."""
    import yaml

    try:
        cfg.merge_from_file(path, allow_unsafe=False)  # detectron2's own default would execute tags
    # A file of another project or version: unknown keys, values of another type, no YAML at all.
    except (KeyError, ValueError, AssertionError, TypeError, OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PeerError(f"{path}: is no configuration that detectron2 here understands ({reason})") from error


def apply_shared(cfg: Any, job: Job) -> None:
    """What the suite says for every engine; see the table at the top. Fields that the job lacks stay the recipe's."""
    train, data, sampler = job.train, job.data, job.sampler
    num_classes = len(job.category_ids)
    cfg.MODEL.DEVICE = job.device
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    for field, name in _SOLVER.items():
        if field in train:
            setattr(cfg.SOLVER, name, _like(getattr(cfg.SOLVER, name), train[field]))
    if "schedule" in train:
        cfg.SOLVER.LR_SCHEDULER_NAME = _SCHEDULERS[train["schedule"]]
    if train.get("clip_gradient_norm") is not None:
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False  # the training loop clips, and twice would be another thing
    for field, name in (("train", "TRAIN"), ("test", "TEST")):
        if f"shortest_edge_{field}" in data:
            edges = data[f"shortest_edge_{field}"]
            setattr(cfg.INPUT, f"MIN_SIZE_{name}", tuple(edges) if field == "train" else edges)
        if f"longest_edge_{field}" in data:
            setattr(cfg.INPUT, f"MAX_SIZE_{name}", data[f"longest_edge_{field}"])
    if sampler.get("max_detections"):
        cfg.TEST.DETECTIONS_PER_IMAGE = sampler["max_detections"]
    if sampler.get("score_threshold"):
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(sampler["score_threshold"])


def merge_options(cfg: Any, options: dict[str, Any]) -> None:
    """The suite's options under upstream's names; a whole number stands for a float where one is wanted.

    Raises:
        PeerError: there is no such option, or the value is of another type.
    """
    for name, value in options.items():
        parent: Any = cfg
        for part in name.split(".")[:-1]:
            parent = parent[part] if isinstance(parent, dict) and part in parent else {}
        last = name.split(".")[-1]
        if not isinstance(parent, dict) or last not in parent:
            near = ", ".join(sorted(parent)[:12]) if parent else "none"
            raise PeerError(f"engine.options: {name!r} is no option of this recipe; beside it there are: {near}")
        try:
            cfg.merge_from_list([name, _like(parent[last], value)])
        except ValueError as error:
            raise PeerError(f"engine.options: {name}: {value!r} does not fit, it is {parent[last]!r} now") from error


def _like(current: Any, value: Any) -> Any:
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value


def build_model(cfg: Any, seed: int) -> Any:
    """The model of a configuration, with initial weights that are a function of the seed."""
    import torch
    from detectron2.modeling import build_model as build

    seed_all(seed, "initial weights")
    try:
        return build(cfg).to(torch.device(cfg.MODEL.DEVICE))
    except (KeyError, ValueError, AssertionError) as error:
        raise PeerError(f"detectron2 cannot build {cfg.MODEL.META_ARCHITECTURE} of these options ({error})") from error


def build_optimizer(cfg: Any, model: Any) -> Any:
    """detectron2's own, or AdamW over the same groups of weights."""
    import torch
    from detectron2.solver import build_optimizer as build
    from detectron2.solver.build import get_default_optimizer_params

    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        allowed = " and ".join(OPTIMIZERS)
        raise PeerError(f"engine.options: SOLVER.OPTIMIZER: {cfg.SOLVER.OPTIMIZER!r} is not allowed, {allowed} are")
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
    )
    return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def seed_all(*key: int | str) -> None:
    """Every generator that detectron2 draws from becomes a function of the key."""
    import torch

    bits = key_bits(*key)
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    torch.manual_seed(bits & 0x7FFFFFFFFFFFFFFF)


def detector(job: Job) -> Detector:
    """The trained model, ready to predict."""
    cfg = build_config(job)
    model = build_model(cfg, int(job.train.get("seed", 0)))
    path = job.weights_path
    if path is not None:
        load_into(model, path, complete=True)
    return Detector(
        model=model.eval(),
        image_format=cfg.INPUT.FORMAT,
        shortest_edge=cfg.INPUT.MIN_SIZE_TEST,
        longest_edge=cfg.INPUT.MAX_SIZE_TEST,
    )


def train(job: Job, channel: Channel, stop: Callable[[], bool]) -> dict[str, Any]:
    """Train to the end, going on from `checkpoint.pth` if there is one; leaves `weights.pth` and `losses.jsonl`.

    Order, augmentation and every other draw of an iteration are functions of (seed, iteration), so that a training that
    was stopped goes on with the same ones.
    """
    import torch
    from detectron2.solver import build_lr_scheduler
    from detectron2.utils.events import EventStorage

    cfg = build_config(job)
    seed, log_every = int(job.train.get("seed", 0)), int(job.train.get("log_every", 20))
    clip = job.train.get("clip_gradient_norm")
    checkpoint_every, total = int(job.train.get("checkpoint_every", 5000)), int(cfg.SOLVER.MAX_ITER)
    records = read_records(job, annotated=True)
    model = build_model(cfg, seed).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpoint, final, losses_path = (job.folder / name for name in (CHECKPOINT_NAME, FINAL_NAME, LOSSES_NAME))
    start = 0
    if checkpoint.is_file():
        saved = read_weights(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        start = saved["iteration"]
    elif cfg.MODEL.WEIGHTS:
        load_into(model, Path(cfg.MODEL.WEIGHTS), complete=False)
    _keep_losses(losses_path, start)

    def save(iteration: int) -> None:
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "iteration": iteration}
        _save_atomic({"model": model.state_dict(), **state}, checkpoint)

    batches = _batches(cfg, job, records, seed, range(start, total))
    # detectron2's heads report to a storage, which has to be there.
    with losses_path.open("a", encoding="utf-8") as log, EventStorage(start) as storage:
        for iteration, batch in enumerate(batches, start):
            seed_all(seed, iteration, "training draws")
            losses = model(batch)
            sum(losses.values()).backward()
            values = {name: float(value.detach()) for name, value in losses.items()}
            if not all(math.isfinite(value) for value in values.values()):
                name = next(name for name, value in values.items() if not math.isfinite(value))
                raise PeerError(
                    f"iteration {iteration + 1}: {name} is {values[name]}. Lower train.learning_rate (this engine's "
                    "optimiser is the recipe's), or lengthen train.warmup_iterations"
                )
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), float(clip))
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            storage.step()
            finished = iteration + 1
            if finished % log_every == 0 or finished == total:
                line = {"iteration": finished, "learning_rate": rate, "losses": values}
                log.write(json.dumps(line) + "\n")
                log.flush()
                channel.progress(finished, total, f"loss {math.fsum(values.values()):.3f}")
            if stop() and finished < total:
                save(finished)
                raise Stopped(f"stopped after {finished} of {total} iterations; the same command goes on from there")
            if finished % checkpoint_every == 0 and finished < total:
                save(finished)
    _save_atomic({"model": model.state_dict()}, final)
    checkpoint.unlink(missing_ok=True)
    last = json.loads(losses_path.read_text(encoding="utf-8").splitlines()[-1])
    return {
        "num_parameters": count_parameters(model),
        "last_losses": last["losses"],
        "weights": FINAL_NAME,
        "optimizer": type(optimizer).__name__,
    }


def count_parameters(model: Any) -> int:
    """Numbers in all parameters, frozen ones included; buffers, such as those of frozen normalisation, are none."""
    return sum(parameter.numel() for parameter in model.parameters())


def _batches(cfg: Any, job: Job, records: Sequence[Record], seed: int, iterations: range) -> Iterator[list[Any]]:
    """Batches of detectron2's mapper; what is in batch i depends on the seed and i alone, not on workers."""
    import torch
    from detectron2.data import DatasetMapper

    mapper = DatasetMapper(
        is_train=True,
        augmentations=augmentations(cfg, job),
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format="bitmask",
        recompute_boxes=cfg.MODEL.MASK_ON,
    )
    loaded = _Loaded(records, mapper, seed, cfg.SOLVER.IMS_PER_BATCH, iterations)
    loader: Any = torch.utils.data.DataLoader(
        loaded,  # type: ignore[arg-type] # a map-style data set by its methods
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        collate_fn=list,
        num_workers=int(job.train.get("num_workers", 0)),
    )
    return iter(loader)


class _Loaded:
    """Item i is the i-th image that training sees, augmented."""

    def __init__(
        self, records: Sequence[Record], mapper: Callable[[Record], Any], seed: int, batch_size: int, iterations: range
    ) -> None:
        self._records = records
        self._mapper = mapper
        self._seed = seed
        self._first = iterations.start * batch_size
        self._length = len(iterations) * batch_size
        self._epoch = -1
        self._order: np.ndarray = np.arange(0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        epoch, place = divmod(self._first + index, len(self._records))
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=key_bits(self._seed, epoch, "order")))
            self._order, self._epoch = generator.permutation(len(self._records)), epoch
        seed_all(self._seed, self._first + index, "augmentation")
        return self._mapper(self._records[self._order[place]])


def augmentations(cfg: Any, job: Job) -> list[Any]:
    """Flip, then at the odds asked for a resize and a crop, then the final resize: the harness's recipe."""
    from detectron2.data import transforms as T

    data = job.data
    found: list[Any] = [T.RandomFlip(prob=float(data.get("flip_probability", 0.5)))]
    if data.get("crop_probability", 0.0) > 0:
        crop = T.AugmentationList(
            [
                T.ResizeShortestEdge(list(data["crop_shortest_edge"]), sample_style="choice"),
                T.RandomCrop("absolute_range", tuple(data["crop_size_range"])),
            ]
        )
        found.append(T.RandomApply(crop, prob=float(data["crop_probability"])))
    found.append(T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, "choice"))
    return found


def _keep_losses(path: Path, iteration: int) -> None:
    """Drop what the log says of iterations after the checkpoint's, and a line that a kill has cut."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["iteration"] <= iteration), encoding="utf-8")


def _save_atomic(content: dict[str, Any], path: Path) -> None:
    import torch

    temporary = path.with_name(path.name + ".partial")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise PeerError(f"{path}: cannot be written ({error})") from error
