"""Two bundles on the same panoramas: where they differ, by how much, and whether that is more than chance.

Both are measured on the same resamples of groups of panoramas, and the differences are taken resample by resample. What
makes a panorama hard for both cancels out: these intervals are much narrower than those of the single scores suggest.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from sscloud.bundle import ModelBundle
from sscloud.errors import DatasetError
from sscloud.inference import Predictor
from sscloud.labels import VOID, LabelSchema, count_ids
from training.bootstrap import draws, interval, resampled_scores
from training.dataset import DatasetFolder
from training.evaluate import (
    Evaluation,
    Gauge,
    about_intervals,
    check_fit,
    clipped,
    json_number,
    json_numbers,
    scores_to_dict,
    shown_score,
    summarise,
    warn_of_learned,
)
from training.pictures import Typeface, legend, overlay, shrink_image, shrink_labels

PICTURES = 5
"""Panoramas that are drawn, those that differ most first."""

Verdict = Literal["better", "worse", "no difference shown", "not measured"]

Color = tuple[int, int, int]
# Colours of Okabe and Ito's palette, told apart by colour-blind people too.
_KINDS: tuple[tuple[str, Color], ...] = (
    ("only A is right", (230, 159, 0)),
    ("only B is right", (86, 180, 233)),
    ("both wrong, differently", (204, 121, 167)),
    ("differ where nobody labelled", (128, 132, 140)),
)
_PICTURE_WIDTH = 2048
_NAME_WIDTH = 24
_JPEG_QUALITY = 88


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of one score: B's minus A's."""

    value: float
    """NaN where one of them has no score."""
    limits: tuple[float, float] | None
    """Low and high of the 95 % interval of the paired difference; None without intervals."""

    @property
    def verdict(self) -> Verdict:
        """What the interval says of B; that it holds zero is no proof that both are equal."""
        if math.isnan(self.value) or self.limits is None or math.isnan(self.limits[0]):
            return "not measured"
        low, high = self.limits
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How two models differ on one panorama."""

    name: str
    miou: float
    """B's mIoU minus A's, on this panorama alone; NaN where nothing is labelled."""
    pixels: int
    """Labelled pixels that they give different classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of bundle B with bundle A."""

    a: Evaluation
    b: Evaluation
    titles: tuple[str, str]
    """Name and version of A and B."""
    iou: tuple[Difference, ...]
    """Of each class, in the order of the evaluations' labels."""
    miou: Difference
    mean_dice: Difference
    panoramas: tuple[Divergence, ...]
    """Those that differ most first."""


def compare(
    first: ModelBundle,
    second: ModelBundle,
    dataset: DatasetFolder,
    *,
    device: str = "auto",
    turns: int = 1,
    group_by: str | None = None,
    picture: Callable[[str, bytes], None] | None = None,
) -> Comparison:
    """Measure two bundles on the same panoramas.

    Args:
        first: A.
        second: B.
        dataset: the panoramas.
        device: see `Predictor`.
        turns: of both; see `training.evaluate.evaluate`.
        group_by: what is resampled together; see `training.bootstrap.groups_of`.
        picture: told the name and the JPEG of each of the `PICTURES` panoramas that differ most.

    Raises:
        SchemaError: ids that have different names in the bundles and the data set, or that nobody knows.
        ImageError: unreadable files.
        DatasetError: masks that are void all over, or names without a group.
    """
    schemas = {"bundle A": first.manifest.labels, "bundle B": second.manifest.labels}
    for bundle in (first, second):
        check_fit(bundle, dataset)
    gauge = Gauge(dataset, schemas, group_by=group_by)
    predictors = [Predictor(bundle, device=device, precision="fp32", turns=turns) for bundle in (first, second)]
    for predictor in predictors:
        predictor.warm_up()
    counted = []
    divergences = []
    for item in tqdm(dataset.items, "Comparing", unit="img", leave=False, disable=None):
        example = gauge.open(item)
        (a, ours), (b, theirs) = (gauge.count(example, predictor) for predictor in predictors)
        counted.append((a, b))
        apart = (ours.label_map != theirs.label_map) & (example.truth != VOID)
        divergences.append(Divergence(name=item.name, miou=b.miou - a.miou, pixels=int(np.count_nonzero(apart))))
    for bundle, results in zip((first, second), zip(*counted, strict=True), strict=True):
        warn_of_learned(bundle, results)
    if not any(a.confusion.any() for a, _ in counted):
        raise DatasetError(f"Every pixel of the masks in {dataset.path} is void: there is nothing to compare with.")
    divergences.sort(key=lambda each: (-abs(np.nan_to_num(each.miou)), -each.pixels, each.name))
    titles = first.manifest.title, second.manifest.title
    if titles[0] == titles[1]:
        titles = str(first.path), str(second.path)
    a_side, b_side = (summarise(gauge.labels, side) for side in zip(*counted, strict=True))
    comparison = _comparison(a_side, b_side, titles, divergences)
    if picture is not None:
        items = {item.name: item for item in dataset.items}
        schema = LabelSchema(labels=gauge.labels, void_ids=dataset.schema.void_ids)
        for each in divergences[:PICTURES]:
            if each.pixels:
                example = gauge.open(items[each.name])
                maps = [predictor.predict(example.image).label_map for predictor in predictors]
                truth = np.where(example.truth == VOID, np.uint8(VOID), example.label_map)
                sheet = draw(each, example.image, truth, maps[0], maps[1], schema=schema, titles=titles)
                picture(each.name, _jpeg(sheet))
    return comparison


