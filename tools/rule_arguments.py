"""What `fetch` and `convert` ask of people about painting: labels, what the schema lacks, frames without shapes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sscloud.labels import LabelSchema


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --unknown and --empty."""
    parser.add_argument(
        "--unknown",
        choices=("error", "void", "background"),
        default="error",
        help="shapes whose label name the schema lacks: stop with a list (error, the default), paint them as void "
        "(255), or as background",
    )
    parser.add_argument(
        "--empty",
        choices=("skip", "void", "background"),
        default="skip",
        help="frames without a shape: leave them out (skip, the default), or take them as all void or all background",
    )


def add_labels_argument(parser: "argparse._ActionsContainer") -> None:
    """Add --labels."""
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="label schema (YAML); without it DATASET/labels.yaml if there is one, else the schema that is shipped",
    )


def schema_for(labels: Path | None, dataset: Path) -> "LabelSchema":
    """The schema that was asked for, else the dataset's own, else the one that is shipped.

    Raises:
        SchemaError: it cannot be read.
    """
    from sscloud.labels import LabelSchema

    own = dataset / "labels.yaml"
    path = labels or (own if own.is_file() else None)
    return LabelSchema.default() if path is None else LabelSchema.from_yaml(path)
