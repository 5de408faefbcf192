"""Which panoramas are learned from, which choose the best epoch, and which measure: decided once, never moved.

Panoramas that belong together (a task, a job, a site in the file name) never straddle: the unit is the connected
component of "same group" and "same image". Components are placed rarest class first, each where its classes are missed
most (K. Sechidis, G. Tsoumakas, I. Vlahavas: On the Stratification of Multi-Label Data, 2011; here with whole groups
and their pixels in place of examples and labels). Nothing here depends on the order of the items or on chance.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import ConfigError, DatasetError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Source = Mapping[str, str | int | None]
"""Where an item comes from; see `training.manifest`."""

_LISTED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """What the splits of a data set are made by; kept in its manifest."""

    group_by: str = "task"
    """image, task, job, or a regular expression that finds the group in the file name."""
    validation: float = 10.0
    """Percent of the panoramas."""
    test: float = 10.0
    """Percent of the panoramas."""

    def __post_init__(self) -> None:
        for name, value in (("validation", self.validation), ("test", self.test)):
            if not 0 <= value < 100:
                raise ConfigError(f"--{name} must be a percentage from 0 to below 100, found {value:g}.")
        if self.validation + self.test >= 100:
            raise ConfigError(
                f"--validation {self.validation:g} and --test {self.test:g} leave nothing to train on. Together they "
                "must be below 100 percent."
            )
        try:
            re.compile(self.group_by)
        except re.error as error:
            raise ConfigError(
                f"--group-by {self.group_by!r} is no regular expression: {error}. Use image, task, job, or an "
                r"expression like '^(site\d+)_'."
            ) from error

    @property
    def shares(self) -> dict[Split, float]:
        """Share of each split that is wanted at all; they add up to 1."""
        shares: dict[Split, float] = {
            "train": (100 - self.validation - self.test) / 100,
            "validation": self.validation / 100,
            "test": self.test / 100,
        }
        return {name: share for name, share in shares.items() if share > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMemory:
    """All that was ever decided; it survives the items."""

    images: Mapping[str, Split] = field(default_factory=dict)
    """sha256 of an image → its split."""
    groups: Mapping[str, Split] = field(default_factory=dict)
    """Group key → the split that its new members join."""
    pinned: frozenset[str] = frozenset()
    """sha256 of the images that were put where they are whatever their group: they say nothing of the group."""


class Member(Protocol):
    """What `assign` needs of an item; `training.manifest.ManifestItem` has it."""

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def image_sha256(self) -> str:
        """Of the image file."""

    @property
    def group(self) -> str:
        """The group's key."""

    @property
    def pixels(self) -> Mapping[int, int]:
        """Label id → pixels."""

    @property
    def split(self) -> Split | None:
        """What was decided before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What `assign` decided."""

    splits: Mapping[str, Split | None]
    """Name → split, of every item."""
    memory: SplitMemory
    too_few: str | None = None
    """Why items were left without a split, a sentence; None when every item has one."""
    notes: tuple[str, ...] = ()
    """What a person should know: groups that straddle all the same."""


def group_key(rule: str, *, source: Source, name: str, image_sha256: str) -> str:
    """The group of an item.

    Args:
        rule: image, task, job, or a regular expression: its first capture group, else all it matched, is the group.
            Where the source knows no task (job), the image is a group of its own.
        source: where the item comes from.
        name: the file name it has there.
        image_sha256: of the image file.

    Raises:
        DatasetError: the expression does not match the name.
    """
    if rule in ("task", "job"):
        number = source.get(rule)
        if number is not None:
            return f"{rule}:{source.get('server') or source.get('archive') or ''}#{number}"
    elif rule != "image":
        match = re.search(rule, name)
        if match is None:
            raise _unmatched(rule, [name])
        return f"name:{match[1] if match.re.groups and match[1] is not None else match[0]}"
    return f"image:{image_sha256}"


def require_match(rule: str, names: Iterable[str]) -> None:
    """Check that every name has a group, before anything is downloaded.

    Raises:
        DatasetError: `rule` is an expression that does not match these names.
    """
    if rule not in ("image", "task", "job") and (lost := [name for name in names if not re.search(rule, name)]):
        raise _unmatched(rule, lost)


def _unmatched(rule: str, names: Sequence[str]) -> DatasetError:
    more = f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return DatasetError(
        f"--group-by {rule!r} does not match {len(names)} file name(s): {', '.join(names[:_LISTED])}{more}. Every name "
        "must have a group: widen the expression, or use --group-by task, job or image."
    )


