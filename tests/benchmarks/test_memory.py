import pytest

from benchmarks.memory import Case, compare, counted_bytes, planned

TINY = Case(size_hw=(192, 384), base_width=8)


@pytest.mark.slow
def test_a_step_in_a_process_of_its_own_needs_what_was_counted(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = compare([TINY], "cpu")

    assert row["counted"] == counted_bytes(TINY)
    spare = 400 << 20
    assert row["counted"] - spare < row["measured"] < row["counted"]
    assert "| 8 | 6 | 384x192 | 1 | yes | no | no |" in capsys.readouterr().out


@pytest.mark.slow
def test_plans_within_eight_gigabytes(capsys: pytest.CaptureFixture[str]) -> None:
    cases = planned(64)

    assert [case.size_hw for case in cases] == [(819, 1638), (1024, 2048)]  # the same step at scale 0.5 and 1
    assert all(counted_bytes(case) < 0.8 * 8_000_000_000 for case in cases)
    assert capsys.readouterr().out.count("Planned for 7.5 GiB") == 3
