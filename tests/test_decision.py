"""Record sets with a known truth reach the right verdicts, and each leaf of the decision tree, alone and mixed."""
import json

import pytest

from conftest import ROOT
from made_runs import PROFILE, write_run
from pispiral.evidence.records import write_json
from pispiral.verdict.decision import decide, decision_markdown
from pispiral.verdict.gates import evaluate_gates, load_gates

GATES = load_gates(ROOT/"nbs"/"profiles"/"gates.yaml")
# no profile has models that learned with each irrational yet, and demo chooses no rival
ELSEWHERE = {"6.pi_on_learned", "3.gain_over_best_rival"}


def judged(folder, **truth):
    "Verdicts by gate, and the decision."
    gates = evaluate_gates(write_run(folder, **truth), GATES)
    return {g.id: g.verdict for g in gates}, decide(gates)


def test_release_needs_every_gate(tmp_path):
    verdicts, decision = judged(tmp_path/"r")
    assert {g: v for g, v in verdicts.items() if v != "pass"} == dict.fromkeys(ELSEWHERE, "out of scope")
    assert decision.holds == ["narrow"] and not decision.dropped and not decision.actions
    all_pass = evaluate_gates(tmp_path/"r", [g for g in GATES if g.id not in ELSEWHERE])
    assert decide(all_pass).holds == ["release"]


LEAVES = {
    "non_periodic": (dict(prng=1.), {"6.pi_vs_prng": "fail", "6.non_periodic_gain": "pass"},
                     ["non_periodic", "narrow"]),
    "hybrid_default": (dict(spiral=.5, single=0.), {"2.pi_spiral_short": "fail", "2.hybrid_short": "pass"},
                       ["hybrid_default", "narrow"]),
    "attractor_led": (dict(hybrid=.1), {"6.attractor_share": "fail"}, ["attractor_led", "not_supported"]),
    "not_supported": (dict(hybrid=0.), {"3.gain_over_rope": "fail", "3.gain_over_rope_ntk": "fail",
                                          "3.smooth_decay": "fail"},
                      ["not_supported"]),
    "memory grows": (dict(rising=.2), {"2.flat_memory": "fail", "3.flat_memory": "fail"}, ["not_supported"]),
    "harm at short lengths": (dict(short=.5), {"2.hybrid_short": "fail"}, ["not_supported"]),
    "a line, not a flat spectrum": (dict(spectrum="line"), {"7.flat_spectrum": "fail"}, ["narrow"]),
    "no gain to share": (dict(both=0.), {"6.attractor_share": "fail"}, ["attractor_led", "narrow"]),
    "hybrid default, no gain": (dict(spiral=.5, single=0., rope=1.), {"3.gain_over_rope": "fail"},
                                ["hybrid_default", "not_supported"]),
}


@pytest.mark.parametrize("name", LEAVES)
def test_each_leaf_and_mixtures(tmp_path, name):
    truth, expected, holds = LEAVES[name]
    verdicts, decision = judged(tmp_path/"r", **truth)
    assert {g: verdicts[g] for g in expected} == expected
    assert set(holds) <= set(decision.holds)
    failing = {g for g, v in verdicts.items() if v == "fail"}
    assert len(decision.dropped) == len(failing) and all(any(f"[{g}]" in d for d in decision.dropped) for g in failing)
    page = decision_markdown(decision)
    assert all(f"**{b}.**" in page for b in holds)


def test_too_little_data_is_inconclusive_and_says_how_many_draws(tmp_path):
    verdicts, decision = judged(tmp_path/"few", n=1)
    assert verdicts["2.pi_spiral_short"] == "inconclusive"
    assert "undecided" in decision.holds
    open_ = {a.gate: a for a in decision.actions}
    assert "about 352 more draws, if they are like the 4 so far" in open_["2.pi_spiral_short"].why  # one at each length
    assert open_["2.pi_spiral_short"].command == "pispiral run --run-id few --until-decided --gates 2.pi_spiral_short"
    assert all(a.command.startswith("pispiral run") for a in decision.actions)


def test_no_data_is_not_run(tmp_path):
    (tmp_path/"r").mkdir()
    write_json(tmp_path/"r"/"run.json", {"profile": PROFILE})
    gates = evaluate_gates(tmp_path/"r", GATES)
    assert {g.verdict for g in gates} == {"not run", "out of scope"} and decide(gates).holds == ["undecided"]


def test_missing_seeds_and_corrupt_lines_are_named(tmp_path):
    folder, one = write_run(tmp_path/"r"), write_run(tmp_path/"one", phases=[8])
    log = one/"phase_08"/"items.jsonl"
    keep = [line for line in log.read_text(encoding="utf-8").split("\n") if line and json.loads(line)["seed"] == 5000]
    log.write_text("\n".join(keep) + "\n", encoding="utf-8")
    seeds = {g.id: g for g in evaluate_gates(one, GATES)}["8.seeds"]
    assert seeds.verdict == "fail" and "0 of 4 key settings have 3 draws" in seeds.reason
    with open(folder/"phase_03"/"items.jsonl", "a", encoding="utf-8") as f: f.write("{oops\n")
    with pytest.raises(ValueError, match=r"phase_03/items.jsonl line \d+ is corrupt"): evaluate_gates(folder, GATES)
