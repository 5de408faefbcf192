import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sscloud.errors import ConfigError
from training.journal import (
    STEPS,
    Journal,
    StepRecord,
    cycle_folder,
    cycle_lock,
    drop_cycle,
    read_journals,
    write_journal,
)

ROOT = Path(__file__).resolve().parents[2]


def journal(number: int = 1) -> Journal:
    return Journal(number=number, started="2026-01-02T03:04:05+00:00", server="http://cvat", config={"project": 7})


def test_written_and_read(tmp_path: Path) -> None:
    done = StepRecord(name="fetch", state="done", started="a", ended="b", seconds=1.5, facts={"snapshot": "Улица"})
    failed = StepRecord(name="effort", state="failed", error="nobody answers")
    first = journal().put(done).put(failed)
    second = dataclasses.replace(journal(2), ended="c", outcome="refused")
    for one in (second, first):
        write_journal(tmp_path, one)
    (tmp_path / "0003").mkdir()  # killed before its first line
    (tmp_path / "notes").mkdir()
    assert read_journals(tmp_path) == [first, second]
    assert first.is_open
    assert not second.is_open
    assert first.step("fetch") == done


def test_the_next_step_is_the_first_that_is_not_over() -> None:
    found = journal()
    assert found.next_step == StepRecord(name="fetch")
    found = found.put(StepRecord(name="fetch", state="done")).put(StepRecord(name="effort", state="skipped"))
    assert found.next_step == StepRecord(name="check")
    for name in STEPS:
        found = found.put(StepRecord(name=name, state="done"))
    assert found.next_step is None


def test_there_are_no_cycles_in_a_new_folder(tmp_path: Path) -> None:
    assert read_journals(tmp_path / "cycles") == []


def test_dropped(tmp_path: Path) -> None:
    write_journal(tmp_path, journal())
    drop_cycle(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "{",
        lambda data: "[]",
        lambda data: json.dumps({**data, "format": 2}),
        lambda data: json.dumps({**data, "number": 3}),
        lambda data: json.dumps({**data, "outcome": "won"}),
        lambda data: json.dumps({**data, "steps": data["steps"][1:]}),
        lambda data: json.dumps({**data, "steps": [{"name": "fetch", "state": "flying"}, *data["steps"][1:]]}),
        lambda data: json.dumps({**data, "steps": [{"name": "fetch", "color": 1}, *data["steps"][1:]]}),
        lambda data: json.dumps({key: value for key, value in data.items() if key != "server"}),
    ],
)
def test_what_is_no_journal(tmp_path: Path, damage: "object") -> None:
    write_journal(tmp_path, journal())
    path = cycle_folder(tmp_path, 1) / "journal.json"
    path.write_text(damage(json.loads(path.read_bytes())))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"journal\.json cannot be used: .*Move its folder away"):
        read_journals(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from training.journal import cycle_lock
with cycle_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_at_once_and_a_killed_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "cycles")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=rf"Another .* works in .*\(process {process.pid}, since 20..-.* UTC\)"),
            cycle_lock(tmp_path / "cycles"),
        ):
            pass
        process.kill()
    with cycle_lock(tmp_path / "cycles"):
        pass


def test_a_lock_whose_holder_has_not_written_yet(tmp_path: Path) -> None:
    with cycle_lock(tmp_path):
        (tmp_path / "running.json").write_text("")
        with pytest.raises(ConfigError, match="it has just begun"), cycle_lock(tmp_path):
            pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cycles").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written"), cycle_lock(tmp_path / "cycles"):
        pass
