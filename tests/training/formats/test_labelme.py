"""The LabelMe reader on archives written by hand: CVAT's export, the older dialect, and what must not be trusted."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sscloud.errors import ArchiveError
from training.formats import entry as limits
from training.formats import labelme
from training.formats.archive import ZipArchive
from training.formats.entry import Contents, Item, read_entry
from training.formats.labelme import list_entries
from training.rasterise import MaskShape, PolygonShape

SIZE = (64, 128)
BOX = ((10, 10), (20, 10), (20, 20), (10, 20))

Pack = Callable[[dict[str, str | bytes]], Path]


def jpeg(size_hw: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size_hw, 3), 90, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def mask_png(box_xyxy: tuple[int, int, int, int], size_hw: tuple[int, int] = SIZE, mode: str = "RGBA") -> bytes:
    x1, y1, x2, y2 = box_xyxy
    pixels = np.zeros((*size_hw, 4), np.uint8)
    pixels[y1:y2, x1:x2] = (0, 203, 255, 153)
    buffer = io.BytesIO()
    # Mode 1 is made of the blue channel, 0 or 255: the grey of the colour would be dithered.
    Image.fromarray(pixels if mode != "1" else pixels[..., 2]).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def polygon(*points: tuple[object, object], kind: str = "") -> str:
    listed = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in points)
    return f"{kind and f'<type>{kind}</type>'}<polygon>{listed}<username></username></polygon>"


def segm(name: str) -> str:
    return f"<segm><mask>{name}</mask><username></username></segm>"


def an_object(name: str, body: str, *, deleted: int = 0, attributes: str = "") -> str:
    return (
        f"<object><name>{name}</name><deleted>{deleted}</deleted><id>7</id>{body}"
        f"<attributes>{attributes}</attributes></object>"
    )


def annotation(filename: str, *objects: str, folder: str = "", size: str = "64x128") -> str:
    rows, columns = size.split("x") if size else ("", "")
    return (
        f"<annotation><filename>{filename}</filename><folder>{folder}</folder>"
        f"<imagesize><nrows>{rows}</nrows><ncols>{columns}</ncols></imagesize>{''.join(objects)}</annotation>"
    )


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    def write(members: dict[str, str | bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return tmp_path / "a.zip"

    return write


def contents_of(path: Path) -> Contents:
    with ZipArchive(path) as archive:
        return list_entries(archive)


def read_only(path: Path) -> Item:
    with ZipArchive(path) as archive:
        contents = list_entries(archive)
        if contents.broken:
            raise contents.broken[0]
        (entry,) = contents.entries
        return read_entry(archive, entry)


def read_objects(pack: Pack, *objects: str, **masks: bytes) -> Item:
    members: dict[str, str | bytes] = {"default/a.xml": annotation("a.jpg", *objects), "default/a.jpg": jpeg()}
    return read_only(pack(members | {f"default/Masks/{name}.png": data for name, data in masks.items()}))


# What CVAT writes


def test_an_export_of_cvat(pack: Pack) -> None:
    item = read_objects(
        pack,
        an_object("Земля", polygon(*BOX)),
        an_object("Здание", segm("m.png")),
        m=mask_png((30, 5, 40, 9)),
    )
    assert (item.size_hw, item.image) == (SIZE, jpeg())
    ground, building = item.shapes
    assert isinstance(ground, PolygonShape)
    assert ground.label == "Земля"
    assert ground.points.tolist() == [list(point) for point in BOX]
    assert isinstance(building, MaskShape)
    assert building.box_xyxy == (30, 5, 40, 9)
    assert building.mask.shape == (4, 10)
    assert building.mask.all()


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "L", "LA", "P", "1"])
def test_masks_of_every_mode(pack: Pack, mode: str) -> None:
    (shape,) = read_objects(pack, an_object("a", segm("m.png")), m=mask_png((3, 4, 6, 9), mode=mode)).shapes
    assert isinstance(shape, MaskShape)
    assert shape.box_xyxy == (3, 4, 6, 9)
    assert shape.mask.all()


def test_an_empty_mask(pack: Pack) -> None:
    (shape,) = read_objects(pack, an_object("a", segm("m.png")), m=mask_png((0, 0, 0, 0))).shapes
    assert isinstance(shape, MaskShape)
    assert shape.mask.size == 0


def test_deleted_objects_are_counted_and_left_out_even_without_their_mask(pack: Pack) -> None:
    xml = annotation("a.jpg", an_object("a", segm("gone.png"), deleted=1), an_object("b", polygon(*BOX)))
    path = pack({"a.xml": xml, "a.jpg": jpeg()})
    assert [entry.deleted for entry in contents_of(path).entries] == [1]
    assert [shape.label for shape in read_only(path).shapes] == ["b"]


def test_a_turned_rectangle(pack: Pack) -> None:
    body = polygon(*BOX, kind="bounding_box")
    item = read_objects(
        pack,
        an_object("a", body, attributes="model=, rotation=0.0"),
        an_object("a", body, attributes="note=rotation=9, rotation=45.0"),
    )
    straight, turned = item.shapes
    assert isinstance(straight, PolygonShape)
    assert isinstance(turned, PolygonShape)
    assert straight.points.tolist() == [list(point) for point in BOX]
    half = 50**0.5
    np.testing.assert_allclose(turned.points, [(15, 15 - half), (15 + half, 15), (15, 15 + half), (15 - half, 15)])


def test_a_frame_without_objects(pack: Pack) -> None:
    assert read_objects(pack).shapes == ()


def test_images_in_subfolders_have_their_masks_at_the_top_of_the_subset(pack: Pack) -> None:
    item = read_only(
        pack(
            {
                "train/yard/a.xml": annotation("a.jpg", an_object("a", segm("yard_a_mask_0.png")), folder="yard"),
                "train/yard/a.jpg": jpeg(),
                "train/Masks/yard_a_mask_0.png": mask_png((0, 0, 5, 5)),
            }
        )
    )
    assert len(item.shapes) == 1


def test_labels_are_known_before_anything_is_decoded(pack: Pack) -> None:
    xml = annotation("a.jpg", an_object("x", polygon(*BOX)), an_object("y", "", deleted=1), an_object(" z ", ""))
    (entry,) = contents_of(pack({"a.xml": xml, "a.jpg": b"not decoded"})).entries
    assert entry.labels == ("x", "z")


# The older dialect


@pytest.mark.parametrize(
    ("filename", "folder"),
    [
        ("somebody-elses.jpg", "Collection/users/ivan"),
        ("panorama.JPG", "../../home/ivan"),
        ("", ""),
        ("export.png", "C:\\scans"),
    ],
)
def test_one_xml_and_one_image_of_other_names_belong_together(pack: Pack, filename: str, folder: str) -> None:
    xml = annotation(filename, an_object("Земля", polygon(*BOX)), folder=folder, size="")
    path = pack({"скан 1.xml": xml, "image-000.jpg": jpeg()})
    assert [entry.name for entry in contents_of(path).entries] == ["image-000.jpg"]
    assert len(read_only(path).shapes) == 1


def test_the_xmls_own_name_wins_over_a_filename_that_points_to_another_image(pack: Pack) -> None:
    path = pack({"a.xml": annotation("b.jpg"), "a.jpg": jpeg(), "b.xml": annotation("b.jpg"), "b.jpg": jpeg()})
    assert [entry.image for entry in contents_of(path).entries] == ["a.jpg", "b.jpg"]


def test_filename_decides_between_images_of_the_xmls_name(pack: Pack) -> None:
    contents = contents_of(pack({"a.xml": annotation("a.png"), "a.jpg": jpeg(), "a.png": mask_png((0, 0, 1, 1))}))
    assert contents.entries[0].image == "a.png"
    assert contents.without_annotations == ("a.jpg",)


def test_case_of_names_does_not_matter(pack: Pack) -> None:
    assert contents_of(pack({"A.XML": annotation("a.jpg"), "A.JPG": jpeg()})).entries[0].image == "A.JPG"


def test_names_that_differ_in_case_only_stay_apart(pack: Pack) -> None:
    path = pack({"A.xml": annotation("A.jpg"), "A.jpg": jpeg(), "a.xml": annotation("a.jpg"), "a.jpg": jpeg()})
    assert [entry.image for entry in contents_of(path).entries] == ["A.jpg", "a.jpg"]


def test_two_images_that_could_be_it_are_not_guessed(pack: Pack) -> None:
    path = pack({"x.xml": annotation("gone.jpg"), "a.jpg": jpeg(), "b.jpg": jpeg()})
    with pytest.raises(ArchiveError, match=r"x\.xml: its image 'gone\.jpg' is not in the archive.*'Save images'"):
        read_only(path)
    assert contents_of(path).without_annotations == ("a.jpg", "b.jpg")


def test_an_image_that_two_files_claim_is_reported(pack: Pack) -> None:
    contents = contents_of(pack({"x.xml": annotation("a.jpg"), "y.xml": annotation("a.jpg"), "a.jpg": jpeg()}))
    assert [str(error) for error in contents.broken] == [
        "y.xml and x.xml both belong to a.jpg. Leave one of them in the archive."
    ]


# Hostile and broken input


@pytest.mark.parametrize("reference", ["../../etc/passwd.png", "/etc/passwd", "C:\\Windows\\a.png", "..\\a.png"])
def test_references_out_of_the_archive_are_refused(pack: Pack, reference: str) -> None:
    with pytest.raises(ArchiveError, match=r"default/a\.xml, object 7 \(a\): the mask .* (absolute path|leads out)"):
        read_objects(pack, an_object("a", segm(reference)))
    with pytest.raises(ArchiveError, match=r"x\.xml: the filename .* (absolute path|leads out)"):
        read_only(pack({"x.xml": annotation(reference), "x.jpg": jpeg()}))


BILLION_LAUGHS = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>
<annotation><filename>&b;</filename></annotation>"""
OUTSIDE_ENTITY = (
    """<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><filename>&e;</filename></annotation>"""
)


