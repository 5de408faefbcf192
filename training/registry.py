"""The registry: immutable versions of a model in MLflow's store, which of them is the champion, and which was before.

It is the store that training logs to. A version is made once: its facts are tags of MLflow's model version, its bundle
is an artifact of the run that trained it. MLflow gives it its number first, so that no two can have the same; then the
bundle is written under that number; then the version is sealed with the sha256 of the bundle's manifest, which holds
that of the weights. What is not sealed is no version yet: where a writer is killed, registering the same run again
finishes it.

Beside a local store (SQLite) bundles lie in `artifacts/`, and are used in place:

runs/mlflow.db
runs/artifacts/<MLflow run>/artifacts/model-<manifest's sha256>/    a bundle

Those of a server are downloaded once, and verified whenever they are taken out, as local ones are.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from sscloud.bundle import MANIFEST, WEIGHTS, Manifest, ModelBundle
from sscloud.errors import BundleError, ConfigError, RegistryError
from sscloud.files import atomic_folder, atomic_write
from training.config import read_run

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases: the version that is served, and the one that was registered last and would take its place."""

EXPERIMENT = "sscloud"
"""Of all runs, in MLflow."""

RECORD = "mlflow_run_id"
"""File of a run folder: which of MLflow's runs it is."""

CACHE = Path("runs") / "cache"
"""Where bundles of a server's versions are kept, unless another folder is named."""

Verdict = Literal["accepted", "refused"]

_FORMAT = "1"
_KEPT = 50
"""Former champions that are remembered, and approvals of a version."""
_LOCKED = 120.0
"""Seconds that a writer waits for another one."""
_PAGE = 200
_NAME_LENGTH = 100

# Tags, of the registered model and of its versions.
_FACTS = (
    "metrics", "test_snapshot", "config", "decision", "reasons", "against", "parent", "snapshot", "code_version",
    "weights_sha256", "learned", "created",
)  # fmt: skip
_MARK, _CHAMPIONS = "sscloud.format", "sscloud.champions"
_PREFIX, _KEY, _SEAL, _APPROVALS = "sscloud.", "sscloud.key", "sscloud.manifest_sha256", "sscloud.approvals"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORD_ID = re.compile(r"[0-9a-f]{32}")
_METRIC = re.compile(r"[/\w.\- ]+")
_LOGIN = re.compile(r"//(?:[^/:\s]*:\S*|[^/\s]*)@")
"""A password may hold @, / and : as it stands; what is too much is better hidden than what is too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """Why a version may take a champion's place after all: the gate measured it again, or a person decided."""

    at: str
    """Time, ISO 8601."""
    against: str | None
    """Title of the champion whose place it may take; None where there was none."""
    reasons: tuple[str, ...]
    forced: bool
    """By a person, whatever the gate says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A version of the model; nothing of it changes after it was made, but for its aliases and approvals."""

    name: str
    version: int
    created: str
    """Time, ISO 8601."""
    parent: str | None
    """Title of the model that training started from."""
    snapshot: str | None
    """Identity of the data set that it was trained on."""
    code_version: str
    weights_sha256: str
    metrics: Mapping[str, float]
    """On the frozen test set: the names of `Evaluation.summary`, and `iou/<label name>`; NaN where not defined."""
    test_snapshot: str | None
    """Identity of the panoramas on which those were measured."""
    config: Mapping[str, Any]
    """Of the training; empty for a bundle that was made elsewhere."""
    decision: Verdict | None
    """Of the gate; None where it was not asked."""
    reasons: tuple[str, ...]
    run: str | None
    """MLflow's run."""
    aliases: frozenset[str]
    against: str | None = None
    """Title of the champion that the gate compared it with; None where there was none."""
    learned: int = 0
    """Panoramas that it and its parents were trained on."""
    approvals: tuple[Approval, ...] = ()
    """Later ones than the decision, in the order of time."""
    problem: str | None = None
    """Why nothing but its number is known: what the store says of it was changed. None of a version that is whole."""

    @property
    def title(self) -> str:
        """Name and version, as the bundle and answers have it."""
        return f"{self.name} v{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; null where a metric is not defined."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "title": self.title,
            "metrics": _finite(self.metrics),
            "config": dict(self.config),
            "reasons": list(self.reasons),
            "aliases": sorted(self.aliases),
            "approvals": [dataclasses.asdict(approval) for approval in self.approvals],
        }