def assign(
    items: Sequence[Member],
    *,
    memory: SplitMemory,
    plan: SplitPlan,
    pinned: Mapping[str, Split] | None = None,
) -> Assignment:
    """Give every item a split; what has one keeps it.

    An image that was seen before keeps its split. A new one joins its group, or the groups it is tied to by a common
    image. New groups are dealt out so that the panoramas and each class come nearest to the wanted shares, and every
    wanted split gets a group.

    Args:
        items: all items of the data set, decided or not.
        memory: what was decided before.
        plan: wanted shares; the groups are in the items.
        pinned: name → split for panoramas that were chosen by a person, whatever their group. They are taken out of
            their groups: the rest of such a group is placed as if they were not there.

    Returns:
        The splits of all items. When nothing was decided before, items that are not pinned stay without one where the
        plan wants neither validation nor test, or where there are fewer groups than wanted splits; then `too_few` says
        what to do.
    """
    images: dict[str, Split] = dict(memory.images)
    images.update({item.image_sha256: item.split for item in items if item.split is not None})
    groups: dict[str, Split] = dict(memory.groups)
    pins = set(memory.pinned)
    notes = []
    chosen = {item.image_sha256: pinned[item.name] for item in items if pinned and item.name in pinned}
    kept = sorted(
        item.name
        for item in items
        if pinned and item.name in pinned and images.get(item.image_sha256, pinned[item.name]) != pinned[item.name]
    )
    if kept:
        notes.append(
            f"{len(kept)} panorama(s) chosen for another split stay in the one they are in, because splits are frozen: "
            + ", ".join(kept[:_LISTED])
        )
    fresh = {sha: split for sha, split in chosen.items() if sha not in images}
    images.update(fresh)
    pins.update(fresh)

    components = _components([item for item in items if item.image_sha256 not in pins], images)
    free: list[list[Member]] = []
    for component in components:
        waiting = [item for item in component if item.image_sha256 not in images]
        votes = Counter(images[sha] for sha in {i.image_sha256 for i in component if i.image_sha256 in images})
        votes.update(groups[key] for key in {i.group for i in component if i.group in groups})
        if not votes:
            free.append(waiting)
            continue
        majority = max(SPLITS, key=lambda name: votes[name])
        straddling = sorted({item.group for item in component}) if len(votes) > 1 and waiting else []
        if straddling:
            notes.append(
                f"{len(waiting)} new panorama(s) belong together with panoramas of several splits "
                f"({', '.join(straddling[:_LISTED])}); each joins its own group"
            )
        for item in waiting:
            images.setdefault(item.image_sha256, groups.get(item.group, majority))
        for item in component:
            groups.setdefault(item.group, images[item.image_sha256])

    empty = [name for name in plan.shares if name not in images.values()]
    too_few = None
    undecided = not set(images) - pins
    if undecided and set(plan.shares) == {"train"}:
        pass  # nothing is asked to be split: training may draw its own part
    elif free and len(free) < len(empty) and undecided:
        parts = " and ".join(filter(None, [", ".join(empty[:-1]), empty[-1]]))
        too_few = (
            f"The data set has {len(free)} group(s) of panoramas, too few for {len(empty)} splits ({parts}), so no "
            f"splits were made (groups are made by {plan.group_by})"
        )
    else:
        for component, split in zip(free, _deal(free, items, images, plan), strict=True):
            images.update((item.image_sha256, split) for item in component)
            groups.update((item.group, split) for item in component)
    return Assignment(
        splits={item.name: images.get(item.image_sha256) for item in items},
        memory=SplitMemory(images=images, groups=groups, pinned=frozenset(pins)),
        too_few=too_few,
        notes=tuple(notes),
    )