@pytest.mark.parametrize("xml", [BILLION_LAUGHS, OUTSIDE_ENTITY])
def test_entities_are_refused(pack: Pack, xml: str) -> None:
    with pytest.raises(ArchiveError, match=r"a\.xml declares a document type or entities"):
        read_only(pack({"a.xml": xml, "a.jpg": jpeg()}))


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"", r"a\.xml is not well-formed XML"),
        (b"<annotation><filename>", r"a\.xml is not well-formed XML"),
        (b"\xff\xfe\x00", r"a\.xml is not well-formed XML"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', r"a\.xml is not well-formed XML"),
        (b"<html/>", r"a\.xml starts with <html>, a LabelMe file with <annotation>"),
    ],
)
def test_broken_xml_is_named(pack: Pack, xml: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        read_only(pack({"a.xml": xml, "a.jpg": jpeg()}))


def test_xml_in_another_encoding_is_read(pack: Pack) -> None:
    text = '<?xml version="1.0" encoding="windows-1251"?>' + annotation("a.jpg", an_object("Земля", polygon(*BOX)))
    assert read_only(pack({"a.xml": text.encode("cp1251"), "a.jpg": jpeg()})).shapes[0].label == "Земля"


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((1, 1), (2, 2)), "a polygon of 2 points encloses nothing"),
        ((), "a polygon of 0 points encloses nothing"),
        (((1, 1), (2, "nan"), (3, 3)), "not a finite number"),
        (((1, 1), (2, "inf"), (3, 3)), "not a finite number"),
        (((1, 1), (2, "two"), (3, 3)), "could not convert string to float: 'two'"),
        (((1, 1), (2, ""), (3, 3)), "could not convert string to float"),
        (((1, 1), (2, 1e30), (3, 3)), "far outside the image of 128x64"),
    ],
)
def test_polygons_that_cannot_be_filled(pack: Pack, points: tuple[tuple[object, object], ...], message: str) -> None:
    with pytest.raises(ArchiveError, match=rf"default/a\.xml, object 7 \(Земля\): .*{message}.*Correct or delete"):
        read_objects(pack, an_object("Земля", polygon(*points)))


