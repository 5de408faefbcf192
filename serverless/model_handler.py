"""ModelHandler: owns the bundle and the predictor, and writes the answer that CVAT reads."""

import json
from dataclasses import dataclass
from pathlib import Path

from sscloud.bundle import ModelBundle
from sscloud.inference import Predictor
from sscloud.shapes import Region, find_regions, mask_json, outline, smallest_region


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one image."""

    body: str
    """JSON list with one object a region, ASCII."""
    size_hw: tuple[int, int]
    """Size of the image."""
    regions: int
    """Objects in the list."""
    specks: int
    """Regions left out because they are smaller than the minimum area."""
    surplus: int
    """Regions left out because there were more than the limit."""


class ModelHandler:
    """Image bytes → the answer's JSON.

    Args:
        bundle_path: the bundle's folder.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        min_area: smallest region that is sent, pixels; None for one pixel of the model's scale.
        max_regions: most regions in one answer, the largest first.

    Raises:
        BundleError: the bundle is missing, damaged, or does not fit.
        ConfigError: the device does not exist.
    """

    def __init__(self, bundle_path: Path, *, device: str, min_area: int | None, max_regions: int) -> None:
        bundle = ModelBundle.load(bundle_path)
        self.manifest = bundle.manifest
        self.min_area = smallest_region(self.manifest.scale) if min_area is None else min_area
        self.max_regions = max_regions
        self._predictor = Predictor(bundle, device=device)
        self._predictor.warm_up()
        # What the spec declares is sent; everything else (background, void) is not.
        self._names = {
            label.id: json.dumps(label.name) for label in self.manifest.labels.classes if not label.background
        }
        self._background_ids = frozenset(range(256)) - self._names.keys()

    def annotate(self, image: bytes, *, threshold: float) -> Answer:
        """Segment an encoded picture.

        Args:
            image: the file's bytes.
            threshold: pixels with a probability below it (0 to 1) are not sent.

        Raises:
            ImageError: the picture cannot be decoded, is too large, or too small for the model.
        """
        segmentation = self._predictor.predict(image)
        found = find_regions(
            segmentation.label_map,
            segmentation.confidence,
            background_ids=self._background_ids,
            threshold=threshold,
            min_area=self.min_area,
            max_regions=self.max_regions,
        )
        model = json.dumps(self.manifest.title)
        return Answer(
            body="[" + ",".join(_item(region, self._names[region.label_id], model) for region in found.regions) + "]",
            size_hw=(segmentation.class_map.shape[0], segmentation.class_map.shape[1]),
            regions=len(found.regions),
            specks=found.specks,
            surplus=found.surplus,
        )


def _item(region: Region, label: str, model: str) -> str:
    """One object of the answer; `label` and `model` are JSON texts.

    Joined by hand: json.dumps needs a Python integer for every one of the tens of millions of mask pixels.
    """
    left, top, right, bottom = region.box_xyxy
    points = ",".join(map(str, outline(region.mask, offset_xy=(left, top))))
    confidence = f'"{region.confidence:.2f}"'
    return (
        f'{{"label":{label},"type":"mask","mask":[{mask_json(region.mask)},{left},{top},{right - 1},{bottom - 1}],'
        f'"points":[{points}],"confidence":{confidence},"attributes":'
        f'[{{"name":"model","value":{model}}},{{"name":"confidence","value":{confidence}}}]}}'
    )
