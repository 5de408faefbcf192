"""Regions → the function's answer, and back.

The answer is JSON as CVAT takes it from a Nuclio function: a list of objects with `label`, `type`, and

- for a mask: `mask`, the 0/1 pixels of its box row by row and the box's inclusive corners; and `points`, the outline,
  which CVAT takes instead when people ask for polygons;
- for a polygon: `points`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sscloud.regions import Region

ATTRIBUTES = ("model", "confidence")
"""Text attributes that every region carries. CVAT keeps those that the function's spec and the task's label declare."""

_ZERO = np.uint16(ord("0") | ord(",") << 8)
"""`0,` as it lies in memory; a pixel that is set is one more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One object of an answer."""

    region: Region
    label: str
    """Label name."""
    points: str
    """Outline as JSON without its brackets: `x,y,x,y`, …; empty: a mask without one."""
    as_polygon: bool
    """A polygon; otherwise a mask with its outline."""


def answer_json(drawings: Sequence[Drawing], *, model: str) -> str:
    """The answer's text, ASCII.

    Written into one buffer: an answer has tens of millions of mask pixels, each of which `json.dumps` would need a
    Python integer for.

    Args:
        drawings: in the order they are sent.
        model: name and version of the model, put into the attributes.
    """
    heads, tails = [], []
    position = 1
    for drawing in drawings:
        head, tail = _around_mask(drawing, model=model)
        # The pixels are written two bytes at a time, which is quick at even places only.
        head += b" " * ((position + len(head)) % 2) if not drawing.as_polygon else b""
        heads.append(head)
        tails.append(tail + b",")
        position += len(head) + len(tails[-1]) + (0 if drawing.as_polygon else 2 * _pixels(drawing.region))
    buffer = np.empty(max(position, 2), np.uint8)
    buffer[0], buffer[-1] = ord("["), ord("]")
    position = 1
    for drawing, head, tail in zip(drawings, heads, tails, strict=True):
        buffer[position : position + len(head)] = np.frombuffer(head, np.uint8)
        position += len(head)
        if not drawing.as_polygon:
            size = 2 * _pixels(drawing.region)
            write_digits(drawing.region, buffer[position : position + size].view(np.uint16))
            position += size
        end = min(position + len(tail), len(buffer) - 1)  # "]" takes the last comma's place
        buffer[position:end] = np.frombuffer(tail, np.uint8)[: end - position]
        position += len(tail)
    return str(buffer.data, "ascii")


def write_digits(region: Region, out: NDArray[np.uint16]) -> None:
    """Write the pixels of a region's box as the digits of CVAT's mask, `0,1,1,`.

    Args:
        region: the region.
        out: one 16-bit unit for every pixel of the box: a digit and a comma.
    """
    begin, end = region.crop_runs()
    out[:] = 0
    out[0] = _ZERO
    out[begin] += 1
    end = end[end < len(out)]
    out[end] -= 1
    np.add.accumulate(out, out=out)


def _around_mask(drawing: Drawing, *, model: str) -> tuple[bytes, bytes]:
    """What stands before and behind the digits; of a polygon all of it."""
    left, top, right, bottom = drawing.region.box_xyxy
    confidence = f"{drawing.region.confidence:.2f}"
    attributes = [{"name": name, "value": value} for name, value in zip(ATTRIBUTES, (model, confidence), strict=True)]
    label, values = json.dumps(drawing.label), json.dumps(attributes, separators=(",", ":"))
    kind = "polygon" if drawing.as_polygon else "mask"
    head = f'{{"label":{label},"type":"{kind}",'
    outline = f'"points":[{drawing.points}],' if drawing.points else ""
    tail = f'{outline}"confidence":"{confidence}","attributes":{values}}}'
    if drawing.as_polygon:
        return (head + tail).encode("ascii"), b""
    return (head + '"mask":[').encode("ascii"), f"{left},{top},{right - 1},{bottom - 1}],{tail}".encode("ascii")


def _pixels(region: Region) -> int:
    height, width = region.crop_hw
    return height * width


def paint_answer(
    items: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
    *,
    label_id_of: Callable[[str], int],
    fill: int,
) -> NDArray[np.uint8]:
    """Turn the function's answer back into a label map, later items over earlier ones, as CVAT draws them.

    Args:
        items: the parsed answer.
        size_hw: size of the image that was sent.
        label_id_of: label name → label id.
        fill: label id of pixels that no item covers.

    Returns:
        (H, W) uint8 label ids.

    Raises:
        ValueError: no mask, a crop whose pixels do not fill its box, or a box outside the image.
    """
    label_map = np.full(size_hw, fill, np.uint8)
    for item in items:
        if item["type"] != "mask":
            raise ValueError(f"Only masks are painted, found a {item['type']}.")
        *pixels, left, top, right, bottom = item["mask"]
        height, width = bottom - top + 1, right - left + 1
        inside = 0 <= left <= right < size_hw[1] and 0 <= top <= bottom < size_hw[0]
        if not inside or len(pixels) != height * width:
            raise ValueError(
                f"A mask of {len(pixels)} pixels with the box x {left}-{right}, y {top}-{bottom} does not fit an image "
                f"of {size_hw[1]}x{size_hw[0]} pixels."
            )
        crop = np.array(pixels, np.uint8).reshape(height, width).astype(bool)
        label_map[top : bottom + 1, left : right + 1][crop] = label_id_of(item["label"])
    return label_map
