"""A bundle as a detection function of `cvat_sdk.auto_annotation`; the pixels never leave this machine.

`sscloud prelabel --via local` uses it, and cvat-cli takes this file as it is:

    cvat-cli task auto-annotate 12 --function-file training/detector.py -p bundle=str:bundles/street-v3 \
        --allow-unmatched-labels
"""

import io
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import numpy as np
from cvat_sdk import models
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sscloud.bundle import ModelBundle
from sscloud.image import decode_image
from sscloud.inference import Predictor
from sscloud.outlines import outline
from sscloud.regions import MAX_REGIONS, Region, find_regions, smallest_region
from sscloud.shapes import ATTRIBUTES


class Detector:
    """A bundle's network as cvat-sdk calls it: `spec` and `detect`. Takes one image at a time.

    Args:
        bundle: a loaded bundle.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        min_area: smallest region, pixels; None for one pixel of the model's scale.
        max_regions: most regions of one image, the largest first.

    Raises:
        BundleError: the weights do not fit.
        ConfigError: the device does not exist here.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        device: str = "auto",
        min_area: int | None = None,
        max_regions: int = MAX_REGIONS,
    ) -> None:
        self.manifest = bundle.manifest
        self.labels = tuple(label for label in bundle.manifest.labels.classes if not label.background)
        """What regions are made of; background and void are not sent."""
        self._min_area = smallest_region(self.manifest.scale) if min_area is None else min_area
        self._max_regions = max_regions
        self._background_ids = frozenset(range(256)) - {label.id for label in self.labels}
        self._predictor = Predictor(bundle, device=device)

    def settings(self, *, threshold: float) -> str:
        """What decides, beside the image, which regions are found: the weights and the limits.

        The precision is none of it: what it moves, a pixel in thousands, is not worth drawing a frame again.
        """
        return (
            f"weights {self.manifest.weights_sha256[:16]}, threshold {threshold:g}, min area {self._min_area}, "
            f"at most {self._max_regions}"
        )

    @property
    def spec(self) -> Any:
        """The `DetectionFunctionSpec`: masks of every label, with the model and its confidence as text attributes."""
        return cvataa.DetectionFunctionSpec(
            labels=[
                cvataa.label_spec(
                    label.name,
                    label.id,
                    type="mask",
                    attributes=[cvataa.text_attribute_spec(name, number) for number, name in enumerate(ATTRIBUTES)],
                )
                for label in self.labels
            ]
        )

    def detect(self, context: Any, image: Image.Image) -> list[models.LabeledShapeRequest]:
        """Shapes of one image; `context` is a `DetectionFunctionContext`.

        Raises:
            ImageError: the image is too large, or too small for the model.
        """
        kind = "polygon" if context.conv_mask_to_poly else "mask"
        return [
            # Unchecked: the check looks at every single number of a mask, for seconds.
            models.LabeledShapeRequest(
                type=models.ShapeType(kind),
                label_id=region.label_id,
                frame=0,
                points=region_points(region, kind=kind),
                attributes=[
                    models.AttributeValRequest(spec_id=ATTRIBUTES.index(name), value=value)
                    for name, value in self.attributes(region).items()
                ],
                _check_type=False,
            )
            for region in self.regions(to_pixels(image), threshold=context.conf_threshold or 0.0)
        ]

    def regions(self, image: NDArray[np.uint8], *, threshold: float) -> list[Region]:
        """Regions of a (H, W, 3) uint8 RGB image, the largest first, as the served function sends them.

        Args:
            image: the image.
            threshold: pixels with a probability below it (0 to 1) belong to no region.

        Raises:
            ImageError: the image is too small for the model.
        """
        segmentation = self._predictor.predict(image)
        return find_regions(
            segmentation.label_map,
            segmentation.confidence,
            background_ids=self._background_ids,
            threshold=threshold,
            min_area=self._min_area,
            max_regions=self._max_regions,
        ).regions

    def attributes(self, region: Region) -> dict[str, str]:
        """Attribute name → value: which model drew the region, and how sure it was."""
        return dict(zip(ATTRIBUTES, (self.manifest.title, f"{region.confidence:.2f}"), strict=True))


def create(bundle: str, device: str = "auto", min_area: int | None = None, max_regions: int = MAX_REGIONS) -> Detector:
    """What cvat-cli calls, with the values of its `-p NAME=TYPE:VALUE`; see `Detector`.

    Raises:
        BundleError: the bundle is missing, damaged, or does not fit.
        ConfigError: the device does not exist here.
    """
    return Detector(ModelBundle.load(Path(bundle)), device=device, min_area=min_area, max_regions=max_regions)


def region_points(region: Region, *, kind: str) -> list[float]:
    """A region as the `points` of a CVAT shape.

    Args:
        region: what was found.
        kind: `mask` for run lengths and inclusive box, `polygon` for an outline on pixel edges.
    """
    return [float(value) for value in outline(region)] if kind == "polygon" else _mask_points(region)


def _mask_points(region: Region) -> list[float]:
    """Run lengths of its box, row by row, zeros first; then the inclusive box (as `cvat_sdk.masks.encode_mask`)."""
    left, top, right, bottom = region.box_xyxy
    height, width = region.crop_hw
    begin, end = region.crop_runs()
    ends_here = np.append(begin[1:] != end[:-1], True)
    begins_here = np.append(True, ends_here[:-1])
    edges = np.empty(2 * np.count_nonzero(ends_here), np.int64)
    edges[0::2], edges[1::2] = begin[begins_here], end[ends_here]
    runs = np.diff(edges, prepend=0, append=height * width)
    runs = runs if runs[-1] else runs[:-1]
    return [*runs.astype(float).tolist(), float(left), float(top), float(right - 1), float(bottom - 1)]


def to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """An opened picture → (H, W, 3) uint8 RGB by the rules of `sscloud.image.decode_image`.

    Raises:
        ImageError: more pixels than are read.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGB":
        return np.array(upright)
    stream = io.BytesIO()
    upright.save(stream, "TIFF")  # keeps every mode, and costs no compression
    return decode_image(stream.getvalue())
