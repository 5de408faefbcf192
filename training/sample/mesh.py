"""Triangles, and the solids that scenes are put together from.

Every maker is vectorised over many solids at once: a row of a hundred fence bars is one call. All lengths are in
metres, angles in radians, z points up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
FloatT = TypeVar("FloatT", np.float32, np.float64)

SOLID = 0
"""Plain surface: plaster, asphalt, wood."""
GLASS = 1
"""Gives no return, and hides what lies behind it."""
ROUGH = 2
"""Lawn and bare soil: normals vary from one hand's breadth to the next."""
GLOSS = 3
"""Car paint: returns get lost where the beam grazes it."""


class Surface(NamedTuple):
    """Triangles without meaning yet."""

    triangles: Floats
    """(N, 3, 3): vertices, then xyz."""
    normals: Floats
    """(N, 3, 3): unit normal at every vertex; equal at the three vertices of a flat triangle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Triangles that know what they are."""

    triangles: npt.NDArray[np.float32]
    """(N, 3, 3): vertices, then xyz, metres."""
    normals: npt.NDArray[np.float32]
    """(N, 3, 3): unit normal at every vertex."""
    labels: Bytes
    """(N,) label ids."""
    materials: Bytes
    """(N,) SOLID, GLASS, ROUGH or GLOSS."""


class MeshBuilder:
    """Collects surfaces and joins them into one mesh."""

    def __init__(self) -> None:
        self._surfaces: list[Surface] = []
        self._labels: list[Bytes] = []
        self._materials: list[Bytes] = []

    def add(self, surface: Surface, label: int, material: int | Bytes = SOLID) -> None:
        """Adds a surface; `material` is one for all triangles or an array (N,)."""
        count = len(surface.triangles)
        self._surfaces.append(surface)
        self._labels.append(np.full(count, label, np.uint8))
        self._materials.append(np.broadcast_to(np.asarray(material, np.uint8), (count,)))

    def build(self, *, origin: Floats, yaw: float) -> Mesh:
        """Joins everything, moved so that `origin` (3,) becomes (0, 0, 0), then turned by `yaw` about the vertical."""
        turn = rotation(np.asarray(yaw)).astype(np.float32).T
        triangles = np.concatenate([(surface.triangles - origin).astype(np.float32) for surface in self._surfaces])
        normals = np.concatenate([surface.normals.astype(np.float32) for surface in self._surfaces])
        return Mesh(
            triangles=(triangles.reshape(-1, 3) @ turn).reshape(-1, 3, 3),
            normals=(normals.reshape(-1, 3) @ turn).reshape(-1, 3, 3),
            labels=np.concatenate(self._labels),
            materials=np.concatenate(self._materials),
        )


def rotation(yaw: Floats) -> Floats:
    """Rotation matrices (..., 3, 3) about the vertical for `yaw` (...)."""
    yaw = np.asarray(yaw, np.float64)
    cos, sin, zero, one = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw), np.ones_like(yaw)
    rows = [np.stack([cos, -sin, zero], -1), np.stack([sin, cos, zero], -1), np.stack([zero, zero, one], -1)]
    return np.stack(rows, -2)


def unit(vectors: npt.NDArray[FloatT]) -> npt.NDArray[FloatT]:
    """Vectors (..., 3) scaled to length 1; zero vectors stay zero."""
    length = np.sqrt((vectors * vectors).sum(-1, keepdims=True))
    scaled: npt.NDArray[FloatT] = vectors / np.maximum(length, vectors.dtype.type(1e-12))
    return scaled


def join(surfaces: Sequence[Surface]) -> Surface:
    """One surface out of several."""
    return Surface(
        np.concatenate([surface.triangles for surface in surfaces]),
        np.concatenate([surface.normals for surface in surfaces]),
    )


def flat(triangles: Floats) -> Surface:
    """Triangles (..., 3, 3) with their own normals."""
    triangles = triangles.reshape(-1, 3, 3)
    edge, other = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    normals = unit(cross(edge, other))
    return Surface(triangles, np.repeat(normals[:, None], 3, axis=1))


def quads(corners: Floats) -> Surface:
    """Flat quadrilaterals (..., 4, 3), two triangles each, corners in order around."""
    corners = corners.reshape(-1, 4, 3)
    return flat(corners[:, [[0, 1, 2], [0, 2, 3]]])


_BOX_CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (0.0, 1.0)])
_BOX_FACES = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [1, 5, 7, 3], [0, 2, 6, 4]])


def boxes(bases: npt.ArrayLike, sizes: npt.ArrayLike, yaws: npt.ArrayLike = 0.0) -> Surface:
    """Upright boxes: middle of the bottom face (n, 3), size along own x, y, z (n, 3), yaw (n,); all broadcast."""
    bases, sizes = np.broadcast_arrays(np.atleast_2d(bases), np.atleast_2d(sizes))
    yaws = np.broadcast_to(np.asarray(yaws, np.float64), bases.shape[:1])
    corners = _BOX_CORNERS * sizes[:, None]
    corners = corners @ rotation(yaws).swapaxes(-1, -2) + bases[:, None]
    return quads(corners[:, _BOX_FACES])


