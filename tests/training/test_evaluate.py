import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import ConfigError, DatasetError, ImageError, SchemaError
from sscloud.image import read_image, read_label_map
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.boundary import boundary_counts
from training.calibration import Reliability, reliability
from training.dataset import open_dataset
from training.evaluate import evaluate, scores_table, scores_to_dict, summarise
from training.latitude import row_weights
from training.metrics import weighted_confusion_matrix

MakeDataset = Callable[..., Path]


def labels(root: Path, ids: tuple[int, ...], *, void: tuple[int, ...] = ()) -> None:
    """Write a schema of labels by their ids alone."""
    names = {label.id: label.name for label in LabelSchema.default().labels}
    entries = [{"name": names.get(i, f"Метка {i}"), "id": i} for i in ids]
    data: dict[str, Any] = {"labels": entries, "void": list(void)}
    (root / "labels.yaml").write_text(LabelSchema.from_dict(data, source="").to_yaml(), encoding="utf-8")


@pytest.fixture
def ground_bundle(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> ModelBundle:
    """A model that calls everything ground (2)."""
    model = UNet(Architecture(classes=6, base_width=4)).eval()
    with torch.no_grad():
        model.outc.conv.weight.zero_()
        model.outc.conv.bias.copy_(torch.tensor([0.0, 9, 0, 0, 0, 0]))  # type: ignore[union-attr,operator]
    return save_bundle(tmp_path / "ground", model, make_manifest(model.architecture))


def test_scores_equal_an_independent_computation(make_dataset: MakeDataset, tiny_bundle: ModelBundle) -> None:
    data = open_dataset(make_dataset(3))
    predictor = Predictor(tiny_bundle, device="cpu")

    evaluation = evaluate(tiny_bundle, data, device="cpu")

    truth, predicted = (
        torch.from_numpy(np.stack(maps)).long()
        for maps in (
            [read_label_map(item.mask) for item in data.items],
            [predictor.predict(read_image(item.image)).label_map for item in data.items],
        )
    )
    ids = [0, 2, 5, 6, 65, 66]
    index = torch.zeros(256, dtype=torch.int64)
    index[ids] = torch.arange(6)
    scores = evaluation.scores
    assert [label.id for label in evaluation.labels] == ids
    seen = ~np.isnan(scores.iou)
    assert seen.sum() >= 4
    iou = multiclass_jaccard_index(index[predicted], index[truth], 6, average=None).numpy()
    dice = multiclass_f1_score(index[predicted], index[truth], 6, average=None).numpy()
    np.testing.assert_allclose(scores.iou[seen], iou[seen], rtol=1e-5)
    np.testing.assert_allclose(scores.dice[seen], dice[seen], rtol=1e-5)
    assert scores.miou == pytest.approx(iou[seen].mean(), rel=1e-5)
    assert scores.pixel_accuracy == pytest.approx(float((truth == predicted).double().mean()))
    assert [panorama.name for panorama in evaluation.panoramas] == ["1_normals", "2_normals", "3_normals"]
    one = multiclass_jaccard_index(index[predicted[:1]], index[truth[:1]], 6, average=None).numpy()
    present = np.isin(range(6), torch.cat([index[predicted[0]].unique(), index[truth[0]].unique()]))
    assert evaluation.panoramas[0].miou == pytest.approx(one[present].mean(), rel=1e-5)


def test_by_hand(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    root = make_dataset(1)
    mask = np.full((64, 128), 2, np.uint8)
    mask[:32] = 6
    mask[32:48] = 255
    Image.fromarray(mask).save(root / "masks/1_normals.png")

    scores = evaluate(ground_bundle, open_dataset(root), device="cpu").scores

    assert scores.iou[1] == pytest.approx(1 / 3)  # 16 of 48 rows
    assert scores.precision[1] == pytest.approx(1 / 3)
    assert scores.recall[1] == 1
    assert scores.iou[3] == 0
    assert np.isnan(scores.precision[3])
    assert np.isnan(scores.iou[[0, 2, 4, 5]]).all()
    assert scores.miou == pytest.approx(1 / 6)


def test_a_class_the_model_does_not_know_is_never_found(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    root = make_dataset(1)
    labels(root, (0, 2, 5, 6, 9))
    mask = np.full((64, 128), 2, np.uint8)
    mask[:16] = 9
    Image.fromarray(mask).save(root / "masks/1_normals.png")

    evaluation = evaluate(ground_bundle, open_dataset(root), device="cpu")

    assert [label.id for label in evaluation.labels] == [0, 2, 5, 6, 65, 66, 9]
    assert evaluation.labels[-1].name == "Метка 9"
    assert (evaluation.scores.iou[-1], evaluation.scores.recall[-1]) == (0, 0)
    assert evaluation.scores.iou[1] == pytest.approx(0.75)
    assert evaluation.scores.miou == pytest.approx(0.375)


def test_an_id_of_another_meaning_is_refused(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    root = make_dataset(1)
    (root / "labels.yaml").write_text("labels: [{name: Вода, id: 6}, {name: Земля, id: 2}]\nvoid: [0, 5, 65, 66]\n")
    with pytest.raises(SchemaError, match="The id 6 is 'Здание' in the bundle and 'Вода' in the data set"):
        evaluate(ground_bundle, open_dataset(root), device="cpu")


def test_a_label_that_is_void_here_counts_as_a_miss(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    root = make_dataset(1)
    labels(root, (2, 5, 6), void=(0, 2))
    mask = np.full((64, 128), 6, np.uint8)
    mask[:32] = 0
    mask[32:40] = 2
    Image.fromarray(mask).save(root / "masks/1_normals.png")

    evaluation = evaluate(ground_bundle, open_dataset(root), device="cpu")

    assert [label.id for label in evaluation.labels] == [5, 6, 65, 66]
    assert evaluation.scores.iou[1] == 0  # the model says 2 everywhere
    assert evaluation.scores.recall[1] == 0
    assert evaluation.scores.share[1] == 1
    assert evaluation.scores.pixel_accuracy == 0


def test_unknown_ids_and_nothing_to_compare(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    root = make_dataset(1)
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(root / "masks/1_normals.png")
    with pytest.raises(SchemaError, match=r"1_normals\.png holds ids \[77\] that neither"):
        evaluate(ground_bundle, open_dataset(root), device="cpu")
    Image.fromarray(np.full((64, 128), 255, np.uint8)).save(root / "masks/1_normals.png")
    with pytest.raises(DatasetError, match=r"Every pixel of the masks .* is void"):
        evaluate(ground_bundle, open_dataset(root), device="cpu")
    Image.new("RGB", (128, 64)).save(root / "masks/1_normals.png")
    with pytest.raises(ImageError, match=r"1_normals\.png: it is a picture of mode RGB"):
        evaluate(ground_bundle, open_dataset(root), device="cpu")


def test_pixels_without_a_return_are_void_where_the_schema_says_so(
    make_dataset: MakeDataset, ground_bundle: ModelBundle
) -> None:
    root = make_dataset(1)  # its upper 20 rows are black but for the bush, and labelled background
    with_sky = evaluate(ground_bundle, open_dataset(root), device="cpu")
    schema = replace(LabelSchema.default(), no_return_void=True)
    (root / "labels.yaml").write_text(schema.to_yaml(), encoding="utf-8")

    without = evaluate(ground_bundle, open_dataset(root), device="cpu")

    black = (read_image(root / "imgs/1_normals.png") == 0).all(-1)
    assert black.sum() == 20 * 128
    assert with_sky.scores.confusion.sum() - without.scores.confusion.sum() == black.sum()
    assert without.scores.share[0] == 0
    assert without.reliability.count.sum() == without.scores.confusion.sum()
    (root / "dataset.yaml").write_text("encoding: rgb\n")
    colours = replace(ground_bundle, manifest=replace(ground_bundle.manifest, encoding="rgb"))
    assert evaluate(colours, open_dataset(root), device="cpu").scores.share[0] > 0  # there black is a colour


def test_weighted_boundary_and_calibration(make_dataset: MakeDataset, tiny_bundle: ModelBundle) -> None:
    data = open_dataset(make_dataset(2))
    data = replace(data, facts=replace(data.facts, elevation=(90.0, -60.0)))

    evaluation = evaluate(tiny_bundle, data, device="cpu")

    classes = LabelSchema.default()
    weighted, boundary, sure = np.zeros((6, 6)), np.zeros((6, 2)), Reliability.nothing()
    predictor = Predictor(tiny_bundle, device="cpu", precision="fp32")
    for item in data.items:
        segmentation = predictor.predict(read_image(item.image))
        truth, predicted = classes.class_map(read_label_map(item.mask)), classes.class_map(segmentation.label_map)
        weights = row_weights(64, (90.0, -60.0))
        weighted += weighted_confusion_matrix(truth, predicted, 6, row_weights=weights)[1]
        boundary += boundary_counts(truth, predicted, 6, distance=1, wrap=True)
        sure += reliability(segmentation, truth, predicted)
    np.testing.assert_allclose(evaluation.weighted.confusion, weighted)
    np.testing.assert_allclose(evaluation.boundary_iou, boundary[:, 0] / boundary[:, 1])
    assert evaluation.reliability.error == pytest.approx(sure.error)
    assert evaluation.summary() == {
        **evaluation.scores.summary(),
        "weighted_miou": evaluation.weighted.miou,
        "mean_boundary_iou": pytest.approx(np.nanmean(evaluation.boundary_iou)),
        "calibration_error": evaluation.reliability.error,
    }


def test_a_crop_is_not_weighted(
    tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]], tiny_bundle: ModelBundle
) -> None:
    root = tmp_path / "crops"
    for folder, picture in (("imgs", make_panorama((64, 80))), ("masks", np.full((64, 80), 2, np.uint8))):
        (root / folder).mkdir(parents=True)
        Image.fromarray(picture).save(root / folder / "1.png")

    evaluation = evaluate(tiny_bundle, open_dataset(root), device="cpu")

    np.testing.assert_array_equal(evaluation.weighted.confusion, evaluation.scores.confusion)


def test_intervals_hold_the_scores_and_go_by_groups(make_dataset: MakeDataset, tiny_bundle: ModelBundle) -> None:
    data = open_dataset(make_dataset(6))

    single = evaluate(tiny_bundle, data, device="cpu")
    pairs = summarise(
        single.labels,
        [replace(panorama, group=str(number // 2)) for number, panorama in enumerate(single.panoramas)],
    )

    assert single.intervals is not None
    assert pairs.intervals is not None
    assert (single.intervals.groups, pairs.intervals.groups) == (6, 3)
    for intervals in (single.intervals, pairs.intervals):
        low, high = intervals.miou
        assert low < single.scores.miou < high
        seen = ~np.isnan(single.scores.iou)
        np.testing.assert_array_equal(~np.isnan(intervals.iou[:, 0]), seen)
        assert (intervals.iou[seen, 0] <= single.scores.iou[seen]).all()
        assert (intervals.dice[seen, 1] >= single.scores.dice[seen]).all()
    assert pairs.scores.miou == single.scores.miou
    assert pairs.intervals.miou != single.intervals.miou


def test_one_group_has_no_intervals(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    evaluation = evaluate(ground_bundle, open_dataset(make_dataset(2)), device="cpu", group_by="normals")

    assert evaluation.intervals is None
    assert scores_to_dict(evaluation)["intervals"] is None
    assert scores_table(evaluation).splitlines()[-1].startswith("No intervals: all panoramas are of one group")
    assert "[" not in scores_table(evaluation)


def test_turns_reach_the_predictor(make_dataset: MakeDataset, tiny_bundle: ModelBundle) -> None:
    data = open_dataset(make_dataset(1))

    with pytest.raises(ConfigError, match=r"turns .*found 0"):
        evaluate(tiny_bundle, data, device="cpu", turns=0)


def test_table_and_json(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    evaluation = evaluate(ground_bundle, open_dataset(make_dataset(2)), device="cpu")

    lines = scores_table(evaluation).splitlines()
    assert lines[0].split() == ["class", "id", "share", "IoU", "Dice", "boundary", "precision", "recall"]
    assert next(line for line in lines if "Обстановка" in line).split()[3:] == ["—"] * 5
    assert re.search(r"Земля +2 +\d+\.\d\d%  0\.\d{3} \[0\.\d\d–0\.\d\d\]  ", "\n".join(lines))
    assert f"mIoU {evaluation.scores.miou:.3f} [" in lines[-3]
    assert f"weighted mIoU {evaluation.weighted.miou:.3f}" in lines[-2]
    assert f"calibration error {evaluation.reliability.error:.3f}" in lines[-2]
    assert lines[-1] == (
        "Intervals hold 95% of 1000 resamples of 2 groups of panoramas. So few groups make them too narrow."
    )
    assert max(map(len, lines)) <= 100
    data = scores_to_dict(evaluation)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    by_id = {entry["id"]: entry for entry in data["classes"]}
    assert by_id[66]["iou"] is None
    assert by_id[66]["share"] == 0
    assert by_id[2]["recall"] == 1
    assert sum(map(sum, data["confusion"])) == 2 * 64 * 128
    assert not math.isnan(data["miou"])
    assert by_id[2]["boundary_iou"] == 0  # all is ground: no contour is met
    assert by_id[66]["boundary_iou"] is None
    low, high = by_id[2]["iou_interval"]
    assert low <= by_id[2]["iou"] <= high
    assert by_id[66]["iou_interval"] == [None, None]
    assert data["intervals"]["groups"] == 2
    assert data["calibration_error"] == evaluation.reliability.error
    assert sum(data["reliability"]["count"]) == 2 * 64 * 128
    assert np.sum([entry["confusion"] for entry in data["panoramas"]], axis=0).tolist() == data["confusion"]


def test_long_names_fit_in_the_table(make_dataset: MakeDataset, ground_bundle: ModelBundle) -> None:
    root = make_dataset(2)
    entries = [
        replace(label, name=f"{label.name} с очень длинным названием", aliases=(label.name,))
        for label in LabelSchema.default().labels
    ]
    (root / "labels.yaml").write_text(LabelSchema(labels=tuple(entries)).to_yaml(), encoding="utf-8")
    evaluation = evaluate(ground_bundle, open_dataset(root), device="cpu")
    evaluation = replace(evaluation, labels=tuple(entries))

    lines = scores_table(evaluation).splitlines()

    assert max(map(len, lines)) <= 100
    assert "Растительность с очень …" in "\n".join(lines)
