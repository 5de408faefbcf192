"""`sscloud labels`: a project's labels meet a schema, and nothing of other people's is changed."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cvat_sdk.core.helpers import get_paginated_collection
from PIL import Image

from cvat_standin import CvatStandin, Site, add_shapes, job_shapes, jobs_of, label_ids, make_task, polygon
from sscloud.labels import LabelSchema
from tools.cli import main
from training.cvat import ProjectLabel
from training.project_labels import match_labels, plan_labels

TEXT = {"mutable": False, "input_type": "text", "values": [""], "default_value": ""}
SCHEMA = LabelSchema.default()


@pytest.fixture
def login(cvat_site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """`cvat_site` in the environment."""
    for name, value in cvat_site.environment().items():
        monkeypatch.setenv(name, value)
    return cvat_site


def _labels(site: Site, project: int) -> dict[str, dict[str, Any]]:
    with site.client() as client:
        found = get_paginated_collection(client.api_client.labels_api.list_endpoint, project_id=project)
        return {
            label.name: {
                "color": label.color,
                "type": str(label.type),
                "attributes": {attribute.name: str(attribute.input_type) for attribute in label.attributes},
            }
            for label in found
        }


def _make(site: Site, labels: list[dict[str, Any]]) -> int:
    with site.client() as client:
        return int(site.make_project(client, "Метки", labels).id)


BOTH = {"model": "text", "confidence": "text"}


def test_an_empty_project_gets_every_label(login: Site, capsys: pytest.CaptureFixture[str]) -> None:
    project = _make(login, [])
    assert main(["labels", "push", "--project", str(project)]) == 0
    assert "6 created, 0 changed." in capsys.readouterr().out
    found = _labels(login, project)
    assert set(found) == {label.name for label in SCHEMA.labels}
    assert found["Земля"] == {"color": "#b5793c", "type": "any", "attributes": BOTH}
    assert found["Фон"] == {"color": "#1f2430", "type": "any", "attributes": {}}
    assert main(["labels", "push", "--project", str(project)]) == 0
    assert "Nothing to change." in capsys.readouterr().out
    assert _labels(login, project) == found


def test_what_is_there_is_completed_and_others_stay(login: Site, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [
        {"name": "земля", "color": "#000001", "type": "mask", "attributes": [{"name": "model", **TEXT}]},
        {"name": "Транспорт", "color": "#000002", "type": "any"},
        {"name": "Человек", "color": "#000003", "type": "any"},
        {"name": "Кошка", "color": "#000004", "type": "rectangle"},
        {
            "name": "Здание",
            "color": "#d8594b",
            "attributes": [
                {**TEXT, "name": "confidence", "input_type": "select", "values": ["да"], "default_value": "да"},
                {**TEXT, "name": "model"},
                {**TEXT, "name": "этажи"},
            ],
        },
    ]
    project = _make(login, labels)
    before = _labels(login, project)
    assert main(["labels", "show", "--project", str(project)]) == 0
    assert main(["labels", "push", "--project", str(project), "--dry-run"]) == 0
    assert _labels(login, project) == before
    shown = capsys.readouterr().out
    assert "3 to be created, 2 to be changed." in shown
    assert shown == 2 * shown[: len(shown) // 2]
    assert main(["labels", "push", "--project", str(project)]) == 0
    printed = capsys.readouterr().out
    after = _labels(login, project)
    assert after["земля"] == {"color": "#b5793c", "type": "mask", "attributes": BOTH}
    assert after["Транспорт"] == {"color": "#4b8fe2", "type": "any", "attributes": BOTH}
    for name in ("Человек", "Кошка", "Здание"):
        assert after[name] == before[name]
    assert set(after) - set(before) == {"Фон", "Растительность", "Конструкции"}
    assert "also means Обстановка" in printed
    assert "not in the schema" in printed
    assert "attribute confidence takes no free text" in printed


def test_shapes_survive(login: Site) -> None:
    project = _make(login, [{"name": "Земля", "color": "#000001"}])
    with login.client() as client:
        task = make_task(client, project, {"a.png": _png()}).id
        (job,) = jobs_of(client, task)
        ground = label_ids(client, project)["Земля"]
        add_shapes(client, job, [polygon(ground, 0, [1.0, 1.0, 9.0, 1.0, 9.0, 7.0])])
        before = job_shapes(client, job)
        assert main(["labels", "push", "--project", str(project)]) == 0
        (shape,) = job_shapes(client, job)
        assert {**shape, "attributes": []} == {**before[0], "attributes": []}
        assert label_ids(client, project)["Земля"] == ground


def test_a_schema_of_ones_own(login: Site, tmp_path: Path) -> None:
    schema = tmp_path / "labels.yaml"
    schema.write_text('labels: [{name: Дорога, id: 11, aliases: [Road], color: "#010203"}]', encoding="utf-8")
    project = _make(login, [{"name": "ROAD"}])
    assert main(["labels", "push", "--project", str(project), "--labels", str(schema)]) == 0
    assert _labels(login, project) == {"ROAD": {"color": "#010203", "type": "any", "attributes": BOTH}}


def test_errors_are_one_line(
    cvat_server: CvatStandin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    assert main(["labels", "push", "--project", "99"]) == 2
    error = capsys.readouterr().err
    assert "CVAT, project 99: there is none that this user can see" in error
    assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["labels", "remove", "--project", "1"])
    assert "invalid choice: 'remove'" in capsys.readouterr().err


def test_the_organization_of_the_flag_counts(
    cvat_server: CvatStandin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    cvat_server.add_organization("team")
    monkeypatch.setenv("CVAT_ORGANIZATION", "nobody")
    project = str(_make(cvat_server.site, []))
    cvat_server.forget()
    main(["labels", "show", "--project", project, "--organization", "team"])
    assert {logged.headers.get("x-organization") for logged in cvat_server.find("GET", r"/api/projects")} == {"team"}
    assert main(["labels", "show", "--project", project, "--organization", ""]) == 0
    capsys.readouterr()
    assert main(["labels", "show", "--project", project]) == 2
    assert main(["labels", "show", "--project", project, "--profile", "absent"]) == 2
    assert "There is no CVAT profile 'absent'" in capsys.readouterr().err


@pytest.fixture
def make_label() -> Callable[..., ProjectLabel]:
    """A project's label; its number is given by its name."""

    def make(name: str, type: str = "any", **attributes: str) -> ProjectLabel:
        numbers = {attribute: number for number, attribute in enumerate(attributes)}
        texts = frozenset(attribute for attribute, kind in attributes.items() if kind == "text")
        return ProjectLabel(
            id=sum(map(ord, name)),
            name=name,
            color="",
            type=type,
            attributes=numbers,
            text_attributes=texts,
            defaults={},
        )

    return make


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (["Обстановка", "Транспорт"], "Обстановка"),
        (["Человек", "Транспорт"], "Транспорт"),
        (["  ОБСТАНОВКА "], "  ОБСТАНОВКА "),
        (["обстановка", "Обстановка"], "Обстановка"),
        (["Дорога"], None),
    ],
)
def test_names_come_before_aliases(
    make_label: Callable[..., ProjectLabel], theirs: list[str], expected: str | None
) -> None:
    found = match_labels(["Обстановка"], [make_label(name) for name in theirs], schema=SCHEMA)
    assert (found["Обстановка"].name if found else None) == expected


def test_names_that_the_schema_lacks_meet_too(make_label: Callable[..., ProjectLabel]) -> None:
    assert match_labels(["Дорога"], [make_label("дорога")], schema=SCHEMA)["Дорога"].name == "дорога"


def test_a_label_that_cannot_hold_a_mask_is_neither_used_nor_made_twice(
    make_label: Callable[..., ProjectLabel],
) -> None:
    rectangle = make_label("Земля", "rectangle")
    assert match_labels(["Земля"], [rectangle], schema=SCHEMA) == {}
    (plan,) = (plan for plan in plan_labels(SCHEMA, [rectangle]) if plan.name == "Земля")
    assert (plan.action, plan.request) == ("same", None)
    assert "its type is rectangle" in plan.details[0]


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 8)).save(stream, "PNG")
    return stream.getvalue()
