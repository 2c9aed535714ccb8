import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


# what a developer's shell, a hook or a service may set and no test may depend on
BORROWED = ("COLUMNS", "LINES", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "GIT_DIR", "GIT_WORK_TREE",
            "GIT_INDEX_FILE", "HF_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "PISPIRAL_RUNS", "PISPIRAL_PLUGINS",
            "PISPIRAL_DEADLINE", "PISPIRAL_ROOT", "PISPIRAL_PROGRESS")


def pytest_configure():
    for name in BORROWED: os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A folder for runs, so that a test writes nothing into the repository."
    monkeypatch.setenv("PISPIRAL_RUNS", str(tmp_path/"runs"))
    return tmp_path/"runs"


def hear_ctrl_c():
    "A shell that starts the tests in the background hands down SIGINT ignored."
    signal.signal(signal.SIGINT, signal.default_int_handler)


SEVERAL = """
import contextlib, io, json, sys
from pispiral.cli.main import app
said = []
for words in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: app(words)
        except SystemExit as e: code = e.code or 0
    said.append((code, out.getvalue(), err.getvalue()))
print("\\n" + json.dumps(said))
"""


class Cli:
    "The `pispiral` command in a process group of its own."
    def start(self, *words):
        return subprocess.Popen([BIN/"pispiral", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c)

    def here(self, *words, expect=0):
        "The same command inside this process, which has its imports already; nothing that starts a kernel."
        from pispiral.cli.main import app
        done = CliRunner().invoke(app, [str(w) for w in words])
        assert done.exit_code == expect, f"exit {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done.stdout, done.stderr

    def together(self, *commands, expect=0):
        "Commands one after the other in one fresh process, which imports once: output and errors of each."
        words = json.dumps([[str(w) for w in command] for command in commands])
        done = subprocess.run([sys.executable, "-c", SEVERAL, words], cwd=ROOT, capture_output=True, text=True,
                              encoding="utf-8", timeout=1500)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.split("\n")[-2])
        for command, (code, out, err) in zip(commands, said): assert code == expect, f"{command}: {code}\n{out}\n{err}"
        return [(out, err) for _, out, err in said]

    def __call__(self, *words, expect=0):
        process = self.start(*words)
        out, err = process.communicate(timeout=1500)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
        return out, err


@pytest.fixture
def cli():
    return Cli()
