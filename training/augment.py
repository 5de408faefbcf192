"""Turning, mirroring and tilting batches of panoramas on the device, in which the encoded normals turn along.

A roll of the columns alone would show a scan whose walls face the wrong way. Rolling by k columns moves every surface
by the azimuth direction · 2πk/W, so its normal turns about the vertical axis by the same angle. Reversing the columns
mirrors the scene at the vertical plane through the azimuth of column 0, and with it (nx, ny). No-returns stay black.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sscloud.errors import ConfigError
from sscloud.frame import Azimuth
from sscloud.image import NO_RETURN_BELOW, Encoding
from sscloud.labels import VOID
from training.batch import Batch

_MOST_WEIGHT = 0.499
"""Of the farther of two columns: below a half, so that not even opposite normals cancel out."""

_LEAST_LENGTH = 1e-3
"""Of a sum of normals that still has a direction."""

_ANY_AZIMUTH = Azimuth(direction=1, column_0=0.0)
"""For colours, which no azimuth changes."""


class Augment:
    """Random yaw over the full turn, mirrored half of the time, and tilted where that is asked for.

    Of a batch's draws, column 0 is the yaw, 1 whether to mirror, 2 the angle and 3 the axis of the tilt.

    Whole panoramas turn by fractions of a column, or by whole ones when they are tilted too: that resamples them
    anyway, and twice would blur. Crops lack the columns that would come in from the side: the scene is turned with the
    window on it, by whole columns, so that normals and origins change but no pixel moves. They are not tilted.

    Args:
        encoding: of the images; of colours only the pixels move.
        azimuth: how columns relate to directions; colours need none.
        elevation: of the top and bottom edge of whole panoramas, degrees.
        tilt: the largest, degrees.

    Raises:
        ConfigError: normals without an azimuth.
    """

    def __init__(
        self, *, encoding: Encoding, azimuth: Azimuth | None, elevation: tuple[float, float], tilt: float
    ) -> None:
        if encoding == "normals" and azimuth is None:
            raise ConfigError(
                "Normals cannot be turned without knowing how columns relate to directions. State the azimuth in "
                "dataset.yaml, or leave augmentation out."
            )
        self._azimuth = azimuth if encoding == "normals" else None
        self._elevation = elevation
        self._tilt = math.radians(tilt)

    def __call__(self, batch: Batch) -> Batch:
        """Augment every item by its own draws."""
        columns = batch.draws[:, 0] * batch.whole_hw[1]
        which = batch.draws[:, 1] < 0.5
        if batch.is_cropped:
            return self._crops(batch, columns.floor(), which)
        if self._tilt > 0:
            columns = columns.floor()
        images, class_maps = yaw(batch.images, batch.class_maps, columns, self._azimuth)
        images, class_maps = mirror(images, class_maps, which, self._azimuth)
        if self._tilt > 0:
            angles = torch.stack([(batch.draws[:, 2] * 2 - 1) * self._tilt, batch.draws[:, 3] * 2 * math.pi], 1)
            images, class_maps = tilt(images, class_maps, angles, self._azimuth, self._elevation)
        return batch._replace(images=images, class_maps=class_maps)

    def _crops(self, batch: Batch, columns: Tensor, which: Tensor) -> Batch:
        images, whole_width = batch.images, batch.whole_hw[1]
        if self._azimuth is not None:
            images = _rotate(images, _angle(columns, whole_width, self._azimuth)[:, None, None])
        images, class_maps = mirror(images, batch.class_maps, which, self._azimuth)
        left = batch.origins[:, 1] + columns
        left = torch.where(which, -(left + images.shape[3]), left).remainder(whole_width)
        origins = torch.stack([batch.origins[:, 0], left], 1)
        return batch._replace(images=images, class_maps=class_maps, origins=origins)


def yaw(images: Tensor, class_maps: Tensor, columns: Tensor, azimuth: Azimuth | None) -> tuple[Tensor, Tensor]:
    """The same scans by a scanner turned about its axis.

    Between two columns returns are averaged, weighed by their distance, and given their unit length back; where the
    nearer pixel is a no-return the result is that pixel.

    Args:
        images: (N, 3, H, W) float32 whole panoramas, 0 to 1.
        class_maps: (N, H, W) uint8; nearest column.
        columns: (N,) float32, how far each picture moves to the right.
        azimuth: how columns relate to directions; None for colours, of which only the pixels move.

    Returns:
        Images and class maps of the same shapes.
    """
    width = images.shape[3]
    whole = columns.round()
    rest = columns - whole
    near = (torch.arange(width, device=images.device) - whole.long()[:, None]).remainder(width)
    far = (near - torch.where(rest < 0, -1, 1)[:, None]).remainder(width)
    weight = rest.abs().clamp(max=_MOST_WEIGHT)[:, None, None, None]
    nearer, farther = _take(images, near), _take(images, far)
    if azimuth is not None:
        weight = weight * _returned(farther)
    blended = torch.lerp(nearer, farther, weight)
    if azimuth is not None:
        angle = _angle(columns, width, azimuth)[:, None, None]
        blended = torch.lerp(nearer, _encode(_turn(_half(_decode(blended)), angle)), _returned(nearer))
    return blended, _take(class_maps[:, None], near)[:, 0]


def mirror(images: Tensor, class_maps: Tensor, which: Tensor, azimuth: Azimuth | None) -> tuple[Tensor, Tensor]:
    """The mirrored scenes: columns reversed, normals reflected at the vertical plane through the azimuth of column 0.

    Args:
        images: (N, 3, h, w) float32, 0 to 1; panoramas, or crops, which the plane then moves elsewhere.
        class_maps: (N, h, w) uint8.
        which: (N,) bool, the ones to mirror.
        azimuth: how columns relate to directions; None for colours, of which only the pixels move.

    Returns:
        Images and class maps of the same shapes.
    """
    reflected = images
    if azimuth is not None:
        double = 2 * math.radians(azimuth.column_0)
        x, y, z = _decode(images).unbind(1)
        there = [math.cos(double) * x + math.sin(double) * y, math.sin(double) * x - math.cos(double) * y, z]
        reflected = torch.lerp(images, _encode(torch.stack(there, 1)), _returned(images))
    return (
        torch.lerp(images, reflected.flip(3), which.float()[:, None, None, None]),
        torch.where(which[:, None, None], class_maps.flip(2), class_maps),
    )


def tilt(
    images: Tensor,
    class_maps: Tensor,
    angles: Tensor,
    azimuth: Azimuth | None,
    elevation: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The same scans by a scanner that does not stand upright: a rotation of the sphere about a horizontal axis.

    Returns are interpolated bilinearly among returns and given their unit length back; where the nearest pixel is a
    no-return, or lies outside the elevation range, the result is black. Classes are those of the nearest pixel, void
    outside the range.

    Args:
        images: (N, 3, H, W) float32 whole panoramas, 0 to 1.
        class_maps: (N, H, W) uint8.
        angles: (N, 2) float32: how far the scene is rotated, and the azimuth of the axis, radians.
        azimuth: how columns relate to directions; None for colours, of which only the pixels move.
        elevation: of the top and bottom edge, degrees.

    Returns:
        Images and class maps of the same shapes.
    """
    rotation = _about_horizontal(angles)
    grid, inside = _sources(images, rotation, azimuth or _ANY_AZIMUTH, elevation)
    valid = torch.ones_like(images[:, :1]) if azimuth is None else _returned(images)
    nearest = _sample(torch.cat([class_maps[:, None].float(), valid], 1), grid, "nearest")
    classes = torch.where(inside, nearest[:, 0], VOID).to(class_maps.dtype)
    returned = (nearest[:, 1] * inside)[:, None]
    if azimuth is None:
        return _sample(images, grid, "bilinear") * returned, classes
    normals = _sample(_decode(images) * valid, grid, "bilinear")
    returned *= _length(normals) > _LEAST_LENGTH
    return _encode(_apply(rotation, _half(normals))) * returned, classes


