"""LabelSchema: every rule of the file, names, indices, colours, CVAT's spec, round trips."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sscloud.errors import SchemaError
from sscloud.labels import VOID, Label, LabelSchema, count_ids

A: dict[str, Any] = {"name": "Земля", "id": 2, "color": "#010203"}
B: dict[str, Any] = {"name": "Здание", "id": 6, "aliases": ["Дом", "house"], "color": "#0a0B0c"}


def schema(*labels: object, **more: object) -> LabelSchema:
    return LabelSchema.from_dict({"labels": list(labels), **more}, source="here")


class TestDefault:
    def test_is_the_schema_of_the_users(self) -> None:
        found = [(label.name, label.id, label.aliases, label.background) for label in LabelSchema.default().labels]
        assert found == [
            ("Фон", 0, ("_background_", "background"), True),
            ("Земля", 2, (), False),
            ("Растительность", 5, (), False),
            ("Здание", 6, (), False),
            ("Конструкции", 65, (), False),
            ("Обстановка", 66, ("Транспорт", "Человек"), False),
        ]
        assert LabelSchema.default().void_ids == {255}

    def test_colours_differ(self) -> None:
        assert len({label.color for label in LabelSchema.default().labels}) == 6


class TestRules:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, "here: the schema must be a mapping of keys to values, found NoneType"),
            ([A], "here: the schema must be a mapping of keys to values, found list"),
            ({}, "'labels' must be a list with at least one label, found None"),
            ({"labels": []}, r"'labels' must be a list with at least one label, found \[\]"),
            ({"labels": {"a": 1}}, "'labels' must be a list"),
            (
                {"labels": [A], "classes": 3},
                r"the schema has unknown keys \['classes'\]; known are \['labels', 'no_return', 'void'\]",
            ),
            ({"labels": [A], "no_return": "black"}, "'no_return' says.*expected one of label, void, found 'black'"),
            ({"labels": [A], "no_return": None}, "'no_return' says.*found None"),
            ({"labels": [A], "no_return": ["void"]}, r"'no_return' says.*found \['void'\]"),
            ({"labels": [A], 7: 3}, r"the schema has unknown keys \['7'\]"),
            ({"labels": ["Земля"]}, "label 1 must be a mapping of keys to values, found str"),
            ({"labels": [A, {**B, "colour": "#010203"}]}, r"label 2 has unknown keys \['colour'\]"),
            ({"labels": [{"id": 2}]}, r"label 1 needs a 'name' \(text\), found None"),
            ({"labels": [{**A, "name": " \t"}]}, r"label 1 needs a 'name' \(text\), found ' \\t'"),
            ({"labels": [{**A, "name": 5}]}, r"label 1 needs a 'name' \(text\), found 5"),
            ({"labels": [{"name": "Земля"}]}, "'id' of label 'Земля' must be a whole number from 0 to 255.*found None"),
            ({"labels": [{**A, "id": -1}]}, "'id' of label 'Земля' must be a whole number.*found -1"),
            ({"labels": [{**A, "id": 256}]}, "'id' of label 'Земля' must be a whole number.*found 256"),
            ({"labels": [{**A, "id": 2.0}]}, r"must be a whole number.*found 2\.0"),
            ({"labels": [{**A, "id": "2"}]}, "must be a whole number.*found '2'"),
            ({"labels": [{**A, "id": True}]}, "must be a whole number.*found True"),
            ({"labels": [A, {**B, "id": 2}]}, "the id 2 is used twice, by 'Земля' and 'Здание'.*'aliases'"),
            ({"labels": [A, {**B, "name": "Земля"}]}, "the name or alias 'Земля' is used twice"),
            ({"labels": [A, {**B, "name": " зЕмля"}]}, "'зЕмля' is used twice.*'Земля' and 'зЕмля'"),
            ({"labels": [A, {**B, "aliases": ["ЗЕМЛЯ"]}]}, "'ЗЕМЛЯ' is used twice.*'Земля' and 'Здание'"),
            ({"labels": [{**A, "aliases": ["дом"]}, B]}, "'Дом' is used twice.*'Земля' and 'Здание'"),
            ({"labels": [{**A, "aliases": ["x", "X"]}]}, "'X' is used twice.*'Земля' and 'Земля'"),
            ({"labels": [{**A, "aliases": ["земля"]}]}, "is used twice"),
            ({"labels": [{**A, "name": "a b"}, {**B, "name": "A \t b"}]}, "is used twice"),
            ({"labels": [{**A, "aliases": "Дом"}]}, "'aliases' of label 'Земля' must be a list of texts, found 'Дом'"),
            ({"labels": [{**A, "aliases": [3]}]}, r"'aliases' of label 'Земля' must be a list of texts, found \[3\]"),
            ({"labels": [{**A, "aliases": [" "]}]}, "'aliases' of label 'Земля' must be a list of texts"),
            ({"labels": [{**A, "background": 1}]}, "'background' of label 'Земля' must be true or false, found 1"),
            (
                {"labels": [{**A, "background": True}, {**B, "background": True}]},
                r"2 labels are marked as background \(Земля, Здание\)",
            ),
            ({"labels": [A], "void": 255}, "'void' must be a list of label ids, found 255"),
            ({"labels": [A], "void": [300]}, "'void' must be a whole number from 0 to 255.*found 300"),
            ({"labels": [A], "void": ["2"]}, "'void' must be a whole number"),
            ({"labels": [A], "void": [2]}, "every label is void"),
            ({"labels": [{**A, "id": 255}]}, "every label is void"),
        ],
    )
    def test_a_broken_rule_is_named(self, data: object, message: str) -> None:
        with pytest.raises(SchemaError, match=message):
            LabelSchema.from_dict(data, source="here")

    @pytest.mark.parametrize(
        "color", ["3f9b46", "#3f9b4", "#3f9b466", "#3f9b4g", "#３f9b46", "green", 123456, [1, 2, 3], None, "#3f9b46\n"]
    )
    def test_a_colour_has_one_form(self, color: object) -> None:
        with pytest.raises(SchemaError, match=r"'color' of label 'Земля' must look like .#3f9b46. .in quotes., found"):
            schema({**A, "color": color})

    def test_colours_are_rgb_in_either_case(self) -> None:
        assert [label.color for label in schema(A, B).labels] == [(1, 2, 3), (10, 11, 12)]

    def test_a_label_without_a_colour_gets_one_of_its_own(self) -> None:
        labels = schema(*({"name": f"n{i}", "id": i} for i in range(255))).labels
        assert len({label.color for label in labels}) == 255
        assert labels[1].color == (128, 0, 0)  # as PASCAL VOC
        assert labels[6].color == (0, 128, 128)

    def test_the_extreme_ids_are_allowed(self) -> None:
        assert [label.id for label in schema({**A, "id": 0}, {**B, "id": 255}).labels] == [0, 255]

    def test_white_space_in_names_is_tidied(self) -> None:
        assert schema({**A, "name": "  Малые \t архитектурные\nформы "}).labels[0].name == "Малые архитектурные формы"


class TestNoReturn:
    def test_keeps_its_label_unless_the_schema_says_void(self) -> None:
        assert not schema(A).no_return_void
        assert not schema(A, no_return="label").no_return_void
        assert schema(A, no_return="void").no_return_void

    @pytest.mark.parametrize("value", ["label", "void"])
    def test_survives_a_file(self, tmp_path: Path, value: str) -> None:
        original = schema(A, B, no_return=value)
        (tmp_path / "labels.yaml").write_text(original.to_yaml(), encoding="utf-8")
        assert LabelSchema.from_yaml(tmp_path / "labels.yaml") == original
        assert ("no_return" in original.to_dict()) == (value == "void")


class TestFile:
    def test_utf8_with_and_without_a_byte_order_mark(self, tmp_path: Path) -> None:
        text = LabelSchema.default().to_yaml()
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / "labels.yaml").write_bytes(mark + text.encode())
            assert LabelSchema.from_yaml(tmp_path / "labels.yaml") == LabelSchema.default()

    def test_a_file_of_another_encoding(self, tmp_path: Path) -> None:
        (tmp_path / "labels.yaml").write_bytes("labels: [{name: Земля, id: 2}]".encode("cp1251"))
        with pytest.raises(SchemaError, match=r"labels\.yaml is not UTF-8 text\. Save it as UTF-8"):
            LabelSchema.from_yaml(tmp_path / "labels.yaml")

    @pytest.mark.parametrize(
        "text",
        ["labels: [", "a: b: c", "labels:\n\t- x", "x: !!python/object/apply:os.getcwd []", "x: 2001-99-99"],
    )
    def test_a_file_that_is_not_yaml(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "labels.yaml").write_text(text)
        with pytest.raises(SchemaError, match=r"labels\.yaml is not valid YAML"):
            LabelSchema.from_yaml(tmp_path / "labels.yaml")

    def test_a_missing_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SchemaError, match=r"no\.yaml cannot be read: No such file"):
            LabelSchema.from_yaml(tmp_path / "no.yaml")
        with pytest.raises(SchemaError, match="cannot be read: Is a directory"):
            LabelSchema.from_yaml(tmp_path)

    def test_errors_name_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "labels.yaml").write_text("")
        with pytest.raises(SchemaError, match=r"labels\.yaml: the schema must be a mapping"):
            LabelSchema.from_yaml(tmp_path / "labels.yaml")


class TestNames:
    @pytest.mark.parametrize("name", ["Здание", "здание", "ЗДАНИЕ", "  здание ", "дом", "HOUSE", "House\n"])
    def test_case_and_white_space_do_not_count(self, name: str) -> None:
        found = schema(A, B).find(name)
        assert found is not None
        assert found.id == 6

    def test_runs_of_white_space_are_one(self) -> None:
        found = schema({**A, "name": "малые формы", "aliases": ["small  forms"]})
        assert all(found.find(name) for name in ("Малые   формы", "МАЛЫЕ\t\nформы", "small forms", " SMALL\u00a0forms"))
        assert found.find("малыеформы") is None

    def test_unknown_names_and_ids_are_none(self) -> None:
        assert schema(A).find("нет") is None
        assert schema(A).by_id(3) is None

    def test_by_id(self) -> None:
        assert schema(A, B).by_id(6) == Label(name="Здание", id=6, aliases=("Дом", "house"), color=(10, 11, 12))

    def test_background(self) -> None:
        assert schema(A, B).background is None
        background = schema(A, {**B, "background": True}).background
        assert background is not None
        assert background.name == "Здание"


class TestMaps:
    SCHEMA = schema(
        {"name": "c", "id": 66}, {"name": "a", "id": 0}, {"name": "v", "id": 7}, {"name": "b", "id": 5}, void=[7]
    )

    def test_class_indices_follow_the_order_of_the_schema_and_skip_void(self) -> None:
        assert self.SCHEMA.class_ids == (66, 0, 5)
        assert [label.name for label in self.SCHEMA.classes] == ["c", "a", "b"]

    def test_class_map(self) -> None:
        label_map = np.array([[66, 0, 5], [7, 255, 66]], np.uint8)
        class_map = self.SCHEMA.class_map(label_map)
        assert class_map.dtype == np.uint8
        assert class_map.tolist() == [[0, 1, 2], [255, 255, 0]]

    def test_round_trip_turns_every_void_into_255(self) -> None:
        label_map = np.array([[66, 0, 5], [7, 255, 66]], np.uint8)
        back = self.SCHEMA.label_map(self.SCHEMA.class_map(label_map))
        assert back.dtype == np.uint8
        assert back.tolist() == [[66, 0, 5], [255, 255, 66]]

    def test_round_trip_of_random_maps_of_the_default(self) -> None:
        rng = np.random.default_rng(0)
        default = LabelSchema.default()
        label_map = rng.choice(np.array([*default.class_ids, VOID], np.uint8), (64, 128))
        assert np.array_equal(default.label_map(default.class_map(label_map)), label_map)

    def test_what_is_no_class_becomes_void(self) -> None:
        assert self.SCHEMA.label_map(np.array([[3, 200, 255]], np.uint8)).tolist() == [[255, 255, 255]]

    def test_unknown_ids_are_named(self) -> None:
        label_map = np.array([[66, 1], [0, 200]], np.uint8)
        assert self.SCHEMA.unknown_ids(label_map) == [1, 200]
        with pytest.raises(SchemaError, match=re.escape("ids [1, 200] that the schema lacks; it knows [0, 5, 7, 66]")):
            self.SCHEMA.class_map(label_map)

    def test_colorize(self) -> None:
        picture = schema(A, B).colorize(np.array([[2, 6, 9, 255]], np.uint8))
        assert picture.dtype == np.uint8
        assert picture.shape == (1, 4, 3)
        assert picture.tolist() == [[[1, 2, 3], [10, 11, 12], [128, 128, 128], [128, 128, 128]]]

    def test_count_ids(self) -> None:
        counts = count_ids(np.array([[1, 1, 255], [0, 1, 0]], np.uint8))
        assert counts.shape == (256,)
        assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {0: 2, 1: 3, 255: 1}


class TestSpec:
    def test_leaves_background_and_void_out(self) -> None:
        found = schema({**A, "background": True}, B, {"name": "v", "id": 7}, void=[7])
        assert found.cvat_spec() == [{"name": "Здание", "type": "mask", "attributes": []}]

    def test_declares_text_attributes(self) -> None:
        spec = LabelSchema.default().cvat_spec(["model", "confidence"])
        assert [entry["name"] for entry in spec] == ["Земля", "Растительность", "Здание", "Конструкции", "Обстановка"]
        for entry in spec:
            assert entry["type"] == "mask"
            assert entry["attributes"] == [
                {"name": "model", "input_type": "text", "values": [""]},
                {"name": "confidence", "input_type": "text", "values": [""]},
            ]


class TestRoundTrip:
    @pytest.mark.parametrize(
        "original",
        [
            LabelSchema.default(),
            schema(A, B, {"name": "v", "id": 7, "background": True}, void=[7, 9]),
            schema({"name": "yes", "id": 1}, {"name": "'кавычки': \"#\"", "id": 3, "aliases": ["null", "1"]}),
        ],
    )
    def test_yaml_and_dict(self, original: LabelSchema, tmp_path: Path) -> None:
        (tmp_path / "labels.yaml").write_text(original.to_yaml(), encoding="utf-8")
        assert LabelSchema.from_yaml(tmp_path / "labels.yaml") == original
        assert LabelSchema.from_dict(original.to_dict(), source="again") == original

    def test_yaml_is_readable(self) -> None:
        text = LabelSchema.default().to_yaml()
        assert "- name: Фон\n  id: 0\n" in text
        assert "\\u" not in text
