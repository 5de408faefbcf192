"""What happens beside the optimisation: the table of metrics, lines for logs, checkpoints that survive a kill."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from sscloud.checkpoint import save_checkpoint
from sscloud.files import atomic_write
from training.module import SegmentationModule


class History(Callback):
    """Writes `metrics.csv`, a row an epoch. Its rows are part of the checkpoint, so a resumed run repeats none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch that ends."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": float(trainer.current_epoch + 1), "train_loss": metrics.pop("train_loss")}
        row["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row.update({name: value for name, value in sorted(metrics.items()) if not name.startswith("train_loss")})
        self._rows.append(row)
        if trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Rows so far."""
        return {"rows": [dict(row) for row in self._rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the checkpoint's last row."""
        self._rows = [dict(row) for row in state_dict["rows"]]

    def _write(self) -> None:
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "epoch": int(row["epoch"])} for row in self._rows)
        atomic_write(self._path, text.getvalue().encode())


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss and mIoU only."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | Any]:
        """The numbers shown at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        names = {"train_loss_step": "loss", "miou": "mIoU"}
        return {shown: metrics[name] for name, shown in names.items() if name in metrics}


class EpochLines(Callback):
    """One line an epoch, for logs and other places where a bar cannot move."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch that ends."""
        if trainer.is_global_zero:
            metrics = trainer.callback_metrics
            miou = f"  mIoU {float(metrics['miou']):.3f}" if "miou" in metrics else ""
            print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  "
                f"loss {float(metrics['train_loss']):.3f}{miou}",
                file=sys.stderr,
                flush=True,
            )


class MilesialCheckpoints(Callback):
    """Writes `checkpoint_epochN.pth` after every epoch, as milesial's train.py does."""

    def __init__(self, folder: Path, label_ids: tuple[int, ...]) -> None:
        self._folder = folder
        self._label_ids = label_ids

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the network as it is now."""
        if trainer.is_global_zero and isinstance(pl_module, SegmentationModule):
            path = self._folder / f"checkpoint_epoch{trainer.current_epoch + 1}.pth"
            save_checkpoint(path, pl_module.model, self._label_ids)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints appear whole or not at all; Lightning's own pass through the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, then rename."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), buffer.getvalue())
