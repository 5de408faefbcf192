import argparse
import re
from dataclasses import replace

import pytest

from sscloud.errors import ConfigError
from sscloud.labels import LabelSchema
from tools.split_arguments import add_split_arguments, plan_from, split_lines
from training.manifest import ManifestItem
from training.splits import Assignment, Split, SplitMemory, SplitPlan


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_split_arguments(parser)
    return parser.parse_args(arguments)


def item(name: str, group: str, split: Split | None, pixels: dict[int, int]) -> ManifestItem:
    return ManifestItem(
        name=name,
        image=f"{name}.png",
        mask=f"{name}.png",
        size_hw=(10, 10),
        image_sha256=f"sha256 of {name}",
        mask_sha256="",
        pixels=pixels,
        people_pixels=0,
        auto_pixels=0,
        source={},
        recipe="",
        group=group,
        split=split,
    )


def test_flags_over_what_was_before_over_defaults() -> None:
    before = SplitPlan(group_by="job", validation=20, test=0)

    assert plan_from(parsed(), None) == SplitPlan()
    assert plan_from(parsed(), before) == before
    assert plan_from(parsed("--test", "5"), before) == SplitPlan(group_by="job", validation=20, test=5)
    asked = parsed("--group-by", r"^(\w+?)_", "--validation", "0", "--test", "0")
    assert plan_from(asked, before) == SplitPlan(group_by=r"^(\w+?)_", validation=0, test=0)
    with pytest.raises(ConfigError, match=r"--validation 95 and --test 10 leave nothing"):
        plan_from(parsed("--validation", "95"), None)


def test_help_can_be_shown() -> None:
    parser = argparse.ArgumentParser()
    add_split_arguments(parser)

    assert "--group-by RULE" in parser.format_help()


def test_the_table() -> None:
    items = [
        item("a", "g1", "train", {2: 75, 5: 25}),
        item("b", "g1", "train", {2: 75, 255: 25}),
        item("c", "g2", "train", {2: 75, 6: 25}),
        item("d", "g3", "test", {0: 100}),
        item("e", "g4", None, {255: 100}),
    ]
    assignment = Assignment(splits={}, memory=SplitMemory(), too_few="Too few", notes=("Note",))

    lines, warnings = split_lines(items, LabelSchema.default(), assignment)

    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert rows[0][:5] == ["split", "panoramas", "groups", "Фон", "Земля"]
    assert rows[1] == ["train", "3", "2", "0.00%", "81.82%", "9.09%", "9.09%", "0.00%", "0.00%"]
    assert rows[2][:4] == ["test", "1", "1", "100.00%"]
    assert rows[3][:4] == ["none yet", "1", "1", "0.00%"]
    assert len({len(line) for line in lines}) == 1
    assert warnings[0] == "Note."
    assert warnings[1].startswith("Too few. Add panoramas of other groups, or choose smaller groups: --group-by image")
    quiet = Assignment(splits={}, memory=SplitMemory())
    assert split_lines(items, LabelSchema.default(), quiet)[1] == []
    twice = [*items, replace(items[0], name="f")]
    assert split_lines(twice, LabelSchema.default(), quiet)[1] == [
        "1 picture(s) are in the dataset more than once, each time in the same split: a, f."
    ]
