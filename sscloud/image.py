"""Bytes → arrays: pictures and label maps from outside, bounded in size, and scaled as the manifest says."""

import io
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, TypeVar

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from sscloud.errors import ImageError
from sscloud.files import atomic_write

MAX_PIXELS = 16384 * 8192
"""The largest picture that is decoded: four times the largest panorama scanners write (8192x4096)."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")

NO_RETURN_BELOW = 28
"""A pixel whose brightest channel is below this is a no-return.

The brightest channel of an encoded unit normal is at least (1 - 1/√3) / 2 * 255 = 53.9, that of a no-return is 0;
the threshold lies half-way, which leaves room for JPEG noise on both sides."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"})
"""Endings of the pictures that are looked for in folders, lower case."""

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89478485)
"""What Pillow opens at all; bounds above it would have no effect."""

MAX_SCANS = 100
"""Most scans of a JPEG that is decoded: a progressive one has some ten, and each costs time whatever it holds."""

_FEW_SCANS, _SCANNED_PIXELS = 12, 1_600_000_000
"""Scans that a picture of any size may have; pixels of all scans together above that."""

RESAMPLE_VERSION = 2
"""Counts changes of what `resize_image` does, so that nothing scaled by an older rule is taken for current."""

_ORIENTATION = 0x0112
"""The EXIF tag; its values 5 to 8 swap the sides."""
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Text chunks that hold an orientation."""
_PNG_HEAD = 8 + max(map(len, _PNG_KEYWORDS))

_STRIP_ROWS = 256
"""Rows that Pillow's pictures are converted by: whole ones would be in memory three times over."""

_BLOCK_ROWS = 8
"""Target rows that `valid-area` makes at a time."""

_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""A JPEG's markers but for stuffed zeros, fill bytes and restarts (ITU-T T.81, B.1.1)."""
_BARE_MARKERS = (0x01, 0xD8)
"""Markers without a length and parameters: TEM, SOI."""

Resample = Literal["bicubic", "valid-area"]
Encoding = Literal["normals", "rgb"]

T = TypeVar("T")


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, least_hw: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode a picture to (H, W, 3) uint8 RGB, turned upright as its EXIF says (CVAT shows it so).

    16-bit pictures keep their high byte; transparency is dropped; of several frames or pages the first one counts.

    Args:
        data: the file's bytes.
        max_pixels: most pixels that are decoded, by the header.
        least_hw: decode a JPEG scaled down (by eighths, in the frequency domain) to no less than this size, which
            is faster, but what is scaled further from it loses small things: the classes with the fewest pixels
            suffer most. Other formats are decoded in full. `image_size_of` says how large the picture is.

    Raises:
        ImageError: no picture, a format not in `FORMATS`, broken or truncated, more than `max_pixels`, or a JPEG of
            more than `MAX_SCANS` scans (fewer where it is large).
    """
    with _open(io.BytesIO(data), max_pixels) as image:
        try:
            if image.format in ("JPEG", "MPO"):
                _check_scans(data, image.width * image.height)
                pixels = _decode_jpeg(data, image, least_hw)
                if pixels is not None:
                    return pixels
            # Pillow decides about everything unusual, and about what is too broken to be shown.
            image.load()
            image.info.pop("transparency", None)  # a palette's would only make Pillow warn
            return _upright(_to_rgb(image), _orientation(image))
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise _broken(error) from error


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """`decode_image` of a file; the error names it."""
    return _named(path, lambda data: decode_image(data, max_pixels=max_pixels))


def read_label_map(path: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read a mask: a single-channel 8-bit picture whose values (or palette indices) are label ids → (H, W) uint8.

    Raises:
        ImageError: unreadable, or a colour picture.
    """

    def decode(data: bytes) -> NDArray[np.uint8]:
        with _open(io.BytesIO(data), max_pixels) as image:
            if image.mode not in ("1", "L", "P"):
                raise ImageError(
                    f"it is a picture of mode {image.mode}, but a mask is 8-bit with one channel that holds label ids. "
                    "Convert it first (`sscloud convert` for CVAT's exports)"
                )
            try:
                return np.asarray(image).astype(np.uint8)  # of one bit: 0 and 1
            except Exception as error:
                raise ImageError(f"The mask is broken or truncated: {error}.") from error

    return _named(path, decode)


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of a picture as `read_image` would give it, from its header.

    Raises:
        ImageError: no picture, or one over `MAX_PIXELS`.
    """

    try:
        with path.open("rb") as stream:
            return _size(stream)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def image_size_of(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """`image_size` of a picture in memory; the error names no file.

    Raises:
        ImageError: no picture, or one over `max_pixels`.
    """
    return _size(io.BytesIO(data), max_pixels)


def _size(stream: IO[bytes], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    with _open(stream, max_pixels) as image:
        try:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # newer Pillows have turned the size already
                width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
            # Asking a PNG for EXIF that its header does not have would decode all of it, in search of some at the end.
            turned = (image.format != "PNG" or _may_be_turned(stream)) and _orientation(image) >= 5
        except Exception as error:  # EXIF that is none raises whatever it stumbles over
            raise _broken(error) from error
        return (width, height) if turned else (height, width)


def _may_be_turned(stream: IO[bytes]) -> bool:
    """Whether a PNG has a chunk, wherever it is, from which Pillow reads an orientation."""
    position = stream.tell()
    try:
        stream.seek(len(_PNG_SIGNATURE))
        while len(head := stream.read(_PNG_HEAD)) >= 8:
            if head[4:8] == b"eXIf" or head[8:].startswith(_PNG_KEYWORDS):
                return True
            stream.seek(int.from_bytes(head[:4], "big") + 12 - len(head), io.SEEK_CUR)
        return False
    finally:
        stream.seek(position)


def _broken(error: Exception) -> ImageError:
    return ImageError(f"The image is broken or truncated: {error}. Save or send it again.")


def encode_label_map(label_map: NDArray[np.uint8]) -> bytes:
    """A (H, W) uint8 label map as the bytes of a single-channel PNG."""
    buffer = io.BytesIO()
    Image.fromarray(label_map).save(buffer, "PNG")
    return buffer.getvalue()


def write_label_map(path: Path, label_map: NDArray[np.uint8]) -> None:
    """Write a (H, W) uint8 label map as a single-channel PNG, atomically."""
    atomic_write(path, encode_label_map(label_map))


def no_return(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(H, W) bool: where a normals panorama has no return (black, but for JPEG noise)."""
    brightest: NDArray[np.uint8] = np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])
    return brightest < NO_RETURN_BELOW


