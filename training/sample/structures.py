"""Конструкции: poles, lamps, wires, fences, railings, gates, stairs, signs, playground frames."""

import numpy as np

from training.sample.mesh import Floats, boxes, chain, discs, ellipsoids, flat, lattice, quads, tubes, unit
from training.sample.site import STRUCTURE, Site

_UP = np.array([0.0, 0.0, 1.0])


def stairs(site: Site, top: Floats, *, direction: Floats, rise: float, width: float, landing: float) -> None:
    """Steps that go down in `direction` from a landing `rise` above `top`, with a railing where they are high."""
    if not site.clear_of_tripod(top, top + (landing + 2 * rise + 0.5) * direction):
        return
    yaw = float(np.arctan2(direction[1], direction[0]))
    side = np.array([-direction[1], direction[0], 0.0]) * width / 2
    count = max(1, round(rise / 0.16))
    height = rise * (1 - np.arange(count + 1) / (count + 1))
    reach = np.concatenate([[landing / 2], landing + 0.3 * (np.arange(count) + 0.5)])
    size = np.stack([np.where(np.arange(count + 1) == 0, landing, 0.3), np.full(count + 1, width), height + 0.6], -1)
    site.mesh.add(boxes(top + reach[:, None] * direction - 0.6 * _UP, size, yaw), STRUCTURE)
    if rise < 0.5:
        return
    end = landing + 0.3 * count
    for edge in (side * 0.96, -side * 0.96):
        feet = np.stack(
            [
                top + edge + rise * _UP,
                top + edge + landing * direction + rise * _UP,
                top + edge + end * direction,
            ]
        )
        head = feet + 0.95 * _UP
        site.mesh.add(chain(head, 0.025), STRUCTURE)
        site.mesh.add(chain(feet + 0.5 * _UP, 0.015, sides=6), STRUCTURE)
        site.mesh.add(tubes(feet, head, 0.02, sides=6), STRUCTURE)


def pole(site: Site, base: Floats, *, height: float, kind: str, yaw: float) -> Floats:
    """A pole of `kind` lamp, wood or concrete with arms along `yaw`; returns where its wires hang (n, 3)."""
    rng = site.rng
    arm = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    across = np.array([-arm[1], arm[0], 0.0])
    top = base + height * _UP
    thick = {"lamp": 0.08, "wood": 0.12, "concrete": 0.15}[kind]
    site.mesh.add(tubes(base - 0.3 * _UP, top, [[thick, 0.6 * thick]], sides=14), STRUCTURE)
    if kind == "lamp":
        site.mesh.add(tubes(base - 0.1 * _UP, base + 0.9 * _UP, 1.5 * thick, sides=14), STRUCTURE)
        bow = np.stack([top - 0.4 * _UP, top + 0.4 * _UP + 0.5 * arm, top + 0.55 * _UP + 1.5 * arm])
        site.mesh.add(chain(bow, 0.04), STRUCTURE)
        site.mesh.add(boxes(bow[2] + 0.3 * arm - 0.1 * _UP, np.array([0.7, 0.28, 0.14]), yaw), STRUCTURE)
        return np.stack([top - 0.5 * _UP, top - 0.9 * _UP])
    if rng.random() < 0.4:
        foot = base + across * height * 0.3 * rng.choice([-1, 1])
        foot[2] = float(site.ground.height(foot[0], foot[1])) - 0.2
        site.mesh.add(tubes(foot, base + 0.75 * height * _UP, thick * 0.8, sides=10), STRUCTURE)
    site.mesh.add(boxes(top - 0.5 * _UP, np.array([1.6, 0.1, 0.12]), yaw), STRUCTURE)
    hooks = top - 0.3 * _UP + np.array([-0.7, -0.25, 0.25, 0.7])[:, None] * arm
    site.mesh.add(ellipsoids(hooks, np.array([0.06, 0.06, 0.1])), STRUCTURE)
    return np.concatenate([hooks, (top - 1.4 * _UP)[None]])


def wires(site: Site, starts: Floats, ends: Floats, *, sag: float) -> None:
    """Wires hanging between points (n, 3): parabolas, which is what a shallow catenary looks like."""
    part = np.linspace(0, 1, 13)[:, None]
    line = starts[:, None] * (1 - part) + ends[:, None] * part
    line = line - (4 * sag * part * (1 - part)) * _UP
    site.mesh.add(chain(line, 0.016, sides=3), STRUCTURE)


