"""Processes that run `sscloud` and can be killed for next to nothing: copies of one that has imported everything.

python -m nursery        reads a line of JSON per process: {"argv", "cwd", "log"}; answers its number, then its end
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """The process that is copied.

    Args:
        environment: of the copies.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": paths, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        )
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, argv: Sequence[str], *, cwd: Path, log: Path) -> int:
        """Run a verb → number of the process; its output goes to `log`. One at a time: `wait` comes next."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": list(argv), "cwd": str(cwd), "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def wait(self) -> int:
        """The status with which it ends; negative: the signal that killed it."""
        return self._read()

    def _read(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def _main() -> None:
    for module in ("lightning.pytorch", "mlflow.store.tracking.sqlalchemy_store", "mlflow.tracking"):
        importlib.import_module(module)
    for module in ("tools.commands.cycle", "tools.cycle", "training.cycle_plan", "training.train"):
        importlib.import_module(module)
    from tools.cli import main

    print(0, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
            os.chdir(order["cwd"])
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 70
            try:
                status = main(order["argv"])
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _main()