def _comparison(a: Evaluation, b: Evaluation, titles: tuple[str, str], divergences: Sequence[Divergence]) -> Comparison:
    drawn = draws([panorama.group for panorama in a.panoramas])
    limits: dict[str, NDArray[np.float64]] = {}
    if drawn is not None:
        ours, theirs = (
            resampled_scores(drawn, np.stack([panorama.confusion for panorama in side.panoramas])) for side in (a, b)
        )
        limits = {name: interval(getattr(theirs, name) - getattr(ours, name)) for name in ("iou", "miou", "mean_dice")}

    def difference(name: str, value: float, *place: int) -> Difference:
        if name not in limits:
            return Difference(value=value, limits=None)
        low, high = limits[name][place].tolist()
        return Difference(value=value, limits=(low, high))

    iou = (b.scores.iou - a.scores.iou).tolist()
    return Comparison(
        a=a,
        b=b,
        titles=titles,
        iou=tuple(difference("iou", value, index) for index, value in enumerate(iou)),
        miou=difference("miou", b.scores.miou - a.scores.miou),
        mean_dice=difference("mean_dice", b.scores.mean_dice - a.scores.mean_dice),
        panoramas=tuple(divergences),
    )


# --- in words and numbers ---------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> str:
    """The comparison as a table for a terminal of 100 columns, with a conclusion in words."""
    a, b = comparison.a.scores, comparison.b.scores
    names = [clipped(label.name, _NAME_WIDTH) for label in comparison.a.labels]
    width = max([9, *map(len, names)])
    rows = [
        *zip(names, a.iou.tolist(), b.iou.tolist(), comparison.iou, strict=True),
        ("mIoU", a.miou, b.miou, comparison.miou),
        ("mean Dice", a.mean_dice, b.mean_dice, comparison.mean_dice),
    ]
    lines = [f"{'IoU of':{width}}      A      B     B - A  {'[low, high]':<16}  B is"]
    for index, (name, ours, theirs, change) in enumerate(rows):
        if index == len(names):
            lines.append("")
        value = "—" if math.isnan(change.value) else f"{change.value:+.3f}"
        lines.append(
            f"{name:{width}}  {shown_score(ours):>5}  {shown_score(theirs):>5}  {value:>8}  "
            f"{_shown_limits(change.limits):<16}  {change.verdict}"
        )
    groups = comparison.a.intervals.groups if comparison.a.intervals else 1
    return "\n".join([*lines, "", about_intervals(groups), conclusion(comparison)])


def conclusion(comparison: Comparison) -> str:
    """Which one is better, or that the data do not tell."""
    change, (a, b) = comparison.miou, comparison.titles
    by = f"mIoU {change.value:+.3f} {_shown_limits(change.limits)}"
    match change.verdict:
        case "better":
            return f"B ({b}) is better than A ({a}): {by}."
        case "worse":
            return f"B ({b}) is worse than A ({a}): {by}."
        case "no difference shown":
            return f"These {len(comparison.a.panoramas)} panoramas do not tell whether A or B is better: {by}."
        case "not measured":
            return "The data do not tell whether A or B is better: there is no interval of the difference."


