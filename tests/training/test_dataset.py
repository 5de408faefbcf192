import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sscloud.errors import ConfigError, DatasetError, SchemaError
from sscloud.frame import Azimuth
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from training import dataset
from training.batch import collate
from training.dataset import (
    CachedItem,
    EpochSampler,
    Facts,
    Item,
    Panoramas,
    build_cache,
    class_shares,
    learning_parts,
    open_dataset,
    part,
    read_facts,
    snapshot_id,
    snapshot_of,
    split,
)
from training.manifest import DatasetWriter, Manifest, make_item
from training.splits import Split, SplitPlan

MakeDataset = Callable[..., Path]


def cache(root: Path, *, scale: float = 0.5) -> list[CachedItem]:
    return build_cache(open_dataset(root), scale=scale, resample="valid-area", folder=root / ".cache", quiet=True)


def cached(name: str, digest: str = "", pixels: dict[int, int] | None = None) -> CachedItem:
    return CachedItem(name=name, image=Path(), mask=Path(), pixels=pixels or {}, digest=digest)


def test_opens_in_natural_order(make_dataset: MakeDataset) -> None:
    found = open_dataset(make_dataset(11))

    assert [item.name for item in found.items] == [f"{n}_normals" for n in range(1, 12)]
    assert {item.size_hw for item in found.items} == {(64, 128)}
    assert found.aspect == 2.0
    assert found.facts.azimuth == Azimuth(direction=1, column_0=0.0)
    assert found.schema.class_ids == (0, 2, 5, 6, 65, 66)


def test_one_error_names_every_mismatch(make_dataset: MakeDataset) -> None:
    root = make_dataset(6)
    (root / "masks/1_normals.png").unlink()
    (root / "imgs/2_normals.png").unlink()
    shutil.copy(root / "imgs/3_normals.png", root / "imgs/3_normals.jpg")
    Image.new("L", (100, 64)).save(root / "masks/4_normals.png")
    (root / "imgs/5_normals.png").write_bytes(b"no picture")

    with pytest.raises(DatasetError, match=r"cannot be used, 5 problem\(s\)") as error:
        open_dataset(root)

    message = str(error.value)
    assert "imgs/1_normals.png: has no mask masks/1_normals.png" in message
    assert "masks/2_normals.png: has no image imgs/2_normals.jpg" in message
    assert "3_normals: several images: 3_normals.jpg, 3_normals.png" in message
    assert "4_normals: the image is 128x64, its mask 100x64" in message
    assert "5_normals.png: These 10 bytes are not a picture" in message
    assert "6_normals" not in message


def test_one_error_names_every_unusable_content(make_dataset: MakeDataset) -> None:
    root = make_dataset(5)
    Image.new("RGB", (128, 64)).save(root / "masks/2_normals.png")
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(root / "masks/3_normals.png")
    png = root / "imgs/4_normals.png"
    jpeg = png.with_suffix(".jpg")
    Image.open(png).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    png.unlink()

    with pytest.raises(DatasetError, match=r"cannot be used, 3 problem\(s\)") as error:
        cache(root)

    message = str(error.value)
    assert "masks/2_normals.png: it is a picture of mode RGB" in message
    assert "masks/3_normals.png: holds ids [77] that the schema lacks (it has 0 Фон, 2 Земля" in message
    assert "imgs/4_normals.jpg: The image is broken or truncated" in message
    assert "1_normals" not in message


def test_truncated_mask(make_dataset: MakeDataset) -> None:
    root = make_dataset(2)
    mask = root / "masks/1_normals.png"
    mask.write_bytes(mask.read_bytes()[:-60])

    with pytest.raises(DatasetError, match=r"1 problem\(s\)(?s:.*)masks/1_normals\.png.*truncated"):
        cache(root)


def test_many_problems_are_counted(make_dataset: MakeDataset) -> None:
    root = make_dataset(15)
    for mask in (root / "masks").iterdir():
        mask.unlink()

    with pytest.raises(DatasetError, match=r"15 problem\(s\)(?s:.*)… and 3 more$"):
        open_dataset(root)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"imgs is missing\. A data set is a folder with imgs/.*`sscloud sample`"):
        open_dataset(tmp_path)
    (tmp_path / "imgs").mkdir()
    with pytest.raises(DatasetError, match=r"masks is missing"):
        open_dataset(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DatasetError, match=r"imgs holds no images \(\.bmp, \.jpeg"):
        open_dataset(tmp_path)


