"Equal care: one rule, as many tries for all, draws that no gate uses, and the best rival that comes of it."
import json

import pytest
import yaml
from conftest import ROOT
from typer.testing import CliRunner

from pispiral.cli.main import app
from pispiral.codes.registry import CODES, Reach, options_of, rivals
from pispiral.evidence.care import CARE, DEVELOPMENT, with_found
from pispiral.evidence.records import SCHEMA, write_json, write_log
from pispiral.lab.care import care_methods, cared
from pispiral.lab.deciding import cost_table, open_gates
from pispiral.lab.places import profile_names
from pispiral.lab.profiles import load_profile, make_profile
from pispiral.publish.paper import rival_values
from pispiral.publish.results import main_rows, open_results
from pispiral.publish.tables.needles import care_table
from pispiral.verdict.examples import example_items
from pispiral.verdict.gates import judge_gate, load_gates
from pispiral.verdict.pairs import load_records

GATES = ROOT/"nbs"/"profiles"/"gates.yaml"
GATE = "3.gain_over_best_rival"


def tries(*scores, **option):
    return [dict(option=option if i else {}, score=s, draws=4) for i, s in enumerate(scores)]


FOUND = dict(rule="the best", task="niah", haystack="repeat", length=12288, draws=4, tries=2, candidate="hybrid",
             seeds=[DEVELOPMENT, DEVELOPMENT + 3], best="yarn", methods=dict(
                 hybrid=dict(chosen=1, tries=tries(.25, .75, hybrid_K=1024)), rope=dict(chosen=0, tries=tries(0., 0.)),
                 yarn=dict(chosen=1, tries=tries(.25, .5, factor=3.))))


def a_run(folder, rows=(), profile="demo", found=FOUND):
    "A run of a shipped profile that has been cared for."
    asks = load_profile(profile, {"care.tries": 2, "decide.tokens": None})
    write_json(folder/"run.json", dict(profile=asks.model_dump(), run_id=folder.name, schema=SCHEMA))
    if found: write_json(folder/CARE, found)
    write_log(folder/"phase_03"/"items.jsonl", list(rows))
    return folder


def answers(mode, scores, first=0, **code):
    "Records of needles at the demo's long lengths under a method of `FOUND`."
    known = dict(hybrid_tuned=dict(pos="hybrid", hybrid_K=1024), yarn_tuned=dict(pos="yarn", factor=3.))
    config = {**CODES[known[mode]["pos"]].params().model_dump(), **known[mode]}
    return [o for n in (12288, 16384) for o in example_items(mode, n, scores, first=first, more=dict(config=config))]


def judged(folder): return judge_gate(load_records(folder), next(g for g in load_gates(GATES) if g.id == GATE))


def test_every_profile_asks_seeds_below_the_development_sets():
    for name in profile_names():
        seeds = [v for k, v in leaves(load_profile(name).model_dump()) if k.endswith("seeds")]
        assert max(seeds) < DEVELOPMENT
    with pytest.raises(ValueError, match="needles.seeds"): load_profile("demo", {"needles.seeds": DEVELOPMENT})


def leaves(value, path=""):
    for k, v in value.items():
        if isinstance(v, dict): yield from leaves(v, f"{path}{k}.")
        else: yield f"{path}{k}", v


def test_every_rival_is_registered_and_cared_for_without_being_listed():
    demo = load_profile("demo")
    assert care_methods(demo) == ["hybrid", *rivals()]
    assert {"rope", "yarn", "rope_ntk", "dynamic_ntk", "linear", "llama3", "longrope", "alibi", "nope"} <= {*rivals()}
    assert not {"hybrid", "pi_spiral"} & {*rivals()}
    for name in rivals(): assert len(options_of(name, Reach(8192, 16384))) > 1, f"{name} has nothing to choose"


def test_a_run_is_read_with_what_it_has_found(tmp_path):
    profile = load_records(a_run(tmp_path)).profile
    assert profile["care"]["own"] == "hybrid_tuned" and profile["care"]["best"] == "yarn_tuned"
    assert profile["needles"]["methods"][-2:] == ["hybrid_tuned", "yarn_tuned"]
    made = make_profile(profile)
    assert made.method("yarn_tuned").code.params.factor == 3 and made.method("yarn").code.params.factor is None
    assert cared(load_profile("demo", {"care.tries": 2, "decide.tokens": None}), tmp_path) == made
    assert json.loads((tmp_path/"run.json").read_text())["profile"]["care"]["best"] is None  # the run's own file stays
    assert load_records(a_run(tmp_path/"bare", found=None)).profile["care"]["best"] is None


