"""A registry of models in memory, for tests of what is done with one."""

import dataclasses
from collections.abc import Callable, Iterable

from sscloud.bundle import ModelBundle
from training.registry import CHAMPION, ModelVersion


class Versions:
    """Bundles by their version, the champion's number, and those of the champions before it.

    Args:
        bundles: of every version.
        champion: number of the champion; None for none yet.
    """

    def __init__(self, bundles: Iterable[ModelBundle], *, champion: int | None = None) -> None:
        self._bundles = {bundle.manifest.version: bundle for bundle in bundles}
        self.number = champion
        self.history: list[int] = []
        self.interrupt: Callable[[], None] = lambda: None
        """Called before and after every change."""

    def get(self, version: int) -> ModelVersion:
        manifest = self._bundles[version].manifest
        return ModelVersion(
            name=manifest.name,
            version=version,
            created=manifest.created,
            parent=manifest.parent,
            snapshot=manifest.snapshot,
            code_version=manifest.code_version,
            weights_sha256=manifest.weights_sha256,
            metrics={},
            test_snapshot=None,
            config={},
            decision="accepted",
            reasons=(),
            run=None,
            aliases=frozenset({CHAMPION} if version == self.number else ()),
        )

    def bundle(self, version: int) -> ModelBundle:
        return dataclasses.replace(self._bundles[version])

    def champion(self) -> ModelVersion | None:
        return None if self.number is None else self.get(self.number)

    def previous_champion(self) -> ModelVersion | None:
        return self.get(self.history[-1]) if self.history else None

    def set_champion(self, version: int) -> ModelVersion | None:
        before = self.champion()
        self.interrupt()
        if self.number is not None and self.number != version:
            self.history.append(self.number)
        self.number = version
        self.interrupt()
        return before

    def roll_back(self) -> tuple[ModelVersion, ModelVersion]:
        left, now = self.champion(), self.previous_champion()
        assert left is not None
        assert now is not None
        self.interrupt()
        self.number = self.history.pop()
        self.interrupt()
        return left, now