def test_a_rotation_that_is_no_number(pack: Pack) -> None:
    body = polygon(*BOX, kind="bounding_box")
    with pytest.raises(ArchiveError, match="the rotation nan is not a finite number"):
        read_objects(pack, an_object("a", body, attributes="rotation=nan"))


def test_a_missing_mask(pack: Pack) -> None:
    with pytest.raises(ArchiveError, match=r"object 7 \(Земля\): its mask Masks/m\.png is not in the archive"):
        read_objects(pack, an_object("Земля", segm("m.png")))
    with pytest.raises(ArchiveError, match="its mask Masks/ is not in the archive"):
        read_objects(pack, an_object("Земля", segm("")))


def test_a_mask_of_another_size(pack: Pack) -> None:
    with pytest.raises(ArchiveError, match=r"default/Masks/m\.png has 64x32 pixels, its image 128x64"):
        read_objects(pack, an_object("a", segm("m.png")), m=mask_png((0, 0, 1, 1), (32, 64)))


def test_a_mask_that_is_a_bomb_is_not_decoded(pack: Pack) -> None:
    bomb = bytearray(mask_png((0, 0, 1, 1)))
    bomb[16:24] = (60000).to_bytes(4) + (60000).to_bytes(4)
    with pytest.raises(ArchiveError, match=r"m\.png"):
        read_objects(pack, an_object("a", segm("m.png")), m=bytes(bomb))


