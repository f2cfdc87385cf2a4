"""Photographs and videos in, annotated ones and COCO results out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffinst.checkpoint import Checkpoint, replacing
from diffinst.config import DataConfig, SamplerConfig
from diffinst.data.annotations import read_image
from diffinst.data.transforms import Recipe, plan_test, transform_image
from diffinst.drawing import add_legend, draw_detections, enlarge
from diffinst.engine.inference import detect
from diffinst.engine.tta import detect_augmented
from diffinst.engine.video import VIDEO_SUFFIXES, check_video_support, open_video, write_video
from diffinst.errors import DataError
from diffinst.model import DiffusionInst
from diffinst.ops.rle import encode_masks
from diffinst.structures import Detections, Sample

RESULTS_NAME = "predictions.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_KEEPS_ITS_FORMAT = {".jpg", ".jpeg"}  # everything else is written as PNG
_COORDINATE_DIGITS = 2
# Pixels. Smaller pictures are drawn enlarged, results stay in the file's own pixels; thin ones do not become huge.
_SHORTEST_DRAWN_SIDE, _LONGEST_DRAWN_SIDE = 360, 4000
_DECODED_SHARE = 0.95  # of the frames that a video seems to have; below, it is taken for damaged

# COCO's ids of its 80 classes, in order: 1 to 90 with gaps. And some of their names, to tell other 80 classes apart.
_COCO_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
_COCO_NAMES = {0: "person", 11: "stop sign", 79: "toothbrush"}

_logger = logging.getLogger(__name__)

Report = Callable[["Medium", int, int | None], None]
Results = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Medium:
    """An image or video file, the name it is drawn under (relative to the output folder), and the id of its noise."""

    path: Path
    output: Path
    image_id: int

    @property
    def is_video(self) -> bool:
        """By its name alone."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def results(self) -> Path:
        """Where its detections are written, relative to the output folder."""
        return self.output.with_name(self.output.name + ".json")


