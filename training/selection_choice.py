"""A pool is looked at, the most instructive panoramas are chosen, and that is written down before anybody gets them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from training.acquisition import TURNS, rank
from training.cvat import Server
from training.handout import Way
from training.manifest import IMAGES, read_manifest
from training.page import plural
from training.pool import find_marks, folder_pool, known_frames, labelled_images, server_pool
from training.prelabel_store import PrelabelStore
from training.selection import PAGE, Selection
from training.selection_page import write_selection_page

KNOWN: Final = 50
"""Labelled and handed out panoramas that are looked at, so that what is chosen differs from them; no more than there
are in the pool, so that they at most double the time."""


class NothingToChooseError(ConfigError):
    """No panorama can be chosen."""


def choose(
    server: Server,
    store: PrelabelStore,
    bundles: Sequence[ModelBundle],
    *,
    folder: Path,
    name: str,
    project: int,
    count: int,
    way: Way,
    assignee: str | None,
    dataset: Path,
    images: Sequence[Path] | None = None,
    seed: int = 0,
    device: str = "auto",
    turns: int = TURNS,
    settings: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Selection:
    """Choose what to label next, and write the record and the page of it.

    Args:
        server: logged in.
        store: what this program drew.
        bundles: whose opinions count, the one that draws first.
        folder: of the selection.
        name: of the hand-out.
        project: number of the project.
        count: how many to choose.
        way: how they will be handed out.
        assignee: user who will get them; None: nobody.
        dataset: what is labelled; it need not be there.
        images: panoramas of this machine to choose among; None: the project's open frames.
        seed: decides between equal ones.
        device: `auto`, `cpu`, …
        turns: opinions of each model.
        settings: written down with the selection.
        dry_run: written down: to be looked at only.
        quiet: no progress bars.

    Raises:
        NothingToChooseError: there is no panorama that can be chosen; nothing was written.
        ConfigError: settings that do not fit, or the store is damaged.
        DatasetError: the data set is damaged.
        ServerError: no such project, or no answer.
    """
    manifest = read_manifest(dataset)
    shares, labelled = labelled_images(manifest) if manifest is not None else (None, frozenset())
    left_out: Counter[str] = Counter()
    server.project(project)
    marks = find_marks(server, server.tasks(project))
    if images is None:
        pool = server_pool(
            server, store, project=project, labelled=labelled, marks=marks, left_out=left_out, quiet=quiet
        )
    else:
        pool = folder_pool(images, taken=labelled | {mark.sha256 for mark in marks})
    skipped = [f"{plural(number, 'frame')} {reason}" for reason, number in sorted(left_out.items()) if number]
    failed: list[str] = []
    pictures: dict[str, bytes] = {}
    known = known_frames(
        server,
        marks,
        manifest,
        dataset / IMAGES,
        most=min(KNOWN, len(pool)),
        tasks={frame.task for frame in pool if frame.task is not None},
        seed=seed,
    )
    choices = (
        rank(
            pool,
            bundles,
            count=count,
            shares=shares,
            known=known,
            seed=seed,
            device=device,
            turns=turns,
            picture=pictures.__setitem__,
            skipped=skipped,
            failed=failed,
            stopping=server.stopping,
            quiet=quiet,
        )
        if pool
        else []
    )
    if not choices:
        where = f"project {project}" if images is None else "the folder"
        why = "; ".join([*skipped, *failed]) or "there are none"
        raise NothingToChooseError(f"No panorama of {where} can be chosen: {why}.")
    selection = Selection(
        name=name,
        server=server.url,
        project=project,
        way=way,
        assignee=assignee,
        models=tuple(bundle.manifest.title for bundle in bundles),
        choices=tuple(choices),
        settings=dict(settings or {}),
        left_out=tuple(skipped),
        failed=tuple(failed),
        dry_run=dry_run,
    )
    for place, jpeg in pictures.items():
        atomic_write(folder / f"{place}.jpg", jpeg)
    facts = {
        "project": f"{project} of {server.url}",
        "looked at": f"{plural(len(pool), 'panorama')}, beside {len(known)} that are labelled or handed out",
        "models": ", ".join(selection.models),
        "turns": str(turns),
    }
    write_selection_page(folder / PAGE, choices, pictures, facts=facts, left_out=[*failed, *skipped])
    selection.save(folder)
    return selection
