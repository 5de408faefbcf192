"""What kind of export an archive is, told by the names of its members and by how its XML or JSON begins."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

from training.formats.archive import ZipArchive
from training.formats.coco import is_annotations
from training.formats.entry import base_name

CVAT_IMAGES: Final = "CVAT for images 1.1"
LABELME: Final = "LabelMe 3.0"
SEGMENTATION_MASK: Final = "Segmentation mask 1.1"
COCO: Final = "COCO 1.0"
DATUMARO: Final = "Datumaro 1.0"
CAMVID: Final = "CamVid 1.0"
CITYSCAPES: Final = "Cityscapes 1.0"

_BEGINNING = 1 << 16
_PEEKED = 20

_FOLDER_SIGNS: tuple[tuple[str, str], ...] = (
    # The first pattern that any member matches names the layout: special signs before general ones.
    ("a CVAT task or project backup", r"(.*/)?(task|project|manifest)\.jsonl?"),
    (SEGMENTATION_MASK, r"(.*/)?(labelmap\.txt|SegmentationClass/.+\.png)"),
    (CITYSCAPES, r"(.*/)?gtFine/.+"),
    (CAMVID, r"(.*/)?label_colors\.txt"),
)

_JSON_SIGNS: tuple[tuple[str, bytes], ...] = (
    (DATUMARO, rb'"dm_format_version"\s*:|"categories"\s*:\s*\{|"items"\s*:\s*\['),
    (COCO, rb'"(categories|images|annotations|licenses)"\s*:\s*\['),
)

_LAST_SIGNS: tuple[tuple[str, str], ...] = (
    ("Pascal VOC 1.1", r"(.*/)?(ImageSets|JPEGImages)/.+"),
    ("YOLO", r"(.*/)?(obj\.data|obj\.names|data\.yaml|labels/.+\.txt)"),
    ("COCO Keypoints 1.0", r"(.*/)?person_keypoints[^/]*\.json"),
    (LABELME, r".+\.xml"),
)


def recognise(archive: ZipArchive) -> str | None:
    """The export format as CVAT's list of formats names it, or None when it looks like none of them.

    Raises:
        ArchiveError: the member that would tell is damaged.
    """
    names = sorted(archive.members)
    xmls = [name for name in names if PurePosixPath(name).suffix.lower() == ".xml"]
    telling = next((name for name in xmls if base_name(name).casefold() == "annotations.xml"), next(iter(xmls), None))
    if telling is not None and re.search(rb"<annotations[\s>]", archive.peek(telling, _BEGINNING)):
        return CVAT_IMAGES
    return _first(names, _FOLDER_SIGNS) or _json_layout(archive, names) or _first(names, _LAST_SIGNS)


def _json_layout(archive: ZipArchive, names: Iterable[str]) -> str | None:
    for name in [name for name in names if is_annotations(name)][:_PEEKED]:
        beginning = archive.peek(name, _BEGINNING)
        for layout, sign in _JSON_SIGNS:
            if re.search(sign, beginning):
                return layout
    return None


def _first(names: Iterable[str], signs: Iterable[tuple[str, str]]) -> str | None:
    names = list(names)
    for layout, pattern in signs:
        sign = re.compile(pattern, re.IGNORECASE)
        if any(sign.fullmatch(name) for name in names):
            return layout
    return None
