"""Pictures from outside: formats, damage, bombs; resampling that knows about no-returns; label maps."""

import base64
import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sscloud.errors import ImageError
from sscloud.image import (
    MAX_PIXELS,
    MAX_SCANS,
    NO_RETURN_BELOW,
    Resample,
    decode_image,
    image_size,
    image_size_of,
    no_return,
    read_image,
    read_label_map,
    resize_image,
    resize_label_map,
    scaled_size,
    write_label_map,
)

MakePanorama = Callable[..., NDArray[np.uint8]]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQ"
    "YEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAQABgD"
    "AREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AJ5Tz20soBWXdeDqbh5R5cTx/wDFg7WUQ/8A8Wakousmc/bq26PusWe/hvR+giYe"
    "zrVA/9k="
)
"""24x16 pixels (x*10, y*15, (x+y)*6) by `cjpeg -arithmetic -quality 60 -sample 1x1`; Pillow writes no such file."""


def panorama_jpeg(make_panorama: "MakePanorama", size_hw: tuple[int, int] = (97, 203), **options: object) -> bytes:
    return encode(Image.fromarray(make_panorama(size_hw)), "JPEG", **options)


def pillows(data: bytes) -> NDArray[np.uint8]:
    """A picture as Pillow alone decodes it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture
def no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow may read headers and nothing else."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)


@pytest.fixture(scope="module")
def colours() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)


class TestDecode:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("PNG", {}),
            ("BMP", {}),
            ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("WEBP", {"lossless": True}),
        ],
    )
    def test_lossless_formats_are_exact(
        self, colours: NDArray[np.uint8], kind: str, options: dict[str, object]
    ) -> None:
        found = decode_image(encode(Image.fromarray(colours), kind, **options))
        assert found.dtype == np.uint8
        assert np.array_equal(found, colours)

    @pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True})])
    def test_jpeg_is_what_pillow_says(self, colours: NDArray[np.uint8], kind: str, options: dict[str, object]) -> None:
        data = encode(Image.fromarray(colours), kind, **options)
        assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))

    def test_channels_are_rgb(self) -> None:
        red = encode(Image.new("RGB", (5, 4), (250, 10, 20)), "PNG")
        assert decode_image(red)[0, 0].tolist() == [250, 10, 20]
        assert decode_image(red).shape == (4, 5, 3)

    def test_the_result_can_be_written_to(self, colours: NDArray[np.uint8]) -> None:
        decode_image(encode(Image.fromarray(colours), "PNG"))[:] = 0

    def test_grey_becomes_three_equal_channels(self) -> None:
        grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
        assert np.array_equal(decode_image(encode(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, 2))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bit_grey_keeps_its_high_byte(self, kind: str) -> None:
        wide = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFF00, 0xFFFF]], np.uint16)
        found = decode_image(encode(Image.fromarray(wide), kind))
        assert found.tolist() == np.repeat((wide >> 8)[..., None], 3, 2).tolist()

    def test_16_bit_colour_keeps_its_high_byte(self) -> None:
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        row = b"\0" + struct.pack(">6H", 0x1234, 0x00FF, 0xFFFF, 0x8000, 0x0100, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        data += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
        assert decode_image(data).tolist() == [[[0x12, 0, 0xFF], [0x80, 1, 0]]]

    def test_cmyk(self) -> None:
        data = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
        assert np.abs(decode_image(data)[8, 8].astype(int) - [0, 255, 255]).max() <= 2

    def test_palette(self) -> None:
        indexed = Image.new("P", (4, 3), 1)
        indexed.putpalette([0, 0, 0, 7, 8, 9])
        assert decode_image(encode(indexed, "PNG")).tolist() == [[[7, 8, 9]] * 4] * 3

    def test_palette_with_transparency(self) -> None:
        indexed = Image.new("P", (4, 3), 1)
        indexed.putpalette([0, 0, 0, 7, 8, 9])
        data = encode(indexed, "PNG", transparency=bytes([255, 100]))
        assert decode_image(data).tolist() == [[[7, 8, 9]] * 4] * 3

    @pytest.mark.parametrize(("mode", "value"), [("RGBA", (7, 8, 9, 0)), ("LA", (7, 0))])
    def test_transparency_is_dropped(self, mode: str, value: tuple[int, ...]) -> None:
        found = decode_image(encode(Image.new(mode, (4, 3), value), "PNG"))
        assert found[0, 0].tolist() == ([7, 8, 9] if mode == "RGBA" else [7, 7, 7])

    def test_one_bit(self) -> None:
        data = encode(Image.fromarray(np.array([[True, False]])), "PNG")
        assert decode_image(data).tolist() == [[[255] * 3, [0] * 3]]

    @pytest.mark.parametrize(
        ("orientation", "turn"),
        [
            (1, lambda a: a),
            (2, lambda a: a[:, ::-1]),
            (3, lambda a: a[::-1, ::-1]),
            (4, lambda a: a[::-1]),
            (5, lambda a: a.transpose(1, 0, 2)),
            (6, lambda a: np.rot90(a, -1)),
            (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
            (8, lambda a: np.rot90(a)),
        ],
    )
    def test_exif_turns_upright(
        self, colours: NDArray[np.uint8], orientation: int, turn: Callable[..., NDArray[np.uint8]], tmp_path: Path
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            data = encode(Image.fromarray(colours), kind, exif=exif)
            assert np.array_equal(decode_image(data), turn(colours))
            (tmp_path / "picture").write_bytes(data)
            assert image_size(tmp_path / "picture") == turn(colours).shape[:2]


class TestJpeg:
    """Ordinary JPEGs are decoded without Pillow, to the same pixels."""

    KINDS = (
        *({"quality": quality, "subsampling": sampling} for quality in (30, 95) for sampling in (0, 1, 2)),
        {"progressive": True},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"comment": b"a comment"},
    )

    @pytest.mark.parametrize("options", KINDS, ids=str)
    @pytest.mark.parametrize("size_hw", [(97, 203), (1, 1), (64, 128)], ids=str)
    def test_pixels_are_pillows(
        self, make_panorama: MakePanorama, options: dict[str, object], size_hw: tuple[int, int]
    ) -> None:
        data = panorama_jpeg(make_panorama, size_hw, **options)
        expected = pillows(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", None)
            found = decode_image(data)
        assert found.flags.c_contiguous
        assert found.flags.writeable
        assert np.array_equal(found, expected)

    def test_grey(self, make_panorama: MakePanorama, no_pillow: None) -> None:
        grey = Image.fromarray(make_panorama((97, 203))[..., 2])
        found = decode_image(encode(grey, "JPEG", quality=100))
        assert np.abs(found.astype(int) - np.asarray(grey)[..., None]).max() <= 3

    def test_arithmetic_coding(self, no_pillow: None) -> None:
        y, x = np.mgrid[0:16, 0:24]
        expected = np.stack([x * 10, y * 15, (x + y) * 6], axis=2)
        assert np.abs(decode_image(ARITHMETIC_JPEG) - expected).max() <= 12

    def test_colours_without_a_transform(self, make_panorama: MakePanorama) -> None:
        data = panorama_jpeg(make_panorama, keep_rgb=True)
        assert np.array_equal(decode_image(data), pillows(data))

    @pytest.mark.parametrize("orientation", range(10))
    def test_exif_turns_upright(self, make_panorama: MakePanorama, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = panorama_jpeg(make_panorama, exif=exif)
        expected = pillows(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", None)
            found = decode_image(data)
        assert found.flags.c_contiguous
        assert np.array_equal(found, expected)
        assert image_size_of(data) == found.shape[:2]

    def test_what_follows_the_end_is_ignored(self, make_panorama: MakePanorama, no_pillow: None) -> None:
        data = panorama_jpeg(make_panorama)
        garbage = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
        expected = decode_image(data)
        for more in (b"\n", garbage, data, b"\xff\xda\x00\x02" * 1000):
            assert np.array_equal(decode_image(data + more), expected)

    def test_several_pictures_in_one_file(self, make_panorama: MakePanorama) -> None:
        first, second = (Image.fromarray(make_panorama(seed=seed)) for seed in (0, 1))
        data = encode(first, "MPO", save_all=True, append_images=[second])
        assert np.array_equal(decode_image(data), pillows(data))
        assert np.abs(decode_image(data).astype(int) - np.asarray(first)).mean() < 10

    def test_metadata_may_look_like_scans(self, make_panorama: MakePanorama, no_pillow: None) -> None:
        data = panorama_jpeg(make_panorama)
        segment = b"\xff\xe9" + struct.pack(">H", 2 + 4 * 1000) + b"\xff\xda\x00\x02" * 1000
        assert np.array_equal(decode_image(data[:2] + segment + data[2:]), decode_image(data))

    def test_too_many_scans(self, make_panorama: MakePanorama) -> None:
        data = panorama_jpeg(make_panorama, progressive=True)
        last = data.rindex(b"\xff\xda")
        start, scan = data[:last], data[last:-2]
        before = start.count(b"\xff\xda")
        assert 4 < before < 20
        most = start + scan * (MAX_SCANS - before) + data[-2:]
        assert decode_image(most).shape == (97, 203, 3)
        for more in (scan + data[-2:], scan * 1000, b"\xff\x01" + scan):
            with pytest.raises(ImageError, match=r"^The image is a JPEG of more than 100 scans.*Save it again\.$"):
                decode_image(most[:-2] + more)

    def test_large_pictures_have_fewer_scans(
        self, make_panorama: MakePanorama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = panorama_jpeg(make_panorama, progressive=True)
        last = data.rindex(b"\xff\xda")
        scans, scan = data.count(b"\xff\xda"), data[last:-2]
        monkeypatch.setattr("sscloud.image._SCANNED_PIXELS", 97 * 203 * 20)
        assert decode_image(data[:-2] + scan * (20 - scans) + data[-2:]).shape == (97, 203, 3)
        with pytest.raises(ImageError, match="more than 20 scans"):
            decode_image(data[:-2] + scan * (21 - scans) + data[-2:])
        monkeypatch.setattr("sscloud.image._SCANNED_PIXELS", 1)
        assert decode_image(data).shape == (97, 203, 3)

    def test_a_frame_of_another_size_than_the_header_says(self, make_panorama: MakePanorama) -> None:
        """Of two frame headers Pillow and libjpeg may read different ones: the smaller one must not pass the bound."""
        data = panorama_jpeg(make_panorama)
        at = data.index(b"\xff\xc0")
        frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        small = frame[:5] + struct.pack(">HH", 8, 8) + frame[9:]
        large = frame[:5] + struct.pack(">HH", 60000, 60000) + frame[9:]
        for frames in (small + large, large + small):
            with pytest.raises(ImageError, match=r"too large|broken or truncated|million pixels"):
                decode_image(data[:at] + frames + data[at + len(frame) :])


class TestLeastSize:
    @pytest.mark.parametrize("kind", [{"subsampling": 0}, {}, {"progressive": True}], ids=str)
    @pytest.mark.parametrize(
        ("least_hw", "expected"),
        [
            ((1, 1), (13, 26)),
            ((20, 20), (25, 51)),
            ((20, 80), (49, 102)),
            ((97, 203), (97, 203)),
            ((200, 9), (97, 203)),
        ],
    )
    def test_a_jpeg_is_no_smaller(
        self,
        make_panorama: MakePanorama,
        kind: dict[str, object],
        least_hw: tuple[int, int],
        expected: tuple[int, int],
    ) -> None:
        data = panorama_jpeg(make_panorama, **kind)
        found = decode_image(data, least_hw=least_hw)
        assert found.shape[2] == 3
        assert all(
            size >= min(least, full) for size, least, full in zip(found.shape, least_hw, (97, 203), strict=False)
        )
        assert found.shape[0] <= expected[0]
        assert found.shape[1] <= expected[1]
        assert image_size_of(data) == (97, 203)

    def test_it_is_about_the_average(self, make_panorama: MakePanorama) -> None:
        data = panorama_jpeg(make_panorama, (128, 256), quality=100, subsampling=0)
        mean = decode_image(data).reshape(32, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(decode_image(data, least_hw=(32, 64)) - mean).mean() < 2

    def test_it_means_the_upright_picture(self, make_panorama: MakePanorama) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = panorama_jpeg(make_panorama, (64, 256), exif=exif)
        assert decode_image(data, least_hw=(128, 10)).shape == (128, 32, 3)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_other_formats_are_decoded_in_full(self, colours: NDArray[np.uint8], kind: str) -> None:
        assert np.array_equal(decode_image(encode(Image.fromarray(colours), kind), least_hw=(1, 1)), colours)


class TestFrames:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
    def test_the_first_frame_counts(self, colours: NDArray[np.uint8], kind: str) -> None:
        options = {"lossless": True} if kind == "WEBP" else {}
        later = [Image.fromarray(255 - colours)] * 3
        data = encode(Image.fromarray(colours), kind, save_all=True, append_images=later, **options)
        assert np.array_equal(decode_image(data), colours)
        assert image_size_of(data) == (24, 40)


class TestPngOrientation:
    """PNGs may say how they are turned in several places, some of them after the pixels."""

    XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'

    @pytest.mark.parametrize(
        ("kind", "data", "turned"),
        [
            (b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", True),
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP, True),
            (b"tEXt", b"Comment\0eXIf", False),
        ],
    )
    @pytest.mark.parametrize("before", [True, False], ids=["before the pixels", "after the pixels"])
    def test_the_size_is_the_decoded_one(
        self, colours: NDArray[np.uint8], kind: bytes, data: bytes, *, turned: bool, before: bool
    ) -> None:
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        png = encode(Image.fromarray(colours), "PNG")
        at = png.index(b"IDAT" if before else b"IEND") - 4
        png = png[:at] + chunk + png[at:]
        expected = (40, 24) if turned else (24, 40)
        assert decode_image(png).shape == (*expected, 3)
        assert image_size_of(png) == expected


class TestDamage:
    @pytest.mark.parametrize("read", [decode_image, image_size_of])
    def test_broken_exif(self, colours: NDArray[np.uint8], read: Callable[[bytes], object]) -> None:
        data = encode(Image.fromarray(colours), "PNG", exif=b"MM\xff\xff\xff\xff\0\x08")
        with pytest.raises(ImageError, match=r"^The image is broken or truncated: .*Save or send it again\.$"):
            read(data)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_truncated(self, colours: NDArray[np.uint8], kind: str, share: float) -> None:
        data = encode(Image.fromarray(colours), kind)
        with pytest.raises(ImageError, match=r"broken or truncated|not a picture that can be read"):
            decode_image(data[: int(len(data) * share)])

    @pytest.mark.parametrize(
        "data", [b"", b"\0", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"<svg/>", b"%PDF-1.7", bytes(5000)]
    )
    def test_no_picture(self, data: bytes) -> None:
        with pytest.raises(
            ImageError, match=f"^These {len(data)} bytes are not a picture that can be read .*JPEG, PNG"
        ):
            decode_image(data)

    def test_a_format_that_nobody_needs_is_not_tried(self, colours: NDArray[np.uint8]) -> None:
        for kind in ("GIF", "PPM", "PCX", "EPS"):
            with pytest.raises(ImageError, match="not a picture that can be read"):
                decode_image(encode(Image.fromarray(colours), kind))

    def test_flipped_bytes_raise_nothing_else(self, colours: NDArray[np.uint8]) -> None:
        rng = np.random.default_rng(3)
        for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
            original = np.frombuffer(encode(Image.fromarray(colours), kind), np.uint8)
            for _ in range(40):
                data = original.copy()
                data[rng.integers(0, min(len(data), 400), 3)] = rng.integers(0, 256, 3)
                try:
                    found = decode_image(data.tobytes(), max_pixels=1 << 20)
                except ImageError:
                    continue
                assert found.dtype == np.uint8
                assert found.ndim == 3

    @pytest.mark.parametrize(("width", "height"), [(60000, 60000), (2_000_000_000, 2), (16384, 8193), (40000, 4000)])
    def test_a_bomb_is_refused_by_its_header(self, width: int, height: int) -> None:
        with pytest.raises(ImageError, match=r"^The image is (too large|[0-9]+x[0-9]+ = .*at most 134 million)"):
            decode_image(png_header(width, height))

    def test_the_bound_is_a_parameter(self, colours: NDArray[np.uint8]) -> None:
        data = encode(Image.fromarray(colours), "PNG")
        assert decode_image(data, max_pixels=960).shape == (24, 40, 3)
        with pytest.raises(ImageError, match=r"^The image is 40x24 = 0.00096 million pixels.*Scale it down\.$"):
            decode_image(data, max_pixels=959)

    def test_large_panoramas_are_within_the_bound(self) -> None:
        assert MAX_PIXELS >= 8192 * 4096

    def test_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"no\.png cannot be read: No such file"):
            read_image(tmp_path / "no.png")
        (tmp_path / "bad.png").write_bytes(b"hello")
        for read in (read_image, read_label_map, image_size):
            with pytest.raises(ImageError, match=r"bad\.png: These 5 bytes are not a picture"):
                read(tmp_path / "bad.png")
        (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
        for read in (read_image, read_label_map, image_size):
            with pytest.raises(ImageError, match=r"bomb\.png: The image is too large"):
                read(tmp_path / "bomb.png")


class TestLabelMaps:
    def test_round_trip(self, tmp_path: Path) -> None:
        label_map = np.random.default_rng(0).integers(0, 256, (64, 128), dtype=np.uint8)
        write_label_map(tmp_path / "новая" / "1.png", label_map)
        found = read_label_map(tmp_path / "новая" / "1.png")
        assert found.dtype == np.uint8
        assert np.array_equal(found, label_map)
        with Image.open(tmp_path / "новая" / "1.png") as image:
            assert image.mode == "L"

    def test_palette_indices_are_kept(self, tmp_path: Path) -> None:
        label_map = np.array([[0, 65, 66]], np.uint8)
        indexed = Image.fromarray(label_map).convert("L")
        indexed.putpalette(list(range(255, -1, -1)) * 3)
        indexed.save(tmp_path / "1.png")
        with Image.open(tmp_path / "1.png") as image:
            assert image.mode == "P"
        assert read_label_map(tmp_path / "1.png").tolist() == [[0, 65, 66]]

    def test_one_bit_is_zero_and_one(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "1.png")
        assert read_label_map(tmp_path / "1.png").tolist() == [[1, 0, 1]]

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
    def test_other_pictures_are_no_masks(self, tmp_path: Path, mode: str) -> None:
        Image.new(mode, (4, 4)).save(tmp_path / "1.png")
        with pytest.raises(ImageError, match=rf"1\.png: it is a picture of mode {mode}, but a mask is 8-bit"):
            read_label_map(tmp_path / "1.png")

    @pytest.mark.parametrize("mode", ["L", "1"])
    def test_truncated(self, tmp_path: Path, mode: str) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).convert(mode)
        data = encode(noise, "PNG")
        (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=r"1\.png: The mask is broken or truncated"):
            read_label_map(tmp_path / "1.png")

    def test_nearest(self) -> None:
        label_map = np.repeat(np.repeat(np.array([[1, 2], [65, 255]], np.uint8), 5, 0), 5, 1)
        assert resize_label_map(label_map, (2, 2)).tolist() == [[1, 2], [65, 255]]
        assert set(np.unique(resize_label_map(label_map, (7, 3)))) == {1, 2, 65, 255}


class TestNoReturn:
    def test_threshold_lies_below_every_unit_normal(self) -> None:
        normals = np.random.default_rng(0).normal(size=(200, 200, 3))
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        encoded = np.rint((normals * 0.5 + 0.5) * 255).astype(np.uint8)
        assert not no_return(encoded).any()
        assert no_return(np.zeros((4, 4, 3), np.uint8)).all()
        darkest = np.full((1, 1, 3), round((1 - 1 / 3**0.5) / 2 * 255), np.uint8)
        assert not no_return(darkest).any()

    def test_one_bright_channel_is_a_return(self) -> None:
        image = np.array([[[0, 0, NO_RETURN_BELOW], [NO_RETURN_BELOW - 1] * 3]], np.uint8)
        assert no_return(image).tolist() == [[False, True]]

    def test_tolerates_jpeg_noise(self, make_panorama: MakePanorama) -> None:
        image = make_panorama((256, 512))
        black = (image == 0).all(2)
        # Patches of 8 pixels are the worst case: with halved colour every fourth pixel lies on a mixed edge.
        kinds = [({"quality": 95, "subsampling": 0}, 1e-3), ({"quality": 95}, 0.02), ({"quality": 75}, 0.03)]
        for options, most in kinds:
            found = no_return(decode_image(encode(Image.fromarray(image), "JPEG", **options)))
            assert (found != black).mean() < most


class TestResize:
    @pytest.mark.parametrize("size_hw", [(2, 4), (5, 9), (12, 20), (24, 40), (7, 40), (48, 80)])
    def test_bicubic_is_pillows(self, size_hw: tuple[int, int], colours: NDArray[np.uint8]) -> None:
        expected = np.asarray(Image.fromarray(colours).resize(size_hw[::-1], Image.Resampling.BICUBIC))
        found = resize_image(colours, size_hw, resample="bicubic", encoding="normals")
        assert found.shape == (*size_hw, 3)
        assert found.flags.c_contiguous
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found != expected).mean() < 0.02

    @pytest.mark.parametrize("resample", ["bicubic", "valid-area"])
    def test_any_array_is_taken(self, make_panorama: MakePanorama, resample: Resample) -> None:
        image = make_panorama()
        expected = resize_image(image, (17, 31), resample=resample, encoding="normals")
        frozen = image.copy()
        frozen.flags.writeable = False
        offset = np.empty(image.size + 3, np.uint8)[3:].reshape(image.shape)
        offset[:] = image
        wide = np.zeros((64, 300, 3), np.uint8)[:, 100:228]
        wide[:] = image
        for other in (frozen, offset, wide, image[::-1].copy()[::-1], np.asfortranarray(image)):
            assert np.array_equal(resize_image(other, (17, 31), resample=resample, encoding="normals"), expected)

    @pytest.mark.parametrize("resample", ["bicubic", "valid-area"])
    @pytest.mark.parametrize("size_hw", [(1, 1), (1, 31), (17, 1), (64, 31), (17, 128)])
    def test_thin_results_keep_their_shape(
        self, make_panorama: MakePanorama, resample: Resample, size_hw: tuple[int, int]
    ) -> None:
        found = resize_image(make_panorama(), size_hw, resample=resample, encoding="normals")
        assert found.shape == (*size_hw, 3)

    def test_without_torch_bicubic_is_pillows(
        self, colours: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        expected = np.asarray(Image.fromarray(colours).resize((17, 9), Image.Resampling.BICUBIC))
        assert np.array_equal(resize_image(colours, (9, 17), resample="bicubic", encoding="rgb"), expected)

    def test_the_module_does_without_torch(self) -> None:
        code = "import sys; sys.modules['torch'] = None; import sscloud.image"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_scaled_size_truncates(self) -> None:
        assert scaled_size((4096, 8192), 0.1) == (409, 819)
        assert scaled_size((64, 128), 0.5) == (32, 64)
        assert scaled_size((100, 200), 1) == (100, 200)

    @pytest.mark.parametrize("factor", [2, 4])
    def test_without_black_it_is_the_area_average(self, factor: int) -> None:
        image = np.random.default_rng(0).integers(60, 256, (32, 64, 3), dtype=np.uint8)
        height, width = 32 // factor, 64 // factor
        mean = image.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
        found = resize_image(image, (height, width), resample="valid-area", encoding="rgb")
        assert found.dtype == np.uint8
        assert np.abs(found - mean).max() <= 0.51

    def test_fractional_scales_weigh_the_edges(self) -> None:
        image = np.random.default_rng(0).integers(60, 256, (30, 50, 3), dtype=np.uint8)

        def weights(source: int, target: int) -> NDArray[np.float64]:
            edges = np.linspace(0, source, target + 1)
            low = np.maximum(edges[:-1, None], np.arange(source))
            high = np.minimum(edges[1:, None], np.arange(source) + 1)
            return np.clip(high - low, 0, None) * target / source

        mean = np.einsum("yh,xw,hwc->yxc", weights(30, 13), weights(50, 17), image.astype(float))
        found = resize_image(image, (13, 17), resample="valid-area", encoding="rgb")
        assert np.abs(found - mean).max() <= 0.6

    def test_black_is_not_blended_in(self) -> None:
        """A checkerboard of black and one normal is, made smaller, that normal."""
        normal = np.array([204, 189, 209], np.uint8)  # (0.6, 0.48, 0.64)
        image = np.zeros((32, 64, 3), np.uint8)
        image[(np.indices((32, 64)).sum(0) % 2).astype(bool)] = normal
        for size_hw in ((16, 32), (8, 16), (4, 4)):
            found = resize_image(image, size_hw, resample="valid-area", encoding="normals")
            assert np.abs(found.astype(int) - normal).max() <= 1
        assert resize_image(image, (16, 32), resample="bicubic", encoding="normals").max() < 150

    def test_normals_keep_unit_length(self, make_panorama: MakePanorama) -> None:
        rng = np.random.default_rng(5)
        for seed in range(5):
            image = make_panorama((96, 192), seed=seed)
            image[rng.random(image.shape[:2]) < 0.2] = 0
            for size_hw in ((40, 83), (48, 96), (17, 31), (95, 191)):
                found = resize_image(image, size_hw, resample="valid-area", encoding="normals")
                valid = ~no_return(found)
                assert np.array_equal(~valid, (found == 0).all(2))
                length = np.linalg.norm(found[valid] / 127.5 - 1, axis=1)
                # Rounding moves each component by at most 1/255; opposite normals may cancel to nothing.
                cancelled = length < 0.5
                assert cancelled.mean() < 0.01
                assert np.abs(length[~cancelled] - 1).max() < 3**0.5 / 255 + 1e-6

    @pytest.mark.parametrize("size_hw", [(32, 64), (40, 83), (12, 25), (409, 819), (95, 192), (96, 101)])
    def test_returns_are_weighed_by_their_area(self, make_panorama: MakePanorama, size_hw: tuple[int, int]) -> None:
        """Against the definition, in float64 and with whole matrices of weights."""
        source_hw = (96, 192) if size_hw[0] < 100 else (512, 1024)
        image = make_panorama(source_hw)
        image[np.random.default_rng(1).random(source_hw) < 0.1] = 5  # a no-return that is not quite black

        def overlaps(source: int, target: int) -> NDArray[np.float64]:
            edges = np.arange(target + 1) * source / target
            low = np.maximum(edges[:-1, None], np.arange(source))
            return np.clip(np.minimum(edges[1:, None], np.arange(source) + 1) - low, 0, None)

        down, along = overlaps(source_hw[0], size_hw[0]), overlaps(source_hw[1], size_hw[1])
        valid = image.max(2) >= NO_RETURN_BELOW
        total = np.einsum("yh,hwc,xw->yxc", down, image * valid[..., None].astype(float), along, optimize=True)
        area = np.einsum("yh,hw,xw->yx", down, valid.astype(float), along, optimize=True)
        normals = total / np.maximum(area, 1e-9)[..., None] / 127.5 - 1
        length = np.linalg.norm(normals, axis=2)
        normals /= np.maximum(length, 1e-9)[..., None]
        cover = area / (source_hw[0] * source_hw[1] / size_hw[0] / size_hw[1])
        found = resize_image(image, size_hw, resample="valid-area", encoding="normals")
        sure = np.abs(cover - 0.5) > 1e-3
        assert sure.mean() > 0.95
        assert np.array_equal((found > 0).any(2)[sure], (cover > 0.5)[sure])
        compared = sure & (cover > 0.5) & (length > 0.2)  # of normals that cancel each other, noise is left
        assert compared.mean() > 0.3
        assert np.abs(found - (normals + 1) * 127.5)[compared].max() <= 1

    def test_little_memory_is_taken(self, make_panorama: MakePanorama) -> None:
        image = make_panorama((1024, 2048))
        resize_image(image, (102, 204), resample="valid-area", encoding="normals")
        tracemalloc.start()
        resize_image(image, (102, 204), resample="valid-area", encoding="normals")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < image.nbytes / 4

    def test_half_covered_is_a_return(self) -> None:
        for valid, kept in ((0, False), (49, False), (50, True), (100, True)):
            image = np.zeros((10, 10, 3), np.uint8)
            image.reshape(100, 3)[:valid] = (128, 128, 255)
            found = resize_image(image, (1, 1), resample="valid-area", encoding="normals")
            assert found.tolist() == [[[128, 128, 255] if kept else [0, 0, 0]]]

    def test_dark_colours_are_colours(self) -> None:
        image = np.array([[[100, 60, 200], [50, 61, 100]], [[0, 0, 0], [4, 3, 4]]], np.uint8)
        found = resize_image(image, (1, 1), resample="valid-area", encoding="rgb")
        assert np.abs(found.astype(int) - [[[38.5, 31, 76]]]).max() <= 0.5

    def test_the_same_size_changes_nothing_but_rounding(self, make_panorama: MakePanorama) -> None:
        image = make_panorama()
        found = resize_image(image, (64, 128), resample="valid-area", encoding="normals")
        assert np.abs(found.astype(int) - image).max() <= 1

    def test_all_black_stays_black(self) -> None:
        found = resize_image(np.zeros((9, 18, 3), np.uint8), (4, 7), resample="valid-area", encoding="normals")
        assert not found.any()

    def test_columns_that_roll_by_whole_cells_roll_the_result(self, make_panorama: MakePanorama) -> None:
        image = make_panorama((64, 128))
        small = resize_image(image, (16, 32), resample="valid-area", encoding="normals")
        rolled = resize_image(np.roll(image, 20, 1), (16, 32), resample="valid-area", encoding="normals")
        assert np.array_equal(rolled, np.roll(small, 5, 1))
