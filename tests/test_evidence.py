"""What decides a claim, attacked: records that should not pass, that should not be read, and phases that are killed."""
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import ROOT
from made_runs import PROFILE
from pispiral.evidence.history import value_at
from pispiral.evidence.records import write_json, write_log
from pispiral.cli.main import app
from pispiral.lab.places import profile_names
from pispiral.lab.profiles import keys_of, load_profile
from pispiral.lab.sections import Profile
from pispiral.verdict.decision import decide
from pispiral.verdict.examples import example_items
from pispiral.verdict.gates import evaluate_gates, load_gates

GATES = load_gates(ROOT/"nbs"/"profiles"/"gates.yaml")
SMALL = dict(PROFILE["needles"], short_lengths=[512], long_lengths=[12288])
PROFILE = {**PROFILE, "code": dict(hybrid_K=256, target_length=65536), "needles": SMALL}


def answers(mode, length, scores, window=None, **more):
    "Items as a run writes them, one a draw; the i-th is the same question for every mode."
    return example_items(mode, length, scores, more=dict(window=window), **{"hybrid_K": 256, **more})


def judge(folder, gate, phase, items, profile={}, **files):
    "One gate of a made-up run."
    write_json(folder/"run.json", {"profile": {**PROFILE, **profile}})
    write_log(folder/f"phase_{phase:02d}"/"items.jsonl", items)
    for name, text in files.items(): (folder/f"phase_{phase:02d}"/name).write_text(text, encoding="utf-8")
    return {g.id: g for g in evaluate_gates(folder, GATES, phases=[phase])}[gate]


@pytest.mark.parametrize("n, verdict", [*((n, "inconclusive") for n in (1, 5, 100, 355)), (356, "pass")])
def test_ties_pass_the_short_guard_only_when_there_are_enough(tmp_path, n, verdict):
    found = judge(tmp_path/"r", "2.hybrid_short", 2, answers("rope", 512, [1]*n) + answers("hybrid", 512, [1]*n))
    assert found.verdict == verdict
    if verdict != "pass":
        assert f"about {356 - n} more draws" in found.needs and found.draws == 356
        assert found.command == "pispiral run --run-id r --until-decided --gates 2.hybrid_short"


def test_the_bound_and_not_the_mean_is_held_against_the_margin(tmp_path):
    rope = answers("rope", 512, [1]*1000)
    for k, (lost, verdict) in enumerate([(0, "pass"), (10, "inconclusive"), (30, "fail"), (5, "inconclusive")]):
        found = judge(tmp_path/str(k), "2.hybrid_short", 2, rope + answers("hybrid", 512, [0]*lost + [1]*(1000 - lost)))
        assert (found.verdict, lost) == (verdict, lost)
        assert (found.evidence["hybrid_lower"] > -.01) == (verdict == "pass")
        assert (found.evidence["hybrid_upper"] < -.01) == (verdict == "fail")


def test_a_windowed_baseline_proves_nothing_even_where_it_comes_first(tmp_path):
    blind, sees = answers("rope", 12288, [0]*40, window=1024), answers("rope", 12288, [1]*40)
    hybrid = answers("hybrid", 12288, [1]*40)
    assert judge(tmp_path/"a", "3.gain_over_rope", 3, blind + hybrid).verdict == "not run"
    assert judge(tmp_path/"b", "3.gain_over_rope", 3, blind + sees + hybrid).verdict == "fail" # full attention finds it
    assert judge(tmp_path/"c", "3.gain_over_rope", 3, blind + answers("rope", 12288, [0]*40) + hybrid).verdict == "pass"


def test_what_is_smooth_or_steady_on_one_draw_a_length_is_open(tmp_path):
    lengths = [512*2**i for i in range(9)]
    needles = dict(needles=dict(SMALL, short_lengths=lengths[:5], long_lengths=lengths[5:]))
    for n, verdict in ((1, "inconclusive"), (2, "inconclusive"), (25, "pass")):
        items = [r for L in lengths for r in answers("hybrid", L, [1]*n)]
        for gate in ("3.smooth_decay", "3.no_oscillation"):
            found = judge(tmp_path/f"{n}", gate, 3, items, needles)
            assert found.verdict == verdict and (verdict == "pass" or "draws" in found.needs), (gate, n, found)