def to_view_frame(images: Tensor, origins: Tensor, whole_hw: tuple[int, int], azimuth: Azimuth) -> Tensor:
    """`sscloud.frame.to_view_frame` of a batch, whose images may be crops.

    Args:
        images: (N, 3, h, w) float32 encoded normals, 0 to 1; no-returns stay as they are.
        origins: (N, 2) float32, as of `Batch`; a crop may go over the seam.
        whole_hw: size of the whole panoramas.
        azimuth: how their columns relate to directions.

    Returns:
        (N, 3, h, w) float32.
    """
    columns = origins[:, 1:] + 0.5 + torch.arange(images.shape[3], device=images.device)
    angle = math.radians(azimuth.column_0) + _angle(columns, whole_hw[1], azimuth)
    return _rotate(images, -angle[:, None])


def _angle(columns: Tensor, whole_width: int, azimuth: Azimuth) -> Tensor:
    """The azimuth, radians, that so many columns span."""
    return columns * (azimuth.direction * 2 * math.pi / whole_width)


def _take(images: Tensor, columns: Tensor) -> Tensor:
    """(N, C, H, W) at (N, W) columns of each."""
    return images.gather(3, columns[:, None, None].expand(*images.shape[:3], -1))


def _returned(images: Tensor) -> Tensor:
    """(N, 1, h, w) float32: 0 where `sscloud.image.no_return`, else 1. A weight: `where` is ten times slower."""
    return (images.amax(1, keepdim=True) > (NO_RETURN_BELOW - 0.5) / 255).float()


