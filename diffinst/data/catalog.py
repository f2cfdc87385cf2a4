"""A data set is a name plus a root folder: where its annotations and images lie. Loads no torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffinst.config import DataConfig
from diffinst.errors import DataError

Split = Literal["train", "val"]

ROOT_VARIABLE = "DIFFINST_DATASETS"
CACHE_VARIABLE = "DIFFINST_CACHE"

# Lists of official COCO ids, so that whoever has COCO has these subsets.
_ID_LISTS = Path(__file__).resolve().parents[2] / "suites" / "ids"


@dataclass(frozen=True)
class SplitPaths:
    """Where one split lies. image_ids: the ids that belong to it; None for all in the annotations."""

    annotations: Path
    images: Path
    image_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Layout:
    """Paths below the root, with {split} to fill in; `id_list` names the text file that restricts the split."""

    annotations: str
    images: str
    id_list: str | None = None


_COCO = (
    _Layout("coco/annotations/instances_{split}2017.json", "coco/{split}2017"),
    _Layout("annotations/instances_{split}2017.json", "{split}2017"),
)

# In order of preference: the first layout whose annotation file exists is taken.
LAYOUTS: dict[str, tuple[_Layout, ...]] = {
    "coco": _COCO,
    "coco_mini": (
        _Layout("coco_mini/annotations/instances_{split}.json", "coco_mini/{split}"),
        _Layout("annotations/instances_{split}.json", "{split}"),
        *(_Layout(item.annotations, item.images, "coco_mini_{split}.txt") for item in _COCO),
    ),
    "nuclei": (
        _Layout("nuclei/annotations/instances_{split}.json", "nuclei/images"),
        _Layout("annotations/instances_{split}.json", "images"),
    ),
    # The images of LVIS are COCO's, each in the folder that the annotations name: coco/train2017, coco/val2017.
    "lvis": (_Layout("lvis/lvis_v1_{split}.json", "coco"),),
    "lvis_v05": (_Layout("lvis/lvis_v0.5_{split}.json", "coco"),),
    # 61 images of the validation split of v0.5, for both splits: most of their classes are on one image only, so a part
    # that is held out could not be scored. Its scores show that all parts work together, and nothing of generalisation.
    "lvis_tiny": (
        _Layout("lvis_tiny/lvis_v0.5_val_tiny.json", "lvis_tiny/images"),
        _Layout("lvis_v0.5_val_tiny.json", "images"),
    ),
}
LVIS_NAMES = ("lvis", "lvis_v05", "lvis_tiny")
NAMES = ("shapes", *LAYOUTS, "custom")


def check_name(data: DataConfig) -> None:
    """Refuse a name that is not in the catalogue, and 'custom' without its paths, before anything is read.

    Raises:
        DataError: names the field, what is allowed and the nearest right name.
    """
    if data.dataset not in NAMES:
        near = difflib.get_close_matches(data.dataset, NAMES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise DataError(f"dataset '{data.dataset}' is not known. Allowed: {', '.join(NAMES)}.{hint}")
    explicit = ("train_annotations", "train_images", "val_annotations", "val_images")
    given = [name for name in explicit if getattr(data, name) is not None]
    if data.dataset == "custom" and not given:
        raise DataError(f"dataset 'custom' needs its paths: set {', '.join(explicit)}")
    if data.dataset != "custom" and given:
        raise DataError(
            f"{', '.join(given)}: only for dataset 'custom', but dataset is '{data.dataset}'. "
            "Leave them out, or set dataset: custom"
        )
    if data.dataset != "custom" and data.annotation_format != "coco":
        raise DataError(
            f"annotation_format: only for dataset 'custom', but dataset is '{data.dataset}'. Leave it out, or set "
            "dataset: custom"
        )
    if data.class_agnostic and annotation_format(data) == "lvis":
        raise DataError(
            f"class_agnostic: not for LVIS annotations (dataset '{data.dataset}'): an image is annotated for some of "
            "the classes only. Set class_agnostic: false"
        )


def annotation_format(data: DataConfig) -> Literal["coco", "lvis"]:
    """What the annotation files of a data set hold, and so how its predictions are scored."""
    return "lvis" if data.dataset in LVIS_NAMES else data.annotation_format


def resolve(data: DataConfig, split: Split, root: str | Path | None = None) -> SplitPaths:
    """Find the files of a split. The generated set is written where it does not exist yet.

    Args:
        root: folder of data sets; None takes the environment variable DIFFINST_DATASETS. For 'shapes', the folder to
            write into; None takes DIFFINST_CACHE or the user's cache folder.

    Raises:
        DataError: nothing found; lists every place that was tried.
    """
    check_name(data)
    finders: dict[str, Callable[[DataConfig, Split, Path | None], SplitPaths]] = {
        "shapes": _find_shapes,
        "custom": _find_custom,
    }
    found = finders.get(data.dataset, _find_named)(data, split, None if root is None else Path(root))
    listed = data.train_image_ids if split == "train" else data.val_image_ids
    if listed is None:
        return found
    return SplitPaths(found.annotations, found.images, read_image_ids(Path(listed)))


def _find_shapes(data: DataConfig, split: Split, root: Path | None) -> SplitPaths:
    # Imported here: looking up photographs should not load the drawing code.
    from diffinst.data import shapes

    if root is None:
        cache = os.environ.get(CACHE_VARIABLE)
        root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffinst"
    name = (
        f"shapes-v{shapes.FORMAT_VERSION}-{data.shapes_train_images}-{data.shapes_val_images}"
        f"-{data.shapes_image_size}px-seed{data.shapes_seed}"
    )
    folder = shapes.generate(
        root / name,
        num_train=data.shapes_train_images,
        num_val=data.shapes_val_images,
        image_size=data.shapes_image_size,
        seed=data.shapes_seed,
    )
    return SplitPaths(folder / "annotations" / f"instances_{split}.json", folder / split)


def _find_custom(data: DataConfig, split: Split, root: Path | None) -> SplitPaths:
    annotations, images = (
        (data.train_annotations, data.train_images) if split == "train" else (data.val_annotations, data.val_images)
    )
    if annotations is None or images is None:
        raise DataError(f"dataset 'custom': the {split} split needs both {split}_annotations and {split}_images")
    base = root or Path()
    found = SplitPaths(base / annotations, base / images)
    _check_pair(found, f"{split}_annotations", f"{split}_images")
    return found


def _find_named(data: DataConfig, split: Split, root: Path | None) -> SplitPaths:
    way_out = f"Give the folder that holds it with --data-root DIR or {ROOT_VARIABLE}=DIR."
    if root is None:
        variable = os.environ.get(ROOT_VARIABLE)
        if not variable:
            raise DataError(f"dataset '{data.dataset}': no root folder is given. {way_out}")
        root = Path(variable)
    layouts = LAYOUTS[data.dataset]
    for layout in layouts:
        found = SplitPaths(root / layout.annotations.format(split=split), root / layout.images.format(split=split))
        if not found.annotations.is_file():
            continue
        _check_pair(found, "annotations", "images")
        if layout.id_list is None:
            return found
        ids = read_image_ids(_ID_LISTS / layout.id_list.format(split=split))
        return SplitPaths(found.annotations, found.images, ids)
    tried = ", ".join(str(root / layout.annotations.format(split=split)) for layout in layouts)
    raise DataError(f"dataset '{data.dataset}', {split} split: not found. Tried {tried}. {way_out}")


def _check_pair(paths: SplitPaths, annotations_name: str, images_name: str) -> None:
    if not paths.annotations.is_file():
        raise DataError(
            f"{paths.annotations}: no such file ({annotations_name}); give the path of a json of annotations"
        )
    if not paths.images.is_dir():
        raise DataError(
            f"{paths.images}: no such folder ({images_name}); it has to hold the images of {paths.annotations}"
        )


def read_image_ids(path: Path) -> tuple[int, ...]:
    """Read a text file with one image id a line; empty lines and what follows '#' are skipped.

    Raises:
        DataError: the file cannot be read, a line is no id, or an id comes twice; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list of image ids: {error}") from error
    first_line: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit()):
            raise DataError(
                f"{path}: line {number}: '{text}' is no image id; one whole number a line, comments after '#'"
            )
        image_id = int(text)
        if image_id in first_line:
            raise DataError(f"{path}: line {number}: image {image_id} is already listed in line {first_line[image_id]}")
        first_line[image_id] = number
    if not first_line:
        raise DataError(f"{path}: lists no image id; a split needs at least one")
    return tuple(first_line)
