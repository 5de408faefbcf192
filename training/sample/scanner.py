"""A terrestrial laser scanner: one ray per pixel into a scene, what comes back as ranges, normals and labels.

Frames. The scanner's own frame has z up; azimuth 0 is its x axis. A scanner turned by `yaw` sees at its own azimuth a
what lies at the scene's azimuth a + yaw, and gives normals in its own frame. Turning the scanner by k columns is
therefore a roll of the columns and a rotation of (nx, ny) by the same angle, the other way round.

Normals are turned towards the scanner, as processing software does: n·d <= 0 for the viewing direction d of the pixel.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh

from training.sample.mesh import GLASS, GLOSS, ROUGH, Floats, Mesh, cross, rotation, unit
from training.sample.site import VEGETATION

NO_RETURN = 0
"""Label id of what gives no return: the schema's background."""

_STRIP_PIXELS = 1 << 18
_FACING = -0.01

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a scanner hands over."""

    image: npt.NDArray[np.uint8]
    """(H, W, 3): normals as RGB = round((n * 0.5 + 0.5) * 255), no return black."""
    label_map: npt.NDArray[np.uint8]
    """(H, W): what each pixel belongs to, as a person would draw it; see `Scanner.scan`."""
    range_m: Float32s
    """(H, W): distance along the ray in metres; 0 for no return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanner:
    """Where a scanner stands and how it sees; angles in degrees, lengths in metres."""

    height: float = 1.75
    """Of the mirror above the ground."""
    yaw: float = 0.0
    """Turn of the scanner about the vertical, anticlockwise from above."""
    elevation: tuple[float, float] = (90.0, -90.0)
    """Elevations of the upper edge of the first row and the lower edge of the last one."""
    direction: int = 1
    """+1 when azimuth grows with the column, -1 when it falls."""
    column_0: float = 0.0
    """Own azimuth of the left edge of column 0."""
    lowest: float = -60.0
    """Elevation below which the scanner sees nothing but itself: the blind cone."""
    max_range: float = 110.0
    """Beyond it nothing returns."""
    range_noise: float = 0.002
    """Standard deviation of a measured range; 0 switches noise and drop-outs off."""

    def directions(self, size_hw: tuple[int, int], rows: slice = slice(None)) -> Floats:
        """Unit viewing directions through pixel centres, in the scanner's own frame.

        Args:
            size_hw: of the whole panorama, pixels.
            rows: the rows wanted.

        Returns:
            (h, W, 3): x = cos(elevation) * cos(azimuth), y = cos(elevation) * sin(azimuth), z = sin(elevation), with
            azimuth = column_0 + direction * (column + 0.5) * 360 / W and
            elevation = top - (row + 0.5) * (top - bottom) / H.
        """
        height, width = size_hw
        azimuth = np.radians(self.column_0 + self.direction * (np.arange(width) + 0.5) * (360.0 / width))
        elevation = np.radians(self._row_elevation(height)[rows])[:, None]
        x, y = np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth)
        directions: Floats = np.stack([x, y, np.broadcast_to(np.sin(elevation), x.shape)], -1)
        return directions

    def _row_elevation(self, height: int) -> Floats:
        top, bottom = self.elevation
        return np.asarray(top - (np.arange(height) + 0.5) * ((top - bottom) / height), np.float64)

    def scan(self, mesh: Mesh, *, size_hw: tuple[int, int], seed: int | tuple[int, ...] = 0) -> Scan:
        """Scans a scene.

        Labels say what a person would draw. They come from the surfaces before noise: a lost return inside a wall, and
        a window pane in it that returns nothing, belong to the wall. Small patches of sky between leaves belong to the
        crown (a pixel without surface goes to the vegetation when that fills most of its neighbourhood). All else
        without surface is NO_RETURN: sky, what is beyond the range, the blind cone.

        Args:
            mesh: the scene; the scanner stands at its (0, 0, 0).
            size_hw: pixels; any.
            seed: of the noise. The result does not depend on the number of threads.

        Returns:
            The scan, size_hw.
        """
        height, width = size_hw
        scene = rtcore_scene.EmbreeScene()
        TriangleMesh(scene, mesh.triangles)
        image = np.zeros((height, width, 3), np.uint8)
        label_map = np.full((height, width), NO_RETURN, np.uint8)
        range_m = np.zeros((height, width), np.float32)
        seen = int((self._row_elevation(height) > self.lowest).sum())
        step = max(1, _STRIP_PIXELS // width)

        def work(start: int) -> None:
            rows = slice(start, min(start + step, seen))
            noise = None
            if self.range_noise > 0:
                noise = np.random.default_rng(np.random.SeedSequence([*np.atleast_1d(seed).tolist(), start]))
            image[rows], label_map[rows], range_m[rows] = self._strip(scene, mesh, size_hw, rows, seen, noise)

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(work, range(0, seen, step)))
        _fill_crowns(label_map)
        return Scan(image=image, label_map=label_map, range_m=range_m)

    def _strip(
        self,
        scene: rtcore_scene.EmbreeScene,
        mesh: Mesh,
        size_hw: tuple[int, int],
        rows: slice,
        seen: int,
        noise: np.random.Generator | None,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], Float32s]:
        """Image, label map and ranges of some rows; one more row above and below is cast to find edges."""
        outer = slice(max(rows.start - 1, 0), min(rows.stop + 1, seen))
        own = self.directions(size_hw, outer)
        shape = own.shape[:2]
        turn = rotation(np.radians(self.yaw))
        world = (own.reshape(-1, 3) @ turn.T).astype(np.float32)
        origins = np.broadcast_to(np.array([0, 0, self.height], np.float32), world.shape)
        hit = scene.run(np.ascontiguousarray(origins), world, output=True)
        reach = np.where(hit["primID"] >= 0, hit["tfar"], np.inf).astype(np.float32)
        surface = reach <= self.max_range
        ranges = np.where(surface, reach, 0).astype(np.float32).reshape(shape)

        inner = slice(rows.start - outer.start, rows.stop - outer.start)
        keep = np.zeros(shape, bool)
        keep[inner] = True
        picked = np.flatnonzero(surface & keep.ravel())
        triangle = hit["primID"][picked]
        view = world[picked]
        point = view * reach[picked, None]
        normal = _normals(mesh, triangle, hit["u"][picked], hit["v"][picked], view, point)
        material = mesh.materials[triangle]
        returned = material != GLASS
        if noise is not None:
            edge = _edges(ranges).ravel()[picked]
            normal, lost = self._spoil(noise, normal, view, reach[picked], edge, material)
            returned &= ~lost
        normal = normal @ turn.astype(np.float32)

        image = np.zeros((*shape, 3), np.uint8)
        image.reshape(-1, 3)[picked[returned]] = np.rint((normal[returned] * 0.5 + 0.5) * 255).astype(np.uint8)
        label_map = np.full(shape, NO_RETURN, np.uint8)
        label_map.ravel()[picked] = mesh.labels[triangle]
        ranges.ravel()[picked[~returned]] = 0
        return image[inner], label_map[inner], ranges[inner]

    def _spoil(
        self,
        noise: np.random.Generator,
        normal: Float32s,
        view: Float32s,
        reach: Float32s,
        edge: npt.NDArray[np.bool_],
        material: npt.NDArray[np.uint8],
    ) -> tuple[Float32s, npt.NDArray[np.bool_]]:
        """Noisy normals (n, 3), and which returns are lost (n,).

        A normal is fitted to neighbours about 10 cm around: its error is the range noise over that distance, and grows
        as the spots become sparse with range and long where the beam grazes the surface, and where the spot straddles
        an edge.
        """
        facing = np.clip(-(normal * view).sum(-1), 0.005, 1.0)
        sigma = self.range_noise / 0.10 * (1 + reach / 12.0) / np.sqrt(np.maximum(facing, 0.04))
        sigma = np.minimum(sigma * np.where(edge, 3.0, 1.0), 0.6)
        shaken = unit(normal + sigma[:, None] * noise.standard_normal(normal.shape, np.float32)).astype(np.float32)
        chance = 0.0015 + 0.3 * (reach / self.max_range) ** 3 + 0.7 * np.exp(-facing / 0.018)
        chance += np.where(edge, 0.12 + 0.2 * (reach / self.max_range), 0.0)
        chance += np.where(material == GLOSS, 0.5 * np.exp(-facing / 0.12), 0.0)
        return _face(shaken, view), noise.random(len(chance), np.float32) < chance