def test_four_of_four_is_not_yet_stable_retrieval(tmp_path):
    for n, verdict in (4, "inconclusive"), (7, "pass"):
        found = judge(tmp_path/str(n), "5.stable_retrieval", 5, answers("hybrid", 4096, [1]*n, depths=(.1,)))
        assert found.verdict == verdict
    open_ = judge(tmp_path/"open", "5.stable_retrieval", 5, answers("hybrid", 4096, [1, 1, 1, 0], depths=(.1,)))
    assert open_.verdict == "inconclusive" and "draws at each place" in open_.needs


def test_an_unasked_half_of_a_claim_keeps_it_open(tmp_path):
    far = answers("pi_spiral_single", 12288, [1]*5, spiral="single")  # asked, but not where the guard looks
    items = answers("rope", 512, [1]*400) + answers("pi_spiral", 512, [1]*400) + far
    found = judge(tmp_path, "2.pi_spiral_short", 2, items)
    assert found.verdict == "inconclusive" and "pi_spiral_single: modes" in found.reason


def test_memory_is_not_flat_over_next_to_nothing(tmp_path):
    def table(*lengths):
        grows = "".join(f"{9 + i},{1024*(i + 1)},{1000 + 100*i},50,,1,cpu,control: unbounded cache\n" for i in range(4))
        return "step,length,vram_mb,tokens_per_sec,window,state_size,device,mode\n" + "".join(
            f"{i},{L},{1000 + i % 2},50,256,1,cpu,hybrid\n" for i, L in enumerate(lengths)) + grows
    near = judge(tmp_path/"a", "3.flat_memory", 3, [], **{"system.csv": table(1024, 1025, 1026, 1027)})
    assert near.verdict == "inconclusive" and "doubling" in near.reason
    far = judge(tmp_path/"b", "3.flat_memory", 3, [], **{"system.csv": table(1024, 2048, 4096, 8192)})
    assert far.verdict == "pass"
    with pytest.raises(ValueError, match="phase_03/system.csv is corrupt"):
        judge(tmp_path/"c", "3.flat_memory", 3, [], **{"system.csv": ""})


def test_scores_between_zero_and_one_decide_too(tmp_path):
    share = np.random.default_rng(0).uniform(.4, .6, 60).round(3).tolist()
    up = answers("hybrid", 12288, [s + .4 for s in share]) + answers("rope", 12288, [s - .4 for s in share])
    assert judge(tmp_path/"far", "3.gain_over_rope", 3, up).verdict == "pass"
    near = answers("hybrid", 12288, share) + answers("rope", 12288, share)
    assert judge(tmp_path/"near", "3.gain_over_rope", 3, near).verdict == "fail"


BAD = {
    "another mode under one key": (lambda r: [*r, {**r[0], "mode": "yarn"}], "has mode yarn, but rope"),
    "another score under one key": (lambda r: [*r, {**r[0], "score": 0}], "has score 0, but 1"),
    "another question under one key": (lambda r: [*r, {**r[0], "length": 1024}], "has pair"),
    "no score": (lambda r: [{**r[0], "score": None}], "has no score"),
    "a score beyond one": (lambda r: [{**r[0], "score": 1.5}], "not a number in [0, 1]"),
    "a score that is no number": (lambda r: [{**r[0], "score": math.nan}], "not a number in [0, 1]"),
    "a length in words": (lambda r: [{**r[0], "length": "long"}], "not a number of tokens"),
    "settings in words": (lambda r: [{**r[0], "config": "default"}], "not settings"),
}


