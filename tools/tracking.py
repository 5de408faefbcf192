"""What every command asks of MLflow's store of runs and models: which one it is, and that it keeps quiet."""

import os
from pathlib import Path


def quiet_mlflow() -> None:
    """Set what MLflow reads when it is imported, where nobody has set it.

    No reports to its makers, no remarks on a new store, no progress bars, and no addresses of runs on the screen: they
    show the login that a server's address may hold.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def store_uri(workspace: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file of a workspace."""
    from training.registry import default_uri

    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(workspace)
