"""COCO-format data sets: images with their ground truth.

The whole json is checked before any image is read (see `diffinst.data.annotations`); images are decoded when they are
asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hotcoco.mask
import numpy as np
import torch
from torch import Tensor

from diffinst.config import DataConfig
from diffinst.data import catalog
from diffinst.data.annotations import (
    CLASS_AGNOSTIC_NAME,
    CocoAnnotations,
    ImageInfo,
    compress_segmentation,
    read_annotations,
    read_image,
)
from diffinst.data.catalog import Split
from diffinst.data.transforms import (
    Recipe,
    plan_test,
    plan_training,
    shortest_edge_size,
    transform_image,
    transform_target,
)
from diffinst.errors import DataError
from diffinst.structures import Sample, Target

# Splits whose decoded images fit into this many bytes are kept in memory after the first reading.
CACHE_BYTES = 512 * 1024**2


class CocoDataset:
    """The images of one split with their ground truth; crowd annotations are left out, images without any are kept.

    Categories are numbered from 0 in the order of their ids, whether they occur or not.

    Args:
        annotations: COCO json file.
        images_dir: folder that its file names are relative to.
        data: sizes, augmentation, class_agnostic, skip_invalid.
        split: for messages only.
        image_ids: ids that make up the split; None for all of the file.

    Raises:
        DataError: the json is malformed, an id is not in it, or image files are missing.
    """

    def __init__(
        self,
        annotations: str | Path,
        images_dir: str | Path,
        *,
        data: DataConfig,
        split: Split,
        image_ids: Iterable[int] | None = None,
    ) -> None:
        self.annotations_path = Path(annotations)
        self.images_dir = Path(images_dir)
        self.split = split
        self._data = data
        read = self._read()
        self.num_skipped = len(read.skipped)
        self._infos = self._select(read, image_ids)
        self._instances = [
            [item for item in read.instances.get(info.id, ()) if not item.is_crowd] for info in self._infos
        ]
        self._has_masks = read.has_masks
        self.image_ids: list[int] = [info.id for info in self._infos]
        if data.class_agnostic:
            self.class_names: tuple[str, ...] = (CLASS_AGNOSTIC_NAME,)
            self.category_ids: tuple[int, ...] = (1,)
            self._label_of = dict.fromkeys(read.categories, 0)
        else:
            self.class_names = tuple(read.categories.values())
            self.category_ids = tuple(read.categories)
            self._label_of = {category: label for label, category in enumerate(self.category_ids)}
        self.check_images_exist()
        self._keeps_images = sum(3 * info.height * info.width for info in self._infos) <= CACHE_BYTES
        self._images: dict[int, np.ndarray] = {}
        self._rles: dict[int, list[dict[str, Any]]] = {}

    def _read(self) -> CocoAnnotations:
        return read_annotations(self.annotations_path, skip_invalid=self._data.skip_invalid)

    def _select(self, read: CocoAnnotations, image_ids: Iterable[int] | None) -> list[ImageInfo]:
        if image_ids is None:
            return list(read.images.values())
        wanted = sorted(set(image_ids))
        missing = [image_id for image_id in wanted if image_id not in read.images]
        if missing:
            raise DataError(
                f"{self.annotations_path}: image {missing[0]} of the id list is not in this file ({len(missing)} of "
                f"{len(wanted)} are not); take the list that belongs to the {self.split} split"
            )
        return [read.images[image_id] for image_id in wanted]

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_instances(self) -> int:
        """Instances that are not crowds."""
        return sum(map(len, self._instances))

    def image_labels(self) -> list[set[int]]:
        """The classes of each image."""
        return [{self._label_of[item.category_id] for item in instances} for instances in self._instances]

    @property
    def class_image_counts(self) -> list[int]:
        """On how many images of the split each class is."""
        counts = Counter(label for labels in self.image_labels() for label in labels)
        return [counts[label] for label in range(self.num_classes)]

    def check_images_exist(self) -> None:
        """Look up every file of the split without opening it.

        Raises:
            DataError: names the first missing file and says how many are missing.
        """
        try:
            present = {path.name for path in self.images_dir.iterdir()}
            # Names may have a folder, as those of LVIS do; to list it once is faster than to look up each file.
            for folder in {info.file_name.rpartition("/")[0] for info in self._infos} - {""}:
                if (self.images_dir / folder).is_dir():
                    present |= {f"{folder}/{path.name}" for path in (self.images_dir / folder).iterdir()}
        except OSError as error:
            raise DataError(
                f"{self.images_dir}: cannot list the image folder of {self.annotations_path}: {error.strerror}; check "
                "the path"
            ) from error
        missing = [
            info
            for info in self._infos
            if info.file_name not in present and not (self.images_dir / info.file_name).is_file()
        ]
        if missing:
            more = f" {len(missing)} of {len(self)} files are missing." if len(missing) > 1 else ""
            raise DataError(
                f"{self.annotations_path}: image {missing[0].id}: no file {self.images_dir / missing[0].file_name}. "
                f"Put it there, or leave the image out with an id list ({self.split}_image_ids).{more}"
            )

    def load_image(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB; do not write to it, it may be kept for the next call.

        Raises:
            DataError: the file is missing, damaged, or not of the size that the json says.
        """
        if index in self._images:
            return self._images[index]
        info = self._infos[index]
        path = self.images_dir / info.file_name
        try:
            image = read_image(path)
        except DataError as error:
            raise DataError(f"{self.annotations_path}: image {info.id}: {error}") from error
        if image.shape[:2] != (info.height, info.width):
            raise DataError(
                f"{self.annotations_path}: image {info.id}: {path} is {image.shape[0]} x {image.shape[1]} (height x "
                f"width, turned as EXIF says), but the json says {info.height} x {info.width}; correct the entry or "
                "replace the file"
            )
        if self._keeps_images:
            self._images[index] = image
        return image

    def target(self, index: int) -> Target:
        """Ground truth in pixels of the file: boxes clipped to the image, masks (M, height, width) or None."""
        info, instances = self._infos[index], self._instances[index]
        boxes = torch.tensor([item.bbox for item in instances], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = torch.tensor([info.width, info.height] * 2, dtype=torch.float64)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        labels = torch.tensor([self._label_of[item.category_id] for item in instances], dtype=torch.int64)
        return Target(boxes.to(torch.float32), labels, self._masks(index) if self._has_masks else None)

    def _masks(self, index: int) -> Tensor:
        info = self._infos[index]
        if not self._instances[index]:
            return torch.zeros((0, info.height, info.width), dtype=torch.bool)
        if index not in self._rles:
            self._rles[index] = [
                compress_segmentation(item.segmentation, info.height, info.width)
                for item in self._instances[index]
                if item.segmentation is not None
            ]
        # hotcoco decodes what pycocotools would, but faster, and without its deprecation warning on NumPy 2.
        decoded = hotcoco.mask.decode(self._rles[index])  # (h, w, M)
        return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)).view(np.bool_))

    def training_sample(self, index: int, generator: torch.Generator) -> Sample:
        """Flipped, cropped and resized as the generator decides, with its ground truth."""
        image = self.load_image(index)
        recipe = plan_training(self._size(index), self._data, generator)
        target = transform_target(self.target(index), recipe, crop_boxes=self._data.crop_boxes)
        return Sample(transform_image(image, recipe), self.image_ids[index], self._size(index), target)

    def test_sample(self, index: int) -> Sample:
        """Resized, without ground truth."""
        recipe = plan_test(self._size(index), self._data)
        return Sample(transform_image(self.load_image(index), recipe), self.image_ids[index], self._size(index))

    def original_sample(self, index: int) -> Sample:
        """As it is in its file, without ground truth."""
        size = self._size(index)
        image = transform_image(self.load_image(index), Recipe(original=size, final=size))
        return Sample(image, self.image_ids[index], size)

    def file_names(self) -> list[str]:
        """The file of every image, below `images_dir`."""
        return [info.file_name for info in self._infos]

    def file_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image as it is in its file."""
        return [self._size(index) for index in range(len(self))]

    def _size(self, index: int) -> tuple[int, int]:
        return self._infos[index].height, self._infos[index].width

    def test_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every test sample, without reading an image."""
        return [
            shortest_edge_size((info.height, info.width), self._data.shortest_edge_test, self._data.longest_edge_test)
            for info in self._infos
        ]


def open_dataset(data: DataConfig, split: Split, root: str | Path | None = None) -> CocoDataset:
    """Find a split by the name in its configuration and read it; see `catalog.resolve`."""
    paths = catalog.resolve(data, split, root)
    if catalog.annotation_format(data) == "lvis":
        # Imported here: that module builds on this one.
        from diffinst.data.lvis_dataset import LvisDataset

        return LvisDataset(paths.annotations, paths.images, data=data, split=split, image_ids=paths.image_ids)
    return CocoDataset(paths.annotations, paths.images, data=data, split=split, image_ids=paths.image_ids)
