"""The simulation of choosing what to label, small: it runs, and repeats itself."""

import numpy as np
import pytest

from benchmarks import selection


def test_needed_panoramas_are_read_between_the_rounds() -> None:
    assert selection.needed([4, 7, 10], [0.2, 0.4, 0.5], 0.3) == pytest.approx(5.5)
    assert selection.needed([4, 7, 10], [0.2, 0.4, 0.5], 0.1) == 4
    assert selection.needed([4, 7, 10], [0.2, 0.4, 0.5], 0.6) is None


def test_summary_in_words_and_a_curve() -> None:
    runs = {"random": [[0.2, 0.3], [0.2, 0.4]], "entropy": [[0.2, 0.5], [0.2, 0.3]]}

    found = selection.summary(runs, count=3)

    assert found["labelled"] == [4, 7]
    assert found["target"] == pytest.approx(0.35)
    assert found["better"] == {"entropy": 1}
    assert found["needed"]["entropy"] == pytest.approx(4 + 3 * 0.15 / 0.2)
    assert selection.table(found).splitlines()[-1] == "| entropy | 0.200 ± 0.000 | 0.400 ± 0.141 |"
    assert found["gain"]["entropy"] == pytest.approx(0.05)
    assert found["intervals"]["entropy"]["gain"] == pytest.approx([-0.1, 0.2])
    assert found["intervals"]["entropy"]["needed"] == [pytest.approx(5), None]
    [line] = [line for line in selection.needed_lines(found) if "entropy" in line]
    assert "reached with 6.2 panoramas (95% interval 5.0 to more than 7)" in line
    assert "+0.050 from random's (-0.100 to +0.200), above it for 1 of 2 seeds" in line
    assert selection.curve(found).count("<polyline") == 2


@pytest.mark.slow
def test_what_is_selected_teaches_more_than_what_is_drawn_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim itself, small: the mean over fixed seeds of the difference with the same seed."""
    monkeypatch.setattr(selection, "STREETS", (("street", 8),))
    monkeypatch.setattr(selection, "SINGLES", {"suburb": 2, "yard": 3, "street": 1})
    said: list[str] = []

    runs = selection.simulate(
        ["random", "entropy"], seeds=range(3), rounds=1, count=3, steps=100, unseen=6, say=said.append
    )

    random, entropy = np.array(runs["random"]), np.array(runs["entropy"])
    assert random.shape == entropy.shape == (3, 2)
    assert random[:, 0].tolist() == entropy[:, 0].tolist()
    assert (entropy - random)[:, 1].mean() > 0
    places = [int(line.split(" of ")[1].split()[0]) for line in said if "entropy" in line and " of " in line]
    assert places == [4, 4, 4]  # what is chosen is no further scan of the labelled street
