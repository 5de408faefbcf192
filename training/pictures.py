"""Pictures for people: overlays, differences and legends, drawn from arrays; nothing here reads or writes a file.

`figure` puts them on one sheet. It scales first and draws afterwards, so that an 8192x4096 panorama costs little more
than the arrays that hold it, while every share and every IoU in a legend is counted at full size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sscloud.errors import ConfigError, ImageError
from sscloud.labels import Label, LabelSchema

FONTS = Path(__file__).parent / "fonts"
MIN_WIDTH = 480
"""The narrowest sheet in pixels: a legend needs room for a name and three numbers."""
MAX_WIDTH = 8192
"""The widest sheet in pixels: no panel needs more, and a tall sheet still fits into a JPEG (65,500 pixels a side)."""

Picture = NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""
LabelMap = NDArray[np.uint8]
"""(H, W) uint8 label ids."""
Color = tuple[int, int, int]

_STRIP = 1 << 22  # pixels counted at a time: np.bincount widens its input to 8 bytes a pixel
_PAPER: Color = (255, 255, 255)
_INK: Color = (28, 32, 40)
_FAINT: Color = (112, 118, 130)
_RULE: Color = (222, 225, 230)
_ROW_PAPER: Color = (246, 247, 249)
_UNKNOWN: Color = (128, 128, 128)  # what LabelSchema.colorize paints for ids that it lacks


# --- text -------------------------------------------------------------------------------------------------------------

_RUSSIAN = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_IN_LATIN = "a b v g d e e zh z i y k l m n o p r s t u f kh ts ch sh shch ' y ' e yu ya"
_SIGNS = {"—": "-", "–": "-", "…": "...", "×": "x", "·": "-", "№": "No", "«": '"', "»": '"', "−": "-"}
_LATIN = dict(zip(_RUSSIAN, _IN_LATIN.split(), strict=True)) | _SIGNS


class Typeface:
    """A font of one size that draws any text.

    Characters that the font lacks are written in Latin letters if they are Russian, and as `?` otherwise. When the
    shipped font is missing, Pillow's own serves: it has no Cyrillic, so names are transliterated, never lost.
    """

    def __init__(self, size: int, *, bold: bool = False, folder: Path = FONTS) -> None:
        """
        Args:
            size: height of the font in pixels.
            bold: the bold cut.
            folder: where the font files are.
        """
        self.size = size
        self._font = _load_font(size, folder / ("DejaVuSans-Bold-subset.ttf" if bold else "DejaVuSans-subset.ttf"))
        self._missing = self._glyph("\U0010fffe")  # a code point that no font may use: draws the missing-glyph box
        self._spelling: dict[str, str] = {}

    def spell(self, text: str) -> str:
        """`text` with every character the font lacks replaced."""
        for character in set(text) - self._spelling.keys():
            self._spelling[character] = self._spell(character)
        return "".join(self._spelling[character] for character in text)

    def width(self, text: str) -> int:
        """Width of the text in pixels."""
        return int(np.ceil(self._font.getlength(self.spell(text))))

    def clip(self, text: str, width: int) -> str:
        """`text`, cut with an ellipsis to at most `width` pixels."""
        if self.width(text) <= width:
            return text
        kept = text[:256]  # no sheet has room for more; it bounds the work on a hostile name
        while kept and self.width(kept + "…") > width:
            kept = kept[:-1]
        return kept.rstrip() + "…"

    def draw(self, canvas: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, *, fill: Color = _INK) -> None:
        """Write one line whose box, `size` high, starts at `xy`."""
        canvas.text(xy, self.spell(text), font=self._font, fill=fill)

    def _spell(self, character: str) -> str:
        if character.isspace() or not character.isprintable():
            return " "
        if self._draws(character):
            return character
        latin = _LATIN.get(character.lower(), "?")
        return latin.capitalize() if character.isupper() else latin

    def _draws(self, character: str) -> bool:
        glyph = self._glyph(character)
        return glyph is not None and glyph != self._missing

    def _glyph(self, character: str) -> tuple[tuple[int, int], bytes] | None:
        try:
            mask = self._font.getmask(character)
        except UnicodeEncodeError:  # Pillow's bitmap font knows Latin-1 only
            return None
        return mask.size, bytes(mask)


@cache
def _load_font(size: int, path: Path) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        # Basic layout: the same pixels whether or not Pillow was built with Raqm.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ImportError):
        try:
            return ImageFont.load_default(size)
        except (OSError, ImportError):  # a Pillow without FreeType
            return ImageFont.load_default()


# --- numbers of a legend ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendRow:
    """One label of a legend."""

    label_id: int
    name: str
    """The label's name, or what the id is if the schema has no label for it."""
    color: Color
    truth_share: float | None
    """Share of all pixels, 0 to 1; None without a truth."""
    prediction_share: float | None
    iou: float | None
    """Intersection over union where the truth is labelled; None without both maps, or if both lack the label."""


