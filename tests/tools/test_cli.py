"""The command line: overview, verbs, errors in one line, Ctrl-C."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sscloud import __version__
from sscloud.errors import ConfigError
from tools import cli

VERBS = [name for group in cli.GROUPS.values() for name in group]
ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def command(run: object) -> SimpleNamespace:
    """A verb that does what the test says."""
    return SimpleNamespace(
        NAME="try", HELP="h", DESCRIPTION="d", EXAMPLES="  sscloud try", add_arguments=lambda parser: None, run=run
    )


class TestOverview:
    @pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
    def test_names_every_verb_with_its_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
        assert dict(lines) == {name: cli.load(name).HELP for name in VERBS}
        assert out.startswith("usage: sscloud VERB")

    def test_imports_nothing_heavy(self) -> None:
        """What makes it answer at once: the libraries that take seconds are imported by the verbs that need them."""
        done = python(
            "import json, sys; from tools import cli; cli.main(['--help']); print(json.dumps(sorted(sys.modules)))"
        )
        assert done.returncode == 0, done.stderr
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        heavy = {"torch", "lightning", "torchmetrics", "mlflow", "numpy", "cv2", "PIL", "yaml", "fastapi", "jinja2"}
        assert "tools.commands.train" in loaded
        assert not loaded & heavy

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"sscloud {__version__}\n"

    def test_as_a_program(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli"], capture_output=True, text=True, cwd=ROOT, check=False, encoding="utf-8"
        )
        assert done.returncode == 0
        assert done.stderr == ""
        assert "sscloud VERB" in done.stdout


class TestVerbs:
    @pytest.mark.parametrize("name", VERBS)
    def test_help_teaches_by_example(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([name, "--help"])
        out = capsys.readouterr().out
        assert out.startswith(f"usage: sscloud {name} ")
        examples = out.split("\nexamples:\n")[1]
        assert f"sscloud {name}" in examples

    @pytest.mark.parametrize("name", VERBS)
    def test_module_and_verb_agree(self, name: str) -> None:
        verb = cli.load(name)
        assert name == verb.NAME
        assert len(verb.HELP) <= 90
        assert not verb.HELP.endswith(".")

    @pytest.mark.parametrize("name", VERBS)
    def test_flags_are_kebab_case_and_explained(self, name: str) -> None:
        parser = argparse.ArgumentParser()
        cli.load(name).add_arguments(parser)
        for action in parser._actions:
            assert action.help, f"{name}: {action.dest} has no help"
            assert all("_" not in flag and flag == flag.lower() for flag in action.option_strings)

    @pytest.mark.parametrize(
        ("typed", "hint"),
        [("predikt", "Did you mean 'predict'?"), ("serv", "Did you mean 'serve'?"), ("import", None), ("qqq", None)],
    )
    def test_an_unknown_verb(self, typed: str, hint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([typed, "x"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"sscloud: there is no verb '{typed}'.")
        assert err.count("\n") == 1
        assert "train" in err
        if hint:
            assert hint in err

    def test_a_wrong_flag_says_where_help_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match=r"^2$"):
            cli.main(["predict", "--no-such-flag"])
        err = capsys.readouterr().err
        assert err.startswith("sscloud predict: ")
        assert err.endswith("Try: sscloud predict --help\n")


class TestEndings:
    def test_an_error_is_one_line_and_status_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        def run(_: argparse.Namespace) -> int:
            raise ConfigError("Found a, expected b. Do c.")

        assert cli.run_command(command(run), [], prog="sscloud try") == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", "sscloud try: Found a, expected b. Do c.\n")

    def test_a_real_one_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        code = "import sys; from tools.cli import main; sys.exit(main())"
        done = python(code, "predict", str(tmp_path / "нет"), str(tmp_path), "-o", str(tmp_path / "out"))
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("sscloud predict: ")

    def test_a_missing_extra_says_what_to_install(self, capsys: pytest.CaptureFixture[str]) -> None:
        def run(_: argparse.Namespace) -> int:
            raise ModuleNotFoundError("No module named 'lightning'", name="lightning")

        assert cli.run_command(command(run), [], prog="sscloud try") == 2
        assert "the package lightning is missing. Install it: pip install 'sscloud[train]'" in capsys.readouterr().err

    def test_a_defect_keeps_its_traceback(self) -> None:
        def run(_: argparse.Namespace) -> int:
            raise ZeroDivisionError("a defect")

        with pytest.raises(ZeroDivisionError, match="a defect"):
            cli.run_command(command(run), [], prog="sscloud try")

    def test_the_status_of_the_verb_is_returned(self) -> None:
        assert cli.run_command(command(lambda _: 7), [], prog="sscloud try") == 7

    def test_ctrl_c_ends_with_130_and_one_line(self) -> None:
        code = (
            "import sys, time; from types import SimpleNamespace; from tools import cli\n"
            "def run(args):\n    print('ready', flush=True)\n    time.sleep(60)\n"
            "verb = SimpleNamespace(DESCRIPTION='', EXAMPLES='', run=run, add_arguments=lambda parser: None)\n"
            "sys.exit(cli.run_command(verb, [], prog='sscloud try'))\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == "sscloud try: stopped.\n"
