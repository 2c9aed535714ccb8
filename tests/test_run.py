"Whole runs, kills and the command line: what no notebook cell can test."
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import yaml

from conftest import BIN, ROOT
from pispiral.evidence.records import Log, read_log

ITEMS = "phase_03/items.jsonl"
UNIT = ["run", "--profile", "smoke", "--phases", "3"] # eight short questions, without the benchmarks and streams
for change in ("needles.methods=[rope,yarn]", "needles.core=[rope,yarn]", "needles.short_lengths=[192,256]",
               "ruler.tasks=[]", "infinitebench.tasks=[]", "spans.lengths=[]"):
    UNIT += ["--set", change]


def told(records):
    "Records without what a clock says, and without which of two equal modes was asked."
    drop = ("seconds", "runtime", "tokens_read", "same_as")
    return sorted((json.dumps({k: v for k, v in r.items() if k not in drop}, sort_keys=True) for r in records))


def wait_for_items(path, n, process, seconds=300):
    "Wait until a log holds `n` whole lines."
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= n: return
        time.sleep(.05)
    raise AssertionError(f"{path.name} never held {n} lines")


def wait_until_free(path, seconds=60):
    "Wait until no process holds a log's lock."
    with open(path) as f:
        for _ in range(seconds*10):
            try: return fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError: time.sleep(.1)
    raise AssertionError(f"{path.name} is still being written")


def kernels(process):
    "The kernels of a runner."
    return [p for p in psutil.Process(process.pid).children() if "ipykernel" in " ".join(p.cmdline())]


def test_killed_run_goes_on(runs, cli):
    words = (*UNIT, "--set", "needles.seeds=4", "--run-id") # so many questions that some are left after two kills
    cli(*words, "whole")
    log = runs/"killed"/ITEMS
    process = cli.start(*words, "killed", "--jobs", "2")
    wait_for_items(log, 2, process)
    (kernel,) = kernels(process)
    workers = kernel.children(recursive=True)
    assert sum("spawn_main" in " ".join(p.cmdline()) for p in workers) == 2
    kernel.kill() # its notebook's metadata says that it is still running
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("pispiral: phase 3 (core) failed: the kernel died")
    assert "failed" in cli.here("status", "killed")[0] and not psutil.wait_procs(workers, timeout=20)[1]
    first = log.read_text(encoding="utf-8")
    process = cli.start(*words, "killed")
    wait_for_items(log, first.count("\n") + 1, process)
    process.kill() # the runner alone: its kernel must notice and stop too
    process.wait()
    wait_until_free(log)
    before = log.read_text(encoding="utf-8")
    assert before.startswith(first) and 3 <= before.count("\n") < len(read_log(runs/"whole"/ITEMS))
    with open(log, "a") as f: f.write('{"key": "torn')
    cli(*words, "killed")
    after = log.read_text(encoding="utf-8")
    assert after.startswith(before) # nothing asked again, nothing lost
    keys = [r["key"] for r in read_log(log)]
    assert len(keys) == len(set(keys))
    for name in ("items.jsonl", "metrics.jsonl"):
        assert told(read_log(runs/"killed"/"phase_03"/name)) == told(read_log(runs/"whole"/"phase_03"/name))


