"""The model of a person who corrects: every kind of mistake as a small map, and what is done about it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from cvat_sdk.masks import encode_mask
from numpy.typing import NDArray

from sscloud.labels import VOID
from training.annotations import painting
from training.oracle import Correction, Person, correct
from training.rasterise import rasterise

IDS = {".": 0, "g": 2, "v": 5, "b": 6, "?": VOID}
LABEL_IDS = {11: 0, 12: 2, 15: 5, 16: 6}
"""Number on the server → label id."""
NUMBERS = {label_id: number for number, label_id in LABEL_IDS.items()}

SHARP = Person(speck=2, border=0.0, accepted=0.95, patch=0.2)
"""Somebody who sees more than two pixels, and takes nineteen right ones of twenty."""


def drawn(*rows: str) -> NDArray[np.uint8]:
    """(H, W) uint8 label ids of an ASCII map."""
    return np.array([[IDS[letter] for letter in row] for row in rows], np.uint8)


def shapes_of(*rows: str, names: str = "gvb") -> list[dict[str, Any]]:
    """A pre-label: a mask for each letter, in the order of `names`, with the numbers 1, 2, 3 …"""
    label_map = drawn(*rows)
    present = [letter for letter in names if (label_map == IDS[letter]).any()]
    return [shape(number, label_map == IDS[letter], letter) for number, letter in enumerate(present, 1)]


def shape(number: int, bitmap: NDArray[np.bool_], letter: str, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "type": "mask",
        "frame": 7,
        "label_id": NUMBERS[IDS[letter]],
        "points": [float(value) for value in encode_mask(bitmap)],
        "z_order": 0,
        "rotation": 0.0,
        "occluded": False,
        "outside": False,
        "group": 0,
        "source": "auto",
        "attributes": [{"spec_id": 3, "value": "street v4"}],
        **more,
    }


def fix(raws: Sequence[Mapping[str, Any]], truth: NDArray[np.uint8], person: Person = SHARP) -> Correction:
    found = correct(raws, truth, frame=7, label_ids=LABEL_IDS, background=0, person=person)
    np.testing.assert_array_equal(found.label_map, painted(applied(raws, found), truth.shape))
    assert found.accepted == len(raws) - len(found.updated) - len(found.deleted)
    assert found.changed == np.count_nonzero(found.label_map != painted(raws, truth.shape))
    return found


def applied(raws: Sequence[Mapping[str, Any]], found: Correction) -> list[Mapping[str, Any]]:
    """The frame's shapes afterwards; what was saved again is listed last, as CVAT may do it."""
    gone = {raw["id"] for raw in (*found.updated, *found.deleted)}
    return [*(raw for raw in raws if raw["id"] not in gone), *found.updated, *found.created]


def painted(raws: Sequence[Mapping[str, Any]], size: tuple[int, ...]) -> NDArray[np.uint8]:
    size_hw = (size[0], size[1])
    drawing = painting(raws, label_names={n: str(n) for n in LABEL_IDS}, size_hw=size_hw)
    return rasterise(drawing.shapes, size_hw=size_hw, label_id_of=lambda name: LABEL_IDS[int(name)], fill=0).label_map


GROUND = (
    "..........",
    "..........",
    "gggggggggg",
    "gggggggggg",
)


