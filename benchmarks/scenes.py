"""Pictures and models to measure with, made on the spot: nothing is downloaded, nobody's data is needed.

The picture is a synthetic scan. The network has the size that people use (64 channels, 31 million parameters) and
weights that nobody trained: random convolutions, most of them blurring, batch norm calibrated on three scenes, and the
last convolution fitted to the scenes' labels by least squares. That takes seconds, and its class maps are like a
trained network's in what costs time: large connected regions with ragged edges, and some hundred small ones.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sscloud.architecture import Architecture
from sscloud.checkpoint import import_checkpoint, save_checkpoint
from sscloud.image import read_image, read_label_map, resize_image, resize_label_map
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.sample.generate import JPEG_QUALITY, MAX_WIDTH, generate

SCALE = 0.1

_SEED = 1
_FITTED_ON = (2, 3, 4)
"""Scenes that the network is fitted to; the picture that is measured with is scene 1."""
_DRAWN = 2048
"""Largest width that these are drawn at: it takes a sixteenth of the time of 8192, and they are scaled down anyway."""
_BALANCE = 0.4
"""By which power of its share a class weighs more in the fit of many classes; keeps the rare ones in the map."""
_RULE = 2
"""Counts changes of what is made here, so that a cache of older files is not taken for current."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A network in the two forms that are compared."""

    bundle: Path
    checkpoint: Path
    names: tuple[str, ...]
    """Of the labels, by class."""
    width: int
    """Of the panoramas it is fitted to."""


def picture(cache: Path, width: int) -> Path:
    """A JPEG of a normals panorama, width x width/2; wider than the scanner draws it is enlarged."""
    file = cache / f"panorama-{width}.jpg"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            generate(Path(folder) / "scene", count=1, seed=_SEED, width=min(width, MAX_WIDTH))
            drawn = Path(folder) / "scene" / "imgs" / "1_normals.jpg"
            if width > MAX_WIDTH:
                _enlarge(drawn, drawn, width)
            drawn.replace(file)
    return file