def test_too_small_at_the_scale(make_dataset: MakeDataset) -> None:
    with pytest.raises(DatasetError, match=r"128x64 at scale 0\.2 is 25x12; the network needs at least 16 pixels"):
        cache(make_dataset(1), scale=0.2)


def test_labels_yaml(make_dataset: MakeDataset) -> None:
    root = make_dataset(1)
    (root / "labels.yaml").write_text("labels: [{name: Земля, id: 300}]\n", encoding="utf-8")
    with pytest.raises(SchemaError, match=r"labels\.yaml: 'id' of label 'Земля' must be a whole number from 0 to 255"):
        open_dataset(root)
    with pytest.raises(SchemaError, match=r"other\.yaml cannot be read"):
        open_dataset(root, labels=root / "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", r"dataset\.yaml cannot be read as YAML"),
        ("colour: red", r"expected the keys \['azimuth', 'elevation', 'encoding'\], found \{'colour': 'red'\}"),
        ("just text", r"expected the keys"),
        ("encoding: depth", r"'encoding' is normals or rgb, found 'depth'"),
        ("elevation: [-90, 90]", r"'elevation' runs from the top down"),
        ("elevation: 90", r"Expected elevation: \[90, -90\]"),
        ("azimuth: {direction: 2, column_0: 0}", r"Expected elevation.* azimuth: \{direction: 1, column_0: 0\.0\}"),
        ("azimuth: {direction: 1}", r"'column_0'"),
    ],
)
def test_dataset_yaml_errors(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "dataset.yaml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(DatasetError, match=message):
        read_facts(file)


def test_dataset_yaml(tmp_path: Path) -> None:
    file = tmp_path / "dataset.yaml"
    assert read_facts(file) == Facts()
    file.write_text("encoding: rgb\nelevation: [90, -60]\nazimuth: {direction: -1, column_0: 90}\n", encoding="utf-8")

    expected = Facts(encoding="rgb", elevation=(90.0, -60.0), azimuth=Azimuth(direction=-1, column_0=90.0))
    assert read_facts(file) == expected


def test_cache_holds_scaled_pictures(make_dataset: MakeDataset) -> None:
    first = cache(make_dataset(2))[0]

    assert np.load(first.image).shape == (32, 64, 3)
    mask = np.load(first.mask)
    assert mask.shape == (32, 64)
    assert mask[0, 0] == 0
    assert mask[-1, 0] == 2
    assert sum(first.pixels.values()) == 64 * 128
    assert first.pixels[5] == 20 * 24


def test_cache_is_made_once(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_dataset(3)
    before = cache(root)

    def refuse(path: Path) -> None:
        pytest.fail(f"{path} was decoded again")

    monkeypatch.setattr(dataset, "read_image", refuse)
    monkeypatch.setattr(dataset, "read_label_map", refuse)
    assert cache(root) == before


def test_cache_follows_changes(make_dataset: MakeDataset) -> None:
    root = make_dataset(2)
    before = cache(root)
    file = root / "masks/1_normals.png"
    Image.fromarray(np.full((64, 128), 65, np.uint8)).save(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    after = cache(root)

    assert after[0].pixels == {65: 64 * 128}
    assert (np.load(after[0].mask) == 65).all()
    assert after[0].digest != before[0].digest
    assert after[1] == before[1]
    assert snapshot_id(after) != snapshot_id(before)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_interrupted_cache_leaves_no_half_entries(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    root = make_dataset(1)
    real, calls = dataset.atomic_write, []

    def stop(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == write:
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "atomic_write", stop)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            cache(root)
    assert len(calls) == write
    assert not list((root / ".cache").glob("*.json"))
    (item,) = cache(root)
    assert np.load(item.image).shape == (32, 64, 3)
    assert np.load(item.mask).shape == (32, 64)


def test_snapshot_knows_contents_not_order() -> None:
    items = [cached("a", "1"), cached("b", "2"), cached("c", "3")]

    assert snapshot_id(items) == snapshot_id(items[::-1])
    assert len(snapshot_id(items)) == 16
    assert snapshot_id(items) != snapshot_id([*items[:2], cached("c", "4")])
    assert snapshot_id(items) != snapshot_id(items[:2])
    assert snapshot_id(items) != snapshot_id([*items[:2], cached("d", "3")])


def test_class_shares_leave_void_out(make_dataset: MakeDataset) -> None:
    schema = open_dataset(make_dataset(1)).schema

    shares = class_shares([cached("a", pixels={0: 10, 2: 30, 255: 500}), cached("b", pixels={6: 60})], schema)
    np.testing.assert_allclose(shares, [0.1, 0.3, 0, 0.6, 0, 0])
    assert (class_shares([cached("a", pixels={255: 5})], schema) == 0).all()


@pytest.mark.parametrize("percent", [0, 1, 10, 50, 94])
def test_split_sizes(percent: float) -> None:
    items = [cached(f"{n}_normals") for n in range(1000)]

    training, validation = split(items, percent)

    assert abs(len(validation) - 10 * percent) < 50  # three standard deviations of a fair draw
    assert sorted(item.name for item in training + validation) == sorted(item.name for item in items)


def test_each_part_has_an_item() -> None:
    items = [cached("a"), cached("b")]
    for percent in (0.001, 50, 99.999):
        assert [len(part) for part in split(items, percent)] == [1, 1]


def test_new_items_move_no_old_ones() -> None:
    items = [cached(f"{n}_normals", str(n)) for n in range(200)]
    held_out = {item.name for item in split(items, 10)[1]}

    assert {item.name for item in split(items[::-1], 10)[1]} == held_out
    for count in (60, 100, 150):
        part = items[:count]
        assert {item.name for item in split(part, 10)[1]} == held_out & {item.name for item in part}


def test_split_that_leaves_nothing() -> None:
    with pytest.raises(DatasetError, match=r"1 panorama\(s\) with 10 % for validation leave none.*--validation 0"):
        split([cached("a")], 10)
    assert split([cached("a")], 0) == ([cached("a")], [])


def order(size: int, epoch: int, **options: int) -> list[tuple[int, int]]:
    sampler = EpochSampler(size, **{"seed": 7, **options})
    sampler.set_epoch(epoch)
    return list(sampler)


def test_sampler_has_another_order_every_epoch() -> None:
    first, second = order(20, 0), order(20, 1)

    assert sorted(first) == [(0, place) for place in range(20)]
    assert sorted(second) == [(1, place) for place in range(20)]
    assert [place for _, place in second] != [place for _, place in first]
    assert order(20, 1) == second
    assert order(20, 0, seed=8) != first


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_sampler_deals_everything_out(world_size: int, size: int) -> None:
    parts = [order(size, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    lengths = {len(EpochSampler(size, seed=7, rank=rank, world_size=world_size)) for rank in range(world_size)}

    assert {len(part) for part in parts} == lengths == {-(-size // world_size)}
    dealt = [index for part in parts for index in part]
    assert set(dealt) == {(3, place) for place in range(size)}
    if size % world_size == 0:
        assert len(dealt) == len(set(dealt))


def test_sampler_replays_a_share_of_what_is_known() -> None:
    known = {0, 1, 2, 3, 4, 5}
    sampler = EpochSampler(10, seed=7, known=known, replay=1 / 3)
    epochs = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        epochs.append([place for _, place in sampler])

    assert len(sampler) == 6
    assert all(len(set(places)) == 6 and {6, 7, 8, 9} < set(places) for places in epochs)
    assert {place for places in epochs for place in places} == set(range(10))  # another share every time
    assert len(EpochSampler(3, seed=7, known={0, 1, 2}, replay=0.0)) == 1
    assert len(EpochSampler(10, seed=7, known=known, replay=0.0)) == 4


def test_panoramas(make_dataset: MakeDataset) -> None:
    root = make_dataset(2)
    items, schema = cache(root), open_dataset(root).schema
    plain = Panoramas(items, schema)

    batch = plain[1]

    assert len(plain) == 2
    assert (tuple(batch.images.shape), str(batch.images.dtype)) == ((1, 3, 32, 64), "torch.uint8")
    assert (tuple(batch.class_maps.shape), str(batch.class_maps.dtype)) == ((1, 32, 64), "torch.uint8")
    assert (batch.origins.tolist(), batch.whole_hw) == ([[0.0, 0.0]], (32, 64))
    assert (batch.images[0].permute(1, 2, 0).numpy() == np.load(items[1].image)).all()
    assert (schema.label_map(batch.class_maps[0].numpy()) == np.load(items[1].mask)).all()
    together = collate([plain[0], batch])
    assert tuple(together.images.shape) == (2, 3, 32, 64)
    assert (together.draws[1:] == batch.draws).all()
    assert [len(part.images) for part in together.parts(1)] == [1, 1]


def test_draws_depend_on_seed_and_index_only(make_dataset: MakeDataset) -> None:
    root = make_dataset(2)
    items, schema = cache(root), open_dataset(root).schema

    drawn = [
        tuple(Panoramas(items, schema, seed=seed)[index].draws[0].tolist())
        for seed, index in ((1, 0), (1, 1), (1, (1, 0)), (1, (1, 1)), (1, (1, 1)), (1, (0, 0)), (2, 0))
    ]

    assert drawn[4:6] == [drawn[3], drawn[0]]
    assert len(set(drawn)) == 5  # others for every epoch, place and seed
    assert all(0 <= number < 1 for numbers in drawn for number in numbers)


def test_no_returns_are_void_where_the_schema_says_so(make_dataset: MakeDataset) -> None:
    root = make_dataset(1)
    items, schema = cache(root), open_dataset(root).schema
    black = np.load(items[0].image).max(axis=2) == 0

    kept = Panoramas(items, schema)[0].class_maps[0].numpy()
    void = Panoramas(items, replace(schema, no_return_void=True))[0].class_maps[0].numpy()
    colours = Panoramas(items, replace(schema, no_return_void=True), encoding="rgb")[0].class_maps[0].numpy()

    assert 0 < black.sum() < black.size
    assert (void == np.where(black, 255, kept)).all()
    assert (kept < 255).all()
    assert (colours == kept).all()  # black is a colour


def freeze(root: Path, *, pinned: dict[str, Split] | None = None, **plan: Any) -> Manifest:
    """Take the folder over into a manifest, every panorama a group of its own."""
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(**{"group_by": "image", **plan}), pinned=pinned)
        writer.commit()
        return writer.manifest


def names(items: Iterable[Item]) -> list[str]:
    return [item.name for item in items]


def test_items_are_the_manifests(make_dataset: MakeDataset, caplog: pytest.LogCaptureFixture) -> None:
    root = make_dataset(11)
    manifest = freeze(root)
    assert not caplog.records
    Image.new("L", (8, 8)).save(root / "masks/own.png")
    Image.new("RGB", (8, 8)).save(root / "imgs/own.jpg")

    found = open_dataset(root)

    assert names(found.items) == [f"{n}_normals" for n in range(1, 12)]
    assert found.manifest == manifest
    assert {item.name: item.split for item in found.items} == {item.name: item.split for item in manifest.items}
    (record,) = caplog.records
    assert "2 picture(s) that manifest.json does not name are left out: imgs/own.jpg, masks/own.png." in record.message
    (root / "labels.yaml").unlink()
    assert open_dataset(root).schema == manifest.schema


def test_files_that_do_not_fit_the_manifest(make_dataset: MakeDataset) -> None:
    root = make_dataset(4)
    freeze(root)
    (root / "masks/1_normals.png").unlink()
    Image.new("RGB", (64, 32)).save(root / "imgs/2_normals.png")

    with pytest.raises(DatasetError, match=r"cannot be used, 2 problem\(s\)") as error:
        open_dataset(root)

    message = str(error.value)
    assert "masks/1_normals.png cannot be read: No such file" in message
    assert "imgs/2_normals.png: is 64x32, but manifest.json says 128x64: run the same fetch or convert" in message


def test_files_changed_by_hand_are_found_when_they_are_read(make_dataset: MakeDataset) -> None:
    root = make_dataset(3)
    freeze(root)
    assert len(cache(root)) == 3
    Image.fromarray(np.full((64, 128), 65, np.uint8)).save(root / "masks/2_normals.png")
    Image.fromarray(np.full((64, 128, 3), 65, np.uint8)).save(root / "imgs/3_normals.png")

    with pytest.raises(DatasetError, match=r"cannot be used, 2 problem\(s\)") as error:
        cache(root)

    assert "masks/2_normals.png: was changed by hand since it was fetched or converted" in str(error.value)
    assert "imgs/3_normals.png: was changed by hand" in str(error.value)


def test_opening_finishes_a_commit(make_dataset: MakeDataset) -> None:
    root = make_dataset(2)
    freeze(root, validation=50, test=0)
    (root / ".staged/masks").mkdir(parents=True)
    (root / "masks/1_normals.png").rename(root / ".staged/masks/1_normals.png")

    assert names(open_dataset(root).items) == ["1_normals", "2_normals"]
    assert (root / "masks/1_normals.png").is_file()
    assert not (root / ".staged").exists()


def test_snapshot_of(make_dataset: MakeDataset) -> None:
    root = make_dataset(3)
    items = cache(root)
    assert snapshot_of(open_dataset(root), items) == snapshot_id(items)
    manifest = freeze(root)
    assert snapshot_of(open_dataset(root), items[:1]) == manifest.snapshot


def test_learning_parts_of_a_folder_are_a_draw_by_name(make_dataset: MakeDataset) -> None:
    found = open_dataset(make_dataset(8))

    for asked, percent in ((None, 10), (40.0, 40)):
        assert learning_parts(found, asked) == split(found.items, percent)


def test_learning_parts_are_the_frozen_splits(make_dataset: MakeDataset) -> None:
    root = make_dataset(10)
    freeze(root, validation=20, test=30)
    found = open_dataset(root)

    training, validation = learning_parts(found)

    assert (len(training), len(validation)) == (5, 2)
    assert {item.split for item in training} == {"train"}
    assert {item.split for item in validation} == {"validation"}
    with pytest.raises(ConfigError, match=r"--validation 10 cannot be used: the splits of .* are frozen .*Leave"):
        learning_parts(found, 10.0)
    with pytest.raises(DatasetError, match=r"no panorama is in the split train"):
        learning_parts(replace(found, items=tuple(validation)))


def test_panoramas_without_a_split_yet(make_dataset: MakeDataset) -> None:
    root = make_dataset(4)
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        writer.commit()
    with pytest.raises(
        DatasetError, match=r"4 of 4 panoramas have no split yet \(1_normals, .*was interrupted\. Run it"
    ):
        learning_parts(open_dataset(root))

    freeze(root)
    other = make_dataset(5, name="other")
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        image = (other / "imgs/5_normals.png").read_bytes()
        label_map = read_label_map(other / "masks/5_normals.png")
        item, mask = make_item(
            image_name="new.png",
            image=image,
            label_map=label_map,
            source_map=label_map,
            source={"kind": "cvat"},
            recipe="",
            group="",
        )
        writer.stage(item, image=image, mask=mask)
        writer.commit()
    with pytest.raises(DatasetError, match=r"1 of 5 panoramas have no split yet \(new\)"):
        learning_parts(open_dataset(root))


def test_too_few_groups_are_split_by_name_but_never_the_pinned(make_dataset: MakeDataset) -> None:
    root = make_dataset(6)
    freeze(root, group_by="normals", pinned={"3_normals": "test"})
    found = open_dataset(root)

    training, validation = learning_parts(found)

    assert sorted(names([*training, *validation])) == [f"{n}_normals" for n in (1, 2, 4, 5, 6)]
    assert len(validation) == 1
    with pytest.raises(DatasetError, match=r"holds 6 panoramas, all for test: none to train on"):
        learning_parts(replace(found, items=tuple(replace(item, split="test") for item in found.items)))


def test_parts_to_measure_on(make_dataset: MakeDataset) -> None:
    root = make_dataset(10)
    plain = open_dataset(root)
    assert part(plain, None) == (plain, "all")
    with pytest.raises(
        DatasetError, match=r"no panoramas in the split test \(it has no frozen splits\)\. Name another"
    ):
        part(plain, "test")
    freeze(root, validation=20, test=30)
    found = open_dataset(root)

    assert part(found, "all") == (found, "all")
    chosen, name = part(found, None)
    assert name == "test"
    assert [item.split for item in chosen.items] == ["test"] * 3
    assert len(part(found, "validation")[0].items) == 2
    with pytest.raises(DatasetError, match=r"in the split test \(it has train, validation\)"):
        part(replace(found, items=tuple(item for item in found.items if item.split != "test")), "test")