class TestShapes:
    def test_what_is_right_is_accepted(self) -> None:
        found = fix(shapes_of(*GROUND), drawn(*GROUND))
        assert (found.accepted, found.touched, found.changed) == (1, 0, 0)

    def test_small_mistakes_are_accepted_too(self) -> None:
        truth = drawn("..........", "..........", "gggggggggg", "gggggggggg", "ggggggggg.")
        found = fix(shapes_of("..........", "..........", "gggggggggg", "gggggggggg", "gggggggggg"), truth)
        assert found.touched == 0

    def test_a_large_patch_is_corrected_however_good_the_rest(self) -> None:
        truth = drawn(*["g" * 40] * 9, "g" * 32 + "........")
        raws = shapes_of(*["g" * 40] * 10)
        assert fix(raws, truth, Person(accepted=0.9, border=0, patch=0.03)).touched == 0
        found = fix(raws, truth, Person(accepted=0.9, border=0, patch=0.02))
        assert [raw["id"] for raw in found.updated] == [1]
        np.testing.assert_array_equal(found.label_map, truth)

    def test_the_wrong_label(self) -> None:
        found = fix(shapes_of("...bbb....", *GROUND[1:]), drawn("...vvv....", *GROUND[1:]))
        (changed,) = found.updated
        assert (changed["id"], changed["label_id"], changed["attributes"]) == (2, NUMBERS[5], [])
        assert found.relabelled == 1
        assert changed["points"] == shapes_of("...vvv....", *GROUND[1:])[1]["points"]
        assert changed["source"] == "auto"

    def test_a_wrong_label_and_a_wrong_outline(self) -> None:
        found = fix(shapes_of("..bbbb....", *GROUND[1:]), drawn("...vvvvv..", *GROUND[1:]))
        assert (len(found.updated), found.relabelled, len(found.created)) == (1, 1, 0)
        np.testing.assert_array_equal(found.label_map, drawn("...vvvvv..", *GROUND[1:]))

    def test_too_large(self) -> None:
        truth = drawn("..........", "...bbb....", "gggggggggg")
        raws = shapes_of("..........", "...bbbbb..", "gggggggggg")
        found = fix(raws, truth)
        (changed,) = found.updated
        assert (changed["id"], changed["source"], changed["attributes"]) == (2, "auto", raws[1]["attributes"])
        np.testing.assert_array_equal(found.label_map, truth)

    def test_too_small(self) -> None:
        truth = drawn("..bbbbbb..", "..bbbbbb..", "gggggggggg")
        found = fix(shapes_of("...bbb....", "...bbb....", "gggggggggg"), truth)
        assert [raw["id"] for raw in found.updated] == [2]
        assert not found.created
        np.testing.assert_array_equal(found.label_map, truth)

    def test_two_shapes_that_share_a_border_wrongly(self) -> None:
        truth = drawn("gggggbbbbb", "gggggbbbbb")
        found = fix(shapes_of("gggggggbbb", "gggggggbbb"), truth)
        assert sorted(raw["id"] for raw in found.updated) == [1, 2]
        np.testing.assert_array_equal(found.label_map, truth)

    def test_nothing_is_there(self) -> None:
        found = fix(shapes_of("..bbb.....", *GROUND[1:]), drawn(*GROUND))
        assert [raw["id"] for raw in found.deleted] == [2]

    def test_a_mixture_is_deleted_and_drawn_again(self) -> None:
        truth = drawn("bbb.......", "ggg.......", "vvv.......")
        found = fix(shapes_of("bbb.......", "bbb.......", "bbb......."), truth)
        assert (len(found.deleted), len(found.created)) == (1, 3)
        np.testing.assert_array_equal(found.label_map, truth)

    def test_missing(self) -> None:
        truth = drawn("..bbbb....", *GROUND[1:])
        found = fix(shapes_of(*GROUND), truth)
        (new,) = found.created
        assert "id" not in new
        assert (new["frame"], new["source"], new["label_id"], new["attributes"]) == (7, "manual", NUMBERS[6], [])
        np.testing.assert_array_equal(found.label_map, truth)

    def test_missing_on_a_shape_that_stays_as_it_is(self) -> None:
        truth = drawn(*["g" * 40] * 4, "g" * 20 + "bbb" + "g" * 17, *["g" * 40] * 4)
        found = fix(shapes_of(*["g" * 40] * 9), truth)
        assert (found.accepted, len(found.created)) == (1, 1)
        assert found.created[0]["z_order"] == 1
        np.testing.assert_array_equal(found.label_map, truth)

    def test_things_that_lie_close_together_are_one_mask(self) -> None:
        truth = drawn("b.b......b")
        assert len(fix([], truth, Person(speck=1, reach=100)).created) == 2
        assert len(fix([], truth, Person(speck=1, reach=0)).created) == 3

    def test_a_polygon_is_drawn_again_as_a_mask(self) -> None:
        raws = [shape(1, drawn("g") == 2, "g", type="polygon", points=[0.0, 2, 6, 2, 6, 4, 0, 4])]
        found = fix(raws, drawn(*GROUND))
        assert [raw["id"] for raw in found.deleted] == [1]
        assert [raw["type"] for raw in found.created] == ["mask"]
        np.testing.assert_array_equal(found.label_map, drawn(*GROUND))

    def test_a_polygon_with_another_label_stays_a_polygon(self) -> None:
        raws = [shape(1, drawn("g") == 2, "b", type="polygon", points=[0.0, 2, 10, 2, 10, 4, 0, 4])]
        (changed,) = fix(raws, drawn(*GROUND)).updated
        assert (changed["type"], changed["label_id"]) == ("polygon", NUMBERS[2])

    def test_a_hidden_shape_is_left_alone(self) -> None:
        everything = np.ones((4, 10), np.bool_)
        raws = [
            shape(1, drawn("...bb.....", *["." * 10] * 3) == 6, "b"),
            shape(2, everything, "g", z_order=3),
        ]
        found = fix(raws, drawn(*["g" * 10] * 4))
        assert found.touched == 0

    def test_types_that_cover_nothing_are_nobody_s_business(self) -> None:
        raws = shapes_of(*GROUND)
        points = shape(9, drawn("g") == 2, "g", type="points", points=[1.0, 1.0])
        assert correct([*raws, points], drawn(*GROUND), frame=7, label_ids=LABEL_IDS, background=0).touched == 0


