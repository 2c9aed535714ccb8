"""Kaggle without Kaggle: its folders, its variables, no network, and a Python that has its own torch but no pispiral.

Kaggle's client is a stand-in that writes down how it was called and serves a folder; its driving is tested."""
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT
from pispiral.evidence.records import read_log
from pispiral.lab.kaggle import build, dataset_state, pull, push
from pispiral.lab.wheels import kaggle_image, not_on_kaggle, own_requirements, served
from test_run import told

BOOK = "phase_03_core.ipynb"
CUT = {"needles": dict(short_lengths=[256], depths=[.2, .8], core_depths=[.2, .8], seeds=3,
                       methods=["rope", "pi_spiral"], core=["rope", "pi_spiral"]),
       "sanity.depths": [.2], "ruler.lengths": [], "infinitebench.lengths": [], "spans.lengths": []}


@pytest.fixture
def image(tmp_path):
    "A Python with the packages of this one, but without this project."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path/"image"], check=True)
    (site,) = (tmp_path/"image").glob("lib/*/site-packages")
    # not their .pth files, where an editable project would be
    has = [p for p in sys.path if p.endswith("site-packages")]
    (site/"image.pth").write_text("\n".join(has) + "\n")
    python = tmp_path/"image"/"bin"/"python"
    assert subprocess.run([python, "-I", "-c", "import pispiral"], cwd=tmp_path, capture_output=True).returncode
    return python


def needed_by(names):
    "Installed packages among these, and what they need in turn, as far as that is installed."
    found, todo = {}, list(names)
    while todo:
        if (name := canonicalize_name(todo.pop())) in found: continue
        try: found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue
        needs = map(Requirement, found[name].requires or ())
        todo += [r.name for r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture
def bare_image(tmp_path):
    "A Python that has what Kaggle's image lists and what that needs, and nothing that a session must bring along."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path/"bare"], check=True)
    (site,) = (tmp_path/"bare").glob("lib/*/site-packages")
    there = needed_by(kaggle_image()["packages"])
    for dist in (d for name, d in there.items() if name not in not_on_kaggle()):
        for top in {f.parts[0] for f in dist.files if f.parts[0] not in ("..", "__pycache__")}:
            if not (site/top).exists(): (site/top).symlink_to(Path(dist.locate_file(top)))
    python = tmp_path/"bare"/"bin"/"python"
    for name in ("pispiral", "bitsandbytes", "kaleido", "typst", "rouge", "gguf"):
        done = subprocess.run([python, "-I", "-c", f"import {name}"], cwd=tmp_path, capture_output=True)
        assert done.returncode, name
    return python


class Session:
    "A machine for one session: what is attached, the working folder, and a run of all cells."
    def __init__(self, at, python):
        self.at, self.python, self.working = Path(at), python, Path(at)/"kaggle"/"working"
        self.working.mkdir(parents=True)

    def attach(self, folder, *where):
        shutil.copytree(folder, self.at.joinpath("kaggle", "input", *where))
        return self

    def run_all(self, book, temp):
        "Execute the notebook as Kaggle does; it must not fail, stopped or not."
        temp.mkdir(exist_ok=True)
        nowhere = "http://127.0.0.1:9"
        env = dict(PATH=f"{self.python.parent}:/usr/bin:/bin", HOME=str(self.at), TMPDIR=str(temp), OMP_NUM_THREADS="1",
                   KAGGLE_KERNEL_RUN_TYPE="Batch", KAGGLE_URL_BASE="https://www.kaggle.com", PIP_NO_INDEX="1",
                   HTTP_PROXY=nowhere, HTTPS_PROXY=nowhere, http_proxy=nowhere, https_proxy=nowhere)
        done = subprocess.run([self.python, "-m", "papermill", book, "__notebook__.ipynb", "-k", "python3",
                               "--no-progress-bar"], cwd=self.working, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return self

    @property
    def items(self): return [r["key"] for r in read_log(self.working/"runs"/"cut"/"phase_03"/"items.jsonl")]

    @property
    def result(self): return json.loads((self.working/"runs"/"cut"/"phase_03"/"result.json").read_text())

    def cells(self):
        "Seconds from the phase's opening to its first question, and what the questions took."
        book = nbformat.read(self.working/"__notebook__.ipynb", 4)
        def at(word, when):
            return next(datetime.fromisoformat(c.metadata.papermill[when]) for c in book.cells if word in c.source)
        opened = at("open_phase(3", "end_time")
        asked, answered = at("evaluate(language", "start_time"), at("evaluate(language", "end_time")
        return (asked - opened).total_seconds(), (answered - asked).total_seconds()


def stopped_session(make, setup, asking, total):
    "A session that its budget ends between two questions; the budget is adapted where the machine's speed has changed."
    budget = setup + asking/2
    for n in range(5):
        one = make(n, budget/3600)
        if 0 < len(one.items) < total: return one
        budget += asking/3 if not one.items else -asking/3
    raise AssertionError("no budget ended a session between two questions")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [CUT, {}], ids=["cut", "smoke"])
