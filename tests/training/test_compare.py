import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import DatasetError, SchemaError
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training import compare as module
from training.bootstrap import draws, interval
from training.compare import (
    Difference,
    Divergence,
    compare,
    comparison_table,
    comparison_to_dict,
    conclusion,
    disagreement,
    draw,
)
from training.dataset import open_dataset
from training.evaluate import evaluate, summarise
from training.metrics import score

MakeDataset = Callable[..., Path]
MakeConstant = Callable[..., ModelBundle]


@pytest.fixture
def constant(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> MakeConstant:
    """Makes a model that gives every pixel the class of this index, under this version."""

    def make(index: int, version: int, **fields: object) -> ModelBundle:
        model = UNet(Architecture(classes=6, base_width=4)).eval()
        with torch.no_grad():
            model.outc.conv.weight.zero_()
            model.outc.conv.bias.copy_(9.0 * torch.eye(6)[index])  # type: ignore[union-attr,operator]
        return save_bundle(
            tmp_path / f"v{version}", model, make_manifest(model.architecture, version=version, **fields)
        )

    return make


def test_differences_are_paired(make_dataset: MakeDataset, tiny_bundle: ModelBundle, constant: MakeConstant) -> None:
    data = open_dataset(make_dataset(5))

    comparison = compare(tiny_bundle, constant(3, 4), data, device="cpu")

    a, b = comparison.a, comparison.b
    assert comparison.miou.value == pytest.approx(b.scores.miou - a.scores.miou)
    assert comparison.mean_dice.value == pytest.approx(b.scores.mean_dice - a.scores.mean_dice)
    # An independent bootstrap: the scores of both are taken of each resample one by one.
    drawn = draws([str(n) for n in range(5)])
    assert drawn is not None
    changes = []
    for times in drawn:
        ours, theirs = (
            score(sum(n * p.confusion for n, p in zip(times, side.panoramas, strict=True)), range(6)) for side in (a, b)
        )
        changes.append([theirs.miou - ours.miou, *(theirs.iou - ours.iou)])
    limits = interval(np.array(changes))
    np.testing.assert_allclose(np.array(comparison.miou.limits), limits[0])
    for index, change in enumerate(comparison.iou):
        assert change.value == pytest.approx(b.scores.iou[index] - a.scores.iou[index], nan_ok=True)
        np.testing.assert_allclose(np.array(change.limits), limits[1 + index])


def test_what_is_hard_for_both_cancels_out(make_dataset: MakeDataset, constant: MakeConstant) -> None:
    ground = constant(1, 1)
    measured = evaluate(ground, open_dataset(make_dataset(6)), device="cpu")
    rng = np.random.default_rng(0)
    sides = []
    hits = rng.integers(200, 800, 6)
    for more in (0, 20):  # of 1000 pixels each, the second model finds 20 more, whether the panorama is hard or not
        panoramas = []
        for panorama, hit in zip(measured.panoramas, hits + more, strict=True):
            confusion = np.zeros_like(panorama.confusion)
            confusion[1, :2] = 1000 - hit, hit
            panoramas.append(replace(panorama, confusion=confusion))
        sides.append(summarise(measured.labels, panoramas))

    comparison = module._comparison(sides[0], sides[1], ("a", "b"), [])

    first, second = (side.intervals for side in sides)
    assert first is not None
    assert second is not None
    assert first.iou[1, 1] - second.iou[1, 0] > 0.1  # the single intervals overlap
    assert comparison.iou[1].limits == pytest.approx((0.02, 0.02))
    assert comparison.iou[1].verdict == "better"


@pytest.mark.parametrize(
    ("value", "limits", "verdict"),
    [
        (0.2, (0.1, 0.3), "better"),
        (-0.2, (-0.3, -0.1), "worse"),
        (0.1, (-0.1, 0.3), "no difference shown"),
        (0.0, (0.0, 0.0), "no difference shown"),
        (math.nan, (math.nan, math.nan), "not measured"),
        (math.nan, (0.1, 0.2), "not measured"),
        (0.2, None, "not measured"),
    ],
)
def test_verdicts(value: float, limits: tuple[float, float] | None, verdict: str) -> None:
    assert Difference(value=value, limits=limits).verdict == verdict


def test_a_clear_winner_is_named(make_dataset: MakeDataset, constant: MakeConstant) -> None:
    data = open_dataset(make_dataset(4))
    ground, clutter = constant(1, 1), constant(5, 2)  # two fifths of each panorama are ground, nothing is clutter

    better, worse = (compare(*pair, data, device="cpu") for pair in ((clutter, ground), (ground, clutter)))

    assert better.miou.verdict == "better"
    assert better.iou[1].verdict == "better"
    assert better.iou[3].verdict == "no difference shown"  # neither finds a building
    assert better.iou[5].verdict == "not measured"  # A says clutter, B never does, and there is none
    assert conclusion(better).startswith("B (Улица v1) is better than A (Улица v2): mIoU +0.")
    assert worse.miou.value == -better.miou.value
    assert conclusion(worse).startswith("B (Улица v2) is worse than A (Улица v1): mIoU -0.")
    lines = comparison_table(better).splitlines()
    assert lines[0].split() == ["IoU", "of", "A", "B", "B", "-", "A", "[low,", "high]", "B", "is"]
    assert next(line for line in lines if line.startswith("Земля")).endswith("]  better")
    assert next(line for line in lines if line.startswith("Обстановка")).split()[2:] == ["—", "—", "not", "measured"]
    assert lines[-1] == conclusion(better)
    assert max(map(len, lines)) <= 100


def test_the_same_model_shows_no_difference(make_dataset: MakeDataset, tiny_bundle: ModelBundle) -> None:
    pictures: list[str] = []

    comparison = compare(
        tiny_bundle,
        tiny_bundle,
        open_dataset(make_dataset(3)),
        device="cpu",
        picture=lambda name, _: pictures.append(name),
    )

    assert comparison.miou == Difference(value=0.0, limits=(0.0, 0.0))
    assert conclusion(comparison) == (
        "These 3 panoramas do not tell whether A or B is better: mIoU +0.000 [+0.000, +0.000]."
    )
    assert pictures == []


def test_one_group_does_not_tell(make_dataset: MakeDataset, constant: MakeConstant) -> None:
    comparison = compare(
        constant(5, 1), constant(1, 2), open_dataset(make_dataset(3)), device="cpu", group_by="normals"
    )

    assert comparison.miou.limits is None
    assert comparison.miou.value > 0
    assert conclusion(comparison).startswith("The data do not tell")
    assert "No intervals: all panoramas are of one group" in comparison_table(comparison)
    assert comparison_to_dict(comparison)["miou"]["interval"] is None


def test_json(make_dataset: MakeDataset, tiny_bundle: ModelBundle, constant: MakeConstant) -> None:
    comparison = compare(tiny_bundle, constant(1, 4), open_dataset(make_dataset(2)), device="cpu")

    data = comparison_to_dict(comparison)

    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["a"]["title"], data["b"]["title"]) == ("Улица v3", "Улица v4")
    assert data["b"]["miou"] - data["a"]["miou"] == pytest.approx(data["miou"]["value"])
    assert [entry["id"] for entry in data["classes"]] == [0, 2, 5, 6, 65, 66]
    assert {entry["iou"]["verdict"] for entry in data["classes"]} <= {
        "better",
        "worse",
        "no difference shown",
        "not measured",
    }


