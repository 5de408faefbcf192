"""A model of a careful person who corrects pre-labels: shapes of a frame and the truth → what that person changes.

Where no people are at hand, it closes the loop: `sscloud cycle --simulate` measures with it what pre-labels save.
It is no copy machine. A person who looks at a frame in CVAT

- sees nothing smaller than a speck, and gives a speck the label of what is around it;
- leaves a border alone that lies a hair beside the true one, but not a thing that is missing altogether;
- accepts a shape as it is when its label is right, its outline nearly so, and no single patch of it much mistaken;
- gives a shape another label when most of it is something else;
- deletes a shape that is nothing for the most part, or a mixture;
- cuts and extends the others, which keep their number and their `source`, as in CVAT;
- draws what is still missing, as masks; what has one label and lies close together is one mask.

What comes of it is near the truth, and not the truth. `Person` has the numbers. Nothing is left to chance: the same
shapes and the same truth make the same changes. Every patch is looked at by itself, which is meant for the small
panoramas of simulations: half a second at a width of 512 pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cv2
import numpy as np
from cvat_sdk.masks import encode_mask
from numpy.typing import NDArray

from sscloud.labels import VOID
from training.annotations import PAINTED, painting
from training.rasterise import rasterise

BinaryMask = NDArray[np.bool_]
LabelMap = NDArray[np.uint8]

MANUAL: Final = "manual"
"""The `source` of what a person draws."""

_NOBODY: Final = -1
"""In a map of owners: no shape is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """How exact, and how quick, somebody is."""

    speck: int = 4
    """Pixels; smaller patches are not seen."""
    border: float = 0.1
    """Degrees; a border no farther from its true place is left there. Less than a pixel in small panoramas."""
    reach: float = 6.0
    """Degrees; things of one label that are closer belong to one mask."""
    accepted: float = 0.985
    """IoU of a shape with what it should be, from which on it is accepted."""
    patch: float = 0.001
    """Share of the panorama; a mistaken patch of that size is corrected however good the rest of the shape is."""
    most: float = 0.5
    """Share of a shape that decides what it is."""
    glance: float = 0.5
    """Seconds to look at a shape, or at a frame."""
    action: float = 3.0
    """Seconds to choose a shape and a tool, or a label."""
    pace: float = 60.0
    """Pixels a second, along an outline that is drawn or cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What a person changes in a frame."""

    updated: tuple[dict[str, Any], ...]
    """Shapes with their number and their new content; those with another label lose their attributes, as in CVAT."""
    deleted: tuple[dict[str, Any], ...]
    created: tuple[dict[str, Any], ...]
    """New shapes, without numbers."""
    before: LabelMap
    """(H, W) uint8 label ids of the frame as it was."""
    label_map: LabelMap
    """(H, W) uint8 label ids of the frame afterwards."""
    changed: int
    """Pixels that have another label afterwards."""
    accepted: int
    """Shapes that stay as they were."""
    relabelled: int
    """Of `updated`: shapes with another label."""
    seconds: float
    """Of work, at the pace of `Person`: to compare frames with each other, not to plan anybody's week."""

    @property
    def touched(self) -> int:
        """Shapes that were changed, deleted or drawn."""
        return len(self.updated) + len(self.deleted) + len(self.created)


def correct(
    raws: Sequence[Mapping[str, Any]],
    truth: LabelMap,
    *,
    frame: int,
    label_ids: Mapping[int, int],
    background: int,
    person: Person | None = None,
) -> Correction:
    """What somebody changes in a frame.

    Args:
        raws: its shapes, as `Server.annotations` lists them.
        truth: (H, W) uint8 label ids. Where it is `VOID` nobody can tell, and what is there stays.
        frame: number in the task, for new shapes.
        label_ids: label number on the server → label id in the truth.
        background: label id of what nobody draws.
        person: who corrects.

    Raises:
        DatasetError: a shape that cannot be painted.
        ValueError: the truth holds an id that no label draws.
    """
    person = person or Person()
    known = {*label_ids.values(), background, VOID}
    if strange := sorted(set(np.unique(truth).tolist()) - known):
        raise ValueError(f"The truth holds the ids {strange}, and labels draw only {sorted(label_ids.values())}.")
    shapes = [dict(raw) for raw in raws if raw["type"] in PAINTED]
    owners = _owners(shapes, (truth.shape[0], truth.shape[1]))
    labels = np.array([*(label_ids[shape["label_id"]] for shape in shapes), background], np.uint8)
    before = labels[owners]  # -1, nobody, finds the background at the end
    wanted = _wanted(before, truth, person)
    parts = _judge(owners, labels[:-1], wanted, background=background, person=person)
    new = _complete(parts, wanted, background=background, person=person)
    for part in parts:
        part.accept(person, owners.size)
    return _Desk(shapes, parts, owners, frame=frame, label_ids=label_ids, background=background, person=person).change(
        new, before
    )


