"""The demo's report: self-contained, well-formed, escaped, honest about what is absent, and written atomically."""

import base64
import dataclasses
import io
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sscloud import files
from sscloud.errors import ImageError
from sscloud.labels import LabelSchema
from training.metrics import confusion_matrix, score
from training.page import PICTURE_WIDTH
from training.report import DemoReport, Example, Split, Stage, render_demo_report, write_demo_report

VOID_ELEMENTS = {"meta", "link", "img", "br", "hr", "input"}
ATTACK = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=1>"


class Page(HTMLParser):
    """Collects what a page loads, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data.strip())

    def sources(self) -> list[str]:
        names = ("src", "href", "srcset", "data", "poster", "action")
        return [value for _, attrs in self.tags for name in names if (value := attrs.get(name)) is not None]


@pytest.fixture
def schema() -> LabelSchema:
    return LabelSchema.default()


def make_report(labels: LabelSchema, **changes: Any) -> DemoReport:
    """A report of one 64x128 scene in which Обстановка is absent."""
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([0, 2, 5, 6, 65], np.uint8), (16, 32)).repeat(4, 0).repeat(4, 1)
    prediction = truth.copy()
    prediction[:, :20] = 2
    confusion = confusion_matrix(labels.class_map(truth), labels.class_map(prediction), len(labels.classes))
    report = DemoReport(
        title="Demo",
        version="0.1.0",
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        schema=labels,
        scores=score(confusion, labels.class_ids),
        unseen_scenes=1,
        examples=[
            Example(
                name="сцена 1",
                image=rng.integers(0, 256, (64, 128, 3), np.uint8),
                truth=truth,
                prediction=prediction,
                seconds=1.5,
                answer_bytes=123_456,
                regions=42,
            )
        ],
        stages=[
            Stage(name="train", result="run", seconds=90.0, note="3 epochs"),
            Stage(name="serve", result="endpoint", seconds=0.5),
        ],
        total_seconds=100.0,
        history=[{"epoch": e, "loss": 1 / (e + 1), "val_loss": 1.2 / (e + 1), "miou": e / 4} for e in range(3)],
        splits=[Split(name="training", scenes=8, size_hw=(64, 128), shares={2: 0.75, 65: 0.25, 66: 0.0})],
        settings={"epochs": "3"},
        facts={"torch": "2.9"},
        commands=[("Package it", "sscloud package bundle -o function")],
        checked=["The function answered."],
        unchecked=["No CVAT server was involved."],
    )
    return dataclasses.replace(report, **changes)


def test_page_is_well_formed_and_loads_nothing(schema: LabelSchema) -> None:
    text = render_demo_report(make_report(schema))
    page = Page(text)
    assert page.sources()
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources())
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?://", text)
    assert ("html", {"lang": "en"}) in page.tags


def test_page_says_what_was_measured(schema: LabelSchema) -> None:
    report = make_report(schema)
    words = Page(render_demo_report(report)).words
    for text in (
        f"{report.scores.miou:.3f}",
        f"{100 * report.scores.pixel_accuracy:.1f} %",
        "1.50 s",
        "123 kB",
        "42",
        "1:40 min",
        "1:30 min",
        "Растительность",
        "сцена 1",
        "sscloud package bundle -o function",
        "No CVAT server was involved.",
    ):
        assert text in words, text


def test_every_table_row_of_a_label_has_its_scores(schema: LabelSchema) -> None:
    report = make_report(schema)
    text = render_demo_report(report)
    scores = text[text.index("Scores by label") : text.index("What is taken for what")]
    for label, iou in zip(schema.classes, report.scores.iou, strict=True):
        row = next(r for r in scores.split("<tr>") if label.name in r)
        assert ("—" if np.isnan(iou) else f"{iou:.3f}") in row


def test_an_absent_label_is_a_dash_and_no_zero(schema: LabelSchema) -> None:
    report = make_report(schema)
    assert np.isnan(report.scores.iou[-1])
    text = render_demo_report(report)
    row = next(r for r in text[text.index("Scores by label") :].split("<tr>") if "Обстановка" in r)
    assert row.split("</tr>")[0].count("—") == 5
    assert "0.000" not in row.split("</tr>")[0]
    assert "nan" not in " ".join(Page(text).words).lower()
    heat = next(
        r for r in text[text.index("What is taken") :].split("<tr>") if 'scope="row"' in r and "Обстановка" in r
    )
    assert heat.split("</tr>")[0].count("—") == len(schema.classes)


def test_pictures_are_bounded_jpegs(schema: LabelSchema) -> None:
    image = np.zeros((800, 1600, 3), np.uint8)
    label_map = np.full((800, 1600), 2, np.uint8)
    example = Example(
        name="wide", image=image, truth=label_map, prediction=label_map, seconds=1, answer_bytes=1, regions=1
    )
    page = Page(render_demo_report(make_report(schema, examples=[example])))
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in page.sources()]
    assert sizes == [(PICTURE_WIDTH, PICTURE_WIDTH // 2)] * 4


def test_hostile_text_is_escaped() -> None:
    labels = [{"name": ATTACK, "id": 0, "background": True}, {"name": "Земля", "id": 2}]
    schema = LabelSchema.from_dict({"labels": labels}, source="the test")
    example = Example(
        name=ATTACK,
        image=np.zeros((64, 128, 3), np.uint8),
        truth=np.zeros((64, 128), np.uint8),
        prediction=np.zeros((64, 128), np.uint8),
        seconds=1,
        answer_bytes=1,
        regions=1,
    )
    report = make_report(
        LabelSchema.default(),
        schema=schema,
        title=ATTACK,
        version=ATTACK,
        scores=score(np.array([[1, 0], [0, 1]]), (0, 2)),
        examples=[example],
        stages=[Stage(name=ATTACK, result=ATTACK, seconds=1, note=ATTACK)],
        splits=[Split(name=ATTACK, scenes=1, size_hw=(1, 2), shares={0: 1.0})],
        settings={ATTACK: ATTACK},
        facts={ATTACK: ATTACK},
        commands=[(ATTACK, ATTACK)],
        checked=[ATTACK],
        unchecked=[ATTACK],
    )
    page = Page(render_demo_report(report))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(source.startswith("data:") for source in page.sources())
    assert ATTACK in page.words


def test_ids_without_a_label_are_named_by_their_id(schema: LabelSchema) -> None:
    report = make_report(schema, scores=score(np.array([[3]]), (17,)), splits=[])
    assert "id 17" in Page(render_demo_report(report)).words


@pytest.mark.parametrize(
    "history",
    [[], [{"epoch": 0, "loss": 1.0}], [{"epoch": 0, "loss": float("nan")}, {"epoch": 1, "loss": 0.0, "miou": 0.5}]],
)
def test_short_and_gappy_histories(schema: LabelSchema, history: list[dict[str, float]]) -> None:
    text = render_demo_report(make_report(schema, history=history))
    Page(text)
    assert ("<polyline" in text) == bool(history)
    assert "nan" not in text[text.index("</style>") :].split("base64")[0].lower()


def test_curves_lie_inside_their_chart(schema: LabelSchema) -> None:
    for points in re.findall(r'points="([^"]+)"', render_demo_report(make_report(schema))):
        xy = np.array([[float(v) for v in point.split(",")] for point in points.split()])
        assert len(xy) == 3
        assert (xy >= 0).all()
        assert (xy <= (360, 200)).all()
        assert (np.diff(xy[:, 0]) > 0).all()


def test_nothing_measured_is_no_crash(schema: LabelSchema) -> None:
    with np.errstate(invalid="ignore"):
        scores = score(np.zeros((6, 6), np.int64), schema.class_ids)
    scores = dataclasses.replace(scores, pixel_accuracy=float("nan"))
    words = Page(render_demo_report(make_report(schema, scores=scores))).words
    assert words.count("—") > 6 * 6


def test_sizes_within_an_example_must_match(schema: LabelSchema) -> None:
    report = make_report(schema)
    broken = dataclasses.replace(report.examples[0], truth=np.zeros((64, 127), np.uint8))
    with pytest.raises(ImageError, match="127x64 and 128x64"):
        render_demo_report(dataclasses.replace(report, examples=[broken]))


def test_writing_is_atomic(schema: LabelSchema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "demo" / "отчёт.html"
    report = make_report(schema)
    write_demo_report(path, report)
    assert path.read_text(encoding="utf-8") == render_demo_report(report)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_demo_report(path, make_report(schema, title="another"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
