"""What kind of export an archive is, told by the names of its members."""

import re
from collections.abc import Iterable

LABELME = "LabelMe 3.0"

_SIGNS: tuple[tuple[str, str], ...] = (
    # The first pattern that any member matches names the layout: special signs before general ones.
    ("CVAT for images 1.1 (or CVAT for video)", r"(.*/)?annotations\.xml"),
    ("a CVAT task or project backup", r"(.*/)?(task|project|manifest)\.json(l)?"),
    ("COCO 1.0", r"(.*/)?annotations/(instances|person_keypoints|captions|panoptic)[^/]*\.json"),
    ("Datumaro 1.0", r"(.*/)?annotations/[^/]+\.json"),
    ("Segmentation mask 1.1", r"(.*/)?(labelmap\.txt|SegmentationClass/.+)"),
    ("Cityscapes 1.0", r"(.*/)?gtFine/.+"),
    ("CamVid 1.0", r"(.*/)?label_colors\.txt"),
    ("Pascal VOC 1.1", r"(.*/)?(ImageSets|JPEGImages)/.+"),
    ("YOLO", r"(.*/)?(obj\.data|obj\.names|data\.yaml|labels/.+\.txt)"),
    (LABELME, r".+\.xml"),
)


def recognise(names: Iterable[str]) -> str | None:
    """The export format as CVAT's list of formats names it, or None when the members look like none of them."""
    lower = [name.casefold() for name in names]
    for layout, pattern in _SIGNS:
        sign = re.compile(pattern, re.IGNORECASE)
        if any(sign.fullmatch(name) for name in lower):
            return layout
    return None
