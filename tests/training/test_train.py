import dataclasses
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import MLFlowLogger
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model
from sscloud.errors import BundleError, ConfigError, DatasetError, RegistryError, TrainingError
from sscloud.frame import Azimuth
from sscloud.image import read_image
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.augment import to_view_frame
from training.callbacks import History, is_used_up
from training.config import Place, TrainConfig, read_run
from training.dataset import Panoramas, build_cache, open_dataset, split
from training.losses import Loss
from training.manifest import DatasetWriter
from training.memory import step_bytes
from training.metrics import Scores, confusion_matrix, score
from training.module import SegmentationModule
from training.sample.generate import generate
from training.splits import SplitPlan
from training.train import _tracked, planned, train

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")

MakeDataset = Callable[..., Path]

SETTINGS: dict[str, Any] = {"epochs": 2, "scale": 0.5, "base_width": 4, "validation": 34.0, "learning_rate": 1e-2}


def config(data: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"dataset": str(data), **SETTINGS, **changes})


def fit(data: Path, run: Path, *, place: dict[str, Any] | None = None, **changes: Any) -> ModelBundle:
    bundle = train(config(data, **changes), Place(run=run, device="cpu", **(place or {})))
    assert bundle is not None
    return bundle


def table(run: Path) -> list[dict[str, str]]:
    head, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


_TIMED = ("seconds", "images_per_second", "loader_images_per_second", "step_images_per_second")


def learned(run: Path) -> list[dict[str, str]]:
    """`metrics.csv` without what the clock says."""
    return [{name: value for name, value in row.items() if name not in _TIMED} for row in table(run)]


def weights(run: Path, name: str = "last") -> str:
    """sha256 of the network of a checkpoint."""
    state = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "CVAT_PASSWORD": "geheim-4711",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def flags(data: Path, run: Path, **changes: Any) -> list[str]:
    values = {**SETTINGS, **changes}
    named = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", str(data), "-o", str(run), "--device", "cpu", *named]


def validated(run: Path, data: Path, name: str = "best") -> Scores:
    """The validation part, counted by one process with the weights of a checkpoint."""
    folder = open_dataset(data)
    items = build_cache(folder, scale=0.5, resample="valid-area", folder=data / ".cache", quiet=True)
    state = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
    model = UNet(read_run(run).facts.architecture)
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    model.eval()
    panoramas = Panoramas(split(items, read_run(run).config.validation)[1], folder.schema)
    facts = read_run(run).facts
    total = np.zeros((6, 6), np.int64)
    for index in range(len(panoramas)):
        batch = panoramas[index]
        images = batch.images / 255
        if facts.frame == "view":
            assert facts.azimuth is not None
            images = to_view_frame(images, batch.origins, batch.whole_hw, facts.azimuth)
        with torch.inference_mode():
            predicted = model(images)[0].argmax(0)
        total += confusion_matrix(batch.class_maps[0].numpy(), predicted.numpy().astype(np.uint8), 6)
    return score(total, folder.schema.class_ids)


