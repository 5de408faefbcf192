"""The LightningModule: network, loss, optimiser, and the scores of an epoch."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sscloud.errors import TrainingError
from sscloud.forward import is_out_of_memory
from sscloud.frame import Azimuth
from sscloud.networks import Network
from sscloud.tiles import MAX_BYTES, pixels_within, plan_blended, plan_tiles, run_blended, run_in_tiles
from sscloud.unet import UNet
from training.augment import Augment, to_view_frame
from training.batch import Batch
from training.calibration import TemperatureGrid
from training.latitude import row_weights
from training.losses import Loss
from training.metrics import confusion_matrix, score

_WARM_UP = 0.05
"""Share of the steps in which the learning rate rises from zero."""

_CLIP = 1.0
"""Largest norm of the gradients, as in milesial's train.py."""

_MOST_SKIPPED = 20
"""Steps in a row without a finite gradient after which training has diverged. Mixed precision in float16 begins with a
loss scale of 2^16 and halves it at every overflow: up to 16 are nothing."""

_ADVICE = "Try a tenth of the --learning-rate, or leave out --amp. The checkpoints of the earlier epochs are whole."

_BAND_PIXELS = 1 << 22
"""That are scored at once in validation."""

log = logging.getLogger(__name__)


class SegmentationModule(pl.LightningModule):
    """Trains a network; validates with one confusion matrix over all panoramas of all processes.

    Logs at every epoch `train_loss`, `val_loss`, `miou`, `iou_<label id>` at model scale, the `temperature` that
    calibrates the validated weights, and `skipped_steps`: those without a finite gradient, which change nothing.

    A step that runs out of memory is tried again in smaller parts, and at last with activations computed twice.

    Args:
        model: the network.
        loss: of the training and the validation.
        augment: of the training; None for none.
        view: the azimuth convention by which normals are turned into the view frame; None to leave them as they are.
        elevation: of the panoramas' top and bottom edge, degrees.
        latitude_weights: weigh pixels by the solid angle they cover.
        label_ids: label ids of the classes, in the order of the targets' class indices.
        channel_ids: the label id that each channel writes; surplus channels count as what they write.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        steps: optimiser steps of the whole training.
        accumulate: parts of a batch whose gradients are added up.
        tile_bytes: memory for the activations of a panorama that is validated; larger ones are cut into tiles.
    """

    def __init__(
        self,
        model: Network,
        *,
        loss: Loss,
        augment: Augment | None,
        view: Azimuth | None,
        elevation: tuple[float, float],
        latitude_weights: bool,
        label_ids: tuple[int, ...],
        channel_ids: tuple[int, ...],
        learning_rate: float,
        weight_decay: float,
        steps: int,
        accumulate: int = 1,
        tile_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stubs lack the form
        self.model = model
        self.loss = loss
        self._augment, self._view = augment, view
        self._elevation, self._latitude_weights = elevation, latitude_weights
        self._label_ids = label_ids
        self._learning_rate, self._weight_decay, self._steps = learning_rate, weight_decay, steps
        self._parts = accumulate
        self._tile_bytes = tile_bytes
        self._skipped = self._skipped_in_a_row = 0
        self._restore: list[Tensor] = []
        classes = len(label_ids)
        # A channel may write an id that is no class here (void): the last column, always wrong.
        index_of = {label_id: index for index, label_id in enumerate(label_ids)}
        self._class_of = np.array([index_of.get(label_id, classes) for label_id in channel_ids], np.uint8)
        # No buffers: averaging of the weights exchanges those before the epoch's scores are read.
        self._confusion = np.zeros((classes, classes + 1), np.int64)
        self._losses = np.zeros(2)  # sum and count
        self._temperatures = TemperatureGrid()

    # --- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, _index: int) -> None:
        """One step of the optimiser."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        self._restore = [statistic.clone() for statistic in self._statistics()]
        loss = self._gradients(batch)
        optimizer.step()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]
        self.log("skipped_steps", float(self._skipped), on_step=False, on_epoch=True, reduce_fx="max")
        # Not to the loggers by step: each row would be a commit of the tracking store.
        self.log("train_loss_step", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        # In every process, with no weight where it is no number: they are summed over all of them.
        counted = len(batch.images) if math.isfinite(loss) else 0
        value = loss if counted else 0.0
        self.log("train_loss", value, on_step=False, on_epoch=True, batch_size=counted, sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients; where they are not finite, let the step change nothing.

        Gradients are the same in all processes, so all of them skip the same steps.
        """
        norm = float(nn.utils.clip_grad_norm_(self.parameters(), _CLIP))
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
            return
        optimizer.zero_grad()
        for statistic, before in zip(self._statistics(), self._restore, strict=True):
            statistic.copy_(before)
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise TrainingError(
                f"{_MOST_SKIPPED} steps in a row had no finite loss or gradient, the last one in epoch "
                f"{self.current_epoch + 1}: training diverged. {_ADVICE}"
            )

    def on_train_epoch_end(self) -> None:
        """Keep no checkpoint of a network that holds numbers that are none.

        Raises:
            TrainingError: it does.
        """
        if not all(torch.isfinite(tensor).all() for tensor in self.model.state_dict().values()):
            raise TrainingError(f"Training diverged in epoch {self.current_epoch + 1}. {_ADVICE}")

    def on_train_epoch_start(self) -> None:
        """Count skipped steps anew."""
        self._skipped = 0

    def _gradients(self, batch: Batch) -> float:
        """Add up the gradients of a batch; its loss."""
        while True:
            try:
                return self._backward(batch)
            except (RuntimeError, MemoryError) as error:
                # Other processes wait for this one's gradients: it cannot begin again.
                if not is_out_of_memory(error) or self.trainer.world_size > 1 or not self._back_off(len(batch.images)):
                    raise
            # Outside the handler, which keeps the failed step's tensors alive.
            for statistic, before in zip(self._statistics(), self._restore, strict=True):
                statistic.copy_(before)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, batch: Batch) -> float:
        self.zero_grad()
        total = 0.0
        size = len(batch.images)
        for part in batch.parts(-(-size // self._parts)):
            share = len(part.images) / size
            seen = self._seen(part, augment=self._augment)
            logits = self._logits(seen.images, wrap=seen.has_seam)
            loss = self.loss(logits, seen.class_maps, self._row_weights(seen)) * share
            self.manual_backward(loss)
            total += float(loss.detach())
        return total

    def _back_off(self, size: int) -> bool:
        """Need less memory from now on; False when nothing is left to be given up."""
        # Layers of other networks see one value an image, and learn from two at least.
        most = size if isinstance(self.model, UNet) else size // 2
        if self._parts < most:
            self._parts = min(most, 2 * self._parts)
            log.warning("Out of memory: going on with batches in %d parts.", self._parts)
        elif isinstance(self.model, UNet) and not self.model.checkpointing:
            self.model.checkpointing = True
            log.warning("Out of memory: going on with activations computed twice (--checkpointing).")
        else:
            return False
        return True

    # --- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch."""
        self._confusion[:] = 0
        self._losses[:] = 0
        self._temperatures = TemperatureGrid(self.device)

    def validation_step(self, batch: Batch, _index: int) -> None:
        """Count pixels of one panorama."""
        batch = self._seen(batch, augment=None)
        logits = self._whole_logits(batch.images, wrap=batch.has_seam)
        weights = self._row_weights(batch)
        height, width = batch.whole_hw
        classes = len(self._label_ids)
        rows = max(1, _BAND_PIXELS // width)
        for top in range(0, height, rows):  # whole panoramas at full detail have gigabytes of probabilities
            band = slice(top, top + rows)
            part = logits[:, :, band].to(self.device)
            target = batch.class_maps[:, band]
            share = target.shape[1] / height
            self._losses[0] += share * float(self.loss(part, target, None if weights is None else weights[:, band]))
            predicted = self._class_of[part.argmax(1).cpu().numpy()]
            truth = target.cpu().numpy()
            self._confusion += confusion_matrix(truth[0], predicted[0], classes + 1)[:classes]
            self._temperatures.update(part, target)
        self._losses[1] += 1

    def on_validation_epoch_end(self) -> None:
        """Sum over the processes and log the scores."""
        scores = score(self._summed(self._confusion), self._label_ids)
        total, count = self._summed(self._losses).tolist()
        grid = self._temperatures
        likelihoods, pixels = self._summed(grid.sums.cpu().numpy()), self._summed(grid.count.cpu().numpy())
        self.log("val_loss", total / max(count, 1))
        self.log("miou", 0.0 if math.isnan(scores.miou) else scores.miou, prog_bar=True)
        self.log("temperature", grid.best(torch.from_numpy(likelihoods), float(pixels)))
        for label_id, iou in zip(scores.label_ids, scores.iou.tolist(), strict=True):
            self.log(f"iou_{label_id}", iou)

    # --- both ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and a cosine to zero, by step."""
        optimizer = torch.optim.AdamW(self.parameters(), self._learning_rate, weight_decay=self._weight_decay)
        warm_up = max(1, round(self._steps * _WARM_UP))

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, self._steps - warm_up))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def _seen(self, batch: Batch, *, augment: Augment | None) -> Batch:
        """A batch as it was loaded → as the network sees it."""
        batch = batch._replace(images=batch.images.float() / 255)
        if augment is not None:
            batch = augment(batch)
        if self._view is None:
            return batch
        return batch._replace(images=to_view_frame(batch.images, batch.origins, batch.whole_hw, self._view))

    def _logits(self, images: Tensor, *, wrap: bool) -> Tensor:
        logits: Tensor = self.model(images.to(memory_format=torch.channels_last), wrap=wrap)
        return logits

    def _whole_logits(self, images: Tensor, *, wrap: bool) -> Tensor:
        """Logits of one panorama, in tiles where it is large, as the function computes it; those come on the host."""
        size_hw = images.shape[2], images.shape[3]
        architecture = self.model.architecture
        most = pixels_within(self._tile_bytes, base_width=architecture.base_width, value_bytes=4)
        if size_hw[0] * size_hw[1] <= most:
            return self._logits(images, wrap=wrap)

        def compute(part: NDArray[np.uint8], /, *, wrap: bool) -> NDArray[np.float32]:
            pixels = torch.from_numpy(np.ascontiguousarray(part)).to(self.device).permute(2, 0, 1)[None]
            found: NDArray[np.float32] = self._logits(pixels.float() / 255, wrap=wrap)[0].float().cpu().numpy()
            return found

        image = (images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        around = wrap and architecture.wrap
        if architecture.is_local:
            tiles = plan_tiles(size_hw, max_pixels=most, wrap=around)
            return torch.from_numpy(run_in_tiles(image, tiles, compute, wrap=around))[None]
        tiles = plan_blended(size_hw, max_pixels=most, wrap=around)
        return torch.from_numpy(run_blended(image, tiles, compute, wrap=around))[None]

    def _row_weights(self, batch: Batch) -> Tensor | None:
        """(N, h) solid angle of a pixel in each row of each image."""
        if not self._latitude_weights:
            return None
        weights = torch.from_numpy(row_weights(batch.whole_hw[0], self._elevation)).float().to(batch.images.device)
        rows = torch.arange(batch.images.shape[2], device=weights.device)
        return weights[batch.origins[:, :1].long() + rows]

    def _statistics(self) -> list[Tensor]:
        """What batch normalisation remembers of the batches."""
        return list(self.model.buffers())

    def _summed(self, counts: NDArray[Any]) -> NDArray[Any]:
        """Sum over the processes."""
        on_device = torch.from_numpy(counts).to(self.device)
        summed: Tensor = self.trainer.strategy.reduce(on_device, reduce_op="sum")
        total: NDArray[Any] = summed.cpu().numpy()
        return total