def default_uri(workspace: Path) -> str:
    """The store of a workspace that has no server: a SQLite file."""
    return f"sqlite:///{(workspace / 'runs' / 'mlflow.db').resolve().as_posix()}"


def artifact_location(uri: str) -> Path | None:
    """The folder for artifacts of a local store, beside its database; None for other stores, which know theirs."""
    if not uri.startswith("sqlite:///"):
        return None
    return _database(uri).parent / "artifacts"


def without_login(text: str) -> str:
    """A text without the logins of the addresses in it: for messages and logs.

    Args:
        text: an address of a store, or a sentence that holds some.
    """
    return _LOGIN.sub("//", text)


def registered_names(uri: str) -> list[str]:
    """The models that SSCloud keeps in a store, in alphabetical order.

    Raises:
        RegistryError: the store does not answer.
    """
    if artifact_location(uri) is not None and not _database(uri).exists():
        return []
    with _asking(uri):
        models = _pages(_connect(uri).search_registered_models, max_results=_PAGE)
    return sorted(model.name for model in models if model.tags.get(_MARK) == _FORMAT and not _name_problem(model.name))


def open_registry(uri: str, *, name: str | None = None, cache: Path = CACHE) -> "Registry":
    """The registry of a model; without a name that of the only one.

    Raises:
        ConfigError: there are several models or none, or the name cannot be one.
        RegistryError: the store does not answer.
    """
    if name is None:
        names = registered_names(uri)
        if len(names) != 1:
            found = f"{without_login(uri)} holds {len(names)} registered models"
            raise ConfigError(
                f"{found}: {', '.join(names)}. Choose one with --name."
                if names
                else f"{found}. `sscloud models import BUNDLE` makes the first version of one, as `sscloud cycle` does."
            )
        name = names[0]
    return Registry(uri, name=name, cache=cache)


def objection(version: ModelVersion, champion: ModelVersion | None) -> str | None:
    """Why a version may not take the champion's place; None when it may.

    What the gate says holds for the champion that it compared with. A first champion needs no comparison.
    """
    title = champion.title if champion is not None else None
    if champion is not None and champion.version == version.version:
        return None
    if any(approval.against == title for approval in version.approvals):
        return None
    match version.decision:
        case "accepted" if version.against == title:
            return None
        case "accepted":
            other = version.against or "none, since there was no champion"
            return f"the gate compared it with another champion ({other}) than the present one ({title or 'none'})"
        case "refused":
            return f"the gate refused it: {' '.join(version.reasons) or 'no reason is known'}"
    return None if champion is None else f"the gate has not compared it with the champion, {title}"


