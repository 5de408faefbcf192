"""What a cycle learns from: which panoramas count, which of them are new, and what people did there."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

from sscloud.errors import ConfigError
from training.cycle_config import CycleConfig
from training.effort_records import FrameEffort
from training.effort_summary import summarise_effort
from training.journal import cycle_folder, read_journals
from training.manifest import Manifest, ManifestItem
from training.survey import Selection

FRAMES: Final = "frames.json"
"""In a cycle's folder: the panoramas that its training could see, to know later ones by."""


def selection_of(config: CycleConfig) -> Selection:
    """Which frames count: those of completed jobs of the project."""
    return Selection(
        projects=(config.project,),
        stages=frozenset(config.stages) if config.stages else None,
        ground_truth=config.ground_truth,
    )


def require_test_part(manifest: Manifest | None, config: CycleConfig, dataset: Path) -> None:
    """Refuse, before anything is downloaded, settings under which there would be nothing to measure on.

    Args:
        manifest: of the dataset; None where there is none yet.
        config: the settings.
        dataset: its folder, for the message.

    Raises:
        ConfigError: no panoramas are set aside for the test, and none were.
    """
    splits = {item.split for item in manifest.items} if manifest is not None else set()
    if "test" in splits or config.ground_truth == "test":
        return
    if config.split_plan(manifest.plan if manifest is not None else None).test == 0:
        raise ConfigError(
            "'test' is 0 percent and 'ground_truth' is not test, so there would be no test panoramas, and a model "
            "cannot be judged by those it learned from. "
            + (
                no_test_part(dataset)
                if splits - {None}
                else "Leave 'test' out, write test: 20 (percent), or measure on frames of ground-truth jobs "
                "(ground_truth: test)."
            )
        )


def no_test_part(dataset: Path) -> str:
    """What to do about a dataset whose splits are frozen without a test part, in sentences."""
    return (
        f"The splits of {dataset} are frozen: its panoramas stay in the parts that they are in. To have a test part, "
        "do one of these: write test: 20 (percent) and complete jobs of further groups (sites), the first of which "
        "becomes it; measure on frames of ground-truth jobs that are not in it yet (ground_truth: test); or write "
        "test: 20, delete the dataset (keep its dataset.yaml and labels.yaml), and start with --restart: all is "
        "fetched and dealt out anew."
    )


def new_items(manifest: Manifest, cycles: Path) -> list[ManifestItem]:
    """Panoramas that the last training did not see, or saw with another mask; all before the first one.

    Args:
        manifest: of the dataset.
        cycles: the workspace's cycles. One counts from its model's entry into the registry on, whatever the gate said.
    """
    seen = last_frames(cycles)
    return [item for item in manifest.items if seen is None or pair_of(item) not in seen]


def to_learn_from(items: Iterable[ManifestItem]) -> list[ManifestItem]:
    """Those that teach: the validation part only chooses the epoch, and the test part only measures."""
    return [item for item in items if item.split not in ("validation", "test")]


def pair_of(item: ManifestItem) -> tuple[str, str]:
    """sha256 of image and mask: what a panorama is to a training."""
    return item.image_sha256, item.mask_sha256


def last_frames(cycles: Path) -> frozenset[tuple[str, str]] | None:
    """sha256 of image and mask of the panoramas of the newest cycle that made a model; None where there is none.

    Args:
        cycles: the workspace's cycles.

    Raises:
        ConfigError: what the cycle has written cannot be read.
    """
    for journal in reversed(read_journals(cycles)):
        if journal.step("register").state == "done":
            path = cycle_folder(cycles, journal.number) / FRAMES
            try:
                return frozenset((str(image), str(mask)) for image, mask, _ in json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path} cannot be read ({error}). Bring it back, or move {path.parent} away."
                ) from error
    return None


def effort_since(records: Iterable[FrameEffort], masks: Collection[str]) -> dict[str, Any] | None:
    """What people did to the pre-labels of some panoramas; None where none of them had one that is known.

    Args:
        records: of the dataset.
        masks: sha256 of the masks of these panoramas.
    """
    rows = summarise_effort(record for record in records if record.mask_sha256 in masks).models
    drawn, frames = sum(row.pixels.drawn for row in rows), sum(row.frames for row in rows)
    if not frames:
        return None
    touched = sum(row.touched * row.frames for row in rows) / frames
    changed = 1 - sum(row.pixels.accepted for row in rows) / drawn if drawn else 0.0
    return {"frames": frames, "changed": changed, "touched": touched}
