"""Растительность: trees, bushes, hedges, grass."""

import numpy as np
import numpy.typing as npt

from training.sample.mesh import Floats, chain, flat, scraps, unit
from training.sample.site import VEGETATION, Site

_UP = np.array([0.0, 0.0, 1.0])


def tree(site: Site, base: Floats, *, height: float, kind: str) -> None:
    """A tree of `kind` broadleaf, conifer or bare (as in winter)."""
    if kind == "conifer":
        _conifer(site, base, height)
    else:
        _branching(site, base, height, leafy=kind == "broadleaf")


def _leaf_size(site: Site, base: Floats) -> float:
    # Leaves further away are made larger, as many of them share one laser spot; it also bounds their number.
    return float(np.clip(0.018 * site.far(base[0], base[1]), 0.08, 0.9))


def _branching(site: Site, base: Floats, height: float, *, leafy: bool) -> None:
    rng = site.rng
    spread = height * rng.uniform(0.27, 0.46)
    lean = rng.normal(0, 0.05, 2) * height
    part = np.linspace(0, 1, 7)
    trunk = base + np.stack([lean[0] * part**2, lean[1] * part**2, height * 0.92 * part - 0.2], -1)
    trunk[1:, :2] += rng.normal(0, 0.012 * height, (6, 2))
    thick = height * rng.uniform(0.013, 0.022)
    site.mesh.add(chain(trunk, thick * (1.05 - part), sides=10), VEGETATION)

    count = int(rng.integers(12, 20))
    start = rng.uniform(0.2, 0.95, count)
    azimuth = np.arange(count) * 2.4 + rng.normal(0, 0.3, count)
    rise = rng.uniform(0.2, 1.0, count) + 0.4 * start
    length = spread * rng.uniform(0.7, 1.15, count) * np.sqrt(np.clip(1.25 - start, 0.15, 0.9))
    root = np.stack([np.interp(start, part, trunk[:, axis]) for axis in range(3)], -1)
    boughs = _limbs(rng, root, azimuth, rise, length, points=4)
    site.mesh.add(chain(boughs, thick * 0.45 * np.linspace(1, 0.3, 4), sides=4), VEGETATION)

    twigs_each = 5 if leafy else 12
    root = boughs[:, [1, 2, 3, 3]][:, rng.integers(0, 4, twigs_each)].reshape(-1, 3)
    azimuth = np.repeat(azimuth, twigs_each) + rng.normal(0, 0.9, len(root))
    rise = rng.normal(0.5, 0.5, len(root))
    twigs = _limbs(rng, root, azimuth, rise, np.repeat(length, twigs_each) * rng.uniform(0.2, 0.5, len(root)), points=3)
    near = site.far(base[0], base[1]) < 15
    if near or not leafy:
        site.mesh.add(chain(twigs, thick * 0.13 * np.linspace(1, 0.4, 3), sides=3), VEGETATION)
    if not leafy:
        tips = np.repeat(twigs[:, 1:].reshape(-1, 3), 3, axis=0)
        rise = rng.normal(0.6, 0.5, len(tips))
        fine = _limbs(rng, tips, rng.uniform(0, 2 * np.pi, len(tips)), rise, rng.uniform(0.2, 0.7, len(tips)), points=2)
        foot = fine[:, 0] + unit(rng.standard_normal((len(fine), 3))) * (0.012 if near else 0.025)
        site.mesh.add(flat(np.stack([fine[:, 0], foot, fine[:, 1]], 1)), VEGETATION)
        return
    size = _leaf_size(site, base)
    tips = np.concatenate([twigs[:, 1:].reshape(-1, 3), boughs[:, 2:].reshape(-1, 3), trunk[-2:]])
    number = int(np.clip(rng.uniform(9.0, 20.0) * spread * spread / (size * size), 100, 4500))
    middle = tips[rng.integers(0, len(tips), number)]
    puff = spread * rng.uniform(0.10, 0.22)
    site.mesh.add(
        scraps(rng, middle + rng.normal(0, puff, (number, 3)), size * rng.uniform(0.6, 1.2, number)),
        VEGETATION,
    )


def _limbs(
    rng: np.random.Generator,
    roots: Floats,
    azimuth: Floats,
    rise: Floats,
    length: Floats,
    *,
    points: int,
) -> Floats:
    """Slightly bent polylines (n, points, 3) growing from roots (n, 3)."""
    direction = np.stack([np.cos(azimuth) * np.cos(rise), np.sin(azimuth) * np.cos(rise), np.sin(rise)], -1)
    steps = np.repeat(direction[:, None], points - 1, axis=1) + rng.normal(0, 0.22, (len(roots), points - 1, 3))
    steps = unit(steps) * (length / (points - 1))[:, None, None]
    return np.concatenate([roots[:, None], roots[:, None] + np.cumsum(steps, axis=1)], axis=1)


