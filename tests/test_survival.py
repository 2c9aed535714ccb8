"What goes wrong while a run works: kills, full and read-only disks, spoiled logs, lost memory, NaNs, clocks."
import json
import os
import random
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from tqdm.auto import tqdm

import asking
from conftest import BIN, ROOT
from pispiral.evidence.evaluate import evaluate
from pispiral.evidence.records import read_log, write_json
from pispiral.lab.profiles import load_profile
from test_run import ITEMS, UNIT, kernels, told, wait_for_items, wait_until_free


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return asking.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    "The folder of a grid that nothing happened to."
    out = tmp_path_factory.mktemp("unbroken")
    asking.ask(tiny, out)
    return out


def same(out, unbroken):
    "Nothing lost, nothing doubled, the same metrics."
    keys = [r["key"] for r in read_log(out/"items.jsonl")]
    assert len(keys) == len(set(keys))
    for name in ("items.jsonl", "metrics.jsonl"):
        assert told(read_log(out/name)) == told(read_log(unbroken/name)), name


@contextmanager
def small_disk(folder, size="256k"):
    "A tmpfs; skips where mounting is not allowed."
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode: pytest.skip(f"no tmpfs here: {done.stderr.strip()}")
    try: yield folder
    finally: subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave=0):
    "Take all room of a small disk but the last `leave` bytes."
    filler = folder/"filler"
    with open(filler, "wb", buffering=0) as f:
        try:
            while f.write(bytes(4096)): pass
        except OSError: pass
        f.truncate(max(0, f.tell() - leave))
    return filler


def forked(model, out):
    "A process that asks the grid; a fork has its imports already."
    pid = os.fork()
    if pid: return pid
    tqdm.set_lock(threading.RLock()) # the inherited one is shared: killed while it holds that, it would stop the parent
    try: asking.ask(model, out)
    finally: os._exit(0)


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_and_double_nothing(tiny, unbroken, tmp_path, kills):
    seed, killed, finished, in_the_midst = random.randrange(10**6), 0, 0, 0
    rng, out, begin = random.Random(seed), tmp_path/"0", time.monotonic()
    os.waitpid(forked(tiny, tmp_path/"first"), 0)
    took = time.monotonic() - begin
    while killed < kills:
        before = read_log(out/"items.jsonl")
        pid, end = forked(tiny, out), time.monotonic() + took
        if killed % 2: # every other time once it has begun to ask
            while len(read_log(out/"items.jsonl")) == len(before) and time.monotonic() < end: time.sleep(.002)
        time.sleep(rng.random()*(.5 if killed % 2 else took))
        os.kill(pid, signal.SIGKILL)
        broken = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        after = read_log(out/"items.jsonl")
        assert after[:len(before)] == before
        killed, in_the_midst = killed + broken, in_the_midst + (broken and len(before) < len(after) < 12)
        if not broken:
            finished += 1
            same(out, unbroken)
            out = tmp_path/str(finished)
    asking.ask(tiny, out)
    same(out, unbroken)
    print(f"seed {seed}: {killed} kills, {in_the_midst} of them between the first and the last item; "
          f"{finished} grids finished before theirs")


@pytest.mark.slow
def test_100_kills_over_smoke_runs(runs, cli):
    begin = time.monotonic()
    cli(*UNIT, "--run-id", "whole")
    took, whole = time.monotonic() - begin, read_log(runs/"whole"/ITEMS)
    rng, killed, finished, in_the_midst = random.Random(0), 0, 0, 0
    while killed < 100:
        log = runs/f"killed{finished}"/ITEMS
        before = read_log(log)
        process = cli.start(*UNIT, "--run-id", f"killed{finished}")
        if killed % 2: # every other time once it has begun to ask
            with suppress(AssertionError): wait_for_items(log, len(before) + 1, process)
            time.sleep(rng.random()*.3)
        else: time.sleep(rng.random()*took)
        own = killed % 3 or not (found := kernels(process)) # or, one time in three, its kernel
        victim = process if own else found[0]
        killed += process.poll() is None
        victim.kill()
        process.communicate()
        if log.exists(): wait_until_free(log)
        after = read_log(log)
        assert after[:len(before)] == before
        in_the_midst += len(before) < len(after) < len(whole)
        if len(after) < len(whole): continue
        cli(*UNIT, "--run-id", f"killed{finished}")
        same(log.parent, runs/"whole"/"phase_03")
        finished += 1
    print(f"a run of {took:.0f} s killed {killed} times, {in_the_midst} of them between two of its items; "
          f"{finished} runs finished in spite of it")


def test_a_full_disk_is_one_line_and_the_grid_goes_on_when_there_is_room(tiny, unbroken, tmp_path):
    with small_disk(tmp_path/"disk") as disk:
        filler = fill(disk, leave=4096)
        with pytest.raises(OSError, match="No space left on device"): asking.ask(tiny, disk/"grid")
        some = read_log(disk/"grid"/"items.jsonl")
        assert 0 < len(some) < len(read_log(unbroken/"items.jsonl"))
        filler.unlink()
        asking.ask(tiny, disk/"grid")
        assert read_log(disk/"grid"/"items.jsonl")[:len(some)] == some
        same(disk/"grid", unbroken)


def test_a_full_disk_from_the_command_line(tmp_path, cli, monkeypatch):
    with small_disk(tmp_path/"disk") as disk:
        monkeypatch.setenv("PISPIRAL_RUNS", str(disk))
        fill(disk)
        _, err = cli.here("run", "--profile", "smoke", "--phases", "9", expect=1)
        assert "No space left on device; make room, and the same command goes on" in err and err.count("\n") == 1
        assert not list(disk.glob("smoke/*"))


