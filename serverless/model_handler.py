"""ModelHandler: owns the bundle and the predictor, and makes the answer that CVAT reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sscloud.budget import within_budget
from sscloud.bundle import ModelBundle
from sscloud.inference import Predictor
from sscloud.outlines import outlines, points_json
from sscloud.regions import find_regions, smallest_region
from sscloud.shapes import Drawing, answer_json
from sscloud.stages import Stages
from sscloud.volume import Published, run_check

if TYPE_CHECKING:
    from serverless.settings import Settings


MAX_POINTS = 2_000_000
"""Numbers in the outlines of all masks of one answer: a tenth of what the default budget spends on their pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one image."""

    body: str
    """JSON list with one object a region, ASCII."""
    size_hw: tuple[int, int]
    """Size of the image."""
    regions: int
    """Objects in the list."""
    notes: dict[str, int]
    """What was left out or sent in another form → how often; only what happened."""


class ModelHandler:
    """Image bytes → the answer's JSON.

    Args:
        bundle_path: the bundle's folder.
        settings: of the function.

    Raises:
        BundleError: the bundle is missing, damaged, or does not fit.
        ConfigError: the device does not exist, or cannot compute in the precision.
    """

    def __init__(self, bundle_path: Path, settings: "Settings") -> None:
        bundle = ModelBundle.load(bundle_path)
        self.manifest = bundle.manifest
        self._settings = settings
        self._min_area = smallest_region(self.manifest.scale) if settings.min_area is None else settings.min_area
        self._predictor = Predictor(
            bundle, device=settings.device, precision=settings.precision, backend=settings.backend
        )
        self._predictor.warm_up()
        # What the spec declares is sent; everything else (background, void) is not.
        self._names = {label.id: label.name for label in self.manifest.labels.classes if not label.background}
        self._background_ids = frozenset(range(256)) - self._names.keys()

    def describe(self) -> str:
        """Library, device and precision that the network runs with, for a log."""
        return self._predictor.describe()

    def check(self, published: Published) -> None:
        """Segment the test panorama that a version was published with.

        Raises:
            BundleError: the result is not the expected one.
        """
        run_check(published, self._predictor)

    def annotate(self, image: bytes, *, threshold: float, stages: Stages) -> Answer:
        """Segment an encoded picture.

        Args:
            image: the file's bytes.
            threshold: pixels with a probability below it (0 to 1) are not sent.
            stages: told how long every stage takes.

        Raises:
            ImageError: the picture cannot be decoded, is too large, or too small for the model.
        """
        settings = self._settings
        segmentation = self._predictor.predict(
            image, max_pixels=settings.max_pixels, draft=settings.decode == "draft", stages=stages
        )
        size_hw = (segmentation.class_map.shape[0], segmentation.class_map.shape[1])
        with stages("regions"):
            found = find_regions(
                segmentation.label_map,
                segmentation.confidence,
                background_ids=self._background_ids,
                threshold=threshold,
                min_area=self._min_area,
                max_regions=settings.max_regions,
            )
            del segmentation
            fit = within_budget(found.regions, max_crop_area=settings.budget)
        with stages("answer"):
            regions = sorted([*fit.masks, *fit.polygons], key=lambda region: -region.area)
            polygons = {id(region) for region in (regions if settings.shapes == "polygon" else fit.polygons)}
            rings = outlines(regions, size_hw, tolerance=settings.tolerance)
            points = points_json(rings)
            bare = _too_ragged([ring.size for ring in rings], may=[id(region) not in polygons for region in regions])
            body = answer_json(
                [
                    Drawing(
                        region=region,
                        label=self._names[region.label_id],
                        points="" if number in bare else text,
                        as_polygon=id(region) in polygons,
                    )
                    for number, (region, text) in enumerate(zip(regions, points, strict=True))
                ],
                model=self.manifest.title,
            )
        notes = {
            "specks_left_out": found.specks,
            "regions_beyond_limit_left_out": found.surplus,
            "regions_split": fit.splits,
            "masks_as_polygons": len(fit.polygons) if settings.shapes == "mask" else 0,
            "masks_without_outline": len(bare),
        }
        return Answer(
            body=body,
            size_hw=size_hw,
            regions=len(regions),
            notes={name: count for name, count in notes.items() if count},
        )


def _too_ragged(sizes: Sequence[int], *, may: Sequence[bool]) -> set[int]:
    """Masks that go without an outline, the longest ones first, so that the others keep to `MAX_POINTS`.

    Args:
        sizes: numbers in each outline.
        may: whether that object may go without.
    """
    left = sum(sizes)
    chosen = set()
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        if left <= MAX_POINTS:
            break
        if may[number]:
            chosen.add(number)
            left -= sizes[number]
    return chosen
