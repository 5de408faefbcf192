"""The folder that a loop works in: where its parts are, and how far a training in it has come.

WORKSPACE/
  cycle.yaml            settings
  dataset/              what `fetch` writes
  runs/cycle-0001/      a run a cycle; beside them the store of runs and models
  served/               the model volume: what the function reads
  prelabels/            the store of pre-labels
  cycles/0001/          what a cycle has done, decided and chosen
"""

from dataclasses import dataclass
from pathlib import Path

from sscloud.labels import LabelSchema
from training.config import CONFIG
from training.cycle_config import CycleConfig
from training.export import LAST
from training.manifest import LABELS
from training.registry import Registry, default_uri


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder that a loop works in."""

    root: Path

    @property
    def dataset(self) -> Path:
        """What `fetch` writes."""
        return self.root / "dataset"

    @property
    def runs(self) -> Path:
        """Run folders, and the store of runs and models."""
        return self.root / "runs"

    @property
    def served(self) -> Path:
        """The model volume: what the function reads."""
        return self.root / "served"

    @property
    def prelabels(self) -> Path:
        """The store of pre-labels."""
        return self.root / "prelabels"

    @property
    def cycles(self) -> Path:
        """A folder a cycle."""
        return self.root / "cycles"

    def run(self, number: int) -> Path:
        """The training run of a cycle."""
        return self.runs / f"cycle-{number:04d}"

    def schema_file(self, config: CycleConfig) -> Path | None:
        """The label schema that is asked for, else the dataset's own; None: the one that is shipped."""
        own = self.dataset / LABELS
        if config.labels is not None:
            return self.root / config.labels
        return own if own.is_file() else None

    def schema(self, config: CycleConfig) -> LabelSchema:
        """The label schema.

        Raises:
            SchemaError: it cannot be read.
        """
        file = self.schema_file(config)
        return LabelSchema.default() if file is None else LabelSchema.from_yaml(file)


def open_registry(place: Workspace, config: CycleConfig, tracking_uri: str | None) -> Registry:
    """The registry of a workspace; it asks its store for nothing before it is asked itself.

    Args:
        place: the workspace.
        config: names the model.
        tracking_uri: the MLflow store; None: a SQLite file in the workspace.
    """
    return Registry(tracking_uri or default_uri(place.root), name=config.name, cache=place.runs / "cache")


def has_learned(run: Path) -> bool:
    """Whether a training has come to its first checkpoint: before that nothing is lost by starting it anew."""
    return (run / CONFIG).is_file() and (run / LAST).is_file()
