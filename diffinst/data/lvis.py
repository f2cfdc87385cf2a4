"""LVIS annotations, v1 and v0.5 (arXiv:1908.03195): COCO's format, federated.

An image is annotated for some of the classes: those of its annotations, which `not_exhaustive_category_ids` names where
some instances may be missing, and those of `neg_category_ids`, which it does not show. Of all others nothing is known.
Categories carry `image_count`, on how many training images they are, and `frequency`: r rare, c common, f frequent.
Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from diffinst.data.annotations import CocoAnnotations, parse_annotations, read_json
from diffinst.errors import DataError

Frequency = Literal["r", "c", "f"]
FREQUENCIES: tuple[Frequency, ...] = ("r", "c", "f")

_IMAGE_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True, kw_only=True)
class LvisAnnotations(CocoAnnotations):
    """A checked LVIS file.

    File names have the folder that `coco_url` names: 'train2017/000000391895.jpg'.
    negative: category ids that an image does not show, by image id. not_exhaustive: ids of which an image may show more
    than is annotated. frequency, image_counts: by category id; image_counts is None where a category has none.
    """

    negative: dict[int, frozenset[int]]
    not_exhaustive: dict[int, frozenset[int]]
    frequency: dict[int, Frequency]
    image_counts: dict[int, int] | None


def file_name_of(image: Mapping[str, Any]) -> str | None:
    """Where an image lies: folder and name at the end of `coco_url`; else `coco_file`, `file_name`, or None.

    LVIS v1 has the url only; v0.5 has all three, and its `file_name` is the one of COCO 2014.
    """
    url = image.get("coco_url")
    if isinstance(url, str):
        parts = url.split("/")[-2:]
        if len(parts) == 2 and not {"", ".", ".."} & set(parts):
            return "/".join(parts)
    return next((image[key] for key in ("coco_file", "file_name") if isinstance(image.get(key), str)), None)


def parse_lvis(content: Any, source: str, *, skip_invalid: bool = False) -> LvisAnnotations:
    """Check the content of an LVIS json file whole.

    Args:
        content, source, skip_invalid: as for `diffinst.data.annotations.parse_annotations`.

    Raises:
        DataError: names the first fault.
    """
    read = parse_annotations(_with_file_names(content, source), source, skip_invalid=skip_invalid)
    for instances in read.instances.values():
        for item in instances:
            if item.is_crowd:
                raise DataError(
                    f"{source}: annotation {item.id}: iscrowd is 1, but LVIS has no crowds; remove it, or list its "
                    "category in the image's not_exhaustive_category_ids"
                )
    lists = {
        key: {image["id"]: _category_ids(image, key, read, source) for image in content["images"]}
        for key in _IMAGE_LISTS
    }
    negative, not_exhaustive = (lists[key] for key in _IMAGE_LISTS)
    categories = {entry["id"]: entry for entry in content["categories"]}
    return LvisAnnotations(
        **{name: getattr(read, name) for name in CocoAnnotations.__dataclass_fields__},
        negative=negative,
        not_exhaustive=not_exhaustive,
        frequency={number: _frequency(entry, source) for number, entry in categories.items()},
        image_counts=_image_counts(categories, source),
    )


def _with_file_names(content: Any, source: str) -> Any:
    """The content with a `file_name` for every image; what else may be wrong with it is left to the COCO reader."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return content
    images = []
    for entry in content["images"]:
        if isinstance(entry, dict):
            name = file_name_of(entry)
            if name is None:
                raise DataError(
                    f"{source}: image {entry.get('id')}: has no coco_url that ends in folder and file, and neither "
                    "coco_file nor file_name; give one of them"
                )
            entry = {**entry, "file_name": name}
        images.append(entry)
    return {**content, "images": images}


def _category_ids(image: Mapping[str, Any], key: str, read: CocoAnnotations, source: str) -> frozenset[int]:
    value = image.get(key)
    if not isinstance(value, list):
        raise DataError(
            f"{source}: image {image['id']}: {key} is {value!r}; it must be a list of category ids, which may be "
            "empty. A file without it is no LVIS file: set annotation_format: coco"
        )
    for number in value:
        if type(number) is not int or number not in read.categories:
            raise DataError(
                f"{source}: image {image['id']}: {key} holds {number!r}, which is not listed in 'categories'"
            )
    return frozenset(value)


def _frequency(category: Mapping[str, Any], source: str) -> Frequency:
    value = category.get("frequency")
    if value not in FREQUENCIES:
        raise DataError(
            f"{source}: category {category['id']} ({category['name']}): frequency is {value!r}; allowed: r, c, f "
            "(rare, common, frequent)"
        )
    return cast(Frequency, value)


def _image_counts(categories: Mapping[int, Mapping[str, Any]], source: str) -> dict[int, int] | None:
    if any("image_count" not in entry for entry in categories.values()):
        return None
    for number, entry in categories.items():
        if type(entry["image_count"]) is not int or entry["image_count"] < 0:
            raise DataError(
                f"{source}: category {number} ({entry['name']}): image_count is {entry['image_count']!r}; it must be a "
                "whole number, 0 or more"
            )
    return {number: entry["image_count"] for number, entry in categories.items()}


def read_lvis(path: str | Path, *, skip_invalid: bool = False) -> LvisAnnotations:
    """Read and check an LVIS json file; see `parse_lvis`."""
    return parse_lvis(read_json(Path(path)), str(path), skip_invalid=skip_invalid)
