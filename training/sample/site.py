"""The ground of a scene, and the plot on which things are set up.

A scene is laid out along a road: x runs with it, y across. `Ground` knows the height at any point, `Site` which ground
is taken, where the scanner stands, and what has been built so far.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.sample.mesh import ROUGH, SOLID, Floats, MeshBuilder, lattice

TERRAIN = 2
VEGETATION = 5
BUILDING = 6
STRUCTURE = 65
OBJECT = 66

EXTENT_M = 130.0
"""Half the side of the ground that is modelled."""

_CELL_M = 0.5
_CELLS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A strip of ground along the road, between two distances from its middle line."""

    inner: float
    outer: float
    z_inner: float
    z_outer: float
    paved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Roads, kerbs, pavements, lawns and slopes."""

    bands: tuple[Band, ...]
    """Sorted by distance from the road's middle line, negative (right of the road) to positive, without gaps."""
    bend: tuple[float, float, float]
    """The road's middle line y = a * sin(x / b + c): amplitude a, length b (metres), phase c."""
    slope: float
    """Rise along x, metres per metre."""
    waves: npt.NDArray[np.float64]
    """(n, 4): undulation of open ground as amplitude (m), wave numbers along x and y (rad/m), phase (rad)."""

    def middle(self, x: npt.ArrayLike) -> Floats:
        """y of the road's middle line at x."""
        a, b, c = self.bend
        return a * np.sin(np.asarray(x, np.float64) / b + c)

    def heading(self, x: float) -> float:
        """Direction of the road at x, radians from the x axis."""
        a, b, c = self.bend
        return float(np.arctan(a / b * np.cos(x / b + c)))

    def height(self, x: npt.ArrayLike, y: npt.ArrayLike) -> Floats:
        """z of the ground at (x, y)."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        distance = y - self.middle(x)
        edges = [band.inner for band in self.bands] + [band.outer for band in self.bands]
        heights = [band.z_inner for band in self.bands] + [band.z_outer for band in self.bands]
        order = np.argsort(edges, kind="stable")
        profile = np.interp(distance, np.array(edges)[order], np.array(heights)[order])
        return np.asarray(profile + self._roll(x, y, distance))

    def _roll(self, x: Floats, y: Floats, distance: Floats) -> Floats:
        low, high = self.paved_range()
        open_ground = np.clip(np.maximum(low - distance, distance - high) / 6.0, 0.0, 1.0)
        amplitude, along, across, phase = self.waves.T
        bumps = (amplitude * np.sin(x[..., None] * along + y[..., None] * across + phase)).sum(-1)
        return np.asarray(self.slope * x + 0.25 * np.sin(x / 17.0 + self.bend[2]) + open_ground * bumps)

    def paved_range(self) -> tuple[float, float]:
        """Distances from the middle line of the outermost paved edges."""
        paved = [band for band in self.bands if band.paved]
        return min(band.inner for band in paved), max(band.outer for band in paved)

    def build(self, mesh: MeshBuilder, *, near: float) -> None:
        """Adds the ground's triangles; cells are finest around x = `near`."""
        step = np.concatenate([np.arange(0, 12, 0.8), np.arange(12, 40, 2.0), np.geomspace(40, EXTENT_M, 12)])
        x = near + np.concatenate([-step[:0:-1], step])
        for band in self.bands:
            width = band.outer - band.inner
            count = 2 if width < 0.1 else int(np.clip(width / 0.8, 3, 28))
            part = np.linspace(0.0, 1.0, count)
            if band.outer > 60:
                part = part**1.7
            elif band.inner < -60:
                part = 1 - (1 - part) ** 1.7
            # Bands overlap by millimetres: no cracks for rays to fall through.
            overlap = min(0.004, 0.01 * width)
            distance = band.inner - overlap + part * (width + 2 * overlap)
            xs, distances = np.meshgrid(x, distance, indexing="ij")
            ys = self.middle(xs) + distances
            zs = band.z_inner + (distances - band.inner) / width * (band.z_outer - band.z_inner)
            points = np.stack([xs, ys, zs + self._roll(xs, ys, distances)], -1)
            mesh.add(lattice(points), TERRAIN, SOLID if band.paved or count == 2 else ROUGH)


class Site:
    """A scene while it is being built."""

    def __init__(self, rng: np.random.Generator, ground: Ground, station: tuple[float, float]) -> None:
        self.rng = rng
        self.ground = ground
        self.station = station
        self.mesh = MeshBuilder()
        self._taken = np.zeros((_CELLS, _CELLS), bool)
        cell = (np.arange(_CELLS) - _CELLS / 2 + 0.5) * _CELL_M
        self._x, self._y = np.meshgrid(station[0] + cell, station[1] + cell, indexing="ij")
        self.take(*station, 1.6, 1.6, 0.0)

    def ground_point(self, x: npt.ArrayLike, y: npt.ArrayLike) -> Floats:
        """(..., 3): the points of the ground at x (...), y (...)."""
        x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        return np.stack([x, y, self.ground.height(x, y)], -1)

    def by_road(self, x: float, distance: float) -> Floats:
        """(3,): the point of the ground at a distance from the road's middle line."""
        return self.ground_point(x, self.ground.middle(x) + distance)

    def far(self, x: float, y: float) -> float:
        """Distance on the map from the scanner, metres."""
        return float(np.hypot(x - self.station[0], y - self.station[1]))

    def clear_of_tripod(self, start: Floats, end: Floats) -> bool:
        """Whether the stretch between two points keeps a good step away from the scanner."""
        origin, run = start[:2] - self.station, (end - start)[:2]
        part = float(np.clip(-(origin @ run) / max(float(run @ run), 1e-9), 0.0, 1.0))
        return float(np.hypot(*(origin + part * run))) > 1.8

    def take(self, x: float, y: float, length: float, width: float, yaw: float) -> bool:
        """Claims a rectangle (middle, size along its own axes, yaw); False if part of it is taken already."""
        reach = np.hypot(length, width) / 2 + _CELL_M
        window = self._cells(x - self.station[0], reach), self._cells(y - self.station[1], reach)
        dx, dy = self._x[window] - x, self._y[window] - y
        along = dx * np.cos(yaw) + dy * np.sin(yaw)
        across = dy * np.cos(yaw) - dx * np.sin(yaw)
        here = (np.abs(along) <= length / 2 + _CELL_M / 2) & (np.abs(across) <= width / 2 + _CELL_M / 2)
        if bool((self._taken[window] & here).any()):
            return False
        self._taken[window] |= here
        return True

    @staticmethod
    def _cells(middle: float, reach: float) -> slice:
        low, high = ((middle + np.array([-reach, reach])) / _CELL_M + _CELLS / 2).astype(int)
        return slice(max(int(low), 0), max(int(high) + 1, 0))
