"""Record sets with a known truth reach the right verdicts, and each leaf of the decision tree, alone and mixed."""
import csv

import numpy as np
import pytest

from conftest import ROOT
from pispiral.evidence.records import write_json, write_log
from pispiral.verdict.decision import decide, decision_markdown
from pispiral.verdict.gates import evaluate_gates, load_gates

GATES = load_gates(ROOT/"nbs"/"profiles"/"gates.yaml")
SHORT, LONG, NATIVE, K = [512, 1024, 2048, 4096], [12288, 16384, 24576, 32768, 65536], 8192, 4096
PROFILE = dict(name="demo", native_length=NATIVE, hybrid_K=K, short_lengths=SHORT, long_lengths=LONG, irrational="pi")
CHECKS = {1: ["unit_tests", "shapes", "determinism", "incremental_matches_recompute", "constant_state"],
          4: ["stable_4bit"], 8: ["failures_collected"], 9: ["tables", "figures", "kit"], 10: ["decision_written"]}


def items(mode, length, n, right=1., model="small", seeds=3, **more):
    "n items of a mode at a length; item i is the same question for every mode, and the first `right` share is right."
    spiral = "single" if mode.endswith("single") else "harmonic"
    config = dict(irrational="pi", hybrid_K=K, spiral=spiral, blend="phase", phase="linear") | more
    top = {k: more.pop(k) for k in ("attractor", "window", "alpha_policy") if k in more}
    name = f"{mode}-{length}-{model}-{sorted(more.items())}-{sorted(top.items())}"
    return [dict(key=f"{name}-{i}", task="niah", haystack="repeat", length=length, depth=.1 + .2*(i % 5),
                 seed=i % seeds, mode=mode, model=model, needle_at=i, expected=[str(i)], score=float(i < right*n),
                 config=config, **top)
            for i in range(n)]


