"""One selection, from the choice to the pre-labels, written down so that it goes on where it was stopped.

FOLDER/
  selection.json       what was chosen and why, and how far it has come
  select.html          the same for people
  01.jpg, 02.jpg, …    where the model is unsure
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from training.acquisition import Choice, PoolFrame
from training.cvat import Server
from training.handout import Handout, Way

RECORD: Final = "selection.json"
PAGE: Final = "select.html"
FORMAT: Final = 1

_FRAME = ("name", "task", "job", "number", "alone")
_NUMBERS = ("score", "entropy", "information", "novelty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What was chosen, and what has become of it."""

    name: str
    """Of the hand-out."""
    server: str
    project: int
    way: Way
    assignee: str | None
    models: tuple[str, ...]
    """Titles, the one that pre-labels first."""
    choices: tuple[Choice, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was asked for by, beside the above: JSON values by the names of `sscloud select`'s flags."""
    left_out: tuple[str, ...] = ()
    """Why panoramas were left out, a sentence each."""
    failed: tuple[str, ...] = ()
    """Panoramas that could not be looked at, a sentence each."""
    dry_run: bool = False
    """Chosen to be looked at, not to be handed out."""
    handout: Handout | None = None
    prelabelled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        handed = self.handout
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("name", "server", "project", "way", "assignee")},
            "models": list(self.models),
            "choices": [_choice_to_dict(choice) for choice in self.choices],
            "settings": dict(self.settings),
            "left_out": list(self.left_out),
            "failed": list(self.failed),
            "dry_run": self.dry_run,
            "handout": None
            if handed is None
            else {"way": handed.way, "task": handed.task, "jobs": list(handed.jobs), "notes": list(handed.notes)},
            "prelabelled": self.prelabelled,
        }

    def save(self, folder: Path) -> None:
        """Write it down, atomically."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        atomic_write(folder / RECORD, text.encode() + b"\n")


def read_selection(folder: Path, server: Server) -> Selection | None:
    """What was written down; None where nothing was.

    Args:
        folder: of the selection.
        server: reads the frames' files.

    Raises:
        ConfigError: damaged, of another format, or about another server.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["server"] != server.url:
            raise ConfigError(
                f"{path} is of format {data['format']!r} about {data['server']!r}; expected format {FORMAT} about "
                f"{server.url}. Name another folder with --output."
            )
        handed = data["handout"]
        return Selection(
            name=str(data["name"]),
            server=server.url,
            project=int(data["project"]),
            way=get_args(Way)[get_args(Way).index(data["way"])],
            assignee=None if data["assignee"] is None else str(data["assignee"]),
            models=tuple(map(str, data["models"])),
            choices=tuple(_choice(entry, server) for entry in data["choices"]),
            settings=dict(data.get("settings", {})),
            left_out=tuple(map(str, data["left_out"])),
            failed=tuple(map(str, data.get("failed", ()))),
            dry_run=data["dry_run"] is True,
            handout=None if handed is None else _handout(handed, str(data["name"])),
            prelabelled=data["prelabelled"] is True,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be used ({error}). Delete the folder to choose anew; what was handed out stays marked on "
            "the server."
        ) from error


def begin_folder(workspace: Path, *, dry_run: bool = False) -> Path:
    """The folder of the next selection of a workspace, or of the last one that was stopped before its end.

    Args:
        workspace: of the loop.
        dry_run: never one that was stopped.
    """
    root = workspace / "selections"
    numbers = sorted(int(path.name) for path in root.glob("[0-9]*") if path.name.isascii() and path.name.isdigit())
    stopped = [root / f"{number:04d}" for number in numbers if is_stopped(root / f"{number:04d}")]
    if stopped and not dry_run:
        return stopped[-1]
    last = numbers[-1] if numbers else 0
    begun = last > 0 and not (root / f"{last:04d}" / RECORD).exists()  # killed before anything was chosen
    return root / f"{last if begun else last + 1:04d}"


def is_stopped(folder: Path) -> bool:
    """Whether a selection was written down and has not come to its end; a damaged one has, as nobody can go on."""
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return bool(data["choices"]) and not (data["dry_run"] or data["prelabelled"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _choice_to_dict(choice: Choice) -> dict[str, Any]:
    frame = choice.frame
    return {
        **{name: getattr(frame, name) for name in _FRAME},
        "path": None if frame.path is None else str(frame.path.resolve()),
        "sha256": choice.sha256,
        "size_hw": list(choice.size_hw),
        **{name: getattr(choice, name) for name in _NUMBERS},
        "reason": choice.reason,
        "focus_xyxy": list(choice.focus_xyxy),
    }


def _choice(data: Mapping[str, Any], server: Server) -> Choice:
    path = None if data["path"] is None else Path(data["path"])
    task, job, number = (None if data[name] is None else int(data[name]) for name in ("task", "job", "number"))
    if path is not None:
        read = path.read_bytes
    elif task is not None and number is not None:
        read = partial(server.image, task, number)
    else:
        raise ValueError("a choice without a place")
    height, width = map(int, data["size_hw"])
    left, top, right, bottom = map(float, data["focus_xyxy"])
    return Choice(
        frame=PoolFrame(
            name=str(data["name"]),
            read=read,
            task=task,
            job=job,
            number=number,
            alone=data["alone"] is True,
            path=path,
        ),
        sha256=str(data["sha256"]),
        size_hw=(height, width),
        score=float(data["score"]),
        entropy=float(data["entropy"]),
        information=float(data["information"]),
        novelty=float(data["novelty"]),
        reason=str(data["reason"]),
        focus_xyxy=(left, top, right, bottom),
    )


def _handout(data: Mapping[str, Any], name: str) -> Handout:
    jobs: Sequence[Any] = data["jobs"]
    return Handout(
        name=name,
        way="task" if data["way"] == "task" else "jobs",
        task=None if data["task"] is None else int(data["task"]),
        jobs=tuple(int(job) for job in jobs),
        notes=tuple(map(str, data["notes"])),
    )
