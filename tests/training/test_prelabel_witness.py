"""Whether everything in a job is a run's, by what was seen in it."""

from typing import Any

import pytest

from training.cvat import ProjectLabel
from training.prelabel_witness import SOON, Witness

GROUND, FOREIGN, MODEL = 5, 6, 50
FRAMES = tuple(range(250))


def _shape(number: int, frame: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": number,
        "frame": frame,
        "type": "mask",
        "label_id": GROUND,
        "source": "auto",
        "points": [0.0, 1.0, float(number), 0.0, 0.0, 0.0],
        "attributes": [{"spec_id": MODEL, "value": "Улица v3"}],
        **fields,
    }


def _witness(*looks: list[dict[str, Any]], seconds: float = 1.0, others: bool = False) -> Witness:
    label = ProjectLabel(
        id=GROUND, name="Земля", color="", type="any", attributes={"model": MODEL}, text_attributes=frozenset(),
        defaults={},
    )  # fmt: skip
    witness = Witness("t0", frames=FRAMES, labels=[label])
    for number, shapes in enumerate(looks, 1):
        witness.see(f"t{number}", shapes, others=others, seconds=seconds)
    return witness


FIRST = [_shape(10, 0), _shape(11, 0), _shape(12, 100)]
SECOND = [*FIRST, _shape(20, 101), _shape(21, 200)]
THIRD = [*SECOND, _shape(30, 249)]


def test_three_writes() -> None:
    witness = _witness(FIRST, SECOND, THIRD)
    assert witness.doubt == ""
    assert witness.updated == "t3"
    assert witness.count == 6
    assert {frame: len(shapes) for frame, shapes in witness.first.items()} == {0: 2, 100: 1, 101: 1, 200: 1, 249: 1}


@pytest.mark.parametrize(
    ("looks", "doubt"),
    [
        ([FIRST, FIRST], "was changed by somebody"),
        ([FIRST, FIRST[1:]], "was changed by somebody"),
        ([FIRST, [FIRST[0], {**FIRST[1], "points": [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]}, FIRST[2]]], "was changed by"),
        ([[*FIRST, _shape(13, 100, source="manual")]], "was drawn in by somebody"),
        ([[*FIRST, _shape(13, 100, label_id=FOREIGN)]], "was drawn in by somebody"),
        ([[*FIRST, _shape(13, 0)]], "that one run"),
        ([[*FIRST, _shape(9, 50)]], "that one run"),
        ([[*FIRST, {**FIRST[2], "id": 13}]], "that one run"),
        ([[*FIRST, _shape(13, 100, attributes=[])]], "that one run"),
        ([FIRST, [*SECOND, _shape(1, 150)]], "that one run"),
        ([FIRST, [*FIRST, _shape(13, 100)]], "that one run"),
        ([SECOND], "could have been changed before"),
    ],
)
def test_what_the_run_cannot_have_done(looks: list[list[dict[str, Any]]], doubt: str) -> None:
    assert doubt in _witness(*looks).doubt
    assert doubt in _witness(*looks, looks[-1]).doubt


def test_what_was_not_watched() -> None:
    assert _witness(FIRST, seconds=SOON).doubt == ""
    assert "could have been changed before" in _witness(FIRST, seconds=SOON + 0.1).doubt
    assert "was changed by somebody" in _witness([], others=True).doubt


def test_what_was_deleted_is_remembered() -> None:
    witness = _witness(FIRST, FIRST[:2])
    assert set(witness.gone()) == {100}


def test_the_version_is_the_one_that_all_shapes_name() -> None:
    other = {"attributes": [{"spec_id": MODEL, "value": "Улица v4"}]}
    assert _witness(FIRST, SECOND).title == "Улица v3"
    assert _witness(FIRST, [*FIRST, _shape(20, 101, **other)]).title == ""
    assert _witness([_shape(10, 0, attributes=[])]).title == ""
    assert _witness().title == ""
