"""A bundle as cvat-sdk's detection function: the same regions as the served function, in cvat-sdk's terms."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import numpy as np
import pytest
from cvat_sdk.masks import decode_mask, encode_mask
from numpy.typing import NDArray
from PIL import Image

from serverless.model_handler import ModelHandler
from serverless.settings import Settings
from sscloud.bundle import ModelBundle
from sscloud.errors import BundleError, ConfigError, ImageError
from sscloud.image import decode_image
from sscloud.regions import find_regions
from sscloud.stages import Stages
from training.detector import Detector, create, region_points, to_pixels
from training.rasterise import PolygonShape, rasterise

SIZE_HW = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Context(cvataa.DetectionFunctionContext):  # type: ignore[misc]  # cvat-sdk carries no types
    """What cvat-sdk tells a function about an image."""

    frame_name: str = "a.png"
    conf_threshold: float | None = None
    conv_mask_to_poly: bool = False


@pytest.fixture(scope="module")
def detector(tiny_bundle: ModelBundle) -> Detector:
    return create(str(tiny_bundle.path), device="cpu", min_area=4, max_regions=50)


@pytest.fixture(scope="module")
def panorama(make_panorama: Callable[..., NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return make_panorama(SIZE_HW, seed=4)


def test_the_spec_is_one_that_cvat_sdk_takes(detector: Detector) -> None:
    spec = detector.spec
    assert isinstance(spec, cvataa.DetectionFunctionSpec)
    assert [label.name for label in spec.labels] == ["Земля", "Растительность", "Здание", "Конструкции", "Обстановка"]
    for label in spec.labels:
        assert str(label.type) == "mask"
        assert [(a.name, str(a.input_type), a.id) for a in label.attributes] == [
            ("model", "text", 0),
            ("confidence", "text", 1),
        ]


@pytest.mark.parametrize("threshold", [None, 0.5, 0.9])
def test_regions_are_those_of_the_served_function(
    detector: Detector, tiny_bundle: ModelBundle, panorama: NDArray[np.uint8], threshold: float | None
) -> None:
    stream = io.BytesIO()
    Image.fromarray(panorama).save(stream, "PNG")
    handler = ModelHandler(tiny_bundle.path, Settings(device="cpu", min_area=4, max_regions=50))
    served = json.loads(handler.annotate(stream.getvalue(), threshold=threshold or 0, stages=Stages()).body)
    shapes = detector.detect(Context(conf_threshold=threshold), Image.open(stream))
    names = {label.id: label.name for label in detector.labels}
    assert len(shapes) == len(served) > 0
    for shape, item in zip(shapes, served, strict=True):
        *pixels, left, top, right, bottom = item["mask"]
        bitmap = np.zeros(SIZE_HW, np.bool_)
        bitmap[top : bottom + 1, left : right + 1] = np.array(pixels, np.bool_).reshape(bottom - top + 1, -1)
        assert shape.points == encode_mask(bitmap)
        assert names[shape.label_id] == item["label"]
        values = [value.value for value in shape.attributes]
        assert values == [attribute["value"] for attribute in item["attributes"]]
        assert (shape.frame, shape.type.value, hasattr(shape, "source"), hasattr(shape, "id")) == (
            0,
            "mask",
            False,
            False,
        )


def test_polygons_on_demand(detector: Detector, panorama: NDArray[np.uint8]) -> None:
    image = Image.fromarray(panorama)
    masks = detector.detect(Context(), image)
    polygons = detector.detect(Context(conv_mask_to_poly=True), image)
    assert len(masks) == len(polygons) > 0
    for mask, polygon in zip(masks, polygons, strict=True):
        assert polygon.type.value == "polygon"
        shape = PolygonShape(label="", points=np.reshape(polygon.points, (-1, 2)))
        filled = rasterise([shape], size_hw=SIZE_HW, label_id_of=lambda _: 1, fill=0).label_map
        assert np.array_equal(filled, decode_mask(mask.points, image_width=128, image_height=64))


@pytest.mark.parametrize(
    ("art", "expected"),
    [
        ("#", [0, 1, 3, 2, 3, 2]),
        ("## ##", [0, 4, 3, 2, 4, 3]),
        (".## ###", [1, 5, 3, 2, 5, 3]),
        ("##. .##", [0, 2, 2, 2, 3, 2, 5, 3]),
        ("### #.. ###", [0, 4, 2, 3, 3, 2, 5, 4]),
        (".#. ###", [1, 1, 1, 3, 3, 2, 5, 3]),
        ("### .#.", [0, 3, 1, 1, 1, 3, 2, 5, 3]),
    ],
)
def test_a_mask_is_encoded_in_its_box(art: str, expected: list[int]) -> None:
    rows = np.array([[c == "#" for c in line] for line in art.split()])
    label_map = np.zeros((20, 20), np.uint8)
    label_map[2 : 2 + rows.shape[0], 3 : 3 + rows.shape[1]] = rows * 2
    (region,) = find_regions(label_map, background_ids=(0,)).regions
    assert region_points(region, kind="mask") == expected == encode_mask(label_map == 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_read_as_their_files_are(mode: str) -> None:
    seed = np.random.default_rng(1)
    if mode == "I;16":
        picture = Image.fromarray(seed.integers(0, 65536, (8, 16), dtype=np.uint16))
    else:
        picture = Image.fromarray(seed.integers(0, 256, (8, 16, 3), dtype=np.uint8)).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(to_pixels(Image.open(stream)), decode_image(stream.getvalue()))


def test_a_turned_picture_is_turned_upright() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    picture, stream = Image.fromarray(pixels), io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(stream, "PNG", exif=exif)
    assert to_pixels(Image.open(stream)).shape == (16, 8, 3)
    assert np.array_equal(to_pixels(Image.open(stream)), decode_image(stream.getvalue()))


def test_what_cannot_be_used(detector: Detector, tiny_bundle: ModelBundle, tmp_path: Any) -> None:
    with pytest.raises(ImageError, match="too small for this model"):
        detector.detect(Context(), Image.new("RGB", (8, 8)))
    with pytest.raises(BundleError, match="is no bundle"):
        create(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be used here"):
        create(str(tiny_bundle.path), device="cuda:99")
