"""What is wrong with detections, by kind: the six error types of TIDE (arXiv:2008.08115), and what each costs in AP50.

Numbers in, numbers out. A detection that found no instance is wrong in one of five ways, by its overlap with instances
of its own and of other classes; an instance that nothing found, and that no detection came near enough to be put right,
is missed. What a kind costs is the AP that is gained when all errors of that kind, and no others, are put right.

Matching is that of the COCO evaluation, so that `Breakdown.ap` is its AP at the threshold. The kinds are tried in the
order of TIDE's program: localisation, class, duplicate, background, both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ErrorKind = Literal["class", "localisation", "both", "duplicate", "background", "missed"]
ERROR_KINDS: tuple[ErrorKind, ...] = ("class", "localisation", "both", "duplicate", "background", "missed")
ERROR_TEXT: dict[ErrorKind, str] = {
    "class": "overlaps an instance well, but names another class",
    "localisation": "names the right class, but overlaps its instance too little",
    "both": "overlaps an instance too little, and names another class",
    "duplicate": "overlaps an instance well that a better detection has found already",
    "background": "overlaps no instance",
    "missed": "an instance that no detection found, and that none came near enough to",
}
FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1

RIGHT, IGNORED = -1, -2  # in place of a position in ERROR_KINDS
_RECALLS = np.linspace(0.0, 1.0, 101)
_EPSILON = np.spacing(1)

# Which detections, best first, find an instance or a crowd region; see `diffinst.evaluation.matches.match_greedily`.
Matcher = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Scene:
    """One image's detections and ground truth.

    score: (D,). category: (D,) int. truth_category: (G,) int. is_crowd: (G,) bool. overlaps: (D, G) IoU of every pair,
    whatever their classes; with a crowd region, the share of the detection in it. open_categories: classes that are not
    annotated exhaustively here, so that a detection of them that matches nothing is no mistake (LVIS).
    """

    score: np.ndarray
    category: np.ndarray
    truth_category: np.ndarray
    is_crowd: np.ndarray
    overlaps: np.ndarray
    open_categories: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SceneErrors:
    """What became of an image's detections and instances.

    kind: (D,) int, position in ERROR_KINDS, RIGHT or IGNORED. target: (D,) int, the instance that a detection found, or
    would find once its class or its place is put right; -1 for none. found: (G,) bool; missed: (G,) bool.
    """

    kind: np.ndarray
    target: np.ndarray
    found: np.ndarray
    missed: np.ndarray


@dataclass(frozen=True)
class Breakdown:
    """Errors of a set of images.

    ap: AP at the foreground threshold, a fraction; None without instances. counts: number of errors by kind. cost: AP
    gained by putting right all errors of a kind and no others. num_right: detections that found an instance.
    num_instances: to be found. ap_of_all: AP once all errors are put right, which is 1 by construction.
    """

    ap: float | None
    counts: dict[ErrorKind, int]
    cost: dict[ErrorKind, float]
    num_right: int
    num_instances: int
    ap_of_all: float | None


def classify_errors(
    scene: Scene, match: Matcher, *, foreground: float = FOREGROUND_IOU, background: float = BACKGROUND_IOU
) -> SceneErrors:
    """Sort every detection of an image into right, ignored or a kind of error, and find the missed instances.

    Args:
        match: greedy matching within one class.
        foreground: least IoU of a match. background: up to this IoU a detection is on the background.
    """
    num_detections, num_truth = scene.overlaps.shape
    kind = np.full(num_detections, -3, dtype=np.int64)
    target = np.full(num_detections, -1, dtype=np.int64)
    found = np.zeros(num_truth, dtype=bool)
    for category in np.unique(scene.category):
        detections = np.flatnonzero(scene.category == category)
        detections = detections[np.argsort(-scene.score[detections], kind="stable")]
        truth = np.flatnonzero(scene.truth_category == category)
        matched, ignored = match(
            scene.overlaps[np.ix_(detections, truth)], scene.is_crowd[truth], np.array([foreground])
        )
        kind[detections[ignored[0]]] = IGNORED
        kind[detections[matched[0] & ~ignored[0]]] = RIGHT
        if int(category) in scene.open_categories:
            kind[detections[~matched[0]]] = IGNORED
        _take(scene, detections[matched[0] & ~ignored[0]], truth[~scene.is_crowd[truth]], target, found)

    instances = np.flatnonzero(~scene.is_crowd)
    same = scene.category[:, None] == scene.truth_category[None, instances]
    overlaps = scene.overlaps[:, instances]
    of_same = np.where(same, overlaps, 0.0)
    of_others = np.where(same, 0.0, overlaps)
    for detection in np.flatnonzero(kind == -3):
        own, other = (_best(values[detection]) for values in (of_same, of_others))
        if background <= own[1] < foreground:
            kind[detection], target[detection] = ERROR_KINDS.index("localisation"), instances[own[0]]
        elif other[1] >= foreground:
            kind[detection], target[detection] = ERROR_KINDS.index("class"), instances[other[0]]
        elif own[1] >= foreground:
            kind[detection], target[detection] = ERROR_KINDS.index("duplicate"), instances[own[0]]
        elif max(own[1], other[1]) <= background:
            kind[detection] = ERROR_KINDS.index("background")
        else:
            kind[detection] = ERROR_KINDS.index("both")
    near = np.zeros(num_truth, dtype=bool)
    near[target[(kind == ERROR_KINDS.index("localisation")) | (kind == ERROR_KINDS.index("class"))]] = True
    return SceneErrors(kind, target, found, ~found & ~near & ~scene.is_crowd)


def error_breakdown(
    scenes: Iterable[Scene],
    match: Matcher,
    *,
    foreground: float = FOREGROUND_IOU,
    background: float = BACKGROUND_IOU,
) -> Breakdown:
    """Count the errors of all images and find what each kind costs; arguments as for `classify_errors`."""
    pool = _Pool()
    for scene in scenes:
        pool.add(scene, classify_errors(scene, match, foreground=foreground, background=background))
    pool.finish()
    ap = pool.average_precision(())
    fixed: dict[ErrorKind, float | None] = {kind: pool.average_precision((kind,)) for kind in ERROR_KINDS}
    return Breakdown(
        ap=ap,
        counts={
            kind: pool.num_missed if kind == "missed" else int((pool.kind == position).sum())
            for position, kind in enumerate(ERROR_KINDS)
        },
        # A gain can come out a hair below 0, as precision is read at 101 recalls only.
        cost={kind: max((value or 0.0) - (ap or 0.0), 0.0) for kind, value in fixed.items()},
        num_right=int((pool.kind == RIGHT).sum()),
        num_instances=pool.num_instances,
        ap_of_all=pool.average_precision(ERROR_KINDS),
    )


def average_precision(is_right: np.ndarray, num_instances: int) -> float:
    """Area under the interpolated precision at 101 recalls, as in the COCO evaluation.

    Args:
        is_right: (D,) bool, detections by falling score.
    """
    return float(precision_at_recalls(is_right, num_instances).mean())


def precision_at_recalls(is_right: np.ndarray, num_instances: int) -> np.ndarray:
    """(101,) interpolated precision at the recalls 0, 0.01, ..., 1; 0 beyond the recall that is reached."""
    right = np.cumsum(is_right)
    precision = right / (np.arange(1, len(right) + 1) + _EPSILON)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    positions = np.searchsorted(right / num_instances, _RECALLS, side="left")
    curve = np.zeros(len(_RECALLS))
    reached = positions < len(right)
    curve[reached] = precision[positions[reached]]
    return curve


def _best(overlaps: np.ndarray) -> tuple[int, float]:
    if not len(overlaps):
        return -1, 0.0
    position = int(overlaps.argmax())
    return position, float(overlaps[position])


def _take(scene: Scene, detections: np.ndarray, truth: np.ndarray, target: np.ndarray, found: np.ndarray) -> None:
    """Which instance each right detection of a class has taken: the one it overlaps most among those still free."""
    for detection in detections:
        free = truth[~found[truth]]
        overlaps = scene.overlaps[detection, free]
        # Of equal overlaps the later instance, as in the matching.
        instance = free[len(free) - 1 - int(overlaps[::-1].argmax())]
        target[detection], found[instance] = instance, True


class _Pool:
    """Detections and instances of all images in flat arrays."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {
            name: [np.zeros(0, dtype=kind)]
            for name, kind in (("score", float), ("category", int), ("kind", int), ("target", int))
        }
        self._truth: list[np.ndarray] = [np.zeros(0, dtype=int)]
        self._is_instance: list[np.ndarray] = [np.zeros(0, dtype=bool)]
        self._found: list[np.ndarray] = [np.zeros(0, dtype=bool)]
        self._missed: list[np.ndarray] = [np.zeros(0, dtype=bool)]
        self._offset = 0

    def add(self, scene: Scene, errors: SceneErrors) -> None:
        self._parts["score"].append(scene.score)
        self._parts["category"].append(scene.category)
        self._parts["kind"].append(errors.kind)
        self._parts["target"].append(np.where(errors.target < 0, -1, errors.target + self._offset))
        self._truth.append(scene.truth_category)
        self._is_instance.append(~scene.is_crowd)
        self._found.append(errors.found)
        self._missed.append(errors.missed)
        self._offset += len(scene.truth_category)

    def finish(self) -> None:
        self.score, self.category, self.kind, self.target = (
            np.concatenate(self._parts[name]) for name in ("score", "category", "kind", "target")
        )
        self.truth = np.concatenate(self._truth)
        self.is_instance = np.concatenate(self._is_instance)
        self.found = np.concatenate(self._found)
        self.missed = np.concatenate(self._missed)
        self.num_instances = int(self.is_instance.sum())
        self.num_missed = int(self.missed.sum())
        # By falling score, equal ones in the order of the images.
        self._order = np.argsort(-self.score, kind="stable")

    def average_precision(self, fixed: Collection[ErrorKind]) -> float | None:
        """Mean over classes of the AP with some kinds of errors put right; None without instances.

        A class stays in the mean while it has detections or instances left, as in TIDE: one without instances to begin
        with is not in it, as in the COCO evaluation. If nothing is left at all, nothing is wrong: 1.
        """
        if not self.num_instances:
            return None
        numbers = [ERROR_KINDS.index(kind) for kind in fixed]
        is_right, category = self.kind == RIGHT, self.category.copy()
        is_kept = (self.kind != IGNORED) & ~np.isin(self.kind, numbers)
        # Put right, a wrong class or place finds its instance, unless that is found already: then it goes.
        repairable = [ERROR_KINDS.index(kind) for kind in fixed if kind in ("class", "localisation")]
        free = ~self.found
        for detection in self._order[np.isin(self.kind[self._order], repairable)]:
            instance = self.target[detection]
            if free[instance]:
                free[instance] = False
                is_right[detection] = is_kept[detection] = True
                category[detection] = self.truth[instance]
        wanted = self.is_instance & ~self.missed if "missed" in fixed else self.is_instance
        kept = self._order[is_kept[self._order]]
        areas = []
        for number in np.unique(self.truth[self.is_instance]):
            of_class = kept[category[kept] == number]
            total = int((self.truth[wanted] == number).sum())
            if total:
                areas.append(average_precision(is_right[of_class], total))
            elif len(of_class):
                areas.append(0.0)
        return float(np.mean(areas)) if areas else 1.0