# --- what the person sees ---------------------------------------------------------------------------------------------


def _owners(shapes: Sequence[Mapping[str, Any]], size_hw: tuple[int, int]) -> NDArray[np.int64]:
    """(H, W) place in `shapes` of the shape on top; `_NOBODY` where there is none."""
    owners = np.full(size_hw, _NOBODY, np.int64)
    for place in sorted(range(len(shapes)), key=lambda place: shapes[place].get("z_order") or 0):
        owners[_mask(shapes[place], size_hw)] = place
    return owners


def _mask(shape: Mapping[str, Any], size_hw: tuple[int, int]) -> BinaryMask:
    """(H, W) bool: the pixels that a shape covers."""
    drawing = painting([shape], label_names={shape["label_id"]: ""}, size_hw=size_hw)
    return rasterise(drawing.shapes, size_hw=size_hw, label_id_of=lambda _: 1, fill=0).label_map.view(np.bool_)


def _wanted(before: LabelMap, truth: LabelMap, person: Person) -> LabelMap:
    """(H, W) uint8 label ids that the person would be content with."""
    wanted = _without_specks(truth, person.speck)
    np.copyto(wanted, before, where=wanted == VOID)
    np.copyto(wanted, before, where=_beside(before, wanted, round(person.border * truth.shape[1] / 360)))
    np.copyto(wanted, before, where=_specks(wanted, wanted != before, person.speck))
    return wanted


def _without_specks(truth: LabelMap, speck: int) -> LabelMap:
    """The truth with every patch of fewer than `speck` pixels given to what is nearest."""
    specks = _specks(truth, np.ones(truth.shape, np.bool_), speck)
    if not specks.any() or specks.all():
        return truth.copy()
    _, nearest = cv2.distanceTransformWithLabels(
        specks.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    label_of = np.zeros(int(nearest.max()) + 1, np.uint8)
    label_of[nearest[~specks]] = truth[~specks]
    return np.where(specks, label_of[nearest], truth)


def _window(reach: int) -> NDArray[np.uint8]:
    """What dilates a mask by so many pixels."""
    return np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)


def _dilated(mask: BinaryMask, window: NDArray[np.uint8]) -> BinaryMask:
    return cv2.dilate(mask.view(np.uint8), window).view(np.bool_)


def _specks(label_map: LabelMap, where: BinaryMask, speck: int) -> BinaryMask:
    """(H, W) bool: touching pixels of one label, only `where` that is true, that are fewer than `speck`."""
    found = np.zeros(label_map.shape, np.bool_)
    for label_id in np.unique(label_map[where]).tolist():
        mask = where & (label_map == label_id)
        _, components, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        found |= mask & (stats[:, cv2.CC_STAT_AREA] < speck)[components]
    return found


def _beside(before: LabelMap, wanted: LabelMap, border: int) -> BinaryMask:
    """Where a border is merely drawn beside its place: both labels of a pixel are there in both maps, close by.

    A thing that is missing altogether is not such a place, however thin it is: it is nowhere in the first map.
    """
    window = _window(border)
    here, there = np.zeros_like(before, np.bool_), np.zeros_like(before, np.bool_)
    for label_id in np.union1d(before, wanted).tolist():
        is_drawn, is_wanted = before == label_id, wanted == label_id
        here |= is_drawn & _dilated(is_wanted, window)
        there |= is_wanted & _dilated(is_drawn, window)
    beside: BinaryMask = (before != wanted) & here & there
    return beside