def test_ctrl_c_stops_and_says_how_to_go_on(runs, cli):
    process = cli.start("run", "--profile", "smoke", "--phases", "3", "--jobs", "2")
    wait_for_items(runs/"smoke"/ITEMS, 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in err
    assert read_log(runs/"smoke"/ITEMS)
    assert len(family) >= 3 and not psutil.wait_procs(family, timeout=20)[1] # the kernel and its workers are gone


@pytest.fixture
def short(tmp_path, monkeypatch):
    "Another repository with the same notebooks, whose smoke profile asks two needles."
    for folder in ("profiles", "phases"): shutil.copytree(ROOT/"nbs"/folder, tmp_path/"short"/"nbs"/folder)
    shutil.copyfile(ROOT/"settings.ini", tmp_path/"short"/"settings.ini")
    path = tmp_path/"short"/"nbs"/"profiles"/"smoke.yaml"
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    profile["needles"] |= dict(short_lengths=[256], core_depths=[.2])
    for suite in ("ruler", "infinitebench"): profile[suite]["tasks"] = []
    profile["spans"] = dict(lengths=[])
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    monkeypatch.setenv("PISPIRAL_ROOT", str(tmp_path/"short"))


def papermill(tmp_path, *parameters):
    words = [w for name, value in parameters for w in ("-p", name, str(value))]
    return subprocess.run([BIN/"papermill", "nbs/phases/phase_03_core.ipynb", tmp_path/"OUT.ipynb", "-k", "python3",
                           *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_bare_papermill(runs, short, tmp_path):
    done = papermill(tmp_path, ("profile", "smoke"), ("pos", "hybrid"), ("hybrid_K", 1024))
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in runs.glob("*/run.json"))
    methods = {(r["mode"], r["config"].get("hybrid_K")) for r in read_log(run/ITEMS)}
    assert methods == {("rope", None), ("hybrid", 1024)}


def test_bare_papermill_refuses_an_unknown_parameter(runs, tmp_path):
    failed = papermill(tmp_path, ("profile", "smoke"), ("pos", "hybrid"), ("hybridK", 1024))
    assert failed.returncode != 0 and "did you mean 'hybrid_K'?" in failed.stderr
    assert not runs.exists()


@pytest.mark.parametrize("words, says", [
    (("--profile", "dmeo"), "did you mean 'demo'?"),
    (("--set", "needles.methods=[hybird]"), "did you mean 'hybrid'?"),
    (("--set", "model=smollm2-135m-instruc"), "did you mean 'smollm2-135m-instruct'?"),
    (("--set", "hybridK=1024"), "did you mean 'code.hybrid_K'?"),
    (("--set", "hybrid_K=1024"), "'hybrid_K' is now 'code.hybrid_K'"),
    (("--pos", "hybird"), "did you mean 'hybrid'?"),
    (("--plugin", "nowhere.py"), "plugin='nowhere.py' is not a file"),
    (("--set", "code.hybrid_K=16384"), "hybrid_K=16384 must be below target_length=16384"),
    (("--set", "needles.short_lengths=[20]"), "length=20"),
    (("--set", "needles.long_lengths=[1000000000]", "--set", "code.target_length=2000000000"), "does not fit"),
    (("--set", "code.hybrid_K=6000"), "6000"),
    (("--set", "device=gpu"), "device='gpu'"),
    (("--phases", "11"), "0, 1, 2"),
    (("--run-id", "../elsewhere"), "run_id='../elsewhere'"),
    (("--jobs", "0"), "jobs=0 leaves nobody to work: allowed: 1 and above"),
    (("--executor", "rayy"), "did you mean 'ray'?"),
    (("--address", "auto"), "needs executor='ray'"),
])
def test_bad_input_is_one_line_and_writes_nothing(runs, cli, words, says):
    profile = () if "--profile" in words else ("--profile", "smoke")
    _, err = cli.here("run", *profile, *words, expect=2)
    assert says in err and err.count("\n") == 1 and "Traceback" not in err
    assert not runs.exists()


def test_bad_input_from_a_terminal(runs, cli):
    _, err = cli("run", "--profile", "dmeo", expect=2)
    assert "did you mean 'demo'?" in err and err.count("\n") == 1
    assert not runs.exists()


def test_a_run_of_another_configuration_is_not_written_over(runs, cli):
    "Of one that has only been opened; test_all_phases asks the same of a whole one."
    cli.here("run", "--profile", "smoke", "--set", "max_hours=0.000000001", "--run-id", "mine", expect=3)
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    _, err = cli.here("run", "--profile", "smoke", "--set", "code.hybrid_K=1024", "--run-id", "mine", expect=2)
    assert "code.hybrid_K: 2048 there, 1024 here" in err
    with Log(runs/"mine"/".lock"): # somebody is at work
        _, err = cli.here("run", "--profile", "smoke", "--phases", "9", "--run-id", "mine", expect=2)
    assert err == "pispiral: runs/mine is being worked on by another process: wait for it or stop it\n"
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before


def test_importing_pispiral_does_not_import_torch():
    code = ("import pispiral, sys; assert 'torch' not in sys.modules; "
            "from pispiral import load_model; assert 'torch' in sys.modules")
    subprocess.run([BIN/"python", "-c", code], check=True)
