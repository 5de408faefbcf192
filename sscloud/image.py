"""Bytes → arrays: pictures and label maps from outside, bounded in size, and scaled as the manifest says."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

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

RESAMPLE_VERSION = 1
"""Counts changes of what `resize_image` does, so that nothing scaled by an older rule is taken for current."""

_ORIENTATION = 0x0112
"""The EXIF tag; its values 5 to 8 swap the sides."""

Resample = Literal["bicubic", "valid-area"]
Encoding = Literal["normals", "rgb"]

T = TypeVar("T")


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a picture to (H, W, 3) uint8 RGB, turned upright as its EXIF says (CVAT shows it so).

    16-bit pictures keep their high byte; transparency is dropped.

    Raises:
        ImageError: no picture, a format not in `FORMATS`, broken or truncated, or more than `max_pixels`.
    """
    with _open(io.BytesIO(data), max_pixels) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            upright.info.pop("transparency", None)  # a palette's would only make Pillow warn
            if upright.mode.startswith("I;16") or upright.mode == "I":
                high_byte = (np.asarray(upright).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(high_byte[..., None], 3, axis=2)
            return np.array(upright.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise ImageError(f"The image is broken or truncated: {error}. Save or send it again.") from error


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


def image_size_of(data: bytes) -> tuple[int, int]:
    """`image_size` of a picture in memory; the error names no file.

    Raises:
        ImageError: no picture, or one over `MAX_PIXELS`.
    """
    return _size(io.BytesIO(data))


def _size(stream: IO[bytes]) -> tuple[int, int]:
    with _open(stream, MAX_PIXELS) as image:
        width, height = image.size
        # Asking a PNG for EXIF that its header does not announce would decode all of it.
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) >= 5
        return (width, height) if turned else (height, width)


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

    `bicubic` is Pillow's antialiased filter over all pixels, as milesial/Pytorch-UNet uses. `valid-area` averages the
    pixels with a return only and gives normals their unit length back; a target pixel less than half
    covered by returns is black, as the nearest pixel's label would mostly be. Colours are averaged over all pixels.
    """
    height, width = size_hw
    if resample == "bicubic":
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    if encoding == "rgb":
        # In colours black is a colour: shadow, asphalt.
        return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return _resize_valid(image, size_hw)


def resize_label_map(label_map: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale a (H, W) uint8 map by taking the nearest pixel → (h, w) uint8."""
    height, width = size_hw
    return np.array(Image.fromarray(label_map).resize((width, height), Image.Resampling.NEAREST))


def _resize_valid(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = size_hw
    valid = (~no_return(image)).astype(np.uint8)
    # Black pixels add nothing to an area average, so average · area / valid area is the mean over returns.
    # OpenCV averages uint8 in fixed point and rounds; 16 bits keep the precision at half of float32's memory.
    total = cv2.resize(
        (image * valid[..., None]).astype(np.uint16) << 8, (width, height), interpolation=cv2.INTER_AREA
    ).astype(np.float32)
    cover = cv2.resize(valid * np.uint16(1 << 15), (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    cover /= 1 << 15
    normals = total / 256 / np.maximum(cover, 1e-6)[..., None] / 127.5 - 1
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-6)
    encoded = (normals + 1) * 127.5
    encoded[cover < 0.5] = 0
    return np.rint(encoded).clip(0, 255).astype(np.uint8)


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
            f"The image is {width}x{height} = {width * height / 1e6:.0f} million pixels; at most "
            f"{max_pixels / 1e6:.0f} million are decoded. Scale it down."
        )
    return image


def _named(path: Path, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
