"""Promotion and rollback: the volume, the aliases and the function that is asked, whenever they are interrupted."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from executioner import Executioner, Killed
from filelock import FileLock
from model_versions import Versions

import tools.promotion
from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import BundleError, ConfigError, DeployError
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from sscloud.volume import POINTER, pointed, publish
from tools.promotion import LOCK, ROLLBACK, Promotion, Wait, promote, roll_back, wait_until_served


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> list[ModelBundle]:
    """Versions 1 to 3, and 4 with other labels."""
    folder = tmp_path_factory.mktemp("versions")
    made = []
    for version in (1, 2, 3):
        model = make_unet(seed=version)
        manifest = make_manifest(model.architecture, name="street", version=version)
        made.append(save_bundle(folder / str(version), model, manifest))
    labels = [{"name": "Фон", "id": 0, "background": True}, {"name": "Дом", "id": 6}]
    schema = LabelSchema.from_dict({"labels": labels}, source="test")
    model = make_unet(Architecture(classes=2, base_width=4))
    manifest = make_manifest(model.architecture, name="street", version=4, labels=schema, label_ids=(0, 6))
    return [*made, save_bundle(folder / "4", model, manifest)]


@pytest.fixture
def versions(bundles: list[ModelBundle]) -> Versions:
    return Versions(bundles)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "served"


def do_promote(versions: Versions, version: int, volume: Path, **more: Any) -> Promotion:
    return promote(versions, version, volume=volume, function=None, say=lambda _: None, **more)  # type: ignore[arg-type]


def do_roll_back(versions: Versions, volume: Path, **more: Any) -> Promotion:
    return roll_back(versions, volume=volume, function=None, say=lambda _: None, **more)  # type: ignore[arg-type]


def state(versions: Versions, volume: Path) -> tuple[int | None, list[int], str | None, bool]:
    """The champion, those before it, what the volume points at, and whether a rollback is under way."""
    now = pointed(volume)
    title = None if now is None else now.bundle.rpartition("-")[0]
    return versions.number, list(versions.history), title, (volume / ROLLBACK).exists()


class TestPromote:
    def test_and_back_again(self, versions: Versions, volume: Path) -> None:
        first = do_promote(versions, 1, volume)
        assert (first.champion.title, first.previous, first.seconds, first.notes) == ("street v1", None, None, ())
        assert state(versions, volume) == (1, [], "street-v1", False)
        second = do_promote(versions, 2, volume)
        assert second.previous is not None
        assert second.previous.version == 1
        assert state(versions, volume) == (2, [1], "street-v2", False)
        assert do_promote(versions, 2, volume).folder == second.folder
        assert state(versions, volume) == (2, [1], "street-v2", False), "once more changes nothing"
        do_promote(versions, 3, volume)
        back = do_roll_back(versions, volume)
        assert back.previous is not None
        assert (back.champion.version, back.previous.version, back.folder) == (2, 3, second.folder)
        assert state(versions, volume) == (2, [1], "street-v2", False)
        do_roll_back(versions, volume)
        assert state(versions, volume) == (1, [], "street-v1", False)
        with pytest.raises(ConfigError, match="No champion was served before this one"):
            do_roll_back(versions, volume)
        assert state(versions, volume) == (1, [], "street-v1", False)

    def test_a_damaged_bundle(self, versions: Versions, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        do_promote(versions, 1, volume)

        def damaged(version: int) -> ModelBundle:
            raise BundleError("damaged")

        monkeypatch.setattr(versions, "bundle", damaged)
        with pytest.raises(BundleError, match="damaged"):
            do_promote(versions, 2, volume)
        assert state(versions, volume) == (1, [], "street-v1", False)

    def test_other_labels(self, versions: Versions, volume: Path) -> None:
        do_promote(versions, 1, volume)
        before = sorted(volume.iterdir())
        with pytest.raises(ConfigError, match=r"street v4 has other labels than street v1 \(new: Дом; gone: Здание"):
            do_promote(versions, 4, volume)
        assert state(versions, volume) == (1, [], "street-v1", False)
        assert sorted(volume.iterdir()) == before
        do_promote(versions, 4, volume, new_labels=True)
        assert state(versions, volume) == (4, [1], "street-v4", False)

    def test_a_damaged_pointer_is_written_anew(self, versions: Versions, volume: Path) -> None:
        do_promote(versions, 1, volume)
        (volume / POINTER).write_bytes(b"{")
        do_promote(versions, 2, volume)
        assert state(versions, volume) == (2, [1], "street-v2", False)

    def test_a_damaged_note_of_a_rollback(self, versions: Versions, volume: Path) -> None:
        do_promote(versions, 1, volume)
        do_promote(versions, 2, volume)
        (volume / ROLLBACK).write_bytes(b"{}")
        with pytest.raises(ConfigError, match="what an interrupted rollback noted, cannot be read"):
            do_roll_back(versions, volume)
        do_promote(versions, 2, volume)
        assert state(versions, volume) == (2, [1], "street-v2", False)

    def test_a_rollback_to_other_labels(self, versions: Versions, volume: Path) -> None:
        """Refused before anything is noted, so the next rollback begins anew."""
        do_promote(versions, 1, volume)
        do_promote(versions, 4, volume, new_labels=True)
        with pytest.raises(ConfigError, match="street v1 has other labels than street v4"):
            do_roll_back(versions, volume)
        assert state(versions, volume) == (4, [1], "street-v4", False)


class TestOneAtATime:
    """Alias and pointer agree, whoever else promotes or rolls back."""

    def test_another_one_goes_on(self, versions: Versions, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        do_promote(versions, 1, volume)
        do_promote(versions, 2, volume)
        monkeypatch.setattr(tools.promotion, "_LOCKED", 0.05)
        with FileLock(volume / LOCK):
            for action in (lambda: do_promote(versions, 3, volume), lambda: do_roll_back(versions, volume)):
                with pytest.raises(ConfigError, match=r"has been going on in .* for 0\.05 s"):
                    action()
        assert state(versions, volume) == (2, [1], "street-v2", False)

    def test_the_second_waits_until_the_first_is_taken_back(
        self, versions: Versions, volume: Path, served: tuple["Served", str]
    ) -> None:
        told, url = served
        told.say("street v1")
        do_promote(versions, 1, volume)
        is_champion, waits = threading.Event(), threading.Event()

        def say_first(line: str) -> None:
            if line == "street v2 is the champion.":
                is_champion.set()
                assert waits.wait(10)

        def first() -> None:
            with pytest.raises(DeployError, match="street v1 is the champion again"):
                promote(versions, 2, volume=volume, function=None, say=say_first, url=url, within=0.2)  # type: ignore[arg-type]

        thread = threading.Thread(target=first)
        thread.start()
        assert is_champion.wait(10)
        promote(versions, 3, volume=volume, function=None, say=lambda _: waits.set())  # type: ignore[arg-type]
        thread.join(10)
        assert state(versions, volume) == (3, [1], "street-v3", False)

    @pytest.mark.parametrize(("expected", "by_now"), [(1, "with v1, but the champion is street v2"), (None, "with no")])
    def test_another_champion_than_expected(
        self, versions: Versions, volume: Path, expected: int | None, by_now: str
    ) -> None:
        do_promote(versions, 1, volume, expected=None)
        do_promote(versions, 2, volume, expected=1)
        with pytest.raises(ConfigError, match=f"street v3 is not promoted: it was compared {by_now}"):
            do_promote(versions, 3, volume, expected=expected)
        assert state(versions, volume) == (2, [1], "street-v2", False)
        do_promote(versions, 2, volume, expected=expected)  # once more, as after a kill

    def test_a_rollback_that_another_champion_has_overtaken(self, versions: Versions, volume: Path) -> None:
        do_promote(versions, 1, volume)
        do_promote(versions, 2, volume)
        do_promote(versions, 3, volume)
        (volume / ROLLBACK).write_text('{"from": 2, "to": 1}', encoding="utf-8")
        assert do_roll_back(versions, volume).champion.version == 2
        assert state(versions, volume) == (2, [1], "street-v2", False)


class TestInterrupted:
    """A command that is killed between any two steps, and run again, ends as one that was left alone."""

    @pytest.fixture
    def published(self, bundles: list[ModelBundle], volume: Path) -> Path:
        for bundle in bundles[:3]:
            publish(volume, bundle)
        return volume

    def run(
        self, versions: Versions, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, steps: int
    ) -> bool:
        """Run it until its n-th step; whether it was killed."""
        executioner = Executioner(steps)
        versions.interrupt = executioner.step
        with monkeypatch.context() as patch:
            for name in ("publish", "point", "retire", "atomic_write"):
                real = getattr(tools.promotion, name)

                def step(*args: Any, real: Any = real, **more: Any) -> Any:
                    executioner.step()
                    result = real(*args, **more)
                    executioner.step()
                    return result

                patch.setattr(tools.promotion, name, step)
            try:
                action()
            except Killed:
                return True
            finally:
                versions.interrupt = lambda: None
        return False

    @pytest.mark.parametrize("back", [False, True])
    def test_at_every_step(
        self, bundles: list[ModelBundle], published: Path, monkeypatch: pytest.MonkeyPatch, back: bool
    ) -> None:
        for steps in range(1, 30):
            versions = Versions(bundles, champion=None)
            do_promote(versions, 1, published)
            do_promote(versions, 2, published)

            def action(versions: Versions = versions) -> Promotion:
                return do_roll_back(versions, published) if back else do_promote(versions, 3, published)

            killed = self.run(versions, action, monkeypatch, steps)
            number, _, title, _ = state(versions, published)
            assert (number, title) in ({(2, "street-v2"), (1, "street-v2"), (1, "street-v1")} if back else
                                       {(2, "street-v2"), (3, "street-v2"), (3, "street-v3")})  # fmt: skip
            if killed:
                action()
            expected = (1, [], "street-v1", False) if back else (3, [1, 2], "street-v3", False)
            assert state(versions, published) == expected, steps
            if not killed:
                break
        assert steps > 6

    def test_a_rollback_that_nobody_finished_is_not_remembered_for_ever(
        self, versions: Versions, published: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        do_promote(versions, 1, published)
        do_promote(versions, 2, published)
        assert self.run(versions, lambda: do_roll_back(versions, published), monkeypatch, 4)
        assert (published / ROLLBACK).exists()
        do_promote(versions, 3, published)
        do_roll_back(versions, published)
        assert state(versions, published)[0] == 2


class Served:
    """A function's `GET /metrics`, over a socket."""

    def __init__(self) -> None:
        self.replies: list[str] = []
        """The next ones; the last one stays."""
        self.status = 200

    def say(self, *models: str, refused: str = "") -> None:
        """The next replies, of two workers in turn."""
        info = [f'sscloud_model_info{{worker="{i % 2}",model="{model}"}} 1\n' for i, model in enumerate(models)]
        more = f'sscloud_model_refused{{worker="0",bundle="{refused}"}} 1\n' if refused else ""
        self.replies = [line + more for line in info]


