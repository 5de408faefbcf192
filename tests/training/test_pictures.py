"""Overlays, differences and legends: exact colours, ASCII goldens, Cyrillic, and sizes."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.errors import ConfigError, ImageError
from sscloud.labels import LabelSchema
from training import pictures
from training.pictures import (
    DIFFERENCES,
    FONTS,
    MAX_WIDTH,
    MIN_WIDTH,
    Typeface,
    difference,
    difference_codes,
    figure,
    legend,
    legend_rows,
    overlay,
    percent,
    shrink_labels,
)

NAMES = ("Фон", "Земля", "Растительность", "Здание", "Конструкции", "Обстановка")
IDS = {".": 0, "g": 2, "t": 5, "b": 6, "p": 65, "c": 66, "v": 255, "?": 17}


@pytest.fixture
def schema() -> LabelSchema:
    return LabelSchema.default()


def drawn(text: str) -> NDArray[np.uint8]:
    """ASCII art → label ids."""
    return np.array([[IDS[c] for c in line] for line in text.split()], np.uint8)


def codes_as_text(codes: NDArray[np.uint8]) -> list[str]:
    return ["".join("=EMCv"[c] for c in row) for row in codes]


def ink(face: Typeface, character: str) -> bytes:
    return bytes(face._font.getmask(character))


class TestTypeface:
    def test_every_letter_of_the_labels_has_a_glyph_of_its_own(self) -> None:
        for bold in (False, True):
            face = Typeface(24, bold=bold)
            missing = ink(face, "\U0010fffe")
            for character in set("".join(NAMES)) | set("ёЁщЪыЭюЯіїєґ0123456789—…×→№«»%·"):
                assert face.spell(character) == character
                assert ink(face, character) not in (missing, b""), character

    def test_a_missing_font_transliterates(self, tmp_path: Path) -> None:
        face = Typeface(20, folder=tmp_path / "nowhere")
        assert face.spell("Обстановка") == "Obstanovka"
        assert face.spell("Щит № 5") == "Shchit No 5"
        assert face.width("Обстановка") > 0

    def test_a_broken_font_file_is_as_good_as_none(self, tmp_path: Path) -> None:
        (tmp_path / "DejaVuSans-subset.ttf").write_bytes(b"no font")
        assert Typeface(20, folder=tmp_path).spell("Здание") == "Zdanie"

    def test_a_legend_without_any_font_is_drawn(
        self, schema: LabelSchema, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with_font = legend(schema, width=600)
        monkeypatch.setattr(pictures.Typeface.__init__, "__kwdefaults__", {"bold": False, "folder": tmp_path})
        without = legend(schema, width=600)
        assert without.shape == with_font.shape
        assert (without != with_font).any()

    @pytest.mark.parametrize("text", ["漢字", "\U0001f600", "\x00\n\t", "\u202eabc", "a" * 5000, ""])
    def test_any_text_is_spelled_and_clipped(self, text: str) -> None:
        face = Typeface(16)
        clipped = face.clip(text, 100)
        assert face.width(clipped) <= 100
        assert "\n" not in face.spell(text)

    def test_fonts_ship_with_their_licence(self) -> None:
        assert "Bitstream" in (FONTS / "LICENSE.txt").read_text(encoding="utf-8")


class TestOverlay:
    def test_colors_are_exact_when_opaque(self, schema: LabelSchema) -> None:
        label_map = drawn("..ggtt bbppcc ??ggtt")
        image = np.random.default_rng(0).integers(0, 256, (*label_map.shape, 3), np.uint8)
        assert np.array_equal(overlay(image, label_map, schema, alpha=1), schema.colorize(label_map))

    def test_half_opaque_is_the_mean_inside_and_opaque_on_the_rim(self, schema: LabelSchema) -> None:
        label_map = np.full((8, 16), 2, np.uint8)
        label_map[:, 8:] = 6
        image = np.full((8, 16, 3), 100, np.uint8)
        painted = overlay(image, label_map, schema, alpha=0.5)
        ground, house = (np.array(schema.by_id(i).color) for i in (2, 6))  # type: ignore[union-attr]
        assert np.abs(painted[0, 0].astype(int) - (100 + ground) / 2).max() <= 0.5
        assert np.array_equal(painted[3, 7], ground)
        assert np.array_equal(painted[3, 8], house)

    def test_void_shows_the_bare_grey(self, schema: LabelSchema) -> None:
        label_map = drawn("vvgg vvgg")
        image = np.full((2, 4, 3), 77, np.uint8)
        assert (overlay(image, label_map, schema, alpha=1)[:, :2] == 77).all()

    def test_sizes_must_match(self, schema: LabelSchema) -> None:
        with pytest.raises(ImageError, match="8x4 and 4x4 pixels"):
            overlay(np.zeros((4, 8, 3), np.uint8), np.zeros((4, 4), np.uint8), schema)

    @pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
    def test_alpha_is_checked(self, schema: LabelSchema, alpha: float) -> None:
        with pytest.raises(ConfigError, match="from 0"):
            overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), schema, alpha=alpha)


class TestDifference:
    TRUTH = """
        ....gg
        bbbbgg
        ttppvv
        ????cc
    """
    PREDICTION = """
        ..bbgg
        b.gvgg
        ttppvb
        ?.bbcc
    """
    CODES = ("==EE==", "=MCM==", "====vv", "=MCC==")

    def test_codes(self, schema: LabelSchema) -> None:
        assert codes_as_text(difference_codes(drawn(self.TRUTH), drawn(self.PREDICTION), schema)) == list(self.CODES)

    def test_a_schema_without_background_knows_confusions_only(self) -> None:
        schema = LabelSchema.from_dict({"labels": [{"name": "a", "id": 0}, {"name": "b", "id": 2}]}, source="the test")
        assert codes_as_text(difference_codes(drawn("..gg"), drawn(".g.g"), schema)) == ["=CC="]

    def test_colors_are_exact_at_full_size(self, schema: LabelSchema) -> None:
        truth, prediction = drawn(self.TRUTH), drawn(self.PREDICTION)
        picture = difference(truth, prediction, schema)
        codes = difference_codes(truth, prediction, schema)
        assert picture.shape == (*truth.shape, 3)
        for kind in DIFFERENCES:
            assert (picture[codes == kind.code] == kind.color).all()
        agree = picture[codes == 0]
        assert agree.max() <= 86
        assert (agree == agree[:, :1]).all()

    def test_a_smaller_ground_is_tinted_by_share(self, schema: LabelSchema) -> None:
        truth, prediction = drawn("..gg ..gg"), drawn(".bgg ..gg")
        picture = difference(truth, prediction, schema, ground=np.zeros((1, 2, 3), np.uint8))
        extra = np.array(DIFFERENCES[0].color)
        assert np.abs(picture[0, 0] - (16 + (extra - 16) / 4)).max() <= 1
        assert (picture[0, 1] == 16).all()


class TestLegend:
    def test_rows_count_shares_and_iou(self, schema: LabelSchema) -> None:
        rows = legend_rows(schema, truth=drawn("ggggbbbbvv"), prediction=drawn("ggbbbbbb?g"))
        found = {row.name: (row.truth_share, row.prediction_share, row.iou) for row in rows}
        assert found == {
            "Земля": (0.4, pytest.approx(0.3), 0.5),
            "Здание": (0.4, 0.6, pytest.approx(4 / 6)),
            "not labelled": (0.2, 0.0, None),
            "id 17 (no such label)": (0.0, 0.1, None),
        }
        assert [row.name for row in rows] == list(found)

    def test_without_maps_every_label_is_listed(self, schema: LabelSchema) -> None:
        rows = legend_rows(schema)
        assert tuple(row.name for row in rows) == NAMES
        assert all(row.truth_share is None and row.iou is None for row in rows)

    def test_shares_are_counted_exactly_over_strips(self, schema: LabelSchema, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(1)
        truth, prediction = (rng.choice(np.array([0, 2, 5, 255], np.uint8), (50, 70)) for _ in range(2))
        whole = legend_rows(schema, truth=truth, prediction=prediction)
        monkeypatch.setattr(pictures, "_STRIP", 100)
        assert legend_rows(schema, truth=truth, prediction=prediction) == whole
        row = next(r for r in whole if r.label_id == 2)
        labelled = truth != 255
        hit = ((truth == 2) & (prediction == 2)).sum()
        assert row.iou == hit / (((truth == 2) | (prediction == 2)) & labelled).sum()

    def test_swatches_have_the_labels_colors(self, schema: LabelSchema) -> None:
        picture = legend(schema, truth=drawn("..ggttbbppcc"), width=700)
        assert picture.shape[1] == 700
        colors = {tuple(int(v) for v in c) for c in picture.reshape(-1, 3)}
        assert {label.color for label in schema.labels} <= colors

    def test_hostile_names_stay_inside(self) -> None:
        labels = [{"name": name, "id": i} for i, name in enumerate(("x" * 900, "<b>&", "漢\x07字", "\u202eevil"))]
        schema = LabelSchema.from_dict({"labels": labels}, source="the test")
        label_map = np.arange(4, dtype=np.uint8).reshape(2, 2)
        picture = legend(schema, truth=label_map, prediction=label_map, width=MIN_WIDTH)
        assert picture.shape[1] == MIN_WIDTH

    @pytest.mark.parametrize(
        ("share", "text"),
        [(None, "—"), (0.0, "—"), (float("nan"), "—"), (1e-6, "< 0.01 %"), (0.0026, "0.26 %"), (0.5, "50.0 %")],
    )
    def test_percent(self, share: float | None, text: str) -> None:
        assert percent(share) == text


class TestShrinkLabels:
    @pytest.mark.parametrize("column", range(8))
    @pytest.mark.parametrize("size_hw", [(8, 16), (6, 13)])
    def test_a_line_one_pixel_wide_stays_whole(
        self, schema: LabelSchema, column: int, size_hw: tuple[int, int]
    ) -> None:
        label_map = np.full((32, 64), 2, np.uint8)
        label_map[:16] = 0
        label_map[:, 20 + column] = 65
        assert (shrink_labels(label_map, size_hw, schema) == 65).any(axis=1).all()

    def test_a_lone_pixel_does_not_grow(self, schema: LabelSchema) -> None:
        label_map = np.full((32, 64), 2, np.uint8)
        label_map[5, 5] = 65
        assert (shrink_labels(label_map, (8, 16), schema) == 2).all()

    def test_background_never_wins_over_a_label_that_covers_enough(self, schema: LabelSchema) -> None:
        label_map = np.full((32, 64), 2, np.uint8)
        label_map[:, 20] = 0
        assert (shrink_labels(label_map, (8, 16), schema) == 2).all()

    def test_growing_repeats_pixels(self, schema: LabelSchema) -> None:
        label_map = drawn("gb .p")
        assert np.array_equal(shrink_labels(label_map, (4, 4), schema), label_map.repeat(2, 0).repeat(2, 1))


class TestFigure:
    @pytest.mark.parametrize("size_hw", [(64, 128), (300, 720), (700, 1500), (900, 60), (3, 5), (20, 3000)])
    @pytest.mark.parametrize("width", [MIN_WIDTH, 1000])
    def test_size_is_bounded(self, schema: LabelSchema, size_hw: tuple[int, int], width: int) -> None:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (*size_hw, 3), np.uint8)
        label_map = rng.choice(np.array([0, 2, 66], np.uint8), size_hw)
        sheet = figure(image, schema, truth=label_map, prediction=label_map, title="сцена", width=width)
        assert sheet.dtype == np.uint8
        assert MIN_WIDTH <= sheet.shape[1] <= width
        assert sheet.shape[0] <= 4 * 1.5 * width + 40 * 26

    def test_panels_follow_what_is_given(self, schema: LabelSchema) -> None:
        image = np.zeros((64, 128, 3), np.uint8)
        label_map = np.full((64, 128), 2, np.uint8)
        heights = [
            figure(image, schema, width=1024, **given).shape[0]
            for given in ({}, {"truth": label_map}, {"truth": label_map, "prediction": label_map})
        ]
        assert 512 < heights[0] < 1024 < heights[1] < 1536 < 2048 < heights[2]

    def test_sizes_must_match(self, schema: LabelSchema) -> None:
        with pytest.raises(ImageError, match="must have the same size"):
            figure(np.zeros((64, 128, 3), np.uint8), schema, prediction=np.zeros((64, 127), np.uint8))

    @pytest.mark.parametrize("width", [MIN_WIDTH - 1, MAX_WIDTH + 1])
    def test_width_is_checked(self, schema: LabelSchema, width: int) -> None:
        with pytest.raises(ConfigError, match="takes 480 to 8192"):
            figure(np.zeros((64, 128, 3), np.uint8), schema, width=width)

    @pytest.mark.slow
    def test_a_full_size_panorama_in_bounded_memory(self, schema: LabelSchema) -> None:
        resource = pytest.importorskip("resource", reason="Windows does not report peak memory this way")
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (4096, 8192, 3), np.uint8)
        truth = rng.choice(np.array([0, 2, 5, 6, 65, 66], np.uint8), (64, 128)).repeat(64, 0).repeat(64, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sheet = figure(image, schema, truth=truth, prediction=np.roll(truth, 9, 1), width=2048)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert sheet.shape[1] == 2048
        assert grown < 1 << 20  # kB: one GiB above the inputs