def _conifer(site: Site, base: Floats, height: float) -> None:
    rng = site.rng
    spread = height * rng.uniform(0.16, 0.24)
    site.mesh.add(
        chain(np.stack([base - 0.2 * _UP, base + height * _UP]), [0.018 * height, 0.02], sides=8),
        VEGETATION,
    )
    whorls = np.repeat(np.linspace(0.08, 0.97, int(np.clip(height * 2.2, 9, 22))), 8)
    azimuth = rng.uniform(0, 2 * np.pi, len(whorls))
    reach = spread * (1.02 - whorls) * rng.uniform(0.75, 1.15, len(whorls))
    root = base + whorls[:, None] * height * _UP
    tip = root + np.stack([reach * np.cos(azimuth), reach * np.sin(azimuth), -0.28 * reach], -1)
    site.mesh.add(chain(np.stack([root, tip], 1), [0.03, 0.008], sides=3), VEGETATION)
    size = _leaf_size(site, base)
    number = int(np.clip(6.0 * spread * height / (size * size), 100, 3500))
    which = rng.choice(len(whorls), number, p=reach / reach.sum())
    part = np.sqrt(rng.uniform(0.03, 1.0, number))[:, None]
    spot = root[which] * (1 - part) + tip[which] * part
    spot += rng.normal(0, 1, (number, 3)) * np.array([0.12, 0.12, 0.06]) * (0.4 + spread / 3)
    site.mesh.add(scraps(rng, spot, size * rng.uniform(0.6, 1.1, number)), VEGETATION)


def bush(site: Site, base: Floats, *, height: float) -> None:
    """A roundish bush of stems and leaves."""
    rng = site.rng
    size = 0.75 * _leaf_size(site, base)
    stems = _limbs(
        rng,
        np.repeat(base[None], 9, axis=0),
        rng.uniform(0, 2 * np.pi, 9),
        rng.uniform(0.6, 1.4, 9),
        height * rng.uniform(0.6, 1.0, 9),
        points=3,
    )
    site.mesh.add(chain(stems, [0.025, 0.015, 0.006], sides=4), VEGETATION)
    number = int(np.clip(4.0 * height * height / (size * size), 100, 2000))
    direction = unit(rng.standard_normal((number, 3)))
    lumps = 1 + 0.25 * np.sin(direction @ rng.normal(0, 4, 3) + rng.uniform(0, 6))
    shell = direction * (rng.uniform(0.35, 1.0, number) ** 0.5 * lumps)[:, None]
    spot = base + shell * height * np.array([0.62, 0.62, 0.5]) + 0.5 * height * _UP
    site.mesh.add(scraps(rng, spot, size * rng.uniform(0.6, 1.2, number)), VEGETATION)


def hedge(site: Site, start: Floats, end: Floats, *, height: float, width: float) -> None:
    """A clipped hedge along the ground between two points."""
    if not site.clear_of_tripod(start, end):
        return
    rng = site.rng
    length = float(np.hypot(*(end - start)[:2]))
    size = 0.7 * _leaf_size(site, (start + end) / 2)
    area = length * (2 * height + width)
    number = int(np.clip(2.0 * area / (size * size), 150, 4000))
    along, across, up = rng.uniform(0, 1, number), rng.uniform(-1, 1, number), rng.uniform(0, 1, number)
    skin = rng.integers(0, 3, number)
    across = np.where(skin < 2, np.sign(across) * (1 - 0.2 * rng.random(number)), across)
    up = np.where(skin == 2, 1 - 0.12 * rng.random(number), up)
    side = unit(np.cross(end - start, _UP)[None])[0]
    spot = start + along[:, None] * (end - start) + (across * width / 2)[:, None] * side
    spot = site.ground_point(spot[:, 0], spot[:, 1]) + (up * height)[:, None] * _UP
    spot += rng.normal(0, 0.04, spot.shape)
    site.mesh.add(scraps(rng, spot, size * rng.uniform(0.6, 1.2, number)), VEGETATION)


def grass(site: Site, x: npt.ArrayLike, y: npt.ArrayLike, *, blades: int, height: float) -> None:
    """Tufts of grass and weeds at x (n,), y (n,)."""
    rng = site.rng
    base = np.repeat(site.ground_point(x, y), blades, axis=0)
    number = len(base)
    base = base + rng.normal(0, 0.12, (number, 3)) * np.array([1, 1, 0])
    base[:, 2] = site.ground.height(base[:, 0], base[:, 1]) - 0.02
    azimuth = rng.uniform(0, 2 * np.pi, number)
    tall = height * rng.uniform(0.4, 1.3, number)
    foot = np.stack([np.cos(azimuth), np.sin(azimuth), 0 * azimuth], -1) * (0.03 + 0.04 * height)
    tip = base + np.stack([rng.normal(0, 0.4, number) * tall, rng.normal(0, 0.4, number) * tall, tall], -1)
    site.mesh.add(flat(np.stack([base - foot, base + foot, tip], 1)), VEGETATION)