def fence(site: Site, start: Floats, end: Floats, *, kind: str, height: float) -> None:
    """A fence along the ground of `kind` railing, picket, mesh, sheet or hoops."""
    run = (end - start) * np.array([1, 1, 0])
    length = float(np.hypot(run[0], run[1]))
    if length < 0.5 or not site.clear_of_tripod(start, end):
        return
    run /= length
    yaw = float(np.arctan2(run[1], run[0]))
    side = np.array([-run[1], run[0], 0.0])

    def along(step: float) -> Floats:
        at = start + np.linspace(0, length, max(2, round(length / step) + 1))[:, None] * run
        return site.ground_point(at[:, 0], at[:, 1])

    # Far bars are fewer and thicker: the laser spot would not tell them apart either.
    coarse = max(1.0, site.far(*((start + end) / 2)[:2]) / 14)
    posts = along(2.4)
    add = site.mesh.add
    if kind == "hoops":
        feet = along(0.9)
        bow = np.stack(
            [
                feet[:-1],
                feet[:-1] + height * _UP,
                feet[1:] + height * _UP - 0.12 * run,
                feet[1:] - 0.12 * run,
            ],
            1,
        )
        add(chain(bow, 0.02, sides=6), STRUCTURE)
        add(chain(bow[:, ::3] + 0.5 * height * _UP, 0.012, sides=5), STRUCTURE)
        return
    add(boxes(posts - 0.3 * _UP, np.array([0.07, 0.07, height + 0.35]), yaw), STRUCTURE)
    if kind == "railing":
        for level in (0.12, 0.95):
            add(chain(posts + level * height * _UP, 0.025, sides=6), STRUCTURE)
        bars = along(0.14 * coarse)
        add(tubes(bars + 0.12 * height * _UP, bars + 0.95 * height * _UP, 0.011 * coarse, sides=4), STRUCTURE)
    elif kind == "picket":
        for level in (0.2, 0.75):
            add(chain(posts + level * height * _UP + 0.05 * side, 0.03, sides=4), STRUCTURE)
        boards = along(0.145 * coarse)
        tall = height * (1 + site.rng.normal(0, 0.01, len(boards)))
        size = np.stack([np.full(len(boards), 0.095 * coarse), np.full(len(boards), 0.02), tall], -1)
        add(boxes(boards + 0.05 * _UP, size, yaw), STRUCTURE)
    elif kind == "mesh":
        add(chain(posts + height * _UP, 0.02, sides=6), STRUCTURE)
        cell = 0.16 * coarse
        knots = along(cell)
        lean = min(max(1, round(height / cell)), len(knots) - 1)
        for low, high in ((knots[:-lean], knots[lean:]), (knots[lean:], knots[:-lean])):
            foot, head = low + 0.05 * _UP, high + height * _UP
            add(
                quads(np.stack([foot, foot + 0.012 * coarse * run, head + 0.012 * coarse * run, head], 1)),
                STRUCTURE,
            )
    else:
        fold = along(0.06 * coarse)
        phase = np.arange(len(fold)) % 4
        fold = fold + np.where(phase < 2, 0.02, -0.02)[:, None] * side
        add(lattice(np.stack([fold + 0.08 * _UP, fold + height * _UP]), smooth=False), STRUCTURE)
        add(chain(posts + 0.8 * height * _UP + 0.05 * side, 0.025, sides=4), STRUCTURE)


def gate(site: Site, start: Floats, end: Floats, *, height: float) -> None:
    """Two leaves on stout pillars: a frame, a cross, bars."""
    if not site.clear_of_tripod(start, end):
        return
    run = (end - start) * np.array([1, 1, 0])
    yaw = float(np.arctan2(run[1], run[0]))
    pillars = np.stack([start, end])
    site.mesh.add(boxes(pillars - 0.3 * _UP, np.array([0.32, 0.32, height + 0.6]), yaw), STRUCTURE)
    site.mesh.add(boxes(pillars + (height + 0.3) * _UP, np.array([0.42, 0.42, 0.08]), yaw), STRUCTURE)
    bars = start + np.linspace(0.05, 0.95, 26)[:, None] * (end - start)
    site.mesh.add(tubes(bars + 0.12 * _UP, bars + height * _UP, 0.014, sides=4), STRUCTURE)
    for level in (0.15, 0.5 * height, height - 0.05):
        site.mesh.add(tubes(start + level * _UP, end + level * _UP, 0.025, sides=6), STRUCTURE)


def sign(site: Site, base: Floats, *, yaw: float) -> None:
    """A road sign on a post, one or two plates looking along `yaw`."""
    rng = site.rng
    facing = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    across = np.array([-facing[1], facing[0], 0.0])
    top = base + rng.uniform(2.5, 3.4) * _UP
    site.mesh.add(tubes(base - 0.2 * _UP, top, 0.035, sides=10), STRUCTURE)
    at = top - 0.35 * _UP + 0.05 * facing
    for _ in range(int(rng.integers(1, 3))):
        shape = rng.integers(0, 3)
        if shape == 0:
            site.mesh.add(discs(at, facing, 0.34, sides=18), STRUCTURE)
        elif shape == 1:
            corners = np.stack([at - 0.4 * across - 0.3 * _UP, at + 0.4 * across - 0.3 * _UP, at + 0.4 * _UP])
            site.mesh.add(flat(corners[None]), STRUCTURE)
        else:
            site.mesh.add(boxes(at - 0.32 * _UP, np.array([0.02, 0.65, 0.65]), yaw), STRUCTURE)
        at = at - 0.75 * _UP


