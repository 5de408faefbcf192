"""Painting the shapes of a large panorama: time and memory of ours and of the libraries' own decoders, interleaved.

    python -m benchmarks.rasterising [--shapes 300] [--rounds 3]

Both ways must paint the same pixels. Prints each way's median time, its peak memory beside the label map, and how many
times less ours needs.
"""

import argparse
import statistics
import time
import tracemalloc
from typing import Any

import numpy as np
from cvat_sdk.masks import decode_mask, encode_mask
from numpy.typing import NDArray
from pycocotools import mask as coco

from training.annotations import painting
from training.rasterise import rasterise

SIZE_HW = (4096, 8192)


def make_shapes(count: int) -> list[dict[str, Any]]:
    """Shapes as CVAT lists them: two ellipses as masks to each one as a polygon, a tenth of them very wide."""
    rng = np.random.default_rng(0)
    height, width = SIZE_HW
    shapes = []
    for number in range(count):
        radius_x = 3000 if number % 10 == 0 else int(rng.integers(40, 900))
        radius_y = max(20, radius_x // 3)
        centre = rng.integers((radius_x // 2, radius_y), (width - radius_x // 2, height - radius_y))
        angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
        corners = centre + np.stack([radius_x * np.cos(angle), radius_y * np.sin(angle)], axis=1)
        corners = corners.clip(0, (width, height)).round(2)
        points = corners.ravel().tolist()
        if number % 3:
            left, top = corners.min(axis=0).astype(int)
            right, bottom = corners.max(axis=0).astype(int)
            y, x = np.mgrid[top:bottom, left:right]
            crop = ((x - centre[0]) / radius_x) ** 2 + ((y - centre[1]) / radius_y) ** 2 < 1
            *runs, x1, y1, x2, y2 = encode_mask(crop)
            points = [*runs, x1 + left, y1 + top, x2 + left, y2 + top]
        kind = "mask" if number % 3 else "polygon"
        shapes.append({"type": kind, "label_id": 1 + number % 5, "points": [float(p) for p in points]})
    return shapes


def ours(shapes: list[dict[str, Any]]) -> NDArray[np.uint8]:
    """`training.annotations` and `training.rasterise`."""
    names = {number: str(number) for number in range(1, 6)}
    found = painting(shapes, label_names=names, size_hw=SIZE_HW)
    return rasterise(found.shapes, size_hw=SIZE_HW, label_id_of=int, fill=0).label_map


def libraries(shapes: list[dict[str, Any]]) -> NDArray[np.uint8]:
    """cvat_sdk.masks and pycocotools, which fill a whole image for every shape."""
    height, width = SIZE_HW
    label_map = np.zeros(SIZE_HW, np.uint8)
    for shape in shapes:
        if shape["type"] == "mask":
            filled = decode_mask(shape["points"], image_width=width, image_height=height)
        else:
            exported = np.array(shape["points"]).astype(np.float32).astype(np.float64)
            filled = np.asarray(coco.decode(coco.frPyObjects([exported], height, width)[0])).astype(bool)
        label_map[filled] = shape["label_id"]
    return label_map


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=300, help="shapes of the panorama (default: 300)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of every way (default: 3)")
    args = parser.parse_args()
    shapes = make_shapes(args.shapes)
    ways = (libraries, ours)
    if not np.array_equal(*(way(shapes) for way in ways)):
        raise SystemExit("The two ways paint different pixels.")
    times: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            started = time.perf_counter()
            way(shapes)
            times[way.__name__].append(time.perf_counter() - started)
    peaks = {}
    for way in ways:
        tracemalloc.start()
        way(shapes)
        peaks[way.__name__] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    first = statistics.median(times["libraries"])
    for name, values in times.items():
        ratios = f"{first / statistics.median(values):5.1f}x   {peaks['libraries'] / peaks[name]:4.1f}x"
        print(f"{name:10} {statistics.median(values):6.2f} s   {peaks[name]:6.0f} MB   {ratios}")


if __name__ == "__main__":
    main()