def _normals(
    mesh: Mesh,
    triangle: npt.NDArray[np.int32],
    u: Float32s,
    v: Float32s,
    view: Float32s,
    point: Float32s,
) -> Float32s:
    """Normals (n, 3) towards the scanner: interpolated over the triangle, roughened where the ground is rough."""
    corner = mesh.triangles[triangle]
    true = cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    smooth = mesh.normals[triangle]
    smooth = smooth[:, 0] * (1 - u - v)[:, None] + smooth[:, 1] * u[:, None] + smooth[:, 2] * v[:, None]
    # The side that is seen is decided by the true plane; the smooth normal follows it.
    smooth *= np.sign((smooth * true).sum(-1, keepdims=True)) * -np.sign((true * view).sum(-1, keepdims=True))
    rough = mesh.materials[triangle] == ROUGH
    smooth[rough] += _bumps(point[rough])
    return _face(unit(smooth).astype(np.float32), view)


def _turf() -> Float32s:
    """(2, n, n): tilt along x and y of rough ground, repeating; coarse lumps are stronger than fine ones."""
    cells = 512
    frequency = np.hypot(np.fft.fftfreq(cells)[:, None], np.fft.rfftfreq(cells)[None])
    weight = 1 / (frequency + 0.01) ** 0.6
    weight[0, 0] = 0
    spectrum = np.fft.rfft2(np.random.default_rng(0).standard_normal((2, cells, cells))) * weight
    tilt = np.fft.irfft2(spectrum, (cells, cells))
    return np.asarray(0.13 * tilt / tilt.std(), np.float32)