class Registry:
    """The versions of one model.

    Args:
        uri: MLflow's store: `sqlite:///…`, or a server's address.
        name: of the model; also of its bundles, and what people see in CVAT.
        cache: folder for bundles of a server's versions.

    Raises:
        ConfigError: a name that cannot be one.
    """

    def __init__(self, uri: str, *, name: str, cache: Path = CACHE) -> None:
        if problem := _name_problem(name):
            raise ConfigError(f"{name!r} cannot be the name of a registered model: {problem}. Choose another name.")
        self.uri, self.name = uri, name
        self._cache = cache
        self._artifacts = artifact_location(uri)
        self._connected: Any = None

    # --- making versions ----------------------------------------------------------------------------------------------

    def register(
        self,
        run: Path,
        *,
        metrics: Mapping[str, float],
        test_snapshot: str | None,
        decision: Verdict | None,
        reasons: Sequence[str] = (),
        against: str | None,
    ) -> ModelVersion:
        """Make a run's best model the next version; a run that was registered already gives its version.

        Args:
            run: a run folder.
            metrics: on the frozen test set; see `ModelVersion`.
            test_snapshot: identity of the panoramas on which they were measured.
            decision: of the gate.
            reasons: of the decision, a sentence each.
            against: title of the champion that the gate compared it with; None where there was none. It may have been
                replaced since, so it is never guessed.

        Raises:
            ConfigError: `run` is no run.
            BundleError: the run has no whole epoch yet, or its checkpoint is damaged.
            RegistryError: the store does not answer, or refuses.
        """
        # Imports PyTorch, which takes longer than all that is asked of a store.
        from training.export import BUNDLE, export_bundle

        config = read_run(run).config
        with tempfile.TemporaryDirectory(prefix="sscloud-version-") as temporary:
            bundle = export_bundle(run, Path(temporary) / "bundle", name=self.name, version=1)
            with self._writing():
                return self._add(
                    bundle,
                    record=self._record_of(run),
                    facts={
                        "metrics": _finite(metrics),
                        "test_snapshot": test_snapshot,
                        "config": dataclasses.asdict(config),
                        "decision": decision,
                        "reasons": list(reasons),
                        "against": against,
                    },
                    called=_title_of(run / BUNDLE),
                )

    def import_bundle(
        self,
        bundle: ModelBundle,
        *,
        metrics: Mapping[str, float] | None = None,
        test_snapshot: str | None = None,
        reasons: Sequence[str] = (),
    ) -> ModelVersion:
        """Make a bundle that was made elsewhere the next version; one that is a version already gives that.

        Args:
            bundle: it is copied, and its copy gets the name and number of the version.
            metrics: on the frozen test set, if it was measured there.
            test_snapshot: identity of the panoramas on which they were measured.
            reasons: what is to be known of that, a sentence each.

        Raises:
            BundleError: the bundle is damaged.
            RegistryError: the store does not answer, or refuses.
        """
        bundle = ModelBundle.load(bundle.path)
        with self._writing():
            found = [raw for raw in self._raw() if raw.tags.get(_KEY, "").endswith(f"-{_content(bundle.manifest)}")]
            sealed = [raw for raw in found if _SEAL in raw.tags]
            if sealed:
                return self._read(sealed[0], self._aliases())
            return self._add(
                bundle,
                record=found[0].run_id if found else self._new_record(f"import of {bundle.manifest.title}"),
                facts={
                    "metrics": _finite(metrics or {}),
                    "test_snapshot": test_snapshot,
                    "config": {},
                    "decision": None,
                    "reasons": [f"Imported: {bundle.manifest.title}.", *reasons],
                    "against": None,
                },
            )

    def _add(
        self, bundle: ModelBundle, *, record: str, facts: Mapping[str, Any], called: str | None = None
    ) -> ModelVersion:
        """Make the version of a bundle, or finish it, or find it; `called` is its title in what was said before."""
        manifest, client = bundle.manifest, self._client
        key = f"{_checked(record, _RECORD_ID, 'run')}-{_content(manifest)}"
        tags = {
            f"{_PREFIX}{name}": json.dumps(value, ensure_ascii=False, allow_nan=False)
            for name, value in {
                **facts,
                "parent": manifest.parent,
                "snapshot": manifest.snapshot,
                "code_version": manifest.code_version,
                "weights_sha256": manifest.weights_sha256,
                "learned": len(manifest.learned),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }.items()
        }
        raw = self._of_key(key)
        if raw is None:
            with _asking(self.uri):
                self._ensure_model()
                source = client.get_run(record).info.artifact_uri
                mine = client.create_model_version(
                    self.name, source, run_id=record, tags={**tags, _KEY: key}, await_creation_for=0
                )
            raw = self._of_key(key)
            if raw is None:
                raise RegistryError(
                    f"{without_login(self.uri)} has lost the version {mine.version} that it just made. Try again."
                )
            if int(raw.version) != int(mine.version):  # another process was first, and both write the same
                with _asking(self.uri):
                    client.delete_model_version(self.name, str(mine.version))
        if _SEAL in raw.tags:
            return self._read(raw, self._aliases())
        version = int(raw.version)
        if called not in (None, f"{self.name} v{version}"):
            reasons = [*facts["reasons"], f"Before it had its number, it was called {called}: its reports say so."]
            tags[f"{_PREFIX}reasons"] = json.dumps(reasons, ensure_ascii=False)
        with _asking(self.uri):
            for name, value in tags.items():
                if raw.tags.get(name) != value:
                    client.set_model_version_tag(self.name, str(version), name, value)
        final = dataclasses.replace(
            manifest,
            name=self.name,
            version=version,
            metrics={
                **manifest.metrics,
                **{f"test_{name}": math.nan if value is None else value for name, value in facts["metrics"].items()},
            },
            created=json.loads(tags[f"{_PREFIX}created"]),
        )
        seal = self._store(record, bundle, final)
        self._log(record, facts["metrics"])
        with _asking(self.uri):
            client.set_model_version_tag(self.name, str(version), _SEAL, seal)
        return self.get(version)

    def _store(self, record: str, bundle: ModelBundle, manifest: Manifest) -> str:
        """Write the version's bundle among the run's artifacts; returns the manifest's sha256."""
        manifest.check(f"The manifest of {manifest.title}")
        text = (json.dumps(manifest.to_dict(), ensure_ascii=False, indent=2) + "\n").encode()
        seal = hashlib.sha256(text).hexdigest()
        with contextlib.ExitStack() as stack:
            if self._artifacts is not None:
                folder = stack.enter_context(atomic_folder(self._local(record, seal), marker=MANIFEST, overwrite=True))
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sscloud-version-")))
            atomic_write(folder / WEIGHTS, (bundle.path / WEIGHTS).read_bytes())
            atomic_write(folder / MANIFEST, text)
            if self._artifacts is None:
                with _asking(self.uri):
                    self._client.log_artifacts(record, str(folder), _artifact(seal))
        return seal

    def _log(self, record: str, metrics: Mapping[str, float | None]) -> None:
        """Show the test metrics among those of the training in MLflow's pages."""
        with _asking(self.uri):
            for name, value in metrics.items():
                if value is not None and _METRIC.fullmatch(name):
                    self._client.log_metric(record, f"test/{name}", value, synchronous=True)

    def _record_of(self, run: Path) -> str:
        """MLflow's run of a run folder; a new one where the store does not know it."""
        file = run / RECORD
        if file.exists():
            known = file.read_text(encoding="utf-8").strip()
            if _RECORD_ID.fullmatch(known) and self._knows(known):
                return known
        record = self._new_record(run.resolve().name)
        atomic_write(file, f"{record}\n".encode())
        return record

    def _knows(self, record: str) -> bool:
        with _asking(self.uri):
            try:
                return bool(self._client.get_run(record).info.lifecycle_stage == "active")
            except _mlflow_error() as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False

    def _new_record(self, name: str) -> str:
        client = self._client
        with _asking(self.uri):
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                where = self._artifacts.as_uri() if self._artifacts is not None else None
                with _unless_there():
                    client.create_experiment(EXPERIMENT, artifact_location=where)
                experiment = client.get_experiment_by_name(EXPERIMENT)
            record = client.create_run(experiment.experiment_id, run_name=name)
            client.update_run(
                record.info.run_id, status="FINISHED"
            )  # `set_terminated` prints the address with its login
        return str(record.info.run_id)

    def _ensure_model(self) -> None:
        if self._model() is None:
            with _unless_there():
                self._client.create_registered_model(self.name, tags={_MARK: _FORMAT})

    # --- reading versions ---------------------------------------------------------------------------------------------

    def versions(self) -> list[ModelVersion]:
        """All versions, ascending by number; those that were not finished are none. A damaged one has a `problem`.

        Raises:
            RegistryError: the store does not answer.
        """
        aliases = self._aliases()
        return [self._seen(raw, aliases) for raw in self._raw() if _SEAL in raw.tags]

    def get(self, version: int) -> ModelVersion:
        """The version of that number; a damaged one has a `problem`.

        Raises:
            RegistryError: there is none, or the store does not answer.
        """
        return self._seen(self._sealed(version), self._aliases())

    def find(self, title: str) -> ModelVersion | None:
        """The version of that title ("street v4"); None where there is none."""
        return next((each for each in self.versions() if each.title == title), None)

    def champion(self) -> ModelVersion | None:
        """The version that is served, damaged or not; None where none was promoted yet."""
        return self._with_alias(CHAMPION)

    def challenger(self) -> ModelVersion | None:
        """The version that would be the next champion; None where there is none."""
        return self._with_alias(CHALLENGER)

    def bundle(self, version: int) -> ModelBundle:
        """A version's bundle, verified: in place for a local store, from the cache for a server.

        Raises:
            RegistryError: no such version, it is damaged, or the store does not answer.
            BundleError: the files are missing, damaged, or not those that were registered.
        """
        raw = self._sealed(version)
        found = self._read(raw, {})
        seal = _checked(raw.tags[_SEAL], _SHA256, "seal")
        record = _checked(raw.run_id, _RECORD_ID, "run")
        if self._artifacts is not None:
            return _verified(self._local(record, seal), found, seal)
        path = self._cache / f"v{version}-{seal[:16]}"
        if path.exists():
            try:
                return _verified(path, found, seal)
            except BundleError:
                shutil.rmtree(path)  # a copy; the original may be sound
        self._download(record, seal, path)
        return _verified(path, found, seal)

    def _download(self, record: str, seal: str, path: Path) -> None:
        with atomic_folder(path, marker=MANIFEST, overwrite=True) as folder, _asking(self.uri):
            for name in (MANIFEST, WEIGHTS):  # no name from outside becomes a path
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".downloading-") as temporary:
                    got = self._client.download_artifacts(record, f"{_artifact(seal)}/{name}", temporary)
                    shutil.copyfile(got, folder / name)

    def _local(self, record: str, seal: str) -> Path:
        if self._artifacts is None:
            raise RegistryError(f"{without_login(self.uri)} keeps no bundles on this machine.")
        return self._artifacts / record / "artifacts" / _artifact(seal)

    def _with_alias(self, alias: str) -> ModelVersion | None:
        return next((each for each in self.versions() if alias in each.aliases), None)

    def _whole(self, version: int) -> ModelVersion:
        """The version of that number, which is not damaged."""
        return self._read(self._sealed(version), self._aliases())

    def _seen(self, raw: Any, aliases: Mapping[str, int]) -> ModelVersion:
        """One of MLflow's versions as far as it can be read: a damaged one must not hide the others."""
        try:
            return self._read(raw, aliases)
        except RegistryError as error:
            number = int(raw.version)
            return ModelVersion(
                name=self.name,
                version=number,
                created="",
                parent=None,
                snapshot=None,
                code_version="",
                weights_sha256="",
                metrics={},
                test_snapshot=None,
                config={},
                decision=None,
                reasons=(),
                run=None,
                aliases=_aliases_of(number, aliases),
                problem=str(error),
            )

    def _read(self, raw: Any, aliases: Mapping[str, int]) -> ModelVersion:
        """One of MLflow's versions, strictly."""
        number = int(raw.version)
        try:
            facts = {name: json.loads(raw.tags[f"{_PREFIX}{name}"]) for name in _FACTS}
            return ModelVersion(
                name=self.name,
                version=number,
                created=_text(facts["created"]),
                parent=_text_or_none(facts["parent"]),
                snapshot=_text_or_none(facts["snapshot"]),
                code_version=_text(facts["code_version"]),
                weights_sha256=_checked(facts["weights_sha256"], _SHA256, "weights_sha256"),
                metrics={_text(name): _number(value) for name, value in facts["metrics"].items()},
                test_snapshot=_text_or_none(facts["test_snapshot"]),
                config={_text(name): value for name, value in facts["config"].items()},
                decision=_verdict(facts["decision"]),
                reasons=tuple(_text(reason) for reason in facts["reasons"]),
                run=_checked(raw.run_id, _RECORD_ID, "run"),
                aliases=_aliases_of(number, aliases),
                against=_text_or_none(facts["against"]),
                learned=int(facts["learned"]),
                approvals=_approvals(raw.tags.get(_APPROVALS)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RegistryError) as error:
            raise RegistryError(
                f"What {without_login(self.uri)} says of {self.name} v{number} cannot be used ({error}): its tags were "
                "changed. Delete that version in MLflow, or restore the store from a backup."
            ) from error

    # --- champions ----------------------------------------------------------------------------------------------------

    def set_challenger(self, version: int) -> None:
        """Make a version the challenger.

        Raises:
            RegistryError: no such version, it is damaged, or the store does not answer.
        """
        self._whole(version)
        with self._writing(), _asking(self.uri):
            self._client.set_registered_model_alias(self.name, CHALLENGER, str(version))

    def set_champion(self, version: int) -> ModelVersion | None:
        """Make a version the champion, and remember the one before for `roll_back`.

        Returns:
            The champion so far: None where there was none, the version itself where it is the champion already.

        Raises:
            RegistryError: no such version, it is damaged, or the store does not answer.
        """
        with self._writing():
            self._whole(version)
            before = self.champion()
            if before is None or before.version != version:
                if before is not None:
                    self._remember([*self._history(but=before.version), before.version])
                with _asking(self.uri):  # last: killed before it, all is as it was
                    self._client.set_registered_model_alias(self.name, CHAMPION, str(version))
            if self._aliases().get(CHALLENGER) == version:
                with _asking(self.uri):
                    self._client.delete_registered_model_alias(self.name, CHALLENGER)
            return before

    def previous_champion(self) -> ModelVersion | None:
        """Where `roll_back` goes: the last one of `former_champions`; None without one."""
        return next(reversed(self.former_champions()), None)

    def former_champions(self) -> list[ModelVersion]:
        """The champions before the present one, the last one last; without those that are gone or damaged.

        Raises:
            RegistryError: the store does not answer, or the history was changed.
        """
        versions = {each.version: each for each in self.versions() if each.problem is None}
        history = self._history(but=self._aliases().get(CHAMPION))
        return [versions[number] for number in history if number in versions]

    def roll_back(self) -> tuple[ModelVersion, ModelVersion]:
        """Make the previous champion the champion again; once more goes back once more.

        Returns:
            The version that was left, and the champion now.

        Raises:
            RegistryError: there is no previous champion, or the store does not answer.
        """
        with self._writing():
            left, target = self.champion(), self.previous_champion()
            if left is None or target is None:
                now = f"{left.title} is the first champion" if left is not None else "there is no champion"
                raise RegistryError(f"There is nothing to go back to: {now}. `sscloud models list` shows all versions.")
            with _asking(self.uri):
                self._client.set_registered_model_alias(self.name, CHAMPION, str(target.version))
            history = self._history(but=None)  # killed before this, its last entry is the champion, which is skipped
            last = len(history) - 1 - history[::-1].index(target.version)
            self._remember(history[:last])
            return left, self._whole(target.version)

    def approve(self, version: int, *, against: str | None, reasons: Sequence[str], forced: bool) -> None:
        """Note that a version may take a champion's place.

        Args:
            version: its number.
            against: title of the champion whose place it may take, as it was when that was decided; None where there
                was none.
            reasons: why, a sentence each.
            forced: a person has decided so, whatever the gate says.

        Raises:
            RegistryError: another version became the champion meanwhile; no such version, or it is damaged; the store
                does not answer.
        """
        with self._writing():
            found, champion = self._whole(version), self.champion()
            if (now := champion.title if champion is not None else None) != against:
                raise RegistryError(
                    f"{found.title} was approved in place of {against or 'none, since there was no champion'}, but "
                    f"meanwhile {now or 'none'} is the champion. Try again: it is then compared with that one."
                )
            approval = Approval(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                against=against,
                reasons=tuple(reasons),
                forced=forced,
            )
            data = [dataclasses.asdict(each) for each in [*found.approvals, approval][-_KEPT:]]
            with _asking(self.uri):
                self._client.set_model_version_tag(
                    self.name, str(version), _APPROVALS, json.dumps(data, ensure_ascii=False)
                )

    def _history(self, *, but: int | None) -> list[int]:
        """Versions that were champions, the last one last; `but` is left out at the end: the step was not finished."""
        model = self._model()
        try:
            history = _numbers(model.tags.get(_CHAMPIONS, "[]") if model is not None else "[]")
        except (TypeError, ValueError) as error:
            raise RegistryError(
                f"The history of champions of {self.name} in {without_login(self.uri)} was changed ({error}). Set the "
                f"tag {_CHAMPIONS} of the registered model to a list of version numbers, such as [1, 2]; [] forgets "
                "them."
            ) from error
        while history and history[-1] == but:
            history.pop()
        return history

    def _remember(self, history: Sequence[int]) -> None:
        with _asking(self.uri):
            self._client.set_registered_model_tag(self.name, _CHAMPIONS, json.dumps(list(history)[-_KEPT:]))

    # --- MLflow -------------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> Any:
        if self._connected is None:
            with _asking(self.uri):
                self._connected = _connect(self.uri)
        return self._connected

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer of a local store at a time; a server has its own order."""
        if self._artifacts is None:
            yield
            return
        self._artifacts.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._artifacts.parent / ".registry.lock", timeout=_LOCKED)
        try:
            lock.acquire()
        except Timeout as error:
            raise RegistryError(
                f"Another process has been writing to {without_login(self.uri)} for {_LOCKED:.0f} s. Wait until it has "
                "ended, and try again."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _model(self) -> Any:
        """MLflow's registered model; None where there is none."""
        if self._artifacts is not None and not _database(self.uri).exists():
            return None
        with _asking(self.uri):
            try:
                model = self._client.get_registered_model(self.name)
            except _mlflow_error() as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        if model.tags.get(_MARK) != _FORMAT:
            raise RegistryError(
                f"{without_login(self.uri)} holds a model {self.name!r} that SSCloud did not make, or a newer one did. "
                "Choose another name with --name."
            )
        return model

    def _aliases(self) -> dict[str, int]:
        model = self._model()
        aliases = model.aliases.items() if model is not None else ()
        return {alias: int(version) for alias, version in aliases if _is_number(version)}

    def _raw(self) -> list[Any]:
        """MLflow's versions that are ours, ascending by number."""
        if self._model() is None:
            return []
        with _asking(self.uri):
            found = _pages(self._client.search_model_versions, filter_string=f"name = '{self.name}'", max_results=_PAGE)
        return sorted(
            (raw for raw in found if _KEY in raw.tags and _is_number(raw.version)), key=lambda raw: int(raw.version)
        )

    def _sealed(self, version: int) -> Any:
        """MLflow's version of a number."""
        sealed = [raw for raw in self._raw() if _SEAL in raw.tags]
        for raw in sealed:
            if int(raw.version) == version:
                return raw
        known = ", ".join(str(raw.version) for raw in sealed)
        there = f"It has the versions {known}." if known else "It has none yet: `sscloud models import` makes one."
        raise RegistryError(f"{self.name} has no version {version} in {without_login(self.uri)}. {there}")

    def _of_key(self, key: str) -> Any:
        """The version of a key: a finished one first, then the oldest; None where there is none."""
        found = [raw for raw in self._raw() if raw.tags[_KEY] == key]
        return min(found, key=lambda raw: _SEAL not in raw.tags, default=None)


def _content(manifest: Manifest) -> str:
    """What a model is, whatever it is called: sha256 of its manifest, which names the weights'."""
    named = ("name", "version", "created", "metrics")
    content = {name: value for name, value in manifest.to_dict().items() if name not in named}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _title_of(bundle: Path) -> str | None:
    """What a run's own bundle is called; None where there is none that can be read."""
    try:
        return ModelBundle.load(bundle).manifest.title
    except BundleError:
        return None


def _artifact(seal: str) -> str:
    return f"model-{seal[:16]}"


def _verified(path: Path, version: ModelVersion, seal: str) -> ModelBundle:
    try:
        bundle = ModelBundle.load(path)
        found = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    except BundleError as error:
        raise BundleError(
            f"The files of {version.title} cannot be used. {error} Restore them from a backup; until then, another "
            "version can be served: `sscloud models list`."
        ) from error
    is_its_own = bundle.manifest.title == version.title and bundle.manifest.weights_sha256 == version.weights_sha256
    if found != seal or not is_its_own:
        raise BundleError(
            f"{path} does not hold {version.title} as it was registered: its {MANIFEST} was changed. Restore it from a "
            "backup; until then, another version can be served: `sscloud models list`."
        )
    return bundle


def _connect(uri: str) -> Any:
    # Here: it takes seconds, and most of what imports this module wants names only.
    from mlflow.tracking import MlflowClient

    if (artifacts := artifact_location(uri)) is not None:
        artifacts.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _mlflow_error() -> Any:
    from mlflow.exceptions import MlflowException

    return MlflowException


def _store_errors() -> tuple[type[BaseException], ...]:
    """What MLflow, its database and the network raise; requests' errors are OSErrors."""
    from sqlalchemy.exc import SQLAlchemyError

    return (_mlflow_error(), SQLAlchemyError, OSError)


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    """Turn what MLflow and its libraries raise into one message."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _store_errors()):
            raise
        raise store_error(uri, error) from error


def store_error(uri: str, error: Exception) -> RegistryError:
    """What MLflow or its libraries raised as one message, without a login that an address may hold."""
    lines = str(error).strip().splitlines()
    reason = without_login(lines[0]) if lines else type(error).__name__
    return RegistryError(
        f"The store {without_login(uri)} does not do what was asked: {reason[:300]} Check that it can be reached "
        "and written to (MLFLOW_TRACKING_URI names it), and that its MLflow is not older than this one."
    )


@contextlib.contextmanager
def _unless_there() -> Iterator[None]:
    """Let another process have been first."""
    try:
        yield
    except _mlflow_error() as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _pages(search: Any, **arguments: Any) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        page = search(**arguments, page_token=token)
        found += page
        token = page.token
        if not token or not page:
            return found


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()


def _name_problem(name: str) -> str | None:
    if not name.strip() or name != name.strip() or len(name) > _NAME_LENGTH:
        return f"it must have 1 to {_NAME_LENGTH} characters, the first and the last one visible"
    if not name.isprintable() or set(name) & set("/\\:'\"`") or name.startswith("."):
        return "it must not hold slashes, colons, quotes or invisible characters, or begin with a dot"
    return None


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: null for what is not defined."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _aliases_of(number: int, aliases: Mapping[str, int]) -> frozenset[str]:
    return frozenset(alias for alias, version in aliases.items() if version == number)


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _is_number(version: object) -> bool:
    """Whether it is the number of a version: an int, or a text where it came from a server."""
    return re.fullmatch(r"[0-9]{1,9}", str(version)) is not None


def _numbers(text: str) -> list[int]:
    """A JSON list of numbers of versions."""
    values = json.loads(text)
    if not isinstance(values, list) or not all(type(value) is int and value > 0 for value in values):
        raise TypeError(f"{text[:80]!r} is no list of numbers")
    return values


def _verdict(value: object) -> Verdict | None:
    if value not in (None, *get_args(Verdict)):
        raise ValueError(f"{value!r} is no decision")
    return value  # type: ignore[return-value]


def _text(value: object) -> str:
    """A text that a terminal may show."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in value)


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _checked(value: object, pattern: re.Pattern[str], what: str) -> str:
    """A text from the store that becomes a part of a path."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise RegistryError(f"the {what} {str(value)[:80]!r} is not of the expected form")
    return value


def _approvals(text: str | None) -> tuple[Approval, ...]:
    return tuple(
        Approval(
            at=_text(each["at"]),
            against=_text_or_none(each["against"]),
            reasons=tuple(_text(reason) for reason in each["reasons"]),
            forced=each["forced"] is True,
        )
        for each in json.loads(text or "[]")
    )
