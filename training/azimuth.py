"""How columns of panoramas relate to directions, found from the normals: a visible surface faces the scanner.

For the viewing direction d of a pixel its normal n has n·d <= 0 under the right convention. With a normal (nx, ny, nz)
seen at elevation e in a column that lies θ from the left edge, n·d is

    Re((p + iq) · exp(-i · column_0)) + nz · sin e,    p + iq = cos e · (nx + i·ny) · exp(-i · direction · θ)

so one product of matrices gives n·d of all pixels for all angles of column 0. What is above zero counts against the
convention. Around the right angle nothing counts against several: surfaces seen at a grazing angle are few. The middle
between the angles at which violations begin on either side is what is taken.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import DatasetError
from sscloud.frame import Azimuth
from sscloud.image import no_return

_STEP = 0.5
"""Degrees between the angles of column 0 that are tried."""

_PIXELS = 8000
"""Looked at in each panorama."""

_LEAST_PIXELS = 500
"""With which anything can be said, of all panoramas."""

_LENGTHS = (0.8, 1.2)
"""Of an encoded vector that passes for a unit normal."""

_ALIKE = 0.9
"""Cosine between normals of neighbours on one surface. Where surfaces meet, scaling and JPEG mix their normals."""

_FACING = 0.1
"""n·d up to which a normal faces the scanner but for noise."""

_UPRIGHT = 0.3
"""Horizontal part of normal and viewing direction, above which azimuths tell whether the normal faces the scanner."""

_SHARE = 0.95
"""Of the pixels that face the scanner, if the normals are what is expected."""

_SHARE_OF_ONE = 0.9
"""The same, for each panorama under what all of them have in common."""

_WORSE, _WORSE_BY = 3.0, 0.002
"""Mean violation of the second direction at least, as a multiple of the first's and on top of it."""

_NEAR, _NEAR_BY = 1.5, 0.0005
"""Mean violation up to which an angle is as good as the best one, in the same way."""

_WIDEST = 110.0
"""Degrees of column 0 that may be as good as the best; a square room seen from its middle leaves 90 and some noise."""

_SNAP, _SNAP_LEAST = 15.0, 7.5
"""Degrees from a quarter turn within which column 0 is one: with one panorama, and with many."""

_SHOWN = 5


class UndecidedError(DatasetError):
    """The data does not tell how columns relate to directions."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"The azimuth convention cannot be found from the normals: {found}. State it in dataset.yaml, for example "
            "azimuth: {direction: 1, column_0: 0.0}; direction is 1 where the azimuth grows from left to right, "
            "column_0 the azimuth of the left edge in degrees."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    """What the pixels say of one direction, for every angle of column 0."""

    violation: NDArray[np.float32]
    """(angles,) mean of max(0, n·d)."""
    share: NDArray[np.float32]
    """(angles,) of the pixels that face the scanner: of all or of the upright ones, whichever is less."""


_Curves = dict[Literal[1, -1], _Curve]


def find_azimuth(images: Iterable[NDArray[np.uint8]], elevation: tuple[float, float]) -> Azimuth:
    """The one convention under which the surfaces in all panoramas face the scanner.

    Column 0 comes out as a multiple of 90° where it is close to one, as it is in practice, and else rounded to 0.5°.

    Args:
        images: (h, w, 3) uint8, whole normals panoramas; small ones will do. Each is looked at once.
        elevation: of the top and bottom edge, degrees.

    Raises:
        UndecidedError: too few pixels with normals, normals that face the scanner under no convention or under
            several, or panoramas of different conventions.
    """
    seen, pixels = [], 0
    for image in images:
        vectors = _vectors(image, elevation)
        if len(vectors) > 0:
            pixels += len(vectors)
            seen.append(_curves(vectors[:: max(1, len(vectors) // _PIXELS)]))
    if pixels < _LEAST_PIXELS:
        raise UndecidedError(
            f"{pixels} pixels lie on a surface with unit normals, at least {_LEAST_PIXELS} are needed (if these are "
            "photographs, state encoding: rgb)"
        )
    joint: _Curves = {direction: _mean([curves[direction] for curves in seen]) for direction in (1, -1)}
    first, second = sorted(joint, key=lambda direction: joint[direction].violation.min())
    best = joint[first]
    at = int(best.violation.argmin())
    _check_facing(seen, best, first, at)
    least, other = float(best.violation[at]), float(joint[second].violation.min())
    if other < _WORSE * least + _WORSE_BY:
        raise UndecidedError(
            "surfaces face the scanner whether the azimuth grows to the right or to the left (they point away by "
            f"{least:.4f} and {other:.4f} on average)"
        )
    return Azimuth(direction=first, column_0=_column_0(best.violation, panoramas=len(seen)))


def facing_share(image: NDArray[np.uint8], azimuth: Azimuth, elevation: tuple[float, float]) -> float:
    """Share of a panorama's normals that face the scanner, but for noise: near 1 under the right convention.

    Of those on surfaces that stand upright: flat ground faces the scanner under any.

    Args:
        image: (h, w, 3) uint8, a whole normals panorama.
        azimuth: how columns relate to directions.
        elevation: of the top and bottom edge, degrees.

    Returns:
        0 to 1; 1 where no pixel tells.
    """
    vectors = _vectors(image, elevation)
    vectors = vectors[_is_upright(vectors)]
    if len(vectors) == 0:
        return 1.0
    facing = _toward(vectors, azimuth.direction) @ _angles(np.array([azimuth.column_0]))
    return float((facing <= _FACING).mean())


def _vectors(image: NDArray[np.uint8], elevation: tuple[float, float]) -> NDArray[np.complex64]:
    """(n, 3) of the pixels on surfaces: cos e · (nx + i·ny), exp(iθ), nz · sin e."""
    height, width = image.shape[:2]
    normals = image.astype(np.float32) / np.float32(127.5) - 1
    length = np.sqrt((normals**2).sum(axis=2))
    normals /= np.maximum(length, 1e-6)[..., None]
    use = ~no_return(image) & (length > _LENGTHS[0]) & (length < _LENGTHS[1])
    use = use & _is_smooth(normals, use)
    top, bottom = elevation
    rows = np.radians(top - (np.arange(height) + 0.5) * ((top - bottom) / height))[:, None]
    turn = np.exp(2j * np.pi * (np.arange(width) + 0.5) / width)
    horizontal = np.cos(rows) * (normals[..., 0] + 1j * normals[..., 1])
    columns = np.broadcast_to(turn, use.shape)
    return np.stack([horizontal[use], columns[use], (np.sin(rows) * normals[..., 2])[use]], 1).astype(np.complex64)


def _is_smooth(normals: NDArray[np.float32], use: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(h, w) bool: pixels whose four neighbours are used and have nearly the same normal; the seam has neighbours."""
    smooth = np.ones(use.shape, bool)
    smooth[[0, -1]] = False
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        smooth &= np.roll(use, step, axis)
        smooth &= np.einsum("yxc,yxc->yx", normals, np.roll(normals, step, axis)) > _ALIKE
    return smooth