def table(path, rows):
    "A CSV table from dicts."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def write_run(folder, n=40, short=1., single=1., spiral=1., hybrid=1., rope=0., prng=.5, both=1., code=1.,
              phases=range(1, 11), spectrum="flat", rising=0.):
    "A run whose truth is given: shares of right answers, and what grows."
    at = 100 if n > 5 else n  # items of the spirals and of what they are held against, at each short length
    def grid(model):
        out = [r for m, share in (("rope", 1.), ("hybrid", short)) for L in SHORT
               for r in items(m, L, at if (m, model) == ("rope", "small") else 10, share, model)]
        return out + [r for m, share in (("rope", rope), ("rope_ntk", rope), ("hybrid", hybrid)) for L in LONG
                      for r in items(m, L, (n + 1)//2, share, model)]
    small, medium = grid("small"), grid("medium")
    sanity = [r for r in small if r["length"] in SHORT]
    sanity += [r for m, share in (("pi_spiral", spiral), ("pi_spiral_single", single)) for L in SHORT
               for r in items(m, L, at, share)]
    far = 12288
    grid6 = [r for x, share in (("pi", 1.), ("prng", prng))
             for r in items("pi_spiral", far, max(n, 3)*2, share, irrational=x)]
    grid6 += items("rope", far, max(n, 3)*2, rope)
    windowed = dict(window=1024)
    grid6 += [r for m, a, share in (("hybrid", True, both), ("hybrid", None, code), ("rope", None, 0.))
              for r in items(m, 4096, n, share, attractor=a, **windowed)]
    again = [dict(r, key=r["key"] + "x") for m in ("rope", "rope_ntk", "pi_spiral", "hybrid")
             for r in items(m, 1024, 12, 1., haystack_seed=1)]
    logs = {2: sanity, 3: [r for r in small if r["length"] in LONG], 4: medium,
            5: items("hybrid", 16384, max(n, 2), hybrid, "heavy"), 6: grid6, 8: again}
    for r in logs[8]: r["task"] = "niah"
    equal = dict(lengths=[L for L in SHORT if L <= K], max_abs_diff=0., items=9, K=K)
    proof = dict(ok=True, detail="equal", values=equal)
    write_json(folder/"run.json", {"profile": PROFILE})
    for p in phases:
        sub = folder/f"phase_{p:02d}"
        checks = {c: dict(ok=True, detail="as planned", values={}) for c in CHECKS.get(p, [])}
        if p in (2, 4): checks["hybrid_equals_rope"] = proof
        write_json(sub/"result.json", dict(phase=p, status="done", checks=checks, not_run=[], native_length=NATIVE))
        if p in logs: write_log(sub/"items.jsonl", logs[p])
        if p in (2, 3, 5):
            table(sub/"system.csv", [dict(step=i, length=L, vram_mb=1000*(1 + rising*i) + i % 2, window=1024,
                                          tokens_per_sec=500 - i % 2, state_size=64, device="cpu", mode="hybrid")
                                     for i, L in enumerate((64000, 128000, 256000, 512000, 1000000))])
        if p == 7:
            similar = dict(cosine_sim_pi_spiral=.1, cosine_sim_rope=.5, cosine_sim_rope_ntk=.6)
            table(sub/"positional_diag.csv", [dict(offset=o, **similar) for o in (1000, 5000, 10**6)])
            line = [1e-9]*100 + [1.] + [1e-9]*155
            power = np.random.default_rng(0).exponential(size=256) if spectrum == "flat" else line
            table(sub/"spectral_fft.csv", [dict(mode="pi_spiral", freq=(i + 1)/512, magnitude=float(v)**.5)
                                           for i, v in enumerate(power)])
            write_log(sub/"metrics.jsonl",
                      [dict(task="perplexity", mode=m, length=128*(i + 1), ppl=float(np.exp(3 - .01*i)))
                       for m in ("pi_spiral", "hybrid") for i in range(16)])
    return folder


def judged(folder, **truth):
    "Verdicts by gate, and the decision."
    gates = evaluate_gates(write_run(folder, **truth), GATES)
    return {g.id: g.verdict for g in gates}, decide(gates)


def test_release(tmp_path):
    verdicts, decision = judged(tmp_path/"r")
    assert {g: v for g, v in verdicts.items() if v != "pass"} == {}
    assert decision.holds == ["release"] and not decision.dropped and not decision.actions
    assert len(decision.claims) == len(GATES)


LEAVES = {
    "non_periodic": (dict(prng=1.), {"6.pi_vs_prng": "fail", "6.non_periodic_gain": "pass"},
                     ["non_periodic", "narrow"]),
    "hybrid_default": (dict(spiral=.5, single=0.), {"2.pi_spiral_short": "fail", "2.hybrid_short": "pass"},
                       ["hybrid_default", "narrow"]),
    "attractor_led": (dict(code=.1), {"6.attractor_share": "fail"}, ["attractor_led", "narrow"]),
    "not_supported": (dict(hybrid=0.), {"3.gain_over_rope": "fail", "3.gain_over_rope_ntk": "fail"}, ["not_supported"]),
    "memory grows": (dict(rising=.2), {"2.flat_memory": "fail", "3.flat_memory": "fail"}, ["not_supported"]),
    "harm at short lengths": (dict(short=.5), {"2.hybrid_short": "fail"}, ["not_supported"]),
    "a line, not a flat spectrum": (dict(spectrum="line"), {"7.flat_spectrum": "fail"}, ["narrow"]),
    "pi_prng and attractor": (dict(prng=1., code=.1), {"6.pi_vs_prng": "fail", "6.attractor_share": "fail"},
                              ["non_periodic", "attractor_led", "narrow"]),
    "three at once": (dict(prng=1., code=.1, spiral=.2, single=0.), {},
                      ["non_periodic", "hybrid_default", "attractor_led", "narrow"]),
    "hybrid default, no gain": (dict(spiral=.5, single=0., rope=1.), {"3.gain_over_rope": "fail"},
                                ["hybrid_default", "not_supported"]),
}


@pytest.mark.parametrize("name", LEAVES)
def test_each_leaf_and_mixtures(tmp_path, name):
    truth, expected, holds = LEAVES[name]
    verdicts, decision = judged(tmp_path/"r", **truth)
    assert {g: verdicts[g] for g in expected} == expected
    assert decision.holds == holds or name == "harm at short lengths" and "not_supported" in decision.holds
    failing = {g for g, v in verdicts.items() if v == "fail"}
    assert len(decision.dropped) == len(failing) and all(any(f"[{g}]" in d for d in decision.dropped) for g in failing)
    page = decision_markdown(decision)
    assert all(f"**{b}.**" in page for b in holds)


def test_too_little_data_is_inconclusive_and_says_how_many_items(tmp_path):
    verdicts, decision = judged(tmp_path/"r", n=1)
    assert verdicts["3.gain_over_rope"] == verdicts["2.pi_spiral_short"] == "inconclusive"
    assert decision.holds == ["undecided"]
    open_ = {a.gate: a for a in decision.actions}
    assert "364 more pairs without a loss (368 in all)" in open_["2.pi_spiral_short"].why  # one at each short length
    assert "--set needles.seeds=92 " in open_["2.pi_spiral_short"].command
    assert "paired items at the same rates" in open_["3.gain_over_rope"].why
    assert all(a.command.startswith("pispiral run") for a in decision.actions)


def test_no_data_is_not_run(tmp_path):
    (tmp_path/"r").mkdir()
    write_json(tmp_path/"r"/"run.json", {"profile": PROFILE})
    gates = evaluate_gates(tmp_path/"r", GATES)
    assert {g.verdict for g in gates} == {"not run"} and decide(gates).holds == ["undecided"]


def test_missing_seeds_and_repeated_and_corrupt_lines_are_named(tmp_path):
    folder = write_run(tmp_path/"r")
    log = folder/"phase_08"/"items.jsonl"
    keep = [line for line in log.read_text().splitlines() if '"seed": 0' in line]
    log.write_text("\n".join(keep) + "\n")
    one = write_run(tmp_path/"one", phases=[8])
    (one/"phase_08"/"items.jsonl").write_text("\n".join(keep) + "\n")
    seeds = {g.id: g for g in evaluate_gates(one, GATES)}["8.seeds"]
    assert seeds.verdict == "inconclusive" and "3 seeds" in seeds.needs
    with open(folder/"phase_03"/"items.jsonl", "a") as f: f.write("{oops\n")
    with pytest.raises(ValueError, match=r"phase_03/items.jsonl line \d+ is corrupt"): evaluate_gates(folder, GATES)