def bollards(site: Site, start: Floats, end: Floats) -> None:
    """A row of short posts with round heads."""
    if not site.clear_of_tripod(start, end):
        return
    count = max(2, int(np.hypot(*(end - start)[:2]) / 1.5))
    spots = start + np.linspace(0, 1, count)[:, None] * (end - start)
    spots = site.ground_point(spots[:, 0], spots[:, 1])
    site.mesh.add(tubes(spots - 0.2 * _UP, spots + 0.8 * _UP, 0.07, sides=10), STRUCTURE)
    site.mesh.add(ellipsoids(spots + 0.8 * _UP, np.array([0.07, 0.07, 0.06])), STRUCTURE)


def swing(site: Site, base: Floats, *, yaw: float) -> None:
    """A playground swing: two A-frames, a beam, two seats on chains."""
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    across = np.array([-along[1], along[0], 0.0])
    heads = base + 2.2 * _UP + np.array([-1.5, 1.5])[:, None] * along
    site.mesh.add(tubes(heads[:1], heads[1:], 0.045), STRUCTURE)
    for leg in (0.8, -0.8):
        site.mesh.add(tubes(heads + leg * across - 2.3 * _UP, heads, 0.04), STRUCTURE)
    for seat in (-0.7, 0.7):
        middle = base + seat * along + 0.5 * _UP
        site.mesh.add(boxes(middle, np.array([0.45, 0.2, 0.04]), yaw), STRUCTURE)
        ends = middle + np.array([-0.2, 0.2])[:, None] * along
        site.mesh.add(tubes(ends, ends + 1.7 * _UP, 0.012, sides=4), STRUCTURE)


def slide(site: Site, base: Floats, *, yaw: float) -> None:
    """A playground slide: a tower with a ladder and a chute."""
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    across = np.array([-along[1], along[0], 0.0])
    spots = base + np.array([[i, j] for i in (-0.5, 0.5) for j in (-0.5, 0.5)]) @ np.stack([along, across])
    site.mesh.add(tubes(spots - 0.2 * _UP, spots + 2.4 * _UP, 0.05), STRUCTURE)
    site.mesh.add(boxes(base + 1.3 * _UP, np.array([1.1, 1.1, 0.06]), yaw), STRUCTURE)
    roof = spots[[0, 2, 3, 1]] + 2.3 * _UP
    peak = base + 3.0 * _UP
    site.mesh.add(flat(np.stack([np.stack([roof[i], roof[(i + 1) % 4], peak]) for i in range(4)])), STRUCTURE)
    part = np.linspace(0, 1, 9)[:, None]
    line = base + (0.5 + 2.4 * part) * along + (1.3 - 1.15 * np.sin(part * np.pi / 2)) * _UP
    rows = [
        line - 0.25 * across + 0.18 * _UP,
        line - 0.25 * across,
        line + 0.25 * across,
        line + 0.25 * across + 0.18 * _UP,
    ]
    site.mesh.add(lattice(np.stack(rows, 1), smooth=False), STRUCTURE)
    rungs = base - 0.55 * along + np.linspace(0.2, 1.2, 5)[:, None] * _UP
    site.mesh.add(tubes(rungs - 0.3 * across, rungs + 0.3 * across, 0.02, sides=6), STRUCTURE)


def shelter(site: Site, base: Floats, *, yaw: float) -> None:
    """A bus shelter, open along own -y: posts, a curved roof, a slatted back."""
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    inward = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
    posts = base + np.array([[i, j] for i in (-1.8, 0.0, 1.8) for j in (-0.6, 0.6)]) @ np.stack([along, inward])
    site.mesh.add(boxes(posts - 0.2 * _UP, np.array([0.09, 0.09, 2.6]), yaw), STRUCTURE)
    bow = np.linspace(-1, 1, 9)
    arch = base + bow[:, None] * 0.95 * inward + (2.65 - 0.25 * bow * bow)[:, None] * _UP
    site.mesh.add(lattice(np.stack([arch - 2.1 * along, arch + 2.1 * along])), STRUCTURE)
    slats = base + 0.62 * inward + np.linspace(0.3, 2.1, 9)[:, None] * _UP
    site.mesh.add(boxes(slats, np.array([3.7, 0.03, 0.14]), yaw), STRUCTURE)


def pipes(site: Site, points: Floats) -> None:
    """An overhead heating pipe: two lagged tubes on portal frames through points (k, 3) of the ground."""
    run = unit(np.diff(points, axis=0)[:1])[0]
    side = np.array([-run[1], run[0], 0.0])
    for shift in (-0.3, 0.3):
        site.mesh.add(chain(points + shift * side + 0.9 * _UP, 0.2, sides=16), STRUCTURE)
    site.mesh.add(boxes(points - 0.3 * _UP, np.array([0.25, 1.3, 1.0]), float(np.arctan2(run[1], run[0]))), STRUCTURE)
