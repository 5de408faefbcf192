import unicodedata

import pytest

from training.names import MAX_BYTES, dataset_names, safe_name, stem_key


@pytest.mark.parametrize(
    ("outside", "expected"),
    [
        ("1_normals.jpg", "1_normals.jpg"),
        ("улица/двор/1.JPG", "1.JPG"),
        ("C:\\scans\\street.png", "street.png"),
        ("../../etc/passwd", "passwd.jpg"),
        ("/etc/cron.d/job.png", "job.png"),
        ("..", "image.jpg"),
        ("", "image.jpg"),
        ("folder/", "folder.jpg"),
        ("a/ . /", "a.jpg"),
        (".hidden.png", "_hidden.png"),
        (".png", "_png.jpg"),
        ("a\x00b\n\u202ec.png", "a_b__c.png"),
        ('x<>:"|?*.png', "x_______.png"),
        ("CON.jpg", "_CON.jpg"),
        ("com1.v2.png", "_com1.v2.png"),
        ("comet.png", "comet.png"),
        ("scan.v2", "scan.v2.jpg"),
        ("movie.mp4", "movie.mp4.jpg"),
        ("name. .png", "name.png"),
        ("half\ud800.png", "half_.png"),
        (unicodedata.normalize("NFD", "двойной.png"), "двойной.png"),
    ],
)
def test_safe_name(outside: str, expected: str) -> None:
    assert safe_name(outside) == expected
    assert safe_name(expected) == expected


def test_long_names_are_cut_and_told_apart() -> None:
    names = ["п" * 300 + end for end in ("a.png", "b.png")] + ["x" * 300 + ".jpeg", "y" * 300]

    safe = [safe_name(name) for name in names]

    assert len(set(safe)) == 4
    assert all(len(name.encode()) <= MAX_BYTES for name in safe)
    assert all(name.encode().decode() == name for name in safe)
    assert [name.rpartition(".")[2] for name in safe] == ["png", "png", "jpeg", "jpg"]
    assert [safe_name(name) for name in safe] == safe


def test_numbers_keep_names_apart() -> None:
    assert dataset_names(["x/A.jpg", "y/a.png", "z/a.jpg"]) == ["A.jpg", "a_1.png", "a_2.jpg"]
    assert dataset_names(["й.jpg", "q/и\u0306.jpg"]) == ["й.jpg", "й_1.jpg"]
    assert dataset_names(["a/1.jpg", "b/1.jpg", "c/1_1.jpg"]) == ["1.jpg", "1_2.jpg", "1_1.jpg"]
    assert dataset_names(["../1.jpg", "1.jpg"], taken=["1.png", "1_1.jpg"]) == ["1_2.jpg", "1_3.jpg"]


def test_names_do_not_depend_on_which_came_first() -> None:
    wanted = ["a/1.jpg", "b/1.jpg", "c/1.jpg", "d/2.jpg", "e/1_1.jpg"]
    whole = dataset_names(wanted)

    for there in range(len(wanted)):
        rest = [name for place, name in enumerate(wanted) if place != there]
        again = dataset_names(rest, taken=[whole[there]])
        assert sorted(stem_key(name) for name in [*again, whole[there]]) == sorted(stem_key(name) for name in whole)


def test_many_of_one_name() -> None:
    names = dataset_names(["frame.jpg"] * 5000)

    assert names[:2] == ["frame.jpg", "frame_1.jpg"]
    assert names[-1] == "frame_4999.jpg"