def legend_rows(
    schema: LabelSchema, *, truth: LabelMap | None = None, prediction: LabelMap | None = None
) -> list[LegendRow]:
    """Count the labels of one or two (H, W) uint8 label maps.

    Returns:
        A row for each label that one of the maps holds (for every label, if no map is given), in the schema's order,
        then rows for void and for ids that the schema lacks.

    Raises:
        ImageError: the maps differ in size.
    """
    if truth is not None and prediction is not None:
        _check_sizes(truth, prediction)
        table = _confusion(truth, prediction)
        truth_counts, prediction_counts = table.sum(axis=1), table.sum(axis=0)
    else:
        table = None
        truth_counts = _counts(truth) if truth is not None else None
        prediction_counts = _counts(prediction) if prediction is not None else None
    counted = [counts for counts in (truth_counts, prediction_counts) if counts is not None]
    known = [label.id for label in schema.labels]
    present = {int(i) for counts in counted for i in np.flatnonzero(counts)} if counted else set(known)
    ids = [i for i in known if i in present] + sorted(present - set(known), key=lambda i: (i not in schema.void_ids, i))
    rows = []
    for label_id in ids:
        label = schema.by_id(label_id)
        rows.append(
            LegendRow(
                label_id=label_id,
                name=_name(schema, label_id, label),
                color=label.color if label else _UNKNOWN,
                truth_share=_share(truth_counts, label_id),
                prediction_share=_share(prediction_counts, label_id),
                iou=None if table is None or label_id in schema.void_ids else _iou(table, label_id, schema),
            )
        )
    return rows


def _name(schema: LabelSchema, label_id: int, label: Label | None) -> str:
    if label is not None:
        return label.name
    return "not labelled" if label_id in schema.void_ids else f"id {label_id} (no such label)"


def _share(counts: NDArray[np.int64] | None, label_id: int) -> float | None:
    return None if counts is None else float(counts[label_id] / max(counts.sum(), 1))


def _iou(table: NDArray[np.int64], label_id: int, schema: LabelSchema) -> float | None:
    labelled = np.ones(256, bool)
    labelled[list(schema.void_ids)] = False
    hit = table[label_id, label_id]
    union = table[label_id].sum() + table[labelled, label_id].sum() - hit
    return float(hit / union) if union else None


