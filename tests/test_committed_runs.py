"""The runs that are committed here are judged today as they were when they were made."""
import json

import pytest

from conftest import ROOT
from pispiral.verdict.decision import decide
from pispiral.verdict.gates import evaluate_gates, load_gates

RUNS = ROOT/"runs"
GATES = load_gates(ROOT/"nbs"/"profiles"/"gates.yaml")
MILLION = {"2.hybrid_short": "pass", "2.flat_memory": "pass", "2.stable_throughput": "inconclusive",
           "3.smooth_decay": "inconclusive", "3.no_oscillation": "inconclusive"}  # whatever else: not run


@pytest.fixture(scope="module")
def judged():
    "The reference run's gates as they were recorded and as they are judged now, by name."
    recorded = json.loads((RUNS/"reference"/"phase_10"/"result.json").read_text())["gates"]
    return {g["id"]: g for g in recorded}, {g.id: g for g in evaluate_gates(RUNS/"reference", GATES)}


def test_the_reference_run_has_its_recorded_verdicts(judged):
    then, now = judged
    assert {k: g.verdict for k, g in now.items()} == {k: g["verdict"] for k, g in then.items()}


def test_each_with_the_same_numbers(judged):
    then, now = judged
    assert {k: g.reason for k, g in now.items()} == {k: g["reason"] for k, g in then.items()}
    for name, gate in now.items():
        assert gate.evidence == pytest.approx(then[name]["evidence"], nan_ok=True), name


def test_the_decision_is_the_recorded_one():
    recorded = json.loads((RUNS/"reference"/"phase_10"/"decision.json").read_text())
    holds = [b["name"] for b in recorded["branches"] if b["holds"]]
    assert decide(evaluate_gates(RUNS/"reference", GATES)).holds == holds


def test_the_stream_of_a_million_tokens():
    found = {g.id: g.verdict for g in evaluate_gates(RUNS/"million", GATES)}
    assert found == {g.id: MILLION.get(g.id, "not run") for g in GATES}


def test_old_records_pair_with_each_other():
    "Every item of the reference run says which code answered, with that code's own parameters and no others."
    from pispiral.verdict.pairs import load_records
    rec = load_records(RUNS/"reference")
    rope = rec.items[rec.items["mode"] == "rope"]
    assert rec.profile["methods"] and set(rec.items.attn_backend) == {"sdpa"}
    assert rope.hybrid_K.isna().all() and rec.items[rec.items["mode"] == "hybrid"].hybrid_K.notna().all()