def _patches(mask: BinaryMask) -> Iterator[BinaryMask]:
    """Every patch of a mask, each as an (H, W) mask. Corners touch: a wire that runs askew is one thing."""
    count, components = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    for number in range(1, count):
        yield components == number


# --- what the person decides ------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Part:
    """One of the frame's shapes while the person decides about it."""

    seen: BinaryMask
    """(H, W): where it is on top."""
    held: BinaryMask
    """Of `seen`: what is right under the label that it will have."""
    label_id: int | None
    """The label that it will have; None: it is deleted."""
    relabelled: bool = False
    gained: list[BinaryMask] = field(default_factory=list)
    """Patches that belong to it and touch it."""
    accepted: bool = False
    """Its outline stays as it is."""

    def accept(self, person: Person, pixels: int) -> None:
        """Decide whether the outline is good enough; `pixels` are those of the panorama."""
        if self.label_id is None:
            return
        wrong = _patches(self.seen & ~self.held)
        largest = max((int(np.count_nonzero(mask)) for mask in (*wrong, *self.gained)), default=0)
        gained = sum(int(np.count_nonzero(mask)) for mask in self.gained)
        seen, held = int(np.count_nonzero(self.seen)), int(np.count_nonzero(self.held))
        good = held >= person.accepted * (seen + gained)
        self.accepted = largest == 0 or (good and largest < person.patch * pixels)


def _judge(
    owners: NDArray[np.int64], labels: LabelMap, wanted: LabelMap, *, background: int, person: Person
) -> list[_Part]:
    """Which shapes stay, under which label."""
    parts = []
    for place, label in enumerate(labels.tolist()):
        seen = owners == place
        counts = np.bincount(wanted[seen], minlength=256)
        best, size = int(np.argmax(counts)), int(counts.sum())
        verdict: int | None = label
        if counts[label] < person.most * size:
            verdict = best if best != background and counts[best] >= person.most * size else None
        held = seen & (wanted == verdict) if verdict is not None else np.zeros_like(seen)
        if size and np.count_nonzero(held) < person.speck:
            verdict, held = None, np.zeros_like(seen)
        parts.append(_Part(seen=seen, held=held, label_id=verdict, relabelled=verdict not in (None, label)))
    return parts


def _complete(
    parts: Sequence[_Part], wanted: LabelMap, *, background: int, person: Person
) -> list[tuple[BinaryMask, int]]:
    """Give what is missing to the shapes that it is close to; what is left has to be drawn."""
    holders = np.full(wanted.shape, _NOBODY, np.int64)
    for place, part in enumerate(parts):
        holders[part.held] = place
    missing = (holders == _NOBODY) & (wanted != background)
    reach = person.reach * wanted.shape[1] / 360
    near, half = _window(round(reach)), _window(round(reach / 2))
    new = []
    for label_id in np.unique(wanted[missing]).tolist():
        rest = np.zeros(wanted.shape, np.bool_)
        for mask in _patches(missing & (wanted == label_id)):
            holder = _closest(mask, np.where(wanted == label_id, holders, _NOBODY), near)
            if holder is None:
                rest |= mask
            else:
                parts[holder].gained.append(mask)
        for group in _patches(_dilated(rest, half)):
            mask = group & rest
            if np.count_nonzero(mask) >= person.speck:
                new.append((mask, label_id))
    return new


def _closest(mask: BinaryMask, holders: NDArray[np.int64], near: NDArray[np.uint8]) -> int | None:
    """The shape that a patch touches most, else the one it is close to; None where there is none."""
    for window in (_window(1), near):
        found = holders[_dilated(mask, window)]
        found = found[found != _NOBODY]
        if len(found):
            return int(np.argmax(np.bincount(found)))
    return None


# --- what the person does ---------------------------------------------------------------------------------------------


