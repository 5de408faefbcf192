"""sscloud visualize: overlays with a legend, for people to look at."""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing them for real would slow down `sscloud --help`
    from numpy.typing import NDArray

    from sscloud.inference import Predictor
    from sscloud.labels import LabelSchema

NAME = "visualize"
HELP = "draw predictions and masks over panoramas, with a legend"
DESCRIPTION = """\
Draw, for each image, one sheet with the image, the mask and the prediction over it (whichever are given), their
differences, and a legend with names, colours, shares of the area and, with both, the IoU of each label.

Masks and predictions are single-channel 8-bit pictures of label ids, as `sscloud predict` and `sscloud convert` write
them. In a folder they are found by the name of the image without its extension. Sheets are written as NAME_overlay.jpg.
"""
EXAMPLES = """\
  # what a model said of a test set
  sscloud visualize data/test/imgs --prediction data/test/predictions -o overlays
  # what people drew
  sscloud visualize data/imgs --mask data/masks -o overlays
  # both, with the differences
  sscloud visualize data/test/imgs --prediction data/test/predictions --mask data/test/masks -o overlays
  # one panorama, predicted on the spot
  sscloud visualize 12_normals.jpg --bundle runs/street/bundle -o overlays
"""

_MASKS = (".png", ".tif", ".tiff", ".bmp")
_NAMED = 10  # how many files a message names before it only counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image, or folder of images")
    parser.add_argument("--prediction", type=Path, metavar="PATH", help="predicted label ids: folder, or one file")
    parser.add_argument("--mask", type=Path, metavar="PATH", help="label ids that people drew: folder, or one file")
    parser.add_argument("--bundle", type=Path, metavar="BUNDLE", help="predict with this bundle, without --prediction")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="YAML",
        help="label schema (default: the bundle's; else labels.yaml beside the images or one folder up; else the "
        "built-in one)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the sheets go")
    parser.add_argument("--width", type=int, default=2048, metavar="PIXELS", help="widest sheet (default: 2048 pixels)")
    parser.add_argument(
        "--alpha", type=float, default=0.5, metavar="0-1", help="opacity of the colours, 0 to 1 (default: 0.5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace sheets that exist")


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    visualize(
        args.images,
        output=args.output,
        prediction=args.prediction,
        mask=args.mask,
        bundle=args.bundle,
        labels=args.labels,
        width=args.width,
        alpha=args.alpha,
        overwrite=args.overwrite,
    )
    return 0


def visualize(
    images: Sequence[Path],
    *,
    output: Path,
    prediction: Path | None = None,
    mask: Path | None = None,
    bundle: Path | None = None,
    labels: Path | None = None,
    width: int = 2048,
    alpha: float = 0.5,
    overwrite: bool = False,
) -> list[Path]:
    """Draw a sheet for each image and print the files written.

    Everything that can be known beforehand (files, sizes) is checked before the first sheet is drawn.

    Args:
        images: images, and folders of images.
        output: folder for the sheets.
        prediction: folder of predicted label maps, or the one that belongs to the one image.
        mask: the same for the masks that people drew.
        bundle: predicts in place of `prediction`.
        labels: YAML file of the labels; by default the bundle's, then `labels.yaml` beside the images or one folder up
            (where data sets keep it), then the built-in one.
        width: widest sheet in pixels.
        alpha: opacity of the colours, 0 to 1.
        overwrite: replace sheets that exist.

    Returns:
        The files written, in the order of the images.

    Raises:
        ConfigError: paths or settings do not fit together.
        ImageError: a file cannot be read, or the sizes of an image and its maps differ.
        SchemaError: the label schema is wrong.
        BundleError: the bundle cannot be used.
    """
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from sscloud.errors import ConfigError
    from sscloud.files import atomic_write
    from sscloud.image import read_image, read_label_map
    from tools.inputs import list_images
    from training.pictures import check_settings, figure

    if prediction is not None and bundle is not None:
        raise ConfigError("Both --prediction and --bundle were given. Keep the one to look at.")
    if prediction is None and mask is None and bundle is None:
        raise ConfigError("There is nothing to draw: give --prediction, --mask or --bundle.")
    check_settings(width=width, alpha=alpha)
    paths = list_images(images)
    truths = _find_maps(paths, mask, option="--mask")
    predictions = _find_maps(paths, prediction, option="--prediction")
    sheets = _name_sheets(paths, output, overwrite=overwrite)
    _check_sizes(paths, truths)
    _check_sizes(paths, predictions)
    predictor = _predictor(bundle)
    schema = _schema(labels, predictor, paths)
    unknown: Counter[int] = Counter()
    for index, path in enumerate(tqdm(paths, desc="sheets", unit="image", disable=None)):
        image = read_image(path)
        truth = read_label_map(truths[index]) if truths else None
        predicted: NDArray[np.uint8] | None = None
        if predictor is not None:
            predicted = predictor.predict_file(path).label_map  # names the file if it is too small
        elif predictions:
            predicted = read_label_map(predictions[index])
        for label_map in (truth, predicted):
            if label_map is not None:
                unknown.update({i: int(np.count_nonzero(label_map == i)) for i in schema.unknown_ids(label_map)})
        sheet = figure(image, schema, truth=truth, prediction=predicted, title=path.name, width=width, alpha=alpha)
        buffer = io.BytesIO()
        # No chroma subsampling: it would smear the colours of thin poles and of the text.
        Image.fromarray(sheet).save(buffer, "JPEG", quality=92, subsampling=0)
        atomic_write(sheets[index], buffer.getvalue())
    for sheet_path in sheets:
        print(sheet_path)
    if unknown:
        listed = ", ".join(f"{i} ({count} pixels)" for i, count in sorted(unknown.items()))
        print(
            f"warning: ids without a label, drawn grey: {listed}. Name the right schema with --labels, or extend it.",
            file=sys.stderr,
        )
    return sheets