def _is_upright(vectors: NDArray[np.complex64]) -> NDArray[np.bool_]:
    """(n,) bool: which of `_vectors` tell azimuths apart."""
    upright: NDArray[np.bool_] = np.abs(vectors[:, 0]) > _UPRIGHT
    return upright


def _toward(vectors: NDArray[np.complex64], direction: Literal[1, -1]) -> NDArray[np.float32]:
    """(n, 3) of which the product with `_angles` is n·d."""
    horizontal, turn, vertical = vectors.T
    turned = horizontal * (turn.conj() if direction == 1 else turn)
    return np.stack([turned.real, turned.imag, vertical.real], 1)


def _angles(degrees: NDArray[np.float64]) -> NDArray[np.float32]:
    """(3, angles): what `_toward` is multiplied by for each angle of column 0."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians), np.ones_like(radians)]).astype(np.float32)


def _curves(vectors: NDArray[np.complex64]) -> _Curves:
    angles = _angles(np.arange(0, 360, _STEP))
    upright = _is_upright(vectors)
    curves: _Curves = {}
    for direction in (1, -1):
        facing = _toward(vectors, direction) @ angles
        share = (facing <= _FACING).mean(axis=0, dtype=np.float32)
        if upright.any():
            share = np.minimum(share, (facing[upright] <= _FACING).mean(axis=0, dtype=np.float32))
        curves[direction] = _Curve(violation=np.maximum(facing, 0).mean(axis=0), share=share)
    return curves


def _mean(curves: list[_Curve]) -> _Curve:
    """Of panoramas, each of which counts the same."""
    return _Curve(
        violation=np.mean([curve.violation for curve in curves], axis=0),
        share=np.mean([curve.share for curve in curves], axis=0),
    )


def _check_facing(seen: list[_Curves], best: _Curve, direction: Literal[1, -1], at: int) -> None:
    """Raise when too few surfaces face the scanner at the best angle, in one of the panoramas or in all."""
    shares = [float(curves[direction].share[at]) for curves in seen]
    if best.share[at] >= _SHARE and min(shares) >= _SHARE_OF_ONE:
        return
    own = [min(curves.values(), key=lambda curve: float(curve.violation.min())) for curves in seen]
    alone = [int(curve.violation.argmin()) for curve in own]
    if len(seen) > 1 and all(curve.share[place] >= _SHARE for curve, place in zip(own, alone, strict=True)):
        degrees = ", ".join(f"{place * _STEP:g}°" for place in alone[:_SHOWN])
        raise UndecidedError(
            f"the panoramas disagree; alone, column 0 would be at {degrees}{', …' if len(alone) > _SHOWN else ''} "
            "(normals in the frame of the site have to be turned into that of each scanner first)"
        )
    raise UndecidedError(
        f"at best {best.share[at]:.0%} of the normals face the scanner, {min(shares):.0%} in the worst panorama, at "
        f"least {_SHARE:.0%} and {_SHARE_OF_ONE:.0%} are expected (normals may point into the surfaces, or be in "
        "another frame)"
    )


def _column_0(violation: NDArray[np.float32], *, panoramas: int) -> float:
    """The middle of the angles that are as good as the best one, degrees from 0 to below 360."""
    count, at = len(violation), int(violation.argmin())
    good = violation <= _NEAR * float(violation[at]) + _NEAR_BY
    after = next((step for step in range(count) if not good[(at + step) % count]), count)
    before = next((step for step in range(count) if not good[(at - step) % count]), count)
    if (after + before - 2) * _STEP > _WIDEST:
        width = min((after + before - 2) * _STEP, 360)
        raise UndecidedError(f"surfaces face the scanner for column 0 anywhere in a range of {width:g}°")
    middle = (at + (after - before) / 2) * _STEP
    quarter = 90.0 * round(middle / 90)
    off = abs(middle - quarter)
    if off <= max(_SNAP_LEAST, _SNAP / np.sqrt(panoramas)):
        return quarter % 360
    if off <= (after + before - 2) / 2 * _STEP:
        raise UndecidedError(
            f"column 0 is near {middle % 360:g}°, but {quarter % 360:g}° would do as well; more panoramas may tell"
        )
    return float(np.floor(middle / _STEP + 0.5) * _STEP % 360)
