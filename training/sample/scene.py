"""Seeded scenes: city streets, streets of small houses, and yards between blocks of flats."""

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.sample import buildings, objects, plants, structures
from training.sample.buildings import Style
from training.sample.mesh import Floats, Mesh
from training.sample.site import EXTENT_M, Band, Ground, Site

KINDS = ("street", "suburb", "yard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the scanner sees: triangles around a tripod that stands on the ground at (0, 0, 0)."""

    kind: str
    """street, suburb or yard."""
    mesh: Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side of the road, as distances from its middle line, metres."""

    sign: int
    kerb: float
    pavement: tuple[float, float]
    front: float
    """Where buildings start."""


def build_scene(seed: int | tuple[int, ...], *, kind: str) -> Scene:
    """Builds the scene of a kind that belongs to a seed.

    Args:
        seed: non-negative; a tuple such as (seed, index) is a seed too.
        kind: one of KINDS.

    Returns:
        A scene of about 50 000 to 300 000 triangles; the same seed gives the same triangles.
    """
    rng = np.random.default_rng(seed)
    sides = (_side(rng, kind, 1), _side(rng, kind, -1))
    ground = _ground(rng, kind, sides)
    side = sides[int(rng.integers(0, 2))]
    if rng.random() < 0.3:
        distance = rng.uniform(-0.6, 0.6) * side.kerb
    else:
        distance = side.sign * rng.uniform(
            side.kerb + 0.7, max(side.pavement[1] + (4.0 if kind == "yard" else 0.3), side.kerb + 1)
        )
    station_x = float(rng.uniform(-15, 15))
    station = (station_x, float(ground.middle(station_x) + distance))
    site = Site(rng, ground, station)
    ground.build(site.mesh, near=station_x)
    for each in sides:
        {"street": _city_side, "suburb": _suburb_side, "yard": _yard_side}[kind](site, each)
    _traffic(site, kind, sides)
    _people(site, kind, sides)
    _weeds(site, kind)
    _backdrop(site, kind, sides)
    origin = site.ground_point(*station)
    return Scene(kind=kind, mesh=site.mesh.build(origin=origin, yaw=float(rng.uniform(0, 2 * np.pi))))


def _side(rng: np.random.Generator, kind: str, sign: int) -> _Side:
    kerb = {"street": rng.uniform(3.5, 7.0), "suburb": rng.uniform(2.6, 3.6), "yard": rng.uniform(2.7, 4.5)}[kind]
    verge = {
        "street": rng.choice([0.0, 1.5, 4.0]),
        "suburb": rng.uniform(0.5, 3.0),
        "yard": rng.choice([0.0, 1.2]),
    }[kind]
    walk = {"street": rng.uniform(2.0, 4.5), "suburb": rng.choice([0.9, 1.6]), "yard": rng.uniform(1.0, 2.2)}[kind]
    gap = {
        "street": rng.choice([0.3, 1.5, 5.0]),
        "suburb": rng.uniform(3.5, 9.0),
        "yard": rng.uniform(2.5, 6.0),
    }[kind]
    pavement = (kerb + verge, kerb + verge + walk)
    if kind == "yard" and sign < 0:
        gap = rng.uniform(22.0, 45.0)
    return _Side(sign=sign, kerb=kerb, pavement=pavement, front=pavement[1] + gap)


def _ground(rng: np.random.Generator, kind: str, sides: tuple[_Side, _Side]) -> Ground:
    bands: list[Band] = []
    for side in sides:
        lift = rng.uniform(0.08, 0.2)
        points = [
            (0.0, 0.0),
            (side.kerb, -0.015 * side.kerb),
            (side.kerb + 0.03, lift),
            (side.pavement[0], lift + 0.02),
        ]
        points.append((side.pavement[1], lift + 0.04))
        paved = [True, True, False, True]
        last = side.pavement[1]
        height = lift + 0.04
        room = side.front - last
        if rng.random() < 0.5 and room > 3:
            # A bank, up or down, between the pavement and the buildings: ground as steep as a roof.
            rise = float(np.clip(rng.normal(0, 1.0), -1.6, 1.6))
            start = last + rng.uniform(0.3, 0.25 * room)
            end = start + max(abs(rise) * rng.uniform(1.2, 2.5), 0.4)
            points += [(start, height), (end, height + rise)]
            paved += [False, False]
            last, height = end, height + rise
        points += [
            (max(side.front, last + 0.5), height + rng.normal(0, 0.1)),
            (EXTENT_M, height + rng.normal(0, 3.0)),
        ]
        paved += [False, False]
        for (inner, z_inner), (outer, z_outer), hard in zip(points[:-1], points[1:], paved, strict=True):
            if outer - inner < 1e-6:
                continue
            band = Band(inner=inner, outer=outer, z_inner=z_inner, z_outer=z_outer, paved=hard)
            if side.sign < 0:
                band = Band(inner=-outer, outer=-inner, z_inner=z_outer, z_outer=z_inner, paved=hard)
            bands.append(band)
    waves = np.stack(
        [
            rng.uniform(0.02, 0.25, 6) * [1, 1, 0.5, 0.4, 0.25, 0.2],
            rng.normal(0, 1, 6) / [14, 9, 5, 4, 2.5, 2],
            rng.normal(0, 1, 6) / [14, 9, 5, 4, 2.5, 2],
            rng.uniform(0, 2 * np.pi, 6),
        ],
        -1,
    )
    return Ground(
        bands=tuple(sorted(bands, key=lambda band: band.inner)),
        bend=(
            float(rng.choice([0.0, 1.0, 3.0])) * float(rng.uniform(0.3, 1)),
            float(rng.uniform(25, 60)),
            float(rng.uniform(0, 6)),
        ),
        slope=float(rng.normal(0, 0.02 if kind != "suburb" else 0.035)),
        waves=waves,
    )


def _style(rng: np.random.Generator, kind: str) -> Style:
    if kind == "suburb":
        return Style(
            storeys=int(rng.integers(1, 3)),
            plinth_m=float(rng.uniform(0.3, 0.9)),
            window_m=(float(rng.uniform(0.9, 1.4)), float(rng.uniform(1.1, 1.4))),
            pitch_m=float(rng.uniform(2.4, 3.4)),
            recess_m=float(rng.uniform(0.06, 0.15)),
            glass=float(rng.uniform(0.3, 0.8)),
            roof=str(rng.choice(["gable", "hip", "gable", "flat"])),
        )
    tall = kind == "yard"
    return Style(
        storeys=int(rng.choice([5, 5, 9, 10]) if tall else rng.integers(2, 7)),
        storey_m=float(rng.uniform(2.7, 3.0) if tall else rng.uniform(2.9, 3.9)),
        plinth_m=float(rng.uniform(0.4, 1.2)),
        window_m=(float(rng.uniform(1.0, 1.9)), float(rng.uniform(1.4, 1.9))),
        pitch_m=float(rng.uniform(2.6, 3.6)),
        recess_m=float(rng.uniform(0.08, 0.4)),
        glass=float(rng.uniform(0.4, 0.85)),
        roof=str(rng.choice(["flat", "flat", "gable", "hip"])),
        balconies=float(rng.choice([0.0, 0.3, 0.6]) if tall else rng.choice([0.0, 0.0, 0.25])),
        bays=bool(rng.random() < 0.4),
    )


def _beside(site: Site, x: float, sign: int, distance: float, yaw: float = 0.0) -> tuple[Floats, float]:
    """A point of the ground beside the road, and `yaw` counted from the direction that looks away from the road."""
    base = site.by_road(x, sign * distance)
    return base, site.ground.heading(x) + (0.0 if sign > 0 else np.pi) + yaw


def _row_of_buildings(
    site: Site,
    side: _Side,
    kind: str,
    *,
    reach: tuple[float, float],
    length: tuple[float, float],
    depth: tuple[float, float],
    gap: tuple[float, float],
) -> list[tuple[float, float]]:
    """Buildings along the road; returns the gaps between them as ranges of x."""
    rng = site.rng
    at, end = reach
    style = _style(rng, kind)
    gaps = []
    while at < end:
        long, deep = float(rng.uniform(*length)), float(rng.uniform(*depth))
        if kind != "yard" or rng.random() < 0.3:
            style = _style(rng, kind)
        set_back = float(rng.choice([0.0, rng.uniform(0, 2.5)]))
        middle = at + long / 2
        base, yaw = _beside(site, middle, side.sign, side.front + set_back + deep / 2)
        if site.take(base[0], base[1], long, deep, yaw):
            buildings.building(site, base[0], base[1], length=long, depth=deep, yaw=yaw, style=style)
        space = float(rng.uniform(*gap)) if rng.random() < 0.75 else 0.0
        if space > 2:
            gaps.append((at + long, at + long + space))
        at += long + space
    return gaps


def _city_side(site: Site, side: _Side) -> None:
    rng = site.rng
    if rng.random() < 0.25:
        _park(site, side)
    else:
        gaps = _row_of_buildings(
            site,
            side,
            "street",
            reach=(-95, 80),
            length=(14, 45),
            depth=(10, 16),
            gap=(3, 16),
        )
        for start, end in gaps:
            ends = [_beside(site, x, side.sign, side.front + 0.5)[0] for x in (start, end)]
            kind = str(rng.choice(["railing", "sheet", "mesh"]))
            structures.fence(site, ends[0], ends[1], kind=kind, height=rng.uniform(1.6, 2.2))
            for _ in range(3):
                _plant(site, rng.uniform(start, end), side.sign, side.front + rng.uniform(3, 14), tall=(4, 11))
    step = rng.uniform(5, 12)
    if side.pavement[0] - side.kerb > 1.2 and rng.random() < 0.85:
        for x in np.arange(-75, 75, step) + rng.uniform(0, step):
            if rng.random() < 0.75:
                _plant(site, x + rng.normal(0, 0.5), side.sign, (side.kerb + side.pavement[0]) / 2, tall=(5, 13))
    if side.front - side.pavement[1] > 3:
        _front_garden(site, side)
    _poles(site, side, str(rng.choice(["lamp", "lamp", "concrete"])), spacing=rng.uniform(22, 34))
    _kerbside(site, side, signs=6, benches=5)
    if rng.random() < 0.5:
        start = rng.uniform(-30, 15)
        ends = [_beside(site, x, side.sign, side.kerb + 0.25)[0] for x in (start, start + rng.uniform(8, 25))]
        if rng.random() < 0.6:
            structures.fence(site, ends[0], ends[1], kind="railing", height=1.0)
        else:
            structures.bollards(site, ends[0], ends[1])
    for _ in range(2):
        x = rng.uniform(-30, 30)
        base, yaw = _beside(site, x, side.sign, side.pavement[1] - 0.9)
        if rng.random() < 0.6 and site.take(base[0], base[1], 4.4, 2.2, yaw):
            (structures.shelter if rng.random() < 0.6 else objects.kiosk)(site, base, yaw=yaw)


def _park(site: Site, side: _Side) -> None:
    rng = site.rng
    line = [_beside(site, x, side.sign, side.pavement[1] + 0.5)[0] for x in np.arange(-60, 61, 15.0)]
    kind, height = str(rng.choice(["railing", "hoops", "mesh"])), rng.uniform(0.9, 1.7)
    for start, end in itertools.pairwise(line):
        if rng.random() < 0.85:
            structures.fence(site, start, end, kind=kind, height=0.55 if kind == "hoops" else height)
    for _ in range(28):
        _plant(site, rng.uniform(-50, 50), side.sign, side.pavement[1] + rng.uniform(2, 40), tall=(5, 17))
    for _ in range(10):
        base, _ = _beside(site, rng.uniform(-30, 30), side.sign, side.pavement[1] + rng.uniform(1.5, 15))
        if site.take(base[0], base[1], 1.2, 1.2, 0.0):
            plants.bush(site, base, height=rng.uniform(0.7, 2.2))


def _suburb_side(site: Site, side: _Side) -> None:
    rng = site.rng
    _row_of_buildings(site, side, "suburb", reach=(-85, 75), length=(7, 14), depth=(7, 11), gap=(6, 14))
    at = -60.0
    while at < 60:
        width = rng.uniform(14, 24)
        kind = str(rng.choice(["picket", "railing", "mesh", "sheet", "hedge"], p=[0.3, 0.15, 0.2, 0.15, 0.2]))
        height = rng.uniform(1.1, 1.9)
        opening = at + rng.uniform(2, width - 5)
        distance = side.pavement[1] + 0.4
        points = [_beside(site, x, side.sign, distance)[0] for x in (at, opening, opening + 3.4, at + width)]
        for start, end in ((points[0], points[1]), (points[2], points[3])):
            if kind == "hedge":
                plants.hedge(site, start, end, height=height, width=rng.uniform(0.6, 1.1))
            else:
                structures.fence(site, start, end, kind=kind, height=height)
        if rng.random() < 0.6:
            structures.gate(site, points[1], points[2], height=rng.uniform(1.3, 1.8))
        elif rng.random() < 0.6:
            base, yaw = _beside(site, opening + 1.7, side.sign, side.front - 1.5, np.pi / 2)
            if site.take(base[0], base[1], 4.6, 1.9, yaw):
                objects.car(site, base, yaw=yaw)
        fence = [_beside(site, at, side.sign, far)[0] for far in (distance, side.front + 18)]
        structures.fence(site, fence[0], fence[1], kind=str(rng.choice(["mesh", "picket"])), height=1.3)
        for _ in range(int(rng.integers(2, 8))):
            _plant(site, at + rng.uniform(0, width), side.sign, distance + rng.uniform(1.5, 22), tall=(4, 13))
        for _ in range(3):
            base, _ = _beside(site, at + rng.uniform(1, width - 1), side.sign, distance + rng.uniform(0.8, 6))
            if site.take(base[0], base[1], 0.8, 0.8, 0.0):
                plants.bush(site, base, height=rng.uniform(0.5, 1.8))
        at += width
    kind = str(rng.choice(["wood", "concrete"]))
    _poles(site, side, kind, spacing=rng.uniform(24, 34))
    _kerbside(site, side, signs=2, benches=3)
    for x in rng.uniform(-40, 40, 3):
        _plant(site, float(x), side.sign, (side.kerb + side.pavement[0]) / 2, tall=(3, 8))


def _yard_side(site: Site, side: _Side) -> None:
    rng = site.rng
    _row_of_buildings(site, side, "yard", reach=(-60, 45), length=(35, 75), depth=(11, 14), gap=(6, 20))
    for x in (-1, 1):
        if rng.random() < 0.55:
            base = site.by_road(x * rng.uniform(38, 60), side.sign * (side.pavement[1] + 16))
            long = rng.uniform(22, 40)
            yaw = -x * np.pi / 2
            if site.take(base[0], base[1], long, 12, yaw):
                buildings.building(site, base[0], base[1], length=long, depth=12, yaw=yaw, style=_style(rng, "yard"))
    if side.sign > 0:
        _front_garden(site, side)
    else:
        _playground(site, side)
    _poles(site, side, "lamp", spacing=rng.uniform(25, 45))
    _kerbside(site, side, signs=2, benches=7)
    base, yaw = _beside(site, rng.uniform(-35, 35), side.sign, side.pavement[1] + 1.2)
    if site.take(base[0], base[1], 7.0, 2.2, yaw):
        across = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        for number in range(int(rng.integers(2, 5))):
            spot = base + (number - 1.5) * 1.55 * across
            objects.dumpster(site, site.ground_point(spot[0], spot[1]), yaw=yaw + rng.normal(0, 0.1))
        back = base + 1.0 * np.array([-across[1], across[0], 0.0])
        structures.fence(site, back - 3.4 * across, back + 3.4 * across, kind="sheet", height=1.6)


def _front_garden(site: Site, side: _Side) -> None:
    """The strip before a block: low fence or hedge, bushes, trees."""
    rng = site.rng
    distance = side.pavement[1] + 0.3
    choice = str(rng.choice(["hoops", "hedge", "picket", "none"]))
    for at in np.arange(-45, 45, 12.0):
        ends = [_beside(site, x, side.sign, distance)[0] for x in (at, at + rng.uniform(6, 10))]
        if choice == "hedge":
            plants.hedge(site, ends[0], ends[1], height=rng.uniform(0.6, 1.2), width=0.7)
        elif choice != "none":
            structures.fence(site, ends[0], ends[1], kind=choice, height=rng.uniform(0.45, 0.8))
    for _ in range(22):
        base, _ = _beside(site, rng.uniform(-40, 40), side.sign, rng.uniform(distance + 0.7, side.front - 0.9))
        if site.take(base[0], base[1], 0.8, 0.8, 0.0):
            plants.bush(site, base, height=rng.uniform(0.4, 1.9))
    for _ in range(7):
        _plant(
            site,
            rng.uniform(-45, 45),
            side.sign,
            rng.uniform(distance + 0.8, max(side.front - 2, distance + 1)),
            tall=(4, 12),
        )


def _playground(site: Site, side: _Side) -> None:
    """The open middle of a yard: swings, slides, benches, trees, paths between hoops, now and then garages or pipes."""
    rng = site.rng
    near, deep = side.pavement[1] + 1.5, side.front - 4
    for make, room in ((structures.swing, 3.6), (structures.slide, 4.0), (structures.swing, 3.6)):
        for _ in range(4):
            x = rng.uniform(-25, 25)
            base, yaw = _beside(site, x, side.sign, rng.uniform(near + 2, deep), rng.uniform(0, 6))
            if site.take(base[0], base[1], room, room, yaw):
                make(site, base, yaw=yaw)
                break
    if rng.random() < 0.4:
        x = rng.uniform(-30, 30)
        count = int(rng.integers(3, 8))
        base, yaw = _beside(site, x, side.sign, deep - 1)
        if site.take(base[0], base[1], 3.4 * count, 6, yaw):
            buildings.garages(site, base[0], base[1], count=count, yaw=yaw)
    if rng.random() < 0.35:
        line = np.stack([_beside(site, x, side.sign, near + 0.7 * (deep - near))[0] for x in np.arange(-40, 41, 5.0)])
        if site.clear_of_tripod(line[0], line[-1]):
            structures.pipes(site, line)
    if rng.random() < 0.6:
        corners = [_beside(site, x, side.sign, y)[0] for x, y in ((-18, near), (18, near), (18, deep), (-18, deep))]
        kind = str(rng.choice(["hoops", "mesh", "railing"]))
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            part = rng.uniform(0.6, 0.95)
            structures.fence(
                site, start, start + part * (end - start), kind=kind, height=0.5 if kind == "hoops" else 1.2
            )
    for _ in range(int(rng.integers(10, 32))):
        _plant(site, rng.uniform(-45, 45), side.sign, rng.uniform(near, deep + 2), tall=(4, 15))
    for _ in range(10):
        base, yaw = _beside(site, rng.uniform(-30, 30), side.sign, rng.uniform(near, deep), rng.uniform(0, 6))
        if site.take(base[0], base[1], 1.9, 0.9, yaw):
            if rng.random() < 0.5:
                objects.bench(site, base, yaw=yaw)
            else:
                plants.bush(site, base, height=rng.uniform(0.5, 2.0))


def _plant(site: Site, x: float, sign: int, distance: float, *, tall: tuple[float, float]) -> None:
    base, _ = _beside(site, x, sign, distance)
    if not site.take(base[0], base[1], 1.5, 1.5, 0.0):
        return
    kind = str(site.rng.choice(["broadleaf", "conifer", "bare"], p=[0.68, 0.17, 0.15]))
    if site.far(base[0], base[1]) < 4:
        kind = "broadleaf"
    plants.tree(site, base, height=float(site.rng.uniform(*tall)), kind=kind)


def _poles(site: Site, side: _Side, kind: str, *, spacing: float) -> None:
    rng = site.rng
    height = rng.uniform(6.5, 9.5)
    start = rng.uniform(-80, -80 + spacing)
    previous: Floats | None = None
    wired = kind != "lamp" or rng.random() < 0.5
    sag = rng.uniform(0.3, 0.9)
    for x in np.arange(start, 80, spacing):
        base, yaw = _beside(site, float(x), side.sign, side.kerb + 0.6, -np.pi / 2)
        if not site.take(base[0], base[1], 0.4, 0.4, 0.0):
            previous = None
            continue
        hooks = structures.pole(site, base, height=height, kind=kind, yaw=yaw)
        if wired and previous is not None:
            structures.wires(site, previous, hooks, sag=sag)
        if kind != "lamp" and rng.random() < 0.6:
            house, _ = _beside(site, float(x) + rng.uniform(-9, 9), side.sign, side.front + 0.2)
            drop = house + np.array([0, 0, rng.uniform(3.0, 5.0)])
            structures.wires(site, hooks[1:2], drop[None], sag=0.3)
        previous = hooks


def _kerbside(site: Site, side: _Side, *, signs: int, benches: int) -> None:
    """Signs at the kerb; benches with litter bins, flower tubs and bicycles at the back of the pavement."""
    rng = site.rng
    for x in rng.uniform(-40, 40, signs):
        base, yaw = _beside(site, float(x), side.sign, side.kerb + 0.4, rng.choice([0, np.pi]) + rng.normal(0, 0.15))
        if site.take(base[0], base[1], 0.3, 0.3, 0.0):
            structures.sign(site, base, yaw=yaw)
    for x in rng.uniform(-28, 28, benches):
        base, yaw = _beside(site, float(x), side.sign, side.pavement[1] - 0.4, rng.normal(0, 0.05))
        choice = rng.integers(0, 4)
        if not site.take(base[0], base[1], 2.6, 0.7, yaw):
            continue
        if choice <= 1:
            objects.bench(site, base, yaw=yaw)
            objects.urn(site, site.ground_point(*(base + 1.15 * np.array([np.cos(yaw), np.sin(yaw), 0]))[:2]))
        elif choice == 2:
            objects.flower_tub(site, base)
        else:
            objects.bicycle(site, base, yaw=yaw + rng.normal(0, 0.3))


def _traffic(site: Site, kind: str, sides: tuple[_Side, _Side]) -> None:
    rng = site.rng
    for side in sides:
        filled = rng.uniform(0.1, 0.75) if kind != "suburb" else rng.uniform(0.05, 0.25)
        for x in np.arange(-48, 48, 5.9) + rng.uniform(0, 5):
            if rng.random() > filled:
                continue
            skew = rng.normal(0, 0.04) + rng.choice([0, np.pi])
            base, yaw = _beside(site, float(x), side.sign, side.kerb - 1.15, skew)
            if site.take(base[0], base[1], 5.0, 1.9, yaw):
                objects.car(site, base, yaw=yaw)
    if kind == "yard":
        return
    for _ in range(int(rng.integers(0, 4))):
        side = sides[int(rng.integers(0, 2))]
        base, yaw = _beside(site, rng.uniform(-45, 45), side.sign, 0.42 * side.kerb, np.pi)
        if site.take(base[0], base[1], 7.0, 2.3, yaw):
            (objects.car if rng.random() < 0.75 else objects.lorry)(site, base, yaw=yaw)


def _people(site: Site, kind: str, sides: tuple[_Side, _Side]) -> None:
    rng = site.rng
    for _ in range(int(rng.integers(2, 7 if kind == "suburb" else 14))):
        side = sides[int(rng.integers(0, 2))]
        base, yaw = _beside(
            site, rng.uniform(-22, 22), side.sign, rng.uniform(*side.pavement), rng.uniform(0, 2 * np.pi)
        )
        if site.take(base[0], base[1], 0.5, 0.5, 0.0):
            objects.person(site, base, yaw=yaw)


def _weeds(site: Site, kind: str) -> None:
    """Grass on the open ground near the scanner, and weeds along the edges."""
    rng = site.rng
    count = 500 if kind != "street" else 350
    reach = 3 + 22 * rng.random(count)
    azimuth = rng.uniform(0, 2 * np.pi, count)
    x, y = site.station[0] + reach * np.cos(azimuth), site.station[1] + reach * np.sin(azimuth)
    open_ground = _on_open_ground(site.ground, x, y)
    tall = float(rng.choice([0.12, 0.2, 0.35]))
    plants.grass(site, x[open_ground], y[open_ground], blades=12, height=tall)


def _backdrop(site: Site, kind: str, sides: tuple[_Side, _Side]) -> None:
    """What closes the view far off: a house across the end of the road, trees all round."""
    rng = site.rng
    for end in (-1, 1):
        if kind != "yard" and rng.random() < 0.4:
            x = end * rng.uniform(72, 92)
            base, yaw = site.by_road(x, rng.uniform(-6, 6)), -end * np.pi / 2
            long, deep = rng.uniform(14, 30), rng.uniform(9, 13)
            if site.take(base[0], base[1], long, deep, yaw):
                buildings.building(site, base[0], base[1], length=long, depth=deep, yaw=yaw, style=_style(rng, kind))
    clear = max(side.pavement[1] for side in sides) + 2
    for _ in range(int(rng.integers(12, 40))):
        reach, azimuth = rng.uniform(38, 98), rng.uniform(0, 2 * np.pi)
        x, y = site.station[0] + reach * np.cos(azimuth), site.station[1] + reach * np.sin(azimuth)
        across = float(y - site.ground.middle(x))
        if abs(across) > clear or abs(x) > 75:
            _plant(site, x, 1, across, tall=(7, 19))


def _on_open_ground(ground: Ground, x: Floats, y: Floats) -> npt.NDArray[np.bool_]:
    distance = y - ground.middle(x)
    hard = np.zeros(len(x), bool)
    for band in ground.bands:
        if band.paved or band.outer - band.inner < 0.1:
            hard |= (distance > band.inner - 0.05) & (distance < band.outer + 0.05)
    return ~hard
