"""Run → bundle: the best checkpoint with everything that prediction needs."""

import csv
from pathlib import Path

import torch

from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import BundleError
from sscloud.networks import load_network
from training.config import read_run

METRICS, BEST, LAST, BUNDLE = "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "bundle"

_PREFIX = "model."
"""Where the LightningModule keeps the network."""


def export_bundle(run: Path, output: Path, *, name: str, version: int, overwrite: bool = False) -> ModelBundle:
    """Write the best model of a run as a bundle.

    Args:
        run: a run folder.
        output: the bundle's folder.
        name: of the model.
        version: of the model.
        overwrite: replace `output`.

    Raises:
        ConfigError: `run` is no run, or `output` exists.
        BundleError: the run has no whole epoch yet, or its checkpoint is damaged.
    """
    config, facts = (found := read_run(run)).config, found.facts
    best = run / BEST
    if not best.exists():
        raise BundleError(f"{run} has no {BEST} yet: no epoch has ended. Let it train, or go on with --resume.")
    try:
        checkpoint = torch.load(best, map_location="cpu", weights_only=True)
        state, epoch = checkpoint["state_dict"], int(checkpoint["epoch"]) + 1
    except Exception as error:  # torch raises pickle, zip and runtime errors for damaged files
        raise BundleError(f"{best} cannot be read: {str(error).splitlines()[0]}") from error
    weights = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    model = load_network(facts.architecture, weights, source=str(best))
    try:
        metrics = _metrics_of(epoch, run / METRICS)
    except (OSError, StopIteration, KeyError, ValueError) as error:
        raise BundleError(
            f"{run / METRICS} has no readable row of epoch {epoch}, which {best} holds. Bring the file back, or train "
            "on with --resume."
        ) from error
    manifest = Manifest(
        name=name,
        version=version,
        architecture=facts.architecture,
        labels=facts.labels,
        label_ids=facts.label_ids,
        scale=config.scale,
        resample=config.resample,
        encoding=facts.encoding,
        aspect=facts.aspect,
        elevation=facts.elevation,
        azimuth=facts.azimuth,
        frame=facts.frame,
        temperature=metrics.get("temperature", 1.0),
        parent=facts.parent,
        snapshot=facts.snapshot,
        learned=facts.learned,
        metrics=metrics,
        code_version=facts.code_version,
    )
    return save_bundle(output, model, manifest, overwrite=overwrite)


def _metrics_of(epoch: int, path: Path) -> dict[str, float]:
    """The row of `metrics.csv` of an epoch, as a manifest keeps it."""
    with path.open(newline="") as stream:
        row = next(row for row in csv.DictReader(stream) if int(row["epoch"]) == epoch)
    return {
        f"validation_{name}" if name == "miou" else name: float(value)
        for name, value in row.items()
        if value and not name.endswith("seconds") and not name.endswith("_per_second")  # of the machine, not the model
    }
