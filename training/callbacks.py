"""What happens beside the optimisation: the table of metrics, lines for logs, checkpoints that survive a kill."""

import csv
import io
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar, WeightAveraging
from torch import Tensor, nn
from tqdm import tqdm

from sscloud.checkpoint import save_checkpoint
from sscloud.files import atomic_write
from sscloud.unet import UNet
from training.module import SegmentationModule


class History(Callback):
    """Writes `metrics.csv`, a row an epoch. Its rows are part of the checkpoint, so a resumed run repeats none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch that ends."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loss = metrics.pop("train_loss", math.nan)  # missing where every step was skipped
        row = {"epoch": float(trainer.current_epoch + 1), "train_loss": loss}
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


class Throughput(Callback):
    """Logs at every epoch `seconds` and images per second: of the whole training part (`images_per_second`), of loading
    alone (`loader_images_per_second`) and of the steps alone (`step_images_per_second`).

    The slower of the last two is what to speed up.
    """

    def __init__(self) -> None:
        self._began = self._loading = self._stepping = 0.0
        self._images = 0
        self._mark = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = self._mark = time.perf_counter()
        self._loading = self._stepping = 0.0
        self._images = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        now = time.perf_counter()
        self._loading += now - self._mark
        self._mark = now
        self._images += len(batch.images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done: the norm of its gradients was waited for, on a GPU too."""
        now = time.perf_counter()
        self._stepping += now - self._mark
        self._mark = now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rates; validation lies between the last batch and now."""
        trained = self._mark - self._began
        for name, seconds in (
            ("images_per_second", trained),
            ("loader_images_per_second", self._loading),
            ("step_images_per_second", self._stepping),
        ):
            pl_module.log(name, trainer.world_size * self._images / max(seconds, 1e-9))
        pl_module.log("seconds", time.perf_counter() - self._began)


class Averaging(WeightAveraging):
    """Exponential moving average of the weights, which is validated and kept as the best model.

    It begins fast, as (1 + n) / (10 + n) after n steps, so that short trainings do not end with their first weights
    (the warm-up of TensorFlow's `ExponentialMovingAverage`). The statistics of batch normalisation, averages
    already, are averaged along.

    Args:
        decay: share of the old average that a step keeps, 0 to 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self._decay = decay

    def averaged(self, module: SegmentationModule) -> nn.Module:
        """The network with the averaged weights."""
        average: Any = self._average_model
        network: nn.Module = module.model if average is None else average.module.model
        return network

    @torch.no_grad()
    def _average(self, averages: Any, currents: Any, count: Tensor | int) -> None:
        decay = min(self._decay, (1 + int(count)) / (10 + int(count)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - decay)
        else:  # counters
            torch._foreach_copy_(averages, currents)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss and mIoU only."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | Any]:
        """The numbers shown at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        names = {"train_loss_step": "loss", "miou": "mIoU"}
        return {shown: metrics[name] for name, shown in names.items() if name in metrics}


class EpochLines(Callback):
    """One line an epoch that stays, above the bar and in logs."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch that ends."""
        if trainer.is_global_zero:
            metrics = trainer.callback_metrics
            miou = f"  mIoU {float(metrics['miou']):.3f}" if "miou" in metrics else ""
            skipped = f"  {skips:.0f} steps skipped" if (skips := float(metrics.get("skipped_steps", 0))) else ""
            loss = f"{float(metrics['train_loss']):.3f}" if "train_loss" in metrics else "not finite"
            with tqdm.external_write_mode(file=sys.stderr):
                print(
                    f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  loss {loss}{miou}  "
                    f"{float(metrics['images_per_second']):.1f} images/s "
                    f"(loader alone {float(metrics['loader_images_per_second']):.0f}){skipped}",
                    file=sys.stderr,
                    flush=True,
                )


class TimeBudget(Callback):
    """Ends training with a whole epoch, when another one like it would take longer than what is left of a budget.

    The epochs before an interruption count, too: their durations are part of the checkpoint. Place it after
    `Throughput`, which measures them.

    Args:
        hours: of all epochs together.
    """

    def __init__(self, hours: float) -> None:
        self._hours = hours
        self._seconds: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the epoch that ends; all processes of a distributed run decide alike."""
        self._seconds.append(float(trainer.callback_metrics["seconds"]))
        over = trainer.strategy.reduce_boolean_decision(is_used_up(self._seconds, self._hours), all=False)
        if over and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            trainer.should_stop = True
            if trainer.is_global_zero:
                with tqdm.external_write_mode(file=sys.stderr):
                    print(
                        f"Training ends here: another epoch would go beyond the budget of {self._hours:g} h.",
                        file=sys.stderr,
                        flush=True,
                    )

    def state_dict(self) -> dict[str, Any]:
        """Durations so far."""
        return {"seconds": list(self._seconds)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the checkpoint's last epoch."""
        self._seconds = list(state_dict["seconds"])


def is_used_up(seconds: Sequence[float], hours: float) -> bool:
    """Whether epochs of these durations leave no room for another one like the last."""
    return len(seconds) > 0 and sum(seconds) + seconds[-1] > 3600 * hours


class MovableCheckpoint(ModelCheckpoint):
    """Remembers the best score wherever the run folder is; Lightning's own forgets it when the folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over as if it had been written here."""
        here = str(self.dirpath)

        def moved(value: Any) -> Any:
            if isinstance(value, str) and value:
                return str(Path(here) / Path(value).name)
            if isinstance(value, dict):
                return {moved(path): score for path, score in value.items()}
            return value

        paths = ("best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
        super().load_state_dict({**state_dict, **{name: moved(state_dict[name]) for name in paths}, "dirpath": here})


class MilesialCheckpoints(Callback):
    """Writes a UNet as `checkpoint_epochN.pth` after every epoch, as milesial's train.py does."""

    def __init__(self, folder: Path, label_ids: tuple[int, ...]) -> None:
        self._folder = folder
        self._label_ids = label_ids

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the network as it is now."""
        if trainer.is_global_zero and isinstance(pl_module, SegmentationModule):
            path = self._folder / f"checkpoint_epoch{trainer.current_epoch + 1}.pth"
            averaging = next((callback for callback in trainer.callbacks if isinstance(callback, Averaging)), None)  # type: ignore[attr-defined]
            model = pl_module.model if averaging is None else averaging.averaged(pl_module)
            if isinstance(model, UNet):
                save_checkpoint(path, model, self._label_ids)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints appear whole or not at all; Lightning's own pass through the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the target, then rename."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), buffer.getvalue())