class TestSight:
    def test_specks_are_not_seen(self) -> None:
        truth = drawn("..........", "......bb..", "gggggggggg", "ggvggggggg")
        found = fix([], truth, Person(speck=3, border=0))
        np.testing.assert_array_equal(found.label_map, drawn(*GROUND))

    def test_a_thin_thing_that_runs_askew_is_no_speck(self) -> None:
        truth = drawn("b.........", ".b........", "..b.......", "...b......")
        np.testing.assert_array_equal(fix([], truth, Person(speck=4)).label_map, truth)

    def test_nothing_but_specks(self) -> None:
        assert fix([], drawn("b"), Person(speck=2)).touched == 0

    def test_a_border_beside_its_place_is_left_there(self) -> None:
        truth, raws = drawn("gggggbbbbb", "gggggbbbbb"), shapes_of("ggggggbbbb", "ggggggbbbb")
        assert fix(raws, truth, Person(border=36.0)).touched == 0
        assert fix(raws, truth, SHARP).touched == 2

    def test_a_border_two_pixels_off_is_not_left(self) -> None:
        truth, raws = drawn("gggggbbbbb", "gggggbbbbb"), shapes_of("gggggggbbb", "gggggggbbb")
        assert fix(raws, truth, Person(border=36.0, speck=1)).touched == 2

    def test_a_thin_thing_that_is_missing_is_no_border(self) -> None:
        truth = drawn("gggggbgggg", "gggggbgggg", "gggggbgggg", "gggggbgggg")
        found = fix(shapes_of(*["gggggggggg"] * 4), truth, Person(border=36.0))
        np.testing.assert_array_equal(found.label_map, truth)

    def test_void_stays_as_it_is(self) -> None:
        raws = shapes_of("gggggbbbbb", "gggggbbbbb")
        assert fix(raws, drawn("ggg????bbb", "ggg????bbb")).touched == 0

    def test_void_is_drawn_by_nobody(self) -> None:
        assert fix([], drawn("?" * 10, "?" * 10)).touched == 0


class TestResult:
    def test_seconds_grow_with_the_work(self) -> None:
        truth = drawn("..bbbb....", *GROUND[1:])
        none = fix(shapes_of("..bbbb....", *GROUND[1:]), truth).seconds
        some = fix(shapes_of(*GROUND), truth).seconds
        everything = fix([], truth).seconds
        assert none < some < everything
        slow = fix([], truth, Person(speck=2, border=0, pace=1.0)).seconds
        assert slow > everything

    def test_an_id_that_no_label_draws(self) -> None:
        with pytest.raises(ValueError, match=r"holds the ids \[66\]"):
            correct([], np.full((2, 2), 66, np.uint8), frame=0, label_ids=LABEL_IDS, background=0)

    def test_a_damaged_pre_label_of_a_scene_comes_near_the_truth(self) -> None:
        truth = scene()
        rng = np.random.default_rng(1)
        before = truth.copy()
        for _ in range(25):  # patches of other labels
            y, x = rng.integers(0, 90), rng.integers(0, 180)
            before[y : y + rng.integers(2, 14), x : x + rng.integers(2, 20)] = rng.choice([0, 2, 5, 6])
        before = np.roll(before, 1, axis=1)  # and every border a pixel off
        raws = [
            shape(number, before == label_id, letter)
            for number, (letter, label_id) in enumerate(list(IDS.items())[1:4], 1)
        ]
        found = fix(raws, truth, Person())
        assert np.mean(before == truth) < 0.95
        assert np.mean(found.label_map == truth) > 0.985
        again = fix(applied(raws, _numbered(found)), truth, Person())
        assert again.changed < 0.005 * truth.size


def scene() -> NDArray[np.uint8]:
    """(96, 192): ground, houses, trees with ragged crowns."""
    rng = np.random.default_rng(3)
    truth = np.zeros((96, 192), np.uint8)
    truth[60:] = 2
    for x in (10, 70, 130):
        truth[30:66, x : x + 40] = 6
    rows, columns = np.ogrid[:96, :192]
    for x in (60, 120, 180):
        truth[(rows - 45) ** 2 + (columns - x) ** 2 < rng.uniform(9, 15, truth.shape) ** 2] = 5
    return truth


def _numbered(found: Correction) -> Correction:
    for number, raw in enumerate(found.created, 100):
        raw["id"] = number
    return found