@pytest.fixture
def served() -> Iterator[tuple[Served, str]]:
    told = Served()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply = told.replies.pop(0) if len(told.replies) > 1 else told.replies[0]
            self.send_response(told.status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield told, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.promotion, "_PAUSE", 0.005)
    monkeypatch.setattr(tools.promotion, "_TRIES", 0.1)


class TestServed:
    def test_every_worker_names_it(self, served: tuple[Served, str]) -> None:
        told, url = served
        old, new = "street v1", 'the \\"new\\" v2'
        told.say(old, old, new, old, new, new, new, old, new)
        assert wait_until_served(url, 'the "new" v2', folder="f", within=10).seconds is not None
        assert len(told.replies) == 1, "asked until six in a row of both workers named it"

    def test_nobody_answers(self, served: tuple[Served, str]) -> None:
        silence = "No function answers at 127.0.0.1:9; it serves street v2 when it starts."
        assert wait_until_served("127.0.0.1:9", "street v2", folder="f") == Wait(None, silence)

    def test_one_that_is_busy_may_answer_later(self) -> None:
        """A port that takes connections is no function that does not run: it is asked on, and nothing is claimed."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"127.0.0.1:{server.getsockname()[1]}"
            wait = wait_until_served(url, "street v2", folder="f", within=0.3)
        assert wait.seconds is None
        assert wait.silence is not None
        assert "does not answer, asked for 0 s (its workers are busy, or hang)" in wait.silence
        assert "whether it serves street v2 is not known" in wait.silence

    def test_one_without_metrics(self, served: tuple[Served, str]) -> None:
        told, url = served
        told.say("street v2")
        told.status = 404
        silence = wait_until_served(url, "street v2", folder="f").silence
        assert silence is not None
        assert "does not say what it serves" in silence
        assert "status 404" in silence

    def test_no_address(self) -> None:
        with pytest.raises(ConfigError, match="no address of a function"):
            wait_until_served("", "street v2", folder="f")

    @pytest.mark.parametrize("refused", ["", "street-v2-"])
    def test_a_function_that_does_not_take_it(
        self, versions: Versions, volume: Path, served: tuple[Served, str], refused: str
    ) -> None:
        """What was changed is taken back, and a version that it takes can be promoted after that."""
        told, url = served
        told.say("street v1")
        do_promote(versions, 1, volume, url=url)
        folder = publish(volume, versions.bundle(2))
        told.say("street v1", refused=folder if refused else "")
        message = "refuses street v2" if refused else "names street v1 after 0.3 s, not street v2"
        with pytest.raises(DeployError, match=f"{message}.* street v1 is the champion again"):
            do_promote(versions, 2, volume, url=url, within=0.3)
        assert state(versions, volume) == (1, [], "street-v1", False)
        told.say("street v3")
        done = do_promote(versions, 3, volume, url=url)
        assert done.seconds is not None
        assert state(versions, volume) == (3, [1], "street-v3", False)

    def test_what_is_the_champion_already_stays_it(
        self, versions: Versions, volume: Path, served: tuple[Served, str]
    ) -> None:
        told, url = served
        do_promote(versions, 1, volume)
        do_promote(versions, 2, volume)
        told.say("street v1")
        with pytest.raises(DeployError, match="Nothing was taken back: street v2 stays the champion"):
            do_promote(versions, 2, volume, url=url, within=0.2)
        assert state(versions, volume) == (2, [1], "street-v2", False)

    def test_alias_and_pointer_are_taken_back_together(
        self, versions: Versions, volume: Path, served: tuple[Served, str]
    ) -> None:
        """Even where the volume pointed at nothing before, as after a first promotion without it."""
        told, url = served
        told.say("street v1")
        versions.set_champion(1)
        with pytest.raises(DeployError, match="street v1 is the champion again"):
            do_promote(versions, 2, volume, url=url, within=0.2)
        assert state(versions, volume) == (1, [], "street-v1", False)

    @pytest.mark.parametrize("steps", [None, 3, 4, 6])
    def test_a_rollback_that_the_function_does_not_take(
        self, versions: Versions, volume: Path, served: tuple[Served, str], steps: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """It is taken back as a whole, also what one that was killed had done; then another one can be tried."""
        told, url = served
        for version in (1, 2, 3):
            do_promote(versions, version, volume)
        if steps is not None:
            action = lambda: do_roll_back(versions, volume)  # noqa: E731
            assert TestInterrupted().run(versions, action, monkeypatch, steps)
            assert (volume / ROLLBACK).exists() == (steps > 3)
        told.say("street v3")
        with pytest.raises(DeployError, match=r"not street v2.* street v3 is the champion again"):
            do_roll_back(versions, volume, url=url, within=0.2)
        assert state(versions, volume) == (3, [1, 2], "street-v3", False)
        do_roll_back(versions, volume)
        assert state(versions, volume) == (2, [1], "street-v2", False)

    def test_a_function_that_does_not_run(self, versions: Versions, volume: Path) -> None:
        done = do_promote(versions, 1, volume, url="http://127.0.0.1:9")
        assert done.notes == ("No function answers at http://127.0.0.1:9; it serves street v1 when it starts.",)
        assert json.loads((volume / POINTER).read_bytes())["bundle"] == done.folder
