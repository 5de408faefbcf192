"""The plain recipe, to compare with: what people run when they train milesial/Pytorch-UNet's `train.py` on panoramas.

RMSprop at 1e-5 with momentum 0.999, cross-entropy plus Dice over all classes, zero padding at the seam, no
augmentation, whole images that are decoded and scaled anew for every step by worker processes, validation five times an
epoch, a tenth of the learning rate when the validation Dice does not rise, and in the end the best of the epochs. From
the settings that https://github.com/milesial/Pytorch-UNet documents; the network is ours without wrapping, which
computes the same.
"""

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.image import scaled_size
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.dataset import Item

_ROUNDS = 5
"""Validations an epoch."""
_EPSILON = 1e-6


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Decodes and scales at every access."""

    def __init__(self, items: Sequence[Item], schema: LabelSchema, scale: float) -> None:
        self._items, self._schema, self._scale = items, schema, scale

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item = self._items[index]
        height, width = scaled_size(item.size_hw, self._scale)
        with Image.open(item.image) as picture, Image.open(item.mask) as mask:
            image = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
            label_map = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
        pixels = torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))
        return pixels, torch.from_numpy(self._schema.class_map(label_map).astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRun:
    """What came of it."""

    bundle: ModelBundle
    """The best epoch."""
    seconds: float
    epochs: int
    """Begun within the budget."""
    images: int
    """That it was trained on."""


def train_plain(
    training: Sequence[Item],
    validation: Sequence[Item],
    schema: LabelSchema,
    *,
    output: Path,
    scale: float,
    base_width: int,
    aspect: float,
    elevation: tuple[float, float],
    seed: int,
    budget: float,
    device: torch.device,
    epochs: int = 1_000_000,
) -> PlainRun:
    """Train until the budget (seconds) or the epochs are used up."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    classes = len(schema.classes)
    model = UNet(Architecture(classes=classes, base_width=base_width, wrap=False)).to(
        device, memory_format=torch.channels_last
    )
    workers = os.cpu_count() or 1
    batches = DataLoader(_Pairs(training, schema, scale), 1, shuffle=True, num_workers=workers)
    held_out = DataLoader(_Pairs(validation, schema, scale), 1, num_workers=workers)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999, foreach=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5)
    every = max(1, len(training) // _ROUNDS)
    best, best_score, steps, epoch = copy.deepcopy(model.state_dict()), -1.0, 0, 0
    while epoch < epochs and time.perf_counter() - began < budget:
        epoch += 1
        score = 0.0
        for images, masks in batches:
            target = masks.to(device)
            logits = model.train()(images.to(device, memory_format=torch.channels_last))
            loss = (
                F.cross_entropy(logits, target)
                + 1
                - _dice(logits.softmax(1), _planes(target, classes), over=(0, 1, 2, 3))
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            if steps % every == 0:
                score = _validate(model, held_out)
                schedule.step(score)
            if time.perf_counter() - began > budget:
                break
        if score > best_score:
            best, best_score = copy.deepcopy(model.state_dict()), score
    seconds = time.perf_counter() - began
    model.load_state_dict(best)
    manifest = Manifest(
        name="plain",
        version=1,
        architecture=model.architecture,
        labels=schema,
        label_ids=schema.class_ids,
        scale=scale,
        resample="bicubic",
        encoding="normals",
        aspect=aspect,
        elevation=elevation,
    )
    bundle = save_bundle(output, model.cpu().eval(), manifest, overwrite=True)
    return PlainRun(bundle=bundle, seconds=seconds, epochs=epoch, images=steps)


@torch.no_grad()
def _validate(model: UNet, batches: DataLoader[tuple[Tensor, Tensor]]) -> float:
    """Mean Dice of classes and images, the first class (the background) left out."""
    model.eval()
    scores = []
    device = next(model.parameters()).device
    for images, target in batches:
        logits = model(images.to(device, memory_format=torch.channels_last)).cpu()
        predicted, true = (_planes(indices, logits.shape[1])[:, 1:] for indices in (logits.argmax(1), target))
        scores.append(float(_dice(predicted, true, over=(2, 3))))
    return float(np.mean(scores)) if scores else 0.0


def _planes(indices: Tensor, classes: int) -> Tensor:
    """(N, h, w) class indices → (N, C, h, w) of 0 and 1."""
    return F.one_hot(indices, classes).permute(0, 3, 1, 2).float()


def _dice(probability: Tensor, true: Tensor, *, over: tuple[int, ...]) -> Tensor:
    """Mean of the Dice coefficients summed over some of the axes of (N, C, h, w)."""
    overlap, total = 2 * (probability * true).sum(over), probability.sum(over) + true.sum(over)
    total = torch.where(total == 0, overlap, total)
    return ((overlap + _EPSILON) / (total + _EPSILON)).mean()
