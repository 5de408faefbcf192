"""Who is asked what is worth labelling: the champion, and earlier versions that knew the same labels."""

from collections.abc import Callable
from typing import Final

from sscloud.bundle import ModelBundle
from sscloud.errors import BundleError, RegistryError
from training.registry import ModelVersion, Registry

JURORS: Final = 3
"""With the champion."""


def jury_of(registry: Registry, champion: ModelVersion, *, say: Callable[[str], None]) -> list[ModelBundle]:
    """The champion, and the newest versions before it that the gate did not refuse, up to `JURORS` in all.

    Opinions are a help, not a condition: an earlier version whose files are lost or damaged is left out.

    Args:
        registry: of the model.
        champion: its present champion.
        say: told who is left out, a sentence each.

    Raises:
        RegistryError: the store does not answer.
        BundleError: the champion's files are missing or damaged.
    """
    jury = [registry.bundle(champion.version)]
    labels = jury[0].manifest.labels.class_ids
    for version in reversed(registry.versions()):
        if len(jury) == JURORS:
            break
        if version.version >= champion.version or version.decision == "refused":
            continue
        try:
            bundle = registry.bundle(version.version)
        except (BundleError, RegistryError) as error:
            say(f"{version.title} has no say in what is labelled next: {error}")
            continue
        if bundle.manifest.labels.class_ids == labels:
            jury.append(bundle)
    return jury
