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
    assert "reached with 6.2 panoramas" in selection.needed_lines(found)[1]
    assert selection.curve(found).count("<polyline") == 2


@pytest.mark.slow
def test_a_small_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "STREETS", (("street", 6),))
    monkeypatch.setattr(selection, "SINGLES", {"suburb": 1, "yard": 2})
    said: list[str] = []

    runs = selection.simulate(["random", "entropy"], seeds=[0], rounds=1, count=2, steps=60, unseen=3, say=said.append)

    random, entropy = runs["random"][0], runs["entropy"][0]
    assert random[0] == entropy[0]
    assert np.all(np.isfinite([random, entropy]))
    assert [line.split()[2] for line in said] == ["at", "random", "entropy"]
    places = [int(line.split(" of ")[1].split()[0]) for line in said[1:]]
    assert places[1] == 3  # what is chosen is no further scan of the labelled street
