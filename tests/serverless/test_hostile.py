"""Whatever is sent: what CVAT can store is answered, everything else is refused with 400 and one line of log.

First a corpus of everything that is known to be odd, then requests that chance makes of good ones.
"""

import base64
import io
import json
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serverless.metrics import resident_bytes

pytestmark = [
    # Pillow warns of odd metadata; the function keeps that out of its log, and tests turn warnings into errors.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZE_HW = (64, 128)
QUICK_REQUESTS = 2_000
SLOW_REQUESTS = 100_000
SLOWEST_SECONDS = 10.0
"""No request of a small picture may take longer, on the slowest machine."""
LEAK_BYTES = 64_000_000
"""What the process's memory may grow by after the first requests: allocators keep some."""

ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8yb"
    "qmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/yQARCABA"
    "AIADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwAqjArwJFluDqI/W86Uz8gB4HK977n9zG0M9o/V0wvM0viVzZyBIyOzpkc1oQ"
    "c+eLEu1kPinK1Sz5A7enCoGerLfaSV5EBjDlmDiTGAHaYgz0qn5P47cIxQTw4RVw+k5Olo3tJztv/Z"
)
"""Coloured blocks, 128x64, by `cjpeg -arithmetic -quality 30`; Pillow writes no such file."""


@pytest.fixture(scope="module")
def function(start_function: Callable[..., Any], varied_bundle: Path) -> Any:
    # Small bounds, so that a size that chance wrote into a header takes no minutes.
    return start_function(varied_bundle, SSCLOUD_MAX_PIXELS="6000000")


