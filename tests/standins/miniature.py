"""A street in miniature: scans of several sites in a project of CVAT, easy enough to be learned in a second."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cvat_sdk import Client
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import Site, add_shapes, job_shapes, jobs_of, label_ids, make_task, mask, set_state
from sscloud.labels import LabelSchema
from sscloud.volume import pointed
from training.cvat import Server
from training.effort_records import read_effort
from training.journal import read_journals
from training.manifest import read_manifest
from training.registry import Registry, default_uri

SIZE_HW = (64, 128)
SCANS = 2
"""Scans a site; each is a job of its own."""
TEXT = {"mutable": False, "input_type": "text", "values": [""], "default_value": ""}
LABELS = [
    {"name": label.name, "attributes": [{"name": name, **TEXT} for name in ("model", "confidence")]}
    for label in LabelSchema.default().labels
    if not label.background
]


def scan(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Sky, a round wall, flat ground and one rough bush, normals facing the scanner → image and label map."""
    rng = np.random.default_rng(number)
    height, width = SIZE_HW
    azimuth = (np.arange(width) + 0.5) * 2 * np.pi / width
    normals = np.zeros((height, width, 3))
    label_map = np.zeros(SIZE_HW, np.uint8)
    normals[20:40, :, 0], normals[20:40, :, 1] = -np.cos(azimuth), -np.sin(azimuth)
    label_map[20:40] = 6
    normals[40:, :, 2] = 1
    label_map[40:] = 2
    left = int(rng.integers(0, width - 40))
    rough = rng.normal(size=(20, 40, 3)) + np.array([0, 0, 1])
    normals[24:44, left : left + 40] = rough / np.linalg.norm(rough, axis=-1, keepdims=True)
    label_map[24:44, left : left + 40] = 5
    image = np.rint((normals * 0.5 + 0.5) * 255).astype(np.uint8)
    image[:20] = 0
    return image, label_map


class Miniature:
    """A project with a task a site, and the person who labels it.

    Args:
        site: the server.
        client: logged in there.
        sites: how many.
    """

    def __init__(self, site: Site, client: Client, *, sites: int = 6) -> None:
        self.site, self.client = site, client
        self.project = site.make_project(client, "Улица", LABELS).id
        self.labels = label_ids(client, self.project)
        self.jobs: list[int] = []
        """By site and scan."""
        self._maps: dict[int, NDArray[np.uint8]] = {}
        for number in range(sites):
            self.add_site(number)

    def add_site(self, number: int) -> list[int]:
        """A task with the scans of one more site → its jobs."""
        scans = {f"site{number}_{turn}.png": scan(SCANS * number + turn) for turn in range(SCANS)}
        files = {name: _png(image) for name, (image, _) in scans.items()}
        jobs = jobs_of(
            self.client, make_task(self.client, self.project, files, name=f"Место {number}", segment_size=1).id
        )
        self._maps.update(zip(jobs, (label_map for _, label_map in scans.values()), strict=True))
        self.jobs += jobs
        return jobs

    def label(self, jobs: Iterable[int], *, but: Sequence[int] = ()) -> None:
        """Draw what is missing of the truth and set the jobs to completed.

        Args:
            jobs: of these sites.
            but: label ids that are forgotten.
        """
        schema = LabelSchema.default()
        for job in jobs:
            drawn = {shape["label_id"] for shape in job_shapes(self.client, job)}
            frame = int(self.client.jobs.retrieve(job).start_frame)
            shapes: list[dict[str, Any]] = []
            for label_id in (6, 2, 5):
                label = schema.by_id(label_id)
                assert label is not None
                number = self.labels[label.name]
                if number not in drawn and label_id not in but:
                    shapes.append(mask(number, frame, self._maps[job] == label_id))
            if shapes:
                add_shapes(self.client, job, shapes)
            set_state(self.client, job, state="completed")


def looks(root: Path, people: Miniature, server: Server, *, name: str) -> dict[str, Any]:
    """All that the loop leaves in a workspace and on the server, without numbers and times that differ from run to run.

    Args:
        root: the workspace.
        people: of the project.
        server: logged in there.
        name: of the model.
    """
    manifest = read_manifest(root / "dataset")
    assert manifest is not None
    names = {number: label for label, number in people.labels.items()}
    registry = Registry(default_uri(root), name=name)
    pointer = pointed(root / "served") if (root / "served").is_dir() else None
    tasks = server.tasks(people.project)
    return {
        "items": [(item.name, item.image_sha256, item.mask_sha256, item.split, item.group) for item in manifest.items],
        "files": {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for folder in ("imgs", "masks")
            for path in sorted((root / "dataset" / folder).iterdir())
        },
        "versions": [
            (version.version, version.weights_sha256, version.decision, version.aliases)
            for version in registry.versions()
        ],
        "served": None if pointer is None else pointer.weights_sha256,
        "shapes": [
            sorted(_look(shape, names) for shape in job_shapes(people.client, job))
            for task in tasks
            for job in jobs_of(people.client, task.id)
        ],
        "tasks": [task.size for task in tasks],
        "handed out": [sorted((remark.frame) for remark in server.remarks(task.id)) for task in tasks],
        "effort": [
            (record.name, record.model, sorted(record.pixels.items()), record.kept, record.changed, record.added)
            for record in read_effort(root / "dataset")
        ],
        "cycles": [(journal.number, journal.outcome) for journal in read_journals(root / "cycles")],
    }


def _look(shape: dict[str, Any], names: dict[int, str]) -> tuple[Any, ...]:
    values = sorted(value["value"] for value in shape["attributes"])
    return names[shape["label_id"]], str(shape["source"]), shape["frame"], values, shape["points"]


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