def image_f1(matched: np.ndarray, ignored: np.ndarray, image: np.ndarray, num_instances: np.ndarray) -> np.ndarray:
    """How well each image is segmented: 2 right / (2 right + wrong + missed), the mean over IoU thresholds.

    Args:
        matched, ignored: (T, D) bool, as in a match table, of the detections that count. image: (D,) int.
        num_instances: (I,) of all classes.
    Returns:
        (I,) fractions; NaN where there is neither an instance nor a detection.
    """
    num_images = len(num_instances)
    values = []
    for found, out in zip(matched, ignored):
        right = np.bincount(image[found & ~out], minlength=num_images)
        wrong = np.bincount(image[~found & ~out], minlength=num_images)
        total = right + wrong + num_instances  # 2 right + wrong + missed
        values.append(np.where(total > 0, 2 * right / np.maximum(total, 1), np.nan))
    mean: np.ndarray = np.mean(values, axis=0)
    return mean


def best_threshold(score: np.ndarray, matched: np.ndarray, ignored: np.ndarray, num_instances: int) -> float:
    """The score from which detections are shown: where 2 right / (detections + instances) is greatest; 0 for none.

    Args:
        score: (D,). matched, ignored: (D,) bool at one IoU threshold. num_instances: of all images.
    """
    counted = ~ignored
    order = np.argsort(-score[counted], kind="stable")
    if not len(order):
        return 0.0
    right = np.cumsum(matched[counted][order])
    values = 2 * right / (np.arange(1, len(order) + 1) + num_instances)
    return float(score[counted][order][int(values.argmax())])


def mean_precision(curves: Sequence[np.ndarray]) -> np.ndarray:
    """(101,) mean over classes of their precision at 101 recalls."""
    return np.asarray(np.mean(curves, axis=0))