def scaled_size(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """(int(scale·H), int(scale·W)): the network's input size for an image of this size, as milesial/Pytorch-UNet."""
    return int(scale * size_hw[0]), int(scale * size_hw[1])


def resize_image(
    image: NDArray[np.uint8], size_hw: tuple[int, int], *, resample: Resample, encoding: Encoding
) -> NDArray[np.uint8]:
    """Scale an image to the network's input size → (h, w, 3) uint8.

    `bicubic` is Pillow's antialiased filter over all pixels, as milesial/Pytorch-UNet uses; of a picture wider than
    high, pixels differ from Pillow's by one grey level at most, but for one in a million.
    `valid-area` averages the pixels with a return only and gives normals their unit length back; a target pixel less
    than half covered by returns is black, as the nearest pixel's label would mostly be. Colours are averaged over all
    pixels.
    """
    height, width = size_hw
    if resample == "bicubic":
        return _resize_bicubic(image, size_hw)
    if encoding == "rgb":
        # In colours black is a colour: shadow, asphalt.
        return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return _resize_valid(image, size_hw)


def resize_label_map(label_map: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale a (H, W) uint8 map by taking the nearest pixel → (h, w) uint8."""
    height, width = size_hw
    return np.array(Image.fromarray(label_map).resize((width, height), Image.Resampling.NEAREST))


def _resize_bicubic(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    # What trains or runs a network with PyTorch has it loaded; a function that runs it by OpenVINO must not load it.
    if sys.modules.get("torch") is None:
        return np.array(Image.fromarray(image).resize(size_hw[::-1], Image.Resampling.BICUBIC))
    import torch
    from torch.nn import functional as F

    # It has Pillow's filter for bytes with vector instructions: ten times faster.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = F.interpolate(pixels, size=size_hw, mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).contiguous().numpy()


def _resize_valid(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Average the returns of each target pixel's area; first down the columns, then along the rows.

    In blocks of target rows, so that everything between the picture and the result stays in the processor's cache.
    """
    height, width = size_hw
    result = np.empty((height, width, 3), np.uint8)
    total = np.empty((_BLOCK_ROWS, image.shape[1], 3), np.float32)
    cover = np.empty((_BLOCK_ROWS, image.shape[1]), np.float32)
    for top in range(0, height, _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, height - top)
        for row in range(rows):
            _sum_returns(image, height, top + row, total[row], cover[row])
        average = cv2.resize(total[:rows], (width, rows), interpolation=cv2.INTER_AREA)
        # A width of one would lose its axis of channels or columns.
        covered = cv2.resize(cover[:rows], (width, rows), interpolation=cv2.INTER_AREA).reshape(rows, width, 1)
        normals = average.reshape(rows, width, 3) / np.maximum(covered, 1e-6) / 127.5 - 1
        normals /= np.maximum(np.sqrt(np.einsum("yxc,yxc->yx", normals, normals))[..., None], 1e-6)
        encoded = np.rint((normals + 1) * 127.5).clip(0, 255)
        # Half covered is covered, however the weights of ten rows in float32 add up.
        result[top : top + rows] = np.where(covered < 0.5 - 2**-16, 0, encoded)
    return result


def _sum_returns(
    image: NDArray[np.uint8], height: int, row: int, total: NDArray[np.float32], cover: NDArray[np.float32]
) -> None:
    """Average the rows of an image that lie in one of `height` equal parts; the edge rows count by their share.

    Args:
        image: (H, W, 3) normals.
        height: parts.
        row: which of them.
        total: filled in, (W, 3): the average with 0 for no-returns.
        cover: filled in, (W,): the share of returns, 0 to 1.
    """
    start, stop = row * image.shape[0] / height, (row + 1) * image.shape[0] / height
    first, last = math.floor(start), min(image.shape[0], math.ceil(stop - 1e-6))
    weights = np.ones(last - first)
    weights[0] -= start - first
    weights[-1] -= last - stop
    weights = (weights / weights.sum()).astype(np.float32)
    strip = image[first:last]
    # Of a grey picture of the bright channels, a pixel is above 0 where one of its three channels is bright.
    bright = cv2.threshold(strip, NO_RETURN_BELOW - 1, 255, cv2.THRESH_BINARY)[1]
    valid = cv2.threshold(cv2.cvtColor(bright, cv2.COLOR_RGB2GRAY), 0, 1, cv2.THRESH_BINARY)[1]
    returns = cv2.copyTo(strip, valid)
    np.matmul(weights, returns.reshape(len(weights), -1).astype(np.float32), out=total.reshape(-1))
    np.matmul(weights, valid.astype(np.float32), out=cover)


def _decode_jpeg(data: bytes, image: Image.Image, least_hw: tuple[int, int] | None) -> NDArray[np.uint8] | None:
    """Decode an ordinary JPEG with libjpeg-turbo's own interface, to Pillow's pixels in a third of its time.

    Returns:
        (H, W, 3) uint8, or None for what Pillow shall decode: other colours, and whatever is the least damaged.
    """
    orientation = _orientation(image)
    least_height, least_width = (0, 0) if least_hw is None else least_hw[::-1] if orientation >= 5 else least_hw
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != image.size or colours not in ("YCbCr", "Gray"):
            return None
        pixels = simplejpeg.decode_jpeg(data, min_height=least_height, min_width=least_width)
    except ValueError:  # it counts warnings as errors
        return None
    return _upright(pixels, orientation)


def _check_scans(data: bytes, pixels: int) -> None:
    """Raise ImageError for a JPEG of too many scans for its pixels: kilobytes of them take minutes."""
    most = min(MAX_SCANS, max(_FEW_SCANS, _SCANNED_PIXELS // pixels))
    if data.count(_SCAN) <= most:  # as in every ordinary file; the rest may be metadata or what follows the end
        return
    position = scans = 0
    while found := _MARKER.search(data, position):
        code, position = found[1][0], found.end()
        if code == 0xD9:  # the end
            break
        if code not in _BARE_MARKERS:
            position += int.from_bytes(data[position : position + 2], "big")
        scans += code == _SCAN[1]
        if scans > most:
            raise ImageError(
                f"The image is a JPEG of more than {most} scans, which nobody needs and which take too long. "
                "Save it again."
            )


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation (EXIF 2.32, 4.6.4): 1 is upright, values from 5 on swap the sides."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP_ROWS):
        strip = image.crop((0, top, width, min(height, top + _STRIP_ROWS)))
        if strip.mode.startswith("I;16") or strip.mode == "I":
            high_byte = (np.asarray(strip).astype(np.uint32) >> 8).clip(0, 255)
            pixels[top : top + _STRIP_ROWS] = high_byte[..., None]
        else:
            pixels[top : top + _STRIP_ROWS] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels


def _open(stream: IO[bytes], max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures by a bound of its own; ours is checked below, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"The image is too large: {error}") from error
    except Exception as error:
        raise ImageError(
            f"These {stream.seek(0, io.SEEK_END)} bytes are not a picture that can be read "
            f"({', '.join(FORMATS)} are understood)."
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"The image is {width}x{height} = {width * height / 1e6:.3g} million pixels; at most "
            f"{max_pixels / 1e6:.3g} million are decoded. Scale it down."
        )
    return image


def _named(path: Path, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
