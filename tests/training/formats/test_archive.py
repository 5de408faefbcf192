"""Zip archives as hostile input, and the export formats told apart."""

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from sscloud.errors import ArchiveError
from training.formats import archive as module
from training.formats.archive import ZipArchive, unsafe_path
from training.formats.layout import recognise


def write(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.zip"


def test_members_are_read_back(path: Path) -> None:
    with ZipArchive(write(path, {"default/а.xml": b"<a/>", "default/": b"", "__MACOSX/._b.xml": b"x"})) as archive:
        assert list(archive.members) == ["default/а.xml"]
        assert archive.read("default/а.xml") == b"<a/>"


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"a\.zip does not exist"):
        ZipArchive(path)


@pytest.mark.parametrize("data", [b"", b"Rar!\x1a\x07\x00", b"PK\x03\x04 but no more"])
def test_what_is_no_zip_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="is not a complete zip archive"):
        ZipArchive(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be read"):
        ZipArchive(tmp_path)


def test_a_truncated_zip_is_refused(path: Path) -> None:
    data = write(path, {"a.xml": bytes(1000)}, zipfile.ZIP_STORED).read_bytes()
    path.write_bytes(data[:-40])
    with pytest.raises(ArchiveError, match="is not a complete zip archive"):
        ZipArchive(path)


def test_damaged_bytes_are_noticed(path: Path) -> None:
    data = bytearray(write(path, {"a.xml": b"0123456789" * 100}, zipfile.ZIP_STORED).read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    with ZipArchive(path) as archive, pytest.raises(ArchiveError, match=r"a\.xml cannot be unpacked .*CRC"):
        archive.read("a.xml")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../evil.xml", "leads out of the archive"),
        ("default/../../evil.xml", "leads out of the archive"),
        ("..\\evil.xml", "leads out of the archive"),
        ("/etc/passwd", "is an absolute path"),
        ("C:\\Windows\\evil.xml", "is an absolute path"),
        ("c:evil.xml", "is an absolute path"),
        ("\\\\server\\share\\evil.xml", "is an absolute path"),
        ("a\nb.xml", "holds control characters"),
    ],
)
def test_names_that_lead_out_are_refused(path: Path, name: str, problem: str) -> None:
    assert unsafe_path(name) is not None
    with pytest.raises(ArchiveError, match=problem):
        ZipArchive(write(path, {name: b"x"}))


@pytest.mark.parametrize("name", ["default/a.xml", "a..b.jpg", "съёмка 1/скан.jpg", "Masks/a_mask_0.png"])
def test_ordinary_names_are_fine(name: str) -> None:
    assert unsafe_path(name) is None


def test_links_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("default/a.jpg")
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match=r"default/a\.jpg is a symbolic link"):
        ZipArchive(path)


def test_encrypted_members_are_refused(path: Path) -> None:
    data = bytearray(write(path, {"a.xml": b"x"}, zipfile.ZIP_STORED).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"a\.xml is encrypted\. Pack the archive without a password"):
        ZipArchive(path)


def test_rare_compression_is_refused(path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"compressed by method 12; stored and deflated members are read"):
        ZipArchive(write(path, {"a.xml": b"x" * 100}, zipfile.ZIP_BZIP2))


def test_a_bomb_is_refused_before_it_is_unpacked(path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"a\.xml unpacks to \d+ times its size: a decompression bomb"):
        ZipArchive(write(path, {"a.xml": bytes(module.RATIO_FLOOR_BYTES + 1)}))


def test_a_bomb_in_many_parts_is_refused(path: Path) -> None:
    part = bytes(module.RATIO_FLOOR_BYTES // 4)
    with pytest.raises(ArchiveError, match=r"a\.zip unpacks to \d+ times its size: a decompression bomb"):
        ZipArchive(write(path, {f"{i}.xml": part for i in range(5)}))


def test_a_header_that_lies_about_the_size_gives_no_more_than_it_said(path: Path) -> None:
    data = bytearray(write(path, {"a.xml": bytes(4 << 20)}).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(signature) + offset
        data[start : start + 4] = struct.pack("<I", 10)
    path.write_bytes(data)
    with ZipArchive(path) as archive, pytest.raises(ArchiveError, match=r"a\.xml cannot be unpacked"):
        archive.read("a.xml")


def test_total_and_member_sizes_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, {"a.xml": bytes(600), "b.xml": bytes(600)})
    with pytest.raises(ArchiveError, match="unpacks to 1200 bytes, at most 1000 are read"):
        ZipArchive(path, max_total_bytes=1000)
    with ZipArchive(path) as archive, pytest.raises(ArchiveError, match=r"a\.xml has 600 bytes, at most 500"):
        archive.read("a.xml", max_bytes=500)
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 500)
    with pytest.raises(ArchiveError, match=r"a\.xml unpacks to 600 bytes, at most 500"):
        ZipArchive(path)
    monkeypatch.setattr(module, "MAX_MEMBERS", 1)
    with pytest.raises(ArchiveError, match="has 2 members, at most 1"):
        ZipArchive(path)