def test_a_run_folder_is_complete(make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVAT_PASSWORD", "geheim-4711")
    data, run = make_dataset(3), tmp_path / "runs/one"

    bundle = fit(data, run, place={"name": "Улица", "version": 4}, seed=5)

    files = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert files == {
        "config.json",
        "metrics.csv",
        "mlflow_run_id",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "bundle/manifest.json",
        "bundle/weights.safetensors",
        "report.html",
    }
    assert read_run(run).config == config(data, seed=5)
    rows = table(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "val_loss", "miou", "iou_0", "iou_2", "iou_66", "learning_rate"} <= set(rows[0])
    assert rows[0]["iou_66"] == "nan"
    manifest = bundle.manifest
    assert (manifest.title, manifest.scale, manifest.aspect) == ("Улица v4", 0.5, 2.0)
    assert manifest.azimuth == Azimuth(direction=1, column_0=0.0)
    assert manifest.label_ids == (0, 2, 5, 6, 65, 66)
    assert manifest.snapshot == read_run(run).facts.snapshot
    best = max(rows, key=lambda row: float(row["miou"]))
    assert manifest.metrics["validation_miou"] == float(best["miou"])
    assert manifest.metrics["epoch"] == float(best["epoch"])
    assert validated(run, data).miou == pytest.approx(float(best["miou"]), abs=1e-6)
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or b"geheim-4711" not in file.read_bytes(), file
    segmentation = Predictor(ModelBundle.load(run / "bundle")).predict(read_image(data / "imgs/1_normals.png"))
    assert segmentation.label_map.shape == (64, 128)
    assert segmentation.wrapped


def test_metrics_reach_the_mlflow_store(make_dataset: MakeDataset, tmp_path: Path) -> None:
    run = tmp_path / "runs/one"
    fit(make_dataset(3), run)

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    run_id = (run / "mlflow_run_id").read_text().strip()
    stored = client.get_run(run_id)
    assert stored.info.run_name == "one"
    assert stored.info.status == "FINISHED"
    assert stored.info.artifact_uri == f"{(tmp_path / 'runs/artifacts').as_uri()}/{run_id}/artifacts"
    assert stored.data.params["learning_rate"] == "0.01"
    history = [metric.value for metric in client.get_metric_history(run_id, "miou")]
    assert history == [float(row["miou"]) for row in table(run)]
    assert {"train_loss", "val_loss"} <= set(stored.data.metrics)


def test_a_store_that_fails_is_named_without_its_login(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, run = make_dataset(2), tmp_path / "run"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = f"http://anna:secret@127.0.0.1:{free_port()}"
    with pytest.raises(RegistryError, match=r"The store http://127\.0\.0\.1:\d+ does not do") as first:
        fit(data, run, place={"tracking_uri": away})

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException(f"{away} is full")

    monkeypatch.setattr(MLFlowLogger, "log_metrics", fail)
    with pytest.raises(RegistryError, match=r"http://127\.0\.0\.1:\d+ is full") as later:
        fit(data, run, place={"resume": True}, epochs=1)

    (tmp_path / "record").write_text("0" * 32)
    with pytest.raises(MlflowException):  # no answer is not "unknown": the record would be made a second time
        _tracked(tmp_path / "record", away)
    monkeypatch.setattr("training.train.MlflowClient", lambda uri: MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    assert _tracked(tmp_path / "record", away) is None
    assert "does not know the run" in caplog.text
    assert "secret" not in f"{first.value} {later.value} {caplog.text}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.slow
def test_training_improves_the_loss(make_dataset: MakeDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(make_dataset(4), run, epochs=12, validation=25.0)

    rows = table(run)
    assert float(rows[-1]["train_loss"]) < 0.75 * float(rows[0]["train_loss"])
    assert float(rows[-1]["miou"]) > 0.3


def test_without_validation(make_dataset: MakeDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bundle = fit(make_dataset(1), run, validation=0.0)

    assert "miou" not in table(run)[0]
    assert bundle.manifest.metrics["epoch"] == 2
    assert weights(run, "best") == weights(run, "last")


def test_frozen_splits_decide(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(5)
    with DatasetWriter(data, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=20, test=40))
        writer.commit()
        manifest = writer.manifest
    alone = tmp_path / "alone"
    shutil.copytree(data, alone, ignore=shutil.ignore_patterns("manifest.json", ".cache"))
    for item in manifest.items:
        if item.split != "train":
            (alone / "imgs" / item.image).unlink()
            (alone / "masks" / item.mask).unlink()
        if item.split == "test":  # never decoded: what is in it would be an error
            size = (data / "imgs" / item.image).read_bytes()[:64]
            (data / "imgs" / item.image).write_bytes(size)

    bundle = fit(data, tmp_path / "run", validation=None, epochs=1)
    fit(alone, tmp_path / "other", validation=0.0, epochs=1)

    assert weights(tmp_path / "run") == weights(tmp_path / "other")
    assert "miou" in table(tmp_path / "run")[0]
    assert bundle.manifest.snapshot == manifest.snapshot
    with pytest.raises(ConfigError, match=r"--validation 34 cannot be used: the splits .* are frozen"):
        fit(data, tmp_path / "refused")


def test_frozen_splits_without_validation(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(3)
    with DatasetWriter(data, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=0, test=33))
        writer.commit()

    fit(data, tmp_path / "run", validation=None)

    assert "miou" not in table(tmp_path / "run")[0]
    assert weights(tmp_path / "run", "best") == weights(tmp_path / "run", "last")


@pytest.mark.slow
def test_same_seed_same_weights(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(data, tmp_path / name, seed=seed, epochs=1)

    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_mixed_precision_and_batches(make_dataset: MakeDataset, tmp_path: Path) -> None:
    bundle = fit(make_dataset(4), tmp_path / "run", amp=True, batch_size=2, validation=25.0, bilinear=True)

    rows = table(tmp_path / "run")
    assert all(np.isfinite(float(row["train_loss"])) for row in rows)
    assert bundle.manifest.architecture.upsampling == "bilinear"
    assert {tensor.dtype for tensor in load_model(bundle).parameters()} == {torch.float32}


def test_more_channels_than_labels(make_dataset: MakeDataset, tmp_path: Path) -> None:
    bundle = fit(make_dataset(2), tmp_path / "run", classes=68, epochs=1)

    assert bundle.manifest.architecture.classes == 68
    assert bundle.manifest.label_ids == (0, 2, 5, 6, 65, 66) + (0,) * 62
    assert load_model(bundle).outc.conv.weight.shape[0] == 68


def test_fewer_channels_than_labels(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--classes 5 is less than the 6 labels of the schema \(Фон, Земля"):
        fit(make_dataset(2), tmp_path / "run", classes=5)


def test_load_continues_from_a_bundle_and_from_a_checkpoint(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, pth = make_dataset(3), tmp_path / "pth"
    first = fit(data, tmp_path / "first", validation=0.0, place={"checkpoints": pth}, wrap=False)
    assert sorted(file.name for file in pth.iterdir()) == ["checkpoint_epoch1.pth", "checkpoint_epoch2.pth"]
    frozen = {"epochs": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "validation": 0.0, "wrap": False}

    for name, source in (("bundle", tmp_path / "first/bundle"), ("pth", pth / "checkpoint_epoch2.pth")):
        second = fit(data, tmp_path / name, load=str(source), **frozen)
        parent = "sscloud v1" if name == "bundle" else "checkpoint_epoch2.pth"
        assert second.manifest.parent == parent
        expected = load_model(first).outc.conv.weight
        torch.testing.assert_close(load_model(second).outc.conv.weight, expected, atol=1e-6, rtol=0)
    assert "was trained at scale" not in caplog.text
    with pytest.raises(BundleError, match=r"base width 4 with transposed .* asked for were 8 and transposed"):
        fit(data, tmp_path / "wide", load=str(tmp_path / "first/bundle"), base_width=8, scale=0.3)
    assert "this run is at 0.3. To build on what it saw, add --scale" in caplog.text
    few = make_dataset(2, name="few", ids=(0, 2, 5, 6))
    fit(few, tmp_path / "few-run", load=str(tmp_path / "first/bundle"), **frozen)
    assert "kept Фон, Земля, Растительность, Здание; dropped Конструкции, Обстановка" in caplog.text


def test_an_existing_run_is_not_touched(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run = make_dataset(2), tmp_path / "run"
    fit(data, run, epochs=1)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    with pytest.raises(ConfigError, match=r"holds a run already\. Go on with it by --resume"):
        fit(data, run, epochs=1)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_sizes_that_do_not_batch(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(3)
    for folder in ("imgs", "masks"):
        file = data / folder / "1_normals.png"
        Image.open(file).resize((160, 80), Image.Resampling.NEAREST).save(file)

    with pytest.raises(DatasetError, match=r"2 sizes \(128x64, 160x80\), which do not fit in one batch"):
        fit(data, tmp_path / "run", batch_size=2)
    assert fit(data, tmp_path / "run", epochs=1).manifest.aspect == 2.0


def test_resume_after_the_data_changed(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run = make_dataset(3), tmp_path / "run"
    fit(data, run, epochs=1)
    kept = (run / "config.json").read_bytes()
    settings = config(data, epochs=1)

    facts = data / "dataset.yaml"
    facts.write_text("azimuth: {direction: -1, column_0: 0.0}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"changed since .*run was started: azimuth \(labels.yaml, dataset.yaml\)"):
        train(settings, Place(run=run, resume=True))
    facts.write_text("azimuth: {direction: 1, column_0: 0.0}\n", encoding="utf-8")
    labels = open_dataset(data).schema.to_dict()
    labels["labels"][1]["id"], labels["labels"][2]["id"] = 5, 2
    (data / "labels.yaml").write_text(yaml.safe_dump(labels, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"was started: labels, label_ids"):
        train(settings, Place(run=run, resume=True))
    (data / "labels.yaml").unlink()
    for folder in ("imgs", "masks"):
        (data / folder / "3_normals.png").unlink()
    with pytest.raises(
        ConfigError, match=r"The data set changed since .* \(snapshot \w{16}, now \w{16}\)\. Start a new"
    ):
        train(settings, Place(run=run, resume=True))
    assert (run / "config.json").read_bytes() == kept


_KILLER = """
import os, signal, sys
import training.callbacks as callbacks
from tools.cli import main
moment, real, calls = int(sys.argv.pop(1)), callbacks.atomic_write, []
def write(path, data):
    calls.append(path)
    if len(calls) == moment // 2 + 1:
        if moment % 2:
            real(path, data)
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
callbacks.atomic_write = write
main(sys.argv[1:])
"""
"""Dies before (even moments) or after (odd ones) one of the writes of metrics.csv and checkpoints."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 2, 3, 4, 6, 7, 10))])
def test_killed_and_resumed_equals_undisturbed(make_dataset: MakeDataset, tmp_path: Path, moment: int) -> None:
    data, whole, run = make_dataset(3), tmp_path / "whole", tmp_path / "killed"
    fit(data, whole, epochs=3)

    command = [sys.executable, "-c", _KILLER, str(moment), *flags(data, run, epochs=3)]
    died = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (run / "bundle").exists()
    train(config(data, epochs=3), Place(run=run, resume=True, device="cpu"))

    assert learned(run) == learned(whole)
    assert weights(run) == weights(whole)
    assert weights(run, "best") == weights(whole, "best")
    bundles = [ModelBundle.load(folder / "bundle").manifest for folder in (run, whole)]
    assert bundles[0].weights_sha256 == bundles[1].weights_sha256
    assert bundles[0].metrics == bundles[1].metrics


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_moment(make_dataset: MakeDataset, tmp_path: Path, seed: int) -> None:
    data, whole, run = make_dataset(3), tmp_path / "whole", tmp_path / "killed"
    fit(data, whole, epochs=8)

    command = [sys.executable, "-m", "tools.cli", *flags(data, run, epochs=8)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (run / "checkpoints/last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(float(np.random.default_rng(seed).uniform(0, 0.5)))
        process.kill()
    train(config(data, epochs=8), Place(run=run, resume=True, device="cpu"))

    assert learned(run) == learned(whole)
    assert weights(run) == weights(whole)
    assert weights(run, "best") == weights(whole, "best")


def test_ctrl_c_is_told_and_resumable(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run = make_dataset(3), tmp_path / "run"

    command = [sys.executable, "-m", "tools.cli", *flags(data, run, epochs=5000)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [line for line in iter(process.stderr.readline, "") if _interrupt(process, line)]

    assert process.returncode == 130
    assert lines[-1] == "sscloud train: stopped.\n"
    assert (run / "checkpoints/last.ckpt").exists()


def _interrupt(process: subprocess.Popen[str], line: str) -> bool:
    if line.startswith("epoch 2/"):
        process.send_signal(signal.SIGINT)
    return True


@pytest.mark.slow
def test_two_processes(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run = make_dataset(6), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]

    command = [*torchrun, "-m", "tools.cli", *flags(data, run, epochs=6, validation=50)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The best model is in") == 1
    bundle = ModelBundle.load(run / "bundle")
    rows = table(run)
    assert len(rows) == 6
    # Three panoramas for two processes; the counts of both are summed.
    scores = validated(run, data, "last")
    assert scores.miou == pytest.approx(float(rows[-1]["miou"]), abs=1e-6)
    for label_id, iou in zip(scores.label_ids, scores.iou, strict=True):
        assert float(rows[-1][f"iou_{label_id}"]) == pytest.approx(iou, abs=1e-6, nan_ok=True)
    assert bundle.manifest.metrics["validation_miou"] == max(float(row["miou"]) for row in rows)


_ONE_WITHOUT_A_NUMBER = """
import os, sys
from training.losses import Loss
from training.module import SegmentationModule
from tools.cli import main
step, forward = SegmentationModule.training_step, Loss.forward
def counted_step(self, batch, index):
    self.loss.broken = os.environ["RANK"] == "1" and self.current_epoch == 0 and index < 4
    step(self, batch, index)
def broken_forward(self, *arguments):
    loss = forward(self, *arguments)
    return loss * float("nan") if getattr(self, "broken", False) and self.training else loss
SegmentationModule.training_step, Loss.forward = counted_step, broken_forward
sys.exit(main(sys.argv[1:]))
"""
"""The second process has no finite loss in its first steps."""


@pytest.mark.slow
def test_two_processes_skip_a_step_together(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run, program = make_dataset(6), tmp_path / "run", tmp_path / "program.py"
    program.write_text(_ONE_WITHOUT_A_NUMBER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    settings = {"epochs": 2, "validation": 34, "crop": "32x24", "ema": 0.5, "patience": 5}

    command = [*torchrun, str(program), *flags(data, run, **settings)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr
    rows = table(run)
    assert [float(row["skipped_steps"]) for row in rows] == [4, 0]
    assert all(np.isfinite(float(row["train_loss"])) for row in rows)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_out_of_memory_names_what_fits(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    room = step_bytes(Architecture(classes=6, base_width=8), 1, (32, 64), amp=False)
    monkeypatch.setattr(pl.Trainer, "fit", full)
    monkeypatch.setattr("training.train._check_memory", lambda *_: None)  # which would refuse before the first step
    monkeypatch.setattr("training.train._device_memory", lambda _: room)

    with pytest.raises(
        TrainingError, match=r"Out of memory\. A step at --scale 0\.5 .*would fit: --batch-size 1 --scale 0"
    ):
        fit(make_dataset(4), tmp_path / "run", batch_size=3, base_width=8)


def test_what_cannot_fit_is_refused_before_it_starts(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = step_bytes(Architecture(classes=6, base_width=8), 1, (32, 64), amp=False)
    monkeypatch.setattr("training.train._device_memory", lambda _: room)

    with pytest.raises(TrainingError, match=r"Not enough memory\. A step .*would fit: --batch-size 1 --scale 0"):
        fit(make_dataset(4), tmp_path / "run", batch_size=3, base_width=8)


def test_a_loss_that_is_no_number_stops(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loss, "forward", lambda _, logits, *__: logits.sum() * float("nan"))

    with pytest.raises(TrainingError, match=r"20 steps in a row had no finite loss .*--learning-rate"):
        fit(make_dataset(7), tmp_path / "run", epochs=6)


def test_a_step_that_is_no_number_changes_nothing(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real, calls = make_dataset(3), Loss.forward, []

    def forward(self: Loss, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(1)
        loss = real(self, logits, *rest)
        return loss * float("inf") if len(calls) == 2 else loss

    monkeypatch.setattr(Loss, "forward", forward)
    fit(data, tmp_path / "run", validation=0.0, epochs=1)

    row = table(tmp_path / "run")[0]
    assert row["skipped_steps"] == "1.0"
    assert np.isfinite(float(row["train_loss"]))
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    # Neither statistics nor moments know of the step.
    assert state["model.inc.double_conv.1.num_batches_tracked"] == 2


def test_a_step_without_memory_is_tried_again_in_parts(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes, real = [], Loss.forward

    def forward(self: Loss, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(logits))
        if len(logits) > 1 or len(sizes) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, logits, *rest)

    monkeypatch.setattr("training.train._check_memory", lambda *_: None)  # which counts a step without taking it
    monkeypatch.setattr(Loss, "forward", forward)
    fit(make_dataset(4), tmp_path / "run", validation=0.0, epochs=1, batch_size=4)

    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1]
    assert "Out of memory: going on with batches in 4 parts." in caplog.text
    assert "going on with activations computed twice (--checkpointing)" in caplog.text
    assert np.isfinite(float(table(tmp_path / "run")[0]["train_loss"]))


def test_a_step_that_never_fits_says_what_would(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SegmentationModule, "_backward", full)

    with pytest.raises(TrainingError, match=r"Out of memory\. A step at --scale 0\.5"):
        fit(make_dataset(2), tmp_path / "run")


def test_the_average_of_the_weights_is_kept_as_the_best(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, pth = make_dataset(3), tmp_path / "pth"
    bundle = fit(data, tmp_path / "run", ema=0.9, validation=0.0, place={"checkpoints": pth})
    plain = fit(data, tmp_path / "plain", validation=0.0)

    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    name = "model.outc.conv.weight"
    assert not torch.equal(state["state_dict"][name], state["current_model_state"][name])
    # The average does not disturb what it is taken of.
    assert torch.equal(state["current_model_state"][name], load_model(plain).outc.conv.weight)
    assert torch.equal(load_model(bundle).outc.conv.weight, state["state_dict"][name])
    written = torch.load(pth / "checkpoint_epoch2.pth", weights_only=True)
    assert torch.equal(written["outc.conv.weight"], state["state_dict"][name])


@pytest.mark.slow
def test_the_average_is_validated_and_resumed(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run, whole = make_dataset(4), tmp_path / "run", tmp_path / "whole"
    fit(data, whole, epochs=4, ema=0.8)
    settings = config(data, epochs=4, ema=0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "_write", lambda self: _interrupt_after(self, 2))
        with pytest.raises(KeyboardInterrupt):
            train(settings, Place(run=run, device="cpu"))
    train(settings, Place(run=run, resume=True, device="cpu"))

    assert learned(run) == learned(whole)
    assert weights(run) == weights(whole)
    assert validated(whole, data, "last").miou == pytest.approx(float(table(whole)[-1]["miou"]), abs=1e-6)


def _interrupt_after(history: History, epochs: int) -> None:
    if len(history.state_dict()["rows"]) > epochs:
        raise KeyboardInterrupt


def test_training_stops_early(make_dataset: MakeDataset, tmp_path: Path) -> None:
    fit(make_dataset(3), tmp_path / "run", epochs=30, patience=2, learning_rate=1e-9)

    rows = table(tmp_path / "run")
    best = int(np.argmax([float(row["miou"]) for row in rows]))
    assert len(rows) == best + 3 < 30


def test_training_keeps_to_its_time(
    make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_dataset(3), tmp_path / "run", epochs=30, max_hours=1e-9)

    assert len(table(tmp_path / "run")) == 1
    assert "another epoch would go beyond the budget of 1e-09 h" in capsys.readouterr().err


def test_when_a_time_is_used_up() -> None:
    assert not is_used_up([], 1)
    assert not is_used_up([1000.0, 1300.0], 1)  # a third one like the second ends at 3600 s
    assert is_used_up([1000.0, 1301.0], 1)


def test_crops_are_learned_from(make_dataset: MakeDataset, tmp_path: Path) -> None:
    bundle = fit(make_dataset(3), tmp_path / "run", crop=(32, 24), batch_size=2, accumulate=2, latitude_weights=True)

    assert all(np.isfinite(float(row["train_loss"])) for row in table(tmp_path / "run"))
    assert bundle.manifest.architecture.wrap
    assert read_run(tmp_path / "run").config.crop == (32, 24)


@pytest.mark.slow
def test_large_panoramas_are_validated_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    generate(data, count=2, seed=5, width=512)
    settings = {"scale": 1.0, "validation": 50.0, "epochs": 1, "base_width": 2}
    fit(data, tmp_path / "whole", **settings)
    sizes: list[tuple[int, int]] = []
    real = SegmentationModule._logits

    def logits(self: SegmentationModule, images: torch.Tensor, *, wrap: bool) -> torch.Tensor:
        if not self.training:
            sizes.append((images.shape[2], images.shape[3]))
        return real(self, images, wrap=wrap)

    monkeypatch.setattr(SegmentationModule, "_logits", logits)
    monkeypatch.setattr("training.module._BAND_PIXELS", 512 * 100)
    with monkeypatch.context() as patch:
        patch.setattr("training.train.MAX_BYTES", 5 << 20)
        fit(data, tmp_path / "tiled", **settings)

    assert len(sizes) > 1
    assert max(height * width for height, width in sizes) < 256 * 512
    whole, tiled = table(tmp_path / "whole")[0], table(tmp_path / "tiled")[0]
    for name in ("miou", "iou_2", "iou_5"):
        assert float(tiled[name]) == pytest.approx(float(whole[name]), abs=2e-3)
    assert float(tiled["temperature"]) == pytest.approx(float(whole["temperature"]), rel=0.1)  # of other pixels


@pytest.mark.parametrize("loss", ["focal+dice", "ce+tversky", "ce+lovasz"])
def test_other_losses(make_dataset: MakeDataset, tmp_path: Path, loss: str) -> None:
    fit(make_dataset(2), tmp_path / "run", loss=loss, class_weights="none", validation=0.0, tilt=5.0)

    rows = [float(row["train_loss"]) for row in table(tmp_path / "run")]
    assert np.isfinite(rows).all()


@pytest.mark.slow
def test_the_azimuth_is_found_in_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    generate(data, count=3, seed=5, width=256)
    (data / "dataset.yaml").unlink()

    bundle = fit(data, tmp_path / "run", epochs=1)

    assert bundle.manifest.azimuth == Azimuth(direction=1, column_0=0.0)
    assert bundle.manifest.frame == "view"


def test_without_an_azimuth_nothing_is_turned(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_dataset(3)
    (data / "dataset.yaml").unlink()
    for file in (data / "imgs").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)).save(file)

    bundle = fit(data, tmp_path / "run", epochs=1)

    assert (bundle.manifest.azimuth, bundle.manifest.frame) == (None, "scanner")
    assert "Panoramas are neither turned nor mirrored" in caplog.text
    with pytest.raises(ConfigError, match=r"--frame view needs panoramas of normals .* not known: state it"):
        fit(data, tmp_path / "refused", frame="view")


def test_a_wrong_azimuth_is_doubted(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_dataset(3)
    (data / "dataset.yaml").write_text("azimuth: {direction: 1, column_0: 180.0}\n", encoding="utf-8")

    fit(data, tmp_path / "run", epochs=1)

    assert "only" in caplog.text
    assert "of the upright surfaces face the scanner" in caplog.text


def test_new_corrections_are_told_from_what_is_known(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(make_dataset(4, name="old"), tmp_path / "first", validation=0.0, epochs=1)
    data = make_dataset(6, name="grown")
    mask = np.array(Image.open(data / "masks/1_normals.png"))
    mask[:8] = 66
    Image.fromarray(mask).save(data / "masks/1_normals.png")

    second = fit(data, tmp_path / "second", validation=0.0, epochs=1, load=str(tmp_path / "first/bundle"), replay=0.34)

    assert "has learned from 3 of the 6 panoramas; 3 are new or corrected since" in caplog.text
    assert len(second.manifest.learned) == 7  # both versions of the corrected one
    state = torch.load(tmp_path / "second/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4


@pytest.mark.slow
def test_a_moved_run_remembers_its_best(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, run = make_dataset(3), tmp_path / "run"
    settings = config(data, epochs=3, learning_rate=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "_write", lambda self: _interrupt_after(self, 1))
        with pytest.raises(KeyboardInterrupt):
            train(settings, Place(run=run, device="cpu"))
    last = run / "checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)
    (name,) = [name for name in state["callbacks"] if "'miou'" in name]
    state["callbacks"][name]["best_model_score"] = torch.tensor(0.99)  # better than anything to come
    state["callbacks"][name]["best_k_models"] = dict.fromkeys(
        state["callbacks"][name]["best_k_models"], torch.tensor(0.99)
    )
    state["callbacks"][name]["current_score"] = torch.tensor(0.99)
    torch.save(state, last)
    moved = tmp_path / "elsewhere/run"
    moved.parent.mkdir()
    run.rename(moved)

    bundle = train(settings, Place(run=moved, resume=True, device="cpu"))

    assert bundle is not None
    assert torch.load(moved / "checkpoints/best.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("ends", [{"patience": 1}, {"max_hours": 1e-9}])
def test_an_early_stop_is_not_resumed(make_dataset: MakeDataset, tmp_path: Path, ends: dict[str, float]) -> None:
    data, run = make_dataset(3), tmp_path / "run"
    settings = config(data, epochs=30, learning_rate=1e-9, **ends)
    train(settings, Place(run=run, device="cpu"))
    before = (run / "metrics.csv").read_bytes()

    assert train(settings, Place(run=run, resume=True, device="cpu")) is not None
    assert (run / "metrics.csv").read_bytes() == before


def test_what_has_no_effect_is_told(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"patience": 3, "validation": 0.0, "tilt": 5.0, "crop": (32, 24), "replay": 0.5, "augment": False}
    fit(make_dataset(2), tmp_path / "run", epochs=1, **asked)

    for flag in ("--patience", "--tilt", "--replay"):
        assert f"{flag} has no effect" in caplog.text
    assert "--rare-crops" not in caplog.text


def test_sizes_that_do_not_batch_are_not_planned(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(3)
    for folder in ("imgs", "masks"):
        file = data / folder / "1_normals.png"
        Image.open(file).resize((160, 80), Image.Resampling.NEAREST).save(file)
    place = Place(run=tmp_path / "run", device="cpu", memory=2.0)

    chosen, _ = planned(config(data), place, auto={"batch_size"})

    assert chosen.batch_size == 1
    with pytest.raises(DatasetError, match=r"2 sizes .* Use --batch-size 1 and no --accumulate"):
        fit(data, tmp_path / "run", batch_size=2, crop=(32, 24))
    with pytest.raises(ConfigError, match=r"Several processes would plan by what each finds free"):
        planned(config(data), Place(run=tmp_path / "run", processes_per_node=2), auto={"scale"})


def test_another_frame_than_the_parents_is_told(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_dataset(2)
    first = fit(data, tmp_path / "first", epochs=1, validation=0.0)
    assert first.manifest.frame == "view"
    again = {"load": str(tmp_path / "first/bundle"), "epochs": 1, "validation": 0.0}
    assert fit(data, tmp_path / "second", **again).manifest.frame == "view"
    assert "in the frame" not in caplog.text

    assert fit(data, tmp_path / "third", frame="scanner", **again).manifest.frame == "scanner"

    assert "has learned from normals in the frame 'view', this run shows them in 'scanner'" in caplog.text


def test_a_network_without_wrapping_sees_the_scanners_frame(make_dataset: MakeDataset, tmp_path: Path) -> None:
    assert fit(make_dataset(2), tmp_path / "run", epochs=1, wrap=False).manifest.frame == "scanner"


def test_a_diverged_network_is_not_kept(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SegmentationModule.on_validation_epoch_end

    def spoil(self: SegmentationModule) -> None:
        real(self)
        next(self.model.buffers()).fill_(float("inf"))

    monkeypatch.setattr(SegmentationModule, "on_validation_epoch_end", spoil)

    with pytest.raises(TrainingError, match=r"Training diverged in epoch 1\. Try a tenth of the --learning-rate"):
        fit(make_dataset(3), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()


def test_masks_that_are_void_all_over(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(2)
    for file in (data / "masks").iterdir():
        Image.new("L", (128, 64), 255).save(file)

    with pytest.raises(DatasetError, match=r"Every pixel of the \d masks to learn from .* is void"):
        fit(data, tmp_path / "run")


def test_crops_are_not_wrapped_unasked(make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(3)
    for folder, mode in (("imgs", "RGB"), ("masks", "L")):
        file = next(iter(sorted((root / folder).iterdir())))
        Image.new(mode, (64, 64)).save(file)

    with pytest.raises(DatasetError, match=r"1 of the 3 images .* another aspect than 2 .*--no-wrap --no-augment"):
        fit(root, tmp_path / "run")


def test_other_failures_are_not_called_out_of_memory(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(pl.Trainer, "fit", broken)

    with pytest.raises(RuntimeError, match=r"^a defect$"):
        fit(make_dataset(2), tmp_path / "run")


def test_data_are_checked_before_anything_is_written(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(2)
    (data / "masks/1_normals.png").unlink()

    with pytest.raises(DatasetError, match=r"has no mask"):
        fit(data, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"The device 'cuda:77' cannot be used here"):
        train(config(data), Place(run=tmp_path / "run", device="cuda:77"))
    assert not (tmp_path / "run").exists()


def test_config_is_kept_exactly(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(2)
    settings = config(data, epochs=1, augment=False, resample="bicubic", weight_decay=1e-5)
    train(settings, Place(run=tmp_path / "run", device="cpu"))

    kept = read_run(tmp_path / "run")
    assert dataclasses.asdict(kept.config) == dataclasses.asdict(settings)
    assert kept.facts.elevation == (90.0, -90.0)