def _find_maps(images: Sequence[Path], place: Path | None, *, option: str) -> list[Path]:
    """The label map of each image, or an empty list if none are wanted."""
    from sscloud.errors import ConfigError

    if place is None:
        return []
    if place.is_file():
        if len(images) > 1:
            raise ConfigError(f"{option} {place} is one file, but there are {len(images)} images. Give a folder.")
        return [place]
    if not place.is_dir():
        raise ConfigError(f"{option}: there is no file or folder {place}. Check the path.")
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(place.iterdir()):
        if path.suffix.lower() in _MASKS and path.is_file():
            by_stem.setdefault(path.stem, []).append(path)
    if missing := [image.name for image in images if image.stem not in by_stem]:
        raise ConfigError(
            f"{option}: {len(missing)} of {len(images)} images have no file of the same name in {place} "
            f"({', '.join(_MASKS)}): {_listed(missing)}. Add them, or name the images one by one."
        )
    if double := [stem for stem in {image.stem for image in images} if len(by_stem[stem]) > 1]:
        raise ConfigError(f"{option}: {place} holds several files named {_listed(sorted(double))}. Keep one of each.")
    return [by_stem[image.stem][0] for image in images]


def _name_sheets(images: Sequence[Path], output: Path, *, overwrite: bool) -> list[Path]:
    from sscloud.errors import ConfigError

    if output.exists() and not output.is_dir():
        raise ConfigError(f"The output {output} is a file. Name a folder.")
    stems = Counter(path.stem for path in images)
    if double := sorted(stem for stem, count in stems.items() if count > 1):
        raise ConfigError(f"Several images are named {_listed(double)}. Draw them into different folders.")
    sheets = [output / f"{path.stem}_overlay.jpg" for path in images]
    existing = [path.name for path in sheets if path.exists()]
    if existing and not overwrite:
        raise ConfigError(
            f"{output} holds {_listed(existing)} already. Name another folder, or add --overwrite to replace them."
        )
    return sheets


def _check_sizes(images: Sequence[Path], maps: Sequence[Path]) -> None:
    from sscloud.errors import ImageError
    from sscloud.image import image_size

    wrong = []
    for image, label_map in zip(images, maps, strict=bool(maps)):
        (height, width), (map_height, map_width) = image_size(image), image_size(label_map)
        if (height, width) != (map_height, map_width):
            wrong.append(f"{image} is {width}x{height} but {label_map} is {map_width}x{map_height}")
    if wrong:
        raise ImageError(f"Sizes differ: {_listed(wrong)}. Check that the files belong together.")


def _predictor(bundle: Path | None) -> "Predictor | None":
    if bundle is None:
        return None
    from sscloud.bundle import ModelBundle
    from sscloud.inference import Predictor

    return Predictor(ModelBundle.load(bundle))


def _schema(labels: Path | None, predictor: "Predictor | None", images: Sequence[Path]) -> "LabelSchema":
    from sscloud.labels import LabelSchema

    if labels is not None:
        return LabelSchema.from_yaml(labels)
    if predictor is not None:
        return predictor.bundle.manifest.labels
    folder = images[0].absolute().parent
    for place in (folder / "labels.yaml", folder.parent / "labels.yaml"):
        if place.is_file():
            print(f"labels: {place}", file=sys.stderr)
            return LabelSchema.from_yaml(place)
    return LabelSchema.default()


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
