"""When what is left of a button's pre-label says what was drawn."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.labels import LabelSchema
from sscloud.regions import Region
from training.cvat import ProjectLabel
from training.detector import Detector, region_points
from training.prelabel import request_of
from training.reconstruction import reconstruct

IMAGE = np.zeros((16, 64, 3), np.uint8)
GROUND, HOUSE = (
    ProjectLabel(
        id=number,
        name=name,
        color="",
        type="any",
        attributes={"model": 10 * number, "confidence": 10 * number + 1},
        text_attributes=frozenset({"model", "confidence"}),
        defaults={},
    )
    for number, name in ((2, "Земля"), (6, "Здание"))
)


def square(place: int, confidence: float, *, side: int = 4) -> Region:
    rows = np.arange(side, dtype=np.int32)
    left = 8 * place
    return Region(
        label_id=2,
        box_xyxy=(left, 0, left + side, side),
        rows=rows,
        starts=np.full(side, left, np.int32),
        stops=np.full(side, left + side, np.int32),
        confidence=confidence,
        area=side * side,
    )


class Version:
    """A detector that finds what it is told."""

    manifest = SimpleNamespace(title="street v3", labels=LabelSchema.default())
    labels = tuple(label for label in LabelSchema.default().classes if label.id == 2)

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = list(regions)

    def regions(self, image: NDArray[np.uint8], *, threshold: float) -> list[Region]:
        assert (image is IMAGE, threshold) == (True, 0.0)
        return self._regions

    def attributes(self, region: Region) -> dict[str, str]:
        return {"model": self.manifest.title, "confidence": f"{region.confidence:.2f}"}

    def shape(self, number: int) -> dict[str, Any]:
        region = self._regions[number]
        points = region_points(region, kind="mask")
        return request_of(GROUND, kind="mask", points=points, frame=0, attributes=self.attributes(region))

    def drawn(self, present: list[dict[str, Any]]) -> int | None:
        """Number of the shapes that it is said to have drawn; None: nobody knows."""
        shapes = reconstruct(cast(Detector, self), IMAGE, present, labels=[GROUND, HOUSE])
        return None if shapes is None else len(shapes)


@pytest.mark.parametrize(
    ("confidences", "sides", "left", "drawn"),
    [
        ((0.97, 0.35), (4, 4), (0,), None),  # the button, at 0.5: nobody has deleted anything
        ((0.97, 0.35), (4, 4), (0, 1), 2),
        ((0.97, 0.35), (4, 4), (1,), None),  # of one size: a limit of numbers
        ((0.97, 0.35), (5, 4), (1,), 2),  # neither less sure nor smaller: people have
        ((0.60, 0.97), (4, 3), (0,), None),  # a limit of sizes
        ((0.90, 0.60, 0.97), (5, 6, 4), (0,), None),  # both limits, one each
        ((0.90, 0.95, 0.60), (4, 5, 3), (0,), 3),
        ((0.90, 0.95), (5, 4), (), None),
    ],
)
def test_what_a_limit_may_have_left_out_is_not_called_deleted(
    confidences: tuple[float, ...], sides: tuple[int, ...], left: tuple[int, ...], drawn: int | None
) -> None:
    regions = [square(n, p, side=side) for n, (p, side) in enumerate(zip(confidences, sides, strict=True))]
    version = Version(regions)
    assert version.drawn([version.shape(number) for number in left]) == drawn


def test_shapes_that_people_changed_are_no_missing_ones() -> None:
    version = Version([square(0, 0.97), square(1, 0.35, side=5), square(2, 0.35, side=5)])
    cut = {**version.shape(1), "points": [0.0, 4.0, 8.0, 0.0, 11.0, 0.0]}
    labelled = {**version.shape(2), "label_id": HOUSE.id, "attributes": []}
    assert version.drawn([version.shape(0), cut, labelled]) == 3
    assert version.drawn([version.shape(0), cut, cut, labelled]) == 3  # cut in two
    assert version.drawn([version.shape(0), cut]) == 3  # the third one is as sure as the second
    assert version.drawn([version.shape(0), labelled]) == 3
    assert version.drawn([cut, labelled]) is None  # nothing is as it was
