"""The images of a split of LVIS with their ground truth."""

from __future__ import annotations

from dataclasses import replace

from diffinst.data.annotations import ImageInfo
from diffinst.data.coco import CocoDataset
from diffinst.data.lvis import LvisAnnotations, read_lvis


class LvisDataset(CocoDataset):
    """The images of a split of LVIS; see `CocoDataset`.

    images_dir: holds COCO's folders train2017 and val2017, as far as the file needs them, or all files directly.
    """

    def _read(self) -> LvisAnnotations:
        read = read_lvis(self.annotations_path, skip_invalid=self._data.skip_invalid)
        self._image_counts = read.image_counts
        has_folder: dict[str, bool] = {}

        def located(info: ImageInfo) -> ImageInfo:
            folder, _, name = info.file_name.rpartition("/")
            if folder not in has_folder:
                has_folder[folder] = (self.images_dir / folder).is_dir()
            return info if has_folder[folder] else replace(info, file_name=name)

        return replace(read, images={number: located(info) for number, info in read.images.items()})

    @property
    def class_image_counts(self) -> list[int]:
        """What the file says of the training images of each class; counted in the split where it says nothing."""
        if self._image_counts is None:
            return super().class_image_counts
        return [self._image_counts[number] for number in self.category_ids]