def _decode(images: Tensor) -> Tensor:
    """Normals of half a unit's length: all that is done to them is linear, or gives them their length back."""
    return images - 0.5


def _encode(halves: Tensor) -> Tensor:
    return (halves + 0.5).clamp_(0, 1)


def _length(vectors: Tensor) -> Tensor:
    """(N, 3, h, w) → (N, 1, h, w). By hand: a norm over this axis takes a hundred times as long on a CPU."""
    x, y, z = vectors.unbind(1)
    return (x * x + y * y + z * z).sqrt()[:, None]


def _half(vectors: Tensor) -> Tensor:
    """Vectors of half a unit's length."""
    return vectors * (0.5 / _length(vectors).clamp_(min=1e-6))


def _turn(normals: Tensor, angle: Tensor) -> Tensor:
    """(N, 3, h, w) vectors rotated about the vertical axis by an angle that broadcasts to (N, h, w)."""
    cosine, sine = angle.cos(), angle.sin()
    x, y, z = normals.unbind(1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y, z], 1)


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(N, 3, 3) times (N, 3, h, w). By hand: a product of matrices would lose precision under autocast."""
    x, y, z = vectors.unbind(1)
    rows = [row.unbind(1) for row in matrices[..., None, None].unbind(1)]
    return torch.stack([a * x + b * y + c * z for a, b, c in rows], 1)


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Encoded normals rotated about the vertical axis where there is a return; no pixel moves."""
    return torch.lerp(images, _encode(_turn(_decode(images), angle)), _returned(images))


def _about_horizontal(angles: Tensor) -> Tensor:
    """(N, 2) angle and azimuth of a horizontal axis → (N, 3, 3) rotations (Rodrigues' formula)."""
    cosine, sine = angles[:, 0].cos(), angles[:, 0].sin()
    x, y, zero = angles[:, 1].cos(), angles[:, 1].sin(), torch.zeros_like(cosine)
    rows = [
        [cosine + x * x * (1 - cosine), x * y * (1 - cosine), y * sine],
        [x * y * (1 - cosine), cosine + y * y * (1 - cosine), -x * sine],
        [-y * sine, x * sine, cosine + zero],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _sources(
    images: Tensor, rotation: Tensor, azimuth: Azimuth, elevation: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Where each pixel of the rotated sphere comes from.

    Returns:
        (N, H, W, 2) column and row for `_sample`, and (N, H, W) bool: whether that is inside the elevation range.
    """
    height, width = images.shape[2:]
    top, bottom = math.radians(elevation[0]), math.radians(elevation[1])
    column = torch.arange(width, device=images.device) + 0.5
    azimuths = math.radians(azimuth.column_0) + _angle(column, width, azimuth)
    elevations = top - (torch.arange(height, device=images.device) + 0.5)[:, None] * ((top - bottom) / height)
    level = elevations.cos().expand(height, width)
    directions = torch.stack([level * azimuths.cos(), level * azimuths.sin(), elevations.sin().expand(height, width)])
    x, y, z = _apply(rotation.mT, directions[None]).unbind(1)  # transposed: the inverse of a rotation
    turns = azimuth.direction * (torch.atan2(y, x) - math.radians(azimuth.column_0)) / (2 * math.pi)
    rows = (top - z.clamp(-1, 1).asin()) / (top - bottom)
    # Over one column more on each side, as `_sample` has them; from -1 to 1 between the outer edges.
    columns = (turns.remainder(1) * width + 1) / (width + 2)
    return torch.stack([columns, rows], 3) * 2 - 1, (rows >= 0) & (rows <= 1)


def _sample(images: Tensor, grid: Tensor, mode: str) -> Tensor:
    """(N, C, H, W) panoramas at the places of `_sources`; columns wrap, rows do not."""
    wrapped = F.pad(images, (1, 1, 0, 0), mode="circular")
    return F.grid_sample(wrapped, grid, mode=mode, padding_mode="border", align_corners=False)
