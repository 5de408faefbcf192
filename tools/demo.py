"""The whole way once on sampled scenes: data set → run → bundle → function → a request as CVAT sends it → report."""

import base64
import contextlib
import csv
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sscloud import __version__
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model
from sscloud.errors import ConfigError, SSCloudError
from sscloud.image import read_image, read_label_map
from sscloud.inference import Predictor, Segmentation
from sscloud.labels import LabelSchema, count_ids
from sscloud.shapes import paint_answer
from tools.function_folder import package
from training.config import Place, TrainConfig
from training.dataset import DatasetFolder, Item, learning_parts, open_dataset
from training.evaluate import evaluate, scores_table
from training.export import METRICS
from training.report import DemoReport, Example, Split, Stage, write_demo_report
from training.sample.generate import generate
from training.train import train

MARKER = ".sscloud-demo"
"""In a folder that the demo made, and may therefore clear."""

ELEVATION = (90.0, -60.0)
"""Top and bottom edge in degrees: a scanner with a blind cone, as most are."""

_START_SECONDS = 120
_REQUEST_SECONDS = 120
"""CVAT waits as long for a frame by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """How large the demo is. The defaults take under five minutes on two cores."""

    output: Path
    scenes: int = 36
    unseen: int = 9
    width: int = 512
    scale: float = 1.0
    epochs: int = 22
    base_width: int = 8
    seed: int = 1
    overwrite: bool = False


def demo(config: DemoConfig) -> Path:
    """Run the demo.

    Returns:
        the report's file.

    Raises:
        SSCloudError: a stage failed; the message says which and why.
    """
    folder = config.output
    _claim(folder, overwrite=config.overwrite)
    stages: list[Stage] = []
    started = time.monotonic()

    scenes, unseen = folder / "scenes", folder / "unseen"
    with _stage(stages, "sample", "dataset") as note:
        generate(scenes, count=config.scenes, seed=config.seed, width=config.width, elevation=ELEVATION)
        # Another seed draws other scenes altogether; nothing of them is trained or validated on.
        generate(unseen, count=config.unseen, seed=config.seed + 1_000_000, width=config.width, elevation=ELEVATION)
        note(f"{config.scenes} scenes to learn from, {config.unseen} unseen; {config.width} pixels wide")

    with _stage(stages, "train", "run") as note:
        training = TrainConfig(
            dataset=str(scenes.resolve()),
            epochs=config.epochs,
            batch_size=2,
            scale=config.scale,
            base_width=config.base_width,
            seed=config.seed,
        )
        bundle = train(training, Place(run=folder / "run", name="demo"))
        if bundle is None:
            raise ConfigError("The demo runs in one process. Start it without torchrun.")
        note(f"{config.epochs} epochs at scale {config.scale:g}")

    with _stage(stages, "evaluate", "scores") as note:
        test_set = open_dataset(unseen)
        evaluation = evaluate(bundle, test_set, device="cpu")
        note(f"{len(test_set.items)} scenes the model never saw")

    with _stage(stages, "package", "function") as note:
        function = package(bundle.path, folder / "function")
        note(f"{function}: yaml files, modules, bundle")

    with contextlib.ExitStack() as stack:
        with _stage(stages, "serve", "endpoint") as note:
            doors = stack.enter_context(_serving(folder / "function", function))
            note("start, load and warm up the model")
        with _stage(stages, "request", "pre-labels") as note:
            predictor = Predictor(bundle, device="cpu")
            asked = [_ask(item, doors, predictor, bundle.manifest.labels) for item in test_set.items[:3]]
            note(f"{len(asked)} panoramas through both doors")

    report = folder / "report.html"
    write_demo_report(
        report,
        DemoReport(
            title="From panoramas to pre-labels",
            version=__version__,
            created=datetime.now(UTC),
            schema=bundle.manifest.labels,
            scores=evaluation.scores,
            unseen_scenes=len(test_set.items),
            examples=[answer.example for answer in asked],
            stages=stages,
            total_seconds=time.monotonic() - started,
            history=_history(folder / "run" / METRICS),
            splits=_splits(open_dataset(scenes), test_set, training),
            settings={name: str(getattr(training, name)) for name in _SETTINGS},
            facts=_facts(bundle),
            commands=_commands(),
            checked=_checked(asked),
            unchecked=[
                "The Docker images were not built: that needs a Docker engine.",
                "No CVAT server took part: the requests have the form that CVAT's server sends.",
                "Sampled scenes are not your scans: how a model does on yours, only your own test set tells.",
            ],
        ),
    )
    print(f"\n{scores_table(evaluation)}\n")
    print("\n".join(f"  {stage.name:9} {stage.seconds:6.1f} s   {stage.note}" for stage in stages))
    print(f"  {'total':9} {time.monotonic() - started:6.1f} s\n")
    print(f"The report: {report}")
    return report


_SETTINGS = ("epochs", "batch_size", "scale", "peak_learning_rate", "base_width", "resample", "wrap", "augment", "seed")


def _claim(folder: Path, *, overwrite: bool) -> None:
    """Make the demo's folder, or clear the one an earlier demo made."""
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise ConfigError(f"{folder} holds files that no demo made. Name another folder with --output.")
        if not overwrite:
            raise ConfigError(f"{folder} holds a demo already. Add --overwrite to run it again.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


@contextlib.contextmanager
def _stage(stages: list[Stage], name: str, result: str) -> Iterator[Callable[[str], None]]:
    """Announce a stage, time it, and add it to the list; yields a function that takes its note."""
    print(f"[{len(stages) + 1}/6] {name} …", file=sys.stderr, flush=True)
    notes: list[str] = []
    started = time.monotonic()
    try:
        yield notes.append
    except SSCloudError as error:
        raise type(error)(f"The stage '{name}' failed. {error}") from error
    stages.append(Stage(name=name, result=result, seconds=time.monotonic() - started, note=" ".join(notes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Doors:
    """The two ways CVAT has to a function."""

    function: str
    """URL of the function's own port."""
    dashboard: str
    """URL of the dashboard's API."""
    name: str


@contextlib.contextmanager
def _serving(folder: Path, name: str) -> Iterator[_Doors]:
    """Run `sscloud serve` in a process of its own until the block ends."""
    ports = _free_ports(2)
    doors = _Doors(function=f"http://127.0.0.1:{ports[1]}/", dashboard=f"http://127.0.0.1:{ports[0]}/api", name=name)
    log = folder.parent / "serve.log"
    command = [sys.executable, "-m", "tools.cli", "serve", str(folder)]
    command += ["--port", str(ports[0]), "--function-port", str(ports[1])]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
    try:
        _wait_until_ready(doors, process, log)
        yield doors
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _wait_until_ready(doors: _Doors, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(_get(f"{doors.dashboard}/functions/{doors.name}"))["status"]["state"]
            if state == "ready":
                return
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise ConfigError(f"The function did not get ready within {_START_SECONDS} s. The end of {log}:\n{tail}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 - a loopback address
        body: bytes = reply.read()
    return body


def _post(url: str, body: bytes, headers: dict[str, str]) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as reply:  # noqa: S310
            answer: bytes = reply.read()
    except urllib.error.HTTPError as error:
        raise ConfigError(
            f"The function answered {error.code}: {error.read()[:300].decode(errors='replace')}"
        ) from error
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One panorama asked for, and what was compared."""

    example: Example
    same_at_both_doors: bool
    differing: int
    """Pixels in which the answer painted back differs from the predicted label map."""
    specks: int
    """Pixels of the prediction that the answer leaves as background: regions below the minimum area."""


def _ask(item: Item, doors: _Doors, predictor: Predictor, labels: LabelSchema) -> _Answer:
    """Send one panorama as CVAT does, through both doors, and turn the answer back into a label map."""
    data = item.image.read_bytes()
    body = json.dumps({"image": base64.b64encode(data).decode()}).encode()
    started = time.monotonic()
    answer = _post(f"{doors.dashboard}/function_invocations", body, {"x-nuclio-function-name": doors.name})
    seconds = time.monotonic() - started
    direct = _post(doors.function, body, {})
    regions: list[dict[str, Any]] = json.loads(answer)
    background = labels.background
    fill = background.id if background is not None else 255
    painted = paint_answer(regions, item.size_hw, label_id_of=lambda name: _id_of(labels, name), fill=fill)
    predicted = predictor.predict(data)
    missing, differing = _compare(painted, predicted, fill)
    example = Example(
        name=item.image.name,
        image=read_image(item.image),
        truth=read_label_map(item.mask),
        prediction=painted,
        seconds=seconds,
        answer_bytes=len(answer),
        regions=len(regions),
    )
    return _Answer(example=example, same_at_both_doors=answer == direct, differing=differing, specks=missing)


def _compare(painted: NDArray[np.uint8], predicted: Segmentation, fill: int) -> tuple[int, int]:
    """(pixels left as background, pixels painted otherwise than predicted)."""
    left_out = (painted == fill) & (predicted.label_map != fill)
    return int(left_out.sum()), int(((painted != predicted.label_map) & ~left_out).sum())


def _id_of(labels: LabelSchema, name: str) -> int:
    label = labels.find(name)
    if label is None:
        raise ConfigError(f"The function answered the label {name!r}, which the bundle lacks.")
    return label.id


def _checked(answers: list[_Answer]) -> list[str]:
    """What the comparison of the answers showed, good or bad."""
    pixels = sum(answer.example.truth.size for answer in answers)
    differing, specks = sum(a.differing for a in answers), sum(a.specks for a in answers)
    same = all(answer.same_at_both_doors for answer in answers)
    return [
        f"{len(answers)} panoramas were posted over HTTP to the dashboard's API and to the function's own port; the "
        f"answers were {'the same, byte for byte' if same else 'NOT the same'}.",
        f"Painted back, the regions differ from the predicted label maps in {differing} of {pixels} pixels; another "
        f"{specks} pixels ({specks / pixels:.2%}) are specks below the minimum area, which are not sent.",
    ]


def _splits(scenes: DatasetFolder, unseen: DatasetFolder, training: TrainConfig) -> list[Split]:
    """The parts of the data and their class shares, counted from the masks."""
    learned, validated = learning_parts(scenes, training.validation)
    return [
        Split(name=name, scenes=len(items), size_hw=items[0].size_hw, shares=_shares(items, scenes.schema))
        for name, items in (("training", learned), ("validation", validated), ("unseen", unseen.items))
        if items
    ]


def _shares(items: Sequence[Item], schema: LabelSchema) -> dict[int, float]:
    counts = np.sum([count_ids(read_label_map(item.mask)) for item in items], axis=0)
    return {label.id: float(counts[label.id] / counts.sum()) for label in schema.labels}


def _history(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, as the report names them."""
    names = {"epoch": "epoch", "train_loss": "loss", "val_loss": "val_loss", "miou": "miou"}
    with path.open(newline="") as stream:
        return [
            {names[key]: float(value) for key, value in row.items() if key in names and value}
            for row in csv.DictReader(stream)
        ]


def _facts(bundle: ModelBundle) -> dict[str, str]:
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "network": f"{sum(p.numel() for p in load_model(bundle).parameters()) / 1e6:.2f} million parameters",
        "bundle": bundle.manifest.title,
        "sha256 of its weights": bundle.manifest.weights_sha256,
        "data snapshot": bundle.manifest.snapshot or "",
    }


def _commands() -> list[tuple[str, str]]:
    return [
        (
            "Train on your own panoramas",
            "sscloud convert labelme_export.zip -o data\nsscloud train data --epochs 50 --scale 0.1 -o runs/street",
        ),
        (
            "… or bring a checkpoint of Pytorch-UNet",
            "sscloud import-checkpoint checkpoint_epoch48.pth --scale 0.1 -o models/street",
        ),
        ("Make it a function", "sscloud package runs/street/bundle -o function"),
        (
            "Deploy it beside CVAT",
            "nuctl deploy --project-name cvat --path function --file function/function-gpu.yaml --platform local \\\n"
            """    --platform-config '{"attributes": {"network": "cvat_cvat"}}'""",
        ),
        (
            "… or serve it without Docker, and point CVAT at it",
            "sscloud serve function --host 0.0.0.0 --port 8070\n"
            "# in the environment of CVAT's server and workers, then restart them:\n"
            "CVAT_SERVERLESS=1\nCVAT_NUCLIO_HOST=<this machine>\nCVAT_NUCLIO_PORT=8070\n"
            "CVAT_NUCLIO_INVOKE_METHOD=dashboard",
        ),
        ("In CVAT", "# a task whose labels have the same names: Actions → Automatic annotation → the model"),
    ]
