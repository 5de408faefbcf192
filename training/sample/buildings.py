"""Здание: blocks of flats, houses, garages, with windows, doors, recesses, balconies and roofs."""

from dataclasses import dataclass

import numpy as np

from training.sample.mesh import GLASS, SOLID, Floats, boxes, flat, lattice, quads, tubes
from training.sample.site import BUILDING, Site
from training.sample.structures import stairs

_UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What a building looks like."""

    storeys: int
    storey_m: float = 2.9
    plinth_m: float = 0.7
    window_m: tuple[float, float] = (1.4, 1.5)
    """Width and height of a window."""
    pitch_m: float = 3.3
    """Distance between the middles of neighbouring windows."""
    recess_m: float = 0.2
    glass: float = 0.6
    """Share of the windows that give no return; the rest have blinds or curtains close behind."""
    roof: str = "flat"
    """flat, gable or hip."""
    balconies: float = 0.0
    """Share of the columns of windows that have balconies."""
    bays: bool = False
    """Shallow steps in the front wall."""
    entrances: bool = True

    @property
    def wall_m(self) -> float:
        """Height of the walls above the ground at the front."""
        return self.plinth_m + self.storeys * self.storey_m + 0.4


def building(site: Site, x: float, y: float, *, length: float, depth: float, yaw: float, style: Style) -> None:
    """Sets up a building with its middle at (x, y); its front looks along own -y (turned by yaw)."""
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    inward = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
    middle = np.array([x, y, 0.0])
    corners = [
        middle + along * i * length / 2 + inward * j * depth / 2 for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    floor = float(np.mean([site.ground.height(corner[0], corner[1]) for corner in corners[:2]]))
    to_scanner = np.array([*site.station, 0.0])
    for side, corner in enumerate(corners):
        corner = np.array([corner[0], corner[1], floor])
        following = corners[(side + 1) % 4]
        run = following - middle - (corner - middle)
        run[2] = 0.0
        wall_length = float(np.hypot(run[0], run[1]))
        run /= wall_length
        outward = np.array([run[1], -run[0], 0.0])
        if (to_scanner - corner) @ outward < -1.0:
            _blank(site, corner, run, wall_length, style.wall_m)
        elif side == 0:
            _front(site, corner, run, wall_length, style)
        else:
            _wall(
                site,
                corner,
                run,
                wall_length,
                style,
                balconies=0.0 if side in (1, 3) else style.balconies,
                entrances=False,
            )
    _roof(site, middle + floor * _UP, along, inward, length, depth, style)


def _blank(site: Site, corner: Floats, run: Floats, length: float, height: float) -> None:
    foot = np.stack([corner - 3 * _UP, corner + run * length - 3 * _UP])
    top = foot[::-1] + (height + 3) * _UP
    site.mesh.add(quads(np.concatenate([foot, top])), BUILDING)


def _front(site: Site, corner: Floats, run: Floats, length: float, style: Style) -> None:
    if not style.bays or length < 18:
        _wall(site, corner, run, length, style, balconies=style.balconies, entrances=style.entrances)
        return
    inward = np.array([-run[1], run[0], 0.0])
    parts = int(np.clip(length // 11, 2, 5))
    widths = site.rng.dirichlet(np.full(parts, 12.0)) * length
    step = site.rng.uniform(0.6, 1.6)
    start = 0.0
    for number, width in enumerate(widths):
        back = step * (number % 2)
        at = corner + run * start + inward * back
        _wall(site, at, run, float(width), style, balconies=style.balconies, entrances=style.entrances)
        if number:
            edge = np.stack([corner + run * start - 3 * _UP, corner + run * start + inward * step - 3 * _UP])
            site.mesh.add(quads(np.concatenate([edge, edge[::-1] + (style.wall_m + 3) * _UP])), BUILDING)
        start += float(width)


def _wall(
    site: Site,
    corner: Floats,
    run: Floats,
    length: float,
    style: Style,
    *,
    balconies: float,
    entrances: bool,
) -> None:
    """A wall with a grid of openings, from `corner` (at floor level) in direction `run`; outside is to its right."""
    rng = site.rng
    inward = np.array([-run[1], run[0], 0.0])
    wide, tall = style.window_m
    columns = int((length - 1.0) // style.pitch_m)
    if columns < 1:
        _blank(site, corner, run, length, style.wall_m)
        return
    middles = (np.arange(columns) + 0.5) * length / columns
    sills = style.plinth_m + np.arange(style.storeys) * style.storey_m + 0.85
    xs = np.concatenate([[0.0], np.stack([middles - wide / 2, middles + wide / 2], -1).ravel(), [length]])
    zs = np.concatenate([[-3.0], np.stack([sills, sills + tall], -1).ravel(), [style.wall_m]])
    u0, z0 = np.meshgrid(xs[:-1], zs[:-1], indexing="ij")
    u1, z1 = np.meshgrid(xs[1:], zs[1:], indexing="ij")
    windows = np.ones((columns, style.storeys), bool)
    if entrances:
        every = int(rng.integers(3, 7))
        doors = np.arange(int(rng.integers(0, min(every, columns))), columns, every)
        windows[doors, 0] = False
        _doors(site, corner, run, inward, middles[doors], style)
    opening = np.zeros(u0.shape, bool)
    opening[1::2, 1::2] = windows

    def panel(u0: Floats, z0: Floats, u1: Floats, z1: Floats, back0: Floats | float, back1: Floats | float) -> Floats:
        def point(u: Floats, z: Floats, back: Floats | float) -> Floats:
            back = np.broadcast_to(back, u.shape)
            return np.asarray(corner + u[:, None] * run + z[:, None] * _UP + back[:, None] * inward)

        return np.stack([point(u0, z0, back0), point(u1, z0, back1), point(u1, z1, back1), point(u0, z1, back0)], 1)

    site.mesh.add(quads(panel(u0[~opening], z0[~opening], u1[~opening], z1[~opening], 0.0, 0.0)), BUILDING)

    left, low, right, high = u0[opening], z0[opening], u1[opening], z1[opening]
    column, storey = np.nonzero(windows)
    recess = style.recess_m
    site.mesh.add(
        quads(
            np.concatenate(
                [
                    panel(left, low, left, high, 0.0, recess),
                    panel(right, low, right, high, recess, 0.0),
                    _ledge(corner, run, inward, left, right, low, recess),
                    _ledge(corner, run, inward, left, right, high, recess),
                ]
            )
        ),
        BUILDING,
    )
    clear = rng.random(len(left)) < style.glass
    pane = quads(panel(left, low, right, high, recess, recess))
    site.mesh.add(pane, BUILDING, np.repeat(np.where(clear, GLASS, SOLID), 2).astype(np.uint8))
    bars = 0.5 * (left + right)
    yaw = float(np.arctan2(run[1], run[0]))
    base = corner + bars[:, None] * run + low[:, None] * _UP + (recess - 0.03) * inward
    if site.far(*(corner + run * length / 2)[:2]) < 45:
        site.mesh.add(boxes(base, np.array([0.07, 0.06, tall]), yaw), BUILDING)
        rails = corner + bars[:, None] * run + (low + 0.68 * tall)[:, None] * _UP + (recess - 0.03) * inward
        site.mesh.add(boxes(rails, np.array([wide, 0.06, 0.07]), yaw), BUILDING)
        sill = corner + bars[:, None] * run + (low - 0.05)[:, None] * _UP - 0.04 * inward
        site.mesh.add(boxes(sill, np.array([wide + 0.2, 0.14, 0.04]), yaw), BUILDING)
    if balconies > 0:
        has = (rng.random(columns) < balconies)[column] & (storey > 0)
        _balconies(site, base[has] - 0.85 * _UP, yaw, inward, style, glazed=bool(rng.random() < 0.4))


def _ledge(
    corner: Floats, run: Floats, inward: Floats, left: Floats, right: Floats, height: Floats, recess: float
) -> Floats:
    """Sills and lintels (n, 4, 3) of openings."""
    low = corner + left[:, None] * run + height[:, None] * _UP
    high = corner + right[:, None] * run + height[:, None] * _UP
    return np.stack([low, high, high + recess * inward, low + recess * inward], 1)


def _doors(site: Site, corner: Floats, run: Floats, inward: Floats, middles: Floats, style: Style) -> None:
    """Porches: a door leaf with its frame before the wall, a canopy, and steps up to it."""
    yaw = float(np.arctan2(run[1], run[0]))
    at = corner + middles[:, None] * run
    sill = style.plinth_m * _UP
    site.mesh.add(boxes(at + sill - 0.12 * inward, np.array([1.3, 0.3, 2.15]), yaw), BUILDING)
    site.mesh.add(boxes(at + sill - 0.29 * inward, np.array([1.0, 0.06, 2.02]), yaw), BUILDING)
    site.mesh.add(boxes(at + sill - 0.34 * inward + 0.38 * run + 0.95 * _UP, np.array([0.04, 0.1, 0.2]), yaw), BUILDING)
    site.mesh.add(boxes(at + sill - 0.9 * inward + 2.5 * _UP, np.array([2.4, 1.8, 0.16]), yaw), BUILDING)
    for middle in at:
        stairs(site, middle - 0.2 * inward, direction=-inward, rise=style.plinth_m, width=1.8, landing=1.3)


def _balconies(site: Site, base: Floats, yaw: float, inward: Floats, style: Style, *, glazed: bool) -> None:
    if len(base) == 0:
        return
    wide, deep = style.window_m[0] + 1.5, 1.25
    outer = base - (deep / 2 + style.recess_m) * inward
    site.mesh.add(boxes(outer, np.array([wide, deep, 0.15]), yaw), BUILDING)
    front = base - (deep + style.recess_m) * inward
    site.mesh.add(boxes(front, np.array([wide, 0.06, 1.1]), yaw), BUILDING)
    across = np.array([np.cos(yaw), np.sin(yaw), 0.0]) * (wide / 2 - 0.03)
    for side in (-across, across):
        site.mesh.add(boxes(outer + side, np.array([0.06, deep, 1.1]), yaw), BUILDING)
    if not glazed:
        return
    posts = np.concatenate([front + part * across for part in (-1.0, -0.33, 0.33, 1.0)])
    site.mesh.add(boxes(posts + 1.1 * _UP, np.array([0.07, 0.07, 1.5]), yaw), BUILDING)
    site.mesh.add(boxes(front + 2.55 * _UP, np.array([wide, 0.08, 0.1]), yaw), BUILDING)
    behind = site.rng.random(len(front)) < 0.5
    site.mesh.add(boxes((front + 1.1 * _UP + 0.02 * inward)[behind], np.array([wide, 0.02, 1.4]), yaw), BUILDING, GLASS)


def _roof(site: Site, middle: Floats, along: Floats, inward: Floats, length: float, depth: float, style: Style) -> None:
    rng = site.rng
    top = middle + style.wall_m * _UP
    yaw = float(np.arctan2(along[1], along[0]))

    def at(i: float, j: float, z: float) -> Floats:
        return np.asarray(top + along * i * length / 2 + inward * j * depth / 2 + z * _UP)

    if style.roof == "flat":
        site.mesh.add(quads(np.stack([at(-1, -1, -0.4), at(1, -1, -0.4), at(1, 1, -0.4), at(-1, 1, -0.4)])), BUILDING)
        bases = np.stack([at(0, -1, -0.2), at(0, 1, -0.2)])
        site.mesh.add(boxes(bases, np.array([length + 0.3, 0.3, 0.6]), yaw), BUILDING)
        bases = np.stack([at(-1, 0, -0.2), at(1, 0, -0.2)])
        site.mesh.add(boxes(bases, np.array([0.3, depth + 0.3, 0.6]), yaw), BUILDING)
        count = int(rng.integers(1, 5))
        spots = np.stack([at(rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), -0.4) for _ in range(count)])
        site.mesh.add(boxes(spots, rng.uniform([0.6, 0.6, 1.2], [2.5, 2.5, 2.6], (count, 3)), yaw), BUILDING)
        return
    rise = min(depth, length) * rng.uniform(0.25, 0.5)
    over_i, over_j = 1 + 0.9 / length, 1 + 0.9 / depth
    drop = -rise * 0.9 / depth
    hip = max(0.0, 1 - depth / length) if style.roof == "hip" else over_i
    eaves = [
        at(-over_i, -over_j, drop),
        at(over_i, -over_j, drop),
        at(over_i, over_j, drop),
        at(-over_i, over_j, drop),
    ]
    ridge = [at(-hip, 0, rise), at(hip, 0, rise)]
    planes = np.stack(
        [
            np.stack([eaves[0], eaves[1], ridge[1], ridge[0]]),
            np.stack([eaves[2], eaves[3], ridge[0], ridge[1]]),
        ]
    )
    site.mesh.add(quads(planes), BUILDING)
    site.mesh.add(quads(planes - 0.15 * _UP), BUILDING)
    if style.roof == "hip":
        site.mesh.add(
            flat(np.stack([np.stack([eaves[1], eaves[2], ridge[1]]), np.stack([eaves[3], eaves[0], ridge[0]])])),
            BUILDING,
        )
    else:
        gables = [np.stack([at(i, -1, 0), at(i, 1, 0), at(i, 0, rise)]) for i in (-1, 1)]
        site.mesh.add(flat(np.stack(gables)), BUILDING)
    chimney = at(rng.uniform(-0.6, 0.6), rng.choice([-0.35, 0.35]), 0.3 * rise)
    site.mesh.add(boxes(chimney, np.array([0.6, 0.6, rise + 0.4]), yaw), BUILDING)
    gutters = np.stack([eaves[0], eaves[3]]), np.stack([eaves[1], eaves[2]])
    site.mesh.add(tubes(gutters[0], gutters[1], 0.07, sides=6), BUILDING)


def garages(site: Site, x: float, y: float, *, count: int, yaw: float) -> None:
    """A row of lock-up garages with corrugated doors, fronts along own -y."""
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    inward = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
    steps = (np.arange(count) - (count - 1) / 2) * 3.4
    middle = np.array([x, y, 0.0]) + steps[:, None] * along
    ground = site.ground_point(middle[:, 0], middle[:, 1])
    site.mesh.add(boxes(ground - 0.5 * _UP, np.array([3.3, 6.0, 3.0]), yaw), BUILDING)
    site.mesh.add(boxes(ground + 2.5 * _UP, np.array([3.5, 6.3, 0.14]), yaw), BUILDING)
    across = np.linspace(-1.25, 1.25, 33)
    fold = 0.025 * np.sign(np.sin(np.arange(33) * np.pi / 2 + 0.1))
    for base in ground:
        line = base + across[:, None] * along + (fold - 3.06)[:, None] * inward
        site.mesh.add(lattice(np.stack([line, line + 2.15 * _UP]), smooth=False), BUILDING)