def lattice(points: Floats, *, closed: bool = False, smooth: bool = True) -> Surface:
    """A sheet through points (R, C, 3); `closed` joins the last column to the first.

    The triangles of cell (r, c) are at 2 * (r * cells + c) and the next, where `cells` is C if closed, else C - 1.
    """
    if closed:
        points = np.concatenate([points, points[:, :1]], axis=1)
    rows, columns = points.shape[:2]
    cell = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = cell[:-1, :-1], cell[1:, :-1], cell[1:, 1:], cell[:-1, 1:]
    index = np.stack([np.stack([a, b, c], -1), np.stack([a, c, d], -1)], axis=2).reshape(-1, 3)
    triangles = points.reshape(-1, 3)[index]
    if not smooth:
        return flat(triangles)
    along = np.gradient(points, axis=0)
    if closed:
        around = np.concatenate([points[:, -2:-1], points, points[:, 1:2]], axis=1)
        across = (around[:, 2:] - around[:, :-2]) / 2
    else:
        across = np.gradient(points, axis=1)
    normals = unit(cross(along, across))
    return Surface(triangles, normals.reshape(-1, 3)[index])


def tubes(starts: npt.ArrayLike, ends: npt.ArrayLike, radii: npt.ArrayLike, *, sides: int = 8) -> Surface:
    """Round bars from starts (n, 3) to ends (n, 3), radii (n,), or (n, 2) for tapered ones; no caps."""
    starts, ends = np.broadcast_arrays(np.atleast_2d(starts), np.atleast_2d(ends))
    starts, ends = np.asarray(starts, np.float64), np.asarray(ends, np.float64)
    radii = np.asarray(radii, np.float64)
    radii = np.broadcast_to(radii[..., None] if radii.ndim < 2 else radii, (len(starts), 2))
    axis = unit(ends - starts)
    helper = np.where(np.abs(axis[:, 2:]) > 0.9, [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]])
    first = unit(cross(axis, helper))
    second = cross(axis, first)
    angle = np.arange(sides + 1) * (2 * np.pi / sides)
    spokes = np.cos(angle)[None, :, None] * first[:, None] + np.sin(angle)[None, :, None] * second[:, None]
    low = starts[:, None] + spokes * radii[:, :1, None]
    high = ends[:, None] + spokes * radii[:, 1:, None]
    one, two = slice(None, -1), slice(1, None)
    triangles = np.stack(
        [
            np.stack([low[:, one], low[:, two], high[:, two]], 2),
            np.stack([low[:, one], high[:, two], high[:, one]], 2),
        ],
        2,
    )
    here, there = spokes[:, one], spokes[:, two]
    normals = np.stack([np.stack([here, there, there], 2), np.stack([here, there, here], 2)], 2)
    return Surface(triangles.reshape(-1, 3, 3), normals.reshape(-1, 3, 3))


def chain(points: Floats, radii: npt.ArrayLike, *, sides: int = 8) -> Surface:
    """Bars along polylines (..., k, 3); radii broadcast to (..., k)."""
    radii = np.broadcast_to(np.asarray(radii, np.float64), points.shape[:-1])
    pair = np.stack([radii[..., :-1], radii[..., 1:]], -1).reshape(-1, 2)
    return tubes(points[..., :-1, :].reshape(-1, 3), points[..., 1:, :].reshape(-1, 3), pair, sides=sides)


def discs(centres: npt.ArrayLike, axes: npt.ArrayLike, radii: npt.ArrayLike, *, sides: int = 12) -> Surface:
    """Flat round plates: centres (n, 3), axes (n, 3), radii (n,)."""
    centres, axes = np.broadcast_arrays(np.atleast_2d(centres), np.atleast_2d(axes))
    axes = unit(np.asarray(axes, np.float64))
    helper = np.where(np.abs(axes[:, 2:]) > 0.9, [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]])
    first = unit(cross(axes, helper))
    second = cross(axes, first)
    angle = np.arange(sides + 1) * (2 * np.pi / sides)
    spokes = np.cos(angle)[None, :, None] * first[:, None] + np.sin(angle)[None, :, None] * second[:, None]
    rim = centres[:, None] + spokes * np.broadcast_to(np.asarray(radii, np.float64), centres.shape[:1])[:, None, None]
    middle = np.broadcast_to(centres[:, None], rim[:, 1:].shape)
    return flat(np.stack([middle, rim[:, :-1], rim[:, 1:]], 2))


def ellipsoids(centres: npt.ArrayLike, radii: npt.ArrayLike, *, rings: int = 7, sides: int = 10) -> Surface:
    """Upright ellipsoids: centres (n, 3), radii along x, y, z (n, 3)."""
    centres, radii = np.broadcast_arrays(np.atleast_2d(centres), np.atleast_2d(radii))
    polar = np.linspace(0, np.pi, rings)[:, None]
    angle = np.linspace(0, 2 * np.pi, sides + 1)[None]
    ball = np.stack([np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle), np.cos(polar) + 0 * angle], -1)
    sphere = lattice(ball).triangles
    triangles = sphere[None] * radii[:, None, None] + centres[:, None, None]
    normals = unit(sphere[None] / radii[:, None, None])
    return Surface(triangles.reshape(-1, 3, 3), normals.reshape(-1, 3, 3))


def scraps(rng: np.random.Generator, centres: Floats, size: npt.ArrayLike) -> Surface:
    """One randomly turned triangle about every centre (n, 3), `size` (n,) its radius: leaves."""
    corners = unit(rng.standard_normal((len(centres), 3, 3)))
    corners *= np.broadcast_to(np.asarray(size, np.float64), (len(centres),))[:, None, None]
    return flat(centres[:, None] + corners)


def cross(a: npt.NDArray[FloatT], b: npt.NDArray[FloatT]) -> npt.NDArray[FloatT]:
    """Cross product over the last axis: np.cross is several times slower for the millions of short vectors here."""
    ax, ay, az = a[..., 0], a[..., 1], a[..., 2]
    bx, by, bz = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)