def test_pictures_of_those_that_differ_most(
    make_dataset: MakeDataset, tiny_bundle: ModelBundle, constant: MakeConstant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PICTURES", 2)
    pictures: dict[str, bytes] = {}

    comparison = compare(
        tiny_bundle, constant(1, 4), open_dataset(make_dataset(4)), device="cpu", picture=pictures.__setitem__
    )

    sizes = [abs(each.miou) for each in comparison.panoramas]
    assert sizes == sorted(sizes, reverse=True)
    a, b = ({p.name: p.miou for p in side.panoramas} for side in (comparison.a, comparison.b))
    assert all(each.miou == pytest.approx(b[each.name] - a[each.name]) for each in comparison.panoramas)
    assert list(pictures) == [each.name for each in comparison.panoramas[:2]]
    for jpeg in pictures.values():
        picture = Image.open(BytesIO(jpeg))
        assert picture.width == 1024
        assert picture.height > 5 * 512


def test_who_is_right_where() -> None:
    truth = np.array([[2, 2, 2, 2, 255]], np.uint8)
    first = np.array([[2, 2, 5, 5, 5]], np.uint8)
    second = np.array([[2, 5, 2, 6, 6]], np.uint8)
    ground = np.zeros((1, 5, 3), np.uint8)

    tinted = disagreement(truth, first, second, ground=ground)

    assert tinted[0].tolist() == [[16, 16, 16], *([*color] for _, color in module._KINDS)]
    same = np.tile(truth, (4, 4))
    shrunk = disagreement(same, np.tile(first, (4, 4)), np.tile(second, (4, 4)), ground=np.zeros((2, 10, 3), np.uint8))
    assert shrunk.shape == (2, 10, 3)


def test_a_sheet(make_panorama: Callable[..., np.ndarray]) -> None:
    schema = LabelSchema.default()
    truth, first = np.full((64, 128), 2, np.uint8), np.full((64, 128), 5, np.uint8)

    sheet = draw(
        Divergence(name="1", miou=0.5, pixels=8192),
        make_panorama(),
        truth,
        first,
        truth,
        schema=schema,
        titles=("Улица v1", "Улица v2"),
    )

    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 1024
    only_b = np.array(dict(module._KINDS)["only B is right"], np.uint8)
    assert (sheet == only_b).all(-1).sum() >= 512 * 1024  # all of the last panel


def test_labels_must_mean_the_same(make_dataset: MakeDataset, tiny_bundle: ModelBundle, constant: MakeConstant) -> None:
    data = open_dataset(make_dataset(1))
    labels = tuple(
        replace(label, name="Вода", aliases=()) if label.id == 66 else label for label in LabelSchema.default().labels
    )
    other = constant(1, 4, labels=LabelSchema(labels=labels))

    with pytest.raises(SchemaError, match="The id 66 is 'Обстановка' in bundle A and 'Вода' in bundle B"):
        compare(tiny_bundle, other, data, device="cpu")


def test_nothing_to_compare(make_dataset: MakeDataset, tiny_bundle: ModelBundle) -> None:
    root = make_dataset(1)
    Image.fromarray(np.full((64, 128), 255, np.uint8)).save(root / "masks/1_normals.png")

    with pytest.raises(DatasetError, match=r"Every pixel of the masks .* is void"):
        compare(tiny_bundle, tiny_bundle, open_dataset(root), device="cpu")