def find_media(inputs: Iterable[Path]) -> list[Medium]:
    """Images and videos among `inputs` and in folders of `inputs`, sub-folders included, in order of path.

    The id of '000000000139.jpg' is 139, as in COCO; of any other file it is made from its name. So a photograph gives
    the same detections whatever lies beside it.

    Raises:
        DataError: an input does not exist, a folder has no image or video, or two would be drawn under one name.
        ConfigError: there is a video, and no PyAV.
    """
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    found: list[Medium] = []
    seen: set[Path] = set()
    for given in inputs:
        if not given.exists():
            raise DataError(f"{given}: no such file or folder. Check the path")
        inside = [path for path in sorted(given.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
        if given.is_dir() and not inside:
            raise DataError(f"{given}: no image in this folder, and no video. Looked for {', '.join(suffixes)}")
        for path in inside if given.is_dir() else [given]:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            name = path.relative_to(given) if given.is_dir() else Path(path.name)
            found.append(Medium(path, name.with_suffix(_output_suffix(path)), _image_id(path)))
    by_output: dict[Path, Path] = {}
    for medium in found:
        other = by_output.setdefault(medium.output, medium.path)
        if other != medium.path:
            raise DataError(
                f"{medium.path} and {other} would both be drawn as {medium.output}. "
                "Rename one of them, or give the folder that holds both"
            )
    if any(medium.is_video for medium in found):
        check_video_support()
    return found


def predict(
    model: DiffusionInst,
    media: Sequence[Medium],
    out_dir: Path,
    *,
    data: DataConfig,
    settings: SamplerConfig,
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    draw_threshold: float = 0.3,
    force: bool = False,
    report: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Detect in images and videos one by one; draw what was found, and write all of it as COCO results.

    Beside each drawn picture or video, 'NAME.json' holds its results, and `RESULTS_NAME` those of all photographs: JSON
    lists of COCO results (bbox as [x, y, width, height] in pixels of the file, masks as RLE) with file names and class
    names; category ids are those given. A photograph's image id is that of `find_media`. A video's results have the
    number of the frame, from 0, as image id, and its time in seconds ("time_s").

    Small photographs are drawn enlarged, with a legend below; a video keeps its size, frame rate and times, has the
    legend over a corner, and no sound. All frames of a video share one noise, so a still scene gives still detections.

    Args:
        model: on its device; set to evaluation mode.
        media: from `find_media`.
        out_dir: made if missing.
        data: sizes at test time.
        settings: sampling, post-processing and test-time augmentation.
        class_names: K names.
        category_ids: K ids, see `category_ids_of`; a class without one has its label plus 1.
        draw_threshold: detections with a lower score are in the results but not in the pictures.
        force: replace files that are in the folder already; those of `media` never.
        report: called after each photograph and frame with what it is of, and the number of frames that are done and of
            all, which is None for some videos; 1 and 1 for a photograph.
        stop: asked after each photograph and frame; True ends the work. What is done is written: a video is shorter
            then, but plays.
    Returns:
        The number of media that are done, whole.
    Raises:
        DataError: a file is damaged or no image or video; nothing is written for it or those after it. Or files would
            be overwritten, which is said before any work, or the folder cannot be written.
    """
    model.eval()
    _check_outputs(media, out_dir, force=force)
    with _writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)

    def draw(image: np.ndarray, found: Detections, *, over: bool) -> np.ndarray:
        drawn = draw_detections(image, found, class_names, score_threshold=draw_threshold)
        return add_legend(drawn, found.labels[found.scores >= draw_threshold].tolist(), class_names, over=over)

    def photograph(medium: Medium) -> list[dict[str, Any]]:
        image = read_image(medium.path, reduce_depth=True)
        found = detect_image(model, image, medium.image_id, data=data, settings=settings)
        results = list(coco_results(found, medium.image_id, medium.path.name, class_names, category_ids))
        drawn = draw(*enlarge(image, found, _SHORTEST_DRAWN_SIDE, _LONGEST_DRAWN_SIDE), over=False)
        with _writing(out_dir):
            _write_image(out_dir / medium.output, drawn)
            with _results_file(out_dir / medium.results) as add:
                add(results)
        report(medium, 1, 1)
        return results

    def video(medium: Medium) -> bool:
        whole, decoded = True, 0
        with (
            _writing(out_dir),
            _whole_or_none(out_dir / medium.output) as path,
            _results_file(out_dir / medium.results) as add,
            open_video(medium.path) as source,
            write_video(path, rate=source.rate, time_base=source.time_base) as show,
        ):
            for number, frame in enumerate(source.frames):
                if number and stop():
                    whole = False
                    break
                found = detect_image(model, frame.image, medium.image_id, data=data, settings=settings)
                show(draw(frame.image, found, over=True), frame.pts)
                time_s = {"time_s": round(float(frame.pts * source.time_base), 6)}
                results = coco_results(found, number, medium.path.name, class_names, category_ids)
                add(result | time_s for result in results)
                report(medium, number + 1, source.num_frames)
                decoded = number + 1
        # FFmpeg leaves out what it cannot decode, and says nothing.
        if whole and decoded < _DECODED_SHARE * (source.num_frames or 0):
            _logger.warning(
                "%s: only %d of about %d frames can be decoded; it may be damaged",
                medium.path,
                decoded,
                source.num_frames,
            )
        return whole

    done = 0
    with _results_of_photographs(out_dir, media) as add_all:
        for medium in media:
            if stop():
                break
            if not medium.is_video:
                add_all(photograph(medium))
            elif not video(medium):
                break
            done += 1
    return done


def _check_outputs(media: Sequence[Medium], out_dir: Path, *, force: bool) -> None:
    """Refuse to replace an input ever, or anything else unasked."""
    inputs = {medium.path.resolve() for medium in media}
    outputs = [out_dir / name for medium in media for name in (medium.output, medium.results)]
    if any(not medium.is_video for medium in media):
        outputs.append(out_dir / RESULTS_NAME)
    for path in outputs:
        if path.resolve() in inputs:
            raise DataError(f"{path}: would be drawn over itself. Choose another folder with --out DIR")
    there = [path for path in outputs if path.exists()]
    if there and not force:
        more = f", and {len(there) - 1} more" if len(there) > 1 else ""
        raise DataError(
            f"{there[0]}: is there already{more}. Choose another folder with --out DIR, or replace with --force"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder}: cannot be written ({reason}). Choose a folder that can, with --out DIR") from error


@contextmanager
def _whole_or_none(path: Path) -> Iterator[Path]:
    """As `replacing`, and an error or Ctrl-C leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path
    try:
        with replacing(path) as temporary:
            yield temporary
    except BaseException:
        if temporary != path:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _results_file(path: Path) -> Iterator[Callable[[Results], None]]:
    """A JSON list, written as it comes: a long video's masks need not fit into memory. Yields what adds results."""
    with _whole_or_none(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        before = "\n"

        def add(results: Results) -> None:
            nonlocal before
            for result in results:
                file.write(before + json.dumps(result))
                before = ",\n"

        yield add
        file.write("\n]\n")


@contextmanager
def _results_of_photographs(out_dir: Path, media: Sequence[Medium]) -> Iterator[Callable[[Results], None]]:
    if all(medium.is_video for medium in media):
        yield lambda _: None
        return
    with _writing(out_dir), _results_file(out_dir / RESULTS_NAME) as add:
        yield add


def detect_image(
    model: DiffusionInst, image: np.ndarray, image_id: int, *, data: DataConfig, settings: SamplerConfig
) -> Detections:
    """Detections of one (height, width, 3) uint8 RGB image, in its pixels, on the CPU."""
    size = (image.shape[0], image.shape[1])
    if settings.tta:
        original = transform_image(image, Recipe(original=size, final=size))
        return detect_augmented(model, Sample(original, image_id, size), settings).to("cpu")
    batch = model.make_batch([Sample(transform_image(image, plan_test(size, data)), image_id, size)])
    return detect(model, batch, settings)[0].to("cpu")


def category_ids_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The data set's category id of each class; empty if unknown.

    Files of earlier versions have none stored, nor do most imported weights. Models of COCO have COCO's then: those of
    80 classes on data set coco or coco_mini, where names, if there are any, are COCO's.
    """
    if checkpoint.category_ids:
        return checkpoint.category_ids
    config, names = checkpoint.config, checkpoint.class_names
    is_coco = config.data.dataset in ("coco", "coco_mini") and config.model.num_classes == len(_COCO_IDS)
    if not is_coco or any(names[label : label + 1] not in ((), (name,)) for label, name in _COCO_NAMES.items()):
        return ()
    return _COCO_IDS


def coco_results(
    detections: Detections,
    image_id: int,
    file_name: str,
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """One COCO result a detection: bbox as [x, y, width, height] in pixels, masks as RLE, best score first."""
    encodings = None if detections.masks is None else encode_masks(detections.masks)
    for i, (box, score, label) in enumerate(
        zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist())
    ):
        x1, y1, x2, y2 = box
        result: dict[str, Any] = {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": category_ids[label] if label < len(category_ids) else label + 1,
            "category": class_names[label] if label < len(class_names) else f"class {label}",
            "score": round(score, 6),
            "bbox": [round(value, _COORDINATE_DIGITS) for value in (x1, y1, x2 - x1, y2 - y1)],
        }
        if encodings is not None:
            result["segmentation"] = encodings[i]
        yield result


def _image_id(path: Path) -> int:
    if path.stem.isascii() and path.stem.isdigit():
        return int(path.stem)
    # 52 bits: exact in every JSON reader, and no two of a million names are likely to meet.
    return int(hashlib.sha256(path.name.encode()).hexdigest()[:13], 16)


def _output_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return ".mp4"
    return path.suffix if suffix in _KEEPS_ITS_FORMAT else ".png"


def _write_image(path: Path, image: np.ndarray) -> None:
    with _whole_or_none(path) as temporary:
        if path.suffix.lower() in _KEEPS_ITS_FORMAT:
            Image.fromarray(image).save(temporary, format="JPEG", quality=92)
        else:
            Image.fromarray(image).save(temporary, format="PNG")