def _shown_limits(limits: tuple[float, float] | None) -> str:
    if limits is None or math.isnan(limits[0]):
        return ""
    return f"[{limits[0]:+.3f}, {limits[1]:+.3f}]"


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON types; null where a score is not defined."""

    def difference(change: Difference) -> dict[str, Any]:
        return {
            "value": json_number(change.value),
            "interval": json_numbers(change.limits) if change.limits is not None else None,
            "verdict": change.verdict,
        }

    return {
        "conclusion": conclusion(comparison),
        "miou": difference(comparison.miou),
        "mean_dice": difference(comparison.mean_dice),
        "classes": [
            {"id": label.id, "name": label.name, "iou": difference(change)}
            for label, change in zip(comparison.a.labels, comparison.iou, strict=True)
        ],
        "panoramas": [
            {"name": each.name, "miou": json_number(each.miou), "pixels": each.pixels} for each in comparison.panoramas
        ],
        "a": {"title": comparison.titles[0], **scores_to_dict(comparison.a)},
        "b": {"title": comparison.titles[1], **scores_to_dict(comparison.b)},
    }


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(
    divergence: Divergence,
    image: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    *,
    schema: LabelSchema,
    titles: tuple[str, str],
) -> NDArray[np.uint8]:
    """One sheet: the image, the mask, A, B, where they differ, and a legend.

    Args:
        divergence: for the title.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) uint8 label ids, 255 where nothing is compared.
        first: of A, likewise.
        second: of B, likewise.
        schema: their labels.
        titles: of A and B.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, full_width = truth.shape
    width = max(1024, min(_PICTURE_WIDTH, full_width))
    size_hw = max(1, round(height * width / full_width)), width
    small = shrink_image(image, size_hw)
    counts = np.sum([count_ids(label_map) for label_map in (truth, first, second)], axis=0)
    change = "" if math.isnan(divergence.miou) else f", mIoU of B - A {divergence.miou:+.3f}"
    parts = [_heading(f"{divergence.name}{change}, {divergence.pixels} pixels differ", width), small]
    for title, label_map in (("Mask", truth), (f"A: {titles[0]}", first), (f"B: {titles[1]}", second)):
        labels = shrink_labels(label_map, size_hw, schema, counts=counts)
        parts += [_heading(title, width), overlay(small, labels, schema)]
    parts += [_heading("Where they differ", width, kinds=_KINDS), disagreement(truth, first, second, ground=small)]
    return np.concatenate([*parts, legend(schema, truth=truth, width=width)])


def disagreement(
    truth: NDArray[np.uint8], first: NDArray[np.uint8], second: NDArray[np.uint8], *, ground: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Tint a dark picture where two predictions differ, by which of them is right.

    Args:
        truth: (H, W) uint8 label ids, 255 where nothing is compared.
        first: of A.
        second: of B.
        ground: (h, w, 3) uint8 picture to tint; a pixel of it that stands for several is tinted by their share.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, width = ground.shape[:2]
    grey = cv2.cvtColor(ground, cv2.COLOR_RGB2GRAY)
    picture = np.repeat((16 + grey * np.float32(70 / 255))[..., None], 3, axis=2)
    differ, valid = first != second, truth != VOID
    a_right, b_right = first == truth, second == truth
    masks = (
        differ & valid & a_right,
        differ & valid & b_right,
        differ & valid & ~a_right & ~b_right,
        differ & ~valid,
    )
    for mask, (_, color) in zip(masks, _KINDS, strict=True):
        shrinks = width < mask.shape[1]
        share = cv2.resize(
            mask.astype(np.float32),
            (width, height),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST,
        )
        picture += share[..., None] * (np.asarray(color, np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def _heading(text: str, width: int, *, kinds: Sequence[tuple[str, Color]] = ()) -> NDArray[np.uint8]:
    """A line of bold text, with a swatch and a name for each kind."""
    size = max(12, width // 90)
    bold, normal = Typeface(size, bold=True), Typeface(size)
    sheet = Image.new("RGB", (width, 2 * size), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    bold.draw(pen, (size, size // 2), bold.clip(text, width - 2 * size), fill=(28, 32, 40))
    left = 3 * size + bold.width(text)
    for name, color in kinds:
        pen.rectangle((left, size // 2, left + size, size // 2 + size), fill=color)
        normal.draw(pen, (left + 3 * size // 2, size // 2), name, fill=(28, 32, 40))
        left += 3 * size + normal.width(name)
    return np.asarray(sheet)


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