def test_two_sessions_equal_one(tmp_path, runs, image, overrides):
    def folder(name, **how):
        return build("smoke", 3, "someone", tmp_path/name, {**overrides, **how}, "cut", accelerator="none")
    temp = tmp_path/"temp"
    whole = Session(tmp_path/"whole", image).attach(folder("once")/"dataset", "datasets", "someone",
                                                    "pispiral-1").run_all(
        tmp_path/"once"/BOOK, temp)
    assert whole.result["status"] == "done"

    def first(n, hours):
        data = folder(f"first{n}", max_hours=hours)/"dataset"
        return Session(tmp_path/f"session{n}", image).attach(data, "datasets", "someone", "pispiral-1").run_all(
            tmp_path/f"first{n}"/BOOK, temp)
    one = stopped_session(first, *whole.cells(), len(whole.items))
    assert one.result["status"] == "stopped" and "questions left" in one.result["left"]
    said = nbformat.read(one.working/"__notebook__.ipynb", 4).cells[-1].outputs[0].text
    assert said.startswith("not run: the session's time was over")

    two = Session(tmp_path/"last", image).attach(folder("second")/"dataset", "pispiral-1")
    two = two.attach(one.working, "pispiral-cut-phase-03")
    two.run_all(tmp_path/"second"/BOOK, temp)
    assert two.result["status"] == "done"
    assert two.items[:len(one.items)] == one.items and len(set(two.items)) == len(two.items)
    for name in ("items.jsonl", "metrics.jsonl"):
        read = lambda s: told(read_log(s.working/"runs"/"cut"/"phase_03"/name))
        assert read(two) == read(whole)


@pytest.mark.slow
def test_sessions_offline_reach_the_paper(tmp_path, runs, bare_image):
    "Phases 4 and 5 in 4 bits and phase 9's PDF, each a session that goes on from the one before."
    before = None
    for n in (4, 5, 9):
        folder = build("smoke", n, "someone", tmp_path/f"built{n}", {}, "cut", accelerator="none")
        session = Session(tmp_path/f"session{n}", bare_image).attach(folder/"dataset", "pispiral-1")
        if before: session.attach(before.working, f"session-{n}")
        session.run_all(next(folder.glob("phase_*.ipynb")), tmp_path/"temp")
        run, before = session.working/"runs"/"cut", session
        result = json.loads((run/f"phase_{n:02d}"/"result.json").read_text(encoding="utf-8"))
        assert result["status"] == "done", result
    assert {p.name for p in run.glob("phase_*")} >= {"phase_04", "phase_05", "phase_09"}
    assert {r["quantize"] for r in read_log(run/"phase_04"/"items.jsonl")} >= {"nf4"}
    assert (run/"published"/"paper.pdf").read_bytes()[:5] == b"%PDF-"
    assert list(session.working.rglob("*.png")) and all(result["checks"][c]["ok"] for c in ("paper", "figures", "kit"))


def test_what_a_session_brings_is_all_that_the_image_lacks():
    packages = kaggle_image()["packages"]
    for r in own_requirements(): assert served(r, packages) or canonicalize_name(r.name) in not_on_kaggle(), str(r)
    assert {"bitsandbytes", "kaleido", "typst"} <= {*not_on_kaggle()} and kaggle_image()["python"] in ("3.12", "3.13")


def test_a_folder_to_push(tmp_path, runs):
    change = {"needles.haystack": "prose", "max_hours": 2}
    folder = build("smoke", 3, "someone", tmp_path/"out", change, "a.b", session=2)
    about = json.loads((folder/"kernel-metadata.json").read_text(encoding="utf-8"))
    data = json.loads((folder/"dataset"/"dataset-metadata.json").read_text(encoding="utf-8"))
    assert about["id"] == "someone/pispiral-a-b-phase-03-2"
    assert about["kernel_sources"] == ["someone/pispiral-a-b-phase-03"]
    assert about["dataset_sources"] == [data["id"]] and about["machine_shape"] == "NvidiaTeslaT4"
    assert about["enable_internet"] is False and about["enable_gpu"] is True and about["code_file"] == BOOK
    book = nbformat.read(folder/BOOK, 4)
    nbformat.validate(book)
    text = (folder/BOOK).read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(tmp_path) not in text
    scope = {}
    for cell in book.cells:
        if "injected-parameters" in cell.metadata.get("tags", []): exec(cell.source, scope)
    assert (scope["profile"], scope["run_id"], scope["max_hours"]) == ("smoke", "a.b", 2)
    again = build("smoke", 3, "someone", tmp_path/"again", change, "a.b", session=2)
    def contents(at): return {p.name: p.read_bytes() for p in at.rglob("*") if p.is_file()}
    assert contents(folder) == contents(again)