@pytest.mark.slow
def test_a_disk_that_fills_while_a_run_works(tmp_path, cli, monkeypatch):
    with small_disk(tmp_path/"disk", "64m") as disk:
        monkeypatch.setenv("PISPIRAL_RUNS", str(disk))
        cli(*UNIT, "--run-id", "whole")
        log = disk/"filled"/"phase_03"/"items.jsonl"
        process = cli.start(*UNIT, "--run-id", "filled")
        wait_for_items(log, 2, process)
        filler = fill(disk)
        _, err = process.communicate()
        assert process.returncode == 1 and "No space left on device" in err and "Traceback" not in err
        assert err.splitlines()[-1].startswith("pispiral: ") and "the same command goes on" in err.splitlines()[-1]
        some = read_log(log)
        assert 2 <= len(some) < len(read_log(disk/"whole"/"phase_03"/"items.jsonl"))
        assert cli.here("status", "filled")
        filler.unlink()
        cli(*UNIT, "--run-id", "filled")
        assert read_log(log)[:len(some)] == some
        same(log.parent, disk/"whole"/"phase_03")


def test_a_read_only_folder_is_one_line(tmp_path, cli, monkeypatch):
    with small_disk(tmp_path/"disk") as disk:
        monkeypatch.setenv("PISPIRAL_RUNS", str(disk))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        _, err = cli.here("run", "--profile", "smoke", "--phases", "9", expect=1)
        assert "Read-only file system; name a folder for runs that can be written" in err and err.count("\n") == 1


def test_a_garbage_line_is_named_and_taking_it_out_is_enough(tiny, unbroken, tmp_path, runs, cli):
    folder = runs/"mine"/"phase_03"
    write_json(runs/"mine"/"run.json", dict(profile=load_profile("smoke", {}).model_dump()))
    folder.mkdir()
    lines = (unbroken/"items.jsonl").read_bytes().splitlines(keepends=True)
    (folder/"items.jsonl").write_bytes(lines[0] + b"\x00\xff garbage\n" + b"".join(lines[2:]) + b'{"key": "torn')
    _, err = cli.here("status", "mine", expect=2)
    assert "phase_03/items.jsonl line 2 is corrupt" in err and "delete that line" in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="line 2 is corrupt"): asking.ask(tiny, folder)
    (folder/"items.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]) + b'{"key": "torn')
    asking.ask(tiny, folder)
    same(folder, unbroken)


def test_a_nan_is_noted_and_the_run_goes_on(tmp_path):
    from pispiral.model.load import load_model
    model, tok = load_model(dtype="float32", device="cpu")
    (question, other), settings = grid_of_two(tok)
    only = next(t for t in other[1].ids if t not in question[1].ids)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone()) # not the embedding's any more
    with torch.no_grad(): model.model.embed_tokens.weight[int(only)] = float("nan")
    with torch.inference_mode(): found = evaluate(model, tok, [other, question], settings, tmp_path)
    assert [r["prompt_hash"] for r in found] == [question[1].prompt_hash]
    (lost,) = read_log(tmp_path/"skipped.jsonl")
    assert "logits are not finite" in lost["why"]


def grid_of_two(tok):
    questions, settings = asking.grid(tok, length=160, depths=(.5,), seeds=2)
    return questions[:2], settings


STARVE = """
import resource, sys
from pathlib import Path
import torch
import asking
from pispiral.evidence import evaluate as room
from pispiral.model.load import load_model
model, tok = load_model(sys.argv[1], dtype="float32", device="cpu")
questions, settings = asking.grid(tok, length=256, depths=(.5,), seeds=1)
long = asking.grid(tok, length=4096, depths=(.5,), seeds=1)[0]
with torch.inference_mode():
    room.evaluate(model, tok, questions[:1], settings, Path(sys.argv[2])/"warm") # kernels set up their scratch room
    held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 8*2**20, -1))
    wide = {m: s._replace(chunk=4096) for m, s in settings.items()}
    room.evaluate(model, tok, [long[0], questions[1]], wide, Path(sys.argv[2])/"starved")
"""


def test_memory_that_the_system_refuses_is_noted_and_the_run_goes_on(tmp_path):
    wide = asking.save_tiny(tmp_path/"wide", width=512)
    env = {**os.environ, "PYTHONPATH": str(ROOT/"tests"), "MALLOC_ARENA_MAX": "1"}
    subprocess.run([BIN/"python", "-c", STARVE, wide, tmp_path], check=True, env=env)
    (lost,) = read_log(tmp_path/"starved"/"skipped.jsonl")
    assert lost["length"] == 4096 and "out of memory in chunks of 4096 tokens and of 2048" in lost["why"]
    assert [r["length"] for r in read_log(tmp_path/"starved"/"items.jsonl")] == [256]


def test_clocks_may_jump(tmp_path, monkeypatch):
    from pispiral.lab.phase import Phase
    from pispiral.lab.places import phase_done
    from pispiral.lab.runner import up_to_date
    monkeypatch.setenv("PISPIRAL_RUNS", str(tmp_path))
    profile, folder, clock = load_profile("smoke", {}), tmp_path/"smoke", iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(clock)) # an hour back at every look
    write_json(folder/"run.json", dict(profile=profile.model_dump()))
    for n, more in (9, {}), (10, {}), (9, dict(found=1)): # the decision, and then something new
        Phase(n, profile, folder).finish(**more)
        result = folder/f"phase_{n:02d}"/"result.json"
        os.utime(result, (next(clock),)*2)
        assert phase_done(folder, n) and json.loads(result.read_text(encoding="utf-8"))["seconds"] >= 0
        if n == 10: assert up_to_date(folder, 10)
    assert not up_to_date(folder, 10)
