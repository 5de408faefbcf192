from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sscloud.bundle import ModelBundle
from sscloud.errors import BundleError, RegistryError
from training.jury import jury_of
from training.registry import ModelVersion, Registry


class Shelf:
    """A registry whose bundles say who knows which labels; None: lost."""

    def __init__(self, *labels: tuple[int, ...] | None, refused: int | None = None, error: Exception) -> None:
        self._labels, self._error = labels, error
        self._versions = [
            SimpleNamespace(version=n, title=f"street v{n}", decision="refused" if n == refused else "accepted")
            for n in range(1, len(labels) + 1)
        ]

    def versions(self) -> list[ModelVersion]:
        return cast(list[ModelVersion], self._versions)

    def bundle(self, version: int) -> ModelBundle:
        labels = self._labels[version - 1]
        if labels is None:
            raise self._error
        manifest: Any = SimpleNamespace(title=f"street v{version}", labels=SimpleNamespace(class_ids=labels))
        return ModelBundle(path=Path(), manifest=manifest)


OLD, NEW = (1, 2), (1, 2, 3)


@pytest.mark.parametrize("error", [BundleError("weights.pt is missing."), RegistryError("It has no such artifact.")])
def test_who_is_asked(error: Exception) -> None:
    shelf = Shelf(NEW, NEW, None, NEW, OLD, NEW, NEW, refused=4, error=error)
    champion, said = shelf.versions()[5], list[str]()
    jury = jury_of(cast(Registry, shelf), champion, say=said.append)
    assert [bundle.manifest.title for bundle in jury] == ["street v6", "street v2", "street v1"]
    assert said == [f"street v3 has no say in what is labelled next: {error}"]
    with pytest.raises(type(error)):
        jury_of(cast(Registry, shelf), shelf.versions()[2], say=said.append)