def test_a_changed_wheel_is_refused(tmp_path, runs):
    folder = build("smoke", 3, "someone", tmp_path/"out", accelerator="none")
    (wheel,) = (folder/"dataset").glob("pispiral-*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"x")
    shutil.copytree(folder/"dataset", tmp_path/"input"/"some-data")
    (tmp_path/"working").mkdir()
    first = nbformat.read(folder/BOOK, 4).cells[0].source
    done = subprocess.run([sys.executable, "-c", first], cwd=tmp_path/"working", capture_output=True, text=True)
    assert done.returncode and "which hold 1 of that name: attach the data set someone/pispiral-" in done.stderr


@pytest.mark.parametrize("words, says", [
    (("--phase", "11"), "phase=11"), (("--owner", "Some One"), "owner='Some One'"), (("--session", "0"), "session=0"),
    (("--accelerator", "p10"), "did you mean"), (("--model-source", "x=y"), "'y' is not a model on Kaggle"),
    (("--profile", "kaggle", "--no-internet"), "model Qwen/Qwen2.5-1.5B-Instruct is on a hub"),
    (("--set", "hybridK=1"), "did you mean 'code.hybrid_K'?"), (("--run-id", "../x"), "run_id='../x'")])
def test_bad_input_builds_nothing(tmp_path, runs, cli, words, says):
    given = {"--phase": "3", "--owner": "someone", "--profile": "smoke"}
    rest = [w for k, v in given.items() if k not in words for w in (k, v)]
    _, err = cli.here("kaggle", "build", *rest, "--out", tmp_path/"out", *words, expect=2)
    if says != "did you mean": assert says in err
    assert err.count("\n") == 1 and not (tmp_path/"out").exists()


@pytest.fixture
def client(tmp_path, monkeypatch):
    "A stand-in for Kaggle's client: it writes down its words and serves `served`."
    (tmp_path/"bin").mkdir()
    (tmp_path/"served").mkdir()
    script = tmp_path/"bin"/"kaggle"
    script.write_text(f'''#!{sys.executable}
import json, os, pathlib, shutil, sys
at = pathlib.Path({str(tmp_path)!r})
with open(at/"words.jsonl", "a") as f: f.write(json.dumps(sys.argv[1:]) + "\\n")
told = at/"-".join(sys.argv[1:3])
if told.exists(): sys.exit(print(told.read_text(encoding="utf-8")) and 0)
match sys.argv[1:3]:
    case "datasets", "status": print("ready") if (at/"uploaded").exists() else sys.exit("403 - Forbidden")
    case "datasets", "create":
        (at/"uploaded").touch()
        print("Your private Dataset is being created. Please check progress at https://www.kaggle.com/someone/pispiral-1")
    case "kernels", "push" if (at/"refuse").exists(): print("Kernel push error: token", os.environ["KAGGLE_KEY"])
    case "kernels", "push": print("Kernel version 1 successfully pushed.")
    case "kernels", "output": shutil.copytree(at/"served", sys.argv[sys.argv.index("-p") + 1], dirs_exist_ok=True)
''')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_KEY", "0123456789abcdef-not-a-real-key")
    return tmp_path


def built(folder):
    "The two files of a built folder that the client is asked about."
    (folder/"dataset").mkdir(parents=True)
    (folder/"kernel-metadata.json").write_text(json.dumps(dict(id="someone/pispiral-reference-phase-03")))
    (folder/"dataset"/"dataset-metadata.json").write_text(json.dumps(dict(id="someone/pispiral-1")))
    return folder


def test_push_uploads_once_and_starts(client):
    folder = built(client/"out")
    assert "successfully pushed" in push(folder)
    push(folder)
    words = [json.loads(line)[:2] for line in (client/"words.jsonl").read_text(encoding="utf-8").splitlines()]
    assert words.count(["datasets", "create"]) == 1 and words.count(["kernels", "push"]) == 2
    (client/"refuse").touch() # the client says so and exits with 0
    with pytest.raises(RuntimeError) as e: push(folder)
    assert "Kernel push error" in str(e.value) and os.environ["KAGGLE_KEY"] not in str(e.value)
    assert os.environ["KAGGLE_KEY"] not in (client/"words.jsonl").read_text(encoding="utf-8")


PUSHED = "Kernel version 2 successfully pushed.  Please check progress at https://www.kaggle.com/code/a/b"
BAD_SOURCE = "The following are not valid {} sources and could not be added to the kernel: ['someone/gone']"


@pytest.mark.parametrize("asked, says, reason", [
    *(("kernels-push", f"{BAD_SOURCE.format(kind)}\n{PUSHED}", f"not valid {kind} sources.*someone/gone")
      for kind in ("kernel", "dataset", "competition", "model")),
    ("kernels-push", "401 - Unauthorized", "401 - Unauthorized"),
    ("kernels-push", "403 Client Error: Forbidden for url: https://www.kaggle.com/api", "403 Client Error"),
    ("kernels-push", "", "printed nothing"), ("kernels-push", "Warning: use a newer version", "a newer version"),
    ("datasets-create", "Dataset creation error: The requested title is already in use", "already in use"),
    ("datasets-create", "", "printed nothing"), ("datasets-create", "500 - Internal Server Error", "500 - Internal"),
    ("datasets-status", "error", "pispiral-1 cannot be used: Kaggle says 'error'"),
    ("datasets-status", "", "printed nothing"),
    ("datasets-status", "401 - Unauthorized", "401 - Unauthorized")])
def test_what_kaggle_refuses_is_an_error(client, cli, asked, says, reason):
    "The client ends with 0 in all of these."
    folder = built(client/"out")
    (client/asked).write_text(says, encoding="utf-8")
    out, err = cli.here("kaggle", "push", folder, expect=1)
    assert out == "" and err.count("\n") == 1 and re.search(reason, err), err


@pytest.mark.parametrize("says, reason", [("403 - Forbidden", "403 - Forbidden"), ("", "has written no run yet"),
                                          ("404 - Not Found", "404 - Not Found")])
def test_nothing_that_can_be_pulled_is_an_error(client, runs, cli, says, reason):
    folder = built(client/"out")
    (client/"kernels-output").write_text(says, encoding="utf-8")
    _, err = cli.here("kaggle", "pull", folder, expect=1)
    assert reason in err and err.count("\n") == 1 and not runs.exists()


def test_a_damaged_run_is_not_pulled(client, runs, cli):
    folder, there = built(client/"out"), client/"served"/"runs"/"reference"
    there.mkdir(parents=True)
    (there/"run.json").write_text('{"profile": {"na', encoding="utf-8")
    _, err = cli.here("kaggle", "pull", folder, expect=2)
    assert "reference/run.json that was fetched is damaged" in err and not (runs/"reference").exists()


def test_a_data_set_that_is_not_ready_is_waited_for(client):
    for says, ready in (("ready", True), ("pending", False), ("not ready", False), ("READY", True)):
        (client/"datasets-status").write_text(says, encoding="utf-8")
        assert dataset_state("someone/pispiral-1") is ready


def test_pull_doubles_nothing(client, runs):
    folder = built(client/"out")
    shutil.copytree(ROOT/"runs"/"reference", client/"served"/"runs"/"reference")
    with open(client/"served"/"runs"/"reference"/"phase_03"/"items.jsonl", "a") as f: f.write('{"key": "torn')
    shutil.copytree(ROOT/"runs"/"reference", runs/"reference")
    here = runs/"reference"/"phase_03"
    lines = (here/"items.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (here/"items.jsonl").write_text("".join(lines[:3])) # a session here that was cut short
    (here/"result.json").unlink()
    added = pull(folder)["reference"]
    assert added == {f"phase_{n:02d}": (len(lines) - 3)*(n == 3) for n in range(11)}
    assert told(read_log(here/"items.jsonl")) == told(map(json.loads, lines))
    assert json.loads((here/"result.json").read_text(encoding="utf-8"))["status"] == "done"
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    assert not any(pull(folder)["reference"].values())
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before


def test_pull_refuses_another_configuration(client, runs):
    folder, there = built(client/"out"), client/"served"/"runs"/"reference"
    shutil.copytree(ROOT/"runs"/"reference", runs/"reference")
    there.mkdir(parents=True)
    about = json.loads((runs/"reference"/"run.json").read_text(encoding="utf-8"))
    (there/"run.json").write_text(json.dumps({**about, "profile": {**about["profile"], "hybrid_K": 1024}}))
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="another configuration .code.hybrid_K: 2048 there, 1024 here"): pull(folder)
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before
