"Many machines: workers that are processes, a Ray cluster of two nodes, and submitit, against one process."
import math
import os
import socket
import tempfile
import time
from importlib.util import find_spec

import psutil
import pytest

import arithmetic
import asking
from conftest import ROOT
from pispiral.base import deadline
from pispiral.evidence import clusters, executors
from pispiral.evidence.executors import answered
from pispiral.evidence.records import read_log
from test_survival import same, tiny, unbroken  # noqa: F401 fixtures

ray_here = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
submitit_here = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture
def asked_by(monkeypatch):
    "Ask the tiny grid with an executor."
    def ask(out, model, executor, jobs, address=""):
        for name, value in dict(EXECUTOR=executor, JOBS=str(jobs), ADDRESS=address).items():
            monkeypatch.setenv(f"PISPIRAL_{name}", value)
        return asking.ask(model, out)
    yield ask
    clusters.stop_crew()


def free_ports():
    "For a node's agents: a node gives up on them after 15 seconds, which a busy machine takes to start them."
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return dict(zip(names, ports))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "Two nodes of one processor each, on this machine."
    os.environ |= dict(RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=os.path.join(tempfile.gettempdir(), "pispiral-ray"),
                       RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", # loopback, whatever else this machine is called
                       RAY_worker_niceness="0",               # Ray's workers give way to all else unless told
                       PYTHONPATH=os.pathsep.join([str(ROOT/"tests"), os.environ.get("PYTHONPATH", "")]))
    import ray
    from ray.cluster_utils import Cluster
    for attempt in range(2):
        nodes = Cluster()
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1, num_gpus=0, object_store_memory=80*2**20, include_dashboard=False,
                               **free_ports())
            nodes.wait_for_nodes()
            break
        except Exception as e: # a node gives up when its agents take long to start
            nodes.shutdown()
            if attempt == 1: pytest.skip(f"Ray does not start here: {str(e).splitlines()[0]}")
    yield nodes
    clusters.stop_crew()
    ray.shutdown()
    nodes.shutdown()


def on(cluster, rounds):
    "A crew of that cluster."
    return clusters.Cluster(arithmetic.job(rounds), executors.Place("ray", None, cluster.address), "cpu", 0)


def answers_through_kills(crew, kills, rounds, todo, every=6):
    "Answers of a crew whose workers are killed as they work; each comes once."
    killed, got = 0, {}
    for a in answered(crew, todo, lambda n: None):
        assert a.key not in got
        got[a.key] = a.value
        if killed < kills and len(got) % every == 3: killed += psutil.Process(a.pid).kill() is None
    crew.stop()
    assert killed == kills and got == arithmetic.here(rounds, todo)


def test_a_worker_killed_again_and_again_loses_and_doubles_nothing():
    crew = executors.Processes(arithmetic.job(20_000), ["cpu"]*2, 1)
    answers_through_kills(crew, 10, 20_000, arithmetic.cells(10, 8))


def test_time_that_is_over_ends_the_workers_too(tiny, unbroken, tmp_path, asked_by, monkeypatch):
    hours = iter([math.inf]*4)
    with monkeypatch.context() as over:
        over.setattr(deadline, "left", lambda: next(hours, 0))
        with pytest.raises(deadline.OutOfTime, match="of 12 questions left"):
            asked_by(tmp_path/"grid", tiny, "local", 2)
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    some = read_log(tmp_path/"grid"/"items.jsonl")
    assert 0 < len(some) < 12
    asked_by(tmp_path/"grid", tiny, "local", 2)
    assert read_log(tmp_path/"grid"/"items.jsonl")[:len(some)] == some
    same(tmp_path/"grid", unbroken)


@ray_here
def test_two_ray_nodes_give_the_records_of_one_process(tiny, unbroken, tmp_path, cluster, asked_by):
    asked_by(tmp_path/"ray", tiny, "ray", "", cluster.address)
    crew = clusters.kept[0][-1]
    assert (crew.size, crew.threads, len(crew.workers)) == (2, 1, 2)
    same(tmp_path/"ray", unbroken)


@ray_here
@pytest.mark.slow
def test_a_ray_worker_killed_ten_times_loses_and_doubles_nothing(cluster):
    answers_through_kills(on(cluster, 400_000), 10, 400_000, arithmetic.cells(10, 8))


@ray_here
@pytest.mark.slow
def test_how_much_faster_two_ray_nodes_are(cluster):
    "Reports a ratio and asserts none: a machine may be busy with something else."
    crew, todo = on(cluster, 3_000_000), arithmetic.cells(8, 1)
    list(answered(crew, todo[:2], lambda n: None)) # both have started
    for _ in range(3):
        begin = time.perf_counter()
        one = arithmetic.here(3_000_000, todo)
        middle = time.perf_counter()
        two = {a.key: a.value for a in answered(crew, todo, lambda n: None)}
        assert one == two
        print(f"one process {middle - begin:.2f} s, two nodes {time.perf_counter() - middle:.2f} s: "
              f"{(middle - begin)/(time.perf_counter() - middle):.2f} times as fast")
    crew.stop()


@submitit_here
def test_submitit_gives_the_records_of_one_process(tiny, unbroken, tmp_path, asked_by, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked_by(tmp_path/"queue", tiny, "submitit", 1)
    same(tmp_path/"queue", unbroken)


def test_a_package_that_is_absent_is_named(monkeypatch, cli, runs):
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    _, err = cli.here("run", "--profile", "smoke", "--executor", "ray", expect=2)
    assert "executor='ray' needs a package that is not installed: pip install ray" in err and err.count("\n") == 1
    assert not runs.exists()