@pytest.mark.parametrize("name", BAD)
def test_records_that_contradict_themselves_are_refused_by_name(tmp_path, name):
    spoil, says = BAD[name]
    with pytest.raises(ValueError) as e: judge(tmp_path, "2.hybrid_short", 2, spoil(answers("rope", 512, [1]*3)))
    assert says in str(e.value) and "phase_02/items.jsonl" in str(e.value) and "\n" not in str(e.value)


def test_a_repeated_line_counts_once_and_is_said(tmp_path):
    items = answers("rope", 512, [1]*200) + answers("hybrid", 512, [1]*200)
    found = judge(tmp_path, "2.hybrid_short", 2, items + items)
    assert (found.verdict, found.evidence["hybrid_n"]) == ("inconclusive", 200) and "400 repeated lines" in found.reason


def test_optional_fields_may_be_absent(tmp_path):
    def bare(*lacking):
        return [{k: v for k, v in r.items() if k not in lacking}
                for m, s in (("rope", 0), ("hybrid", 1)) for r in answers(m, 12288, [s]*40)]
    assert judge(tmp_path/"a", "3.gain_over_rope", 3, bare("window", "config", "needle_at", "model")).verdict == "pass"
    untold = judge(tmp_path/"b", "3.gain_over_rope", 3, bare("answer"))  # nothing to hold against another draw's value
    assert untold.verdict == "inconclusive"


def test_nothing_recorded_claims_nothing(tmp_path):
    write_json(tmp_path/"run.json", {"profile": {}})
    gates = evaluate_gates(tmp_path, GATES)
    decision = decide(gates)
    assert {g.verdict for g in gates} == {"not run", "out of scope"} and not decision.claims
    assert decision.holds == ["elsewhere"]  # a profile that names nothing can decide nothing
    assert all(a.command.startswith("pispiral run --phases") for a in decision.actions)


def test_every_command_that_would_decide_a_gate_can_be_typed():
    profile = load_profile("demo").model_dump()
    for g in GATES:
        named = [word.split("=")[0] for word in g.settle.split("--set ")[1:]]
        assert [path for path in named if value_at(profile, path, "nowhere") == "nowhere"] == [], g.id


def test_profiles_name_what_the_evidence_reads():
    source = "".join(p.read_text() for folder in ("lab", "lab/phases") for p in (ROOT/"pispiral"/folder).glob("*.py"))
    source += "".join(p.read_text(encoding="utf-8") for p in (ROOT/"nbs"/"phases").glob("*.ipynb"))
    unread = [k for k in keys_of(Profile) if f".{k.rpartition('.')[2]}" not in source]
    assert unread == []
    for name in profile_names(): assert load_profile(name).repeats.seeds >= 3


def test_commands_name_what_is_wrong_with_records(runs):
    def cli(*words, expect=0):
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exit_code == expect, done.output
        return done.stdout, done.stderr
    write_json(runs/"mine"/"run.json", {"run_id": "mine", "profile": PROFILE})
    write_json(runs/"theirs"/"run.json", {"run_id": "theirs", "profile": PROFILE})
    write_log(runs/"mine"/"phase_03"/"items.jsonl", answers("hybrid", 512, [1]*12) + answers("rope", 512, [0]*12))
    write_log(runs/"theirs"/"phase_03"/"items.jsonl", answers("yarn", 1024, [1]*3))
    out, err = cli("compare", "mine:hybrid", "mine:rope", "theirs", "--out", runs/"c.pdf")
    assert "better" in out and "theirs:yarn share no item (length: 512 against 1024" in err
    assert (runs/"c.pdf").read_bytes()[:4] == b"%PDF"
    assert cli("compare", "mine:hybrid", "theirs", expect=2)[1].strip().count("\n") == 0
    with open(runs/"theirs"/"phase_03"/"items.jsonl", "a") as f: f.write("{oops\n")
    out, err = cli("compare", "mine", "theirs:yarn", expect=2)
    assert "run 'theirs': phase_03/items.jsonl line 4 is corrupt: '{oops'; delete that line" in err