def _strips(*maps: LabelMap) -> Iterator[tuple[LabelMap, ...]]:
    rows = max(1, _STRIP // max(1, maps[0].shape[1]))
    for top in range(0, maps[0].shape[0], rows):
        yield tuple(a[top : top + rows] for a in maps)


def _counts(label_map: LabelMap) -> NDArray[np.int64]:
    """(256,) pixels by label id."""
    total = np.zeros(256, np.int64)
    for (strip,) in _strips(label_map):
        total += np.bincount(strip.ravel(), minlength=256)
    return total


def _confusion(truth: LabelMap, prediction: LabelMap) -> NDArray[np.int64]:
    """(256, 256) pixels by label id of the truth (rows) and of the prediction (columns)."""
    total = np.zeros(256 * 256, np.int64)
    for a, b in _strips(truth, prediction):
        total += np.bincount((a.astype(np.uint16) << 8 | b).ravel(), minlength=256 * 256)
    return total.reshape(256, 256)


# --- overlays and differences -----------------------------------------------------------------------------------------


def overlay(image: Picture, label_map: LabelMap, schema: LabelSchema, *, alpha: float = 0.5) -> Picture:
    """Lay the labels' colours over the grey of an image; the rim of every region is opaque.

    Grey, because the colours of a normals panorama would turn those of the labels into others.

    Args:
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) uint8 label ids. Void shows the bare grey, ids that the schema lacks are mid-grey.
        alpha: opacity of the colours, 0 to 1; at 1 they are exact.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: image and label map differ in size.
        ConfigError: `alpha` is outside 0 to 1.
    """
    _check_sizes(image, label_map)
    _check_alpha(alpha)
    colors = schema.colorize(label_map)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    painted = cast(Picture, cv2.addWeighted(grey, 1 - alpha, colors, alpha, 0))
    rim = _rim(label_map, thickness=max(1, round(image.shape[1] / 2048)))
    painted[rim] = colors[rim]
    void = np.isin(label_map, list(schema.void_ids))
    painted[void] = grey[void]
    return painted


def _rim(label_map: LabelMap, *, thickness: int) -> NDArray[np.bool_]:
    """(H, W) bool: pixels that touch another label, `thickness` pixels deep."""
    rim = np.zeros(label_map.shape, np.uint8)
    across = label_map[:, 1:] != label_map[:, :-1]
    rim[:, 1:] |= across
    rim[:, :-1] |= across
    down = label_map[1:] != label_map[:-1]
    rim[1:] |= down
    rim[:-1] |= down
    if thickness > 1:
        rim = cast(LabelMap, cv2.dilate(rim, np.ones((3, 3), np.uint8), iterations=thickness - 1))
    return rim.astype(bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceKind:
    """One way in which a prediction can be wrong, named by what a person has to do about it."""

    code: int
    """The value in `difference_codes`."""
    name: str
    color: Color


# Colours of Okabe and Ito's palette, told apart by colour-blind people too.
EXTRA = DifferenceKind(code=1, name="extra: delete", color=(230, 85, 13))
MISSED = DifferenceKind(code=2, name="missed: draw", color=(86, 180, 233))
CONFUSED = DifferenceKind(code=3, name="wrong label: change", color=(240, 228, 66))
NOT_COMPARED = DifferenceKind(code=4, name="not labelled: not compared", color=(128, 132, 140))
DIFFERENCES = (EXTRA, MISSED, CONFUSED, NOT_COMPARED)
"""All kinds, in the order of their codes; code 0 is agreement."""


def difference_codes(truth: LabelMap, prediction: LabelMap, schema: LabelSchema) -> NDArray[np.uint8]:
    """Say for every pixel what is wrong with the prediction.

    Background and void of the prediction both mean that nothing was drawn.

    Args:
        truth: (H, W) uint8 label ids.
        prediction: (H, W) uint8 label ids.
        schema: says which ids are background and void.

    Returns:
        (H, W) uint8: 0 agree, 1 `EXTRA` (nothing there, something predicted), 2 `MISSED` (something there, nothing
        predicted), 3 `CONFUSED` (two labels), 4 `NOT_COMPARED` (the truth is void).

    Raises:
        ImageError: the maps differ in size.
    """
    _check_sizes(truth, prediction)
    nothing = np.zeros(256, bool)
    nothing[list(schema.void_ids)] = True
    if schema.background is not None:
        nothing[schema.background.id] = True
    codes = np.empty((256, 256), np.uint8)
    codes[:] = CONFUSED.code
    codes[nothing] = EXTRA.code
    codes[:, nothing] = MISSED.code
    codes[np.ix_(nothing, nothing)] = 0
    np.fill_diagonal(codes, 0)
    codes[list(schema.void_ids)] = NOT_COMPARED.code
    result: NDArray[np.uint8] = codes[truth, prediction]
    return result


def difference(truth: LabelMap, prediction: LabelMap, schema: LabelSchema, *, ground: Picture | None = None) -> Picture:
    """Show where a prediction is wrong: in the colours of `DIFFERENCES`, on a dark and grey picture of the rest.

    Args:
        truth: (H, W) uint8 label ids.
        prediction: (H, W) uint8 label ids.
        schema: their labels.
        ground: (h, w, 3) uint8 picture that is shown where the two agree, and whose size the result has: a pixel that
            stands for several of the maps' is tinted by the share of them that is wrong. By default the truth's own
            colours at full size.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ImageError: the maps differ in size.
    """
    codes = difference_codes(truth, prediction, schema)
    if ground is None:
        ground = schema.colorize(truth)
    height, width = ground.shape[:2]
    grey = cv2.cvtColor(ground, cv2.COLOR_RGB2GRAY)
    # Between 16 and 86: dark enough to let the colours speak, light enough to show where one is.
    picture = np.repeat((16 + grey * np.float32(70 / 255))[..., None], 3, axis=2)
    for kind in DIFFERENCES:
        found = (codes == kind.code).astype(np.uint8)
        if not found.any():
            continue
        found *= 255
        if found.shape != (height, width):
            found = cast(LabelMap, cv2.resize(found, (width, height), interpolation=_interpolation(found, width)))
        share = (found * np.float32(1 / 255))[..., None]
        picture += share * (np.asarray(kind.color, np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


# --- scaling ----------------------------------------------------------------------------------------------------------


def shrink_image(image: Picture, size_hw: tuple[int, int]) -> Picture:
    """Scale a picture for looking at: by averaging when it shrinks, by repeating pixels when it grows."""
    height, width = size_hw
    if image.shape[:2] == (height, width):
        return image
    return cast(Picture, cv2.resize(image, (width, height), interpolation=_interpolation(image, width)))


def shrink_labels(
    label_map: LabelMap, size_hw: tuple[int, int], schema: LabelSchema, *, counts: NDArray[np.int64] | None = None
) -> LabelMap:
    """Scale a label map for looking at, so that poles and wires stay whole.

    A pixel of the result shows the rarest label that covers at least 1 / (2f) of it, f being the factor of shrinking,
    and the label that covers most of it if there is none. A line one pixel wide covers at least that much of one pixel
    in each row that it crosses, wherever it lies; a lone pixel covers 1 / f² only and does not grow. Background and
    void never win over a label. For looking only: counts are taken at full size.

    Args:
        label_map: (H, W) uint8 label ids.
        size_hw: the size of the result.
        schema: says which ids are background and void.
        counts: (256,) pixels by label id that tell what is rare; those of this map by default. Maps that are compared
            need the same.

    Returns:
        (h, w) uint8 label ids.
    """
    height, width = size_hw
    if label_map.shape == (height, width):
        return label_map
    factor = max(label_map.shape[0] / height, label_map.shape[1] / width)
    if factor <= 1:
        return cast(LabelMap, cv2.resize(label_map, (width, height), interpolation=cv2.INTER_NEAREST))
    if counts is None:
        counts = _counts(label_map)
    background = -1 if schema.background is None else schema.background.id
    order = sorted(
        np.flatnonzero(_counts(label_map)).tolist(),
        key=lambda i: (i not in schema.void_ids, i != background, -counts[i]),
    )
    enough = 255 / (2 * factor)
    result = np.zeros((height, width), np.uint8)
    best = np.zeros((height, width), np.uint8)
    for label_id in order:
        where = (label_map == label_id).astype(np.uint8)
        where *= 255
        cover = cv2.resize(where, (width, height), interpolation=cv2.INTER_AREA)
        wins = (cover > best) | (cover >= enough)
        # Whoever covers enough can only be ousted by a rarer one that does too.
        best[wins] = np.where(cover >= enough, 255, cover)[wins]
        result[wins] = label_id
    return result


def _interpolation(source: NDArray[np.uint8], width: int) -> int:
    return cv2.INTER_AREA if width < source.shape[1] else cv2.INTER_NEAREST


# --- legends and sheets -----------------------------------------------------------------------------------------------


def legend(
    schema: LabelSchema, *, truth: LabelMap | None = None, prediction: LabelMap | None = None, width: int = 1024
) -> Picture:
    """Draw a legend: colour, name and share of the area of each label; with both maps also the IoU.

    Args:
        schema: the labels.
        truth: (H, W) uint8 label ids of the mask, if there is one.
        prediction: (H, W) uint8 label ids of the prediction, if there is one.
        width: width of the result in pixels.

    Returns:
        (h, width, 3) uint8 RGB.

    Raises:
        ImageError: the maps differ in size.
        ConfigError: `width` is outside `MIN_WIDTH` to `MAX_WIDTH`.
    """
    _check_width(width)
    rows = legend_rows(schema, truth=truth, prediction=prediction)
    heads: list[str] = []
    if truth is not None:
        heads.append("mask")
    if prediction is not None:
        heads.append("prediction")
    if len(heads) == 2:
        heads.append("IoU")
    cells = [_cells(row, heads) for row in rows]
    size = _font_size(width)
    normal, bold = Typeface(size), Typeface(size, bold=True)
    pad, line = size, round(size * 1.7)
    column = max([bold.width(text) for text in heads] + [normal.width("100.00 %")]) + pad
    swatch = round(size * 1.2)
    left = 2 * pad + swatch
    widest = max([normal.width(row.name) for row in rows] + [bold.width("share of the area")])
    # Numbers stand beside the names, not at the far end of a wide sheet.
    names = min(widest + pad, width - left - pad - column * len(heads))
    sheet = Image.new("RGB", (width, line * (len(rows) + bool(heads)) + pad), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = pad // 2
    if heads:
        bold.draw(draw, (pad, top), bold.clip("share of the area", left + names - 2 * pad), fill=_FAINT)
        _numbers(draw, bold, heads, left + names, top, column, _FAINT)
        top += line
    for index, (row, texts) in enumerate(zip(rows, cells, strict=True)):
        if index % 2 == 0:
            draw.rectangle((0, top - size // 4, width - 1, top - size // 4 + line - 1), fill=_ROW_PAPER)
        draw.rectangle((pad, top, pad + swatch - 1, top + swatch - 1), fill=row.color, outline=_FAINT)
        normal.draw(draw, (left, top), normal.clip(row.name, names - pad // 2))
        _numbers(draw, normal, texts, left + names, top, column, _INK)
        top += line
    return np.asarray(sheet)


def _cells(row: LegendRow, heads: Sequence[str]) -> list[str]:
    values = {
        "mask": percent(row.truth_share),
        "prediction": percent(row.prediction_share),
        "IoU": "—" if row.iou is None else f"{row.iou:.3f}",
    }
    return [values[head] for head in heads]


def percent(share: float | None) -> str:
    """A share of 0 to 1 as people read it: `12.3 %`, small ones with more digits, absent ones as a dash."""
    if share is None or not share > 0:
        return "—"
    if share < 0.0001:
        return "< 0.01 %"
    return f"{100 * share:.2f} %" if share < 0.01 else f"{100 * share:.1f} %"


def _numbers(
    draw: ImageDraw.ImageDraw, face: Typeface, texts: Sequence[str], left: int, top: int, column: int, fill: Color
) -> None:
    for position, text in enumerate(texts, 1):
        face.draw(draw, (left + column * position - face.width(text), top), text, fill=fill)


def figure(
    image: Picture,
    schema: LabelSchema,
    *,
    truth: LabelMap | None = None,
    prediction: LabelMap | None = None,
    title: str = "",
    width: int = 2048,
    alpha: float = 0.5,
) -> Picture:
    """Draw one sheet: the image, the mask and the prediction over it, their differences, and a legend.

    Args:
        image: (H, W, 3) uint8 RGB.
        schema: the labels.
        truth: (H, W) uint8 label ids of the mask, if there is one.
        prediction: (H, W) uint8 label ids of the prediction, if there is one.
        title: what the image is called.
        width: the widest that the sheet may be, in pixels; smaller images make smaller sheets.
        alpha: opacity of the colours, 0 to 1.

    Returns:
        (h, w, 3) uint8 RGB with w <= width.

    Raises:
        ImageError: image and maps differ in size.
        ConfigError: `width` is outside `MIN_WIDTH` to `MAX_WIDTH`, or `alpha` is outside 0 to 1.
    """
    check_settings(width=width, alpha=alpha)
    maps = [a for a in (truth, prediction) if a is not None]
    for given in maps:
        _check_sizes(image, given)
    sheet_width, size_hw = _layout(image, width)
    small = shrink_image(image, size_hw)
    counts = np.sum([_counts(a) for a in maps], axis=0) if maps else None
    size = _font_size(sheet_width)
    height, full_width = image.shape[:2]
    parts = [_heading(f"{title}  {full_width}×{height}".strip(), sheet_width, size), _widen(small, sheet_width)]
    for name, label_map in (("Mask", truth), ("Prediction", prediction)):
        if label_map is not None:
            labels = shrink_labels(label_map, size_hw, schema, counts=counts)
            painted = overlay(small, labels, schema, alpha=alpha)
            parts += [_heading(name, sheet_width, size), _widen(painted, sheet_width)]
    if truth is not None and prediction is not None:
        parts += [
            _heading("Differences", sheet_width, size, kinds=DIFFERENCES),
            _widen(difference(truth, prediction, schema, ground=small), sheet_width),
        ]
    parts.append(legend(schema, truth=truth, prediction=prediction, width=sheet_width))
    return np.concatenate(parts)


def _layout(image: Picture, width: int) -> tuple[int, tuple[int, int]]:
    """Width of the sheet, and (h, w) of a panel on it."""
    height, full_width = image.shape[:2]
    sheet_width = min(width, max(full_width, 1024))
    factor = min(sheet_width / full_width, 1.5 * sheet_width / height)  # tall crops must not make endless sheets
    if factor > 1:
        factor = int(factor)  # whole pixels, so that small maps show theirs as squares
    return sheet_width, (max(1, round(height * factor)), max(1, round(full_width * factor)))


def _font_size(width: int) -> int:
    return min(26, max(11, width // 72))


def _heading(text: str, width: int, size: int, *, kinds: Sequence[DifferenceKind] = ()) -> Picture:
    """A line of bold text, with a swatch and a name for each kind of difference; wraps when they do not fit."""
    bold, normal = Typeface(size, bold=True), Typeface(size)
    line = round(size * 1.7)
    spots: list[tuple[int, int, DifferenceKind]] = []
    left, row = 2 * size + bold.width(text), 0
    for kind in kinds:
        need = round(1.6 * size) + normal.width(kind.name)
        if left + need > width and left > size:
            left, row = size, row + 1
        spots.append((left, row, kind))
        left += need + size
    sheet = Image.new("RGB", (width, line * (row + 1) + size // 2), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.line((0, 0, width, 0), fill=_RULE)
    top = round(size * 0.55)
    bold.draw(draw, (size, top), bold.clip(text, width - 2 * size))
    for left, row, kind in spots:
        y = top + row * line
        draw.rectangle((left, y + size // 8, left + size, y + size // 8 + size), fill=kind.color, outline=_FAINT)
        normal.draw(draw, (left + round(1.6 * size), y), normal.clip(kind.name, width - left - round(1.6 * size)))
    return np.asarray(sheet)


def _widen(panel: Picture, width: int) -> Picture:
    missing = width - panel.shape[1]
    if missing <= 0:
        return panel
    return np.pad(panel, ((0, 0), (0, missing), (0, 0)), constant_values=_ROW_PAPER[0])


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_sizes(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> None:
    (h, w), (other_h, other_w) = first.shape[:2], second.shape[:2]
    if (h, w) != (other_h, other_w):
        raise ImageError(
            f"Sizes differ: {w}x{h} and {other_w}x{other_h} pixels. An image, its mask and its prediction must have "
            "the same size; check that they belong together."
        )


def check_settings(*, width: int, alpha: float) -> None:
    """Check what `figure` is asked for, before the work starts.

    Raises:
        ConfigError: `width` is outside `MIN_WIDTH` to `MAX_WIDTH`, or `alpha` is outside 0 to 1.
    """
    _check_width(width)
    _check_alpha(alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"The opacity is {alpha}; it must be from 0 (no colours) to 1 (colours only).")


def _check_width(width: int) -> None:
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise ConfigError(f"The width is {width} pixels; a sheet with a legend takes {MIN_WIDTH} to {MAX_WIDTH}.")
