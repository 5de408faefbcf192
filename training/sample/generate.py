"""Writes data sets of synthetic panoramas, in the layout people have: imgs/, masks/, labels.yaml."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from tqdm import tqdm

from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from training.sample.scanner import Scan, Scanner
from training.sample.scene import KINDS, build_scene

MIN_WIDTH = 64
MAX_WIDTH = 8192
MAX_HEIGHT = 4096
JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paths:
    """Where one panorama goes."""

    image: Path
    mask: Path


def panorama_size(width: int, elevation: tuple[float, float]) -> tuple[int, int]:
    """(H, W) of a panorama with square pixels at the horizon; a full sphere has W = 2H exactly.

    Args:
        width: pixels, even, from MIN_WIDTH to MAX_WIDTH.
        elevation: top and bottom, degrees, 90 >= top > bottom >= -90.

    Raises:
        ConfigError: the width or the elevation is out of its range, or fewer than 16 rows are left.
    """
    top, bottom = elevation
    if width < MIN_WIDTH or width > MAX_WIDTH or width % 2:
        raise ConfigError(
            f"The width is {width} pixels; expected an even number from {MIN_WIDTH} to {MAX_WIDTH}. Change --width."
        )
    if not -90.0 <= bottom < top <= 90.0:
        raise ConfigError(
            f"The elevation runs from {top:g} to {bottom:g} degrees; expected 90 >= top > bottom >= -90. "
            "Give the top first: --elevation 90 -60."
        )
    height = 2 * round(width * (top - bottom) / 720)
    if height < 16:
        raise ConfigError(
            f"{width} pixels over {top - bottom:g} degrees of elevation leave {height} rows; expected 16 or more. "
            "Widen --elevation or raise --width."
        )
    return min(height, MAX_HEIGHT), width


def render(
    seed: int,
    index: int,
    *,
    width: int,
    elevation: tuple[float, float] = (90.0, -90.0),
    noise: bool = True,
    yaw: float = 0.0,
) -> Scan:
    """Renders one scene.

    Args:
        seed: of the data set, not negative.
        index: of the scene within it, not negative. The scene depends on seed and index only.
        width: pixels.
        elevation: top and bottom, degrees.
        noise: False gives exact normals and no drop-outs.
        yaw: turn of the scanner, degrees.

    Returns:
        The scan; the same arguments give the same bytes.

    Raises:
        ConfigError: the size cannot be had, see `panorama_size`, or seed or index is negative.
    """
    size_hw = panorama_size(width, elevation)
    if seed < 0 or index < 0:
        raise ConfigError(f"The seed is {seed} and the index {index}; expected 0 or more. Change --seed or --first.")
    # The height of the tripod comes from its own stream, so that scenes stay as they are when scanners change.
    height = float(np.random.default_rng((seed, index, 1)).uniform(1.6, 1.9))
    scanner = Scanner(height=height, yaw=yaw, elevation=elevation, range_noise=0.002 if noise else 0.0)
    # Kinds take turns, so that small data sets have them all.
    scene = build_scene((seed, index), kind=KINDS[(seed + index) % len(KINDS)])
    return scanner.scan(scene.mesh, size_hw=size_hw, seed=(seed, index, 2))


def generate(
    output: Path,
    *,
    count: int,
    seed: int,
    width: int = 2048,
    elevation: tuple[float, float] = (90.0, -90.0),
    archive: bool = False,
    first: int = 1,
    overwrite: bool = False,
) -> None:
    """Writes a data set: imgs/N_normals.jpg, masks/N_normals.png, labels.yaml, dataset.yaml.

    Panorama N shows scene (seed, N): a data set made in two goes with `first` equals one made in one. Interrupted work
    leaves whole pairs of an image and its mask.

    Args:
        output: folder; made if need be.
        count: panoramas.
        seed: not negative.
        width: pixels; see `panorama_size` for the height.
        elevation: top and bottom, degrees.
        archive: also write archives/labelme-3-0.zip and archives/cvat-for-images-1-1.zip of the same panoramas.
        first: number N of the first panorama.
        overwrite: write into a folder that is not empty; files of the same names are replaced, others stay.

    Raises:
        ConfigError: an argument is out of its range, or the folder is not empty.
    """
    panorama_size(width, elevation)
    if count < 1 or first < 1:
        raise ConfigError(
            f"The count is {count} and the first number {first}; expected 1 or more. Change --count or --first."
        )
    if seed < 0:
        raise ConfigError(f"The seed is {seed}; expected 0 or more. Change --seed.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; expected a folder. Name another place.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output} is not empty. Name another folder, or add --overwrite to write into it.")

    schema = LabelSchema.default()
    paths = {
        number: _Paths(
            image=output / "imgs" / f"{number}_normals.jpg",
            mask=output / "masks" / f"{number}_normals.png",
        )
        for number in range(first, first + count)
    }
    atomic_write(output / "labels.yaml", schema.to_yaml().encode())
    atomic_write(output / "dataset.yaml", _description(elevation).encode())
    for number, path in tqdm(paths.items(), desc="Scanning", unit="panorama", disable=None):
        scan = render(seed, number, width=width, elevation=elevation)
        _write_pair(path, encode_image(scan.image), _encode(Image.fromarray(scan.label_map), "PNG"))
    if archive:
        _write_archives(output / "archives", list(paths.values()), schema, overwrite=overwrite)


def _write_pair(path: _Paths, image: bytes, mask: bytes) -> None:
    path.image.unlink(missing_ok=True)  # never a new mask beside an old image
    try:
        atomic_write(path.mask, mask)
        atomic_write(path.image, image)
    except BaseException:
        if not path.image.exists():
            path.mask.unlink(missing_ok=True)
        raise


def encode_image(image: npt.NDArray[np.uint8]) -> bytes:
    """An image (H, W, 3) as JPEG, as people's panoramas are."""
    return _encode(Image.fromarray(image), "JPEG", quality=JPEG_QUALITY)


def _encode(picture: Image.Image, file_format: str, **options: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def _description(elevation: tuple[float, float]) -> str:
    scanner = Scanner(elevation=elevation)
    return yaml.safe_dump(
        {
            "encoding": "normals",
            "elevation": [float(angle) for angle in elevation],
            "azimuth": {"direction": scanner.direction, "column_0": scanner.column_0},
        },
        sort_keys=False,
    )


def _write_archives(folder: Path, paths: list[_Paths], schema: LabelSchema, *, overwrite: bool) -> None:
    from sscloud.image import read_label_map
    from training.sample.archives import ArchiveItem, write_cvat_for_images, write_labelme

    def items() -> Iterator[ArchiveItem]:
        for path in paths:
            yield ArchiveItem(
                name=path.image.name, image_jpeg=path.image.read_bytes(), label_map=read_label_map(path.mask)
            )

    write_labelme(folder / "labelme-3-0.zip", items(), schema=schema, overwrite=overwrite)
    write_cvat_for_images(folder / "cvat-for-images-1-1.zip", items(), schema=schema, overwrite=overwrite)
