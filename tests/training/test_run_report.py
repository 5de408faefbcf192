"""The report of a run: what stands on it, what it does without, and that it is one file for any run there may be."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sscloud.bundle import ModelBundle
from sscloud.errors import BundleError, ConfigError, DatasetError
from sscloud.labels import LabelSchema
from training.calibration import BINS, Reliability
from training.config import RunFacts, TrainConfig, write_config
from training.dataset import open_dataset
from training.evaluate import Evaluation, PanoramaResult, summarise
from training.manifest import DatasetWriter
from training.page import compare_maps
from training.run_report import (
    Measured,
    Part,
    RunReport,
    WorstPanorama,
    read_history,
    render_run_report,
    write_run_report,
)
from training.splits import SplitPlan

VOID_ELEMENTS = {"meta", "img"}
ATTACK = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=1>"

MakeRun = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")

MakeDataset = Callable[..., Path]


class Page(HTMLParser):
    """The words and the sources of a page whose tags are all closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data.strip())


def row_of(text: str, heading: str, name: str) -> str:
    """The table row of a label below a heading, its tags left out."""
    rows = text[text.index(f"<h2>{heading}</h2>") :].split("<tr>")
    row = next(row for row in rows if f"<span>{name}</span>" in row)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row.split("</tr>")[0])).strip()


# --- a report of made-up numbers --------------------------------------------------------------------------------------


def make_schema(count: int) -> LabelSchema:
    labels = [{"name": f"Класс {i}", "id": i, "background": i == 0} for i in range(count)]
    return LabelSchema.from_dict({"labels": labels}, source="the test")