def _components(items: Sequence[Member], decided: Mapping[str, Split]) -> list[list[Member]]:
    """Connected components of "same group" and "same image" that hold an undecided image, in a fixed order."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for item in items:
        parent[root(("group", item.group))] = root(("image", item.image_sha256))
    found: dict[tuple[str, str], list[Member]] = {}
    for item in sorted(items, key=lambda item: item.name):
        found.setdefault(root(("image", item.image_sha256)), []).append(item)
    return [part for part in found.values() if any(item.image_sha256 not in decided for item in part)]


def _deal(
    free: Sequence[Sequence[Member]], items: Sequence[Member], images: Mapping[str, Split], plan: SplitPlan
) -> list[Split]:
    """The split of each component: greedy, rarest class first, then improved by moves and exchanges."""
    if not free:
        return []
    names = list(plan.shares)
    ids = sorted({label_id for item in items for label_id in item.pixels})
    amounts = np.array([_amounts(component, ids) for component in free])
    placed = np.zeros((len(names), 1 + len(ids)))
    for row, name in enumerate(names):
        placed[row] = _amounts([item for item in items if images.get(item.image_sha256) == name], ids)
        # Images that are no longer here count as panoramas; what was in their masks is not remembered.
        placed[row, 0] = sum(split == name for split in images.values())
    total = np.maximum(placed.sum(axis=0) + amounts.sum(axis=0), 1)
    # Of every class its share: a rare class weighs as much as a common one.
    amounts, placed = amounts / total, placed / total
    shares = np.array(list(plan.shares.values()))[:, None]
    missing = shares - placed
    needed = {row for row in range(len(names)) if not placed[row, 0]}

    keys = [_digest(component) for component in free]
    by_rarity = 1 + np.argsort(total[1:], kind="stable")
    rarest = [next((int(column) for column in by_rarity if row[column] > 0), 0) for row in amounts]
    rank = {0: len(ids), **{int(column): place for place, column in enumerate(by_rarity)}}
    order = sorted(range(len(free)), key=lambda n: (rank[rarest[n]], -float(amounts[n, rarest[n]]), keys[n]))

    choice = np.zeros(len(free), np.int64)
    for done, index in enumerate(order):
        # The last ones go to splits that would stay empty; the others where their rarest class is missed most, in
        # proportion. Half of what comes is taken off first: where it would be far too much, it is not missed.
        rows = sorted(needed) if len(needed) >= len(order) - done else range(len(names))
        hunger = ((missing - amounts[index] / 2) / shares).round(12)
        row = max(rows, key=lambda row: (hunger[row, rarest[index]], hunger[row, 0], -row))
        choice[index] = row
        missing[row] -= amounts[index]
        needed.discard(row)
    _improve(choice, amounts, missing, [placed[row, 0] > 0 for row in range(len(names))], order)
    return [names[row] for row in choice]


_EXCHANGES_UP_TO = 200
"""Components among which exchanges are tried: among more, the greedy choice is near the best already."""


def _improve(
    choice: NDArray[np.int64],
    amounts: NDArray[np.float64],
    missing: NDArray[np.float64],
    settled: Sequence[bool],
    order: Sequence[int],
) -> None:
    """Move components, or exchange two, as long as the sum of squares of what is missing shrinks; in place.

    Args:
        choice: (components,) row of each.
        amounts: (components, features).
        missing: (rows, features).
        settled: whether a row may lose its last component, because decided panoramas are in it.
        order: in which components are tried.
    """
    if len(order) > _EXCHANGES_UP_TO:
        return

    def gain(row: int, other: int, shift: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much the sum falls when `shift` goes from a row to another one."""
        before = (missing[row] ** 2 + missing[other] ** 2).sum()
        after = ((missing[row] + shift) ** 2 + (missing[other] - shift) ** 2).sum(axis=-1)
        return np.asarray(before - after)

    improved = True
    while improved:
        improved = False
        for index in order:
            row = int(choice[index])
            may_leave = settled[row] or int((choice == row).sum()) > 1
            best: tuple[float, int, int | None] = (1e-9, row, None)
            for other in range(len(missing)):
                if other == row:
                    continue
                if may_leave and (moved := float(gain(row, other, amounts[index]))) > best[0]:
                    best = (moved, other, None)
                partners = [partner for partner in order if choice[partner] == other]
                if partners:
                    gains = gain(row, other, amounts[index] - amounts[partners])
                    place = int(np.argmax(np.round(gains, 12)))
                    if gains[place] > best[0]:
                        best = (float(gains[place]), other, partners[place])
            _, other, partner = best
            if other == row:
                continue
            shift = amounts[index] - (amounts[partner] if partner is not None else 0)
            missing[row] += shift
            missing[other] -= shift
            choice[index] = other
            if partner is not None:
                choice[partner] = row
            improved = True


def _amounts(items: Iterable[Member], ids: Sequence[int]) -> list[float]:
    """Panoramas, then pixels of each label id; an image that is there twice counts once as a panorama."""
    items = list(items)
    pixels = [float(sum(item.pixels.get(label_id, 0) for item in items)) for label_id in ids]
    return [float(len({item.image_sha256 for item in items})), *pixels]


def _digest(component: Sequence[Member]) -> str:
    """What decides between components that are equal in everything else."""
    return hashlib.sha256("\n".join(sorted({item.group for item in component})).encode()).hexdigest()