def test_a_name_that_stands_twice_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.xml", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.xml", "2")
    with pytest.raises(ArchiveError, match=r"holds 'a\.xml' twice"):
        ZipArchive(path)


@pytest.mark.parametrize("encoding", ["cp866", "utf-8"])
def test_names_packed_by_russian_windows_are_understood(path: Path, encoding: str) -> None:
    write(path, {"######.xml": b"x"})
    raw = "сканы."[:3].encode(encoding).ljust(6, b"_")
    path.write_bytes(path.read_bytes().replace(b"######", raw))
    with ZipArchive(path) as archive:
        assert list(archive.members) == [raw.decode(encoding) + ".xml"]


def test_names_packed_on_a_mac_are_found_by_their_composed_letters(path: Path) -> None:
    with ZipArchive(write(path, {"Съемочный.xml".replace("й", "и\u0306"): b"x"})) as archive:
        assert archive.find("Съемочный.xml") is not None
        assert archive.find("нет.xml") is None


@pytest.mark.parametrize(
    ("members", "layout"),
    [
        ({"default/a.xml": "<annotation>", "default/a.jpg": "", "default/Masks/a_mask_0.png": ""}, "LabelMe 3.0"),
        ({"a.xml": "<?xml version='1.0'?>\n<annotation>", "b.jpg": ""}, "LabelMe 3.0"),
        ({"annotations.xml": "<annotations>", "images/default/a.jpg": ""}, "CVAT for images 1.1"),
        ({"улица.xml": "<?xml version='1.0'?>\n<annotations>", "a.jpg": ""}, "CVAT for images 1.1"),
        ({"annotations/instances_default.json": '{"licenses": [', "images/default/a.jpg": ""}, "COCO 1.0"),
        ({"x/result.json": '{"info": {}, "images": [', "x/a.jpg": ""}, "COCO 1.0"),
        ({"annotations/default.json": '{"dm_format_version": "1.0"', "images/default/a.jpg": ""}, "Datumaro 1.0"),
        ({"annotations/default.json": '{"info": {}, "categories": {"label": {}}, "items": []'}, "Datumaro 1.0"),
        ({"labelmap.txt": "", "SegmentationClass/a.png": "", "JPEGImages/a.jpg": ""}, "Segmentation mask 1.1"),
        ({"export/SegmentationClass/a.png": ""}, "Segmentation mask 1.1"),
        ({"label_colors.txt": "", "gtFine/default/a_gtFine_color.png": ""}, "Cityscapes 1.0"),
        ({"label_colors.txt": "", "default.txt": "", "defaultannot/a.png": ""}, "CamVid 1.0"),
        ({"Annotations/a.xml": "<annotation>", "ImageSets/Main/default.txt": ""}, "Pascal VOC 1.1"),
        ({"annotations/person_keypoints_default.json": '{"licenses": ['}, "COCO Keypoints 1.0"),
        ({"task.json": "{}", "annotations.json": "[]", "data/manifest.jsonl": ""}, "a CVAT task or project backup"),
        ({"data.yaml": "", "labels/train/a.txt": ""}, "YOLO"),
        ({"holiday.jpg": ""}, None),
    ],
)
def test_export_formats_are_told_apart_by_what_is_in_them(path: Path, members: dict[str, str], layout: str) -> None:
    with ZipArchive(write(path, {name: text.encode() for name, text in members.items()})) as archive:
        assert recognise(archive) == layout


def test_the_beginning_of_a_member_is_read_without_the_rest(path: Path) -> None:
    with ZipArchive(write(path, {"a.xml": b"0123456789"})) as archive:
        assert archive.peek("a.xml", 4) == b"0123"
        assert archive.peek("a.xml", 40) == b"0123456789"


def test_a_damaged_beginning_is_noticed(path: Path) -> None:
    data = bytearray(write(path, {"a.xml": b"0123456789" * 9}).read_bytes())
    data[30 + len("a.xml")] ^= 0xFF
    path.write_bytes(data)
    with ZipArchive(path) as archive, pytest.raises(ArchiveError, match=r"a\.xml cannot be unpacked"):
        archive.peek("a.xml", 50)