def make_evaluation(schema: LabelSchema, *, panoramas: int = 4, groups: int = 2) -> Evaluation:
    """Every class right in three quarters of its 400 pixels but the last, which never occurs."""
    n = len(schema.classes)
    confusion = np.zeros((n, n), np.int64)
    for i in range(n - 1):
        confusion[i, i], confusion[i, (i + 1) % (n - 1)] = 300, 100
    counts = np.zeros(BINS, np.int64)
    counts[[7, 14]] = 100, 300
    results = [
        PanoramaResult(
            name=f"{place}_normals",
            group=f"site {place % groups}",
            confusion=confusion,
            weighted=confusion.astype(np.float64),
            boundary=np.stack([np.diag(confusion) // 3, confusion.sum(1)], axis=1),
            reliability=Reliability(
                count=counts, right=counts // 2, confidence=counts * (np.arange(BINS) + 0.5) / BINS
            ),
            digest="",
            seconds=1.5,
        )
        for place in range(panoramas)
    ]
    return summarise(schema.classes, results)


def make_report(
    schema: LabelSchema | None = None, *, evaluation: Evaluation | None = None, **changes: Any
) -> RunReport:
    schema = schema or make_schema(6)
    truth = np.arange(64 * 128, dtype=np.uint16).reshape(64, 128) // 2048
    label_map = np.asarray(schema.class_ids, np.uint8)[truth % len(schema.class_ids)]
    picture = compare_maps(np.full((64, 128, 3), 90, np.uint8), label_map, np.roll(label_map, 3, axis=0), schema)
    report = RunReport(
        title="улица",
        version="0.1.0",
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        schema=schema,
        class_ids=schema.class_ids,
        history=[
            {
                "epoch": epoch,
                "train_loss": 1 / epoch,
                "learning_rate": 1e-3 / epoch,
                "miou": 0.1 * epoch if epoch < 4 else 0.2,
                "seconds": 61.0,
                "images_per_second": 10.0 + epoch,
                "skipped_steps": 1.0,
                **{f"iou_{i}": 0.5 for i in schema.class_ids[:-1]},
            }
            for epoch in range(1, 5)
        ],
        best_epoch=3,
        epochs=10,
        measured=Measured(
            part="validation",
            evaluation=evaluation or make_evaluation(schema),
            schema=schema,
            device="PyTorch on a CPU",
            worst=[WorstPanorama(name="2_normals", miou=0.25, pictures=picture)],
        ),
        unmeasured="",
        parts=[Part(name="train", panoramas=95, groups=20, shares={0: 0.75, 1: 0.2, 255: 0.05})],
        config={"epochs": "10"},
        facts={"snapshot": "0123456789abcdef"},
        ran={"bundle": "улица v3"},
    )
    return dataclasses.replace(report, **changes)


class TestPage:
    def test_is_well_formed_and_loads_nothing(self) -> None:
        text = render_run_report(make_report())
        page = Page(text)
        sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
        assert len(sources) == 4
        assert all(source is not None and source.startswith("data:image/jpeg;base64,") for source in sources)
        assert not any("href" in attrs for _, attrs in page.tags)
        assert "url(" not in text
        assert "@import" not in text
        assert not re.search(r"https?://", text)
        assert not any(tag == "script" for tag, _ in page.tags)

    def test_headline(self) -> None:
        report = make_report()
        page = Page(render_run_report(report))
        assert report.headline == "mIoU 0.600 (95 %: 0.600–0.600) on 4 panoramas of the part validation."
        for words in (
            "0.600",
            "95 %: 0.600–0.600; on 4 panoramas of the part validation",
            "3 of 4",
            "with mIoU 0.300 while training; 4 of 10 epochs done",
            "4:04 min",
            "12.5",
            "median of the epochs; 4 steps skipped",
            "20.0 %",
        ):
            assert words in page.words, words
        assert "The best epoch was chosen on these panoramas" in page.text

    @pytest.mark.parametrize(
        ("part", "says"), [("test", "No run learns from the panoramas"), ("train", "The model has learned from these")]
    )
    def test_says_what_scores_of_a_part_are_worth(self, part: str, says: str) -> None:
        report = make_report()
        assert report.measured is not None
        measured = dataclasses.replace(report.measured, part=part)
        text = Page(render_run_report(dataclasses.replace(report, measured=measured))).text
        assert says in text
        assert "was chosen on these" not in text

    def test_scores_of_a_class_and_an_absent_class(self) -> None:
        text = render_run_report(make_report())
        assert row_of(text, "Scores by class", "Класс 1") == (
            "Класс 1 0.600 0.600–0.600 0.750 0.250 0.750 0.750 20.0 %"
        )
        assert row_of(text, "Scores by class", "Класс 5") == "Класс 5 — — — — — — —"
        # A class that neither side has is no row of the confusion matrix.
        heat = text[text.index('<table class="heat"') :].split("</table>")[0]
        assert heat.count('scope="row"') == 5
        assert "nan" not in Page(text).text.lower()

    def test_interval_is_drawn_where_it_lies(self) -> None:
        schema = make_schema(3)
        good = make_evaluation(schema, panoramas=1).panoramas[0]
        bad = dataclasses.replace(good, group="another", confusion=np.array([[0, 400, 0], [400, 0, 0], [0, 0, 0]]))
        evaluation = summarise(schema.classes, [good, bad])
        assert evaluation.intervals is not None
        low, high = 100 * evaluation.intervals.iou[0]
        assert high - low > 10

        text = render_run_report(make_report(schema, evaluation=evaluation))

        assert f'class="whisker" style="left:{low:.1f}%;width:{high - low:.1f}%"' in text
        assert "with so few groups it is too narrow" in Page(text).text

    def test_one_group_has_no_intervals(self) -> None:
        schema = make_schema(4)
        report = make_report(schema, evaluation=make_evaluation(schema, groups=1))
        text = render_run_report(report)
        assert "there are no intervals" in Page(text).text
        assert 'class="whisker"' not in text
        assert report.headline == "mIoU 0.600 on 4 panoramas of the part validation."

    def test_reliability(self) -> None:
        text = render_run_report(make_report())
        chart = text[text.index('<svg class="reliability"') :].split("</svg>")[0]
        titles = re.findall(r"<title>(.*)</title>", chart)
        assert titles == [
            "confidence 0.50, right 0.50, 25.0 % of the pixels",
            "confidence 0.97, right 0.50, 75.0 % of the pixels",
        ]
        heights = [float(value) for value in re.findall(r'class="right"[^>]* height="([\d.]+)"', chart)]
        assert heights == [100, 100]
        assert "The model promises 85.0 % on average and keeps 50.0 %: it is too sure of itself." in Page(text).text

    def test_largest_mistakes_come_first(self) -> None:
        schema = make_schema(3)
        confusion = np.array([[900, 10, 40], [0, 30, 20], [0, 0, 0]])
        one = dataclasses.replace(make_evaluation(schema).panoramas[0], confusion=confusion)
        text = render_run_report(make_report(schema, evaluation=summarise(schema.classes, [one])))
        table = text[text.index('<table class="mistakes"') :].split("</table>")[0].split("<tr>")[2:]
        assert [re.findall(r"<span>(.*?)</span>", row) for row in table] == [
            ["Класс 0", "Класс 2"],
            ["Класс 1", "Класс 2"],
            ["Класс 0", "Класс 1"],
        ]
        assert re.findall(r"[\d.]+ %", table[0]) == ["4.2 %", "4.0 %"]

    def test_data_composition(self) -> None:
        page = Page(render_run_report(make_report()))
        assert "95 panoramas of 20 groups" in page.words
        assert "not labelled" in page.text
        without = make_report(parts=[Part(name="train", panoramas=1, groups=None, shares={0: 1.0})])
        assert "1 panorama" in Page(render_run_report(without)).words

    def test_curves(self) -> None:
        text = render_run_report(make_report())
        charts = text[text.index('<div class="charts">') :].split("<section>")[0]
        assert re.findall(r"<figcaption><b>(.*)</b>", charts) == ["Loss", "mIoU, validation", "Learning rate"]
        assert charts.count('class="mark"') == 3
        assert charts.count('preserveAspectRatio="none"') == 5  # the sixth class was never measured
        assert "validation, last" not in charts

    @pytest.mark.parametrize(("classes", "kind"), [(3, "heat"), (10, "heat many"), (69, "heat dense")])
    def test_any_number_of_classes(self, classes: int, kind: str) -> None:
        text = render_run_report(make_report(make_schema(classes)))
        Page(text)
        heat = text[text.index(f'<table class="{kind}"') :].split("</table>")[0]
        assert heat.count("<td") == (classes - 1) ** 2
        assert ("Класс 1 → Класс 2: 25.0 %" in heat) == (kind == "heat dense")

    def test_nothing_but_a_configuration(self) -> None:
        report = make_report(history=[], best_epoch=None, measured=None, unmeasured="Nothing was measured.", parts=[])
        page = Page(render_run_report(report))
        assert report.headline == "Nothing was measured."
        assert "Nothing was measured." in page.words
        assert {"Training", "Scores by class", "Data"}.isdisjoint(page.words)
        assert {"Configuration", "10", "0123456789abcdef", "улица v3"} <= set(page.words)

    def test_an_unmeasured_run_shows_what_training_knew(self) -> None:
        words = Page(render_run_report(make_report(measured=None, unmeasured="No."))).words
        assert "while training, at the model's scale" in words
        assert "weakest: Класс 0" in words

    @pytest.mark.parametrize("rows", [[{"epoch": 1.0, "train_loss": 2.0}], [{"epoch": 1.0, "train_loss": math.nan}]])
    def test_short_and_gappy_histories(self, rows: list[Mapping[str, float]]) -> None:
        text = render_run_report(make_report(history=rows, best_epoch=1, epochs=1))
        assert "nan" not in Page(text).text.lower()
        assert "the last one: nothing was validated" in Page(text).words
        assert text.count("<polyline") == sum(math.isfinite(row["train_loss"]) for row in rows)

    def test_hostile_text_is_escaped(self) -> None:
        schema = LabelSchema.from_dict({"labels": [{"name": ATTACK, "id": 0}, {"name": "Земля", "id": 2}]}, source="")
        report = make_report(schema, evaluation=make_evaluation(schema), title=ATTACK, config={ATTACK: ATTACK})
        assert report.measured is not None
        measured = dataclasses.replace(
            report.measured, worst=[dataclasses.replace(report.measured.worst[0], name=ATTACK)], device=ATTACK
        )
        page = Page(render_run_report(dataclasses.replace(report, measured=measured, ran={ATTACK: ATTACK})))
        assert not any(tag == "script" for tag, _ in page.tags)
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
        assert ATTACK in page.words


# --- runs on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(tmp_path: Path, tiny_bundle: ModelBundle) -> MakeRun:
    """Writes the folder of a run that `tiny_bundle` came out of."""

    def make(
        dataset: Path, *, rows: Sequence[Mapping[str, object]] | None = None, bundle: bool = True, **config: Any
    ) -> Path:
        run = tmp_path / "улица"
        manifest = tiny_bundle.manifest
        facts = RunFacts(
            snapshot="0123456789abcdef",
            architecture=manifest.architecture,
            labels=manifest.labels,
            label_ids=manifest.label_ids,
            encoding="normals",
            aspect=2.0,
            elevation=(90.0, -90.0),
            azimuth=None,
            parent=None,
        )
        write_config(run, TrainConfig(dataset=str(dataset), epochs=2, **config), facts)
        if rows is None:
            rows = [{"epoch": e, "train_loss": 1.0, "miou": 0.1 * e, "iou_2": "", "iou_6": "nan"} for e in (1, 2)]
        with (run / "metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        if bundle:
            shutil.copytree(tiny_bundle.path, run / "bundle")
        return run

    return make


def test_a_run_on_its_validation_part(make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(6)
    run, output = make_run(data, validation=34.0), tmp_path / "pages" / "отчёт.html"

    report = write_run_report(run, dataset=open_dataset(data), output=output, device="cpu")

    assert output.read_text(encoding="utf-8") == render_run_report(report)
    assert list(output.parent.iterdir()) == [output]
    assert report.title == "улица"
    assert (report.best_epoch, report.epochs) == (2, 2)
    assert report.measured is not None
    counted = {part.name: part.panoramas for part in report.parts}
    assert counted["validation"] == len(report.measured.evaluation.panoramas) >= 1
    assert counted["train"] == 6 - counted["validation"]
    assert [sum(part.shares.values()) for part in report.parts] == pytest.approx([1, 1])
    assert report.parts[0].groups is None
    whole = json.loads((run / "config.json").read_text())
    assert report.config.keys() == whole["config"].keys()
    assert report.facts.keys() == whole["facts"].keys()
    assert (report.config["validation"], report.config["wrap"], report.config["load"]) == ("34", "yes", "—")
    assert "2 Земля" in report.facts["labels"]
    assert report.ran["bundle"] == "Улица v3"


def test_the_worst_panoramas_are_shown_worst_first(
    make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    data = make_dataset(6)
    output = tmp_path / "report.html"

    report = write_run_report(make_run(data), dataset=open_dataset(data), output=output, split="all", device="cpu")

    assert report.measured is not None
    mious = {one.name: one.miou for one in report.measured.evaluation.panoramas}
    assert [one.name for one in report.measured.worst] == sorted(mious, key=mious.__getitem__)[:4]
    assert [one.miou for one in report.measured.worst] == sorted(mious.values())[:4]
    assert [part.name for part in report.parts] == ["all"]
    text = output.read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == 16
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert picture.size == (128, 64)
    assert "The worst panoramas" in text


def test_frozen_splits_and_groups(make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(6)
    with DatasetWriter(data, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=17, test=33))
        writer.commit()
    run, folder = make_run(data), open_dataset(data)

    report = write_run_report(run, dataset=folder, output=tmp_path / "a.html", split="test", device="cpu")

    assert report.measured is not None
    assert [one.name for one in report.measured.evaluation.panoramas] == [
        item.name for item in folder.items if item.split == "test"
    ]
    assert {part.name: (part.panoramas, part.groups) for part in report.parts} == {
        "train": (3, 3),
        "validation": (1, 1),
        "test": (2, 2),
    }
    assert report.measured.evaluation.intervals is not None
    same = write_run_report(
        run, dataset=folder, output=tmp_path / "b.html", split="test", device="cpu", group_by="(normals)"
    )
    assert same.measured is not None
    assert same.measured.evaluation.intervals is None
    assert [part.groups for part in same.parts] == [1, 1, 1]


def test_pixels_without_a_return_are_void_where_the_schema_says_so(
    make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    data = make_dataset(1)
    schema = dataclasses.replace(LabelSchema.default(), no_return_void=True)
    (data / "labels.yaml").write_text(schema.to_yaml(), encoding="utf-8")

    report = write_run_report(
        make_run(data), dataset=open_dataset(data), output=tmp_path / "a.html", split="all", device="cpu"
    )

    assert report.measured is not None
    legend = {row.name: row.truth_share for row in report.measured.worst[0].pictures.legend}
    assert legend["not labelled"] == pytest.approx(20 / 64)  # the sky of the scene


def test_a_run_without_a_validation_part(make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(2)
    run = make_run(data, validation=0.0, rows=[{"epoch": 1, "train_loss": 0.5}])

    report = write_run_report(run, dataset=open_dataset(data), output=tmp_path / "a.html", device="cpu")

    assert report.measured is None
    assert report.headline == "The run has no validation part, so nothing was measured."
    assert [part.name for part in report.parts] == ["train"]


def test_an_interrupted_run_and_no_data(make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path) -> None:
    run = make_run(make_dataset(1), bundle=False)
    (run / "metrics.csv").unlink()

    report = write_run_report(run, dataset=None, output=tmp_path / "a.html")

    assert (report.history, report.best_epoch, report.parts) == ([], None, [])
    assert report.headline == "The run has no bundle yet, so there was nothing to measure."


def test_the_best_epoch_before_there_is_a_bundle(make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path) -> None:
    rows = [{"epoch": e, "train_loss": 1.0, "miou": miou} for e, miou in ((1, 0.3), (2, 0.4), (3, 0.2), (4, "nan"))]
    run = make_run(make_dataset(1), bundle=False, rows=rows)
    assert write_run_report(run, dataset=None, output=tmp_path / "a.html").best_epoch == 2


def test_an_old_run_shows_only_the_settings_it_had(
    make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    run = make_run(make_dataset(1))
    whole = json.loads((run / "config.json").read_text())
    for name in ("loss", "crop", "ema"):
        del whole["config"][name]
    (run / "config.json").write_text(json.dumps(whole))

    report = write_run_report(run, dataset=None, output=tmp_path / "a.html")

    assert "loss" not in report.config
    assert "learning_rate" in report.config
    assert not {"training took", "images a second"} & report.ran.keys()


def test_what_cannot_be_reported(make_run: MakeRun, make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, output = make_dataset(2), tmp_path / "a.html"
    folder = open_dataset(data)
    with pytest.raises(ConfigError, match="is no run"):
        write_run_report(data, dataset=folder, output=output)
    run = make_run(data)
    with pytest.raises(DatasetError, match="no panoramas in the split test"):
        write_run_report(run, dataset=folder, output=output, split="test", device="cpu")
    (run / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="format"):
        write_run_report(run, dataset=folder, output=output, device="cpu")
    assert not output.exists()


def test_history_leaves_empty_cells_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_history(path) == []
    path.write_text("epoch,train_loss,miou\n1,0.5,\n2,0.25,0.75\n")
    assert read_history(path) == [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25, "miou": 0.75}]