def picture(mode: str = "RGB", size_hw: tuple[int, int] = SIZE_HW) -> Image.Image:
    """Coloured blocks."""
    height, width = size_hw
    blocks = np.random.default_rng(0).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    pixels = np.repeat(np.repeat(blocks, 16, axis=0), 16, axis=1)[:height, :width]
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, header: bytes = struct.pack(">IIBBBBB", 128, 64, 8, 2, 0, 0, 0)) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def inflated(megabytes: int) -> bytes:
    """Zeros that compression makes a thousandth of."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def png_16_bit(colour: int, channels: int) -> bytes:
    row = b"\0" + bytes(range(256)) * channels
    header = struct.pack(">IIBBBBB", 128, 64, 16, colour, 0, 0, 0)
    return png(chunk(b"IDAT", zlib.compress(row * 64)), header=header)


ROWS = chunk(b"IDAT", zlib.compress((b"\0" + bytes(range(128)) * 3) * 64))

GOOD_PICTURES: dict[str, Callable[[], bytes]] = {
    **{
        f"{kind} {mode}": lambda kind=kind, mode=mode: encode(picture(mode), kind)
        for kind, modes in {
            "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
            "JPEG": ("RGB", "L", "CMYK"),
            "WEBP": ("RGB", "RGBA"),
            "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
            "BMP": ("RGB", "L", "P", "1"),
        }.items()
        for mode in modes
    },
    "PNG of 16-bit grey and alpha": lambda: png_16_bit(4, 2),
    "PNG of 16-bit colours": lambda: png_16_bit(2, 3),
    "PNG of 16-bit colours and alpha": lambda: png_16_bit(6, 4),
    "PNG with a transparent palette": lambda: encode(picture("P"), "PNG", transparency=bytes(range(256))),
    "PNG turned by EXIF": lambda: encode(picture(size_hw=(128, 64)), "PNG", exif=exif(6)),
    "PNG that is animated": lambda: encode(picture(), "PNG", save_all=True, append_images=[picture()] * 2),
    "PNG with more rows than it says": lambda: png(chunk(b"IDAT", inflated(64))),
    "JPEG that is progressive": lambda: encode(picture(), "JPEG", progressive=True),
    "JPEG in arithmetic coding": lambda: ARITHMETIC_JPEG,
    "JPEG in RGB": lambda: encode(picture(), "JPEG", keep_rgb=True),
    "JPEG with garbage after its end": lambda: encode(picture(), "JPEG") + random.Random(0).randbytes(100_000),
    "JPEG with a second one after its end": lambda: encode(picture(), "JPEG") * 2,
    "JPEG of several pictures": lambda: encode(picture(), "MPO", save_all=True, append_images=[picture("RGB", (8, 8))]),
    "JPEG with broken EXIF": lambda: encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(20)),
    "JPEG with an orientation that there is not": lambda: encode(picture(), "JPEG", exif=exif(9)),
    **{
        f"JPEG turned by EXIF {value}": lambda value=value: encode(
            picture(size_hw=(128, 64) if value > 4 else SIZE_HW), "JPEG", exif=exif(value)
        )
        for value in range(1, 9)
    },
    "WEBP without loss": lambda: encode(picture(), "WEBP", lossless=True),
    "WEBP that is animated": lambda: encode(picture(), "WEBP", save_all=True, append_images=[picture("L")] * 2),
    **{
        f"TIFF in {compression}": lambda compression=compression: encode(picture(), "TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")
    },
    "TIFF of several pages": lambda: encode(picture(), "TIFF", save_all=True, append_images=[picture("L")] * 2),
    "TIFF turned by its tag": lambda: encode(picture(size_hw=(128, 64)), "TIFF", tiffinfo={0x0112: 6}),
}

BAD_PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "1x1": (lambda: encode(picture(size_hw=(1, 1)), "PNG"), "too small for this model"),
    "one row": (lambda: encode(picture(size_hw=(1, 128)), "JPEG"), "too small for this model"),
    "65500 wide and one high": (lambda: encode(picture(size_hw=(1, 65500)), "JPEG"), "too small for this model"),
    "65500 high": (lambda: encode(picture("L", (65500, 100)), "PNG"), "million pixels; at most"),
    "GIF": (lambda: encode(picture("P"), "GIF"), "not a picture that can be read"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture that can be read"),
    "PDF": (lambda: encode(picture(), "PDF"), "not a picture that can be read"),
    "zip": (lambda: b"PK\x03\x04" + bytes(1000), "not a picture that can be read"),
    "zeros": (lambda: bytes(1_000_000), "not a picture that can be read"),
    "half a PNG": (lambda: encode(picture(), "PNG")[:200], "broken or truncated"),
    "half a JPEG": (lambda: encode(picture(), "JPEG")[:-200], "broken or truncated"),
    "half a TIFF": (lambda: encode(picture(), "TIFF")[:5000], "not a picture|broken or truncated"),
    "half a WEBP": (lambda: encode(picture(), "WEBP")[:200], "not a picture|broken or truncated"),
    "JPEG without a picture": (lambda: b"\xff\xd8\xff\xd9", "not a picture"),
    "JPEG of many scans": (lambda: many_scans(5000), "more than 100 scans"),
    "JPEG of 12 bits": (lambda: twelve_bits(), "not a picture|broken or truncated"),
    "PNG of 60000x60000": (lambda: png(header=struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), "too large"),
    "PNG of no width": (lambda: png(header=struct.pack(">IIBBBBB", 0, 64, 8, 2, 0, 0, 0)), "not a picture|broken"),
    "PNG with a wrong checksum": (lambda: png(chunk(b"tEXt", b"a\0b")[:-1] + b"?", ROWS), "not a picture"),
    "PNG without rows": (lambda: png(), "broken or truncated"),
    "PNG of text that inflates": (lambda: png(chunk(b"zTXt", b"a\0\0" + inflated(64)), ROWS), "not a picture|broken"),
    "PNG of a profile that inflates": (
        lambda: png(chunk(b"iCCP", b"a\0\0" + inflated(64)), chunk(b"tRNS", b"?"), ROWS),
        "not a picture|broken",
    ),
    "PNG of much text": (lambda: png(chunk(b"zTXt", b"a\0\0" + inflated(1)) * 100, ROWS), "not a picture|broken"),
}


def many_scans(count: int) -> bytes:
    data = encode(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def twelve_bits() -> bytes:
    data = encode(picture(), "JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 4] + b"\x0c" + data[at + 5 :]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body(data: bytes, **more: Any) -> bytes:
    return json.dumps({"image": text(data), **more}).encode()


def check(
    function: Any, sent: bytes, content_type: str = "application/json", *, within: float = SLOWEST_SECONDS
) -> Any:
    """Ask, and check what holds for every answer: no defect, one line of log, JSON, and soon."""
    started = time.perf_counter()
    reply = function.ask(sent, content_type)
    spent = time.perf_counter() - started
    assert reply.status in (200, 400), (reply.body, sent[:200])
    assert spent < within, (spent, sent[:200])
    assert reply.content_type == "application/json"
    assert reply.log.count("\n") == 1, reply.log
    assert reply.log.endswith("\n")
    assert ("Answered" if reply.status == 200 else "[warning] Refused a request") in reply.log
    assert reply.body[:1] + reply.body[-1:] == ("[]" if reply.status == 200 else "{}")
    return reply


def refused(function: Any, sent: bytes, expected: str, content_type: str = "application/json") -> None:
    reply = check(function, sent, content_type)
    assert reply.status == 400
    answer = json.loads(reply.body)
    assert answer.keys() == {"error"}
    with pytest.raises(ValueError, match=expected):
        raise ValueError(answer["error"])


class TestPictures:
    @pytest.mark.parametrize("name", GOOD_PICTURES)
    def test_what_cvat_can_store_is_answered(self, function: Any, name: str) -> None:
        reply = check(function, body(GOOD_PICTURES[name]()))
        assert reply.status == 200, reply.body
        assert "'size': '128x64'" in reply.log
        json.loads(reply.body)

    @pytest.mark.parametrize("name", BAD_PICTURES)
    def test_everything_else_is_refused(self, function: Any, name: str) -> None:
        data, expected = BAD_PICTURES[name]
        refused(function, body(data()), expected)

    def test_the_widest_picture_that_a_jpeg_can_be(self, function: Any) -> None:
        reply = check(function, body(encode(picture("L", (64, 65500)), "JPEG")), within=60)
        assert reply.status == 200
        assert "'size': '65500x64'" in reply.log


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no body"),
    "white space": (b" \n", "is not JSON"),
    "a form": (b"image=1&threshold=0.5", "is not JSON"),
    "half of the JSON": (body(b"x")[:-3], "is not JSON"),
    "two objects": (b"{}{}", "is not JSON"),
    "not UTF-8": (b'{"image": "\xff"}', "is not JSON"),
    "UTF-16": ('{"image": "A"}'.encode("utf-16"), "is not"),
    "deep arrays": (b"[" * 200_000, "is not JSON"),
    "deep arrays that end": (b"[" * 200_000 + b"]" * 200_000, "is not JSON"),
    "deep objects": (b'{"a":' * 100_000, "is not JSON"),
    "a deep image": (b'{"image":' + b"[" * 900 + b"]" * 900 + b"}", "'image' is a JSON array"),
    "an array": (b"[]", "a JSON array, not an object"),
    "a number": (b"7", "a JSON number, not an object"),
    "NaN": (b"NaN", "a JSON number, not an object"),
    "a text": (b'"image"', "a JSON string|is not JSON"),
    "true": (b"true", "a JSON boolean, not an object"),
    "null": (b"null", "no body|a JSON null"),
    "an empty object": (b"{}", "has no 'image'"),
    "another key": (b'{"Image": "AAAA"}', "has no 'image'"),
    "an image of null": (b'{"image": null}', "has no 'image'"),
    "a number as image": (b'{"image": 7}', "'image' is a JSON number"),
    "true as image": (b'{"image": true}', "'image' is a JSON boolean"),
    "an object as image": (b'{"image": {"data": "AAAA"}}', "'image' is a JSON object"),
    "pixels as image": (b'{"image": [[0, 1], [1, 0]]}', "'image' is a JSON array"),
    "an empty image": (b'{"image": ""}', "'image' is empty"),
    "a blank image": (b'{"image": " \\n "}', "'image' is empty"),
    "base64 in an alphabet for URLs": (b'{"image": "_-_-"}', "not valid base64"),
    "base64 without padding": (b'{"image": "QUJDRA"}', "not valid base64"),
    "base64 with something after its end": (b'{"image": "QQ==QQ=="}', "not valid base64"),
    "base64 with a zero in it": (b'{"image": "QU\\u0000JD"}', "not valid base64"),
    "half a surrogate": (b'{"image": "\\ud800"}', "not valid base64"),
    "a data URL of text": (b'{"image": "data:text/plain;base64,QUJD"}', "not valid base64"),
    "a data URL without base64": (b'{"image": "data:image/svg+xml,<svg/>"}', "not valid base64"),
    "an address": (b'{"image": "https://example.org/1.png"}', "not valid base64"),
    "the last of two images is empty": (b'{"image": "AAAA", "image": ""}', "'image' is empty"),
    "a threshold of many digits": (b'{"image": "AAAA", "threshold": ' + b"1" * 5000 + b"}", "is not JSON"),
}
BAD_THRESHOLDS = (
    *("null", "true", '"0.5"', '""', "[0.5]", "{}", "NaN", "Infinity", "-Infinity", "-0.001", "1.001", "1e999"),
    *("2", "-1", "1" * 400),
)


class TestBodies:
    @pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
    @pytest.mark.parametrize("name", BAD_BODIES)
    def test_bad_bodies_are_refused(self, function: Any, name: str, content_type: str) -> None:
        sent, expected = BAD_BODIES[name]
        refused(function, sent, expected, content_type)

    @pytest.mark.parametrize("threshold", BAD_THRESHOLDS, ids=lambda value: value[:12])
    def test_bad_thresholds_are_refused(self, function: Any, threshold: str) -> None:
        sent = body(encode(picture(), "PNG"))[:-1] + b', "threshold": ' + threshold.encode() + b"}"
        refused(function, sent, "'threshold' is .* not a number from 0 to 1")

    @pytest.mark.parametrize("threshold", ["0", "-0.0", "1", "0.5", "1e-400", "0.50000000000000000000000000000000001"])
    def test_good_thresholds(self, function: Any, threshold: str) -> None:
        sent = body(encode(picture(), "PNG"))[:-1] + b', "threshold": ' + threshold.encode() + b"}"
        assert check(function, sent).status == 200

    def test_forms_of_one_request_have_one_answer(self, function: Any) -> None:
        data = encode(picture(), "PNG")
        expected = check(function, body(data))
        lines = base64.encodebytes(data).decode()
        forms: list[dict[str, Any]] = [
            {"image": lines},
            {"image": lines.replace("\n", "\r\n\t ")},
            {"image": "data:image/png;base64," + text(data)},
            {"image": "data:image/x-portable.any+map;base64,\n" + lines},
            {"image": text(data), "threshold": 0},
            {"image": text(data), "frame": 7, "labels": ["a"], "Threshold": "x", "": None},
        ]
        sent = [json.dumps(form).encode() for form in forms]
        sent += [
            b' {"image" :"' + text(data).encode() + b'" }\n',
            b'{"image": 7, "image": "' + text(data).encode() + b'"}',
        ]
        sent += [json.dumps(forms[0]).encode("utf-16")]
        for one in sent:
            for content_type in ("application/json", "application/json; charset=utf-8", "text/plain", ""):
                reply = check(function, one, content_type)
                assert (reply.status, reply.body) == (200, expected.body), one[:80]

    def test_more_bytes_than_are_taken(self, start_function: Any, varied_bundle: Path) -> None:
        sent = body(encode(picture(), "PNG"))
        exact = start_function(varied_bundle, SSCLOUD_MAX_BYTES=str(len(sent)))
        assert check(exact, sent).status == 200
        for content_type in ("application/json", "text/plain"):
            refused(exact, sent + b" ", f"has {len(sent) + 1} bytes; at most {len(sent)}", content_type)


def test_identical_requests_have_identical_answers(function: Any) -> None:
    for kind in ("JPEG", "PNG"):
        sent = body(encode(picture(), kind), threshold=0.3)
        assert len({check(function, sent).body for _ in range(5)}) == 1


def test_metrics_count_what_was_asked(start_function: Any, varied_bundle: Path) -> None:
    function = start_function(varied_bundle)
    check(function, body(encode(picture(), "PNG")))
    check(function, b"{}")
    reply = function.ask(b"", "", method="GET", path="/metrics")
    assert (reply.status, reply.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'sscloud_requests_total{worker="0",status="200"} 1' in reply.body
    assert 'sscloud_requests_total{worker="0",status="400"} 1' in reply.body
    for stage in ("parse", "decode", "resize", "forward", "upsample", "regions", "answer"):
        assert f'sscloud_stage_seconds_count{{worker="0",stage="{stage}"}}' in reply.body
    assert 'sscloud_model_info{worker="0",model="varied v3"} 1' in reply.body


class Mutator:
    """Requests that chance makes of good ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._pictures = [make() for make in GOOD_PICTURES.values()]
        self._pictures = [data for data in self._pictures if len(data) < 60_000]

    def request(self) -> tuple[bytes, str]:
        """A body and its content type."""
        chance = self._random
        data = chance.choice(self._pictures)
        damage = chance.random()
        if damage < 0.7:
            data = self._damaged_picture(data)
        image = text(data)
        if 0.7 <= damage < 0.8:
            image = self._damaged(image.encode()).decode("latin-1")
        threshold = chance.choice(["", ', "threshold": 0.5', f', "threshold": {self._number()}'])
        sent = b'{"image": ' + json.dumps(image).encode() + threshold.encode() + b"}"
        if damage >= 0.8:
            sent = self._damaged(sent)
        return sent, chance.choice(["application/json", "application/json", "text/plain"])

    def _damaged_picture(self, data: bytes) -> bytes:
        chance = self._random
        if chance.random() < 0.1:  # the head of one and the rest of another
            other = chance.choice(self._pictures)
            return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]
        data = self._damaged(data)
        if data[:4] == b"\x89PNG" and chance.random() < 0.7:  # otherwise hardly one gets past the checksums
            data = with_checksums(data)
        return data

    def _damaged(self, data: bytes) -> bytes:
        chance = self._random
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 5, 20])):
            # What decides is mostly at the start.
            at = chance.randrange(max(1, min(len(changed), chance.choice([40, 400, len(changed) or 1]))))
            kind = chance.randrange(6)
            if kind == 0 and changed:
                changed[at % len(changed)] ^= 1 << chance.randrange(8)
            elif kind == 1:
                changed[at : at + 1] = bytes([chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])])
            elif kind == 2:
                del changed[at : at + chance.choice([1, 2, 4, 100])]
            elif kind == 3:
                changed[at:at] = chance.randbytes(chance.choice([1, 2, 4, 100]))
            elif kind == 4:
                changed[at : at + 4] = chance.choice(
                    [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\1\0"]
                )
            else:
                changed[at:at] = changed[at : at + chance.choice([4, 40, 400])]
        if chance.random() < 0.1:
            del changed[chance.randrange(len(changed) + 1) :]
        return bytes(changed)

    def _number(self) -> str:
        chance = self._random
        return chance.choice(["NaN", "1e400", "-0", "0.", ".5", "5e-324", "1" * 30, "0x1", f"{chance.uniform(-1, 2)}"])


def with_checksums(data: bytes) -> bytes:
    """A PNG's chunks with the checksums of what is in them now."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        parts.append(chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts) + data[at:]


def fuzz(function: Any, seed: int, requests: int) -> None:
    """Ask, and check that no answer is a defect and that memory stays flat."""
    mutator = Mutator(seed)
    counts: Counter[int] = Counter()
    slowest, warm = 0.0, 0
    for number in range(requests):
        if number == requests // 4:
            warm = resident_bytes() or 0
        sent, content_type = mutator.request()
        started = time.perf_counter()
        counts[check(function, sent, content_type).status] += 1
        slowest = max(slowest, time.perf_counter() - started)
    grown = (resident_bytes() or 0) - warm
    print(
        f"\n{requests} requests: {dict(counts)}, slowest {slowest:.2f} s, memory {warm / 1e6:.0f} {grown / 1e6:+.1f} MB"
    )
    assert counts[200] > requests / 20, "chance damages too much"
    assert counts[400] > requests / 4, "chance damages too little"
    assert grown < LEAK_BYTES


class TestFuzz:
    def test_some(self, function: Any) -> None:
        fuzz(function, 1, QUICK_REQUESTS)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_many(self, function: Any) -> None:
        fuzz(function, 2, SLOW_REQUESTS)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_memory_is_flat_after_good_requests(self, function: Any) -> None:
        sent = [body(make()) for name, make in GOOD_PICTURES.items() if "more rows" not in name]
        resident = []
        for number in range(2_500):
            assert check(function, sent[number % len(sent)]).status == 200
            if number in (500, 1500, 2499):
                resident.append(resident_bytes() or 0)
        print("\nMemory after 500, 1500 and 2500 requests: " + ", ".join(f"{one / 1e6:.1f} MB" for one in resident))
        assert resident[2] - resident[0] < LEAK_BYTES / 4

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    )

    @pytest.mark.slow
    @settings(
        max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        image=JSON | st.binary(max_size=60).map(text), threshold=JSON, more=st.dictionaries(st.text(), JSON, max_size=2)
    )
    def test_any_json(self, function: Any, image: Any, threshold: Any, more: dict[str, Any]) -> None:
        check(function, json.dumps({**more, "image": image, "threshold": threshold}).encode())

    @settings(
        max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(sent=st.binary(max_size=200), content_type=st.sampled_from(["application/json", "text/plain", ""]))
    def test_any_bytes(self, function: Any, sent: bytes, content_type: str) -> None:
        assert check(function, sent, content_type).status == 400
