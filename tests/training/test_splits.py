import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from sscloud.errors import ConfigError, DatasetError
from training.splits import Assignment, Split, SplitMemory, SplitPlan, assign, group_key, require_match


@dataclass(frozen=True)
class Panorama:
    """What `assign` needs of an item."""

    name: str
    group: str
    image_sha256: str = ""
    pixels: Mapping[int, int] = field(default_factory=lambda: {0: 100})
    split: Split | None = None


def panorama(
    group: str, number: int = 0, *, sha: str | None = None, pixels: Mapping[int, int] | None = None
) -> Panorama:
    name = f"{group}-{number}"
    return Panorama(name=name, group=group, image_sha256=sha or f"sha {name}", pixels=pixels or {0: 100})


def town(groups: int, *, seed: int = 0, each: int = 3) -> list[Panorama]:
    """Groups with a common class 0, a frequent class 2, and a class 66 that a sixth of the groups has."""
    rng = random.Random(seed)
    found = []
    for group in range(groups):
        for number in range(rng.randint(1, each)):
            rare = rng.randint(5, 20) if group % 6 == 0 else 0
            common = rng.randint(100, 500)
            pixels = {0: 1000 - common - rare, 2: common} | ({66: rare} if rare else {})
            found.append(panorama(f"g{group}", number, pixels=pixels))
    return found


def frozen(items: list[Panorama], assignment: Assignment) -> list[Panorama]:
    return [replace(item, split=assignment.splits[item.name]) for item in items]


def shares(items: list[Panorama], splits: Mapping[str, Split | None], label_id: int | None = None) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for item in items:
        counts[str(splits[item.name])] += 1 if label_id is None else item.pixels.get(label_id, 0)
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def by_group(items: list[Panorama], splits: Mapping[str, Split | None]) -> dict[str, set[Split | None]]:
    found = defaultdict(set)
    for item in items:
        found[item.group].add(splits[item.name])
    return found


PLAN = SplitPlan(validation=15, test=15)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_and_classes_are_spread(seed: int) -> None:
    items = town(60, seed=seed)

    assignment = assign(items, memory=SplitMemory(), plan=PLAN)

    assert assignment.too_few is None
    assert assignment.notes == ()
    assert all(len(found) == 1 for found in by_group(items, assignment.splits).values())
    for label_id in (None, 0, 2, 66):
        found = shares(items, assignment.splits, label_id)
        for name, wanted in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
            assert found[name] == pytest.approx(wanted, abs=0.05), (label_id, found)


def test_order_does_not_matter() -> None:
    items = town(30)
    expected = assign(items, memory=SplitMemory(), plan=PLAN)

    for seed in range(5):
        shuffled = random.Random(seed).sample(items, len(items))
        assert assign(shuffled, memory=SplitMemory(), plan=PLAN) == expected


