"""Steps of the released training, timed: the checkout's model with its losses, then what its trainer does with them.

The trainer itself is a script beside the package and is not imported: AdamW with a group per parameter, the recipe's
learning rate and decay, and the gradients of the full model clipped together are written here as it has them. Images
and instances are those that the harness trains on: not flipped, not cropped, at the test size. Noise and timesteps are
the checkout's own draws.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.peers import original
from bench.peers.detectron import count_parameters, seed_all
from bench.peers.inference import peak_memory_bytes
from bench.peers.protocol import Channel, Job, PeerError, Stopped
from bench.peers.records import read_records


def measure(
    job: Job, channel: Channel, stop: Callable[[], bool], clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Seconds of single steps on the first images of the job, from decoded images to updated weights; peak memory.

    Raises:
        PeerError: the model needs a package that is stood in for. Stopped: the harness asked for it.
    """
    import torch

    count, num_warmup = int(job.measure.get("training_step_count", 5)), int(job.measure.get("warmup", 1))
    on_cuda, seed = job.device.startswith("cuda"), int(job.train.get("seed", 0))
    cfg = original.build_config(job)
    model = original.detector(job).model.train()
    _refuse_stand_ins(model)
    batch = load_batch(cfg, job)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(cfg, parameters)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()

    def synchronise() -> None:
        if on_cuda:
            torch.cuda.synchronize()

    samples: list[float] = []
    for iteration in range(num_warmup + count):
        seed_all(seed, iteration, "training draws")
        synchronise()
        start = clock()
        take_step(model, batch, parameters, optimizer, cfg.SOLVER.CLIP_GRADIENTS)
        synchronise()
        if iteration >= num_warmup:
            samples.append(clock() - start)
        channel.progress(len(samples), count, "timed training steps")
        if stop():
            raise Stopped(f"stopped after {len(samples)} timed steps")
    return {
        "samples": {"training_step_s": {"total": samples}},
        "peak_memory_bytes": peak_memory_bytes(on_cuda=on_cuda),
        "num_parameters": count_parameters(model),
    }


def load_batch(cfg: Any, job: Job) -> list[Any]:
    """The job's first `batch_size` images as the model takes them in training, resized to the test size."""
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T

    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)],
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=True,
        instance_mask_format="bitmask",
    )
    records = read_records(job, annotated=True)[: int(job.train["batch_size"])]
    return [mapper(record) for record in records]


def build_optimizer(cfg: Any, parameters: list[Any]) -> Any:
    """AdamW as the released trainer builds it: a group for each parameter, all of one rate and decay."""
    import torch

    if cfg.SOLVER.OPTIMIZER != "ADAMW":
        raise PeerError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; a training step is measured with ADAMW alone")
    groups = [{"params": [parameter]} for parameter in parameters]
    return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def take_step(model: Any, batch: list[Any], parameters: list[Any], optimizer: Any, clipping: Any) -> None:
    """One iteration of detectron2's trainer, all gradients clipped together if the recipe says so."""
    import torch

    losses = model(batch)
    total = sum(losses.values())
    optimizer.zero_grad()
    total.backward()
    for value in losses.values():  # its trainer looks at each
        value.item()
    if clipping.ENABLED and clipping.CLIP_TYPE == "full_model":
        torch.nn.utils.clip_grad_norm_(parameters, clipping.CLIP_VALUE, norm_type=clipping.NORM_TYPE)
    optimizer.step()


def _refuse_stand_ins(model: Any) -> None:
    if original.stand_in_names() and any(getattr(module, "drop_prob", 0) for module in model.modules()):
        raise PeerError("this backbone trains with stochastic depth, which needs timm. Install it beside detectron2")
