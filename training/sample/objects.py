"""Обстановка: cars, vans, people, benches, bins, kiosks, flower tubs, bicycles."""

import numpy as np

from training.sample.mesh import (
    GLASS,
    GLOSS,
    SOLID,
    Floats,
    Surface,
    boxes,
    chain,
    discs,
    ellipsoids,
    join,
    lattice,
    quads,
    rotation,
    tubes,
)
from training.sample.site import OBJECT, Site

_UP = np.array([0.0, 0.0, 1.0])


def _put(surface: Surface, base: Floats, yaw: float, tilt: float = 0.0) -> Surface:
    """A surface made around the origin, pitched by `tilt` (nose up), turned by `yaw` and moved to `base`."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    turn = rotation(np.asarray(yaw)) @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    return Surface(surface.triangles @ turn.T + base, surface.normals @ turn.T)


def car(site: Site, base: Floats, *, yaw: float) -> None:
    """A car, of a random build: saloon, hatchback, estate, off-roader or van."""
    rng = site.rng
    kind = rng.choice(["saloon", "hatchback", "estate", "offroad", "van"], p=[0.3, 0.25, 0.2, 0.15, 0.1])
    length, width, height = {
        "saloon": (4.5, 1.75, 1.45),
        "hatchback": (4.0, 1.7, 1.5),
        "estate": (4.6, 1.78, 1.5),
        "offroad": (4.6, 1.85, 1.75),
        "van": (5.4, 2.0, 2.4),
    }[kind]
    length, width, height = length * rng.uniform(0.95, 1.05), width, height * rng.uniform(0.97, 1.04)
    belt = {"van": 1.15, "offroad": 1.05}.get(kind, 0.92)
    back = {"saloon": 0.80, "hatchback": 0.95}.get(kind, 0.985)
    front = 0.2 if kind == "van" else 0.33
    wheel = 0.31 if kind in ("saloon", "hatchback", "estate") else 0.36

    part = np.array([0.0, 0.015, 0.05, 0.12, 0.22, 0.34, 0.5, 0.66, 0.8, 0.9, 0.96, 0.99, 1.0])
    top = np.interp(
        part,
        [0, 0.04, 0.1, front, 0.7, back, 0.97, 1.0],
        [0.62, 0.72, 0.8, belt, belt, belt, 0.9 * belt, 0.75],
    )
    bottom = np.interp(part, [0, 0.05, 0.95, 1.0], [0.35, 0.2, 0.22, 0.38])
    half = width / 2 * np.interp(part, [0, 0.015, 0.05, 0.12, 0.9, 0.97, 1], [0.72, 0.85, 0.95, 1, 1, 0.93, 0.78])
    angle = (np.arange(14) + 0.5) * (2 * np.pi / 14)
    cos, sin = np.cos(angle), np.sin(angle)
    ring_y, ring_z = np.sign(cos) * np.abs(cos) ** 0.35, np.sign(sin) * np.abs(sin) ** 0.5
    xs = (0.5 - part) * length
    body = np.stack(
        np.broadcast_arrays(
            xs[:, None],
            half[:, None] * ring_y,
            ((top + bottom) / 2)[:, None] + ((top - bottom) / 2)[:, None] * ring_z,
        ),
        -1,
    )
    tilt = _tilt(site, base, yaw, length)
    add = site.mesh.add
    hull = [lattice(body, closed=True), *(_lid(body[end]) for end in (0, -1))]
    add(_put(join(hull), base, yaw, tilt), OBJECT, GLOSS)

    part = np.array([front - 0.01, front + 0.1, front + 0.14, 0.5, 0.52, 0.72, 0.74, back - 0.14, back - 0.08, back])
    roof = np.interp(
        part,
        [front - 0.01, front + 0.14, 0.5, back - 0.1, back],
        [belt - 0.05, height - 0.05, height, height - 0.05, belt - 0.05],
    )
    if kind != "saloon" and kind != "hatchback":
        roof[-2:] = [height - 0.08, belt]
    lean = np.array([1.0, 0.99, 0.97, 0.93, 0.85, 0.75, 0.5, 0.0])
    rise = np.array([0.0, 0.12, 0.25, 0.5, 0.8, 0.92, 0.99, 1.0])
    across = np.concatenate([lean, -lean[-2::-1]])
    level = np.concatenate([rise, rise[-2::-1]])
    xs = (0.5 - part) * length
    cabin = np.stack(
        np.broadcast_arrays(
            xs[:, None],
            0.94 * width / 2 * across,
            (belt - 0.06) + (roof - belt + 0.06)[:, None] * level,
        ),
        -1,
    )
    surface = lattice(cabin)
    cells = len(across) - 1
    row, column = np.divmod(np.arange(len(surface.triangles)) // 2, cells)
    glass = ((column >= 2) & (column <= 3)) | ((column >= cells - 4) & (column <= cells - 3))
    glass &= ~np.isin(row, [3, 5]) & (row >= 1) & (row <= 7)
    if kind == "van":
        glass &= row < 3
    glass |= (row == 0) & (column >= 1) & (column <= cells - 2)
    glass |= (row == len(part) - 2) & (column >= 3) & (column <= cells - 4)
    add(_put(surface, base, yaw, tilt), OBJECT, np.where(glass, GLASS, GLOSS).astype(np.uint8))

    axles = np.array([[i * 0.3 * length, j * (width / 2 - 0.1), wheel] for i in (-1, 1) for j in (-1, 1)])
    inner, outer = axles.copy(), axles.copy()
    inner[:, 1] -= 0.11 * np.sign(axles[:, 1])
    outer[:, 1] += 0.11 * np.sign(axles[:, 1])
    rims = discs(outer, np.sign(axles[:, 1])[:, None] * np.array([0.0, 1.0, 0.0]), wheel, sides=16)
    mirrors = np.array([[0.12 * length, j * (width / 2 + 0.08), belt] for j in (-1, 1)])
    add(_put(tubes(inner, outer, wheel, sides=16), base, yaw, tilt), OBJECT)
    add(_put(rims, base, yaw, tilt), OBJECT)
    add(_put(ellipsoids(mirrors, np.array([0.06, 0.11, 0.08])), base, yaw, tilt), OBJECT, GLOSS)


def _lid(ring: Floats) -> Surface:
    middle = np.broadcast_to(ring.mean(axis=0), ring.shape)
    return lattice(np.stack([ring, middle]), closed=True)


def _tilt(site: Site, base: Floats, yaw: float, length: float) -> float:
    reach = np.array([np.cos(yaw), np.sin(yaw)]) * length / 2
    nose = site.ground.height(base[0] + reach[0], base[1] + reach[1])
    tail = site.ground.height(base[0] - reach[0], base[1] - reach[1])
    return float(np.arctan2(nose - tail, length))


def lorry(site: Site, base: Floats, *, yaw: float) -> None:
    """A small lorry with a box body, or a bus."""
    long = site.rng.uniform(5.5, 9.5)
    tilt = _tilt(site, base, yaw, long)
    solid = [
        boxes(np.array([-0.9, 0, 0.95]), np.array([long - 1.9, 2.3, site.rng.uniform(1.7, 2.3)])),
        boxes(np.array([-0.5, 0, 0.6]), np.array([long - 0.8, 0.9, 0.3])),
        boxes(np.array([long / 2 - 0.85, 0, 0.45]), np.array([1.7, 2.1, 0.95])),
        boxes(np.array([long / 2 - 1.0, 0, 2.0]), np.array([1.4, 2.05, 0.35])),
        boxes(np.array([[long / 2 - 0.3, j, 1.4] for j in (-0.98, 0.98)]), np.array([0.08, 0.08, 0.65])),
    ]
    site.mesh.add(_put(join(solid), base, yaw, tilt), OBJECT, GLOSS)
    panes = boxes(np.array([long / 2 - 0.95, 0, 1.4]), np.array([1.35, 2.0, 0.62]))
    site.mesh.add(_put(panes, base, yaw, tilt), OBJECT, GLASS)
    spots = np.array([[i, j, 0.45] for i in (long / 2 - 0.9, -long / 2 + 1.4) for j in (-0.95, 0.95)])
    rim = spots + np.sign(spots[:, 1])[:, None] * np.array([0, 0.16, 0])
    wheels = [
        tubes(2 * spots - rim, rim, 0.45, sides=16),
        discs(rim, np.array([0.0, 1.0, 0.0]), 0.45, sides=16),
    ]
    site.mesh.add(_put(join(wheels), base, yaw, tilt), OBJECT)


def person(site: Site, base: Floats, *, yaw: float) -> None:
    """Someone standing or walking, now and then with a bag."""
    rng = site.rng
    tall = rng.choice([rng.uniform(1.55, 1.9), rng.uniform(1.0, 1.4)], p=[0.85, 0.15])
    stride, swing = rng.uniform(0, 0.28), rng.uniform(0, 0.2)
    hip, neck = 0.5, 0.83
    legs = np.array(
        [[[stride * s, 0.07 * s, 0.03], [0.05 + 0.3 * stride * s, 0.08 * s, 0.27], [0, 0.08 * s, hip]] for s in (-1, 1)]
    )
    arms = np.array(
        [
            [[0, 0.13 * s, 0.8], [-0.03 - swing * s / 2, 0.17 * s, 0.63], [0.05 - swing * s, 0.16 * s, 0.47]]
            for s in (-1, 1)
        ]
    )
    shoes = np.array([[stride * s + 0.06, 0.07 * s, 0.03] for s in (-1, 1)])
    trunk = np.array([[0, 0, hip - 0.03], [0, 0, 0.62], [0, 0, 0.74], [0, 0, neck]])
    parts = [
        chain(legs * tall, np.array([0.035, 0.045, 0.06]) * tall, sides=9),
        chain(arms * tall, np.array([0.037, 0.03, 0.024]) * tall, sides=8),
        chain(trunk * tall, np.array([0.1, 0.095, 0.115, 0.05]) * tall, sides=12),
        ellipsoids(np.array([[0, 0, 0.925]]) * tall, np.array([0.06, 0.05, 0.075]) * tall),
        ellipsoids(shoes * tall, np.array([0.08, 0.035, 0.035]) * tall),
    ]
    if rng.random() < 0.3:
        parts.append(boxes(np.array([0.05, 0.18, 0.28]) * tall, np.array([0.35, 0.12, 0.3])))
    site.mesh.add(_put(join(parts), base, yaw), OBJECT)


def bench(site: Site, base: Floats, *, yaw: float) -> None:
    """A slatted bench whose back is at own +y."""
    slats = np.array([[0, y, 0.43] for y in (-0.2, -0.05, 0.1)])
    back = np.array([[0, 0.2 + 0.03 * i, 0.58 + 0.15 * i] for i in range(3)])
    feet = np.array([[x, y, 0] for x in (-0.75, 0.75) for y in (-0.18, 0.18)])
    parts = [
        boxes(slats, np.array([1.8, 0.12, 0.04])),
        boxes(back, np.array([1.8, 0.03, 0.11])),
        boxes(feet, np.array([0.07, 0.07, 0.43])),
        boxes(feet[1::2] + np.array([0, 0.06, 0.4]), np.array([0.06, 0.04, 0.55])),
    ]
    site.mesh.add(_put(join(parts), base, yaw), OBJECT)


def urn(site: Site, base: Floats) -> None:
    """A litter bin: a round tapered can."""
    site.mesh.add(tubes(base, base + 0.65 * _UP, [[0.16, 0.23]], sides=14), OBJECT)
    site.mesh.add(discs(base + 0.5 * _UP, _UP, 0.21, sides=14), OBJECT)


def dumpster(site: Site, base: Floats, *, yaw: float) -> None:
    """A wheeled refuse container, its lid ajar."""
    profile = np.array([[-0.45, 0.2], [-0.55, 1.15], [0.55, 1.25], [0.45, 0.2]])
    points = np.stack(
        [np.stack([np.full(4, x), profile[:, 0], profile[:, 1]], -1) for x in (-0.65, 0.65)],
    )
    lid = np.array([[-0.7, -0.6, 1.2], [0.7, -0.6, 1.2], [0.7, 0.55, 1.35], [-0.7, 0.55, 1.35]])
    wheels = np.array([[x, y, 0.1] for x in (-0.5, 0.5) for y in (-0.38, 0.38)])
    parts = [
        lattice(points, closed=True, smooth=False),
        quads(np.stack([points[0], points[1], lid])),
        ellipsoids(wheels, np.array([0.1, 0.05, 0.1])),
    ]
    site.mesh.add(_put(join(parts), base, yaw), OBJECT)


def kiosk(site: Site, base: Floats, *, yaw: float) -> None:
    """A small stall with a counter window, its front at own -y, under an overhanging roof."""
    walls = [
        boxes(np.array([0, 0, -0.2]), np.array([2.6, 2.0, 1.2])),
        boxes(np.array([0, 0.1, 1.0]), np.array([2.5, 1.7, 1.3])),
        boxes(np.array([0, -0.15, 2.3]), np.array([3.0, 2.7, 0.22])),
        boxes(np.array([[x, -0.95, 1.0] for x in (-1.25, -0.4, 0.4, 1.25)]), np.array([0.08, 0.08, 1.3])),
        boxes(np.array([0, -1.15, 0.95]), np.array([2.4, 0.4, 0.05])),
    ]
    site.mesh.add(_put(join(walls), base, yaw), OBJECT)
    pane = boxes(np.array([[x, -0.95, 1.0] for x in (-0.8, 0.8)]), np.array([0.8, 0.02, 1.3]))
    site.mesh.add(_put(pane, base, yaw), OBJECT, GLASS)


def flower_tub(site: Site, base: Floats) -> None:
    """A concrete bowl filled with soil."""
    radii = np.array([0.25, 0.42, 0.55, 0.55])
    levels = base + np.array([0.0, 0.2, 0.45, 0.5])[:, None] * _UP
    site.mesh.add(chain(levels, radii, sides=18), OBJECT)
    site.mesh.add(discs(base + 0.44 * _UP, _UP, 0.54, sides=18), OBJECT, SOLID)


def bicycle(site: Site, base: Floats, *, yaw: float) -> None:
    """A bicycle or a scooter left standing."""
    turn = np.linspace(0, 2 * np.pi, 17)
    wheel = np.stack([0.33 * np.cos(turn), 0 * turn, 0.34 + 0.33 * np.sin(turn)], -1)
    hubs = np.array([[-0.5, 0, 0.34], [0.5, 0, 0.34]])
    low, seat, head = np.array([0, 0, 0.3]), np.array([-0.15, 0, 0.85]), np.array([0.4, 0, 0.9])
    frame = np.stack(
        [
            np.stack(pair)
            for pair in (
                (low, seat),
                (low, head),
                (seat, head),
                (hubs[0], low),
                (hubs[1], head),
                (hubs[0], seat),
            )
        ]
    )
    grips = np.array([[0.4, -0.28, 1.0], [0.4, 0.28, 1.0]])
    parts = [
        chain(wheel + 0.5 * np.array([[[-1.0, 0, 0]], [[1.0, 0, 0]]]), 0.022, sides=6),
        chain(frame, 0.02, sides=6),
        tubes(grips[:1], grips[1:], 0.018, sides=6),
        boxes(seat + 0.02 * _UP, np.array([0.26, 0.14, 0.06])),
    ]
    site.mesh.add(_put(join(parts), base, yaw), OBJECT)
