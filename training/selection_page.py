"""What was chosen to be labelled next, for people: pictures of where the model is unsure, and a page of them all."""

import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sscloud import __version__
from sscloud.files import atomic_write
from sscloud.image import decode_image
from training.page import jpeg_data_uri, render
from training.pictures import Typeface, legend, overlay, shrink_image, shrink_labels

if TYPE_CHECKING:
    from training.acquisition import Choice, Jury, Maps

WIDTH: Final = 1280
"""Of a picture, pixels."""
_MEANS: Final[Mapping[str, str]] = {
    "information": "How much the opinions about a place differ",
    "entropy": "How unsure the model is about a place",
}
_FULL = 0.995
"""Share of the pixels with a return that the scale of colours tells apart; the rest is as bright as it gets."""
_JPEG_QUALITY = 88
_INK, _PAPER = (28, 32, 40), (255, 255, 255)


def draw(choice: "Choice", jury: "Jury") -> bytes:
    """One sheet: the panorama with what is uncertain laid over it, the prediction, and legends.

    Args:
        choice: whose file is read once more.
        jury: by which it was chosen.

    Returns:
        A JPEG.

    Raises:
        ServerError: the server cannot be reached any more.
        ImageError: the file is not a picture any more.
    """
    image = decode_image(choice.frame.read())
    return sheet(image, jury.maps(image), jury, focus_xyxy=choice.focus_xyxy)


def sheet(image: NDArray[np.uint8], maps: "Maps", jury: "Jury", *, focus_xyxy: Sequence[float]) -> bytes:
    """`draw` of what is known already.

    Args:
        image: (H, W, 3) uint8 RGB.
        maps: of it.
        jury: labels and measure.
        focus_xyxy: the place to frame, pixels.
    """
    height, width = image.shape[:2]
    size_hw = max(1, round(height * WIDTH / width)), WIDTH
    small = shrink_image(image, size_hw)
    values: NDArray[np.float32] = getattr(maps, jury.measure)
    seen = values[maps.area > 0]
    top = max(float(np.quantile(seen, _FULL)) if seen.size else 0.0, 1e-6)
    picture = heat(small, np.where(maps.area > 0, values, np.float32(0)) / np.float32(top))
    left, upper, right, lower = (round(value * WIDTH / width) for value in focus_xyxy)
    cv2.rectangle(picture, (left, upper), (right, lower), (255, 255, 255), 2)
    ids = np.asarray(jury.schema.class_ids, np.uint8)
    predicted = ids[maps.mean.argmax(axis=0)]
    enlarged = cv2.resize(predicted, (size_hw[1], size_hw[0]), interpolation=cv2.INTER_NEAREST)
    labels = shrink_labels(np.asarray(enlarged, np.uint8), size_hw, jury.schema)
    parts = [
        _heading("Where to look"),  # the page has the file's name above it
        picture,
        _scale(_MEANS[jury.measure]),
        _heading(f"What {jury.bundles[0].manifest.title} takes it for"),
        overlay(small, labels, jury.schema),
        legend(jury.schema, prediction=predicted, width=WIDTH),
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(parts)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def heat(ground: NDArray[np.uint8], values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Lay values over the grey of a picture, in colours whose lightness grows evenly (viridis).

    Args:
        ground: (h, w, 3) uint8 RGB.
        values: (h', w'), 0 to 1; larger ones count as 1. The larger, the less of the ground shows through.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, width = ground.shape[:2]
    level = np.clip(cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR), 0, 1)
    colors = cv2.cvtColor(
        cv2.applyColorMap(np.rint(255 * level).astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB
    )
    grey = np.repeat(cv2.cvtColor(ground, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2).astype(np.float32) * 0.6
    share = (0.25 + 0.7 * level)[..., None]
    return np.rint(grey + share * (colors.astype(np.float32) - grey)).astype(np.uint8)


def _heading(text: str) -> NDArray[np.uint8]:
    size = WIDTH // 80
    face = Typeface(size, bold=True)
    paper = Image.new("RGB", (WIDTH, 2 * size), _PAPER)
    face.draw(ImageDraw.Draw(paper), (size, size // 2), face.clip(text, WIDTH - 2 * size), fill=_INK)
    return np.asarray(paper)


def _scale(text: str) -> NDArray[np.uint8]:
    """The colours with what they mean; their values differ from picture to picture, and say nothing to people."""
    size = WIDTH // 80
    face = Typeface(size)
    paper = Image.new("RGB", (WIDTH, 2 * size), _PAPER)
    pen = ImageDraw.Draw(paper)
    ramp = cv2.applyColorMap(np.linspace(0, 255, 256, dtype=np.uint8)[None], cv2.COLORMAP_VIRIDIS)
    strip = np.repeat(cv2.cvtColor(ramp, cv2.COLOR_BGR2RGB), size, axis=0)
    face.draw(pen, (size, size // 2), f"{text}:  not at all", fill=_INK)
    left = 2 * size + face.width(f"{text}:  not at all")
    paper.paste(Image.fromarray(strip), (left, size // 2))
    face.draw(pen, (left + 256 + size, size // 2), "most of all in this picture", fill=_INK)
    return np.asarray(paper)


def _percent(value: float, highest: float) -> str:
    """Of the highest in the list: what a value means by itself says nothing to people."""
    return f"{value / highest if highest > 0 else 0.0:.0%}"


def write_selection_page(
    path: Path,
    choices: "Sequence[Choice]",
    pictures: Mapping[str, bytes],
    *,
    facts: Mapping[str, str] | None = None,
    left_out: Sequence[str] = (),
) -> None:
    """Write what was chosen, and why, as a page for people, atomically.

    Args:
        path: the HTML file.
        choices: in the order of choice.
        pictures: JPEGs by place (`01`, `02`, …), as `rank` gave them.
        facts: what else is worth knowing: name → value.
        left_out: what was not looked at, a sentence each.
    """
    measured = [
        {"usefulness": choice.score * choice.novelty, "entropy": choice.entropy, "information": choice.information}
        for choice in choices
    ]
    highest = {name: max(values[name] for values in measured) for name in measured[0]} if measured else {}
    rows = [
        {
            "place": place,
            "title": choice.frame.title,
            "reason": choice.reason,
            **{name: _percent(value, highest[name]) for name, value in values.items()},
            "novelty": f"{choice.novelty:.0%}",
            "source": jpeg_data_uri(pictures[f"{place:02d}"]) if f"{place:02d}" in pictures else "",
        }
        for place, (choice, values) in enumerate(zip(choices, measured, strict=True), 1)
    ]
    text = render(
        "select.html.j2",
        report={"version": __version__, "created": datetime.now(UTC)},
        rows=rows,
        facts=dict(facts or {}),
        left_out=list(left_out),
    )
    atomic_write(path, text.encode("utf-8"))