@pytest.mark.parametrize("data", [b"", b"not a png", mask_png((0, 0, 50, 50))[:150], jpeg()])
def test_a_broken_mask(pack: Pack, data: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"default/Masks/m\.png is not a readable PNG mask"):
        read_objects(pack, an_object("a", segm("m.png")), m=data)


@pytest.mark.parametrize("data", [b"", b"not a jpeg", jpeg()[:300]])
def test_a_broken_image(pack: Pack, data: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"^a\.jpg: "):
        read_only(pack({"a.xml": annotation("a.jpg"), "a.jpg": data}))


def test_an_image_of_another_size_than_the_one_annotated(pack: Pack) -> None:
    path = pack({"a.xml": annotation("a.jpg", size="32x64"), "a.jpg": jpeg()})
    with pytest.raises(ArchiveError, match=r"a\.xml was drawn on an image of 64x32 pixels, a\.jpg has 128x64"):
        read_only(path)


def test_objects_of_other_formats(pack: Pack) -> None:
    with pytest.raises(ArchiveError, match="has neither a polygon nor a mask, it holds <name>"):
        read_objects(pack, an_object("a", ""))
    with pytest.raises(ArchiveError, match="this is Pascal VOC"):
        read_objects(pack, an_object("a", "<bndbox><xmin>1</xmin></bndbox>"))


def test_counts_and_sizes_are_bounded(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = an_object("a", segm("m.png"))
    monkeypatch.setattr(limits, "MAX_MASK_PIXELS", 150)
    with pytest.raises(ArchiveError, match="the boxes of its masks hold over 150 pixels"):
        read_objects(pack, mask, mask, m=mask_png((0, 0, 10, 10)))
    monkeypatch.setattr(limits, "MAX_OBJECTS", 1)
    with pytest.raises(ArchiveError, match="lists 2 objects, at most 1 are read"):
        read_objects(pack, mask, mask, m=mask_png((0, 0, 10, 10)))
    monkeypatch.setattr(labelme, "MAX_XML_BYTES", 100)
    with pytest.raises(ArchiveError, match=r"default/a\.xml has \d+ bytes, at most 100 are read"):
        read_objects(pack)


def test_a_broken_member_does_not_take_the_others_along(pack: Pack) -> None:
    path = pack({"a.xml": b"<annotation>", "a.jpg": jpeg(), "b.xml": annotation("b.jpg"), "b.jpg": jpeg()})
    contents = contents_of(path)
    assert [entry.annotations for entry in contents.entries] == ["b.xml"]
    assert len(contents.broken) == 1
