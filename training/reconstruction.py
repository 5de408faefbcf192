"""Pre-labels that nobody has kept, drawn once more: those of the button in CVAT.

The shapes that are left name their version. With which threshold it was run, nobody has written down, so it is run with
what the function does by default, and the answer is believed only if the shapes that are left prove it:

- one of them at least is exactly one of the regions that are found again, and
- each of the others has the label and the confidence of one. People who cut a shape leave both as they are, while
  another threshold, another smallest region or other weights change confidences and outlines.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
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
    shapes, spellings = _draw_again(detector, image, labels=labels, frame=int(left[0]["frame"]), kinds=kinds)
    sure = {(shape["label_id"], _attribute(shape, labels, CONFIDENCE)) for shape in shapes}
    untouched = [identity(shape) in spellings for shape in left]
    for shape, same in zip(left, untouched, strict=True):
        confidence = _attribute(shape, labels, CONFIDENCE)
        if not same and (not confidence or (shape["label_id"], confidence) not in sure):
            return None
    return shapes if any(untouched) else None


def _draw_again(
    detector: Detector,
    image: NDArray[np.uint8],
    *,
    labels: Sequence[ProjectLabel],
    frame: int,
    kinds: Collection[str],
) -> tuple[list[dict[str, Any]], set[str]]:
    """What a version draws with the settings that a function has by default, and the identities of the shapes."""
    names = {label.id: label.name for label in detector.labels}
    met = match_labels(list(names.values()), labels, schema=detector.manifest.labels)
    fit = within_budget(detector.regions(image, threshold=0.0), max_crop_area=MAX_CROP_AREA)
    shapes: list[dict[str, Any]] = []
    spellings: set[str] = set()
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
        shapes.append(spelt["mask"])
        spellings.update(map(identity, spelt.values()))
    return shapes, spellings


def _attribute(shape: Mapping[str, Any], labels: Sequence[ProjectLabel], name: str) -> str:
    """Value of a shape's attribute; empty where its label has none."""
    numbers = {label.id: label.attributes.get(name) for label in labels}
    values = {value["spec_id"]: value["value"] for value in shape.get("attributes") or []}
    return str(values.get(numbers.get(shape["label_id"]), ""))