def _enlarge(source: Path, target: Path, width: int) -> None:
    enlarged = cv2.resize(read_image(source), (width, width // 2), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(enlarged).save(target, quality=JPEG_QUALITY, subsampling=0)


def models(cache: Path, classes: Sequence[int], width: int) -> dict[int, Model]:
    """Models with these numbers of classes, with the same convolutions, fitted at the size of a width at `SCALE`."""
    folders = {count: cache / f"model-{_RULE}-{count}-{width}" for count in classes}
    missing = [count for count, folder in folders.items() if not folder.exists()]
    if missing:
        network, features, labels = _calibrated(cache, width)
        for count in missing:
            _save(network, features, labels, count, folders[count])
    made = {}
    for count, folder in folders.items():
        schema = LabelSchema.from_dict(json.loads((folder / "labels.json").read_text()), source=str(folder))
        made[count] = Model(
            bundle=folder / "bundle",
            checkpoint=folder / "checkpoint.pth",
            names=tuple(label.name for label in schema.classes),
            width=width,
        )
    return made


def at_scale(model: Model, folder: Path, scale: float) -> Model:
    """The same network, made to see another scale."""
    schema = schema_of(len(model.names))
    import_checkpoint(model.checkpoint, folder / "bundle", labels=schema, scale=scale, name="benchmark")
    return dataclasses.replace(model, bundle=folder / "bundle")


def fitted_on(cache: Path, width: int) -> list[Path]:
    """The pictures that models were fitted on, at the width that these are made for; once there are models."""
    drawn = min(width, _DRAWN)
    folder = cache / f"scenes-{drawn}"
    if width > drawn and not (enlarged := folder / f"enlarged-{width}").exists():
        enlarged.mkdir()
        for file in (folder / "imgs").iterdir():
            _enlarge(file, enlarged / file.name, width)
    return sorted((folder / (f"enlarged-{width}" if width > drawn else "imgs")).iterdir())


def schema_of(classes: int) -> LabelSchema:
    """So many labels with ids from 0, the first of them background."""
    labels = [{"name": f"class {index}", "id": index, "background": index == 0} for index in range(classes)]
    # 255 is always void: a network of more classes than there are ids left does not exist.
    return LabelSchema.from_dict({"labels": labels}, source="the benchmark")


def divide(class_map: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """Make 6 classes more by dividing the last two, small things, into sectors of azimuth; make them fewer by joining.

    Args:
        class_map: (H, W) uint8, classes 0 to 5.
        classes: 2 to 255 wanted.
    """
    if classes <= 6:
        return np.minimum(class_map, np.uint8(classes - 1))
    parts = (classes - 4) // 2, classes - 4 - (classes - 4) // 2
    result = class_map.copy()
    position = np.arange(class_map.shape[1]) / class_map.shape[1]
    first = 4
    for kind, count in zip((4, 5), parts, strict=True):
        sector = np.broadcast_to((first + (position * count).astype(int)).astype(np.uint8), class_map.shape)
        result[class_map == kind] = sector[class_map == kind]
        first += count
    return result


def _calibrated(cache: Path, width: int) -> tuple[UNet, Tensor, NDArray[np.uint8]]:
    """A network without its last convolution, its (n, 65) float64 features of the scenes, and the classes there."""
    torch.manual_seed(_SEED)
    network = UNet(Architecture(classes=6, base_width=64, wrap=False))
    binomial = torch.tensor([1.0, 2.0, 1.0])
    blur = torch.outer(binomial, binomial) / torch.outer(binomial, binomial).norm()
    with torch.no_grad():
        for name, layer in network.named_modules():
            # The first level is left sharp: it draws the ragged edges.
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and not name.startswith("inc"):
                layer.weight.copy_(torch.randn(layer.weight.shape[:2])[..., None, None] * blur)
            elif isinstance(layer, torch.nn.ConvTranspose2d):
                layer.weight.copy_(torch.randn(layer.weight.shape[:2])[..., None, None].expand_as(layer.weight) * 0.03)
            elif isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # the mean over all pictures
    drawn = min(width, _DRAWN)
    scenes = cache / f"scenes-{drawn}"
    if not scenes.exists():
        generate(scenes, count=len(_FITTED_ON), first=_FITTED_ON[0], seed=_SEED, width=drawn)
    size_hw = int(SCALE * width // 2), int(SCALE * width)
    schema = LabelSchema.default()
    pictures, labels = [], []
    for number in _FITTED_ON:
        image = read_image(scenes / "imgs" / f"{number}_normals.jpg")
        small = resize_image(image, size_hw, resample="bicubic", encoding="normals")
        pictures.append(torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255)
        mask = read_label_map(scenes / "masks" / f"{number}_normals.png")
        labels.append(schema.class_map(resize_label_map(mask, size_hw)))
    features: list[Tensor] = []
    hook = network.outc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0][0]))
    with torch.no_grad():
        for training in (True, False):
            features.clear()
            network.train(training)
            for batch in pictures:
                network(batch)
    hook.remove()
    flat = torch.cat([part.flatten(1).T for part in features]).double()
    return network, torch.cat([flat, torch.ones(len(flat), 1)], dim=1), np.stack(labels)


def _save(network: UNet, features: Tensor, labels: NDArray[np.uint8], classes: int, folder: Path) -> None:
    wanted = torch.from_numpy(np.concatenate([divide(part, classes).ravel() for part in labels])).long()
    shares = torch.bincount(wanted, minlength=classes).double() / len(wanted)
    weighted = features * shares.clamp(min=1e-5)[wanted, None] ** -(_BALANCE if classes > 6 else 0)
    targets = torch.zeros(features.shape[1], classes, dtype=torch.float64).index_add_(1, wanted, weighted.T)
    ridge = 1e-6 * len(features) * torch.eye(features.shape[1])
    fitted = torch.linalg.solve(features.T @ weighted + ridge, targets)
    model = UNet(Architecture(classes=classes, base_width=64, wrap=False))
    # Least squares fits shares near 0 and 1; times 8, the softmax of them is as sure as a trained network's.
    head = {"outc.conv.weight": 8 * fitted[:-1].T[..., None, None], "outc.conv.bias": 8 * fitted[-1]}
    model.load_state_dict({**network.state_dict(), **head})
    schema = schema_of(classes)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        save_checkpoint(temporary / "checkpoint.pth", model, schema.class_ids)
        import_checkpoint(
            temporary / "checkpoint.pth", temporary / "bundle", labels=schema, scale=SCALE, name=f"benchmark-{classes}"
        )
        (temporary / "labels.json").write_text(json.dumps(schema.to_dict()))
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