def test_few_groups_are_dealt_as_well_as_can_be() -> None:
    rng = np.random.default_rng(3)
    items = [panorama(f"g{n}", pixels={0: int(rng.integers(50, 500)), 5: int(rng.integers(0, 50))}) for n in range(7)]

    splits = assign(items, memory=SplitMemory(), plan=SplitPlan(validation=20, test=20)).splits

    features = np.array([[1, item.pixels[0], item.pixels[5]] for item in items], float)
    features /= features.sum(axis=0)

    def cost(names: tuple[Split | None, ...]) -> float:
        parts = [features[[n == name for n in names]].sum(axis=0) for name in ("train", "validation", "test")]
        return sum(float(((part - share) ** 2).sum()) for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True))

    every = itertools.product(("train", "validation", "test"), repeat=7)
    costs = sorted(cost(names) for names in every if len(set(names)) == 3)  # type: ignore[arg-type]
    assert cost(tuple(splits[item.name] for item in items)) <= costs[len(costs) // 100]  # among the best 1 %


def test_every_split_gets_a_group() -> None:
    items = [panorama("large", n) for n in range(50)] + [panorama("a"), panorama("b")]

    splits = assign(items, memory=SplitMemory(), plan=SplitPlan(validation=1, test=1)).splits

    assert set(splits.values()) == {"train", "validation", "test"}
    assert splits["large-0"] == "train"


def test_too_few_groups() -> None:
    items = [panorama("a", n) for n in range(9)] + [panorama("b")]

    assignment = assign(items, memory=SplitMemory(), plan=SplitPlan())

    assert set(assignment.splits.values()) == {None}
    assert assignment.memory == SplitMemory()
    assert assignment.too_few is not None
    assert "has 2 group(s) of panoramas, too few for 3 splits (train, validation and test)" in assignment.too_few
    two = assign(items, memory=SplitMemory(), plan=SplitPlan(test=0))
    assert two.too_few is None
    assert {two.splits["a-0"], two.splits["b-0"]} == {"train", "validation"}
    assert assign([], memory=SplitMemory(), plan=SplitPlan()).splits == {}


def test_old_ones_never_move_and_new_ones_join() -> None:
    items = town(20)
    first = assign(items, memory=SplitMemory(), plan=PLAN)
    more = frozen(items, first) + [panorama(f"g{n}", 99) for n in range(20)] + town(40)[len(items) :]

    second = assign(more, memory=first.memory, plan=SplitPlan(validation=40, test=5))

    assert {item.name: second.splits[item.name] for item in items} == first.splits
    assert all(len(found) == 1 for found in by_group(more, second.splits).values())
    assert shares(more, second.splits)["validation"] > shares(items, first.splits)["validation"] + 0.05


def test_new_groups_bring_the_shares_near() -> None:
    items: list[Panorama] = []
    memory = SplitMemory()
    for day in range(60):
        items.append(panorama(f"day{day}"))
        if day >= 2:
            assignment = assign(items, memory=memory, plan=SplitPlan(validation=20, test=10))
            items, memory = frozen(items, assignment), assignment.memory

    assert shares(items, {i.name: i.split for i in items}) == pytest.approx(
        {"train": 0.7, "validation": 0.2, "test": 0.1}, abs=0.04
    )


def test_an_image_seen_before_keeps_its_split() -> None:
    items = town(20)
    first = assign(items, memory=SplitMemory(), plan=PLAN)

    # All items are gone; the images come back from other tasks, one of each in a group of its own.
    back = [replace(item, name=f"again {item.name}", group=f"other {item.name}") for item in items]
    second = assign(back, memory=first.memory, plan=PLAN)

    assert second.splits == {f"again {name}": split for name, split in first.splits.items()}


def test_common_images_tie_groups_together() -> None:
    items = [panorama(f"g{n}", sha=f"{n}") for n in range(12)]
    # A chain: each of the first five groups shares an image with the next one.
    items += [panorama(f"g{n}", 1, sha=f"{n + 1}") for n in range(5)]

    splits = assign(items, memory=SplitMemory(), plan=PLAN).splits

    assert len({splits[f"g{n}-0"] for n in range(6)}) == 1
    assert set(splits.values()) == {"train", "validation", "test"}


def test_a_new_group_follows_the_image_that_ties_it_to_an_old_one() -> None:
    memory = SplitMemory(images={"seen": "test"}, groups={"old": "test"})
    items = [panorama("new", 0, sha="seen"), *(panorama("new", n) for n in range(1, 5))]

    assignment = assign(items, memory=memory, plan=SplitPlan())

    assert set(assignment.splits.values()) == {"test"}
    assert assignment.memory.groups == {"old": "test", "new": "test"}


def test_a_group_between_two_splits() -> None:
    memory = SplitMemory(images={"1": "test", "2": "train"}, groups={"a": "test", "b": "train"})
    items = [
        panorama("a", 0, sha="1"),
        panorama("b", 0, sha="2"),
        panorama("a", 1, sha="new"),
        panorama("b", 1, sha="new"),
        panorama("a", 2),
        panorama("b", 2),
    ]

    assignment = assign(items, memory=memory, plan=SplitPlan())

    assert assignment.splits["a-2"] == "test"
    assert assignment.splits["b-2"] == "train"
    assert assignment.splits["a-1"] == assignment.splits["b-1"]
    assert len(assignment.notes) == 1
    assert "3" in assignment.notes[0] or "4" in assignment.notes[0]
    assert "(a, b)" in assignment.notes[0]


def test_pinned_panoramas_leave_their_groups() -> None:
    items = town(12)
    pinned: dict[str, Split] = {"g0-0": "test", "g1-0": "test"}
    both = [*items, panorama("g1", 50), panorama("elsewhere", sha="sha g0-0")]

    first = assign(both, memory=SplitMemory(), plan=SplitPlan(test=0), pinned=pinned)

    assert {name for name, split in first.splits.items() if split == "test"} == {"g0-0", "g1-0", "elsewhere-0"}
    assert first.memory.pinned == {"sha g0-0", "sha g1-0"}
    # In a later run the pinned ones say nothing of new members of their groups either.
    second = assign(
        [*frozen(both, first), panorama("g1", 51), panorama("elsewhere", 1)], memory=first.memory, plan=PLAN
    )
    assert second.splits["g1-51"] == first.splits["g1-50"]
    assert second.splits["elsewhere-1"] is not None
    assert second.notes == ()


def test_pinning_does_not_move_what_is_frozen() -> None:
    memory = SplitMemory(images={"sha a-0": "train", "sha b-0": "validation"})
    items = [panorama("a"), panorama("b"), panorama("c")]

    assignment = assign(items, memory=memory, plan=PLAN, pinned={"a-0": "test", "c-0": "test"})

    assert assignment.splits == {"a-0": "train", "b-0": "validation", "c-0": "test"}
    assert "1 panorama(s) chosen for another split stay" in assignment.notes[0]
    assert "a-0" in assignment.notes[0]


def test_pinned_only_and_one_group() -> None:
    items = [panorama("a", n) for n in range(5)]

    assignment = assign(items, memory=SplitMemory(), plan=SplitPlan(), pinned={"a-0": "test"})

    assert assignment.splits == {"a-0": "test", "a-1": None, "a-2": None, "a-3": None, "a-4": None}
    assert assignment.too_few is not None
    assert "1 group(s) of panoramas, too few for 2 splits (train and validation)" in assignment.too_few


SOURCE = {"kind": "cvat", "server": "https://cvat", "task": 7, "job": 12}


@pytest.mark.parametrize(
    ("rule", "source", "expected"),
    [
        ("task", SOURCE, "task:https://cvat#7"),
        ("job", SOURCE, "job:https://cvat#12"),
        ("image", SOURCE, "image:abc"),
        ("task", {"kind": "archive", "archive": "a.zip", "member": "x"}, "image:abc"),
        ("task", {"kind": "archive", "archive": "a.zip", "task": "Двор"}, "task:a.zip#Двор"),
        (r"^(\w+)_\d+", SOURCE, "name:двор"),
        (r"_\d+", SOURCE, "name:_12"),
        (r"(x)?_\d+", SOURCE, "name:_12"),
    ],
)
def test_group_key(rule: str, source: dict[str, str | int | None], expected: str) -> None:
    assert group_key(rule, source=source, name="двор_12.jpg", image_sha256="abc") == expected


def test_names_without_a_group() -> None:
    require_match(r"_\d+", ["a_1.jpg", "b_2.jpg"])
    require_match("task", ["a.jpg"])
    with pytest.raises(DatasetError, match=r"does not match 2 file name\(s\): a\.jpg, b\.jpg\. .*widen the expression"):
        require_match(r"_\d+", ["a.jpg", "c_3.jpg", "b.jpg"])
    with pytest.raises(DatasetError, match=r"does not match 40 file name\(s\): .*… and 28 more"):
        require_match("x", ["a.jpg"] * 40)
    with pytest.raises(DatasetError, match=r"does not match 1 file name\(s\): двор\.jpg"):
        group_key("z", source=SOURCE, name="двор.jpg", image_sha256="abc")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": 100}, r"--validation must be a percentage from 0 to below 100, found 100"),
        ({"test": -1}, r"--test must be"),
        ({"test": float("nan")}, r"--test must be"),
        ({"validation": 60, "test": 40}, r"--validation 60 and --test 40 leave nothing to train on"),
        ({"group_by": "("}, r"--group-by '\(' is no regular expression: .*Use image, task, job"),
    ],
)
def test_plans_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitPlan(**values)  # type: ignore[arg-type]


def test_thousands_of_groups() -> None:
    items = town(3000, each=1)

    splits = assign(items, memory=SplitMemory(), plan=SplitPlan()).splits

    for label_id in (None, 2, 66):
        assert shares(items, splits, label_id)["test"] == pytest.approx(0.1, abs=0.005)


def test_without_validation_and_test_nothing_is_split_until_it_is_asked_for() -> None:
    items = town(6)
    nothing = assign(items, memory=SplitMemory(), plan=SplitPlan(validation=0, test=0))
    assert set(nothing.splits.values()) == {None}
    assert nothing.too_few is None
    later = assign(items, memory=nothing.memory, plan=SplitPlan(validation=20, test=20))
    assert set(later.splits.values()) == {"train", "validation", "test"}
    more = [*items, panorama("new")]
    joined = assign(more, memory=later.memory, plan=SplitPlan(validation=0, test=0))
    assert joined.splits["new-0"] == "train"
