import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sscloud.labels import LabelSchema

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # as the command line does: tests stay on this machine

SIZE_HW = (64, 128)


def write_item(root: Path, number: int, *, seed: int = 0) -> None:
    """A street in miniature: sky, a round wall, flat ground and one rough bush, normals facing the scanner."""
    rng = np.random.default_rng((seed, number))
    height, width = SIZE_HW
    azimuth = (np.arange(width) + 0.5) * 2 * np.pi / width
    normals = np.zeros((height, width, 3))
    label_map = np.zeros(SIZE_HW, np.uint8)
    normals[20:40, :, 0], normals[20:40, :, 1] = -np.cos(azimuth), -np.sin(azimuth)
    label_map[20:40] = 6
    normals[40:, :, 2] = 1
    label_map[40:] = 2
    left = int(rng.integers(0, width - 24))
    rough = rng.normal(size=(20, 24, 3)) + np.array([0, 0, 1])
    normals[24:44, left : left + 24] = rough / np.linalg.norm(rough, axis=-1, keepdims=True)
    label_map[24:44, left : left + 24] = 5
    image = np.rint((normals * 0.5 + 0.5) * 255).astype(np.uint8)
    image[:20] = 0
    Image.fromarray(image).save(root / "imgs" / f"{number}_normals.png")
    Image.fromarray(label_map).save(root / "masks" / f"{number}_normals.png")


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data set of `count` panoramas of 64x128; `ids` shortens the schema to these labels."""

    def make(count: int = 3, *, name: str = "data", seed: int = 0, ids: tuple[int, ...] | None = None) -> Path:
        root = tmp_path / name
        (root / "imgs").mkdir(parents=True)
        (root / "masks").mkdir()
        for number in range(1, count + 1):
            write_item(root, number, seed=seed)
        (root / "dataset.yaml").write_text("azimuth: {direction: 1, column_0: 0.0}\n", encoding="utf-8")
        if ids is not None:
            schema = LabelSchema.default()
            kept = LabelSchema(labels=tuple(label for label in schema.labels if label.id in ids))
            (root / "labels.yaml").write_text(kept.to_yaml(), encoding="utf-8")
        return root

    return make


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what waits for a server wait a fiftieth of the time."""
    for name in ("cvat.FIRST_PAUSE", "prelabel.PAUSE", "prelabel_server.PAUSE", "prelabel_server.FIRST_POLL"):
        monkeypatch.setattr(f"training.{name}", 0.02)