class _Desk:
    """The frame while its changes are written down."""

    def __init__(
        self,
        shapes: Sequence[dict[str, Any]],
        parts: Sequence[_Part],
        owners: NDArray[np.int64],
        *,
        frame: int,
        label_ids: Mapping[int, int],
        background: int,
        person: Person,
    ) -> None:
        self._label_ids, self._background = label_ids, background
        self._numbers = {label_id: number for number, label_id in label_ids.items()}
        self._shapes, self._parts, self._owners = shapes, parts, owners
        self._frame, self._person = frame, person
        self._top = 1 + max((shape.get("z_order") or 0 for shape in shapes), default=-1)
        self._standing = np.isin(owners, [place for place, part in enumerate(parts) if part.accepted])
        """Pixels of shapes whose outline stays: what covers them has to lie above."""
        self._spared = np.zeros(owners.shape, np.bool_)
        """Pixels that an accepted shape should have and does not take: they stay with those who have them."""
        for part in parts:
            if part.accepted:
                for mask in part.gained:
                    self._spared |= mask
        self._seconds = person.glance

    def change(self, new: Sequence[tuple[BinaryMask, int]], before: LabelMap) -> Correction:
        """All changes; `new` are the masks to draw, with their label ids."""
        updated: list[dict[str, Any]] = []
        deleted: list[dict[str, Any]] = []
        created: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        relabelled = 0
        for shape, part in zip(self._shapes, self._parts, strict=True):
            self._seconds += self._person.glance
            if part.accepted and not part.relabelled:
                kept.append(shape)
                continue
            self._seconds += self._person.action
            if part.label_id is None:
                deleted.append(shape)
                continue
            mask = None if part.accepted else self._outline(part)
            if mask is not None:
                # What is cut off or added is bordered by an old edge and by a new one: only the new one is drawn.
                self._seconds += _edges(mask ^ part.seen) / 2 / self._person.pace
                if shape["type"] != "mask":  # no pixels can be cut from an outline: it is drawn again
                    deleted.append(shape)
                    created.append(self._drawn(mask, part.label_id))
                    continue
            relabelled += part.relabelled
            updated.append(self._changed(shape, part, mask))
        for mask, label_id in new:
            self._seconds += self._person.action + _edges(mask) / self._person.pace
            created.append(self._drawn(mask, label_id))
        after = self._paint([*kept, *updated, *created])
        return Correction(
            updated=tuple(updated),
            deleted=tuple(deleted),
            created=tuple(created),
            before=before,
            label_map=after,
            changed=int(np.count_nonzero(after != before)),
            accepted=len(kept),
            relabelled=relabelled,
            seconds=self._seconds,
        )

    def _outline(self, part: _Part) -> BinaryMask:
        """The mask that a shape gets."""
        mask = part.held | (part.seen & self._spared)
        for gained in part.gained:
            mask |= gained
        return mask

    def _changed(self, shape: dict[str, Any], part: _Part, mask: BinaryMask | None) -> dict[str, Any]:
        """A shape with another label, another outline, or both."""
        changed = dict(shape)
        if part.relabelled and part.label_id is not None:
            changed |= {"label_id": self._numbers[part.label_id], "attributes": []}
        if mask is not None:
            changed |= {"points": _points(mask)}
            if (mask & self._standing).any():
                changed |= {"z_order": self._top}
        return changed

    def _drawn(self, mask: BinaryMask, label_id: int) -> dict[str, Any]:
        """A new mask."""
        return {
            "type": "mask",
            "frame": self._frame,
            "label_id": self._numbers[label_id],
            "points": _points(mask),
            "z_order": self._top if (mask & self._standing).any() else 0,
            "rotation": 0.0,
            "occluded": False,
            "outside": False,
            "group": 0,
            "source": MANUAL,
            "attributes": [],
        }

    def _paint(self, shapes: Sequence[Mapping[str, Any]]) -> LabelMap:
        """(H, W) uint8 label ids of these shapes."""
        names = {shape["label_id"]: str(shape["label_id"]) for shape in shapes}
        size_hw = (self._owners.shape[0], self._owners.shape[1])
        drawing = painting(shapes, label_names=names, size_hw=size_hw)
        return rasterise(
            drawing.shapes, size_hw=size_hw, label_id_of=lambda name: self._label_ids[int(name)], fill=self._background
        ).label_map


def _points(mask: BinaryMask) -> list[float]:
    return [float(value) for value in encode_mask(mask)]


def _edges(mask: BinaryMask) -> int:
    """Length of the outline of a mask: sides that one of its pixels shares with another, or with the border."""
    framed = np.pad(mask, 1)
    return int(np.count_nonzero(framed[1:] ^ framed[:-1]) + np.count_nonzero(framed[:, 1:] ^ framed[:, :-1]))
