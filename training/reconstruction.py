"""Pre-labels that nobody has kept, drawn once more: those of the button in CVAT.

The shapes that are left name their version. With which threshold it was run, nobody has written down, so it is run with
what the function does by default, and the answer is believed only if the shapes that are left prove it:

- one of them at least is exactly one of the regions that are found again, and
- each of the others has the label and the confidence of one. People who cut a shape leave both as they are, while
  another threshold or other weights change confidences and outlines; and
- what is missing does not look as if it had never been drawn. A threshold leaves out regions that are less sure than
  all that it leaves whole, a limit of sizes or numbers leaves out the smallest. Where that explains every missing
  region, nobody can say whether people have deleted any.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sscloud.budget import within_budget
from training.annotations import is_auto
from training.cvat import ProjectLabel
from training.detector import Detector, region_points
from training.prelabel import request_of
from training.prelabel_store import identity
from training.project_labels import match_labels

MODEL: Final = "model"
CONFIDENCE: Final = "confidence"
"""Attributes of the shapes."""
MAX_CROP_AREA: Final = 20_000_000
"""Pixels in the boxes of all masks of an answer, beyond which the function cuts regions and sends polygons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A region that is found again."""

    shape: Mapping[str, Any]
    """As a mask."""
    spellings: frozenset[str]
    """Identities of its shape, of each kind that it may have been sent as."""
    outlines: frozenset[str]
    """The same, whatever its label and its attributes."""
    look: tuple[int, str]
    """Label id and confidence, as a shape says them."""
    confidence: float
    area: int
    """Pixels."""


def titles_of(shapes: Iterable[Mapping[str, Any]], labels: Sequence[ProjectLabel]) -> set[str]:
    """The versions that a model's shapes name; those that a person has given another label name none any more."""
    return {_attribute(shape, labels, MODEL) for shape in shapes if is_auto(shape)} - {""}


def reconstruct(
    detector: Detector,
    image: NDArray[np.uint8],
    present: Sequence[Mapping[str, Any]],
    *,
    labels: Sequence[ProjectLabel],
) -> list[dict[str, Any]] | None:
    """The shapes that a version drew in a frame, by what is left of them.

    Args:
        detector: the version.
        image: (H, W, 3) uint8 RGB.
        present: the frame's shapes now.
        labels: of the task.

    Returns:
        As they were sent; None if what is left does not prove it.

    Raises:
        ImageError: the image is too small for the model.
    """
    title = detector.manifest.title
    left = [shape for shape in present if is_auto(shape) and _attribute(shape, labels, MODEL) == title]
    if not left:
        return None
    kinds = {str(shape["type"]) for shape in left} & {"mask", "polygon"}
    found = _draw_again(detector, image, labels=labels, frame=int(left[0]["frame"]), kinds=kinds)
    there = _matched(found, left, labels=labels)
    if there is None:
        return None
    others = {_outline(shape) for shape in present if _attribute(shape, labels, MODEL) != title}
    there |= {number for number, region in enumerate(found) if region.outlines & others}  # re-labelled
    missing = [region for number, region in enumerate(found) if number not in there]
    if _may_be_left_out(missing, beside=[found[number] for number in there]):
        return None
    return [dict(region.shape) for region in found]


def _matched(
    found: Sequence[_Found], left: Iterable[Mapping[str, Any]], *, labels: Sequence[ProjectLabel]
) -> set[int] | None:
    """The regions that the shapes were; None if one of the shapes was none of them, or no shape is untouched."""
    by_spelling = {spelling: number for number, region in enumerate(found) for spelling in region.spellings}
    by_look: dict[tuple[int, str], list[int]] = {}
    for number, region in enumerate(found):
        by_look.setdefault(region.look, []).append(number)
    there: set[int] = set()
    changed: list[tuple[int, str]] = []
    for shape in left:
        spelling = identity(shape)
        if spelling in by_spelling:
            there.add(by_spelling[spelling])
            continue
        confidence = _attribute(shape, labels, CONFIDENCE)
        look = (int(shape["label_id"]), confidence)
        if not confidence or look not in by_look:
            return None
        changed.append(look)
    if not there:
        return None
    for look in changed:  # of several it is one or the other; a piece of a shape that was cut in two is none more
        there.update([number for number in by_look[look] if number not in there][:1])
    return there


def _may_be_left_out(missing: Sequence[_Found], *, beside: Sequence[_Found]) -> bool:
    """Whether a threshold, or a limit of sizes or numbers, would leave out these and keep the others."""
    sure, small = min(region.confidence for region in beside), min(region.area for region in beside)
    return bool(missing) and all(region.confidence < sure or region.area <= small for region in missing)


def _draw_again(
    detector: Detector,
    image: NDArray[np.uint8],
    *,
    labels: Sequence[ProjectLabel],
    frame: int,
    kinds: Collection[str],
) -> list[_Found]:
    """What a version draws with the settings that a function has by default."""
    names = {label.id: label.name for label in detector.labels}
    met = match_labels(list(names.values()), labels, schema=detector.manifest.labels)
    fit = within_budget(detector.regions(image, threshold=0.0), max_crop_area=MAX_CROP_AREA)
    found = []
    for region in (*fit.masks, *fit.polygons):
        label = met.get(names[region.label_id])
        if label is None:
            continue  # CVAT drops it
        attributes = detector.attributes(region)
        spelt = {
            kind: request_of(
                label, kind=kind, points=region_points(region, kind=kind), frame=frame, attributes=attributes
            )
            for kind in ("mask", *kinds)
        }
        found.append(
            _Found(
                shape=spelt["mask"],
                spellings=frozenset(map(identity, spelt.values())),
                outlines=frozenset(map(_outline, spelt.values())),
                look=(label.id, _attribute(spelt["mask"], labels, CONFIDENCE)),
                confidence=region.confidence,
                area=region.area,
            )
        )
    return found


def _outline(shape: Mapping[str, Any]) -> str:
    """Identity of which pixels a shape covers."""
    return identity({key: shape[key] for key in ("type", "points")})


def _attribute(shape: Mapping[str, Any], labels: Sequence[ProjectLabel], name: str) -> str:
    """Value of a shape's attribute; empty where its label has none."""
    numbers = {label.id: label.attributes.get(name) for label in labels}
    values = {value["spec_id"]: value["value"] for value in shape.get("attributes") or []}
    return str(values.get(numbers.get(shape["label_id"]), ""))
