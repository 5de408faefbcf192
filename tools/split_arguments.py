"""What `fetch` and `convert` ask of people about splits, and how they show them."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they bring numpy: --help must answer at once
    from sscloud.labels import LabelSchema
    from training.manifest import ManifestItem
    from training.splits import Assignment, SplitPlan


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of splitting. Without them the data set's own plan holds, else `SplitPlan`'s defaults."""
    group = parser.add_argument_group("splits (made once, then frozen)")
    group.add_argument(
        "--group-by",
        metavar="RULE",
        help="panoramas that stay together: image, task, job, or a regular expression that finds the site in the file "
        r"name, such as '^(\w+?)_' (default: as before, else task; where no task is known, every image by itself)",
    )
    group.add_argument(
        "--validation",
        type=float,
        metavar="P",
        help="percent of the panoramas to choose the best epoch by (default: 10)",
    )
    group.add_argument(
        "--test",
        type=float,
        metavar="P",
        help="percent of the panoramas to measure on (default: 10); with 0 for both, no splits are made, and training "
        "draws its own validation part",
    )


def plan_from(args: argparse.Namespace, remembered: "SplitPlan | None") -> "SplitPlan":
    """The plan that the flags ask for.

    Args:
        args: with the flags of `add_split_arguments`.
        remembered: the data set's plan; what the flags leave open is as it was.

    Raises:
        ConfigError: percentages out of range, or no regular expression.
    """
    from dataclasses import replace

    from training.splits import SplitPlan

    asked = {name: getattr(args, name) for name in ("group_by", "validation", "test")}
    return replace(remembered or SplitPlan(), **{name: value for name, value in asked.items() if value is not None})


def split_lines(
    items: Sequence["ManifestItem"], schema: "LabelSchema", assignment: "Assignment"
) -> tuple[list[str], list[str]]:
    """The splits for a terminal.

    Args:
        items: of the manifest, after the splits were frozen.
        schema: of the masks.
        assignment: what freezing them said.

    Returns:
        The lines of a table (split, panoramas, groups, share of each class in its pixels that are not void), and
        warnings.
    """
    from training.splits import SPLITS

    rows = [[item for item in items if item.split == name] for name in (*SPLITS, None)]
    widths = [max(8, len(label.name)) for label in schema.classes]
    names = "  ".join(f"{label.name:>{width}}" for label, width in zip(schema.classes, widths, strict=True))
    lines = [f"{'split':10}  panoramas  groups  {names}"]
    for name, row in zip((*SPLITS, "none yet"), rows, strict=True):
        if row:
            counts = [sum(item.pixels.get(label.id, 0) for item in row) for label in schema.classes]
            total = max(sum(counts), 1)
            shares = "  ".join(f"{count / total:{width}.2%}" for count, width in zip(counts, widths, strict=True))
            lines.append(f"{name:10}  {len(row):9}  {len({item.group for item in row}):6}  {shares}")
    warnings = [f"{note}." for note in assignment.notes]
    names_of: dict[str, list[str]] = {}
    for item in items:
        names_of.setdefault(item.image_sha256, []).append(item.name)
    doubles = [", ".join(names) for names in names_of.values() if len(names) > 1]
    if doubles:
        warnings.append(
            f"{len(doubles)} picture(s) are in the dataset more than once, each time in the same split: "
            f"{'; '.join(doubles[:6])}{'; …' if len(doubles) > 6 else ''}."
        )
    if assignment.too_few is not None:
        warnings.append(
            f"{assignment.too_few}. Add panoramas of other groups, or choose smaller groups: --group-by image, or a "
            "regular expression that finds the site in the file name. Until then `sscloud train` splits by file names."
        )
    return lines, warnings
