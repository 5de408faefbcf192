"""The loop from end to end: people label, the cycle learns, gates, serves, chooses and pre-labels, people correct."""

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cvat_sdk import Client
from miniature import scan

from cvat_standin import CvatStandin, jobs_of
from sscloud.errors import ConfigError, ServerError
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from sscloud.volume import pointed
from tools.cli import main
from tools.commands import cycle as command
from tools.simulation import rounds as simulation_rounds
from tools.simulation import scenes as simulation_scenes
from tools.simulation.page import render_simulation_page
from tools.simulation.people import EXACT, People, browsing, set_up
from tools.simulation.results import BY_HAND, HEADER, Look, Round, Simulation, SimulationConfig, effort_of, line_of
from tools.simulation.rounds import MARKER, PAGE, simulate
from tools.simulation.scenes import ScenePlan, Scenes
from training.cvat import Account, Server, find_account
from training.dataset import open_dataset
from training.effort import read_effort
from training.oracle import correct

SMALL = ScenePlan(width=128, test_sites=2, seed_sites=3, seed_scans=1, pool=5, pool_scans=2)
SCHEMA = LabelSchema.default()
IDS = {label.id: label.id for label in SCHEMA.labels}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CVAT_URL", "CVAT_USERNAME", "CVAT_PASSWORD", "CVAT_ACCESS_TOKEN", "CVAT_ORGANIZATION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def easy_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes that cost nothing and are learned in seconds."""

    def render(seed: int, number: int, **_: Any) -> SimpleNamespace:
        image, label_map = scan(1000 * seed + number)
        return SimpleNamespace(image=image, label_map=label_map)

    monkeypatch.setattr(simulation_scenes, "render", render)


@pytest.fixture(params=["stand-in", pytest.param("live", marks=pytest.mark.live)])
def account(request: pytest.FixtureRequest) -> Account | None:
    """None for the stand-in that a simulation starts; with `-m live` the server that the environment names."""
    if request.param == "stand-in":
        return None
    names = ("CVAT_URL", "CVAT_USERNAME", "CVAT_PASSWORD")
    if "live" not in request.config.getoption("markexpr"):
        pytest.skip("makes a project on a live server: only with -m live")
    if not all(os.environ.get(name) for name in names):
        pytest.skip(f"needs a live server in {', '.join(names)}")
    return find_account(os.environ)


@pytest.mark.usefixtures("easy_scenes", "quick_mlflow_stores")
def test_two_rounds(tmp_path: Path, account: Account | None) -> None:
    folder = tmp_path / "Петля"
    lines: list[str] = []
    config = SimulationConfig(
        workspace=folder,
        rounds=2,
        count=2,
        scenes=SMALL,
        scale=0.5,
        base_width=4,
        epochs=20,
        finetune_epochs=2,
        flags={"gate.min_groups": 2},
    )
    found = simulate(config, account=account, say=lines.append, note=lambda _: None)

    by_hand, first, second = found.rounds
    assert (by_hand.model, by_hand.labelled, by_hand.effort and by_hand.effort.effort) == (BY_HAND, 0, 1.0)
    assert (first.model, first.labelled, second.labelled) == ("simulation v1", 3, 5)
    assert first.accepted
    for each in (first, second):
        assert each.effort is not None
        assert each.effort.frames == 2
        assert 0 < each.effort.effort < 1
        assert each.same is not None
        assert each.same.frames == 2
        assert 0.2 < each.metrics["miou"] <= 1
        assert each.agreement > 0.97
    assert {record.model for record in read_effort(folder / "dataset")} == {first.model, second.model}

    dataset = open_dataset(folder / "dataset")
    splits = {item.name: item.split for item in dataset.items}
    assert len(splits) == 2 + 3 + 4
    assert [name for name, split in splits.items() if split == "test"] == ["site001_1", "site002_1"]
    for item in dataset.items:
        truth = found_truth(folder, item.name)
        assert np.mean(read_label_map(item.mask) == truth) > (0.999999 if item.split == "test" else 0.97)
    assert pointed(folder / "served") is not None
    assert sorted(path.name for path in (folder / "cycles").glob("0*")) == ["0001", "0002"]

    assert lines[:2] == [HEADER, line_of(by_hand)]
    assert len(lines) == 5
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert all(title in page for title in (first.model, "Растительность", "Effort by label"))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [each["round"] for each in data["rounds"]] == [1, 2]
    assert [(each["round"], each["effort"], each["miou"]) for each in data["by_hand"]] == [(0, 1.0, None)]
    assert [each["effort"] for each in data["rounds"]] == pytest.approx([first.effort.effort, second.effort.effort])
    assert data["rounds"][1]["iou"].keys() >= {"Земля", "Здание"}
    assert "password" not in page

    with pytest.raises(ConfigError, match=r"holds a simulation already.*--overwrite"):
        simulate(config, account=None, say=lines.append, note=lines.append)


def found_truth(folder: Path, name: str) -> Any:
    return Scenes(folder / "scenes", SMALL).truth(f"{name}.jpg")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("no_server")
def test_quality_rises_and_effort_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cycle", "--simulate", "4", "--workspace", str(tmp_path / "loop"), "--json"]) == 0
    rounds = json.loads(capsys.readouterr().out.splitlines()[-1])["rounds"]
    assert [each["round"] for each in rounds] == [1, 2, 3, 4]
    first, last = rounds[0], rounds[-1]
    assert last["miou"] > first["miou"] + 0.02
    assert last["effort_on_test"] < 0.95 * first["effort_on_test"]
    assert all(each["effort"] < 0.5 for each in rounds)  # by hand it is 1
    assert all(each["agreement"] > 0.98 for each in rounds)
    assert (tmp_path / "loop" / PAGE).is_file()


class TestScenes:
    def test_sites(self) -> None:
        sites = SMALL.sites()
        assert [site.role for site in sites] == ["test"] * 2 + ["seed"] * 3 + ["pool"] * 3
        assert [site.scans for site in sites[5:]] == [2, 2, 1]
        names = [name for site in sites for name in site.images]
        assert len(set(names)) == len(names) == 2 + 3 + 5
        assert all(re.search(simulation_scenes.GROUP_BY, name) for name in names)

    def test_sampled_once(self, tmp_path: Path) -> None:
        plan = ScenePlan(seed=3, width=64, test_sites=2, seed_sites=2, seed_scans=1, pool=1, pool_scans=1)
        scenes = Scenes(tmp_path, plan)
        assert not scenes.is_whole()
        scenes.scan(1, "site001_1.jpg")
        assert scenes.truth("folder/site001_1.jpg").shape == (26, 64)
        before = scenes.image("site001_1.jpg")
        scenes.scan(1, "site001_1.jpg")
        assert scenes.image("site001_1.jpg") == before

    @pytest.mark.usefixtures("easy_scenes")
    def test_others_are_sampled_anew(self, tmp_path: Path) -> None:
        Scenes(tmp_path, SMALL).sample(quiet=True)
        assert Scenes(tmp_path, SMALL).is_whole()
        assert not Scenes(tmp_path, ScenePlan(seed=2)).is_whole()

    def test_a_stranger(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is no panorama of this simulation"):
            Scenes(tmp_path, SMALL).truth("holiday.jpg")

    @pytest.mark.parametrize("values", [{"test_sites": 1}, {"seed_sites": 1}, {"pool": 0}, {"seed": -1}, {"width": 63}])
    def test_too_little(self, values: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=r"expected|needs"):
            ScenePlan(**values)


@pytest.fixture
def desk(
    cvat_server: CvatStandin, tmp_path: Path, easy_scenes: None
) -> Iterator[tuple[CvatStandin, Server, Client, Scenes]]:
    scenes = Scenes(tmp_path / "scenes", SMALL)
    scenes.sample(quiet=True)
    site = cvat_server.site
    account = Account(url=site.url, username=site.username, password=site.password)
    with Server.connect(account) as server, browsing(account) as client:
        yield cvat_server, server, client, scenes


class TestPeople:
    def test_the_project(self, desk: tuple[CvatStandin, Server, Client, Scenes]) -> None:
        _, server, client, scenes = desk
        project = set_up(server, client, scenes, SCHEMA)
        assert [task.name for task in server.tasks(project.id)] == [site.name for site in SMALL.sites()]
        assert (len(project.test_jobs), len(project.seed_jobs), project.panoramas) == (2, 3, 8)
        assert {server.job(number).type for number in project.test_jobs} == {"ground_truth"}
        states = {job.state for task in server.tasks(project.id)[:2] for job in server.jobs(task.id)}
        assert states == {"completed", "new"}  # ground truth is still to be drawn
        labels = server.labels(project_id=project.id)
        assert all(label.text_attributes == {"model", "confidence"} for label in labels if label.name != "Фон")

    def test_corrects_and_completes(self, desk: tuple[CvatStandin, Server, Client, Scenes]) -> None:
        cvat, server, client, scenes = desk
        project = set_up(server, client, scenes, SCHEMA)
        people = People(server, client, scenes, SCHEMA, project.id)
        job = project.seed_jobs[0]
        (first,) = people.work([job], person=EXACT)
        np.testing.assert_array_equal(first.correction.label_map, scenes.truth(first.name))
        assert (server.job(job).state, {raw["source"] for raw in cvat.shapes(job)}) == ("completed", {"manual"})
        # A pre-label that takes the house for ground.
        labels = {label.name: label.id for label in server.labels(project_id=project.id)}
        house = next(raw for raw in cvat.shapes(job) if raw["label_id"] == labels["Здание"])
        cvat.edit_shape(house["id"], label_id=labels["Земля"], source="auto")
        before = {raw["id"]: raw for raw in cvat.shapes(job)}
        (again,) = people.work([job])
        found = {raw["id"]: raw for raw in cvat.shapes(job)}
        assert again.correction.relabelled == 1
        assert found.keys() == before.keys()
        assert (found[house["id"]]["label_id"], found[house["id"]]["source"]) == (labels["Здание"], "auto")
        np.testing.assert_array_equal(again.correction.label_map, scenes.truth(first.name))

    def test_a_login_that_is_refused(self, cvat_server: CvatStandin) -> None:
        account = Account(url=cvat_server.url, username="nobody", password="hunter2")
        with pytest.raises(ServerError, match="400") as caught, browsing(account):
            pass
        assert "hunter2" not in str(caught.value)

    def test_what_was_made_is_deleted_when_it_fails(self, desk: tuple[CvatStandin, Server, Client, Scenes]) -> None:
        _, server, client, scenes = desk
        (scenes.folder / "imgs" / "site003_1.jpg").unlink()
        with pytest.raises(FileNotFoundError, match="site003_1"):
            set_up(server, client, scenes, SCHEMA)
        assert server.projects() == []


class TestWorkspace:
    def test_keeps_peoples_files(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("precious")
        with pytest.raises(ConfigError, match="holds files that no simulation made"):
            simulate(config_of(tmp_path, overwrite=True), account=None, say=print, note=print)
        assert (tmp_path / "mine.txt").read_text() == "precious"

    @pytest.mark.usefixtures("easy_scenes")
    def test_the_same_scenes_are_used_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Scenes(tmp_path / "scenes", SMALL).sample(quiet=True)
        (tmp_path / MARKER).touch()
        (tmp_path / "dataset").mkdir()
        written = (tmp_path / "scenes/imgs/site001_1.jpg").stat().st_mtime_ns
        monkeypatch.setattr(simulation_rounds, "standing_in", _stopped)
        with pytest.raises(RuntimeError, match="far enough"):
            simulate(config_of(tmp_path, overwrite=True), account=None, say=print, note=print)
        assert (tmp_path / "scenes/imgs/site001_1.jpg").stat().st_mtime_ns == written
        assert not (tmp_path / "dataset").exists()

    def test_more_rounds_than_panoramas(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="3 rounds of 2 panoramas are more than the 5 of the pool"):
            config_of(tmp_path, rounds=3)


def _stopped() -> None:
    raise RuntimeError("far enough")


def config_of(workspace: Path, **values: Any) -> SimulationConfig:
    return SimulationConfig(**{"workspace": workspace, "rounds": 1, "count": 2, "scenes": SMALL, **values})


class TestCommand:
    def test_the_flags(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_server: None) -> None:
        asked = {}

        def recorded(config: SimulationConfig, *, account: Any, say: Any, note: Any) -> SimpleNamespace:
            asked.update(config=config, account=account)
            say("a line")
            return SimpleNamespace(to_dict=lambda: {"rounds": []})

        monkeypatch.setattr(simulation_rounds, "simulate", recorded)
        flags = "--simulate 2 --scenes 9 --width 64 --epochs 3 --seed 5 --count 2 --margin 0.2 --set gate.floor=0.3"
        assert main(["cycle", *flags.split(), "--workspace", str(tmp_path)]) == 0
        config = asked["config"]
        assert (config.workspace, config.rounds, config.count, config.epochs) == (tmp_path, 2, 2, 3)
        assert (config.scenes.pool, config.scenes.width, config.scenes.seed) == (9, 64, 5)
        assert (config.flags, config.settings) == ({"gate.margin": 0.2}, ("gate.floor=0.3",))
        assert asked["account"] is None

    def test_a_live_server(
        self, monkeypatch: pytest.MonkeyPatch, no_server: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CVAT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("CVAT_ACCESS_TOKEN", "token")
        asked = []

        def recorded(config: SimulationConfig, *, account: Any, say: Any, note: Any) -> SimpleNamespace:
            asked.extend([config.workspace, account.url])
            say("a line")
            return SimpleNamespace(to_dict=lambda: {"rounds": [1]})

        monkeypatch.setattr(simulation_rounds, "simulate", recorded)
        assert main(["cycle", "--simulate", "1", "--json"]) == 0
        assert asked == [Path("simulation"), "http://127.0.0.1:9"]
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ('{"rounds": [1]}\n', "a line\n")

    @pytest.mark.parametrize("flags", [["--project", "7"], ["--dry-run"], ["--restart"]])
    def test_what_means_nothing(self, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["cycle", "--simulate", "1", *flags]) == 2
        assert "means nothing with --simulate" in capsys.readouterr().err

    def test_without_it_nothing_is_simulated(self) -> None:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert parser.parse_args([]).simulate is None


def test_the_page_escapes(tmp_path: Path) -> None:
    """Whatever names there are."""
    truth = np.zeros((32, 64), np.uint8)
    truth[16:] = 2
    raw = correct([], truth, frame=0, label_ids=IDS, background=0)
    row = effort_of([raw], model="<b>", schema=SCHEMA)
    rounds = tuple(
        Round(
            number=number,
            model="<script>",
            labelled=number,
            accepted=bool(number) or None,
            reasons=("a < b",),
            challenger="<i>",
            metrics={"miou": float("nan")},
            effort=row if number else None,
            seconds=1.0,
            agreement=1.0,
        )
        for number in (0, 1)
    )
    page = render_simulation_page(
        Simulation(
            config=config_of(tmp_path),
            server="http://<x>",
            rounds=rounds,
            look=Look(
                name="<img>",
                image=np.zeros((32, 64, 3), np.uint8),
                truth=truth,
                predictions=(("<script>", truth),),
            ),
            schema=SCHEMA,
            seconds=1.0,
            page=tmp_path / PAGE,
        )
    )
    for text in ("<script>", "<img>", "<i>", "<x>", "a < b"):
        assert text not in page.replace("<img src", "")
    assert row is not None
    assert (row.effort, row.touched) == (1.0, 1.0)
    assert "—" in line_of(rounds[0])


def test_jobs_of_one_frame(desk: tuple[CvatStandin, Server, Client, Scenes]) -> None:
    _, server, client, scenes = desk
    project = set_up(server, client, scenes, SCHEMA)
    for task in server.tasks(project.id):
        assert len(jobs_of(client, task.id)) == task.size
