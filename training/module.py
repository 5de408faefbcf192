"""The LightningModule: network, loss, optimiser, and the scores of an epoch."""

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from sscloud.errors import TrainingError
from sscloud.unet import UNet
from training.losses import segmentation_loss
from training.metrics import confusion_matrix, score

_WARM_UP = 0.05
"""Share of the steps in which the learning rate rises from zero."""


class SegmentationModule(pl.LightningModule):
    """Trains a `UNet`; validates with one confusion matrix over all panoramas of all processes.

    Logs `train_loss` an epoch, `val_loss`, `miou` and `iou_<label id>` at model scale.

    Args:
        model: the network; `model.architecture.wrap` decides about the seam.
        weights: (classes,) of the cross-entropy.
        label_ids: label ids of the classes, in the order of the targets' class indices.
        channel_ids: the label id that each channel writes; surplus channels count as what they write.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        steps: optimiser steps of the whole training.
    """

    def __init__(
        self,
        model: UNet,
        *,
        weights: Tensor,
        label_ids: tuple[int, ...],
        channel_ids: tuple[int, ...],
        learning_rate: float,
        weight_decay: float,
        steps: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("weights", weights, persistent=False)
        self.weights: Tensor
        self._label_ids = label_ids
        self._learning_rate, self._weight_decay, self._steps = learning_rate, weight_decay, steps
        classes = len(label_ids)
        # A channel may write an id that is no class here (void): the last column, always wrong.
        index_of = {label_id: index for index, label_id in enumerate(label_ids)}
        self._class_of = np.array([index_of.get(label_id, classes) for label_id in channel_ids], np.uint8)
        self.register_buffer("_confusion", torch.zeros(classes, classes + 1, dtype=torch.int64), persistent=False)
        self.register_buffer("_losses", torch.zeros(2, dtype=torch.float64), persistent=False)  # sum and count
        self._confusion: Tensor
        self._losses: Tensor

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Loss of one batch."""
        images, target = batch
        loss = segmentation_loss(self._logits(images), target, self.weights)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss.item()} in epoch {self.current_epoch + 1}: training diverged. Try a tenth of "
                "the --learning-rate, or leave out --amp. The checkpoints of the earlier epochs are whole."
            )
        # Not to the loggers by step: each row would be a commit of the tracking store.
        self.log("train_loss_step", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch."""
        self._confusion.zero_()
        self._losses.zero_()

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        """Count pixels of one panorama."""
        images, target = batch
        logits = self._logits(images)
        loss = segmentation_loss(logits, target, self.weights)
        self._losses += torch.stack([loss.double(), torch.ones_like(loss.double())])
        truth = target.to(torch.uint8).cpu().numpy()
        predicted = self._class_of[logits.argmax(1).cpu().numpy()]
        classes = len(self._label_ids)
        confusion = confusion_matrix(truth[0], predicted[0], classes + 1)[:classes]
        self._confusion += torch.from_numpy(confusion).to(self.device)

    def on_validation_epoch_end(self) -> None:
        """Sum over the processes and log the scores."""
        confusion = self.trainer.strategy.reduce(self._confusion, reduce_op="sum")
        losses = self.trainer.strategy.reduce(self._losses, reduce_op="sum")
        scores = score(confusion.cpu().numpy(), self._label_ids)
        total, count = losses.tolist()
        self.log("val_loss", total / max(count, 1))
        self.log("miou", 0.0 if math.isnan(scores.miou) else scores.miou, prog_bar=True)
        for label_id, iou in zip(scores.label_ids, scores.iou.tolist(), strict=True):
            self.log(f"iou_{label_id}", iou)

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

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.to(memory_format=torch.channels_last))
        return logits
