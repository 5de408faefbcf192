"""What people serve instead, written again: milesial's predict path with CVAT's usual mask functions.

The network and the steps of a prediction are those of https://github.com/milesial/Pytorch-UNet (`predict.py`,
`utils/data_loading.py`, `unet/`): the whole picture is decoded, resized by Pillow's bicubic filter, divided by 255 in
double precision, run through the network as it was trained (float32, batch norm as layers of its own), all logits are
interpolated to the picture's size, and the largest is taken. The answer is made as the functions are that CVAT ships
(`serverless/`, their `to_cvat_mask`): one crop a class as a Python list, and `json.dumps`.

`Original` is the real thing from a checkout, to see that this one does the same.
"""

import base64
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sscloud.stages import Stages


class ReferenceUNet(nn.Module):
    """The network of milesial/Pytorch-UNet (transposed up-sampling), by its parameter names.

    Args:
        classes: output channels.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inc = _double(3, 64)
        for level, width in enumerate((64, 128, 256, 512), start=1):
            down = nn.Module()
            down.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _double(width, 2 * width))
            setattr(self, f"down{level}", down)
        for level, width in enumerate((1024, 512, 256, 128), start=1):
            up = nn.Module()
            up.up = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
            up.conv = _double(width, width // 2)
            setattr(self, f"up{level}", up)
        self.outc = nn.Module()
        self.outc.conv = nn.Conv2d(64, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) float32 → logits (N, classes, H, W)."""
        parts: Any = dict(self.named_children())
        skips = [parts["inc"].double_conv(x)]
        for level in range(1, 5):
            pool, double = parts[f"down{level}"].maxpool_conv
            skips.append(double.double_conv(pool(skips[-1])))
        x = skips[-1]
        for level in range(1, 5):
            up = parts[f"up{level}"]
            skip = skips[-1 - level]  # as in the original, every level's output lives until the end
            x = up.up(x)
            missing_y, missing_x = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2])
            x = up.conv.double_conv(torch.cat([skip, x], dim=1))
        logits: Tensor = parts["outc"].conv(x)
        return logits


def _double(inputs: int, outputs: int) -> nn.Module:
    block = nn.Module()
    block.double_conv = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
    return block


class Reference:
    """The path written again, ready for pictures.

    Args:
        checkpoint: a `.pth` with `mask_values`.
        scale: of the network's input.
        device: a torch device.
    """

    def __init__(self, checkpoint: Path, *, scale: float, device: str) -> None:
        state = torch.load(checkpoint, map_location=device)
        self._scale = scale
        self._device = device
        self._network = ReferenceUNet(len(state.pop("mask_values"))).to(device)
        self._network.load_state_dict(state)
        self._network.eval()

    def logits(self, image: Image.Image, stages: Stages) -> Tensor:
        """(1, C, h, w) float32 on the CPU."""
        with stages("resize"):
            size = int(self._scale * image.width), int(self._scale * image.height)
            pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255.0
            batch = torch.from_numpy(pixels)[None].to(device=self._device, dtype=torch.float32)
        with stages("forward"), torch.no_grad():
            logits: Tensor = self._network(batch).cpu()
        return logits

    def predict(self, image: Image.Image, stages: Stages) -> NDArray[np.int64]:
        """(H, W) int64 class of each pixel."""
        logits = self.logits(image, stages)
        with stages("upsample"):
            return interpolate(logits, (image.height, image.width))


def interpolate(logits: Tensor, size_hw: tuple[int, int]) -> NDArray[np.int64]:
    """(1, C, h, w) logits → (H, W) int64 class of each pixel, as milesial's predict does it."""
    logits = F.interpolate(logits, size_hw, mode="bilinear")
    best: NDArray[np.int64] = logits.argmax(dim=1)[0].long().squeeze().numpy()
    return best


class Original:
    """The real thing, from a checkout of milesial/Pytorch-UNet; all that it does with a picture counts as `forward`.

    Args:
        checkout: a work tree.
        checkpoint: a `.pth` with `mask_values`.
        scale: of the network's input.
        device: a torch device.
    """

    def __init__(self, checkout: Path, checkpoint: Path, *, scale: float, device: str) -> None:
        sys.path.insert(0, str(checkout))
        for name in ("torchvision", "matplotlib"):
            # Imported by predict.py, and not used for a prediction.
            if importlib.util.find_spec(name) is None:
                module: Any = types.ModuleType(name)
                module.transforms = None
                sys.modules[name] = module
                sys.modules[f"{name}.pyplot"] = types.ModuleType(f"{name}.pyplot")
        self._original: Any = importlib.import_module("predict")
        state = torch.load(checkpoint, map_location=device)
        self._scale = scale
        self._device = torch.device(device)
        classes = len(state.pop("mask_values"))
        self._network = self._original.UNet(n_channels=3, n_classes=classes, bilinear=False).to(self._device)
        self._network.load_state_dict(state)

    def predict(self, image: Image.Image, stages: Stages) -> NDArray[np.int64]:
        """(H, W) int64 class of each pixel."""
        with stages("forward"):
            best: NDArray[np.int64] = self._original.predict_img(self._network, image, self._device, self._scale)
        return best


def work_tree(checkout: Path, folder: Path) -> Path:
    """A checkout's work tree; of a bare repository, its newest commit is unpacked into `folder`."""
    if (checkout / "predict.py").is_file():
        return checkout.resolve()
    archive = subprocess.run(["git", "-C", str(checkout), "archive", "HEAD"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def answer(
    fields: Mapping[str, Any],
    *,
    predict: Callable[[Image.Image, Stages], NDArray[np.int64]],
    names: Mapping[int, str],
    stages: Stages,
) -> str:
    """A request's fields → the answer's JSON, as CVAT's functions make it.

    Args:
        fields: the parsed request.
        predict: of `Reference` or `Original`.
        names: class → the label's name; classes without one are background.
        stages: takes the times, under the names that the function gives its own stages.
    """
    with stages("parse"):
        data = base64.b64decode(fields["image"])
    with stages("decode"):
        image = Image.open(io.BytesIO(data)).convert("RGB")
    classes = predict(image, stages)
    with stages("regions"):
        items = []
        for index, name in names.items():
            mask = classes == index
            if mask.any():
                items.append(_item(mask, name))
    with stages("answer"):
        return json.dumps(items)


def _item(mask: NDArray[np.bool_], name: str) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])
    flat = mask[top : bottom + 1, left : right + 1].astype(np.uint8).ravel().tolist()
    flat.extend([left, top, right, bottom])
    return {"confidence": "1.0", "label": name, "type": "mask", "mask": flat}


def cvat_runs(answer: bytes) -> tuple[int, int]:
    """What CVAT does with an answer: parse it, and turn every mask's pixels into run lengths.

    CVAT's lambda manager makes an array of the list of pixels and takes datumaro's `mask_to_rle` of it: differences of
    the column, where they are not zero, and the lengths in between, beginning with the zeros.

    Returns:
        the sum of the crops' areas in pixels, and the run lengths in all.
    """
    pixels = runs = 0
    for item in json.loads(answer.decode()):
        if item["type"] != "mask":
            continue
        box = item["mask"][-4:]
        column = np.array(item["mask"][:-4])[:, np.newaxis].ravel(order="F")
        changes = np.flatnonzero(np.diff(column, prepend=1 - column[0], append=1 - column[-1]))
        if column[0] != 0:
            changes = np.r_[0, changes]
        counts = np.diff(changes).tolist()
        counts.extend(box)
        item["points"] = counts
        pixels += len(column)
        runs += len(counts) - 4
    return pixels, runs