def test_the_gate_meets_the_best_rival_on_other_draws(tmp_path):
    sides = answers("hybrid_tuned", [1]*60) + answers("yarn_tuned", [0]*60)
    won = judged(a_run(tmp_path/"won", sides))
    assert won.verdict == "pass" and "hybrid_tuned against yarn_tuned" in won.reason and "yarn_tuned" in won.statement
    assert "at most 2 tries of each of 3 methods on 4 other draws at 12288 tokens" in won.reason
    assert won.control.endswith("fail")
    tie = answers("hybrid_tuned", [1]*90) + answers("yarn_tuned", [1]*90)
    assert judged(a_run(tmp_path/"tie", tie)).verdict == "fail"
    dev = answers("hybrid_tuned", [1]*60, DEVELOPMENT) + answers("yarn_tuned", [0]*60, DEVELOPMENT)
    seen = judged(a_run(tmp_path/"dev", dev))  # what settings were chosen on says nothing for them
    assert seen.verdict == "not run" and "of the development set" in seen.reason
    assert judged(a_run(tmp_path/"none", found=None)).verdict == "not run"


def test_what_a_round_asks_are_the_two_that_were_chosen(tmp_path):
    profile = load_profile("full")
    write_json(tmp_path/"run.json", {"profile": profile.model_dump()})
    write_json(tmp_path/CARE, FOUND)
    gates = [g for g in load_gates(GATES) if g.id == GATE]
    assert not open_gates(tmp_path, profile, gates)[0]  # nothing is asked before a rival is chosen
    [open_] = open_gates(tmp_path, cared(profile, tmp_path), gates)[0]
    assert open_.ask.methods == ("hybrid_tuned", "yarn_tuned")
    costs = cost_table(cared(profile, tmp_path), gates)
    assert costs.scope[0] == "draw by draw" and costs.tokens[0] <= profile.decide.tokens


def test_the_paper_and_the_tables_say_how_settings_were_chosen(tmp_path):
    sides = answers("hybrid_tuned", [1]*4) + answers("yarn_tuned", [0]*4)
    res = open_results(a_run(tmp_path/"told", sides), GATES)
    told = rival_values(res, main_rows(res.rec))
    assert (told["own"], told["best"], told["tries"], told["methods"]) == ("hybrid_tuned", "yarn_tuned", "2", "3")
    assert told["length"] == "16384" and told["candidate"].startswith("1.00") and told["baseline"].startswith("0.00")
    assert rival_values(open_results(a_run(tmp_path/"bare", found=None), GATES), main_rows(res.rec)) == {}
    rows = {keys[0]: (keys[1], [c.text for c in cells]) for keys, cells in care_table(res).rows}
    assert rows["yarn"] == ("best rival", ["2", "0.25 n=4", "factor=3.0", "0.50 n=4"])
    assert rows["hybrid"][0] == "candidate" and rows["rope"][1][2] == "its own"


def test_a_profile_with_nothing_found_is_as_it_was():
    nested = load_profile("demo").model_dump()
    assert with_found(nested, {}) == nested and with_found(nested, dict(best=None)) == nested


@pytest.mark.parametrize("more, says", [
    ({"care.tries": -1}, "care.tries"), ({"care.draws": 0}, "care.draws"), ({"care.methods": ["yarm"]}, "yarn"),
    ({"care.length": 99999}, "target_length"), ({"care.best": "nobody"}, "care.best")])
def test_a_slip_in_the_section_is_named(more, says):
    with pytest.raises(ValueError, match=says) as e: load_profile("demo", more)
    assert "\n" not in str(e.value)


def test_tuning_without_tries_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PISPIRAL_RUNS", str(tmp_path))
    told = CliRunner().invoke(app, ["tune", "--profile", "smoke"])
    assert told.exit_code == 2 and "care.tries=0" in told.output


@pytest.mark.slow
def test_a_tuned_run_asks_nothing_twice_and_phase_3_asks_the_best_rival(tmp_path, monkeypatch):
    monkeypatch.setenv("PISPIRAL_RUNS", str(tmp_path))
    words = ["--profile", "smoke", "--run-id", "t"]
    for pair in ("tries=2", "draws=1", "length=192", "methods=[yarn, rope]"): words += ["--set", f"care.{pair}"]
    assert CliRunner().invoke(app, ["tune", *words]).exit_code == 0
    first, log = (tmp_path/"t"/CARE).read_text(), tmp_path/"t"/"care"/"items.jsonl"
    lines = log.read_text().splitlines()
    assert {json.loads(line)["seed"] for line in lines} == {DEVELOPMENT}
    log.write_text("\n".join(lines[:2]) + "\n")  # as a kill would leave it
    (tmp_path/"t"/CARE).unlink()
    assert CliRunner().invoke(app, ["tune", *words]).exit_code == 0
    again = json.loads((tmp_path/"t"/CARE).read_text())
    assert again == json.loads(first) and len(log.read_text().splitlines()) == len(lines)
    assert CliRunner().invoke(app, ["run", *words, "--phases", "3"]).exit_code == 0
    asked = {json.loads(line)["mode"] for line in (tmp_path/"t"/"phase_03"/"items.jsonl").read_text().splitlines()}
    profile = load_records(tmp_path/"t").profile
    assert {profile["care"]["own"], profile["care"]["best"]} <= asked
    assert yaml.safe_load((tmp_path/"t"/"phase_03"/"params.yaml").read_text())["run_id"] == "t"