_TURF = _turf()
_TURF_CELL_M = 0.04


def _bumps(point: Float32s) -> Float32s:
    """Tilt (n, 3) of rough ground at points (n, 3), fixed to the ground."""
    cells = _TURF.shape[1]
    place = point[:, :2] * np.float32(1 / _TURF_CELL_M)
    corner = np.floor(place)
    x1, y1 = (place - corner).T
    x, y = corner.astype(np.int32).T
    tilt = np.zeros_like(point)
    for dx, wx in ((0, 1 - x1), (1, x1)):
        for dy, wy in ((0, 1 - y1), (1, y1)):
            tilt[:, :2] += (_TURF[:, (x + dx) % cells, (y + dy) % cells] * (wx * wy)).T
    return tilt


def _face(normal: Float32s, view: Float32s) -> Float32s:
    """Unit normals bent just enough that none faces away from the scanner."""
    facing = (normal * view).sum(-1, keepdims=True)
    return unit(normal - np.maximum(facing - _FACING, 0) * view).astype(np.float32)


def _edges(ranges: Float32s) -> npt.NDArray[np.bool_]:
    """Where (h, W) the range jumps between neighbours, over the seam too: the spot may lie on two surfaces."""
    jump = np.zeros(ranges.shape, bool)
    limit = 0.05 + 0.06 * ranges
    for shift in (-1, 1):
        jump |= np.abs(np.roll(ranges, shift, axis=1) - ranges) > limit
    jump[1:] |= np.abs(ranges[1:] - ranges[:-1]) > limit[1:]
    jump[:-1] |= np.abs(ranges[1:] - ranges[:-1]) > limit[:-1]
    return jump


def _fill_crowns(label_map: npt.NDArray[np.uint8]) -> None:
    """Gives small patches of sky between leaves to the vegetation, in place."""
    radius = max(1, round(label_map.shape[1] / 1024))
    wrapped = np.pad((label_map == VEGETATION).astype(np.uint8) * 200, ((0, 0), (radius, radius)), mode="wrap")
    share = cv2.blur(wrapped, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REPLICATE)[:, radius:-radius]
    label_map[(label_map == NO_RETURN) & (share > 110)] = VEGETATION
